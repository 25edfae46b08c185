//! The series of memory: what sequences take, beside what a cache that keeps every token would take for
//! them.

use locket_model::kv_cache::{CachePlan, SideArrays};
use prometheus::{Gauge, GaugeVec, Histogram};

use crate::{block_pool::BlockPool, sequence::Sequence};

use super::{Made, Maker};

/// 1 MiB to 64 GiB, doubling.
fn bounds() -> Vec<f64> {
    (20..=36).map(|power| f64::from(power).exp2()).collect()
}

/// Series of the cache's bytes. Clones share them.
#[derive(Clone)]
pub(super) struct MemoryMetrics {
    cache: GaugeVec,
    full: Gauge,
    of_sequence: Histogram,
    full_of_sequence: Histogram,
    plan: CachePlan,
    /// Bytes of a token in a slot as planned, side arrays included.
    slot_bytes: u64,
    /// Bytes of a token in a cache of the same number type that keeps everything, and nothing beside.
    full_slot_bytes: u64,
}

impl MemoryMetrics {
    pub(super) fn register(make: &Maker<'_>, plan: &CachePlan) -> Made<Self> {
        let cache = make.register(GaugeVec::new(
            make.options("locket_cache_bytes", "Bytes of blocks: all, in owned blocks, filled."),
            &["state"],
        ))?;
        let slot = |side| CachePlan::slot_bytes(plan.geometry, plan.slot_type, side);
        let metrics = Self {
            cache,
            full: make.gauge(
                "locket_full_cache_bytes",
                "Bytes that a cache which keeps every token would hold for the running sequences.",
            )?,
            of_sequence: make.histogram(
                "locket_sequence_cache_bytes",
                "Bytes of the block of a sequence, when it ends.",
                &bounds(),
            )?,
            full_of_sequence: make.histogram(
                "locket_sequence_full_cache_bytes",
                "Bytes that a cache which keeps every token would hold for a sequence, when it ends.",
                &bounds(),
            )?,
            slot_bytes: slot(plan.side),
            full_slot_bytes: slot(SideArrays::default()),
            plan: plan.clone(),
        };
        metrics.set("total", plan.total_bytes() as f64);
        Ok(metrics)
    }

    fn set(&self, state: &str, bytes: f64) {
        self.cache.with_label_values(&[state]).set(bytes);
    }

    fn block_bytes(&self, capacity: u32) -> u64 {
        let CachePlan { geometry, slot_type, side, .. } = self.plan;
        CachePlan::block_bytes(geometry, slot_type, side, capacity)
    }

    /// The state between two steps: `filled` slots hold a token.
    pub(super) fn set_state(&self, running: &[Sequence], filled: u64, pool: &BlockPool) {
        let owned = pool.classes().map(|(capacity, blocks, free)| {
            self.block_bytes(capacity).saturating_mul(u64::from(blocks - free))
        });
        self.set("reserved", owned.sum::<u64>() as f64);
        self.set("used", filled.saturating_mul(self.slot_bytes) as f64);
        let tokens: u64 = running.iter().map(|sequence| u64::from(sequence.num_cached)).sum();
        self.full.set(tokens.saturating_mul(self.full_slot_bytes) as f64);
    }

    /// A sequence that owned a block has ended.
    pub(super) fn ended(&self, sequence: &Sequence) {
        let capacity = self.plan.capacity(sequence.block).unwrap_or(0);
        self.of_sequence.observe(self.block_bytes(capacity) as f64);
        let full = u64::from(sequence.num_cached).saturating_mul(self.full_slot_bytes);
        self.full_of_sequence.observe(full as f64);
    }
}
