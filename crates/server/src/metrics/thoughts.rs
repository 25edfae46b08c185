//! Metrics of reasoning: how much is thought, and what modes come to.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

/// Upper bounds of the histogram of thoughts in tokens.
const TOKENS: [f64; 10] = [16.0, 64.0, 128.0, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_192.0, 16_384.0];

/// Counts the thoughts of a model that has any.
#[derive(Debug, Clone)]
pub(super) struct ThoughtMetrics {
    tokens: IntCounterVec,
    exhausted: IntCounter,
    length: Histogram,
    modes: IntCounterVec,
}

impl ThoughtMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let tokens = IntCounterVec::new(
            Opts::new("locket_reasoning_tokens_total", "Thought tokens by the mode that was asked for."),
            &["mode"],
        )?;
        let exhausted = IntCounter::new(
            "locket_reasoning_budget_exhausted_total",
            "Thoughts that were closed because their budget was used up.",
        )?;
        let length = Histogram::with_opts(
            HistogramOpts::new("locket_reasoning_thought_tokens", "Length of thoughts in tokens.")
                .buckets(TOKENS.to_vec()),
        )?;
        let modes = IntCounterVec::new(
            Opts::new("locket_reasoning_mode_total", "Choices by mode asked for and mode that came."),
            &["requested", "chosen"],
        )?;
        registry.register(Box::new(tokens.clone()))?;
        registry.register(Box::new(exhausted.clone()))?;
        registry.register(Box::new(length.clone()))?;
        registry.register(Box::new(modes.clone()))?;
        Ok(Self { tokens, exhausted, length, modes })
    }

    pub(super) fn count(&self, requested: &str, has_thought: bool, tokens: u32, was_closed: bool) {
        self.modes.with_label_values(&[requested, if has_thought { "slow" } else { "fast" }]).inc();
        if has_thought {
            self.tokens.with_label_values(&[requested]).inc_by(u64::from(tokens));
            self.length.observe(f64::from(tokens));
        }
        if was_closed {
            self.exhausted.inc();
        }
    }
}
