//! What a connection is doing: how many requests it has under way, and since when none.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{sync::watch, time::timeout};

use crate::config::ConnectionLimits;

/// Requests under way on one connection.
pub(super) struct Activity {
    running: Arc<watch::Sender<u32>>,
}

/// Why a connection must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
    /// The head of the first request did not come.
    NoRequest,
    /// No request for too long.
    Idle,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { running: Arc::new(watch::Sender::new(0)) }
    }

    /// A request has begun: its head is here.
    pub(super) fn begin(&self) -> Busy {
        self.running.send_modify(|running| *running += 1);
        Busy { running: Arc::clone(&self.running) }
    }

    /// Waits until the connection has been idle for too long.
    pub(super) fn overdue(&self, limits: &ConnectionLimits) -> impl Future<Output = Overdue> + use<> {
        let mut running = self.running.subscribe();
        let (header_timeout, idle_timeout) = (limits.header_timeout, limits.idle_timeout);
        async move {
            if timeout(header_timeout, running.changed()).await.is_err() {
                return Overdue::NoRequest;
            }
            loop {
                let is_idle = *running.borrow_and_update() == 0;
                if is_idle {
                    if timeout(idle_timeout, running.changed()).await.is_err() {
                        return Overdue::Idle;
                    }
                } else if running.changed().await.is_err() {
                    // The connection is gone, and this future with it.
                    return Overdue::Idle;
                }
            }
        }
    }
}

/// A request under way; it ends when this is dropped.
pub(super) struct Busy {
    running: Arc<watch::Sender<u32>>,
}

impl Busy {
    /// Lasts as long as the answer's body.
    pub(super) fn during(self, body: Body) -> BusyBody {
        BusyBody { body, _busy: self }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.running.send_modify(|running| *running -= 1);
    }
}

/// A body that keeps its connection busy.
pub(super) struct BusyBody {
    body: Body,
    _busy: Busy,
}

impl HttpBody for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep};

    use super::*;

    fn limits() -> ConnectionLimits {
        ConnectionLimits {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(90),
            ..ConnectionLimits::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_first_request() {
        let (activity, start) = (Activity::new(), Instant::now());
        assert_eq!(activity.overdue(&limits()).await, Overdue::NoRequest);
        assert_eq!(start.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn long_answers_are_not_idle_and_pauses_add_up_from_their_end() {
        let (activity, start) = (Activity::new(), Instant::now());
        let client = async {
            for _ in 0..3 {
                let busy = activity.begin();
                sleep(Duration::from_secs(1000)).await;
                drop(busy);
                sleep(Duration::from_secs(80)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            why = activity.overdue(&limits()) => assert_eq!(why, Overdue::Idle),
            () = client => unreachable!("it never ends"),
        }
        assert_eq!(start.elapsed().as_secs(), 3 * 1000 + 2 * 80 + 90);
    }
}
