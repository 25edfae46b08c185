//! What can go wrong below the engine.

use std::path::PathBuf;

/// Errors of loading and running a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what its format promises (truncated, overlapping, absurd lengths).
    #[error("{path} is not a usable {format} file: {reason}")]
    BrokenFile {
        /// The file.
        path: PathBuf,
        /// `GGUF`, `safetensors`, `config.json`, …
        format: &'static str,
        /// What was wrong, and where.
        reason: String,
    },
    /// A field of the model's configuration is absent, contradictory or not supported here.
    #[error("model configuration: {field}: {reason}")]
    Config {
        /// The key, as the file spells it.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A tensor is missing or has another shape or type than the configuration asks for.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The name in the file.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A step contradicts the cache or the workspace: a bug of the caller.
    #[error("invalid batch: {0}")]
    InvalidBatch(String),
    /// The memory plan does not fit.
    #[error("memory plan: {0}")]
    Plan(String),
    /// The device or the tensor library failed.
    #[error("device: {0}")]
    Device(String),
}

impl Error {
    /// A stable snake-case name for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::BrokenFile { .. } => "broken_file",
            Self::Config { .. } => "config",
            Self::Tensor { .. } => "tensor",
            Self::InvalidBatch(_) => "invalid_batch",
            Self::Plan(_) => "plan",
            Self::Device(_) => "device",
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Device(error.to_string())
    }
}
