//! Sixteen f32 lanes on three instruction sets, with the same result bits on each.
//!
//! A value of a type that implements [`Simd`] proves that its instructions exist; the arithmetic is
//! therefore safe, and only what goes through a pointer is not.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

/// Lanes of a [`Simd::F`].
pub(super) const LANES: usize = 16;

/// Sixteen f32 lanes.
pub(super) trait Simd: Copy {
    /// The lanes.
    type F: Copy;
    /// Whether there are 32 registers of all 16 lanes; decides how much a kernel keeps in them.
    const WIDE: bool;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger of each pair; `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller of each pair; `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The nearest integer, ties to even; magnitude below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `2^a` for integer `a` in -126..=127.
    fn pow2(self, a: Self::F) -> Self::F;
    /// `value` where `a >= limit`, else 0.
    fn where_ge(self, a: Self::F, limit: Self::F, value: Self::F) -> Self::F;
    /// The lanes in order.
    fn to_array(self, a: Self::F) -> [f32; LANES];
    /// IEEE halves, rounded to nearest even.
    fn to_f16(self, a: Self::F) -> [u16; LANES];
    /// The largest bit pattern of `|lane|` over both: orders finite < infinite < NaN.
    fn max_abs_bits(self, a: Self::F, b: Self::F) -> u32;

    /// # Safety
    /// 16 readable f32 at `p`, any alignment.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// 16 readable halves at `p`, any alignment.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// # Safety
    /// 16 readable bfloat16 at `p`, any alignment.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// # Safety
    /// 16 writable f32 at `p`, any alignment.
    unsafe fn store(self, p: *mut f32, a: Self::F);
    /// Stores the nearest integers of `a * by` (all within ±127) and returns their sum.
    ///
    /// # Safety
    /// 16 writable bytes at `p`.
    unsafe fn store_i8(self, p: *mut i8, a: Self::F, by: f32) -> i32;

    /// The sum of the lanes: halves are added until one is left.
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let mut lanes = self.to_array(a);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The largest lane (no NaN).
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        let mut lanes = self.to_array(a);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] = if lanes[i] > lanes[i + width] { lanes[i] } else { lanes[i + width] };
            }
            width /= 2;
        }
        lanes[0]
    }

    /// `2^x` with a relative error below 3e-7 for `x <= 127`; 0 below -126 and for NaN.
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        // Taylor coefficients ln(2)^k / k!; the remainder at |r| = 1/2 is 1.2e-7.
        const C: [f32; 7] = [
            1.0,
            std::f32::consts::LN_2,
            0.240_226_5,
            0.055_504_11,
            0.009_618_129,
            0.001_333_355_8,
            0.000_154_035_3,
        ];
        let floor = self.splat(-126.0);
        let clamped = self.min(self.max(x, floor), self.splat(127.0));
        let n = self.round(clamped);
        let r = self.sub(clamped, n);
        let mut y = self.splat(C[6]);
        for c in C[..6].iter().rev() {
            y = self.fma(y, r, self.splat(*c));
        }
        self.where_ge(x, floor, self.mul(y, self.pow2(n)))
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    type F = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        each(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn pow2(self, a: Self::F) -> Self::F {
        each(|i| f32::from_bits(((a[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn where_ge(self, a: Self::F, limit: Self::F, value: Self::F) -> Self::F {
        each(|i| if a[i] >= limit[i] { value[i] } else { 0.0 })
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; LANES] {
        a
    }
    #[inline(always)]
    fn to_f16(self, a: Self::F) -> [u16; LANES] {
        a.map(|a| f16::from_f32(a).to_bits())
    }
    #[inline(always)]
    fn max_abs_bits(self, a: Self::F, b: Self::F) -> u32 {
        a.iter().chain(&b).map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0)
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        each(|i| unsafe { p.add(i).read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        each(|i| f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        each(|i| bf16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(a) };
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: Self::F, by: f32) -> i32 {
        let q: [i8; LANES] = std::array::from_fn(|i| (a[i] * by).round_ties_even() as i8);
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(q) };
        q.iter().map(|&q| i32::from(q)).sum()
    }
}

/// AVX2 with FMA and F16C; the lanes are a pair of registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512 F, BW, VL and VNNI, and all of [`Avx2`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Applies an intrinsic to both registers of each argument.
#[cfg(target_arch = "x86_64")]
macro_rules! pair {
    ($f:ident($($a:expr),*)) => {
        // SAFETY: the token proves the features.
        unsafe { [$f($($a[0]),*), $f($($a[1]),*)] }
    };
}

#[cfg(target_arch = "x86_64")]
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
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            _mm256_storeu_ps(p, a[0]);
            _mm256_storeu_ps(p.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: Self::F, by: f32) -> i32 {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            let by = _mm256_set1_ps(by);
            let q = a.map(|a| _mm256_cvtps_epi32(_mm256_mul_ps(a, by)));
            let sum = _mm256_add_epi32(q[0], q[1]);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
            let words =
                q.map(|q| _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q)));
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(words[0], words[1]));
            _mm_cvtsi128_si32(sum)
        }
    }
}

#[cfg(target_arch = "x86_64")]
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
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise; see `splat`.
        unsafe { _mm512_storeu_ps(p, a) };
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: Self::F, by: f32) -> i32 {
        // SAFETY: the caller's promise; see `splat`.
        unsafe {
            let q = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(by)));
            _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(q));
            _mm512_reduce_add_epi32(q)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, isa::SimdOp};

    struct Exp2([f32; LANES]);

    impl SimdOp for Exp2 {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            // SAFETY: sixteen lanes lie at the pointer.
            s.to_array(s.exp2(unsafe { s.load(self.0.as_ptr()) }))
        }
    }

    #[test]
    fn exp2_is_close_and_the_same_on_every_isa() {
        for step in 0..40_000 {
            let x: [f32; LANES] = std::array::from_fn(|i| -127.5 + (step * LANES + i) as f32 * 0.000_397);
            let scalar = Scalar.exp2(x);
            for (x, y) in x.iter().zip(scalar) {
                let exact = f64::from(*x).exp2();
                let want = if *x < -126.0 { 0.0 } else { exact };
                assert!((f64::from(y) - want).abs() <= 3e-7 * exact, "2^{x} = {y}");
            }
            for isa in Isa::available() {
                assert_eq!(isa.run(Exp2(x)).map(f32::to_bits), scalar.map(f32::to_bits));
            }
        }
        let special = [f32::NEG_INFINITY, f32::NAN, -1e30, 0.0];
        let x = std::array::from_fn(|i| special[i % 4]);
        for isa in Isa::available() {
            assert_eq!(isa.run(Exp2(x))[..4], [0.0, 0.0, 0.0, 1.0]);
        }
    }
}
