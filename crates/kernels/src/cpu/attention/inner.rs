//! Inner loops over a tile, in registers: scores, weights, and sums of weighted values.

use super::{TILE, number::Number};
use crate::cpu::simd::{LANES, Simd};

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

/// Scores of `Q` queries with `G` groups of 16 slots, into `out [Q, TILE]`.
///
/// # Safety
/// Keys `[G, dim, 16]`, queries `[Q, dim]`, room in `out`.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, N: Number, const Q: usize, const G: usize>(
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
pub(super) unsafe fn scale<S: Simd>(s: S, numbers: *mut f32, scales: *const f32, groups: usize) {
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
pub(super) unsafe fn soften<S: Simd>(s: S, scores: &mut [f32], state: *mut f32) -> f32 {
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
pub(super) struct Weighted<'a, N, const Q: usize> {
    /// `[filled, width]`, from the first column wanted.
    pub(super) values: *const N,
    pub(super) width: usize,
    pub(super) filled: usize,
    /// Weights `[Q, TILE]`.
    pub(super) scores: *const f32,
    pub(super) rescale: &'a [f32; Q],
    /// The first query's sums at the first column; `state` numbers apart.
    pub(super) sums: *mut f32,
    pub(super) state: usize,
}

impl<N: Number, const Q: usize> Weighted<'_, N, Q> {
    /// `V` registers of columns; returns `V`.
    ///
    /// # Safety
    /// All that the fields point to exists.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd, const V: usize>(&self, s: S) -> usize {
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
