//! The series of the steering.

use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge};

use super::{Made, Maker};

/// From a set that is looked up to a grammar at its limits.
const COMPUTE_TIME: [f64; 14] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05,
    0.25, 1.0,
];

/// Series of the steering. Clones share them; the workers have some.
#[derive(Clone)]
pub(crate) struct SteeringMetrics {
    compute_time: Histogram,
    waits: IntCounter,
    waiting: IntGauge,
    failures: IntCounter,
}

impl SteeringMetrics {
    pub(super) fn register(make: &Maker<'_>) -> Made<Self> {
        Ok(Self {
            compute_time: make.histogram(
                "locket_steering_seconds",
                "Time to compute which tokens may come next, beside the model.",
                &COMPUTE_TIME,
            )?,
            waits: make.counter(
                "locket_steering_waits_total",
                "Rows of logits that were there before it was known which tokens may come next.",
            )?,
            waiting: make.register(IntGauge::with_opts(
                make.options("locket_steering_waiting", "Sequences whose row of logits waits now."),
            ))?,
            failures: make.counter(
                "locket_steering_failures_total",
                "Sequences that their steering could not go on.",
            )?,
        })
    }

    /// A worker computed a guide.
    pub(crate) fn computed(&self, took: Duration) {
        self.compute_time.observe(took.as_secs_f64());
    }

    /// A row of logits was earlier than its guide.
    pub(crate) fn row_waits(&self) {
        self.waits.inc();
    }

    /// So many rows wait now.
    pub(crate) fn set_waiting(&self, count: usize) {
        self.waiting.set(count as i64);
    }

    /// A sequence ends because there is no guide for it.
    pub(crate) fn failed(&self) {
        self.failures.inc();
    }
}
