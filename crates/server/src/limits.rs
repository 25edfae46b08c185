//! Admission: how many requests with a body are worked on at once, and what is refused early.

use std::sync::Arc;

use axum::extract::Request;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    blocking,
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, is_request_id},
    json,
    keys::{self, Key, KeySlot},
    known_fields::Route,
    layers::RequestContext,
    state::AppState,
};

/// Permits for concurrent requests.
pub(crate) struct Permits {
    semaphore: Arc<Semaphore>,
    limit: u32,
}

/// The right to work on one request; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _permit: OwnedSemaphorePermit,
    /// The key's own.
    of_key: KeySlot,
}

impl Permits {
    pub(crate) fn new(limit: u32) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(limit as usize)), limit }
    }

    /// Takes a permit, or refuses: waiting here would only hide the queue.
    pub(crate) fn take(&self) -> Result<Permit, ApiError> {
        let permit = Arc::clone(&self.semaphore).try_acquire_owned().map_err(|_| {
            let message = format!("The server works on {} requests already. Try again later.", self.limit);
            ApiError::new(ErrorKind::ServerOverloaded, message)
        })?;
        Ok(Permit { _permit: permit, of_key: None })
    }

    /// Permits that are out.
    pub(crate) fn num_taken(&self) -> u32 {
        // Never more than the limit, which is a u32.
        self.limit.saturating_sub(u32::try_from(self.semaphore.available_permits()).unwrap_or(u32::MAX))
    }

    /// Waits until no permit is out.
    pub(crate) async fn all_returned(&self) {
        // The semaphore is never closed, so the only outcome is that all permits were there.
        drop(self.semaphore.acquire_many(self.limit).await);
    }
}

/// An admitted request: its body as JSON and its permit.
pub(crate) struct Admitted {
    body: Value,
    /// Reading its fields may take long.
    is_long: bool,
    permit: Permit,
}

/// What was read of a body.
pub(crate) struct Read<T> {
    pub(crate) fields: T,
    pub(crate) ignored: IgnoredFields,
    pub(crate) permit: Permit,
}

impl Admitted {
    /// Reads the fields and lets go of the body, off the async threads if it is long: it may hold
    /// images, which are decoded.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) async fn read<T: Send + 'static>(
        self,
        state: &AppState,
        read: impl FnOnce(&Field<'_, '_>, &Bounds, &mut IgnoredFields) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<Read<T>, ApiError> {
        let Self { body, is_long, permit } = self;
        let state = state.clone();
        let (fields, ignored) = blocking::run(is_long, move || {
            let mut ignored = IgnoredFields::default();
            read(&Field::root(&body), state.bounds(), &mut ignored).map(|fields| (fields, ignored))
        })
        .await??;
        Ok(Read { fields, ignored, permit })
    }
}

/// Takes a permit, reads the body, parses it and settles the request's id.
///
/// # Errors
/// 503 while draining or at the limit, 429 for a limit of the key, 415, 413, 400 for what is not a
/// JSON object, 403 for a model or a place in the queue that the key may not have.
pub(crate) async fn admit(
    state: &AppState,
    context: &RequestContext,
    route: Route,
    request: Request,
) -> Result<Admitted, ApiError> {
    if state.is_draining() {
        return Err(ApiError::shutting_down());
    }
    let mut permit = state.permits().take()?;
    if let Some(key) = context.key() {
        permit.of_key = key.limits.admit().map_err(|exceeded| {
            state.metrics().count_limited(&key.entry.name, exceeded.limit);
            exceeded.into_error()
        })?;
    }
    let (head, body) = request.into_parts();
    let body_type = json::body_type(&head.headers)?;
    let config = state.config();
    let bytes = json::read_body(&head.headers, body, config.max_body_bytes, config.body_timeout).await?;
    context.body_was_read();
    let is_long = bytes.len() > json::SHORT_BYTES;
    let body = json::parse_body(bytes, body_type).await?;
    // Before anything else is checked, so that errors carry it.
    let id = body.get("request_id").and_then(Value::as_str);
    context.settle_id(id.filter(|id| route.knows("request_id") && is_request_id(id)));
    if let Some(key) = context.key() {
        check_model(state, key, &body)?;
        let priority = body.get("priority").filter(|_| route.knows("priority"));
        keys::check_priority(key, priority)?;
    }
    Ok(Admitted { body, is_long, permit })
}

/// Whether the key may use the model that the body names, or the one that is used without a name.
/// A name that is not served is left to the route, which says so.
fn check_model(state: &AppState, key: &Key, body: &Value) -> Result<(), ApiError> {
    let name = match body.get("model") {
        Some(Value::String(name)) if state.bounds().serves(name) => name,
        None | Some(Value::Null) => &state.bounds().primary_model(),
        Some(_) => return Ok(()),
    };
    if key.may_use(name) { Ok(()) } else { Err(ApiError::model_denied(name)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn permits_are_bounded_and_come_back() {
        let permits = Permits::new(2);
        let (first, second) = (permits.take().expect("one"), permits.take().expect("two"));
        assert_eq!(permits.take().expect_err("no third").kind, ErrorKind::ServerOverloaded);
        drop((first, second));
        permits.all_returned().await;
        assert!(permits.take().is_ok());
    }
}
