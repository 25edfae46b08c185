//! What to do with a body that nobody read to its end, because the request was refused before.
//!
//! A server that answers and closes while the client still sends resets the connection: the client
//! may lose the answer, and one that keeps its connections may send its next request into a dead one.
//! So the rest is read and dropped, within bounds; beyond them the answer says that the connection
//! closes.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, Bytes, HttpBody as _},
    extract::Request,
    http::{HeaderValue, Version, header},
    response::Response,
};
use futures_util::{Stream, StreamExt as _};

/// Longest rest that is read and dropped.
const MAX_BYTES: u64 = 64 << 20;
/// Longest time for that.
const MAX_TIME: Duration = Duration::from_secs(2);

/// Where a body goes whose reader left early.
#[derive(Debug, Clone, Default)]
pub(crate) struct UnreadBody {
    rest: Arc<Mutex<Option<BodyDataStream>>>,
}

impl UnreadBody {
    /// Watches the body of a request.
    pub(crate) fn of(request: Request) -> (Self, Request) {
        let unread = Self::default();
        let watched = request.map(|body| {
            if body.is_end_stream() {
                return body;
            }
            let inner = Some(body.into_data_stream());
            Body::from_stream(WatchedBody { inner, unread: unread.clone() })
        });
        (unread, watched)
    }

    /// Drops what is left of the body, so that the connection can be used again, or says on the
    /// response that it will not be.
    pub(crate) async fn settle(self, version: Version, response: &mut Response) {
        let rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(rest) = rest else { return };
        let was_drained = tokio::time::timeout(MAX_TIME, drain(rest)).await.unwrap_or(false);
        if !was_drained && version <= Version::HTTP_11 {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// Whether the end was reached.
async fn drain(mut rest: BodyDataStream) -> bool {
    let mut dropped = 0u64;
    while let Some(chunk) = rest.next().await {
        let Ok(chunk) = chunk else { return false };
        dropped = dropped.saturating_add(chunk.len() as u64);
        if dropped > MAX_BYTES {
            return false;
        }
    }
    true
}

/// A body that is kept if it is dropped before its end.
struct WatchedBody {
    /// `None` after the end.
    inner: Option<BodyDataStream>,
    unread: UnreadBody,
}

impl Stream for WatchedBody {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let item = Pin::new(inner).poll_next(context);
        if matches!(item, Poll::Ready(None | Some(Err(_)))) {
            self.inner = None;
        }
        item
    }
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            *self.unread.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::stream;

    use super::*;

    /// A request of `chunks` chunks of 1 MiB, and how many were taken.
    fn request(chunks: usize) -> (Request, Arc<AtomicUsize>) {
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let body = stream::iter(0..chunks).map(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::io::Error>(Bytes::from_static(&[0; 1 << 20]))
        });
        (Request::new(Body::from_stream(body)), taken)
    }

    async fn settle(chunks: usize, read: usize) -> (usize, bool) {
        let (request, taken) = request(chunks);
        let (unread, request) = UnreadBody::of(request);
        let mut body = request.into_body().into_data_stream();
        for _ in 0..read {
            let _ = body.next().await;
        }
        drop(body);
        let mut response = Response::new(Body::empty());
        unread.settle(Version::HTTP_11, &mut response).await;
        (taken.load(Ordering::Relaxed), response.headers().contains_key(header::CONNECTION))
    }

    #[tokio::test]
    async fn the_rest_is_dropped_up_to_a_limit() {
        assert_eq!(settle(5, 0).await, (5, false));
        assert_eq!(settle(5, 2).await, (5, false));
        assert_eq!(settle(5, 6).await, (5, false));
        assert_eq!(settle(1000, 1).await, (66, true));
    }

    #[tokio::test]
    async fn a_request_without_a_body_is_left_alone() {
        let (unread, request) = UnreadBody::of(Request::new(Body::empty()));
        drop(request);
        let mut response = Response::new(Body::empty());
        unread.settle(Version::HTTP_11, &mut response).await;
        assert!(response.headers().is_empty());
    }
}
