//! `GET /v1/models` and `GET /v1/models/{id}`

use axum::{
    Extension, Json,
    extract::{Path, State, rejection::PathRejection},
    response::{IntoResponse, Response},
};
use locket_vision::drop::Budget;

use crate::{
    adapters::NamedAdapter,
    config::CacheBounds,
    error::{ApiError, ErrorKind, clip},
    layers::RequestContext,
    openai::{CacheCard, ModelCard, ModelExtension, ModelList, VisualCard},
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
            visual: visual_card(state),
        },
    }
}

/// The model with an adapter is a model of its own, whose parent is the one without.
fn adapted_card<'a>(state: &'a AppState, adapter: &'a NamedAdapter) -> ModelCard<'a> {
    let parent = state.config().served_model_names.first().map(String::as_str);
    ModelCard { root: &adapter.root, parent, ..card(state, &adapter.name) }
}

/// What the images of requests get, if the model sees.
fn visual_card(state: &AppState) -> Option<VisualCard> {
    let (sight, visual) = (state.sight()?, &state.config().visual);
    let number = |budget: Budget| match budget {
        Budget::Fraction(share) => share,
        Budget::Count(count) => f64::from(count),
    };
    Some(VisualCard {
        method: visual.auto.method.name(),
        methods: visual.methods.iter().map(|method| method.name()).collect(),
        budget: number(visual.auto.effective_budget()),
        low_budget: number(visual.low_budget),
        high_budget: number(visual.high_budget),
        max_budget: visual.max_budget,
        max_images: state.config().images.max_images,
        max_tokens: sight.max_tokens(),
    })
}

/// All served names that the request's key may use.
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
) -> Response {
    let may_use = |name: &&String| context.key().is_none_or(|key| key.may_use(name));
    let names = state.config().served_model_names.iter().filter(may_use);
    let adapters = state.bounds().adapters.all();
    let adapted = adapters.iter().filter(|adapter| may_use(&&adapter.name));
    let cards =
        names.map(|name| card(&state, name)).chain(adapted.map(|adapter| adapted_card(&state, adapter)));
    Json(ModelList { object: "list", data: cards.collect() }).into_response()
}

/// One served name; it may contain slashes.
pub(crate) async fn show(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let not_found = |message| ApiError::field(ErrorKind::ModelNotFound, "model", message);
    let Path(id) = id.map_err(|_| not_found("The model's name is not UTF-8.".into()))?;
    if !state.bounds().serves(&id) {
        return Err(not_found(format!("The model {:?} does not exist.", clip(&id))));
    }
    if context.key().is_some_and(|key| !key.may_use(&id)) {
        return Err(ApiError::model_denied(&id));
    }
    Ok(match state.bounds().adapters.find(&id) {
        Some(adapter) => Json(adapted_card(&state, &adapter)).into_response(),
        None => Json(card(&state, &id)).into_response(),
    })
}
