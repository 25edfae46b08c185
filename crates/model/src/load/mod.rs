//! From a path to a running model.
//!
//! [`Checkpoint::open`] reads headers and small files only, and checks everything that later code
//! relies on; [`Checkpoint::build`] then copies tensors out of the mapped files one by one into the
//! backend's own form, so that the peak is one weight above the final size.

mod build;
mod folder;
mod gguf;
mod threads;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Error, Model, ModelConfig,
    kv_cache::{CachePlan, SideCar},
    stable_hash::Fnv1a,
    weights::{MappedFile, WeightFiles, names::Naming},
};
pub(crate) use folder::read_json;

/// Which implementation of [`Ops`](crate::ops::Ops) runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// Packed kernels on CPU threads.
    #[default]
    Cpu,
    /// Plain candle operations on the CPU: the oracle.
    Reference,
    /// Plain candle operations on the first CUDA device.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Where the tokenizer is to be read from.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// A Hugging Face `tokenizer.json`.
    Json(PathBuf),
    /// The vocabulary inside a GGUF file.
    Gguf(GgufVocabulary),
}

/// A GGUF file's `tokenizer.*` metadata, lengths checked.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-pair) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`, the pre-tokenizer's name.
    pub pre: Option<String>,
    /// One text per id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type` per id (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte).
    pub token_types: Vec<i32>,
    /// Scores per id (SentencePiece).
    pub scores: Vec<f32>,
    /// Merges (byte-pair), `left right`.
    pub merges: Vec<String>,
    /// Start token.
    pub bos_token_id: Option<u32>,
    /// End token.
    pub eos_token_id: Option<u32>,
    /// Unknown token.
    pub unknown_token_id: Option<u32>,
    /// Whether encoding starts with the start token; `None`: the file does not say.
    pub add_bos_token: Option<bool>,
    /// Whether encoding ends with the end token.
    pub add_eos_token: Option<bool>,
    /// Whether SentencePiece text gets a space in front.
    pub add_space_prefix: Option<bool>,
}

/// Defaults for sampling that a checkpoint ships (`generation_config.json`).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<u32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// An opened and checked checkpoint: everything but the weights' payload has been read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The path that was opened.
    pub path: PathBuf,
    /// Geometry.
    pub config: ModelConfig,
    /// Where the tokenizer is.
    pub tokenizer: TokenizerSource,
    /// Jinja chat template, if the checkpoint has one.
    pub chat_template: Option<String>,
    /// Sampling defaults.
    pub generation: GenerationDefaults,
    /// Most frequent stored type of the matrices: `Q4_1`, `bf16`, …
    pub quantization: String,
    /// Bytes of all tensors as stored.
    pub weight_bytes: u64,
    /// Hex digest that names the weights (of the file's header and size, not of every byte):
    /// part of `system_fingerprint`.
    pub fingerprint: String,
    /// The mapped files.
    weights: WeightFiles,
    /// How they name tensors.
    naming: Naming,
}

/// How to build the model.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The backend.
    pub backend: Backend,
    /// Blocks to allocate.
    pub cache: CachePlan,
    /// Rows of the largest batch.
    pub max_batch_rows: usize,
    /// CPU threads, the engine's own included; 0 means all physical cores that may be used.
    pub threads: usize,
    /// Weights of the trained cache methods; the cache must have been planned with them.
    pub side_car: Option<Arc<SideCar>>,
}

impl Checkpoint {
    /// Opens a `.gguf` file, or a folder with `config.json` and safetensors (or exactly one
    /// `.gguf`), and checks names, shapes and types of every tensor.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BrokenFile`], [`Error::Config`], [`Error::Tensor`]; never a panic,
    /// and never an allocation sized by an unchecked length.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let metadata =
            std::fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let checkpoint =
            if metadata.is_dir() { folder::open(path) } else { gguf::open(path, MappedFile::open(path)?) };
        let checkpoint = checkpoint?;
        checkpoint.weights.check(&checkpoint.config, checkpoint.naming)?;
        Ok(checkpoint)
    }

    /// Bytes of weights and workspace that [`Self::build`] will hold, before it is called, and of the
    /// logits that the engine will hold beside them: an estimate for the memory plan.
    /// [`Model::memory`] tells the model's exact share afterwards.
    pub fn planned_bytes(&self, backend: Backend, max_batch_rows: usize) -> u64 {
        build::planned_bytes(self, backend, max_batch_rows)
    }

    /// Loads the weights and allocates everything.
    ///
    /// # Errors
    /// As [`Self::open`], [`Error::Plan`] for a cache plan of another model, and [`Error::Device`].
    pub fn build(&self, options: &BuildOptions) -> Result<Box<dyn Model>, Error> {
        build::build(self, options)
    }

    /// Loads the weights into a backend that the caller has built for this checkpoint's
    /// configuration (training, graph capture).
    ///
    /// # Errors
    /// As [`Self::open`], and [`Error::Device`].
    pub fn prepare<O: crate::ops::Ops>(
        &self,
        ops: &mut O,
    ) -> Result<crate::llama::LlamaWeights<O::Weight>, Error> {
        build::prepare(self, ops)
    }
}

/// What tells checkpoints apart: a hash that is stable between releases and platforms.
pub(crate) struct Fingerprint(Fnv1a);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(Fnv1a::new())
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.add(bytes);
    }

    /// Adds a weight file: its length and its header.
    pub(crate) fn add_file(&mut self, bytes: &[u8], header_bytes: usize) {
        self.add(&(bytes.len() as u64).to_le_bytes());
        self.add(bytes.get(..header_bytes).unwrap_or(bytes));
    }

    pub(crate) fn hex(&self) -> String {
        format!("{:016x}", self.0.value())
    }
}

#[cfg(test)]
mod tests;
