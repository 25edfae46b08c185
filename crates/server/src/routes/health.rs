//! `/health`, `/ready`, `/version`: for supervisors and load balancers. They never touch the device.

use axum::{Json, extract::State};
use locket_engine::EngineStatus;
use serde_json::{Value, json};

use crate::{
    error::{ApiError, ErrorKind},
    state::AppState,
};

fn engine_not_running() -> ApiError {
    ApiError::new(ErrorKind::EngineNotRunning, "The engine has stopped after a device error.")
}

/// `GET /health`: 200 while the process works, 503 when the engine is dead.
pub(crate) async fn health(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    match state.engine().status() {
        EngineStatus::Dead => Err(engine_not_running()),
        _ => Ok(Json(json!({"status": "ok"}))),
    }
}

/// `GET /ready`: 200 while new requests are taken.
pub(crate) async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    readiness(&state)?;
    Ok(Json(json!({"status": "ready"})))
}

/// Whether new requests are taken; else why not.
pub(crate) fn readiness(state: &AppState) -> Result<(), ApiError> {
    if state.engine().status() == EngineStatus::Dead {
        return Err(engine_not_running());
    }
    if state.is_draining() {
        return Err(ApiError::shutting_down());
    }
    if !state.engine().is_ready() {
        let message = "The engine's last steps have failed; it recovers if the next ones do not.";
        return Err(ApiError::new(ErrorKind::EngineNotRunning, message));
    }
    Ok(())
}

/// `GET /version`
pub(crate) async fn version(State(state): State<AppState>) -> Json<Value> {
    Json(json!({"version": state.config().version}))
}
