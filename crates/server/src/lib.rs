//! The HTTP interface: OpenAI types, routes, streaming, limits.
//!
//! It stands above `locket-processor` (text to ids and back) and `locket-engine` (ids to ids) and
//! knows no tensors. Every path and every layer is in [`router`]; the contract with clients is in
//! `docs/api.md`.

#![deny(missing_docs)]

pub mod adapters;
mod blocking;
mod chat_ids;
mod choice;
pub mod config;
mod echo;
pub mod error;
mod fields;
mod generation;
mod json;
pub mod keys;
mod known_fields;
mod layers;
mod limits;
mod logprobs;
pub mod media;
mod message;
mod metrics;
mod openai;
mod openapi;
mod page;
mod prompt;
mod recent;
mod routes;
mod run;
mod schema;
pub mod serve;
mod stall;
pub mod state;
mod stream;
mod trace;
mod turns;
mod unread_body;
pub mod visual;

use std::time::Duration;

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method},
    middleware,
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use tower::Layer as _;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer, Vary},
    normalize_path::NormalizePathLayer,
};

pub use config::{CacheBounds, ConfigError, ServerConfig, ToolCallFormat};
pub use error::{ApiError, ErrorKind, ErrorRow};
pub use serve::serve;
pub use state::{AppState, SetupError};

use routes::{chat, completions, embeddings, fallback, health, models, responses, tokenize, visual_tokens};

/// All routes and layers. A trailing slash is the same route.
pub fn router(state: AppState) -> Router {
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::not_stored).delete(responses::not_stored))
        .route("/v1/responses/{id}/cancel", post(responses::not_stored))
        .route("/v1/responses/{id}/input_items", get(responses::not_stored))
        .route("/v1/load_lora_adapter", post(routes::adapters::load))
        .route("/v1/unload_lora_adapter", post(routes::adapters::unload))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/v1/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/detokenize", post(tokenize::detokenize))
        .route("/visual_tokens", post(visual_tokens::create))
        .route("/v1/visual_tokens", post(visual_tokens::create))
        .route("/health", get(health::health))
        .route("/health/live", get(health::health))
        .route("/ping", get(health::health))
        .route("/ready", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(metrics::show))
        .route("/version", get(health::version))
        .route("/openapi.json", get(openapi::show))
        .route("/docs", get(openapi::show_page))
        .route("/docs/{name}", get(openapi::asset));
    let routes = page::add(routes, state.config().page);
    let routes = NOT_IMPLEMENTED
        .iter()
        .fold(routes, |routes, path| routes.route(path, any(fallback::not_implemented)))
        .fallback(fallback::not_found)
        .method_not_allowed_fallback(fallback::method_not_allowed)
        // The last layer is the outermost one.
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(state.clone(), keys::check))
        .layer(cors(state.config()))
        .layer(middleware::from_fn_with_state(state.clone(), layers::observe))
        .with_state(state);
    Router::new().fallback_service(NormalizePathLayer::trim_trailing_slash().layer(routes))
}

/// Routes of the API that this server does not have.
const NOT_IMPLEMENTED: &[&str] = &[
    "/v1/responses/compact",
    "/v1/responses/input_tokens",
    "/v1/moderations",
    "/v1/audio/{*rest}",
    "/v1/images/{*rest}",
    "/v1/videos",
    "/v1/videos/{*rest}",
    "/v1/files",
    "/v1/files/{*rest}",
    "/v1/uploads",
    "/v1/uploads/{*rest}",
    "/v1/batches",
    "/v1/batches/{*rest}",
    "/v1/fine_tuning/{*rest}",
    "/v1/vector_stores",
    "/v1/vector_stores/{*rest}",
    "/v1/assistants",
    "/v1/assistants/{*rest}",
    "/v1/threads",
    "/v1/threads/{*rest}",
    "/v1/conversations",
    "/v1/conversations/{*rest}",
    "/v1/chat/completions/{*rest}",
    "/v1/realtime",
    "/v1/realtime/{*rest}",
    "/v1/evals",
    "/v1/evals/{*rest}",
    "/v1/containers",
    "/v1/containers/{*rest}",
];

/// Nothing without configured origins.
fn cors(config: &ServerConfig) -> CorsLayer {
    if config.cors_origins.is_empty() {
        return CorsLayer::new().vary(Vary::list([]));
    }
    let origins = if config.cors_origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(config.cors_origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    let exposed = ["x-request-id", "openai-processing-ms", "retry-after"].map(HeaderName::from_static);
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed)
        .max_age(Duration::from_secs(3600))
}

/// A handler that panicked: a bug, answered like any other.
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let detail = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message");
    ApiError::internal(detail).into_response()
}
