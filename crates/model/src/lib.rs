//! Tensors: weights, the decoder, attention and the key/value cache.
//!
//! A [`Batch`] goes in, logits come out. This crate knows nothing of queues, requests or text. It
//! sits between `locket-engine`, which decides what a step computes, and `locket-kernels`, which
//! holds the inner loops and all `unsafe` code but one block (the memory-mapped weight file in
//! [`weights`]).

pub mod adapter;
pub mod batch;
pub mod config;
pub mod error;
pub mod held;
pub mod kv_cache;
pub mod layer_drops;
pub mod llama;
pub mod load;
pub mod ops;
pub mod stable_hash;
#[doc(hidden)]
pub mod testing;
pub mod weights;

pub use adapter::{Adapter, Extras};
pub use batch::{AdapterId, Batch, BatchSequence, BlockId, EmbeddedRows};
pub use config::ModelConfig;
pub use error::Error;
pub use held::{HeldProgress, HeldPrompt};
pub use layer_drops::{Boundary, Keep, LayerDrops, Rank};

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

    /// The whole state of an open block as bytes: settings, filled slots, side arrays. They mean the
    /// same to every block of the model that is large enough, in a later process too, as long as model,
    /// slot type, backend and side-car are the same.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the block does not exist or is not open, or a device error.
    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error>;

    /// Opens `block` with the state that [`Self::export_block`] returned.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the image is broken, of another model or does not fit; the block is
    /// closed then.
    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error>;

    /// Tokens of the block's sequence that some layer no longer holds in a slot of their own; 0 while
    /// attention is exact, and for a block that is not open.
    fn folded_tokens(&self, block: BlockId) -> u32;

    /// Runs one step as [`Self::forward`] does, and writes for each of its sample rows how likely
    /// `targets [sample_rows]` is as the next token, without handing out logits.
    ///
    /// # Errors
    /// As [`Self::forward`]; [`Error::InvalidBatch`] if there is not one target per sample row.
    fn score_tokens(
        &mut self,
        batch: &Batch,
        targets: &[u32],
        out: &mut Vec<TokenScore>,
    ) -> Result<(), Error>;

    /// Writes logits `[rows, vocab_size]` of `rows`, ascending, of the batch that [`Self::forward`] ran
    /// last, whether or not they were sample rows: the same numbers as if they had been. For callers
    /// that want many rows and hold few at a time.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if no batch was run or it has no such rows, or a device error.
    fn row_logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), Error>;

    /// Writes the hidden states `[rows, hidden_size]` after the final norm of `rows`, ascending, of the
    /// batch that [`Self::forward`] ran last.
    ///
    /// # Errors
    /// As [`Self::row_logits`].
    fn row_states(&mut self, rows: &[u32], states: &mut Vec<f32>) -> Result<(), Error>;

    /// Makes room for adapters and for prompts that lose tokens inside the decoder; called once, before
    /// anything of that kind. Without, there is no room for any.
    ///
    /// # Errors
    /// [`Error::Plan`] if this model has nothing of that kind.
    fn reserve(&mut self, extras: &Extras) -> Result<(), Error> {
        if *extras == Extras::default() {
            return Ok(());
        }
        Err(Error::Plan("this model takes no adapters and drops no tokens".into()))
    }

    /// What [`Self::reserve`] made room for.
    fn extras(&self) -> Extras {
        Extras::default()
    }

    /// Takes an adapter that was read for this model; sequences may go through it from the next step on.
    ///
    /// # Errors
    /// [`Error::Plan`] if there is no room for it.
    fn load_adapter(&mut self, _adapter: &Adapter) -> Result<AdapterId, Error> {
        Err(Error::Plan("this model takes no adapters".into()))
    }

    /// Forgets an adapter, which no sequence may go through any more.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if it is not loaded.
    fn unload_adapter(&mut self, adapter: AdapterId) -> Result<(), Error> {
        Err(Error::InvalidBatch(format!("adapter {} is not loaded", adapter.0)))
    }

    /// Takes in a prompt that loses tokens inside the decoder, in place of any other. Its sequence runs by
    /// [`Self::advance_held`] until that is done; other sequences may run in between.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] naming what is wrong with it, and if its block is not open or not empty.
    fn hold(&mut self, _prompt: &HeldPrompt) -> Result<(), Error> {
        Err(Error::InvalidBatch("this model drops no tokens".into()))
    }

    /// Runs up to `max_rows` rows of the held prompt through some layers. When all is done, the logits
    /// `[vocab_size]` of its last row are in `logits`, and nothing is held any more.
    ///
    /// # Errors
    /// As [`Self::forward`]; nothing is held then either, and the prompt's block is to be closed.
    fn advance_held(&mut self, _max_rows: usize, _logits: &mut Vec<f32>) -> Result<HeldProgress, Error> {
        Err(Error::InvalidBatch("no prompt is held".into()))
    }

    /// Forgets the held prompt, if there is one; its block is to be closed.
    fn release_held(&mut self) {}

    /// The most rows that one [`Batch`] may have (the workspace's size).
    fn max_batch_rows(&self) -> usize;

    /// Bytes held by weights, workspace and cache, for the memory plan and the metrics.
    fn memory(&self) -> MemoryUse;

    /// Makes the system hand out all memory of the cache now, so that memory that it has promised
    /// and does not have fails now and no step waits for a page. Nothing to do where that is so
    /// from the start.
    fn prefault(&mut self) {}
}

/// How likely a token was.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenScore {
    /// Negative natural logarithm of its probability.
    pub nll: f32,
    /// The likeliest token.
    pub best: u32,
}

impl TokenScore {
    /// Scores `target` by a row of logits `[vocab_size]`. A target beyond the row has no chance.
    pub fn of(logits: &[f32], target: u32) -> Self {
        let mut best = 0;
        for (id, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = id;
            }
        }
        let max = logits.get(best).copied().unwrap_or(0.0);
        let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
        let logit = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
        Self { nll: (f64::from(max) - f64::from(logit) + sum.ln()) as f32, best: best as u32 }
    }
}

/// Where the bytes of a loaded model are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Bytes of weights, adapters included, in the form the backend uses.
    pub weights: u64,
    /// Bytes of activations and scratch for the largest batch, and of the rows of a held prompt.
    pub workspace: u64,
    /// Bytes of key/value slots and their side arrays, all blocks.
    pub cache: u64,
}
