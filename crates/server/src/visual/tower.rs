//! Threads of their own for images, so that neither the event loop nor the engine waits for one.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
};

use prometheus::IntGauge;
use tokio::sync::oneshot;

use crate::error::{ApiError, ErrorKind};

/// One image is decoded while another is in the tower, which takes one at a time. So many decoded
/// images are in memory at most.
const WORKERS: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// The threads. They end when the last handle is dropped, after what they do.
pub(crate) struct TowerThreads {
    jobs: SyncSender<Job>,
    max_waiting: usize,
    waiting: IntGauge,
}

impl TowerThreads {
    /// Starts the threads; at most `max_waiting` jobs wait for one.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub(crate) fn start(max_waiting: usize, waiting: IntGauge) -> io::Result<Self> {
        let (jobs, queue) = sync_channel::<Job>(max_waiting);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..WORKERS {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("locket-tower".into()).spawn(move || work(&queue))?;
        }
        Ok(Self { jobs, max_waiting, waiting })
    }

    /// Runs `work` on one of the threads. If this future is dropped while it waits, it is not run.
    ///
    /// # Errors
    /// 503 if too many wait; an internal one if `work` panics.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let (sender, receiver) = oneshot::channel();
        let waiting = Waiting::new(self.waiting.clone());
        let span = tracing::Span::current();
        let job: Job = Box::new(move || {
            drop(waiting);
            if !sender.is_closed() {
                // Nobody listens any more if this fails.
                let _ = sender.send(span.in_scope(work));
            }
        });
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => ApiError::new(
                ErrorKind::ServerOverloaded,
                format!("{} images wait to be seen already. Try again later.", self.max_waiting),
            ),
            TrySendError::Disconnected(_) => ApiError::internal("the threads for images have ended"),
        })?;
        receiver.await.map_err(|_| ApiError::internal("an image was given up"))
    }
}

/// Counts a job from when it is sent to when it begins or is thrown away.
struct Waiting(IntGauge);

impl Waiting {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Takes jobs until there is nobody who could send one.
fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // A job that panics fails its request; its sender is dropped, so the request hears of it.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
            tracing::error!("an image made its thread panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn threads(max_waiting: usize) -> (TowerThreads, IntGauge) {
        let gauge = IntGauge::new("waiting", "x").expect("a gauge");
        (TowerThreads::start(max_waiting, gauge.clone()).expect("threads"), gauge)
    }

    #[tokio::test]
    async fn jobs_are_bounded_and_panics_are_errors() {
        let (threads, gauge) = threads(2);
        assert_eq!(threads.run(|| 7).await, Ok(7));
        let panics = threads.run(|| -> u32 { std::panic::resume_unwind(Box::new(())) }).await;
        assert_eq!(panics.expect_err("a panic").kind, ErrorKind::InternalError);
        // Both threads are held, then the queue is full.
        let (began, begins) = channel();
        let holds: Vec<_> = (0..WORKERS)
            .map(|_| {
                let (release, held) = channel::<()>();
                let began = began.clone();
                (release, move || {
                    began.send(()).expect("the test listens");
                    let _ = held.recv();
                })
            })
            .collect();
        let (releases, jobs): (Vec<_>, Vec<_>) = holds.into_iter().unzip();
        let threads = &threads;
        let mut running: Vec<_> = jobs.into_iter().map(|job| Box::pin(threads.run(job))).collect();
        for job in &mut running {
            assert!(futures_util::poll!(job.as_mut()).is_pending());
            begins.recv().expect("a thread begins");
        }
        let mut given_up = Box::pin(threads.run(|| 1));
        let mut waits = Box::pin(threads.run(|| 2));
        assert!(futures_util::poll!(given_up.as_mut()).is_pending());
        assert!(futures_util::poll!(waits.as_mut()).is_pending());
        assert_eq!(gauge.get(), 2);
        assert_eq!(threads.run(|| 3).await.expect_err("full").kind, ErrorKind::ServerOverloaded);
        drop(given_up);
        drop(releases);
        for job in running {
            assert_eq!(job.await, Ok(()));
        }
        assert_eq!((waits.await, gauge.get()), (Ok(2), 0));
    }
}
