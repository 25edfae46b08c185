//! Streams whose reader does not read.
//!
//! A reader that keeps its connection open and takes nothing would hold its sequence, and the block of
//! it, for as long as it likes: nobody asks the stream for more while the connection is full. So a
//! watchdog looks after it from outside, and drops the stream when nothing was taken for too long.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{BodyDataStream, Bytes};
use futures_util::Stream;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::layers::Outcome;

/// A streamed body that knows whether it was read to its end, and ends when nobody reads it.
pub(crate) struct Watched {
    running: Arc<Mutex<Running>>,
    status: u16,
    _watchdog: AbortOnDropHandle<()>,
}

struct Running {
    /// `None` after a stall.
    stream: Option<(BodyDataStream, Outcome)>,
    /// Since when it is the reader's turn; `None` while the stream has nothing for it.
    offered: Option<Instant>,
}

impl Watched {
    /// Watches `inner`, which must be polled again within `limit` whenever it has given something.
    pub(crate) fn new(inner: BodyDataStream, status: u16, outcome: Outcome, limit: Duration) -> Self {
        let running = Running { stream: Some((inner, outcome)), offered: Some(Instant::now()) };
        let running = Arc::new(Mutex::new(running));
        let watchdog = tokio::spawn(watch(Arc::clone(&running), limit));
        Self { running, status, _watchdog: AbortOnDropHandle::new(watchdog) }
    }
}

/// The stream ends at once: the watchdog, which shares it, may end later.
impl Drop for Watched {
    fn drop(&mut self) {
        let stream = lock(&self.running).stream.take();
        drop(stream);
    }
}

/// Returns when the stream was dropped because of a stall.
async fn watch(running: Arc<Mutex<Running>>, limit: Duration) {
    loop {
        let offered = lock(&running).offered.unwrap_or_else(Instant::now);
        tokio::time::sleep_until(offered + limit).await;
        let mut running = lock(&running);
        if running.offered.is_some_and(|offered| offered.elapsed() >= limit) {
            // Dropping it ends the sequences.
            if let Some((_, outcome)) = running.stream.take() {
                outcome.has_stalled();
            }
            return;
        }
    }
}

fn lock(running: &Mutex<Running>) -> std::sync::MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream for Watched {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut running = lock(&self.running);
        let Some((stream, outcome)) = &mut running.stream else {
            return Poll::Ready(Some(Err(axum::Error::new("the client stopped reading"))));
        };
        let item = Pin::new(stream).poll_next(context);
        if let Poll::Ready(None) = item {
            outcome.settle(self.status);
        }
        running.offered = match item {
            Poll::Ready(Some(_)) => Some(Instant::now()),
            Poll::Ready(None) | Poll::Pending => None,
        };
        item
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use futures_util::{StreamExt as _, stream};
    use tokio::sync::mpsc;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// A watched stream, its source, and the registry that counts.
    fn watched() -> (Watched, mpsc::Sender<&'static str>, prometheus::Registry) {
        let (sender, receiver) = mpsc::channel(8);
        let chunks = stream::unfold(receiver, |mut receiver| async move {
            let chunk = receiver.recv().await?;
            Some((Ok::<_, std::io::Error>(chunk), receiver))
        });
        let registry = prometheus::Registry::new();
        let outcome = Outcome::for_test(&registry);
        let body = Body::from_stream(chunks).into_data_stream();
        (Watched::new(body, 200, outcome, LIMIT), sender, registry)
    }

    fn counted(registry: &prometheus::Registry, text: &str) -> bool {
        let all = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        all.lines().any(|line| line.contains(text))
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stops_ends_the_stream() {
        let (mut body, sender, registry) = watched();
        sender.send("a").await.expect("room");
        sender.send("b").await.expect("room");
        assert!(body.next().await.expect("a chunk").is_ok());
        // Nobody polls; the source is dropped at the limit.
        let start = Instant::now();
        sender.closed().await;
        assert!(start.elapsed() >= LIMIT && start.elapsed() < LIMIT * 2, "{:?}", start.elapsed());
        assert!(body.next().await.expect("an error").is_err());
        assert!(counted(&registry, "locket_http_stalls_total 1"));
        assert!(counted(&registry, "status=\"499\""));
    }

    /// A stream that says nothing for long is not its reader's fault.
    #[tokio::test(start_paused = true)]
    async fn silence_is_no_stall() {
        let (mut body, sender, registry) = watched();
        let source = async move {
            for _ in 0..3 {
                tokio::time::sleep(LIMIT * 5).await;
                sender.send("x").await.expect("a reader");
            }
        };
        let reader = async {
            let mut chunks = 0;
            while let Some(chunk) = body.next().await {
                chunk.expect("bytes");
                chunks += 1;
                // Slow, but not too slow.
                tokio::time::sleep(LIMIT / 2).await;
            }
            chunks
        };
        let ((), chunks) = tokio::join!(source, reader);
        assert_eq!(chunks, 3);
        drop(body);
        assert!(counted(&registry, "status=\"200\"") && counted(&registry, "locket_http_stalls_total 0"));
    }
}
