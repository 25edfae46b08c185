//! Where the engine's time comes from, so that tests run in virtual time.

use std::time::{Duration, Instant};

/// A monotonic clock; its origin means nothing.
pub(crate) trait Clock: Send + Sync {
    /// Time since the clock's origin.
    fn now(&self) -> Duration;
}

/// The machine's monotonic clock.
pub(crate) struct MonotonicClock {
    origin: Instant,
}

impl MonotonicClock {
    pub(crate) fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}
