//! Work that may take long, off the async threads.

use crate::error::ApiError;

/// Runs `work` here, or on a blocking thread if its input `is_long`.
///
/// # Errors
/// An internal one if `work` panics there.
pub(crate) async fn run<T: Send + 'static>(
    is_long: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if !is_long {
        return Ok(work());
    }
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .map_err(|error| ApiError::internal(&error.to_string()))
}
