//! One step of the online softmax: some queries over a tile of 64 slots.

use super::{AttentionJob, Call, TILE, state_len, task::TaskRows};
use crate::cpu::{
    AlignedBuf,
    simd::{LANES, Simd},
};

/// A number type of slots.
pub(super) trait Number: Copy {
    /// Whether widening costs something.
    const NARROW: bool;
    /// Whether keys and values have scales.
    const SCALED: bool = false;

    /// Number `base` of the memory.
    fn at(memory: &AlignedBuf, base: usize) -> *const Self;

    /// # Safety
    /// 16 readable numbers at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
}

#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Half(u16);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Brain(u16);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Byte(i8);

impl Number for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    fn at(memory: &AlignedBuf, base: usize) -> *const Self {
        memory.as_slice::<f32>()[base..].as_ptr()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Number for Half {
    const NARROW: bool = true;

    #[inline(always)]
    fn at(memory: &AlignedBuf, base: usize) -> *const Self {
        memory.as_slice::<u16>()[base..].as_ptr().cast()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Number for Brain {
    const NARROW: bool = true;

    #[inline(always)]
    fn at(memory: &AlignedBuf, base: usize) -> *const Self {
        memory.as_slice::<u16>()[base..].as_ptr().cast()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p.cast()) }
    }
}

impl Number for Byte {
    const NARROW: bool = true;
    const SCALED: bool = true;

    #[inline(always)]
    fn at(memory: &AlignedBuf, base: usize) -> *const Self {
        memory.as_slice::<u8>()[base..].as_ptr().cast()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_i8(p.cast()) }
    }
}

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
}

/// Widens a multiple of 16 numbers.
///
/// # Safety
/// `count` numbers at `from` and room for them at `to`.
#[inline(always)]
unsafe fn widen<S: Simd, N: Number>(s: S, from: *const N, count: usize, to: *mut f32) {
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to.add(i), N::load(s, from.add(i))) };
    }
}

/// Asks for 64 numbers that will be needed soon.
#[inline(always)]
fn prefetch<N>(p: *const N) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(64 * size_of::<N>()).div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch of any address is allowed and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast::<i8>().wrapping_add(64 * line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
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

/// Scores of `Q` queries with `G` groups of 16 slots, into `out [Q, TILE]`.
///
/// # Safety
/// Keys `[G, dim, 16]`, queries `[Q, dim]`, room in `out`.
#[inline(always)]
unsafe fn scores<S: Simd, N: Number, const Q: usize, const G: usize>(
    s: S,
    keys: *const N,
    dim: usize,
    queries: *const f32,
    out: *mut f32,
) {
    let mut acc = [[s.splat(0.0); G]; Q];
    // SAFETY: the caller's promise.
    unsafe {
        for d in 0..dim {
            if N::NARROW && G == TILE / LANES {
                // The next tile follows; without this, memory is waited for.
                prefetch(keys.wrapping_add(TILE * (dim + d)));
            }
            let mut key = [s.splat(0.0); G];
            for (g, key) in key.iter_mut().enumerate() {
                *key = N::load(s, keys.add((g * dim + d) * LANES));
            }
            for (q, acc) in acc.iter_mut().enumerate() {
                let query = s.splat(*queries.add(q * dim + d));
                for (acc, key) in acc.iter_mut().zip(key) {
                    *acc = s.fma(key, query, *acc);
                }
            }
        }
        for (q, acc) in acc.into_iter().enumerate() {
            for (g, acc) in acc.into_iter().enumerate() {
                s.store(out.add(q * TILE + g * LANES), acc);
            }
        }
    }
}

/// Multiplies scores or weights by the scales of their slots.
///
/// # Safety
/// `groups` groups of 16 numbers and scales.
#[inline(always)]
unsafe fn scale<S: Simd>(s: S, numbers: *mut f32, scales: *const f32, groups: usize) {
    for at in (0..groups * LANES).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe { s.store(numbers.add(at), s.mul(s.load(numbers.add(at)), s.load(scales.add(at)))) };
    }
}

/// Turns one query's scores into weights, updates maximum and sums of its state, and returns the
/// factor on what it has gathered so far.
///
/// # Safety
/// `scores` is whole groups of 16; a state lies at `state`.
#[inline(always)]
unsafe fn soften<S: Simd>(s: S, scores: &mut [f32], state: *mut f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let before = *state;
        let mut largest = s.splat(before);
        for group in scores.chunks_exact(LANES) {
            largest = s.max(s.load(group.as_ptr()), largest);
        }
        let largest = s.largest(largest);
        if largest == f32::NEG_INFINITY {
            scores.fill(0.0);
            return 1.0;
        }
        let top = s.splat(largest);
        let factor = s.exp2(s.sub(s.splat(before), top));
        let mut sums = s.mul(s.load(state.add(LANES)), factor);
        for group in scores.chunks_exact_mut(LANES) {
            let weight = s.exp2(s.sub(s.load(group.as_ptr()), top));
            s.store(group.as_mut_ptr(), weight);
            sums = s.add(sums, weight);
        }
        s.store(state.add(LANES), sums);
        *state = largest;
        s.to_array(factor)[0]
    }
}

/// Adds weighted values to the sums of some queries.
struct Weighted<'a, N, const Q: usize> {
    /// `[filled, width]`, from the first column wanted.
    values: *const N,
    width: usize,
    filled: usize,
    /// Weights `[Q, TILE]`.
    scores: *const f32,
    rescale: &'a [f32; Q],
    /// The first query's sums at the first column; `state` numbers apart.
    sums: *mut f32,
    state: usize,
}

impl<N: Number, const Q: usize> Weighted<'_, N, Q> {
    /// `V` registers of columns; returns `V`.
    ///
    /// # Safety
    /// All that the fields point to exists.
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize>(&self, s: S) -> usize {
        let mut acc = [[s.splat(0.0); V]; Q];
        // SAFETY: the caller's promise.
        unsafe {
            for (q, acc) in acc.iter_mut().enumerate() {
                let rescale = s.splat(self.rescale[q]);
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.mul(s.load(self.sums.add(q * self.state + v * LANES)), rescale);
                }
            }
            for slot in 0..self.filled {
                if N::NARROW && V == 4 {
                    prefetch(self.values.wrapping_add((TILE + slot) * self.width));
                }
                let mut value = [s.splat(0.0); V];
                for (v, value) in value.iter_mut().enumerate() {
                    *value = N::load(s, self.values.add(slot * self.width + v * LANES));
                }
                for (q, acc) in acc.iter_mut().enumerate() {
                    let weight = s.splat(*self.scores.add(q * TILE + slot));
                    for (acc, value) in acc.iter_mut().zip(value) {
                        *acc = s.fma(weight, value, *acc);
                    }
                }
            }
            for (q, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    s.store(self.sums.add(q * self.state + v * LANES), acc);
                }
            }
        }
        V
    }
}
