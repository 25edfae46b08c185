//! [`Simd`] on AVX2 and on AVX-512.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    quant::DIGIT_BASE,
    simd::{LANES, Simd},
};

/// AVX2 with FMA and F16C; the lanes are a pair of registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512 F, BW, VL and VNNI, and all of [`Avx2`].
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx2 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Avx512 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Applies an intrinsic to both registers of each argument.
macro_rules! pair {
    ($f:ident($($a:expr),*)) => {
        // SAFETY: the token proves the features.
        unsafe { [$f($($a[0]),*), $f($($a[1]),*)] }
    };
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token proves the features.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        pair!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        pair!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves the features.
        a.map(|a| unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) })
    }
    #[inline(always)]
    fn pow2(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves the features.
        a.map(|a| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn where_ge(self, a: Self::F, limit: Self::F, value: Self::F) -> Self::F {
        // SAFETY: the token proves the features.
        std::array::from_fn(|i| unsafe {
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[i], limit[i]), value[i])
        })
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: sixteen lanes lie at the pointer.
        unsafe { self.store(lanes.as_mut_ptr(), a) };
        lanes
    }
    #[inline(always)]
    fn to_f16(self, a: Self::F) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: the token proves the features; sixteen halves lie at the pointer.
        unsafe {
            let p = halves.as_mut_ptr();
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[1]));
        }
        halves
    }
    #[inline(always)]
    fn max_abs_bits(self, a: Self::F, b: Self::F) -> u32 {
        // SAFETY: the token proves the features.
        unsafe {
            let sign = _mm256_set1_epi32(0x7fff_ffff);
            let abs = |x| _mm256_and_si256(_mm256_castps_si256(x), sign);
            let m = _mm256_max_epi32(
                _mm256_max_epi32(abs(a[0]), abs(a[1])),
                _mm256_max_epi32(abs(b[0]), abs(b[1])),
            );
            let m = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256::<1>(m));
            let m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b01_00_11_10>(m));
            let m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b10_11_00_01>(m));
            _mm_cvtsi128_si32(m) as u32
        }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise; the token proves the features.
        [0, 8].map(|at| unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(at).cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> Self::F {
        // SAFETY: the caller's promise; the token proves the features.
        [0, 8]
            .map(|at| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(at).cast()))) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            _mm256_storeu_ps(p, a[0]);
            _mm256_storeu_ps(p.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_digits(self, high: *mut i8, low: *mut i8, a: Self::F, by: f32) -> i32 {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            let by = _mm256_set1_ps(by);
            let inverse = _mm256_set1_ps(1.0 / DIGIT_BASE as f32);
            let base = _mm256_set1_epi32(DIGIT_BASE);
            let q = a.map(|a| _mm256_cvtps_epi32(_mm256_mul_ps(a, by)));
            let digits = q.map(|q| _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(q), inverse)));
            let rest = [0, 1].map(|i| _mm256_sub_epi32(q[i], _mm256_mullo_epi32(digits[i], base)));
            let sum = _mm256_add_epi32(q[0], q[1]);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
            for (p, q) in [(high, digits), (low, rest)] {
                let words =
                    q.map(|q| _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q)));
                _mm_storeu_si128(p.cast(), _mm_packs_epi16(words[0], words[1]));
            }
            _mm_cvtsi128_si32(sum)
        }
    }
}

impl Simd for Avx512 {
    type F = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token proves the features (here and in all that follows).
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn pow2(self, a: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn where_ge(self, a: Self::F, limit: Self::F, value: Self::F) -> Self::F {
        // SAFETY: see `splat`.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, limit), value) }
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: sixteen lanes lie at the pointer.
        unsafe { self.store(lanes.as_mut_ptr(), a) };
        lanes
    }
    #[inline(always)]
    fn to_f16(self, a: Self::F) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: see `splat`; sixteen halves lie at the pointer.
        unsafe {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a);
            _mm256_storeu_si256(halves.as_mut_ptr().cast(), half);
        }
        halves
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn max_abs_bits(self, a: Self::F, b: Self::F) -> u32 {
        // SAFETY: see `splat`.
        unsafe {
            let sign = _mm512_set1_epi32(0x7fff_ffff);
            let a = _mm512_and_si512(_mm512_castps_si512(a), sign);
            let b = _mm512_and_si512(_mm512_castps_si512(b), sign);
            _mm512_reduce_max_epi32(_mm512_max_epi32(a, b)) as u32
        }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise; see `splat`.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise; see `splat`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise; see `splat`.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> Self::F {
        // SAFETY: the caller's promise; see `splat`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise; see `splat`.
        unsafe { _mm512_storeu_ps(p, a) };
    }
    #[inline(always)]
    unsafe fn store_digits(self, high: *mut i8, low: *mut i8, a: Self::F, by: f32) -> i32 {
        // SAFETY: the caller's promise; see `splat`.
        unsafe {
            let q = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(by)));
            let inverse = _mm512_set1_ps(1.0 / DIGIT_BASE as f32);
            let digits = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(q), inverse));
            let rest = _mm512_sub_epi32(q, _mm512_mullo_epi32(digits, _mm512_set1_epi32(DIGIT_BASE)));
            _mm_storeu_si128(high.cast(), _mm512_cvtepi32_epi8(digits));
            _mm_storeu_si128(low.cast(), _mm512_cvtepi32_epi8(rest));
            _mm512_reduce_add_epi32(q)
        }
    }
}
