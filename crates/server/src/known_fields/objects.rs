//! Fields whose values have parts: messages, prompts, formats, our own object.

use crate::schema::{Limit, Property, Schema, TOKEN, integer, optional, required};

/// `messages`
pub(super) const MESSAGES: Schema = Schema::Array(&Schema::Named("ChatMessage", &MESSAGE), 1, 2048);

const MESSAGE: Schema = Schema::AnyOf(&[
    Schema::Named("ChatInstruction", &Schema::Object(INSTRUCTION)),
    Schema::Named("ChatAnswer", &Schema::Object(ANSWER)),
    Schema::Named("ChatRefusal", &Schema::Object(REFUSAL)),
    Schema::Named("ChatCalls", &Schema::Object(CALLS)),
    Schema::Named("ChatToolResult", &Schema::Object(TOOL_RESULT)),
]);

const NAME: Property = optional("name", Schema::Text(1, 512), "");
const REASONING: Property = optional("reasoning", Schema::AnyText, "");
const REASONING_CONTENT: Property = optional("reasoning_content", Schema::AnyText, "");
const NO_AUDIO: Property = optional("audio", Schema::Absent, "there is no audio");
const NO_CALLS: Property = optional("tool_calls", Schema::Absent, "Only the assistant calls tools.");
const TOOL_CALLS: Schema =
    Schema::Array(&Schema::Named("ChatToolCallInput", &Schema::Object(TOOL_CALL)), 1, 128);
const NO_CALL: Property = optional("function_call", Schema::Absent, "it was replaced by `tool_calls`");

const INSTRUCTION: &[Property] = &[
    required("role", Schema::OneOf(&["system", "developer", "user"]), ""),
    required("content", CONTENT, ""),
    NAME,
    optional("refusal", Schema::AnyText, ""),
    REASONING,
    REASONING_CONTENT,
    NO_CALLS,
    NO_AUDIO,
    NO_CALL,
];

const ANSWER: &[Property] = &[
    required("role", Schema::OneOf(&["assistant"]), ""),
    required("content", CONTENT, ""),
    NAME,
    optional("refusal", Schema::AnyText, ""),
    REASONING,
    REASONING_CONTENT,
    optional("tool_calls", TOOL_CALLS, ""),
    NO_AUDIO,
    NO_CALL,
];

const REFUSAL: &[Property] = &[
    required("role", Schema::OneOf(&["assistant"]), ""),
    optional("content", Schema::Absent, ""),
    NAME,
    required("refusal", Schema::AnyText, "What the assistant said in place of an answer."),
    REASONING,
    REASONING_CONTENT,
    optional("tool_calls", TOOL_CALLS, ""),
    NO_AUDIO,
    NO_CALL,
];

const CALLS: &[Property] = &[
    required("role", Schema::OneOf(&["assistant"]), ""),
    optional("content", CONTENT, ""),
    NAME,
    optional("refusal", Schema::AnyText, ""),
    REASONING,
    REASONING_CONTENT,
    required("tool_calls", TOOL_CALLS, ""),
    NO_AUDIO,
    NO_CALL,
];

const TOOL_RESULT: &[Property] = &[
    required("role", Schema::OneOf(&["tool"]), ""),
    required("content", CONTENT, ""),
    required("tool_call_id", Schema::Text(1, 512), "The id of a call in an earlier message."),
    NAME,
    optional("refusal", Schema::AnyText, ""),
    REASONING,
    REASONING_CONTENT,
    NO_CALLS,
    NO_AUDIO,
    NO_CALL,
];

const TOOL_CALL: &[Property] = &[
    required("id", Schema::Text(1, 512), ""),
    required("type", Schema::OneOf(&["function"]), ""),
    required("function", Schema::Object(CALLED_FUNCTION), ""),
];

const CALLED_FUNCTION: &[Property] =
    &[required("name", Schema::Text(1, 512), ""), required("arguments", Schema::AnyText, "JSON text.")];

/// `tools`
pub(super) const TOOLS: Schema = Schema::Array(&Schema::Named("ChatTool", &Schema::Object(TOOL)), 1, 128);

const TOOL: &[Property] = &[
    required("type", Schema::OneOf(&["function"]), ""),
    required("function", Schema::Named("ChatToolFunction", &Schema::Object(FUNCTION)), ""),
];

const FUNCTION: &[Property] = &[
    required("name", Schema::Pattern("^[A-Za-z0-9_-]+$", 64), "Unique."),
    optional("description", Schema::AnyText, ""),
    optional("parameters", Schema::AnyObject, "JSON Schema of an object; absent: no arguments."),
    optional("strict", Schema::Boolean, "A schema that cannot be a grammar is refused."),
];

/// `tool_choice`
pub(super) const TOOL_CHOICE: Schema = Schema::AnyOf(&[
    Schema::OneOf(&["none", "auto", "required"]),
    Schema::Named("ChatNamedTool", &Schema::Object(NAMED_TOOL)),
    Schema::Named("ChatAllowedTools", &Schema::Object(ALLOWED_TOOLS)),
]);

const NAMED_TOOL: &[Property] = &[
    required("type", Schema::OneOf(&["function"]), ""),
    required("function", Schema::Object(&[required("name", Schema::AnyText, "")]), ""),
];

const ALLOWED_TOOLS: &[Property] = &[
    required("type", Schema::OneOf(&["allowed_tools"]), ""),
    required(
        "allowed_tools",
        Schema::Object(&[
            required("mode", Schema::OneOf(&["auto", "required"]), ""),
            required("tools", Schema::Array(&Schema::Object(NAMED_TOOL), 1, 128), ""),
        ]),
        "",
    ),
];

const CONTENT: Schema = Schema::AnyOf(&[Schema::AnyText, Schema::Array(&PART, 1, 2048)]);

const PART: Schema = Schema::AnyOf(&[
    Schema::Named("TextPart", &Schema::Object(TEXT_PART)),
    Schema::IfItSees(&Schema::Named("ImagePart", &Schema::Object(IMAGE_PART))),
]);

const IMAGE_PART: &[Property] = &[
    required("type", Schema::OneOf(&["image_url"]), ""),
    required("image_url", Schema::Object(IMAGE_URL), ""),
    optional("text", Schema::AnyText, "No effect."),
    optional("input_audio", Schema::Absent, ""),
    optional("file", Schema::Absent, ""),
];

const IMAGE_URL: &[Property] = &[
    required(
        "url",
        Schema::AnyText,
        "A data URI (`data:image/png;base64,...`), or an allowed `http(s)` URL.",
    ),
    optional("detail", IMAGE_DETAIL, "How closely to look."),
];

/// `detail` of an image
pub(super) const IMAGE_DETAIL: Schema = Schema::OneOf(&["auto", "low", "high", "original"]);

const TEXT_PART: &[Property] = &[
    required("type", Schema::OneOf(&["text"]), ""),
    required("text", Schema::AnyText, ""),
    optional("image_url", Schema::Absent, ""),
    optional("input_audio", Schema::Absent, ""),
    optional("file", Schema::Absent, ""),
];

/// `prompt` of completions
pub(super) const PROMPTS: Schema = Schema::AnyOf(&[
    Schema::AnyText,
    Schema::Array(&Schema::AnyText, 1, 256),
    Schema::Array(&TOKEN, 1, usize::MAX),
    Schema::Array(&Schema::Array(&TOKEN, 1, usize::MAX), 1, 256),
]);

/// `input` of `/v1/embeddings`
pub(super) const INPUTS: Schema = Schema::AnyOf(&[
    Schema::Text(1, usize::MAX),
    Schema::Array(&Schema::Text(1, usize::MAX), 1, 2048),
    Schema::Array(&TOKEN, 1, usize::MAX),
    Schema::Array(&Schema::Array(&TOKEN, 1, usize::MAX), 1, 2048),
]);

/// `stop`
pub(super) const STOP: Schema =
    Schema::AnyOf(&[Schema::Text(1, 256), Schema::Array(&Schema::Text(1, 256), 0, 16)]);

/// `stream_options`
pub(super) const STREAM_OPTIONS: Schema = Schema::Object(&[
    optional("include_usage", Schema::Boolean, "A last chunk with the usage."),
    optional("continuous_usage_stats", Schema::Boolean, "Running totals in every chunk."),
    optional("include_obfuscation", Schema::Boolean, "No effect: no padding is sent."),
]);

/// `thinking`
pub(super) const THINKING: Schema = Schema::Named(
    "Thinking",
    &Schema::Object(&[
        required("type", Schema::OneOf(&["enabled", "disabled", "auto"]), ""),
        optional("budget_tokens", integer(0, u32::MAX as i64), "most thought tokens"),
    ]),
);

/// `response_format`
pub(super) const RESPONSE_FORMAT: Schema = Schema::AnyOf(&[
    Schema::Named("PlainFormat", &Schema::Object(PLAIN_FORMAT)),
    Schema::Named("JsonSchemaFormat", &Schema::Object(SCHEMA_FORMAT)),
]);

const PLAIN_FORMAT: &[Property] = &[
    required("type", Schema::OneOf(&["text", "json_object"]), ""),
    optional("json_schema", Schema::Absent, ""),
];

const SCHEMA_FORMAT: &[Property] = &[
    required("type", Schema::OneOf(&["json_schema"]), ""),
    required("json_schema", Schema::Named("NamedJsonSchema", &Schema::Object(NAMED_SCHEMA)), ""),
];

const NAMED_SCHEMA: &[Property] = &[
    required("name", Schema::Pattern("^[A-Za-z0-9_-]+$", 64), ""),
    optional("description", Schema::AnyText, ""),
    required("schema", Schema::AnyObject, "A JSON Schema."),
    optional("strict", Schema::Boolean, "No effect: every answer follows the schema."),
];

/// A JSON schema.
pub(super) const JSON_SCHEMA: Schema = Schema::AnyObject;

/// A regular expression or a grammar.
pub(super) const EXPRESSION: Schema = Schema::Text(1, usize::MAX);

/// Texts to choose from.
pub(super) const CHOICE: Schema = Schema::Array(&EXPRESSION, 1, 4096);

/// `structured_outputs`
pub(super) const STRUCTURED_OUTPUTS: Schema = Schema::AnyOf(&[
    Schema::Object(&[required("json", JSON_SCHEMA, ""), NO_REGEX, NO_CHOICE, NO_GRAMMAR, NO_OBJECT, NO_TAG]),
    Schema::Object(&[required("regex", EXPRESSION, ""), NO_JSON, NO_CHOICE, NO_GRAMMAR, NO_OBJECT, NO_TAG]),
    Schema::Object(&[required("choice", CHOICE, ""), NO_JSON, NO_REGEX, NO_GRAMMAR, NO_OBJECT, NO_TAG]),
    Schema::Object(&[required("grammar", EXPRESSION, ""), NO_JSON, NO_REGEX, NO_CHOICE, NO_OBJECT, NO_TAG]),
    Schema::Object(&[
        required("json_object", Schema::True, ""),
        NO_JSON,
        NO_REGEX,
        NO_CHOICE,
        NO_GRAMMAR,
        NO_TAG,
    ]),
]);

const NO_JSON: Property = optional("json", Schema::Absent, "");
const NO_REGEX: Property = optional("regex", Schema::Absent, "");
const NO_CHOICE: Property = optional("choice", Schema::Absent, "");
const NO_GRAMMAR: Property = optional("grammar", Schema::Absent, "");
const NO_OBJECT: Property = optional("json_object", Schema::Absent, "");
const NO_TAG: Property = optional("structural_tag", Schema::Absent, "");

/// `allowed_token_ids`
pub(super) const ALLOWED_TOKENS: Schema = Schema::Array(&TOKEN, 1, usize::MAX);

/// `truncate_prompt_tokens`
pub(super) const KEPT_TOKENS: Schema =
    Schema::AnyOf(&[integer(-1, -1), Schema::Integer(Limit::Is(1), Limit::ContextLength)]);

/// `cache_salt`
pub(super) const SALT: Schema = Schema::Text(1, 128);

/// `chat_template_kwargs`: the reserved names are refused, others are the template's.
pub(super) const TEMPLATE_VARIABLES: Schema = Schema::Object(&[
    optional("messages", Schema::Absent, ""),
    optional("tools", Schema::Absent, ""),
    optional("documents", Schema::Absent, ""),
    optional("add_generation_prompt", Schema::Absent, ""),
    optional("continue_final_message", Schema::Absent, ""),
    optional("chat_template", Schema::Absent, ""),
    optional("tokenize", Schema::Absent, ""),
    optional("bos_token", Schema::Absent, ""),
    optional("eos_token", Schema::Absent, ""),
]);

/// `locket`
pub(super) const LOCKET: Schema = Schema::Named(
    "LocketExtension",
    &Schema::Closed(&[
        optional("kv_cache", Schema::Closed(KV_CACHE), ""),
        optional("require_exact", Schema::Boolean, "Nothing is folded."),
        optional("cache_salt", SALT, "As the field `cache_salt`."),
        optional("visual", Schema::IfItSees(&Schema::Closed(VISUAL)), "Which visual tokens of images stay."),
    ]),
);

const SLOTS: Limit = Limit::MaxSlots;

const KV_CACHE: &[Property] = &[
    optional("method", Schema::CacheMethod, ""),
    optional("slots", Schema::Integer(Limit::Is(16), SLOTS), "Tokens that survive a fold."),
    optional("recall", Schema::Number(0.0, 1.0), "For `learned`: share of the slots for recall."),
    optional("sinks", Schema::Integer(Limit::Is(0), SLOTS), "First tokens that always survive."),
    optional("recent", Schema::Integer(Limit::Is(0), SLOTS), "Latest tokens that always survive."),
];

const VISUAL: &[Property] = &[
    optional("method", Schema::VisualMethod, "Who chooses the tokens that stay."),
    optional(
        "budget",
        Schema::AnyOf(&[Schema::Number(0.000_001, 1.0), integer(2, u32::MAX as i64), Schema::AnyText]),
        "Share of an image's tokens up to 1, number of them above 1, or a percentage such as `20%`.",
    ),
    optional("compat", Schema::Boolean, "The rule of the method's released code."),
    optional("newline", Schema::OneOf(&["none", "rows"]), "Which newline tokens stay."),
    optional("positions", Schema::OneOf(&["original", "compact"]), "Whether gaps stay."),
    optional("alpha", Schema::Number(0.0, 1.0), "For `hired`: share of the whole, shrunk image."),
    optional("lambda", Schema::Above(0.0, 1.0), "For `pyramid`: share that passes each boundary."),
    optional("merge", Schema::Number(0.0, 2.0), "For `must`: share of the windows that are merged."),
    optional("global_threshold", Schema::Number(0.0, 1.0), "For `must` with `compat`."),
    optional("individual_threshold", Schema::Number(0.0, 1.0), "For `must` with `compat`."),
    optional("seed", integer(0, 1 << 53), "For `random`."),
    optional("report", Schema::Boolean, "The usage says which tokens stayed."),
];
