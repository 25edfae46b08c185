//! Which instructions may be used, found once at run time.

use super::simd::{Scalar, Simd};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Scalar,
    Avx2,
    Avx512,
}

/// An instruction set that this processor has: proof of it, since it cannot be made otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// The widest instruction set of this processor.
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self(Level::Scalar))
    }

    /// All instruction sets of this processor that have kernels, narrowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [Level::Scalar, Level::Avx2, Level::Avx512].into_iter().filter(|&level| has(level)).map(Self)
    }

    /// `scalar`, `avx2` (with FMA and F16C) or `avx512` (with BW, VL and VNNI).
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    pub(super) fn level(self) -> Level {
        self.0
    }

    /// Runs `op` compiled for this instruction set.
    #[inline]
    pub(super) fn run<O: SimdOp>(self, op: O) -> O::Output {
        match self.0 {
            Level::Scalar => op.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves that the processor has these features.
            Level::Avx2 => unsafe { run_avx2(op) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { run_avx512(op) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only the scalar level exists here"),
        }
    }
}

/// A kernel written once for all instruction sets. `run` and all it calls must be
/// `#[inline(always)]`, so that it is compiled with the features of the function it ends up in.
pub(super) trait SimdOp {
    /// What it returns.
    type Output;

    /// The kernel.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,avx2,fma,f16c")]
fn run_avx2<O: SimdOp>(op: O) -> O::Output {
    // SAFETY: the features are enabled here.
    op.run(unsafe { super::simd::Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn run_avx512<O: SimdOp>(op: O) -> O::Output {
    // SAFETY: the features are enabled here.
    op.run(unsafe { super::simd::Avx512::new() })
}

#[cfg(target_arch = "x86_64")]
fn has(level: Level) -> bool {
    let avx2 = || {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    };
    match level {
        Level::Scalar => true,
        Level::Avx2 => avx2(),
        Level::Avx512 => {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has(level: Level) -> bool {
    level == Level::Scalar
}
