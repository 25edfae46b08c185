//! `GET /v1/models` and `GET /v1/models/{id}`

use axum::{
    Extension, Json,
    extract::{Path, State, rejection::PathRejection},
    response::{IntoResponse, Response},
};

use crate::{
    config::CacheBounds,
    error::{ApiError, ErrorKind, clip},
    layers::RequestContext,
    openai::{CacheCard, ModelCard, ModelExtension, ModelList},
    state::AppState,
};

fn card<'a>(state: &'a AppState, name: &'a str) -> ModelCard<'a> {
    let config = state.config();
    let cache = &config.cache;
    let slots = cache.default_slots(cache.method);
    ModelCard {
        id: name,
        object: "model",
        created: state.created(),
        owned_by: "locket",
        root: &config.model_root,
        parent: None,
        max_model_len: config.max_model_len,
        locket: ModelExtension {
            kv_cache: CacheCard {
                method: cache.method.name(),
                methods: cache.allowed.iter().map(|method| method.name()).collect(),
                slots,
                ring: cache.ring(slots),
                min_slots: CacheBounds::MIN_SLOTS,
                max_slots: cache.max_slots,
            },
            require_exact: cache.require_exact,
        },
    }
}

/// All served names that the request's key may use.
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
) -> Response {
    let may_use = |name: &&String| context.key().is_none_or(|key| key.may_use(name));
    let names = state.config().served_model_names.iter().filter(may_use);
    let data = names.map(|name| card(&state, name)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

/// One served name; it may contain slashes.
pub(crate) async fn show(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let not_found = |message| ApiError::field(ErrorKind::ModelNotFound, "model", message);
    let Path(id) = id.map_err(|_| not_found("The model's name is not UTF-8.".into()))?;
    let names = &state.config().served_model_names;
    let name = names
        .iter()
        .find(|name| **name == id)
        .ok_or_else(|| not_found(format!("The model {:?} does not exist.", clip(&id))))?;
    if context.key().is_some_and(|key| !key.may_use(name)) {
        return Err(ApiError::model_denied(name));
    }
    Ok(Json(card(&state, name)).into_response())
}
