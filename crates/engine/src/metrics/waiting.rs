//! The series of those that wait: how many, for what, for how long.

use std::time::Duration;

use prometheus::{Gauge, GaugeVec, IntGauge};

use crate::{EngineConfig, sequence::WaitingRequest};

use super::{Made, Maker};

/// Who waits, between two steps.
pub(crate) struct Queue<'a> {
    /// Those that the engine has looked at.
    pub waiting: &'a [WaitingRequest],
    /// Sequences that wait, those included that it has not looked at.
    pub num_waiting: usize,
    /// As many run as may.
    pub is_crowded: bool,
    /// On the engine's clock.
    pub now: Duration,
}

/// Series of the queue. Clones share them.
#[derive(Clone)]
pub(super) struct WaitingMetrics {
    num_waiting: Gauge,
    by_vllms_reason: GaugeVec,
    by_reason: GaugeVec,
    depth: IntGauge,
    oldest: Gauge,
}

impl WaitingMetrics {
    pub(super) fn register(make: &Maker<'_>, config: &EngineConfig) -> Made<Self> {
        let gauges = |name, help| make.register(GaugeVec::new(make.options(name, help), &["reason"]));
        let limit = |name, help, limit: usize| {
            make.gauge(name, help).map(|gauge| gauge.set(u32::try_from(limit).unwrap_or(u32::MAX).into()))
        };
        limit("locket_max_running", "Most sequences that may run; blocks limit it too.", config.max_running)?;
        limit("locket_max_waiting", "Most sequences that may wait; more are refused.", config.max_waiting)?;
        Ok(Self {
            num_waiting: make.gauge("vllm:num_requests_waiting", "Sequences that wait for a block.")?,
            by_vllms_reason: gauges(
                "vllm:num_requests_waiting_by_reason",
                "Sequences that wait: for capacity, or deferred for a moment.",
            )?,
            by_reason: gauges("locket_waiting_sequences", "Sequences that wait, by what they wait for.")?,
            depth: make.register(IntGauge::with_opts(
                make.options("locket_queue_depth", "Sequences in the waiting queue."),
            ))?,
            oldest: make.gauge(
                "locket_queue_oldest_seconds",
                "How long the request that waits for longest has waited, at the latest step.",
            )?,
        })
    }

    pub(super) fn set(&self, queue: &Queue<'_>) {
        let sequences = |is_counted: fn(&WaitingRequest) -> bool| -> usize {
            let counted = queue.waiting.iter().filter(|waiting| is_counted(waiting));
            counted.map(|waiting| waiting.sequences.len()).sum()
        };
        let for_snapshot = sequences(|waiting| waiting.loading_until.is_some());
        let looked_at = sequences(|_| true);
        let for_capacity = looked_at - for_snapshot;
        let (for_limit, for_block) = if queue.is_crowded { (for_capacity, 0) } else { (0, for_capacity) };
        let by_reason = [
            ("block", for_block),
            ("running_limit", for_limit),
            ("snapshot", for_snapshot),
            // Just submitted; the step under way is not over yet.
            ("engine", queue.num_waiting.saturating_sub(looked_at)),
        ];
        for (reason, count) in by_reason {
            self.by_reason.with_label_values(&[reason]).set(count as f64);
        }
        let capacity = queue.num_waiting.saturating_sub(for_snapshot);
        self.by_vllms_reason.with_label_values(&["capacity"]).set(capacity as f64);
        self.by_vllms_reason.with_label_values(&["deferred"]).set(for_snapshot as f64);
        self.num_waiting.set(queue.num_waiting as f64);
        self.depth.set(queue.num_waiting as i64);
        let oldest = queue.waiting.iter().map(|waiting| waiting.arrived).min();
        let age = oldest.map_or(Duration::ZERO, |arrived| queue.now.saturating_sub(arrived));
        self.oldest.set(age.as_secs_f64());
    }
}
