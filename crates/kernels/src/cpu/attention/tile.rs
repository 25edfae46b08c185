//! One step of the online softmax: some queries over a tile of 64 slots.

use super::{
    AttentionJob, Call, TILE,
    inner::{Weighted, scale, scores, soften, widen},
    number::Number,
    received::Keep,
    state_len,
    task::TaskRows,
};
use crate::cpu::simd::{LANES, Simd};

/// Scales of the slots of a tile. They go on scores and weights, so that bytes as stored and bytes
/// widened give the same bits.
#[derive(Clone, Copy)]
struct Scales {
    /// `[64]`.
    keys: *const f32,
    /// `[64]`.
    values: *const f32,
}

/// 64 slots of one head, as stored or widened.
pub(super) struct Tile<'a, N> {
    /// `[4, head_dim, 16]`.
    keys: *const N,
    /// `[64, value_width]`.
    values: *const N,
    scales: Option<Scales>,
    /// The first slot.
    start: usize,
    job: &'a AttentionJob,
    head: usize,
}

impl<'a, N: Number> Tile<'a, N> {
    /// The slots from `start` as stored.
    ///
    /// # Safety
    /// Job, head and slots exist ([`Attention::check`](super::Attention::check)).
    #[inline(always)]
    pub(super) unsafe fn stored(call: &Call<'a>, job: &'a AttentionJob, head: usize, start: usize) -> Self {
        let (layout, base) = (&job.place.layout, job.place.base);
        let layer = N::at(call.memory, base);
        // SAFETY: the caller's promise; scales are aligned, as the base of a layer with scales is.
        unsafe {
            let scales = || Scales {
                keys: layer.byte_add(layout.key_scale(head, start)).cast(),
                values: layer.byte_add(layout.value_scale(head, start)).cast(),
            };
            Self {
                keys: layer.add(layout.key(head, start)),
                values: layer.add(layout.value(head, start)),
                scales: N::SCALED.then(scales),
                start,
                job,
                head,
            }
        }
    }

    /// The first `filled` slots, widened to `room`; if `values` are not wanted, they do not exist.
    ///
    /// # Safety
    /// The slots exist, and room for a tile.
    #[inline(always)]
    pub(super) unsafe fn widened<S: Simd>(
        &self,
        s: S,
        filled: usize,
        room: *mut f32,
        values: bool,
    ) -> Tile<'a, f32> {
        let layout = &self.job.place.layout;
        let dim = layout.head_dim();
        // SAFETY: the caller's promise; groups of 16 slots are padded to full.
        unsafe {
            let wide_values = room.add(TILE * dim);
            widen(s, self.keys, filled.next_multiple_of(LANES) * dim, room);
            if values {
                widen(s, self.values, filled * layout.value_width(), wide_values);
            }
            Tile {
                keys: room.cast_const(),
                values: wide_values.cast_const(),
                scales: self.scales,
                start: self.start,
                job: self.job,
                head: self.head,
            }
        }
    }
}

/// All queries of a task.
#[derive(Clone, Copy)]
pub(super) struct PackWork<'a, 'p> {
    pub(super) call: &'a Call<'p>,
    pub(super) rows: &'a TaskRows,
    pub(super) count: usize,
    pub(super) queries: *const f32,
    /// Room for [`PACK`](super::PACK) queries' scores.
    pub(super) scores: *mut f32,
    /// Where scores are kept.
    pub(super) keep: Option<Keep>,
}

impl<N: Number> Tile<'_, N> {
    /// One step of the online softmax for all queries of a task.
    ///
    /// # Safety
    /// Slots, queries, states and scores exist.
    #[inline(always)]
    pub(super) unsafe fn attend_all<S: Simd>(&self, s: S, work: PackWork<'_, '_>, states: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.each_pack(s, work, Attend { states }) }
    }

    /// Does `step` with all queries of a task, as many at a time as registers can hold.
    ///
    /// # Safety
    /// Slots, queries, scores and all that `step` writes to exist.
    #[inline(always)]
    pub(super) unsafe fn each_pack<S: Simd, P: PackStep>(&self, s: S, work: PackWork<'_, '_>, mut step: P) {
        let mut first = 0;
        while first < work.count {
            // SAFETY: the caller's promise.
            first += unsafe {
                match work.count - first {
                    6.. if S::WIDE => self.pack::<S, P, 6>(s, &work, first, &mut step),
                    4.. if S::WIDE => self.pack::<S, P, 4>(s, &work, first, &mut step),
                    3.. => self.pack::<S, P, 3>(s, &work, first, &mut step),
                    2 => self.pack::<S, P, 2>(s, &work, first, &mut step),
                    _ => self.pack::<S, P, 1>(s, &work, first, &mut step),
                }
            };
        }
    }

    /// Scores of `Q` queries and what `step` does with them; returns `Q`.
    ///
    /// # Safety
    /// As for [`Self::each_pack`].
    #[inline(always)]
    unsafe fn pack<S: Simd, P: PackStep, const Q: usize>(
        &self,
        s: S,
        work: &PackWork<'_, '_>,
        first: usize,
        step: &mut P,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            let filled = self.score::<S, Q>(s, work, first);
            if let Some(keep) = work.keep {
                self.keep::<Q>(work, first, filled, keep);
            }
            if filled > 0 {
                step.take::<S, N, Q>(s, self, work, first, filled);
            }
        }
        Q
    }

    /// Masked scores of `Q` queries from `first`, into `work.scores [Q, TILE]` as whole groups of 16
    /// slots. Returns how many slots some query sees; nothing is written if that is 0.
    ///
    /// # Safety
    /// Slots, queries and room for the scores exist.
    #[inline(always)]
    unsafe fn score<S: Simd, const Q: usize>(&self, s: S, work: &PackWork<'_, '_>, first: usize) -> usize {
        let PackWork { call, rows, .. } = *work;
        let dim = call.shape.head_dim;
        // Rows ascend, so the last query sees the most.
        let filled = rows.visible(first + Q - 1).saturating_sub(self.start).min(TILE);
        if filled == 0 {
            return 0;
        }
        let positions = call.window.map(|window| {
            let (positions, stride) = window.slots.slot_positions(self.job.id);
            (window, &positions[self.head * stride + self.start..][..filled])
        });
        if let Some((window, positions)) = positions {
            let oldest = window.row_positions[rows.first_row + rows.row(first)];
            if positions.iter().all(|position| position.saturating_add(window.size) <= oldest) {
                return 0;
            }
        }
        let groups = filled.div_ceil(LANES);
        // SAFETY: the caller's promise; groups of 16 slots are padded to full.
        unsafe {
            let queries = work.queries.add(first * dim);
            if S::WIDE && groups == TILE / LANES {
                scores::<S, N, Q, { TILE / LANES }>(s, self.keys, dim, queries, work.scores);
            } else {
                for group in 0..groups {
                    let keys = self.keys.add(group * LANES * dim);
                    scores::<S, N, Q, 1>(s, keys, dim, queries, work.scores.add(group * LANES));
                }
            }
            if let Some(scales) = self.scales {
                for i in 0..Q {
                    scale(s, work.scores.add(i * TILE), scales.keys, groups);
                }
            }
        }
        for i in 0..Q {
            // SAFETY: just written.
            let scores = unsafe { std::slice::from_raw_parts_mut(work.scores.add(i * TILE), groups * LANES) };
            let seen = rows.visible(first + i).saturating_sub(self.start).min(TILE);
            scores[seen.min(groups * LANES)..].fill(f32::NEG_INFINITY);
            if let Some((window, positions)) = positions {
                let own = window.row_positions[rows.first_row + rows.row(first + i)];
                for (score, position) in scores[..seen].iter_mut().zip(positions) {
                    if position.saturating_add(window.size) <= own {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        filled
    }

    /// Keeps the scores that [`Self::score`] wrote, or found to be nothing but masked.
    ///
    /// # Safety
    /// Scores of queries and room to keep them exist.
    #[inline(always)]
    unsafe fn keep<const Q: usize>(&self, work: &PackWork<'_, '_>, first: usize, filled: usize, keep: Keep) {
        for i in 0..Q {
            let seen = work.rows.visible(first + i).saturating_sub(self.start).min(TILE);
            let len = seen.next_multiple_of(LANES);
            // SAFETY: the caller's promise; what is kept of a query is whole groups of 16 slots.
            unsafe {
                let to = keep.query(first + i).add(self.start);
                if filled > 0 {
                    std::ptr::copy_nonoverlapping(work.scores.add(i * TILE), to, len);
                } else {
                    std::slice::from_raw_parts_mut(to, len).fill(f32::NEG_INFINITY);
                }
            }
        }
    }
}

/// What is done with the scores of some queries over a tile.
pub(super) trait PackStep {
    /// `work.scores [Q, TILE]` are those of queries `first..first + Q`, `filled` slots or less.
    ///
    /// # Safety
    /// Tile, queries, scores and what the step writes to exist.
    unsafe fn take<S: Simd, N: Number, const Q: usize>(
        &mut self,
        s: S,
        tile: &Tile<'_, N>,
        work: &PackWork<'_, '_>,
        first: usize,
        filled: usize,
    );
}

/// A step of the online softmax.
struct Attend {
    /// One per query of the task.
    states: *mut f32,
}

impl PackStep for Attend {
    #[inline(always)]
    unsafe fn take<S: Simd, N: Number, const Q: usize>(
        &mut self,
        s: S,
        tile: &Tile<'_, N>,
        work: &PackWork<'_, '_>,
        first: usize,
        filled: usize,
    ) {
        let state = state_len(&work.call.shape);
        let width = tile.job.place.layout.value_width();
        // SAFETY: the caller's promise.
        unsafe {
            let states = self.states.add(first * state);
            let mut rescale = [1.0; Q];
            for (i, rescale) in rescale.iter_mut().enumerate() {
                let len = filled.next_multiple_of(LANES);
                let scores = std::slice::from_raw_parts_mut(work.scores.add(i * TILE), len);
                *rescale = soften(s, scores, states.add(i * state));
                if let Some(scales) = tile.scales {
                    scale(s, scores.as_mut_ptr(), scales.values, len / LANES);
                }
            }
            let mut column = 0;
            while column < width {
                let values = tile.values.add(column);
                let sums = states.add(2 * LANES + column);
                let left = (width - column) / LANES;
                let step =
                    Weighted { values, width, filled, scores: work.scores, rescale: &rescale, sums, state };
                column += LANES
                    * match left {
                        4.. if S::WIDE => step.add::<S, 4>(s),
                        2.. if S::WIDE => step.add::<S, 2>(s),
                        _ => step.add::<S, 1>(s),
                    };
            }
        }
    }
}
