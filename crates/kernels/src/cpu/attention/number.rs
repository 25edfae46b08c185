//! How attention reads the numbers of slots.

use crate::cpu::{AlignedBuf, simd::Simd};

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
