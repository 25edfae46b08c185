//! Tile kernels for AVX-512 with VNNI: a register holds four columns of 16 rows.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    gemm::Tiles,
    packed::{Q4_BLOCK_BYTES, Q8_BLOCK_BYTES},
    quant::ActBlock,
    simd::LANES,
};

pub(super) const Q4: Tiles<ActBlock> = [q4::<8>, q4::<4>, q4::<2>, q4::<1>];
pub(super) const Q8: Tiles<ActBlock> = [q8::<8>, q8::<4>, q8::<2>, q8::<1>];
pub(super) const F16: Tiles<f32> = [dense::<8, 0>, dense::<4, 0>, dense::<2, 0>, dense::<1, 0>];
pub(super) const BF16: Tiles<f32> = [dense::<8, 1>, dense::<4, 1>, dense::<2, 1>, dense::<1, 1>];
pub(super) const F32: Tiles<f32> = [dense::<8, 2>, dense::<4, 2>, dense::<2, 2>, dense::<1, 2>];

/// Bytes that are asked for in advance: the first pass over a group waits for memory. Into the
/// second-level cache, which can wait for more lines at once than the first.
const AHEAD: usize = 8192;

/// Four activations in every lane.
///
/// # Safety
/// Four readable bytes at `4 * i`.
#[inline(always)]
unsafe fn quad(q: *const i8, i: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_set1_epi32(q.cast::<i32>().add(i).read_unaligned()) }
}

/// The dot of a block: eight registers of unsigned weights with 32 activations, plus `start`.
///
/// # Safety
/// The features of the callers.
#[inline(always)]
unsafe fn dot(start: __m512i, v: &[__m512i; 8], y: &ActBlock) -> __m512i {
    // SAFETY: both digit arrays have 32 bytes.
    unsafe {
        let (high, low) = (y.high.as_ptr(), y.low.as_ptr());
        // The digits are two chains, which halves the latency.
        let mut a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), v[0], quad(high, 0));
        let mut b = _mm512_dpbusd_epi32(start, v[0], quad(low, 0));
        for (i, &v) in v.iter().enumerate().skip(1) {
            a = _mm512_dpbusd_epi32(a, v, quad(high, i));
            b = _mm512_dpbusd_epi32(b, v, quad(low, i));
        }
        // 255 a = 256 a - a
        _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32::<8>(a), a), b)
    }
}

#[target_feature(enable = "avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn q4<const C: usize>(
    w: *const u8,
    depth: usize,
    x: *const ActBlock,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    // SAFETY: a group has `depth` blocks of 320 bytes at a multiple of 64, each of the C rows
    // `depth` blocks; `out` has C rows. Prefetches never fault.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let mut acc = [_mm512_setzero_ps(); C];
        for b in 0..depth {
            let block = w.add(b * Q4_BLOCK_BYTES);
            let mut v = [_mm512_setzero_si512(); 8];
            for i in 0..4 {
                let bytes = _mm512_load_si512(block.add(64 * i).cast());
                v[i] = _mm512_and_si512(bytes, low);
                v[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low);
            }
            for i in 0..5 {
                _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(AHEAD + 64 * i).cast());
            }
            let scale = _mm512_cvtph_ps(_mm256_load_si256(block.add(256).cast()));
            let min = _mm512_cvtph_ps(_mm256_load_si256(block.add(288).cast()));
            for (c, acc) in acc.iter_mut().enumerate() {
                let y = &*x.add(c * x_stride + b);
                let dot = _mm512_cvtepi32_ps(dot(_mm512_setzero_si512(), &v, y));
                *acc = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(y.scale)), *acc);
                *acc = _mm512_fmadd_ps(min, _mm512_set1_ps(y.scaled_sum), *acc);
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(out.add(c).cast(), acc);
        }
    }
}

#[target_feature(enable = "avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
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
        let scales = w.add(depth * Q8_BLOCK_BYTES);
        let mut acc = [_mm512_setzero_ps(); C];
        for b in 0..depth {
            let block = w.add(b * Q8_BLOCK_BYTES);
            let mut v = [_mm512_setzero_si512(); 8];
            for (i, v) in v.iter_mut().enumerate() {
                *v = _mm512_load_si512(block.add(64 * i).cast());
                _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(AHEAD + 64 * i).cast());
            }
            let scale = _mm512_cvtph_ps(_mm256_load_si256(scales.add(32 * b).cast()));
            for (c, acc) in acc.iter_mut().enumerate() {
                let y = &*x.add(c * x_stride + b);
                let dot = _mm512_cvtepi32_ps(dot(_mm512_set1_epi32(y.offset), &v, y));
                *acc = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(y.scale)), *acc);
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(out.add(c).cast(), acc);
        }
    }
}

/// TYPE: 0 f16, 1 bfloat16, 2 f32.
#[target_feature(enable = "avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
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
        let mut acc = [_mm512_setzero_ps(); C];
        for k in 0..depth {
            let w = match TYPE {
                0 => _mm512_cvtph_ps(_mm256_load_si256(w.add(32 * k).cast())),
                1 => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_load_si256(w.add(32 * k).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
                _ => _mm512_load_ps(w.add(64 * k).cast()),
            };
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_fmadd_ps(w, _mm512_set1_ps(*x.add(c * x_stride + k)), *acc);
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(out.add(c).cast(), acc);
        }
    }
}
