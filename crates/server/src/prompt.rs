//! Text to prompt ids, off the async threads where it could take long.

use std::sync::Arc;

use locket_processor::{ChatPrompt, Error as ProcessorError, Processor};
use serde_json::Value;

use crate::{
    error::{ApiError, ErrorKind, clip},
    state::AppState,
};

/// Texts up to this many bytes are tokenised at once: a fraction of a millisecond.
const SHORT_BYTES: usize = 4096;

/// Runs `work` here if its input is short, else on a blocking thread.
async fn run<T: Send + 'static>(
    state: &AppState,
    bytes: usize,
    work: impl FnOnce(&Processor) -> Result<T, ProcessorError> + Send + 'static,
) -> Result<T, ApiError> {
    let processor = Arc::clone(state.processor());
    let result = if bytes <= SHORT_BYTES {
        work(&processor)
    } else {
        tokio::task::spawn_blocking(move || work(&processor))
            .await
            .map_err(|error| ApiError::internal(&error.to_string()))?
    };
    result.map_err(|error| match error {
        ProcessorError::Template(reason) => {
            let message = format!("The chat template refused `messages`: {}.", clip(&reason));
            ApiError::field(ErrorKind::InvalidValue, "messages", message)
        }
        ProcessorError::NoTemplate => {
            let message = format!("`messages` is not supported: {error}.");
            ApiError::field(ErrorKind::UnsupportedParameter, "messages", message)
        }
        ProcessorError::Tokenizer(reason) => ApiError::internal(&reason),
    })
}

/// Renders a conversation and tokenises it.
///
/// # Errors
/// 400 if the template refuses the messages or the model has none.
pub(crate) async fn encode_chat(
    state: &AppState,
    chat: ChatPrompt,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let bytes = chat.messages.iter().map(text_bytes).sum();
    let ids = run(state, bytes, move |processor| {
        let text = processor.render_chat(&chat)?;
        processor.encode(&text, add_special_tokens)
    })
    .await?;
    if ids.is_empty() {
        let message = "`messages` renders to an empty prompt.";
        return Err(ApiError::field(ErrorKind::InvalidValue, "messages", message));
    }
    Ok(ids)
}

/// Tokenises a text.
///
/// # Errors
/// Only internal ones.
pub(crate) async fn encode_text(
    state: &AppState,
    text: String,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    run(state, text.len(), move |processor| processor.encode(&text, add_special_tokens)).await
}

/// Bytes of text in a message, or any other value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(entries) => entries.values().map(text_bytes).sum(),
        _ => 0,
    }
}
