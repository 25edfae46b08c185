//! Every operation of the document. A test compares the list with the routes of `lib.rs`.

use super::answers::{self, Answer};
use crate::known_fields::Route;

/// A route with its method.
pub(super) struct Operation {
    pub(super) method: &'static str,
    /// The first is the usual one; all do the same.
    pub(super) paths: &'static [&'static str],
    /// `operationId` of the first path; the others have a number behind it.
    pub(super) id: &'static str,
    pub(super) tag: &'static str,
    pub(super) summary: &'static str,
    /// In Markdown.
    pub(super) about: &'static str,
    /// Whose fields the body has.
    pub(super) body: Option<Route>,
    pub(super) answer: Answer,
    /// Statuses of its errors.
    pub(super) errors: &'static [u16],
    /// Never asks for a key.
    pub(super) is_open: bool,
}

const OPENAI: &str = "OpenAI API";
const TOKENS: &str = "Tokens";
const OPERATION: &str = "Operation";

/// Whatever a body may be refused for.
const OF_BODIES: &[u16] = &[400, 401, 403, 404, 413, 415, 422, 429, 500, 503];
const GUARDED: &[u16] = &[401, 403, 429, 500, 503];

const POST: Operation = Operation {
    method: "post",
    paths: &[],
    id: "",
    tag: OPENAI,
    summary: "",
    about: "",
    body: None,
    answer: answers::TEXT,
    errors: OF_BODIES,
    is_open: false,
};

const GET: Operation = Operation { method: "get", errors: GUARDED, ..POST };

const PROBE: Operation = Operation { tag: OPERATION, errors: &[500, 503], is_open: true, ..GET };

/// All of them, in the order of the document.
pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        paths: &["/v1/chat/completions"],
        id: "createChatCompletion",
        summary: "Answers a conversation",
        about: "With `stream: true` the answer is a stream of server-sent events: one `data:` line per chunk, \
                then `data: [DONE]`.",
        body: Some(Route::Chat),
        answer: answers::CHAT,
        ..POST
    },
    Operation {
        paths: &["/v1/completions"],
        id: "createCompletion",
        summary: "Continues texts",
        about: "With `stream: true` the answer is a stream of server-sent events: one `data:` line per chunk, \
                then `data: [DONE]`.",
        body: Some(Route::Completions),
        answer: answers::COMPLETION,
        ..POST
    },
    Operation {
        paths: &["/v1/responses"],
        id: "createResponse",
        summary: "Answers a conversation of items",
        about: "Nothing is stored. With `stream: true` the answer is a stream of server-sent events with names and \
                numbers; the last one has the whole response.",
        body: Some(Route::Responses),
        answer: answers::RESPONSE,
        ..POST
    },
    Operation {
        paths: &["/v1/embeddings"],
        id: "createEmbedding",
        summary: "Texts to vectors",
        about: "The hidden state of the last token, or the mean of all, as the operator chose; of length 1.",
        body: Some(Route::Embeddings),
        answer: answers::EMBEDDINGS,
        ..POST
    },
    Operation {
        paths: &["/v1/models"],
        id: "listModels",
        summary: "The served names",
        about: "`locket` has the defaults and limits of the request field of that name.",
        answer: answers::MODELS,
        ..GET
    },
    Operation {
        paths: &["/v1/models/{id}"],
        id: "retrieveModel",
        summary: "One served name",
        about: "The id may contain `/`.",
        answer: answers::MODEL,
        errors: &[401, 403, 404, 429, 500, 503],
        ..GET
    },
    Operation {
        paths: &["/tokenize", "/v1/tokenize"],
        id: "tokenize",
        tag: TOKENS,
        summary: "Text or messages to token ids",
        about: "Exactly the tokens that generation sees.",
        body: Some(Route::Tokenize),
        answer: answers::TOKENS,
        ..POST
    },
    Operation {
        paths: &["/detokenize", "/v1/detokenize"],
        id: "detokenize",
        tag: TOKENS,
        summary: "Token ids to text",
        body: Some(Route::Detokenize),
        answer: answers::DETOKENIZED,
        ..POST
    },
    Operation {
        paths: &["/v1/load_lora_adapter"],
        id: "loadAdapter",
        tag: OPERATION,
        summary: "Load a LoRA adapter",
        about: "404 unless the operator has set `adapter-dir`.",
        body: Some(Route::LoadAdapter),
        answer: answers::DONE,
        ..POST
    },
    Operation {
        paths: &["/v1/unload_lora_adapter"],
        id: "unloadAdapter",
        tag: OPERATION,
        summary: "Unload a LoRA adapter",
        about: "404 unless the operator has set `adapter-dir`, or if there is no such adapter.",
        body: Some(Route::UnloadAdapter),
        answer: answers::DONE,
        ..POST
    },
    Operation {
        paths: &["/visual_tokens", "/v1/visual_tokens"],
        id: "visualTokens",
        tag: TOKENS,
        summary: "Which parts of images the decoder would see",
        about: "Images are fetched, decoded and seen; nothing is generated.",
        body: Some(Route::VisualTokens),
        answer: answers::VISUAL_TOKENS,
        ..POST
    },
    Operation {
        paths: &["/health", "/health/live", "/ping"],
        id: "health",
        summary: "Whether the process works",
        about: "503 after a device error.",
        answer: answers::HEALTH,
        ..PROBE
    },
    Operation {
        paths: &["/ready", "/health/ready"],
        id: "ready",
        summary: "Whether new requests are taken",
        answer: answers::READY,
        ..PROBE
    },
    Operation {
        paths: &["/metrics"],
        id: "metrics",
        summary: "Metrics for Prometheus",
        about: "Open without a key unless the operator guards it.",
        answer: answers::TEXT,
        errors: GUARDED,
        ..PROBE
    },
    Operation {
        paths: &["/version"],
        id: "version",
        tag: OPERATION,
        summary: "The server's version",
        answer: answers::VERSION,
        ..GET
    },
    Operation {
        paths: &["/openapi.json"],
        id: "openapi",
        summary: "This document",
        answer: answers::DOCUMENT,
        ..PROBE
    },
    Operation {
        paths: &["/docs"],
        id: "docs",
        summary: "This document as a page",
        about: "Works offline: what it loads lies beside it under `/docs/`.",
        answer: answers::PAGE,
        ..PROBE
    },
];
