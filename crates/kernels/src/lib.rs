//! Inner loops behind safe functions: CPU vector code and CUDA.
//!
//! All `unsafe` of the workspace is here but one block (the memory-mapped weight file). The crate
//! knows slices, shapes and threads; it knows nothing of models.

#![deny(missing_docs)]

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
