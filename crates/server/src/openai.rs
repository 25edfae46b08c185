//! Wire types of answers, as in the public API. `Option<Option<T>>` is a key that may be absent,
//! null or filled.

use serde::{Serialize, Serializer};
use serde_json::Value;
use utoipa::ToSchema;

use crate::visual::{VisualReport, VisualReports};

/// What a stream's chunks and an answer have in common.
#[derive(Debug, Clone)]
pub(crate) struct Stamp {
    /// `chatcmpl-…` or `cmpl-…`, the same on every chunk.
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    /// The served name that the client asked for.
    pub(crate) model: String,
    /// `fp_…`
    pub(crate) system_fingerprint: String,
}

/// A new id with 32 hex digits after `prefix`.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// A new id of the newer kind: 32 hex digits after `prefix` and an underscore.
pub(crate) fn new_item_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// Token counts.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
    pub(crate) prompt_tokens_details: PromptDetails,
    pub(crate) completion_tokens_details: CompletionDetails,
    pub(crate) locket: LocketUsage,
}

/// What became of the tokens in the cache: our extension.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct LocketUsage {
    /// Nothing was folded: every token was computed with exact attention.
    pub(crate) exact: bool,
    /// Tokens that some layer no longer holds in slots of their own; the most of any choice.
    pub(crate) folded_tokens: u64,
    /// Cache method.
    pub(crate) method: &'static str,
    /// Slots that survive a fold; absent for `full`, which never folds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) slots: Option<u32>,
    /// What became of each image; present if asked for by `locket.visual.report`, at the end only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<VisualReport>>)]
    pub(crate) visual: Option<VisualReports>,
}

/// Parts of the prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: u64,
    /// Visual tokens of images, before any was dropped.
    pub(crate) image_tokens: u64,
    /// Those that went into the decoder; absent without images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image_tokens_kept: Option<u64>,
}

/// Parts of the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct CompletionDetails {
    pub(crate) reasoning_tokens: u64,
}

impl Usage {
    /// Counts with their sum.
    pub(crate) fn new(
        prompt_tokens: u64,
        completion_tokens: u64,
        cached_tokens: u64,
        locket: LocketUsage,
    ) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens, ..PromptDetails::default() },
            completion_tokens_details: CompletionDetails::default(),
            locket,
        }
    }
}

/// `finish_reason`; nothing else may appear on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FinishReason {
    Stop,
    Length,
    /// The message has a complete call.
    ToolCalls,
}

/// What ended a text, if it was not the model's own end token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Token(u32),
    Text(String),
}

/// Answer of `/v1/chat/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
    pub(crate) service_tier: &'static str,
    pub(crate) system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    pub(crate) prompt_logprobs: Option<Vec<Option<PromptLogprobMap>>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: u32,
    pub(crate) message: AssistantMessage,
    #[schema(required)]
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: FinishReason,
    #[schema(required)]
    pub(crate) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AssistantMessage {
    pub(crate) role: &'static str,
    /// Null if the message is calls only.
    #[schema(required)]
    pub(crate) content: Option<String>,
    #[schema(required)]
    pub(crate) refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ChatToolCall>,
}

/// A call in an answer, or a fragment of one in a chunk.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatToolCall {
    /// Which call; in chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<u32>,
    /// Absent in later fragments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// `function`; absent in later fragments.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: ChatFunction,
}

#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatFunction {
    /// Absent in later fragments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// JSON text, or a piece of it.
    pub(crate) arguments: String,
}

/// Log-probabilities of a chat choice or delta.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatLogprob>,
    #[schema(required)]
    pub(crate) refusal: Option<Vec<ChatLogprob>>,
}

/// One generated token.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) top_logprobs: Vec<TopLogprob>,
}

/// One alternative.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

/// A chunk of a chat stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service_tier: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub(crate) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunkChoice {
    pub(crate) index: u32,
    pub(crate) delta: ChatDelta,
    #[schema(required)]
    pub(crate) logprobs: Option<ChatLogprobs>,
    #[schema(required)]
    pub(crate) finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<StopReason>)]
    pub(crate) stop_reason: Option<Option<StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ChatToolCall>,
}

/// Answer and chunk of `/v1/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub(crate) usage: Option<Option<Usage>>,
    pub(crate) system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: u32,
    pub(crate) text: String,
    #[schema(required)]
    pub(crate) logprobs: Option<CompletionLogprobs>,
    #[schema(required)]
    pub(crate) finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<StopReason>)]
    pub(crate) stop_reason: Option<Option<StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    pub(crate) prompt_logprobs: Option<Vec<Option<PromptLogprobMap>>>,
}

/// Four arrays of equal length.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    /// null for the first token of an echoed prompt.
    pub(crate) token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<Object>>)]
    pub(crate) top_logprobs: Vec<Option<LogprobMap>>,
    pub(crate) text_offset: Vec<usize>,
}

/// Log-probabilities by the text of the token, likeliest first. They are written as those of the
/// chosen tokens are, so that equal ones are equal on the wire.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LogprobMap(pub(crate) Vec<(String, f32)>);

impl Serialize for LogprobMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}

/// How likely a prompt token, or another in its place, was: our extension, as others have it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PromptLogprob {
    pub(crate) logprob: f32,
    /// 1 for the likeliest.
    pub(crate) rank: u32,
    pub(crate) decoded_token: String,
}

/// By token id; the prompt's own token comes first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PromptLogprobMap(pub(crate) Vec<(String, PromptLogprob)>);

impl Serialize for PromptLogprobMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, entry)| (id, entry)))
    }
}

/// An entry of `/v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: &'static str,
    pub(crate) root: &'a str,
    #[schema(required)]
    pub(crate) parent: Option<&'a str>,
    pub(crate) max_model_len: u32,
    pub(crate) locket: ModelExtension<'a>,
}

/// What requests may say in `locket`, and what they get if they say nothing: our extension.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelExtension<'a> {
    pub(crate) kv_cache: CacheCard<'a>,
    pub(crate) require_exact: bool,
    /// Absent for a model that takes text only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) visual: Option<VisualCard>,
}

/// Defaults and limits of images and of `locket.visual`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VisualCard {
    pub(crate) method: &'static str,
    /// Methods that requests may name.
    pub(crate) methods: Vec<&'static str>,
    /// Share of an image's tokens up to 1, or a number of them above 1, with `detail` `auto`.
    pub(crate) budget: f64,
    /// With `low`, which is one tile of the whole image.
    pub(crate) low_budget: f64,
    /// With `high` and `original`.
    pub(crate) high_budget: f64,
    /// Largest share that requests may ask for.
    pub(crate) max_budget: f64,
    pub(crate) max_images: u32,
    /// The most tokens that an image can have.
    pub(crate) max_tokens: usize,
}

/// Defaults and limits of `locket.kv_cache`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CacheCard<'a> {
    pub(crate) method: &'a str,
    /// Methods that requests may name.
    pub(crate) methods: Vec<&'static str>,
    /// Slots that survive a fold, of requests that name none.
    pub(crate) slots: u32,
    /// Slots filled between folds, for that many slots.
    pub(crate) ring: u32,
    pub(crate) min_slots: u32,
    pub(crate) max_slots: u32,
}

/// Answer of `/v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList<'a> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelCard<'a>>,
}
