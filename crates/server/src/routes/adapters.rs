//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

use std::path::{Path, PathBuf};

use axum::{
    Extension,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use locket_model::Adapter;

use crate::{
    adapters::NamedAdapter,
    blocking,
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
    generation::Bounds,
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    run::with_ignored_fields,
    state::AppState,
};

/// Longest name of an adapter, and longest path of its folder.
const MAX_NAME: usize = 512;
const MAX_PATH: usize = 4096;

/// A checked request; without a path to unload.
#[derive(Debug, Default)]
struct AdapterRequest {
    name: Option<String>,
    path: Option<String>,
}

impl AdapterRequest {
    fn read(route: Route, body: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<Self, ApiError> {
        let mut request = Self::default();
        body.entries(|name, field| {
            if route.is_to_be_read(name, &field, ignored)? {
                match name {
                    "lora_name" => request.name = Some(field.short_string(MAX_NAME)?.to_owned()),
                    "lora_path" => request.path = Some(field.short_string(MAX_PATH)?.to_owned()),
                    _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
                }
            }
            Ok(())
        })?;
        if request.name.is_none() {
            return Err(body.missing("lora_name"));
        }
        if request.path.is_none() && route == Route::LoadAdapter {
            return Err(body.missing("lora_path"));
        }
        Ok(request)
    }

    fn read_load(body: &Field<'_, '_>, _: &Bounds, ignored: &mut IgnoredFields) -> Result<Self, ApiError> {
        Self::read(Route::LoadAdapter, body, ignored)
    }

    fn read_unload(body: &Field<'_, '_>, _: &Bounds, ignored: &mut IgnoredFields) -> Result<Self, ApiError> {
        Self::read(Route::UnloadAdapter, body, ignored)
    }
}

/// `POST /v1/load_lora_adapter`
pub(crate) async fn load(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let dir = allowed_dir(&state, &context)?;
    let admitted = limits::admit(&state, &context, Route::LoadAdapter, request).await?;
    let Read { fields, ignored, permit: _permit } = admitted.read(&state, AdapterRequest::read_load).await?;
    let (name, path) = (fields.name.unwrap_or_default(), fields.path.unwrap_or_default());
    let text = format!("Success: LoRA adapter '{}' added successfully.", clip(&name));
    let loading = state.clone();
    // Files are read, and the engine is waited for.
    blocking::run(true, move || load_now(&loading, &dir, name, &path)).await??;
    Ok(with_ignored_fields(text.into_response(), &ignored))
}

/// `POST /v1/unload_lora_adapter`
pub(crate) async fn unload(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    allowed_dir(&state, &context)?;
    let admitted = limits::admit(&state, &context, Route::UnloadAdapter, request).await?;
    let Read { fields, ignored, permit: _permit } =
        admitted.read(&state, AdapterRequest::read_unload).await?;
    let name = fields.name.unwrap_or_default();
    let adapter = state.bounds().adapters.remove(&name).ok_or_else(|| {
        let message = format!("There is no adapter {:?}.", clip(&name));
        ApiError::field(ErrorKind::ModelNotFound, "lora_name", message)
    })?;
    let engine = state.engine().clone();
    blocking::run(true, move || engine.unload_adapter(adapter.id)).await?;
    let text = format!("Success: LoRA adapter '{}' removed successfully.", clip(&name));
    Ok(with_ignored_fields(text.into_response(), &ignored))
}

/// The folder that adapters come from, if callers may load some, and this one may.
fn allowed_dir(state: &AppState, context: &RequestContext) -> Result<PathBuf, ApiError> {
    let Some(dir) = &state.config().adapter_dir else {
        let message =
            "Adapters are not loaded while this server runs: the operator has set no `adapter-dir`.";
        return Err(ApiError::new(ErrorKind::NotFound, message));
    };
    if context.key().is_some_and(|key| !key.entry.models.is_empty()) {
        let message = "This API key may use some models only, and load none.";
        return Err(ApiError::new(ErrorKind::PermissionDenied, message));
    }
    Ok(dir.clone())
}

fn load_now(state: &AppState, dir: &Path, name: String, path: &str) -> Result<(), ApiError> {
    let of = |param: &str, reason: String| {
        Err(ApiError::field(ErrorKind::InvalidValue, param, format!("`{param}` {reason}.")))
    };
    let outside = || of("lora_path", "is no folder inside of the server's `adapter-dir`".into());
    let Ok(dir) = dir.canonicalize() else { return outside() };
    let Ok(folder) = dir.join(path).canonicalize() else { return outside() };
    if !folder.starts_with(&dir) || !folder.is_dir() {
        return outside();
    }
    let (adapters, most) = (&state.bounds().adapters, state.config().max_adapters);
    if state.bounds().serves(&name) {
        return of("lora_name", format!("is {:?}, which is served already; unload it first", clip(&name)));
    }
    if adapters.all().len() >= most {
        return of("lora_name", format!("would be one more than the {most} adapters that may be loaded"));
    }
    let adapter = match Adapter::open(&folder, &state.engine().facts().model) {
        Ok(adapter) => adapter,
        // Names tensors and keys, and paths only inside of the folder that the caller named.
        Err(error) => {
            tracing::info!(%error, "an adapter could not be read");
            return of(
                "lora_path",
                format!("has no adapter that fits this model: {}", clip(&error.to_string())),
            );
        }
    };
    let loaded = state.engine().load_adapter(adapter);
    let id = loaded.map_err(|error| ApiError::from_submit(&error, "lora_path"))?;
    let root = folder.file_name().map_or_else(|| name.clone(), |root| root.to_string_lossy().into_owned());
    if !adapters.add(NamedAdapter { name, root, id }) {
        // Another caller was faster.
        state.engine().unload_adapter(id);
        return of("lora_name", "is loaded already".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    #[test]
    fn schema_and_parser_agree() {
        let load = json!({"lora_name": "a", "lora_path": "b"});
        assert_agreement(Route::LoadAdapter, &load, &[], |body, bounds| {
            let body = Field::root(body);
            AdapterRequest::read_load(&body, bounds, &mut IgnoredFields::default()).map(drop)
        });
        assert_agreement(Route::UnloadAdapter, &json!({"lora_name": "a"}), &[], |body, bounds| {
            let body = Field::root(body);
            AdapterRequest::read_unload(&body, bounds, &mut IgnoredFields::default()).map(drop)
        });
    }

    #[test]
    fn what_is_missing_is_named() {
        let read = |body: serde_json::Value| {
            let body = Field::root(&body);
            AdapterRequest::read_load(&body, &test_bounds(), &mut IgnoredFields::default())
        };
        let missing = |body| read(body).expect_err("a field is missing").param;
        assert_eq!(missing(json!({"lora_path": "x"})).as_deref(), Some("lora_name"));
        assert_eq!(missing(json!({"lora_name": "x"})).as_deref(), Some("lora_path"));
    }
}
