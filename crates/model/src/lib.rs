//! Tensors: weights, the decoder, attention and the key/value cache.
//!
//! A [`Batch`] goes in, logits come out. This crate knows nothing of queues, requests or text. It
//! sits between `locket-engine`, which decides what a step computes, and `locket-kernels`, which
//! holds the inner loops and all `unsafe` code but one block (the memory-mapped weight file in
//! [`weights`]).

pub mod batch;
pub mod config;
pub mod error;
pub mod kv_cache;
pub mod llama;
pub mod load;
pub mod ops;
#[doc(hidden)]
pub mod testing;
pub mod weights;

pub use batch::{Batch, BatchSequence, BlockId};
pub use config::ModelConfig;
pub use error::Error;

/// A decoder with its key/value cache: what the engine drives.
///
/// All memory is allocated when the model is built; no method allocates in proportion to the
/// length of a conversation.
pub trait Model: Send {
    /// The geometry that the weights were checked against.
    fn config(&self) -> &ModelConfig;

    /// The plan after which the cache was allocated: block classes, slot type, bytes.
    fn cache_plan(&self) -> &kv_cache::CachePlan;

    /// Runs one step and writes logits `[sample_rows, vocab_size]`, row-major, into `logits`
    /// (resized, its allocation reused).
    ///
    /// Rows of one sequence are consecutive tokens of it; the keys and values of all rows are in
    /// the cache afterwards. Every row's arithmetic is independent of the rest of the batch.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the batch contradicts the cache (a caller's bug), or a device
    /// error, after which the model must not be used again.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), Error>;

    /// Empties `block` and gives it to a new sequence with these cache settings.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the block does not exist or is smaller than
    /// [`kv_cache::CacheSettings::capacity`].
    fn open_block(&mut self, block: BlockId, settings: kv_cache::CacheSettings) -> Result<(), Error>;

    /// Copies the whole state of block `from` (settings, fill counts, keys, values) into `to`.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if `to` is smaller than the settings of `from` need.
    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error>;

    /// Scrubs `block` so that nothing of its sequence can be read by the next one.
    fn close_block(&mut self, block: BlockId);

    /// The most rows that one [`Batch`] may have (the workspace's size).
    fn max_batch_rows(&self) -> usize;

    /// Bytes held by weights, workspace and cache, for the memory plan and the metrics.
    fn memory(&self) -> MemoryUse;

    /// Makes the system hand out all memory of the cache now, so that memory that it has promised
    /// and does not have fails now and no step waits for a page. Nothing to do where that is so
    /// from the start.
    fn prefault(&mut self) {}
}

/// Where the bytes of a loaded model are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Bytes of weights in the form the backend uses.
    pub weights: u64,
    /// Bytes of activations and scratch for the largest batch.
    pub workspace: u64,
    /// Bytes of key/value slots and their side arrays, all blocks.
    pub cache: u64,
}
