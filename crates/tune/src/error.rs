//! What can go wrong while training.

use std::path::{Path, PathBuf};

/// Errors of a training run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried: `cannot read`, `cannot write`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A training file has a part that cannot be used.
    #[error("{path}, line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The training text as a whole cannot be used.
    #[error("training text: {0}")]
    Corpus(String),
    /// A setting is out of range or contradicts another.
    #[error("{field}: {reason}")]
    Setting {
        /// The flag's name without dashes.
        field: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A checkpoint cannot be continued.
    #[error("checkpoint {path}: {reason}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The loss or the weights are no longer finite.
    #[error("training diverged at step {step}: {what} is not finite; use a smaller --lr")]
    Diverged {
        /// The step, from 0.
        step: u64,
        /// What is not finite.
        what: &'static str,
    },
    /// The model's files.
    #[error(transparent)]
    Model(#[from] locket_model::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] locket_processor::Error),
    /// The device or the tensor library failed.
    #[error("device: {0}")]
    Device(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn setting(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Setting { field, reason: reason.into() }
    }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
