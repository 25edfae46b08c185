//! The layer that asks for keys. It stands before routing answers anything, so that who has no key
//! learns nothing about what is here.

use std::sync::Arc;

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, Method, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{ApiKeys, Key};
use crate::{
    error::{ApiError, ErrorKind},
    layers::RequestContext,
    state::AppState,
};

/// Routes that never ask for a key: probes, the description of the API, and the files of the page, which
/// asks for one itself.
const OPEN: &[&str] = &[
    "/health",
    "/health/live",
    "/health/ready",
    "/ready",
    "/ping",
    "/openapi.json",
    "/docs",
    "/docs/{name}",
    "/",
    "/assets/{name}",
];

/// Lets a request through if its key is good or none is needed, and says on the answer what is left
/// of the key's budgets.
pub(crate) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let needs_key = state.keys().is_required()
        && request.method() != Method::OPTIONS
        && !is_open(&request, state.config().metrics_require_key);
    if !needs_key {
        return next.run(request).await;
    }
    let key = match authenticate(request.headers(), state.keys()) {
        Ok(key) => key,
        Err(error) => return error.into_response(),
    };
    state.metrics().count_key(&key.entry.name);
    if let Some(context) = request.extensions().get::<RequestContext>() {
        context.settle_key(Arc::clone(&key));
    }
    let mut response = next.run(request).await;
    key.limits.write_headers(response.headers_mut());
    response
}

fn is_open(request: &Request, metrics_require_key: bool) -> bool {
    let Some(path) = request.extensions().get::<MatchedPath>() else { return false };
    let path = path.as_str();
    OPEN.contains(&path) || (path == "/metrics" && !metrics_require_key)
}

/// The key of the header `Authorization: Bearer <key>`.
fn authenticate(headers: &HeaderMap, keys: &ApiKeys) -> Result<Arc<Key>, ApiError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        let message = "This server needs an API key: send the header `Authorization: Bearer <key>`.";
        return Err(ApiError::new(ErrorKind::MissingApiKey, message));
    };
    let presented = bearer(value.as_bytes()).filter(|_| values.next().is_none());
    // One message for what is malformed, unknown or expired.
    let wrong = || ApiError::new(ErrorKind::InvalidApiKey, "The API key is not valid.");
    keys.find(presented.ok_or_else(wrong)?).ok_or_else(wrong)
}

/// What follows the scheme.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, key) = value.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyDigest;

    #[test]
    fn headers() {
        let keys = ApiKeys::open(&[KeyDigest::of(b"sk-1")], None).expect("a key");
        let kind = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().expect("a header"));
            }
            authenticate(&headers, &keys).map(drop).map_err(|error| error.kind)
        };
        for good in ["Bearer sk-1", "bearer sk-1", "BEARER  sk-1 "] {
            assert_eq!(kind(&[good]), Ok(()), "{good}");
        }
        assert_eq!(kind(&[]), Err(ErrorKind::MissingApiKey));
        for wrong in ["", "Bearer", "Bearer ", "Bearer sk-2", "Basic sk-1", "sk-1", "Bearer sk-1 x"] {
            assert_eq!(kind(&[wrong]), Err(ErrorKind::InvalidApiKey), "{wrong}");
        }
        assert_eq!(kind(&["Bearer sk-1", "Bearer sk-1"]), Err(ErrorKind::InvalidApiKey));
    }
}
