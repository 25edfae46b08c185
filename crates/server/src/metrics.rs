//! HTTP metrics. They are in the same registry as the engine's, which `GET /metrics` prints.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TEXT_FORMAT,
    TextEncoder,
};

mod thoughts;
mod turns;

use thoughts::ThoughtMetrics;
pub(crate) use turns::TurnMetrics;

use crate::{
    error::{ApiError, ErrorKind},
    keys::Limit,
    routes::health,
    state::AppState,
};

/// Upper bounds of the request time histogram in seconds.
const SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Counters of the HTTP interface.
#[derive(Debug, Clone)]
pub(crate) struct HttpMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    errors: IntCounterVec,
    /// As the usual middleware of Python servers names them: boards made for these read it.
    grouped: IntCounterVec,
    thoughts: ThoughtMetrics,
    turns: TurnMetrics,
    ready: IntGauge,
    in_flight: IntGauge,
    stalls: IntCounter,
    connections: IntGauge,
    by_key: IntCounterVec,
    limited: IntCounterVec,
    reloads: IntCounterVec,
}

impl HttpMetrics {
    /// Registers the metrics.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(
            Opts::new(
                "locket_http_requests_total",
                "Requests by route, method and status; 499 counts clients that went away.",
            ),
            &["route", "method", "status"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "locket_http_request_seconds",
                "Time from a request's head to the end of its answer, streams included.",
            )
            .buckets(SECONDS.to_vec()),
            &["route"],
        )?;
        let errors = IntCounterVec::new(
            Opts::new("locket_http_errors_total", "Error answers and error events by kind."),
            &["kind"],
        )?;
        // Zeros, so that rates see the first of each kind.
        ErrorKind::ALL.iter().for_each(|kind| drop(errors.with_label_values(&[kind.row().label])));
        let grouped = IntCounterVec::new(
            Opts::new("http_requests_total", "Requests by route, method and hundred of the status."),
            &["handler", "method", "status"],
        )?;
        let ready = IntGauge::new("locket_ready", "1 while /ready says so: new requests are taken.")?;
        let in_flight = IntGauge::new("locket_http_in_flight", "Requests with a body that are worked on.")?;
        let stalls = IntCounter::new(
            "locket_http_stalls_total",
            "Streams that ended because their client stopped reading.",
        )?;
        let connections = IntGauge::new("locket_http_connections", "Open connections.")?;
        let by_key = IntCounterVec::new(
            Opts::new("locket_requests_by_key_total", "Requests by the name of their API key."),
            &["key"],
        )?;
        let limited = IntCounterVec::new(
            Opts::new("locket_rate_limited_total", "Requests refused by a limit of their API key."),
            &["key", "limit"],
        )?;
        let reloads = IntCounterVec::new(
            Opts::new("locket_reloads_total", "Files read again on SIGHUP."),
            &["file", "result"],
        )?;
        registry.register(Box::new(grouped.clone()))?;
        registry.register(Box::new(ready.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(stalls.clone()))?;
        registry.register(Box::new(connections.clone()))?;
        registry.register(Box::new(by_key.clone()))?;
        registry.register(Box::new(limited.clone()))?;
        registry.register(Box::new(reloads.clone()))?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        let thoughts = ThoughtMetrics::register(registry)?;
        let turns = TurnMetrics::register(registry)?;
        Ok(Self {
            requests,
            seconds,
            errors,
            grouped,
            thoughts,
            turns,
            ready,
            in_flight,
            stalls,
            connections,
            by_key,
            limited,
            reloads,
        })
    }

    /// Counts one answered or abandoned request.
    pub(crate) fn count_request(&self, route: &str, method: &str, status: u16, seconds: f64) {
        self.requests.with_label_values(&[route, method, status.to_string().as_str()]).inc();
        self.seconds.with_label_values(&[route]).observe(seconds);
        let hundred = format!("{}xx", status / 100);
        self.grouped.with_label_values(&[route, method, hundred.as_str()]).inc();
    }

    /// Those of the remembered turns.
    pub(crate) fn turns(&self) -> &TurnMetrics {
        &self.turns
    }

    /// Sets the gauges that nobody sets when they change.
    fn look(&self, state: &AppState) {
        self.ready.set(i64::from(health::readiness(state).is_ok()));
        self.in_flight.set(i64::from(state.permits().num_taken()));
        if let Some(turns) = state.turns() {
            let (count, bytes) = turns.size();
            self.turns.set(count, bytes);
        }
    }

    /// Counts a client that stopped reading.
    pub(crate) fn count_stall(&self) {
        self.stalls.inc();
    }

    /// Open connections.
    pub(crate) fn connections(&self) -> &IntGauge {
        &self.connections
    }

    /// Counts a request with a good key.
    pub(crate) fn count_key(&self, name: &str) {
        self.by_key.with_label_values(&[name]).inc();
    }

    /// Counts a request that a key's limit refused.
    pub(crate) fn count_limited(&self, name: &str, limit: Limit) {
        self.limited.with_label_values(&[name, limit.label()]).inc();
    }

    /// Forgets a key that is gone, so that names do not pile up.
    pub(crate) fn forget_key(&self, name: &str) {
        // An error says that the series never was.
        let _ = self.by_key.remove_label_values(&[name]);
        for limit in Limit::ALL {
            let _ = self.limited.remove_label_values(&[name, limit.label()]);
        }
    }

    /// Counts a file that was read again.
    pub(crate) fn count_reload(&self, file: &str, is_good: bool) {
        self.reloads.with_label_values(&[file, if is_good { "ok" } else { "failed" }]).inc();
    }

    /// Counts the thought of a choice, or that there was none.
    pub(crate) fn count_thought(&self, requested: &str, has_thought: bool, tokens: u32, was_closed: bool) {
        self.thoughts.count(requested, has_thought, tokens, was_closed);
    }

    /// Counts one error, sent as an answer or inside a stream.
    pub(crate) fn count_error(&self, kind: ErrorKind) {
        self.errors.with_label_values(&[kind.row().label]).inc();
    }
}

/// `GET /metrics`
pub(crate) async fn show(State(state): State<AppState>) -> Result<Response, ApiError> {
    state.metrics().look(&state);
    let text = TextEncoder::new()
        .encode_to_string(&state.registry().gather())
        .map_err(|error| ApiError::internal(&error.to_string()))?;
    let content_type = format!("{TEXT_FORMAT}; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented() {
        let registry = Registry::new();
        let metrics = HttpMetrics::register(&registry).expect("an empty registry");
        metrics.count_request("/health", "GET", 200, 0.1);
        metrics.count_error(ErrorKind::InvalidJson);
        metrics.count_key("ann");
        metrics.count_limited("ann", Limit::Tokens);
        metrics.count_reload("keys", true);
        metrics.count_thought("auto", true, 9, true);
        let families = registry.gather();
        assert_eq!(families.len(), 18);
        for family in &families {
            let entry = format!("| `{}` |", family.name());
            assert!(
                include_str!("../../../docs/metrics.md").contains(&entry),
                "{entry} is not in docs/metrics.md"
            );
        }
        metrics.forget_key("ann");
        let left = registry.gather();
        assert!(
            left.iter().all(|family| !family.name().contains("by_key") && !family.name().contains("limited"))
        );
    }
}
