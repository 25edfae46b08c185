//! One step of the online softmax: some queries over a tile of 64 slots.

use super::{AttentionJob, Call, TILE, state_len, task::TaskRows};
use crate::cpu::simd::{LANES, Simd};

/// A number type of slots.
pub(super) trait Number: Copy {
    /// Whether widening costs something.
    const NARROW: bool;

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

impl Number for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Number for Half {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Number for Brain {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p.cast()) }
    }
}

/// 64 slots of one head, as stored or widened.
pub(super) struct Tile<'a, N> {
    /// `[4, head_dim, 16]`.
    pub(super) keys: *const N,
    /// `[64, value_width]`.
    pub(super) values: *const N,
    /// The first slot.
    pub(super) start: usize,
    pub(super) job: &'a AttentionJob,
    pub(super) head: usize,
}

/// All queries of a task, with their states.
#[derive(Clone, Copy)]
pub(super) struct PackWork<'a, 'p> {
    pub(super) call: &'a Call<'p>,
    pub(super) rows: &'a TaskRows,
    pub(super) count: usize,
    pub(super) queries: *const f32,
    pub(super) states: *mut f32,
    pub(super) scores: *mut f32,
}

/// Some queries' scaled form, states and scores.
struct Pack {
    queries: *const f32,
    states: *mut f32,
    scores: *mut f32,
    /// The first of them within the task.
    first: usize,
}

/// Widens a multiple of 16 numbers.
///
/// # Safety
/// `count` numbers at `from` and room for them at `to`.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd, N: Number>(s: S, from: *const N, count: usize, to: *mut f32) {
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
    /// One step of the online softmax for all queries of a task, as many at a time as registers
    /// can hold.
    ///
    /// # Safety
    /// Slots, queries, states and scores exist.
    #[inline(always)]
    pub(super) unsafe fn attend_all<S: Simd>(&self, s: S, work: PackWork<'_, '_>) {
        let PackWork { call, rows, .. } = work;
        let (dim, state) = (call.shape.head_dim, state_len(&call.shape));
        let mut first = 0;
        while first < work.count {
            // SAFETY: the caller's promise.
            first += unsafe {
                let pack = Pack {
                    queries: work.queries.add(first * dim),
                    states: work.states.add(first * state),
                    scores: work.scores,
                    first,
                };
                match work.count - first {
                    6.. if S::WIDE => self.attend::<S, 6>(s, call, rows, pack),
                    4.. if S::WIDE => self.attend::<S, 4>(s, call, rows, pack),
                    3.. => self.attend::<S, 3>(s, call, rows, pack),
                    2 => self.attend::<S, 2>(s, call, rows, pack),
                    _ => self.attend::<S, 1>(s, call, rows, pack),
                }
            };
        }
    }

    /// One step of the online softmax for `Q` queries; returns `Q`.
    ///
    /// # Safety
    /// Slots, queries, states and scores exist.
    #[inline(always)]
    unsafe fn attend<S: Simd, const Q: usize>(
        &self,
        s: S,
        call: &Call<'_>,
        rows: &TaskRows,
        pack: Pack,
    ) -> usize {
        let shape = &call.shape;
        let (dim, state) = (shape.head_dim, state_len(shape));
        let layout = &self.job.place.layout;
        // Rows ascend, so the last query sees the most.
        let filled = rows.visible(pack.first + Q - 1).saturating_sub(self.start).min(TILE);
        if filled == 0 {
            return Q;
        }
        let positions = call.window.map(|window| {
            let (positions, stride) = window.slots.slot_positions(self.job.id);
            (window, &positions[self.head * stride + self.start..][..filled])
        });
        if let Some((window, positions)) = positions {
            let oldest = window.row_positions[rows.first_row + rows.row(pack.first)];
            if positions.iter().all(|position| position.saturating_add(window.size) <= oldest) {
                return Q;
            }
        }
        // SAFETY: the caller's promise; groups of 16 slots are padded to full.
        unsafe {
            let keys = self.keys;
            let groups = filled.div_ceil(LANES);
            if S::WIDE && groups == TILE / LANES {
                scores::<S, N, Q, { TILE / LANES }>(s, keys, dim, pack.queries, pack.scores);
            } else {
                for group in 0..groups {
                    let keys = keys.add(group * LANES * dim);
                    scores::<S, N, Q, 1>(s, keys, dim, pack.queries, pack.scores.add(group * LANES));
                }
            }
            let mut rescale = [1.0; Q];
            for (i, rescale) in rescale.iter_mut().enumerate() {
                let scores = std::slice::from_raw_parts_mut(pack.scores.add(i * TILE), groups * LANES);
                let seen = rows.visible(pack.first + i).saturating_sub(self.start).min(TILE);
                scores[seen.min(groups * LANES)..].fill(f32::NEG_INFINITY);
                if let Some((window, positions)) = positions {
                    let own = window.row_positions[rows.first_row + rows.row(pack.first + i)];
                    for (score, position) in scores[..seen].iter_mut().zip(positions) {
                        if position.saturating_add(window.size) <= own {
                            *score = f32::NEG_INFINITY;
                        }
                    }
                }
                *rescale = soften(s, scores, pack.states.add(i * state));
            }
            let width = layout.value_width();
            let mut column = 0;
            let sums = pack.states.add(2 * LANES);
            while column < width {
                let values = self.values.add(column);
                let sums = sums.add(column);
                let left = (width - column) / LANES;
                let step =
                    Weighted { values, width, filled, scores: pack.scores, rescale: &rescale, sums, state };
                column += LANES
                    * match left {
                        4.. if S::WIDE => step.add::<S, 4>(s),
                        2.. if S::WIDE => step.add::<S, 2>(s),
                        _ => step.add::<S, 1>(s),
                    };
            }
        }
        Q
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
