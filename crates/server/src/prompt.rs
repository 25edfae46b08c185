//! Text to prompt ids, off the async threads where it could take long.

use std::sync::Arc;

use locket_processor::{
    ChatPrompt, Error as ProcessorError, Processor,
    images::images,
    reasoning::{ReasoningMode, ReasoningProfile},
};
use serde_json::Value;

use crate::{
    blocking,
    chat_ids::{self, ChatWishes, PromptIds},
    error::{ApiError, ErrorKind, clip},
    generation::{GenerationFields, PromptSource},
    state::AppState,
    visual::Picture,
};

/// Texts up to this many bytes are tokenised at once: a fraction of a millisecond.
const SHORT_BYTES: usize = 4096;

/// Lists of tokens up to this length are made into text at once.
const SHORT_TOKENS: usize = 4096;

/// Runs `work` here if its input is short, else on a blocking thread. `param` is the field whose
/// text it is.
async fn run<T: Send + 'static>(
    state: &AppState,
    param: &'static str,
    bytes: usize,
    work: impl FnOnce(&Processor) -> Result<T, ProcessorError> + Send + 'static,
) -> Result<T, ApiError> {
    let processor = Arc::clone(state.processor());
    let result = blocking::run(bytes > SHORT_BYTES, move || work(&processor)).await?;
    result.map_err(|error| from_processor(&error, param))
}

fn from_processor(error: &ProcessorError, param: &'static str) -> ApiError {
    match error {
        ProcessorError::Template(reason) => {
            let message = format!("The chat template refused `{param}`: {}.", clip(reason));
            ApiError::field(ErrorKind::InvalidValue, param, message)
        }
        ProcessorError::NoTemplate => {
            let message = format!("`{param}` is not supported: {error}.");
            ApiError::field(ErrorKind::UnsupportedParameter, param, message)
        }
        ProcessorError::PromptTooLong { .. } => {
            let message = format!("`{param}` is too long for any context: {error}.");
            ApiError::field(ErrorKind::ContextLengthExceeded, param, message)
        }
        ProcessorError::UnknownToken { .. } => {
            let message = format!("`{param}` cannot be read by this model: {error}.");
            ApiError::field(ErrorKind::InvalidValue, param, message)
        }
        ProcessorError::Tokenizer(reason) => ApiError::internal(reason),
    }
}

/// What is wanted of a conversation beside its ids.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChatNeeds {
    /// Count at most so many tokens of instructions.
    pub(crate) most_pinned: u32,
    /// Find the place in front of the answer's header.
    pub(crate) wants_snapshot: bool,
    /// The tokenizer's own additions.
    pub(crate) add_special_tokens: bool,
    /// Whose remembered turns may be used.
    pub(crate) salt: Vec<u8>,
    /// How thoughts are marked, and what the prompt's end is to say about thinking.
    pub(crate) reasoning: Option<(Arc<ReasoningProfile>, Option<ReasoningMode>)>,
}

impl ChatNeeds {
    /// What a generating request with these fields needs.
    pub(crate) fn of(state: &AppState, fields: &GenerationFields) -> Self {
        let bounds = &state.bounds().cache;
        Self {
            most_pinned: fields.cache(bounds).most_pinned(),
            wants_snapshot: bounds.snapshots,
            add_special_tokens: fields.add_special_tokens.unwrap_or(false),
            salt: fields.salt().to_vec(),
            reasoning: fields.wanted.reasoning.for_prompt(),
        }
    }
}

/// Renders a conversation, which came in the field `source`, and tokenises it. `pictures` are the images
/// that its messages name by their index.
///
/// # Errors
/// 400 if the template refuses the messages, the model has none, or the prompt is too long.
pub(crate) async fn encode_chat(
    state: &AppState,
    source: PromptSource,
    chat: ChatPrompt,
    needs: ChatNeeds,
    pictures: &[Arc<Picture>],
) -> Result<PromptIds, ApiError> {
    let indices = images(&chat.messages).filter_map(|image| image["index"].as_u64());
    let pictures: Vec<Arc<Picture>> =
        indices.filter_map(|index| pictures.get(usize::try_from(index).ok()?).cloned()).collect();
    let documents = chat.documents.iter().chain(&chat.tools).flatten();
    let bytes = chat.messages.iter().chain(documents).chain(chat.kwargs.values()).map(text_bytes).sum();
    let turns = state.turns().cloned();
    let param = source.param();
    let mut prompt = run(state, param, bytes, move |processor| {
        let wishes = ChatWishes {
            turns: turns.as_deref().map(|turns| (turns, needs.salt.as_slice())),
            most_pinned: needs.most_pinned,
            wants_snapshot: needs.wants_snapshot,
            add_special_tokens: needs.add_special_tokens,
            reasoning: needs.reasoning.as_ref().map(|(profile, mode)| (profile.as_ref(), *mode)),
        };
        chat_ids::encode(processor, chat, wishes)
    })
    .await?;
    if prompt.placeholders.len() != pictures.len() {
        let (printed, sent) = (prompt.placeholders.len(), pictures.len());
        let message = format!("`{param}` has {sent} images, but the chat template prints {printed}.");
        return Err(ApiError::field(ErrorKind::InvalidValue, param, message));
    }
    prompt.pictures = pictures;
    if prompt.ids.is_empty() {
        let message = format!("`{param}` renders to an empty prompt.");
        return Err(ApiError::field(ErrorKind::InvalidValue, param, message));
    }
    Ok(prompt)
}

/// Tokenises a text prompt. One without tokens is the start token alone.
///
/// # Errors
/// 400 if a token is beyond the model's rows, or a start token is needed and there is none.
pub(crate) async fn encode_text(
    state: &AppState,
    text: String,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let ids = run(state, "prompt", text.len(), move |processor| processor.encode(&text, add_special_tokens));
    let ids = ids.await?;
    if !ids.is_empty() {
        return Ok(ids);
    }
    let start = state.processor().bos_token_id().ok_or_else(|| {
        let message = "`prompt` is empty, and this model has no start token that could stand for it.";
        ApiError::field(ErrorKind::EmptyString, "prompt", message)
    })?;
    Ok(vec![start])
}

/// A text, or the ids that a client made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TextOrIds {
    /// To be tokenised.
    Text(String),
    /// Taken as they are; at least one.
    Ids(Vec<u32>),
}

/// Tokenises what is to be embedded.
///
/// # Errors
/// 400 if a token is beyond the model's rows, or a text has no tokens.
pub(crate) async fn encode_inputs(
    state: &AppState,
    inputs: Vec<TextOrIds>,
    add_special_tokens: bool,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let bytes = inputs.iter().map(|input| match input {
        TextOrIds::Text(text) => text.len(),
        TextOrIds::Ids(_) => 0,
    });
    let bytes = bytes.sum();
    let encode = move |processor: &Processor| {
        let encode = |input| match input {
            TextOrIds::Text(text) => processor.encode(&text, add_special_tokens),
            TextOrIds::Ids(ids) => Ok(ids),
        };
        inputs.into_iter().map(encode).collect::<Result<Vec<_>, _>>()
    };
    let ids = run(state, "input", bytes, encode).await?;
    if let Some(index) = ids.iter().position(Vec::is_empty) {
        let path = if ids.len() == 1 { "input".to_owned() } else { format!("input[{index}]") };
        let message = format!("`{path}` has no tokens.");
        return Err(ApiError::field(ErrorKind::EmptyString, path, message));
    }
    Ok(ids)
}

/// Token sequences of `bad_words`.
///
/// # Errors
/// 400 if a word needs a token beyond the model's rows.
pub(crate) async fn encode_bad_words(state: &AppState, words: &[String]) -> Result<Vec<Vec<u32>>, ApiError> {
    let bytes = words.iter().map(String::len).sum();
    let words = words.to_vec();
    run(state, "bad_words", bytes, move |processor| processor.bad_word_sequences(&words)).await
}

/// The text of ids, control tokens included.
///
/// # Errors
/// Only internal ones.
pub(crate) async fn decode(state: &AppState, ids: Vec<u32>) -> Result<String, ApiError> {
    let processor = Arc::clone(state.processor());
    blocking::run(ids.len() > SHORT_TOKENS, move || processor.decode(&ids, false)).await
}

/// The text of each token, and the ids themselves.
///
/// # Errors
/// Only internal ones.
pub(crate) async fn token_texts(
    state: &AppState,
    ids: Vec<u32>,
) -> Result<(Vec<u32>, Vec<String>), ApiError> {
    let processor = Arc::clone(state.processor());
    blocking::run(ids.len() > SHORT_TOKENS, move || {
        let texts = ids.iter().map(|id| processor.token_text(*id).into_owned()).collect();
        (ids, texts)
    })
    .await
}

/// Bytes of text in a value; what has none counts one.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => 1 + items.iter().map(text_bytes).sum::<usize>(),
        Value::Object(entries) => {
            1 + entries.iter().map(|(key, value)| key.len() + text_bytes(value)).sum::<usize>()
        }
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_processor_name_the_field() {
        let unknown = ProcessorError::UnknownToken { token: "<img>".into(), id: 9, last: 8 };
        let long = ProcessorError::PromptTooLong { bytes: 9, limit: 8 };
        let rows = [
            (unknown, ErrorKind::InvalidValue),
            (long, ErrorKind::ContextLengthExceeded),
            (ProcessorError::Template("no".into()), ErrorKind::InvalidValue),
            (ProcessorError::NoTemplate, ErrorKind::UnsupportedParameter),
        ];
        for (error, kind) in rows {
            let answer = from_processor(&error, "bad_words");
            assert_eq!((answer.kind, answer.param.as_deref()), (kind, Some("bad_words")));
        }
        let broken = from_processor(&ProcessorError::Tokenizer("x".into()), "prompt");
        assert_eq!((broken.kind, broken.param), (ErrorKind::InternalError, None));
    }

    #[test]
    fn all_of_a_value_counts() {
        assert_eq!(text_bytes(&serde_json::json!({"ab": ["cd", 1, null], "e": "f"})), 1 + 2 + 1 + 2 + 2 + 2);
    }
}
