//! Answers for what is not here.

use axum::http::{Method, Uri};

use crate::error::{ApiError, ErrorKind, clip};

/// An unknown path.
pub(crate) async fn not_found(method: Method, uri: Uri) -> ApiError {
    let message = format!("There is no route {} {}.", clip(method.as_str()), clip(uri.path()));
    ApiError::new(ErrorKind::NotFound, message)
}

/// A known path, but not with this method.
pub(crate) async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let message = format!(
        "{} is not allowed for {}; the header `allow` lists what is.",
        clip(method.as_str()),
        clip(uri.path())
    );
    ApiError::new(ErrorKind::MethodNotAllowed, message)
}

/// A route that the API has and this server has not.
pub(crate) async fn not_implemented(uri: Uri) -> ApiError {
    let message = format!("{} is not implemented by this server.", clip(uri.path()));
    ApiError::new(ErrorKind::NotImplemented, message)
}
