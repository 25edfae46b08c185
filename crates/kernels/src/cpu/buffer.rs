//! Large zeroed memory with an alignment that vector loads and huge pages like.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ptr::NonNull,
};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;

/// Numbers that an [`AlignedBuf`] can be viewed as: any bit pattern is a value.
pub trait Plain: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for u16 {}
    impl Sealed for f32 {}
}

impl<T: Copy + sealed::Sealed> Plain for T {}

/// Zeroed bytes at a multiple of 64, or of 2 MiB when there are that many.
#[derive(Debug)]
pub struct AlignedBuf {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory, and shared references only read it.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes. Pages are not touched; see [`Self::touch_pages`].
    ///
    /// # Panics
    /// If `len` exceeds the address space; aborts, as `Vec` does, if memory is exhausted.
    pub fn zeroed(len: usize) -> Self {
        let align = if len >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let layout = Layout::from_size_align(len.max(1), align).expect("a length below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        if len >= HUGE_PAGE {
            ask_for_huge_pages(start, layout.size());
        }
        Self { start, layout }
    }

    /// Length in bytes (at least 1).
    pub fn num_bytes(&self) -> usize {
        self.layout.size()
    }

    /// Writes to every page, so that memory that the system has promised and does not have fails
    /// now, and no step waits for a page fault.
    pub fn touch_pages(&mut self) {
        let bytes = self.as_mut_slice::<u8>();
        for at in (0..bytes.len()).step_by(PAGE) {
            // SAFETY: `at` is in bounds; volatile, or the store of a zero over a zero would be dropped.
            unsafe { bytes.as_mut_ptr().add(at).write_volatile(0) };
        }
    }

    /// The buffer as whole numbers of type `T`.
    pub fn as_slice<T: Plain>(&self) -> &[T] {
        // SAFETY: aligned to 64, as long as stated, initialised, and any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.layout.size() / size_of::<T>()) }
    }

    /// The buffer as whole numbers of type `T`.
    pub fn as_mut_slice<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.layout.size() / size_of::<T>())
        }
    }
}

/// Fewer faults while the memory is filled, and fewer misses of the address cache afterwards.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(start: NonNull<u8>, len: usize) {
    // SAFETY: the range was just allocated, and the advice changes no content. A kernel without
    // huge pages refuses it, which costs nothing but speed.
    unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_start: NonNull<u8>, _len: usize) {}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zero_aligned_and_viewable() {
        for len in [0, 1, 100, HUGE_PAGE, HUGE_PAGE + 5] {
            let mut buf = AlignedBuf::zeroed(len);
            buf.touch_pages();
            assert!(buf.as_slice::<u8>().iter().all(|&b| b == 0));
            assert_eq!(buf.as_slice::<u8>().as_ptr() as usize % CACHE_LINE, 0);
            assert_eq!(buf.as_slice::<f32>().len(), len.max(1) / 4);
        }
        let mut buf = AlignedBuf::zeroed(64);
        buf.as_mut_slice::<u16>()[1] = 0x3c00;
        assert_eq!(buf.as_slice::<u8>()[..4], [0, 0, 0, 0x3c]);
    }
}
