//! What can go wrong in an evaluation.

use std::path::PathBuf;

/// Errors of an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of text could not be read, or is not what its name promises.
    #[error("cannot read text from {path}: {reason}")]
    Text {
        /// The file.
        path: PathBuf,
        /// What was wrong, and where.
        reason: String,
    },
    /// What was asked is not possible with this model and this text.
    #[error("{field}: {reason}")]
    Options {
        /// The option, as the command line spells it.
        field: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The model refused or failed.
    #[error(transparent)]
    Model(#[from] locket_model::Error),
    /// The tokenizer refused.
    #[error(transparent)]
    Processor(#[from] locket_processor::Error),
    /// The model computed something that is not a number.
    #[error("{what}: the model's score of row {row} is not finite")]
    NotFinite {
        /// Method, slots and slot type.
        what: String,
        /// Row of the sequence.
        row: u32,
    },
    /// The vision model refused or failed.
    #[error(transparent)]
    Vision(#[from] locket_vision::Error),
    /// Whoever answers questions failed.
    #[error("cannot answer: {0}")]
    Decoder(String),
    /// The picture could not be drawn.
    #[error("cannot draw the picture: {0}")]
    Picture(String),
}

impl Error {
    pub(crate) fn options(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Options { field, reason: reason.into() }
    }
}
