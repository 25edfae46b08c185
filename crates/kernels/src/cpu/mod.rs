//! CPU kernels: packed matrix products, attention over cache slots, row operations and the thread
//! team that runs them.
//!
//! **Determinism.** A result row depends on its own input row and the weights alone: every sum has
//! one fixed order, whatever the number of rows in the call, of threads, or the instruction set.
//! All instruction sets agree bit for bit: integer dots are exact, and every floating-point step
//! is the same fused multiply-add, multiplication, addition or division in the same order.

pub mod attention;
mod buffer;
mod gemm;
mod gemm_avx2;
mod gemm_avx512;
mod isa;
pub mod kv;
mod packed;
mod quant;
pub mod rows;
pub mod scorer;
mod simd;
mod simd_x86;
mod team;

pub use buffer::AlignedBuf;
pub use gemm::{Activations, Destination, matmul};
pub use isa::Isa;
pub use packed::{PackError, PackedMatrix, WeightFormat};
pub use quant::{QUANT_BLOCK, QuantRows};
pub use team::Team;

/// A pointer that the tasks of one [`Team::run`] share to write disjoint elements.
struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever dereferences it promises that no two tasks touch the same element.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer; a method so that closures capture the whole wrapper.
    #[inline(always)]
    fn get(self) -> *mut T {
        self.0
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// The range lies in the allocation and no other task touches it while the slice lives.
    #[inline(always)]
    unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
