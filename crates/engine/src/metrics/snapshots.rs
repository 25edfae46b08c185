//! The series of the snapshots.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec};

use super::{Made, Maker};

/// A state of some ten megabytes takes milliseconds.
const MOVE_TIME: [f64; 11] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// Series of the snapshots. Clones share them; the disk's threads have some.
#[derive(Clone)]
pub(crate) struct SnapshotMetrics {
    queries: IntCounter,
    hits: IntCounter,
    bytes: IntGaugeVec,
    count: IntGaugeVec,
    taken: IntCounterVec,
    evicted: IntCounterVec,
    refused: IntCounterVec,
    writes_dropped: IntCounter,
    move_seconds: HistogramVec,
}

impl SnapshotMetrics {
    pub(super) fn register(make: &Maker<'_>) -> Made<Self> {
        let tiers = ["ram", "disk"];
        let gauges = |name, help| {
            let gauges = make.register(IntGaugeVec::new(make.options(name, help), &["tier"]))?;
            tiers.iter().for_each(|tier| gauges.with_label_values(&[tier]).set(0));
            Made::Ok(gauges)
        };
        let move_options = HistogramOpts {
            common_opts: make.options(
                "locket_snapshot_seconds",
                "Time for which taking or putting back a state held up the engine.",
            ),
            buckets: MOVE_TIME.into(),
        };
        let move_seconds = make.register(HistogramVec::new(move_options, &["direction"]))?;
        ["export", "import"].iter().for_each(|way| drop(move_seconds.with_label_values(&[way])));
        Ok(Self {
            queries: make
                .counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")?,
            hits: make.counter("vllm:prefix_cache_hits_total", "Prompt tokens whose prefill was skipped.")?,
            bytes: gauges("locket_snapshot_bytes", "Bytes of snapshots, by where they are.")?,
            count: gauges("locket_snapshots", "Snapshots, by where they are.")?,
            taken: make.counters(
                "locket_snapshots_taken_total",
                "Snapshots taken, by the place in the conversation.",
                "at",
                &["border", "prompt_end", "turn_end"],
            )?,
            evicted: make.counters(
                "locket_snapshots_evicted_total",
                "Snapshots that had to leave, by where they were.",
                "tier",
                &tiers,
            )?,
            refused: make.counters(
                "locket_snapshots_refused_total",
                "Snapshots not kept or not used, by reason.",
                "reason",
                &[
                    "too_large",
                    "no_room",
                    "export_failed",
                    "import_failed",
                    "write_failed",
                    "read_failed",
                    "corrupt",
                    "foreign",
                    "slow",
                ],
            )?,
            writes_dropped: make.counter(
                "locket_snapshot_writes_dropped_total",
                "Snapshots that were not written because the writer was busy.",
            )?,
            move_seconds,
        })
    }

    /// A prompt was looked up, and so many of its tokens were there.
    pub(crate) fn looked_up(&self, prompt_tokens: usize, cached_tokens: u32) {
        self.queries.inc_by(prompt_tokens as u64);
        self.hits.inc_by(u64::from(cached_tokens));
    }

    /// RAM holds so much.
    pub(crate) fn set_ram(&self, bytes: u64, count: usize) {
        self.set("ram", bytes, count);
    }

    /// The disk holds so much.
    pub(crate) fn set_disk(&self, bytes: u64, count: usize) {
        self.set("disk", bytes, count);
    }

    fn set(&self, tier: &str, bytes: u64, count: usize) {
        self.bytes.with_label_values(&[tier]).set(bytes as i64);
        self.count.with_label_values(&[tier]).set(count as i64);
    }

    /// A state was kept.
    pub(crate) fn taken(&self, at: &str) {
        self.taken.with_label_values(&[at]).inc();
    }

    /// So many had to leave.
    pub(crate) fn evicted(&self, tier: &str, count: u64) {
        self.evicted.with_label_values(&[tier]).inc_by(count);
    }

    /// One was not kept or not used.
    pub(crate) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// One was not written.
    pub(crate) fn write_dropped(&self) {
        self.writes_dropped.inc();
    }

    /// The engine took a state (`export`) or put one back (`import`).
    pub(crate) fn moved(&self, direction: &str, took: Duration) {
        self.move_seconds.with_label_values(&[direction]).observe(took.as_secs_f64());
    }
}
