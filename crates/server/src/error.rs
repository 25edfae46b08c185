//! Every failure that a client can see: one table from kind to status, type, code and metric label.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use locket_engine::{EngineFailure, SubmitError};
use serde::Serialize;

/// What went wrong, as far as a client can react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The body is not JSON.
    InvalidJson,
    /// A field has the wrong JSON type.
    InvalidType,
    /// A required field is absent.
    MissingRequiredParameter,
    /// An integer is too small.
    IntegerBelowMinValue,
    /// An integer is too large.
    IntegerAboveMaxValue,
    /// A number is too small.
    DecimalBelowMinValue,
    /// A number is too large.
    DecimalAboveMaxValue,
    /// An array (or object) has too many entries.
    ArrayAboveMaxLength,
    /// A string is too long.
    StringAboveMaxLength,
    /// An array must have at least one entry.
    EmptyArray,
    /// A string must not be empty.
    EmptyString,
    /// Not one of the allowed values, or fields that contradict each other.
    InvalidValue,
    /// A field of the API that is not offered here.
    UnsupportedParameter,
    /// A value of the API that is not offered here.
    UnsupportedValue,
    /// Prompt and answer do not fit into the context.
    ContextLengthExceeded,
    /// An exact answer was asked for, but the prompt does not fit without folding.
    ExactLengthExceeded,
    /// An image reference that is neither a data URI nor a URL that may be fetched.
    InvalidImageUrl,
    /// The data of a data URI is not base64.
    InvalidBase64,
    /// An image could not be fetched from where its URL points.
    FailedToDownloadImage,
    /// No API key was given, but this server wants one.
    MissingApiKey,
    /// The API key is not one of this server's, or has expired.
    InvalidApiKey,
    /// The API key is good, but not for this.
    PermissionDenied,
    /// No model of that name is served.
    ModelNotFound,
    /// No such route or object.
    NotFound,
    /// The route exists, but not for this method.
    MethodNotAllowed,
    /// The body is larger than the limit.
    RequestTooLarge,
    /// An image has more bytes or pixels than allowed.
    ImageTooLarge,
    /// The body is not JSON by its content type.
    UnsupportedMediaType,
    /// The bytes are not an image that can be read.
    ImageParseError,
    /// An image of a type that cannot be read.
    UnsupportedImageMediaType,
    /// A JSON schema that cannot constrain an answer.
    InvalidJsonSchema,
    /// A regular expression, choice or grammar that cannot constrain an answer.
    InvalidGrammar,
    /// The API key has used up one of its own limits.
    RateLimitExceeded,
    /// A bug or a device error.
    InternalError,
    /// The engine is not running: health and readiness only.
    EngineNotRunning,
    /// The route exists in the API, but not here.
    NotImplemented,
    /// Too many requests at once, the queue is full, or the wait in it was too long.
    ServerOverloaded,
    /// The server drains.
    ShuttingDown,
}

/// One line of the error table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorRow {
    /// HTTP status.
    pub status: u16,
    /// `error.type`.
    pub error_type: &'static str,
    /// `error.code`; `None` is null on the wire.
    pub code: Option<&'static str>,
    /// Label `kind` of the error counter.
    pub label: &'static str,
}

impl ErrorKind {
    /// Every kind, in the order of the documentation.
    pub const ALL: [Self; 38] = [
        Self::InvalidJson,
        Self::InvalidType,
        Self::MissingRequiredParameter,
        Self::IntegerBelowMinValue,
        Self::IntegerAboveMaxValue,
        Self::DecimalBelowMinValue,
        Self::DecimalAboveMaxValue,
        Self::ArrayAboveMaxLength,
        Self::StringAboveMaxLength,
        Self::EmptyArray,
        Self::EmptyString,
        Self::InvalidValue,
        Self::UnsupportedParameter,
        Self::UnsupportedValue,
        Self::ContextLengthExceeded,
        Self::ExactLengthExceeded,
        Self::InvalidImageUrl,
        Self::InvalidBase64,
        Self::FailedToDownloadImage,
        Self::MissingApiKey,
        Self::InvalidApiKey,
        Self::PermissionDenied,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::RequestTooLarge,
        Self::ImageTooLarge,
        Self::UnsupportedMediaType,
        Self::ImageParseError,
        Self::UnsupportedImageMediaType,
        Self::InvalidJsonSchema,
        Self::InvalidGrammar,
        Self::RateLimitExceeded,
        Self::InternalError,
        Self::EngineNotRunning,
        Self::NotImplemented,
        Self::ServerOverloaded,
        Self::ShuttingDown,
    ];

    /// The table.
    pub fn row(self) -> ErrorRow {
        let invalid = |status, code| ErrorRow {
            status,
            error_type: "invalid_request_error",
            code: Some(code),
            label: code,
        };
        let server =
            |status, code, label| ErrorRow { status, error_type: "server_error", code: Some(code), label };
        match self {
            Self::InvalidJson => invalid(400, "invalid_json"),
            Self::InvalidType => invalid(400, "invalid_type"),
            Self::MissingRequiredParameter => invalid(400, "missing_required_parameter"),
            Self::IntegerBelowMinValue => invalid(400, "integer_below_min_value"),
            Self::IntegerAboveMaxValue => invalid(400, "integer_above_max_value"),
            Self::DecimalBelowMinValue => invalid(400, "decimal_below_min_value"),
            Self::DecimalAboveMaxValue => invalid(400, "decimal_above_max_value"),
            Self::ArrayAboveMaxLength => invalid(400, "array_above_max_length"),
            Self::StringAboveMaxLength => invalid(400, "string_above_max_length"),
            Self::EmptyArray => invalid(400, "empty_array"),
            Self::EmptyString => invalid(400, "empty_string"),
            Self::InvalidValue => invalid(400, "invalid_value"),
            Self::UnsupportedParameter => invalid(400, "unsupported_parameter"),
            Self::UnsupportedValue => invalid(400, "unsupported_value"),
            Self::ContextLengthExceeded => invalid(400, "context_length_exceeded"),
            Self::ExactLengthExceeded => invalid(400, "exact_length_exceeded"),
            Self::InvalidImageUrl => invalid(400, "invalid_image_url"),
            Self::InvalidBase64 => invalid(400, "invalid_base64"),
            Self::FailedToDownloadImage => invalid(400, "failed_to_download_image"),
            Self::MissingApiKey => {
                ErrorRow { code: None, label: "missing_api_key", ..invalid(401, "invalid_api_key") }
            }
            Self::InvalidApiKey => invalid(401, "invalid_api_key"),
            Self::PermissionDenied => invalid(403, "permission_denied"),
            Self::ModelNotFound => invalid(404, "model_not_found"),
            Self::NotFound => invalid(404, "not_found"),
            Self::MethodNotAllowed => invalid(405, "method_not_allowed"),
            Self::RequestTooLarge => invalid(413, "request_too_large"),
            Self::ImageTooLarge => invalid(413, "image_too_large"),
            Self::UnsupportedMediaType => invalid(415, "unsupported_media_type"),
            Self::ImageParseError => invalid(422, "image_parse_error"),
            Self::UnsupportedImageMediaType => invalid(422, "unsupported_image_media_type"),
            Self::InvalidJsonSchema => invalid(422, "invalid_json_schema"),
            Self::InvalidGrammar => invalid(422, "invalid_grammar"),
            Self::RateLimitExceeded => {
                ErrorRow { error_type: "rate_limit_error", ..invalid(429, "rate_limit_exceeded") }
            }
            Self::InternalError => server(500, "internal_error", "internal_error"),
            Self::EngineNotRunning => server(503, "internal_error", "engine_not_running"),
            Self::NotImplemented => server(501, "not_implemented", "not_implemented"),
            Self::ServerOverloaded => server(503, "server_overloaded", "server_overloaded"),
            Self::ShuttingDown => server(503, "shutting_down", "shutting_down"),
        }
    }

    /// How long a client should wait before it asks again, if the error itself does not know better;
    /// sent with every 429 and 503.
    fn retry_after(self) -> Option<Duration> {
        match self {
            Self::ServerOverloaded | Self::RateLimitExceeded => Some(Duration::from_secs(1)),
            Self::ShuttingDown | Self::EngineNotRunning => Some(Duration::from_secs(5)),
            _ => None,
        }
    }
}

/// A failed request, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// What went wrong.
    pub kind: ErrorKind,
    /// For a human: names the field and what would be right.
    pub message: String,
    /// Path of the field, such as `messages[2].content[1].text`.
    pub param: Option<String>,
    /// The same body would fail again: clients are told not to retry by themselves.
    pub is_final: bool,
    /// How long to wait before the next try, where that is known.
    pub wait: Option<Duration>,
}

/// Official clients give up at once when they are told to wait longer.
const MAX_WAIT: Duration = Duration::from_secs(120);

impl ApiError {
    /// An error that belongs to no field.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let is_final = kind == ErrorKind::NotImplemented;
        Self { kind, message: message.into(), param: None, is_final, wait: None }
    }

    /// An error of the field `param`.
    pub fn field(kind: ErrorKind, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(kind, message) }
    }

    /// A bug: the client sees a generic message, `detail` goes to the log.
    pub fn internal(detail: &str) -> Self {
        tracing::error!(detail, "request failed");
        Self::new(ErrorKind::InternalError, "The server had an error while processing your request.")
    }

    /// The wire form, also used for error events inside a stream.
    pub(crate) fn body(&self) -> ErrorBody<'_> {
        let row = self.kind.row();
        ErrorBody {
            error: ErrorObject {
                message: &self.message,
                r#type: row.error_type,
                param: self.param.as_deref(),
                code: row.code,
            },
        }
    }

    /// Why the engine did not take a request; `param` is the field to blame if it can never fit.
    pub(crate) fn from_submit(error: &SubmitError, param: &str) -> Self {
        match error {
            SubmitError::QueueFull { limit } => Self::new(
                ErrorKind::ServerOverloaded,
                format!("The queue of {limit} waiting sequences is full. Try again later."),
            ),
            SubmitError::DoesNotFit(reason) => {
                Self::field(ErrorKind::InvalidValue, param, format!("The request can never run: {reason}."))
            }
            SubmitError::NotExact { .. } => {
                let param = "locket.require_exact";
                Self::field(
                    ErrorKind::ExactLengthExceeded,
                    param,
                    format!("The request is refused: {error}."),
                )
            }
            SubmitError::ShuttingDown => Self::shutting_down(),
            SubmitError::Dead => Self::internal("the engine is not running"),
        }
    }

    /// Why the engine ended a running sequence.
    pub(crate) fn from_failure(failure: &EngineFailure) -> Self {
        match failure {
            EngineFailure::Internal => Self::internal("the engine ended the sequence"),
            EngineFailure::NonFiniteLogits => {
                Self { is_final: true, ..Self::internal("the logits were not finite") }
            }
            EngineFailure::Unsteerable => Self::new(
                ErrorKind::InvalidGrammar,
                "The answer cannot go on: its constraint is too difficult to follow, or no token fits it \
                 beside `allowed_token_ids`, `bad_words` and `min_tokens`.",
            ),
            EngineFailure::QueueTimeout => Self::new(
                ErrorKind::ServerOverloaded,
                "The request waited longer than the queue's time limit. Try again later.",
            ),
            EngineFailure::ShuttingDown => Self::shutting_down(),
        }
    }

    /// The answer to a key that may not use a model.
    pub(crate) fn model_denied(name: &str) -> Self {
        let message = format!("This API key may not use the model {:?}.", clip(name));
        Self::field(ErrorKind::PermissionDenied, "model", message)
    }

    /// The answer to everything new while the server drains.
    pub(crate) fn shutting_down() -> Self {
        Self::new(ErrorKind::ShuttingDown, "The server is shutting down.")
    }
}

/// `{"error": {...}}`.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.kind.row().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.wait.or_else(|| self.kind.retry_after()) {
            // Rounded up: who comes a moment too early is refused again.
            let millis = wait.min(MAX_WAIT).as_micros().div_ceil(1000) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(millis.div_ceil(1000)));
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(millis));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.is_final && status.is_server_error() {
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        // The metrics layer counts errors by kind.
        response.extensions_mut().insert(self.kind);
        response
    }
}

/// At most 100 characters of `text`, for messages that quote what the client sent.
pub(crate) fn clip(text: &str) -> String {
    const MAX_CHARS: usize = 100;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each kind's answer has its documented status, all four keys, and `Retry-After` iff it is a 429 or 503.
    #[tokio::test]
    async fn every_kind_has_a_complete_answer() {
        for kind in ErrorKind::ALL {
            let row = kind.row();
            let response = ApiError::field(kind, "n", "why").into_response();
            assert_eq!(response.status().as_u16(), row.status);
            let is_to_wait = matches!(row.status, 429 | 503);
            assert_eq!(response.headers().contains_key("retry-after"), is_to_wait, "{kind:?}");
            assert_eq!(response.headers().contains_key("retry-after-ms"), is_to_wait, "{kind:?}");
            assert_eq!(response.headers().contains_key("www-authenticate"), row.status == 401, "{kind:?}");
            assert_eq!(response.headers().contains_key("x-should-retry"), row.status == 501, "{kind:?}");
            let bytes = axum::body::to_bytes(response.into_body(), 10_000).await.expect("a short body");
            let json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
            let object = json["error"].as_object().expect("an object");
            assert_eq!(object.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
            assert_eq!(object["code"].as_str(), row.code);
            assert_eq!(object["type"], row.error_type);
        }
    }

    #[test]
    fn waits_are_rounded_up_and_bounded() {
        for (wait, seconds, millis) in
            [(1, "1", "1"), (1_000_001, "2", "1001"), (900_000_000, "120", "120000")]
        {
            let wait = Some(Duration::from_micros(wait));
            let error = ApiError { wait, ..ApiError::new(ErrorKind::RateLimitExceeded, "why") };
            let response = error.into_response();
            assert_eq!(response.headers()["retry-after"], seconds);
            assert_eq!(response.headers()["retry-after-ms"], millis);
        }
    }

    #[test]
    fn labels_are_unique() {
        let labels: std::collections::HashSet<_> =
            ErrorKind::ALL.iter().map(|kind| kind.row().label).collect();
        assert_eq!(labels.len(), ErrorKind::ALL.len());
    }

    #[test]
    fn long_text_is_clipped_at_a_character() {
        assert_eq!(clip("short"), "short");
        assert_eq!(clip(&"ü".repeat(200)).chars().count(), 101);
    }
}
