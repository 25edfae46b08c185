//! The rows of the tables in `docs/api.md`: name, treatment, values and what is said about them.
//!
//! A new field is one row here, the same row in the documentation (the test says what it must be),
//! and a parser that reads it; the test of `openapi` fails until schema and parser agree.

use super::{
    Row, accepted, honoured, limited,
    objects::{
        ALLOWED_TOKENS, CHOICE, EXPRESSION, INPUTS, JSON_SCHEMA, KEPT_TOKENS, LOCKET, MESSAGES, PROMPTS,
        RESPONSE_FORMAT, SALT, STOP, STREAM_OPTIONS, STRUCTURED_OUTPUTS, TEMPLATE_VARIABLES, THINKING,
        TOOL_CHOICE, TOOLS,
    },
    refused,
};
use crate::{
    generation::EFFORTS,
    schema::{COUNT, Keys, Limit, Schema, TOKEN, integer},
};

const OPERATOR: &str = "the operator has not enabled it";

/// Fields that only chat has.
pub(super) const CHAT: &[Row] = &[
    honoured(
        "messages",
        MESSAGES,
        "1 to 2,048 messages of the roles `system`, `developer`, `user`, `assistant`, `tool`; content is a string or text parts. `tool_calls` of the assistant may stand in place of content; a `tool_call_id` must be the id of an earlier call. Images are parts of the user's messages, [if the model sees](#images); audio is refused with its path",
    ),
    honoured("max_completion_tokens", COUNT, "at least 1; wins over `max_tokens`"),
    honoured("logprobs", Schema::Boolean, "with `top_logprobs`, 0 to 20"),
    honoured("top_logprobs", integer(0, 20), "above 0 needs `logprobs: true`"),
    honoured("tools", TOOLS, "1 to 128 functions with unique names; see [tools](#tools)"),
    honoured(
        "tool_choice",
        TOOL_CHOICE,
        "`none`, `auto`, `required`, a function, or `allowed_tools`; all but `none` need `tools`",
    ),
    honoured("parallel_tool_calls", Schema::Boolean, "true unless given; false: at most one call"),
    honoured(
        "reasoning_effort",
        Schema::OneOf(EFFORTS),
        "[reasoning](#reasoning): one of the seven levels; without effect where the model has no thoughts",
    ),
    honoured(
        "metadata",
        Schema::Map(Keys::Text(64), &Schema::Text(0, 512), 16),
        "up to 16 pairs; returned in the unstreamed answer",
    ),
    accepted("store", Schema::Boolean, "nothing is stored"),
    honoured(
        "service_tier",
        Schema::OneOf(&["auto", "default", "flex", "scale", "priority", "fast"]),
        "`priority` and `fast` for keys that may; the tier that was used is returned",
    ),
    accepted("verbosity", Schema::OneOf(&["low", "medium", "high"]), "a hint"),
    accepted("prediction", Schema::AnyObject, "a hint"),
    accepted("prompt_cache_options", Schema::AnyObject, "a hint"),
    accepted("prompt_cache_retention", Schema::Text(0, 512), "a hint"),
    limited("modalities", Schema::Array(&Schema::OneOf(&["text"]), 0, 16), "`[\"text\"]` only"),
    refused("audio", "there is no audio output"),
    refused("web_search_options", "there is no web search"),
    refused("moderation", "there is no moderation"),
    refused("functions", "it was replaced by `tools`"),
    refused("function_call", "it was replaced by `tools` and `tool_choice`"),
    accepted("safety_identifier", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    accepted("prompt_cache_key", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    refused("chat_template", OPERATOR),
    honoured(
        "chat_template_kwargs",
        TEMPLATE_VARIABLES,
        "must not name a field of the request itself, `bos_token` or `eos_token`",
    ),
    honoured("add_generation_prompt", Schema::Boolean, "true unless given"),
    honoured("continue_final_message", Schema::Boolean, "needs `add_generation_prompt: false`"),
    honoured("documents", Schema::Array(&Schema::AnyObject, 0, 2048), "passed to the template"),
    honoured(
        "echo",
        Schema::Boolean,
        "answers begin with the text of the last message, if it is the assistant's: with `continue_final_message`",
    ),
    honoured(
        "thinking",
        THINKING,
        "[reasoning](#reasoning): `type` is `enabled`, `disabled` or `auto`, with `budget_tokens`",
    ),
    honoured(
        "thinking_token_budget",
        integer(0, u32::MAX as i64),
        "[reasoning](#reasoning): most thought tokens; 0 does not think",
    ),
];

/// Fields that only completions has.
pub(super) const COMPLETIONS: &[Row] = &[
    honoured(
        "prompt",
        PROMPTS,
        "string, strings, ids or arrays of ids; 1 to 256 prompts, but prompts times `n` not above the length of the operator's queue (`max-waiting`, 256): 400 `invalid_value`; an empty string is the start token",
    ),
    honoured("logprobs", integer(0, 20), "0 to 20"),
    honoured(
        "echo",
        Schema::Boolean,
        "the prompt comes first; with `logprobs` its [log-probabilities](#scoring-prompts), too",
    ),
    refused("suffix", "this model has no fill-in-the-middle template"),
];

/// Fields of both.
pub(super) const GENERATION: &[Row] = &[
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured(
        "max_tokens",
        integer(0, u32::MAX as i64),
        "at least 1, completions with `echo` 0; chat: what is left, at most the operator's default; completions: 16",
    ),
    honoured("temperature", Schema::Number(0.0, 2.0), "0 to 2; the checkpoint's default, else 1"),
    honoured("top_p", Schema::Number(0.0, 1.0), "0 to 1"),
    honoured("n", Schema::Integer(Limit::Is(1), Limit::MaxChoices), "1 to the operator's limit (16)"),
    honoured("seed", integer(i64::MIN, i64::MAX), "any 64-bit integer"),
    honoured("stop", STOP, "up to 16 strings of 1 to 256 bytes"),
    honoured("frequency_penalty", Schema::Number(-2.0, 2.0), "-2 to 2"),
    honoured("presence_penalty", Schema::Number(-2.0, 2.0), "-2 to 2"),
    honoured(
        "logit_bias",
        Schema::Map(Keys::TokenIds, &Schema::Number(-100.0, 100.0), 1024),
        "up to 1,024 token ids, -100 to 100",
    ),
    honoured("stream", Schema::Boolean, ""),
    honoured(
        "stream_options",
        STREAM_OPTIONS,
        "only with `stream: true`; `include_obfuscation` has no effect",
    ),
    accepted("user", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    honoured(
        "response_format",
        RESPONSE_FORMAT,
        "[structured outputs](#structured-outputs): `text`, `json_object`, `json_schema`",
    ),
    honoured("top_k", integer(-1, u32::MAX as i64), "-1 and 0 are off"),
    honoured("min_p", Schema::Number(0.0, 1.0), "0 to 1"),
    honoured("repetition_penalty", Schema::Above(0.0, 10.0), "above 0, up to 10"),
    honoured("min_tokens", integer(0, u32::MAX as i64), "not above the longest answer"),
    honoured("ignore_eos", Schema::Boolean, ""),
    honoured("stop_token_ids", Schema::Array(&TOKEN, 0, 64), "up to 64"),
    honoured("include_stop_str_in_output", Schema::Boolean, ""),
    honoured("skip_special_tokens", Schema::Boolean, ""),
    honoured("bad_words", Schema::Array(&Schema::Pattern(r"\S", 256), 0, 128), "up to 128"),
    honoured("allowed_token_ids", ALLOWED_TOKENS, "at least 1"),
    honoured(
        "prompt_logprobs",
        integer(0, 20),
        "[0 to 20 alternatives](#scoring-prompts); not with `stream`; chat: at the top of the answer, completions: per choice",
    ),
    honoured(
        "return_token_ids",
        Schema::Boolean,
        "`prompt_token_ids` at the top (of the first chunk), per choice for several prompts; `token_ids` per choice or delta",
    ),
    honoured("return_tokens_as_token_ids", Schema::Boolean, ""),
    honoured(
        "structured_outputs",
        STRUCTURED_OUTPUTS,
        "[structured outputs](#structured-outputs): exactly one of `json`, `regex`, `choice`, `grammar` and `json_object: true`",
    ),
    honoured("guided_json", JSON_SCHEMA, "as `structured_outputs.json`"),
    honoured("guided_regex", EXPRESSION, "as `structured_outputs.regex`"),
    honoured("guided_choice", CHOICE, "as `structured_outputs.choice`"),
    honoured("guided_grammar", EXPRESSION, "as `structured_outputs.grammar`"),
    honoured("add_special_tokens", Schema::Boolean, "chat: false; completions: true"),
    honoured(
        "truncate_prompt_tokens",
        KEPT_TOKENS,
        "the last N tokens; -1: what fits beside the answer (`max_tokens`, else its default, at most half the context)",
    ),
    honoured(
        "priority",
        integer(i32::MIN as i64, i32::MAX as i64),
        "lower is served earlier; below 0 only for [keys](#keys-and-limits) that may",
    ),
    honoured(
        "request_id",
        Schema::Pattern("^[!-~]+$", 128),
        "1 to 128 visible ASCII characters; the header `x-request-id` wins; in effect for errors and logs too",
    ),
    honoured(
        "cache_salt",
        SALT,
        "1 to 128 bytes: snapshots and remembered turns are shared with requests of the same salt only; also `locket.cache_salt`",
    ),
    limited("best_of", integer(1, 128), "must equal `n`"),
    limited("use_beam_search", Schema::False, "`false` only"),
    limited("length_penalty", Schema::Number(1.0, 1.0), "1 only"),
    refused("mm_processor_kwargs", OPERATOR),
    refused("media_io_kwargs", OPERATOR),
    refused("kv_transfer_params", OPERATOR),
    refused("vllm_xargs", OPERATOR),
    honoured(
        "locket",
        LOCKET,
        "[our extension](#the-object-locket): cache method and size, exactness, visual tokens; unknown keys are errors",
    ),
];

/// Fields of `/v1/embeddings`.
pub(super) const EMBEDDINGS: &[Row] = &[
    honoured(
        "input",
        INPUTS,
        "string, strings, ids or arrays of ids; 1 to 2,048 inputs, none empty, none longer than the context",
    ),
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured(
        "encoding_format",
        Schema::OneOf(&["float", "base64"]),
        "`float` unless given; `base64` of little-endian 32-bit numbers",
    ),
    refused("dimensions", "the model was not trained for shorter embeddings"),
    accepted("user", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    honoured("add_special_tokens", Schema::Boolean, "true unless given"),
    honoured("truncate_prompt_tokens", KEPT_TOKENS, "the last N tokens; -1: what the context holds"),
    honoured(
        "priority",
        integer(i32::MIN as i64, i32::MAX as i64),
        "lower is served earlier; below 0 only for [keys](#keys-and-limits) that may",
    ),
    honoured(
        "request_id",
        Schema::Pattern("^[!-~]+$", 128),
        "1 to 128 visible ASCII characters; the header `x-request-id` wins; in effect for errors and logs too",
    ),
];

/// Fields of `/tokenize`.
pub(super) const TOKENIZE: &[Row] = &[
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured(
        "prompt",
        Schema::AnyText,
        "one string; an empty one is the start token; either it or `messages`",
    ),
    honoured(
        "messages",
        MESSAGES,
        "1 to 2,048 messages of the roles `system`, `developer`, `user`, `assistant`, `tool`; content is a string or text parts. `tool_calls` of the assistant may stand in place of content; a `tool_call_id` must be the id of an earlier call. Images are parts of the user's messages, [if the model sees](#images); audio is refused with its path",
    ),
    honoured(
        "add_special_tokens",
        Schema::Boolean,
        "true with `prompt`, false with `messages`, unless given",
    ),
    honoured("return_token_strs", Schema::Boolean, ""),
    honoured("add_generation_prompt", Schema::Boolean, "true unless given"),
    honoured("continue_final_message", Schema::Boolean, "needs `add_generation_prompt: false`"),
    refused("chat_template", OPERATOR),
    honoured(
        "chat_template_kwargs",
        TEMPLATE_VARIABLES,
        "must not name a field of the request itself, `bos_token` or `eos_token`",
    ),
    honoured("documents", Schema::Array(&Schema::AnyObject, 0, 2048), "passed to the template"),
    honoured("tools", TOOLS, "as in chat; passed to the template"),
];

/// Fields of `/v1/load_lora_adapter`.
pub(super) const LOAD_ADAPTER: &[Row] = &[
    honoured(
        "lora_name",
        Schema::Text(1, 512),
        "the model's name with the adapter, 1 to 512 bytes; not one that is served",
    ),
    honoured("lora_path", Schema::Text(1, 4096), "its PEFT folder, inside of the operator's `adapter-dir`"),
];

/// Fields of `/v1/unload_lora_adapter`.
pub(super) const UNLOAD_ADAPTER: &[Row] =
    &[honoured("lora_name", Schema::Text(1, 512), "an adapter that is loaded")];

/// Fields of `/visual_tokens`.
pub(super) const VISUAL_TOKENS: &[Row] = &[
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured("messages", MESSAGES, "as in chat"),
    honoured("locket", LOCKET, "[our extension](#the-object-locket): its `visual`"),
];

/// Fields of `/detokenize`.
pub(super) const DETOKENIZE: &[Row] = &[
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured("tokens", Schema::Array(&TOKEN, 0, usize::MAX), "ids below the vocabulary size"),
];
