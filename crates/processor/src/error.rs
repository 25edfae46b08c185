//! What can go wrong between text and ids.

/// Errors of the processor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tokenizer cannot be read or is of a kind that is not known here.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template does not compile or refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The model has no chat template.
    #[error("this model has no chat template; use /v1/completions")]
    NoTemplate,
}
