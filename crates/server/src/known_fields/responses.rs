//! The fields of `/v1/responses`.

use super::{
    Row, accepted, honoured, limited,
    objects::{
        ALLOWED_TOKENS, CHOICE, EXPRESSION, IMAGE_DETAIL, JSON_SCHEMA, LOCKET, SALT, STOP,
        STRUCTURED_OUTPUTS, TEMPLATE_VARIABLES, THINKING,
    },
    refused,
};
use crate::schema::{COUNT, Keys, Property, Schema, TOKEN, integer, optional, required};

const NOTHING_STORED: &str = "nothing is stored; send the conversation in `input`";

/// Fields of `/v1/responses`.
pub(super) const RESPONSES: &[Row] = &[
    honoured("model", Schema::ServedModel, "a served name; optional, because one model is served"),
    honoured(
        "input",
        INPUT,
        "a string, or 1 to 2,048 items: messages, `function_call`, `function_call_output`, `reasoning`. Images, files and `item_reference` are refused with their path",
    ),
    honoured("instructions", Schema::AnyText, "the system message in front"),
    honoured(
        "max_output_tokens",
        COUNT,
        "at least 1; what is left, at most the operator's default, unless given",
    ),
    honoured("temperature", Schema::Number(0.0, 2.0), "0 to 2; the checkpoint's default, else 1"),
    honoured("top_p", Schema::Number(0.0, 1.0), "0 to 1"),
    honoured(
        "include",
        Schema::Array(&Schema::OneOf(INCLUDES), 0, 64),
        "`message.output_text.logprobs`; `reasoning.encrypted_content` has no effect, since thoughts are sent as they are",
    ),
    honoured("top_logprobs", integer(0, 20), "above 0 needs `include: [\"message.output_text.logprobs\"]`"),
    honoured(
        "text",
        TEXT,
        "`format`: [structured outputs](#structured-outputs), `text`, `json_object` or `json_schema`, whose keys stand beside the type; `verbosity` is a hint",
    ),
    honoured(
        "tools",
        TOOLS,
        "1 to 128 functions with unique names, keys beside the type; see [tools](#tools)",
    ),
    honoured(
        "tool_choice",
        TOOL_CHOICE,
        "`none`, `auto`, `required`, a function, or `allowed_tools`; all but `none` need `tools`",
    ),
    honoured("parallel_tool_calls", Schema::Boolean, "true unless given; false: at most one call"),
    honoured(
        "reasoning",
        REASONING,
        "`effort`: [reasoning](#reasoning), one of the seven levels; there are no summaries, the thoughts themselves are sent",
    ),
    honoured(
        "truncation",
        Schema::OneOf(&["auto", "disabled"]),
        "`auto` drops the oldest items, as many as needed for what is left to fit beside the answer",
    ),
    honoured("metadata", Schema::Map(Keys::Text(64), &Schema::Text(0, 512), 16), "up to 16 pairs; returned"),
    honoured("stream", Schema::Boolean, ""),
    honoured(
        "stream_options",
        STREAM_OPTIONS,
        "only with `stream: true`; without effect: no padding is sent",
    ),
    honoured(
        "service_tier",
        Schema::OneOf(&["auto", "default", "flex", "scale", "priority", "fast"]),
        "`priority` and `fast` for keys that may; the tier that was used is returned",
    ),
    accepted("store", Schema::Boolean, "nothing is stored; the response says `false`"),
    accepted("user", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    accepted("safety_identifier", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    accepted("prompt_cache_key", Schema::Text(0, 512), "up to 512 bytes; not logged at all"),
    accepted("prompt_cache_options", Schema::AnyObject, "a hint"),
    accepted("prompt_cache_retention", Schema::Text(0, 512), "a hint"),
    limited("background", Schema::False, "`false` only"),
    refused("previous_response_id", NOTHING_STORED),
    refused("conversation", NOTHING_STORED),
    refused("prompt", "there are no stored prompts"),
    refused("context_management", "conversations are not compacted; `truncation` drops their oldest items"),
    refused("moderation", "there is no moderation"),
    refused("max_tool_calls", "it limits the tools of the API's own host, and there are none"),
    refused("messages", "it is called `input` here"),
    refused("max_tokens", "it is called `max_output_tokens` here"),
    refused("max_completion_tokens", "it is called `max_output_tokens` here"),
    refused("response_format", "it is called `text.format` here"),
    refused("reasoning_effort", "it is called `reasoning.effort` here"),
    refused("logprobs", "it is `include: [\"message.output_text.logprobs\"]` here"),
    refused("n", "there is one answer"),
    honoured("seed", integer(i64::MIN, i64::MAX), "any 64-bit integer"),
    honoured("stop", STOP, "up to 16 strings of 1 to 256 bytes"),
    honoured("frequency_penalty", Schema::Number(-2.0, 2.0), "-2 to 2"),
    honoured("presence_penalty", Schema::Number(-2.0, 2.0), "-2 to 2"),
    honoured(
        "logit_bias",
        Schema::Map(Keys::TokenIds, &Schema::Number(-100.0, 100.0), 1024),
        "up to 1,024 token ids, -100 to 100",
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
    honoured("return_tokens_as_token_ids", Schema::Boolean, ""),
    honoured(
        "structured_outputs",
        STRUCTURED_OUTPUTS,
        "[structured outputs](#structured-outputs): exactly one of `json`, `regex`, `choice`, `grammar` and `json_object: true`; not with a `text.format`",
    ),
    honoured("guided_json", JSON_SCHEMA, "as `structured_outputs.json`"),
    honoured("guided_regex", EXPRESSION, "as `structured_outputs.regex`"),
    honoured("guided_choice", CHOICE, "as `structured_outputs.choice`"),
    honoured("guided_grammar", EXPRESSION, "as `structured_outputs.grammar`"),
    refused("chat_template", "the operator has not enabled it"),
    honoured(
        "chat_template_kwargs",
        TEMPLATE_VARIABLES,
        "must not name a field of the request itself, `bos_token` or `eos_token`",
    ),
    honoured("documents", Schema::Array(&Schema::AnyObject, 0, 2048), "passed to the template"),
    honoured("add_special_tokens", Schema::Boolean, "false"),
    refused("truncate_prompt_tokens", "it would cut items in two; use `truncation`"),
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
    honoured(
        "locket",
        LOCKET,
        "[our extension](#the-object-locket): cache method and size, exactness, visual tokens; unknown keys are errors",
    ),
];

const INCLUDES: &[&str] = &["message.output_text.logprobs", "reasoning.encrypted_content"];

const STREAM_OPTIONS: Schema =
    Schema::Object(&[optional("include_obfuscation", Schema::Boolean, "No effect: no padding is sent.")]);

const TOOLS: Schema = Schema::Array(&Schema::Named("ResponsesTool", &Schema::Object(TOOL)), 1, 128);

const TOOL: &[Property] = &[
    required("type", Schema::OneOf(&["function"]), ""),
    required("name", Schema::Pattern("^[A-Za-z0-9_-]+$", 64), "Unique."),
    optional("description", Schema::AnyText, ""),
    optional("parameters", Schema::AnyObject, "JSON Schema of an object; absent: no arguments."),
    optional("strict", Schema::Boolean, "A schema that cannot be a grammar is refused."),
];

const TOOL_CHOICE: Schema = Schema::AnyOf(&[
    Schema::OneOf(&["none", "auto", "required"]),
    Schema::Named("ResponsesNamedTool", &Schema::Object(NAMED_TOOL)),
    Schema::Named("ResponsesAllowedTools", &Schema::Object(ALLOWED_TOOLS)),
]);

const NAMED_TOOL: &[Property] =
    &[required("type", Schema::OneOf(&["function"]), ""), required("name", Schema::AnyText, "")];

const ALLOWED_TOOLS: &[Property] = &[
    required("type", Schema::OneOf(&["allowed_tools"]), ""),
    required("mode", Schema::OneOf(&["auto", "required"]), ""),
    required("tools", Schema::Array(&Schema::Object(NAMED_TOOL), 1, 128), ""),
];

const TEXT: Schema = Schema::Object(&[
    optional(
        "format",
        Schema::AnyOf(&[
            Schema::Object(&[required("type", Schema::OneOf(&["text", "json_object"]), "")]),
            Schema::Object(SCHEMA_FORMAT),
        ]),
        "",
    ),
    optional("verbosity", Schema::OneOf(&["low", "medium", "high"]), "A hint."),
]);

const SCHEMA_FORMAT: &[Property] = &[
    required("type", Schema::OneOf(&["json_schema"]), ""),
    required("name", Schema::Pattern("^[A-Za-z0-9_-]+$", 64), ""),
    required("schema", JSON_SCHEMA, ""),
    optional("description", Schema::AnyText, ""),
    optional("strict", Schema::Boolean, "No effect: every answer follows the schema."),
];

const SUMMARY: Schema = Schema::OneOf(&["auto", "concise", "detailed"]);

const REASONING: Schema = Schema::Object(&[
    optional(
        "effort",
        Schema::OneOf(&["none", "minimal", "low", "medium", "high", "xhigh", "max"]),
        "How much is thought before the answer.",
    ),
    optional("summary", SUMMARY, "No effect."),
    optional("generate_summary", SUMMARY, "No effect."),
]);

const INPUT: Schema = Schema::AnyOf(&[
    Schema::AnyText,
    Schema::Array(
        &Schema::AnyOf(&[
            Schema::Named("InputMessage", &Schema::Object(MESSAGE)),
            Schema::Named("InputFunctionCall", &Schema::Object(CALL)),
            Schema::Named("InputFunctionCallOutput", &Schema::Object(CALL_OUTPUT)),
            Schema::Named("InputReasoning", &Schema::Object(THOUGHTS)),
        ]),
        1,
        2048,
    ),
]);

const ID: Property = optional("id", Schema::Text(0, 512), "No effect.");
const CALL_ID: Property = required("call_id", Schema::Text(1, 512), "");
const STATUS: Property =
    optional("status", Schema::OneOf(&["in_progress", "completed", "incomplete"]), "No effect.");

const MESSAGE: &[Property] = &[
    optional("type", Schema::OneOf(&["message"]), ""),
    required("role", Schema::OneOf(&["user", "assistant", "system", "developer"]), ""),
    required("content", CONTENT, ""),
    optional("phase", Schema::OneOf(&["commentary", "final_answer"]), "No effect."),
    ID,
    STATUS,
];

const CALL: &[Property] = &[
    required("type", Schema::OneOf(&["function_call"]), ""),
    CALL_ID,
    required("name", Schema::Text(1, 512), ""),
    required("arguments", Schema::AnyText, "JSON text."),
    ID,
    STATUS,
];

const CALL_OUTPUT: &[Property] = &[
    required("type", Schema::OneOf(&["function_call_output"]), ""),
    required("call_id", Schema::Text(1, 512), "That of an earlier `function_call`."),
    required("output", CONTENT, ""),
    ID,
    STATUS,
];

const THOUGHTS: &[Property] = &[
    required("type", Schema::OneOf(&["reasoning"]), ""),
    optional("content", Schema::Array(&Schema::Object(THOUGHT), 0, 2048), ""),
    optional("summary", Schema::Array(&Schema::Any, 0, 2048), "No effect."),
    optional("encrypted_content", Schema::AnyText, "No effect: it cannot be read."),
    ID,
    STATUS,
];

const THOUGHT: &[Property] =
    &[required("type", Schema::OneOf(&["reasoning_text"]), ""), required("text", Schema::AnyText, "")];

const CONTENT: Schema = Schema::AnyOf(&[
    Schema::AnyText,
    Schema::Array(
        &Schema::AnyOf(&[
            Schema::Named("InputTextPart", &Schema::Object(TEXT_PART)),
            Schema::Named("InputRefusalPart", &Schema::Object(REFUSAL_PART)),
            Schema::IfItSees(&Schema::Named("InputImagePart", &Schema::Object(IMAGE_PART))),
        ]),
        1,
        2048,
    ),
]);

const ANNOTATIONS: Property =
    optional("annotations", Schema::Array(&Schema::Any, 0, usize::MAX), "No effect.");
const LOGPROBS: Property = optional("logprobs", Schema::Array(&Schema::Any, 0, usize::MAX), "No effect.");
const NO_IMAGE: Property = optional("image_url", Schema::Absent, "");
const NO_FILE_ID: Property = optional("file_id", Schema::Absent, "");
const NO_FILE_URL: Property = optional("file_url", Schema::Absent, "");
const NO_FILE_DATA: Property = optional("file_data", Schema::Absent, "");

const TEXT_PART: &[Property] = &[
    required("type", Schema::OneOf(&["input_text", "output_text"]), ""),
    required("text", Schema::AnyText, ""),
    ANNOTATIONS,
    LOGPROBS,
    NO_IMAGE,
    NO_FILE_ID,
    NO_FILE_URL,
    NO_FILE_DATA,
];

const IMAGE_PART: &[Property] = &[
    required("type", Schema::OneOf(&["input_image"]), ""),
    required("image_url", Schema::AnyText, "A data URI, or an allowed `http(s)` URL."),
    optional("detail", IMAGE_DETAIL, "How closely to look."),
    NO_FILE_ID,
];

const REFUSAL_PART: &[Property] = &[
    required("type", Schema::OneOf(&["refusal"]), ""),
    required("refusal", Schema::AnyText, "What the assistant said in place of an answer."),
    ANNOTATIONS,
    LOGPROBS,
    NO_IMAGE,
    NO_FILE_ID,
    NO_FILE_URL,
    NO_FILE_DATA,
];
