//! Metrics of images.

use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry};

/// Upper bounds of the tower's time in seconds.
const SECONDS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Counters of images, of models that see.
#[derive(Debug, Clone)]
pub(crate) struct VisualMetrics {
    tokens: IntCounterVec,
    tower: Histogram,
    images: IntCounterVec,
    waiting: IntGauge,
    cache_bytes: IntGauge,
}

impl VisualMetrics {
    /// Registers the metrics.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            tokens: IntCounterVec::new(
                Opts::new(
                    "locket_visual_tokens_total",
                    "Visual tokens of images in prompts, before (in) and after (kept) dropping.",
                ),
                &["method", "stage"],
            )?,
            tower: Histogram::with_opts(
                HistogramOpts::new(
                    "locket_visual_tower_seconds",
                    "Time to decode an image and run it through the vision tower, without waiting.",
                )
                .buckets(SECONDS.to_vec()),
            )?,
            images: IntCounterVec::new(
                Opts::new("locket_visual_images_total", "Images by where their visual tokens came from."),
                &["result"],
            )?,
            waiting: IntGauge::new("locket_visual_waiting", "Images that wait for the vision tower.")?,
            cache_bytes: IntGauge::new("locket_visual_cache_bytes", "Bytes of visual tokens that are kept.")?,
        };
        registry.register(Box::new(metrics.tokens.clone()))?;
        registry.register(Box::new(metrics.tower.clone()))?;
        registry.register(Box::new(metrics.images.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        registry.register(Box::new(metrics.cache_bytes.clone()))?;
        Ok(metrics)
    }

    /// Counts the tokens of an image in a prompt.
    pub(crate) fn count_tokens(&self, method: &str, tokens: usize, kept: usize) {
        self.tokens.with_label_values(&[method, "in"]).inc_by(tokens as u64);
        self.tokens.with_label_values(&[method, "kept"]).inc_by(kept as u64);
    }

    /// Counts an image whose tokens were kept from an earlier request, or were not.
    pub(crate) fn count_image(&self, was_kept: bool) {
        self.images.with_label_values(&[if was_kept { "hit" } else { "miss" }]).inc();
    }

    /// Counts an image that cannot be used.
    pub(crate) fn count_refused(&self) {
        self.images.with_label_values(&["refused"]).inc();
    }

    /// The time that the tower took for one image.
    pub(crate) fn tower_took(&self, seconds: f64) {
        self.tower.observe(seconds);
    }

    /// Images that wait.
    pub(crate) fn waiting(&self) -> &IntGauge {
        &self.waiting
    }

    /// What the cache holds now.
    pub(crate) fn set_cache_bytes(&self, bytes: usize) {
        self.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented() {
        let registry = Registry::new();
        let metrics = VisualMetrics::register(&registry).expect("an empty registry");
        metrics.count_tokens("hired", 1008, 201);
        metrics.count_image(true);
        metrics.count_refused();
        metrics.tower_took(0.1);
        let families = registry.gather();
        assert_eq!(families.len(), 5);
        for family in &families {
            let entry = format!("| `{}` |", family.name());
            let page = include_str!("../../../../docs/metrics.md");
            assert!(page.contains(&entry), "{entry} is not in docs/metrics.md");
        }
    }
}
