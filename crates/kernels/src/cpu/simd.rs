//! Sixteen f32 lanes on three instruction sets, with the same result bits on each.
//!
//! A value of a type that implements [`Simd`] proves that its instructions exist; the arithmetic is
//! therefore safe, and only what goes through a pointer is not.

use half::{bf16, f16};

use super::quant::DIGIT_BASE;

#[cfg(target_arch = "x86_64")]
pub(super) use super::simd_x86::{Avx2, Avx512};

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
    /// 16 readable bytes at `p`, any alignment.
    unsafe fn load_i8(self, p: *const i8) -> Self::F;
    /// # Safety
    /// 16 writable f32 at `p`, any alignment.
    unsafe fn store(self, p: *mut f32, a: Self::F);
    /// Writes the nearest integers of `a * by` (all within ±32512) as `255 high + low`, both digits
    /// within ±127, and returns the integers' sum.
    ///
    /// # Safety
    /// 16 writable bytes at `high` and at `low`.
    unsafe fn store_digits(self, high: *mut i8, low: *mut i8, a: Self::F, by: f32) -> i32;

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
    unsafe fn load_i8(self, p: *const i8) -> Self::F {
        // SAFETY: the caller's promise.
        each(|i| f32::from(unsafe { p.add(i).read() }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(a) };
    }
    #[inline(always)]
    unsafe fn store_digits(self, high: *mut i8, low: *mut i8, a: Self::F, by: f32) -> i32 {
        let q: [i32; LANES] = std::array::from_fn(|i| (a[i] * by).round_ties_even() as i32);
        // No integer lies half-way between two multiples of 255, so every rounding agrees.
        let digits: [i32; LANES] =
            std::array::from_fn(|i| (q[i] as f32 * (1.0 / DIGIT_BASE as f32)).round_ties_even() as i32);
        // SAFETY: the caller's promise.
        unsafe {
            high.cast::<[i8; LANES]>().write_unaligned(digits.map(|digit| digit as i8));
            let rest = std::array::from_fn(|i| (q[i] - DIGIT_BASE * digits[i]) as i8);
            low.cast::<[i8; LANES]>().write_unaligned(rest);
        }
        q.iter().sum()
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
