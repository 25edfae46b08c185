//! Metrics of remembered turns: how many there are, and whether answers that come back are among them.

use prometheus::{IntCounterVec, IntGauge, Opts, Registry};

/// Series of the remembered turns. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct TurnMetrics {
    count: IntGauge,
    bytes: IntGauge,
    lookups: IntCounterVec,
}

impl TurnMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let count = IntGauge::new("locket_turns", "Generated turns that are remembered as tokens.")?;
        let bytes = IntGauge::new("locket_turn_bytes", "Bytes of the remembered turns.")?;
        let lookups = IntCounterVec::new(
            Opts::new("locket_turn_lookups_total", "Answers that clients sent back, by whether known."),
            &["result"],
        )?;
        ["found", "missed"].iter().for_each(|result| drop(lookups.with_label_values(&[result])));
        registry.register(Box::new(count.clone()))?;
        registry.register(Box::new(bytes.clone()))?;
        registry.register(Box::new(lookups.clone()))?;
        Ok(Self { count, bytes, lookups })
    }

    /// An answer that came back was known or not.
    pub(crate) fn looked_up(&self, is_found: bool) {
        self.lookups.with_label_values(&[if is_found { "found" } else { "missed" }]).inc();
    }

    /// So many are remembered, in so many bytes.
    pub(super) fn set(&self, count: usize, bytes: usize) {
        self.count.set(count as i64);
        self.bytes.set(bytes as i64);
    }
}
