//! Tile kernels for AVX2 with FMA and F16C: a register holds four columns of 8 rows, a group is
//! walked as two halves.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    gemm::Tiles,
    packed::{Q4_BLOCK_BYTES, Q8_BLOCK_BYTES},
    quant::{ActBlock, DIGIT_BASE},
    simd::LANES,
};

// Eight unpacked weight registers and four rows are what sixteen registers hold.
pub(super) const Q4: Tiles<ActBlock> = [q4_twice, q4::<4>, q4::<2>, q4::<1>];
pub(super) const Q8: Tiles<ActBlock> = [q8_twice, q8::<4>, q8::<2>, q8::<1>];
pub(super) const F16: Tiles<f32> = [dense::<8, 0>, dense::<4, 0>, dense::<2, 0>, dense::<1, 0>];
pub(super) const BF16: Tiles<f32> = [dense::<8, 1>, dense::<4, 1>, dense::<2, 1>, dense::<1, 1>];
pub(super) const F32: Tiles<f32> = [dense::<8, 2>, dense::<4, 2>, dense::<2, 2>, dense::<1, 2>];

/// Four activations in every lane.
///
/// # Safety
/// Four readable bytes at `4 * i`.
#[inline(always)]
unsafe fn quad(q: *const i8, i: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_set1_epi32(q.cast::<i32>().add(i).read_unaligned()) }
}

#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn q4_twice(w: *const u8, depth: usize, x: *const ActBlock, x_stride: usize, out: *mut [f32; LANES]) {
    // SAFETY: the caller's promise for eight rows.
    unsafe {
        q4::<4>(w, depth, x, x_stride, out);
        q4::<4>(w, depth, x.add(4 * x_stride), x_stride, out.add(4));
    }
}

#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn q8_twice(w: *const u8, depth: usize, x: *const ActBlock, x_stride: usize, out: *mut [f32; LANES]) {
    // SAFETY: the caller's promise for eight rows.
    unsafe {
        q8::<4>(w, depth, x, x_stride, out);
        q8::<4>(w, depth, x.add(4 * x_stride), x_stride, out.add(4));
    }
}

#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn q4<const C: usize>(
    w: *const u8,
    depth: usize,
    x: *const ActBlock,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    // SAFETY: a group has `depth` blocks of 320 bytes at a multiple of 64, each of the C rows
    // `depth` blocks; `out` has C rows.
    unsafe {
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        let base = _mm256_set1_epi16(DIGIT_BASE as i16);
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for b in 0..depth {
                let block = w.add(b * Q4_BLOCK_BYTES);
                let mut v = [_mm256_setzero_si256(); 8];
                for i in 0..4 {
                    let bytes = _mm256_load_si256(block.add(64 * i + 32 * half).cast());
                    v[i] = _mm256_and_si256(bytes, nibble);
                    v[i + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                }
                let scale = _mm256_cvtph_ps(_mm_load_si128(block.add(256 + 16 * half).cast()));
                let min = _mm256_cvtph_ps(_mm_load_si128(block.add(288 + 16 * half).cast()));
                for (c, acc) in acc.iter_mut().enumerate() {
                    let y = &*x.add(c * x_stride + b);
                    let (high, low) = (y.high.as_ptr(), y.low.as_ptr());
                    // |sum| <= 8 * 2 * 15 * 127 = 30480: sixteen bits are enough.
                    let mut a = _mm256_maddubs_epi16(v[0], quad(high, 0));
                    let mut b = _mm256_maddubs_epi16(v[0], quad(low, 0));
                    for (i, v) in v.iter().enumerate().skip(1) {
                        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(*v, quad(high, i)));
                        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(*v, quad(low, i)));
                    }
                    let a = _mm256_madd_epi16(a, base);
                    let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(a, _mm256_madd_epi16(b, ones)));
                    *acc = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, _mm256_set1_ps(y.scale)), *acc);
                    *acc = _mm256_fmadd_ps(min, _mm256_set1_ps(y.scaled_sum), *acc);
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(out.add(c).cast::<f32>().add(8 * half), acc);
            }
        }
    }
}

#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn q8<const C: usize>(
    w: *const u8,
    depth: usize,
    x: *const ActBlock,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    // SAFETY: a group has `depth` blocks of 512 bytes at a multiple of 64 and 32 bytes of scales
    // for each; the rest as in `q4`.
    unsafe {
        let sign = _mm256_set1_epi8(-128);
        let ones = _mm256_set1_epi16(1);
        let base = _mm256_set1_epi16(DIGIT_BASE as i16);
        let scales = w.add(depth * Q8_BLOCK_BYTES);
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for b in 0..depth {
                let block = w.add(b * Q8_BLOCK_BYTES + 32 * half);
                let mut dot = [_mm256_setzero_si256(); C];
                for i in 0..8 {
                    let v = _mm256_xor_si256(_mm256_load_si256(block.add(64 * i).cast()), sign);
                    let magnitude = _mm256_abs_epi8(v);
                    for (c, dot) in dot.iter_mut().enumerate() {
                        let y = &*x.add(c * x_stride + b);
                        // 128 * 127 * 2 = 32512: the pair sum does not saturate.
                        for (digits, by) in [(&y.high, base), (&y.low, ones)] {
                            let q = _mm256_sign_epi8(quad(digits.as_ptr(), i), v);
                            let pairs = _mm256_maddubs_epi16(magnitude, q);
                            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(by, pairs));
                        }
                    }
                }
                let scale = _mm256_cvtph_ps(_mm_load_si128(scales.add(32 * b + 16 * half).cast()));
                for (c, acc) in acc.iter_mut().enumerate() {
                    let by = _mm256_mul_ps(scale, _mm256_set1_ps((*x.add(c * x_stride + b)).scale));
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[c]), by, *acc);
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(out.add(c).cast::<f32>().add(8 * half), acc);
            }
        }
    }
}

/// TYPE: 0 f16, 1 bfloat16, 2 f32.
#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn dense<const C: usize, const TYPE: u8>(
    w: *const u8,
    depth: usize,
    x: *const f32,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    // SAFETY: a group has 16 numbers for each of `depth` columns, each of the C rows `depth`
    // numbers; `out` has C rows.
    unsafe {
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for k in 0..depth {
                let w = match TYPE {
                    0 => _mm256_cvtph_ps(_mm_load_si128(w.add(32 * k + 16 * half).cast())),
                    1 => {
                        let wide = _mm256_cvtepu16_epi32(_mm_load_si128(w.add(32 * k + 16 * half).cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                    }
                    _ => _mm256_load_ps(w.add(64 * k + 32 * half).cast()),
                };
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(w, _mm256_set1_ps(*x.add(c * x_stride + k)), *acc);
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(out.add(c).cast::<f32>().add(8 * half), acc);
            }
        }
    }
}
