//! How series are made and registered.

use std::collections::HashMap;

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, core::Collector,
};

/// 1, 2, 5, 10, 20, … up to `max`.
pub(super) fn one_two_five(max: usize) -> Vec<f64> {
    let bounds = (0..10).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
    bounds.take_while(|&bound| bound <= max.max(1) as f64).collect()
}

/// Makes and registers series with the same constant labels.
pub(super) struct Maker<'r> {
    registry: &'r Registry,
    labels: HashMap<String, String>,
}

pub(super) type Made<T> = Result<T, prometheus::Error>;

impl<'r> Maker<'r> {
    pub(super) fn new(registry: &'r Registry, labels: HashMap<String, String>) -> Self {
        Self { registry, labels }
    }

    pub(super) fn options(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_labels(self.labels.clone())
    }

    pub(super) fn register<T: Collector + Clone + 'static>(&self, made: Made<T>) -> Made<T> {
        let made = made?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Made<Gauge> {
        self.gauge_of(self.options(name, help))
    }

    pub(super) fn gauge_of(&self, options: Opts) -> Made<Gauge> {
        self.register(Gauge::with_opts(options))
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Made<IntCounter> {
        self.register(IntCounter::with_opts(self.options(name, help)))
    }

    pub(super) fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Made<IntCounterVec> {
        let counters = self.register(IntCounterVec::new(self.options(name, help), &[label]))?;
        values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
        Ok(counters)
    }

    pub(super) fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Made<Histogram> {
        let options = HistogramOpts { common_opts: self.options(name, help), buckets: bounds.to_vec() };
        self.register(Histogram::with_opts(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_token_counts_are_vllms() {
        assert_eq!(one_two_five(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(one_two_five(0), [1.0]);
    }
}
