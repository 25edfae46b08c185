//! What can go wrong between text and ids.

/// Errors of the processor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tokenizer cannot be read or is of a kind that is not known here.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The text has a token that the model has no row for.
    #[error("the text contains {token:?}, token {id}, but this model ends at token {last}")]
    UnknownToken {
        /// The token as the tokenizer spells it.
        token: String,
        /// Its id.
        id: u32,
        /// The model's last id.
        last: usize,
    },
    /// A conversation renders to more text than is allowed.
    #[error("the prompt has {bytes} bytes; the limit is {limit}")]
    PromptTooLong {
        /// Bytes of the rendered prompt.
        bytes: usize,
        /// The most that it may have.
        limit: usize,
    },
    /// The chat template does not compile or refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The model has no chat template.
    #[error("this model has no chat template; use /v1/completions")]
    NoTemplate,
}
