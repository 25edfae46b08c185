//! What a connection is doing: how many requests it has under way, since when none, and whether it
//! takes what they answer.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use crate::config::ConnectionLimits;

/// Requests under way on one connection.
pub(super) struct Activity {
    /// When the connection was accepted.
    start: Instant,
    pace: Arc<watch::Sender<Pace>>,
}

#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Requests under way.
    running: u32,
    /// Those of them whose answer waits for the client to take more of it.
    offered: u32,
    /// When something has changed; waiters are told of changes of `running` only.
    since: Instant,
}

impl Pace {
    fn waits_for_client(self) -> bool {
        self.running > 0 && self.offered == self.running
    }
}

/// Why a connection must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
    /// The head of the first request did not come.
    NoRequest,
    /// No request for too long.
    Idle,
    /// Nothing of any answer was taken for too long.
    Stalled,
}

impl Activity {
    pub(super) fn new() -> Self {
        let start = Instant::now();
        Self { start, pace: Arc::new(watch::Sender::new(Pace { running: 0, offered: 0, since: start })) }
    }

    /// When the head of the first request must be here, encryption included.
    pub(super) fn first_head_deadline(&self, limits: &ConnectionLimits) -> Instant {
        self.start + limits.header_timeout
    }

    /// A request has begun: its head is here.
    pub(super) fn begin(&self) -> Busy {
        self.pace.send_modify(|pace| {
            pace.running += 1;
            pace.since = Instant::now();
        });
        Busy { pace: Arc::clone(&self.pace), is_offered: false }
    }

    /// Waits until the connection has done nothing for too long.
    pub(super) fn overdue(&self, limits: &ConnectionLimits) -> impl Future<Output = Overdue> + use<> {
        let mut changes = self.pace.subscribe();
        let first_head = self.first_head_deadline(limits);
        let (idle_timeout, stall_timeout) = (limits.idle_timeout, limits.stall_timeout);
        async move {
            if timeout_at(first_head, changes.changed()).await.is_err() {
                return Overdue::NoRequest;
            }
            loop {
                let pace = *changes.borrow_and_update();
                if pace.running == 0 {
                    if timeout(idle_timeout, changes.changed()).await.is_err() {
                        return Overdue::Idle;
                    }
                    continue;
                }
                let since = if pace.waits_for_client() { pace.since } else { Instant::now() };
                match timeout_at(since + stall_timeout, changes.changed()).await {
                    Ok(Ok(())) => {}
                    // The connection is gone, and this future with it.
                    Ok(Err(_)) => return Overdue::Idle,
                    Err(_) => {
                        let pace = *changes.borrow();
                        if pace.waits_for_client() && pace.since.elapsed() >= stall_timeout {
                            return Overdue::Stalled;
                        }
                    }
                }
            }
        }
    }
}

/// A request under way; it ends when this is dropped.
pub(super) struct Busy {
    pace: Arc<watch::Sender<Pace>>,
    is_offered: bool,
}

impl Busy {
    /// Lasts as long as the answer's body. With `is_paced` a body that is not asked for more counts as
    /// one that its client does not take: over HTTP/2, where a full window says nothing of the socket.
    pub(super) fn during(mut self, body: Body, is_paced: bool) -> BusyBody {
        if is_paced {
            self.offer(true);
        }
        BusyBody { body, busy: self, is_paced }
    }

    /// Whose turn it is now: the client's, or the server's.
    fn offer(&mut self, is_offered: bool) {
        let was_offered = std::mem::replace(&mut self.is_offered, is_offered);
        self.pace.send_if_modified(|pace| {
            pace.offered = pace.offered + u32::from(is_offered) - u32::from(was_offered);
            pace.since = Instant::now();
            false
        });
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.pace.send_modify(|pace| {
            pace.running -= 1;
            pace.offered -= u32::from(self.is_offered);
            pace.since = Instant::now();
        });
    }
}

/// A body that keeps its connection busy.
pub(super) struct BusyBody {
    body: Body,
    busy: Busy,
    is_paced: bool,
}

impl HttpBody for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let poll = Pin::new(&mut self.body).poll_frame(context);
        if self.is_paced {
            self.busy.offer(poll.is_ready());
        }
        poll
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

    use futures_util::{StreamExt as _, stream};
    use tokio::time::sleep;

    use super::*;

    fn limits() -> ConnectionLimits {
        ConnectionLimits {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(90),
            stall_timeout: Duration::from_secs(60),
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

    /// What came before the requests, such as encryption, counts.
    #[tokio::test(start_paused = true)]
    async fn the_first_head_has_one_deadline() {
        let (activity, start) = (Activity::new(), Instant::now());
        sleep(Duration::from_secs(7)).await;
        assert_eq!(activity.overdue(&limits()).await, Overdue::NoRequest);
        assert_eq!(start.elapsed().as_secs(), 10);
    }

    /// One answer that is not taken does not matter while others are, or are being made.
    #[tokio::test(start_paused = true)]
    async fn connections_that_take_nothing_are_overdue() {
        let (activity, start) = (Activity::new(), Instant::now());
        let client = async {
            let _untaken = activity.begin().during(Body::from("an answer"), true);
            let chunks = stream::iter(0..10).then(async |number: u32| {
                sleep(Duration::from_secs(1000)).await;
                Ok::<_, std::io::Error>(number.to_string())
            });
            let mut taken = activity.begin().during(Body::from_stream(chunks), true);
            for _ in 0..10 {
                let frame = std::future::poll_fn(|context| Pin::new(&mut taken).poll_frame(context)).await;
                assert!(frame.is_some_and(|frame| frame.is_ok()));
                sleep(Duration::from_secs(50)).await;
            }
            // It is kept, and not read on.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            why = activity.overdue(&limits()) => assert_eq!(why, Overdue::Stalled),
            () = client => unreachable!("it never ends"),
        }
        let seconds = start.elapsed().as_secs();
        assert!((10_510..=10_580).contains(&seconds), "{seconds}");
    }
}
