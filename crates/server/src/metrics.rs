//! HTTP metrics. They are in the same registry as the engine's, which `GET /metrics` prints.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TEXT_FORMAT, TextEncoder};

use crate::{
    error::{ApiError, ErrorKind},
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
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        Ok(Self { requests, seconds, errors })
    }

    /// Counts one answered or abandoned request.
    pub(crate) fn count_request(&self, route: &str, method: &str, status: u16, seconds: f64) {
        self.requests.with_label_values(&[route, method, status.to_string().as_str()]).inc();
        self.seconds.with_label_values(&[route]).observe(seconds);
    }

    /// Counts one error, sent as an answer or inside a stream.
    pub(crate) fn count_error(&self, kind: ErrorKind) {
        self.errors.with_label_values(&[kind.row().label]).inc();
    }
}

/// `GET /metrics`
pub(crate) async fn show(State(state): State<AppState>) -> Result<Response, ApiError> {
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
        let families = registry.gather();
        assert_eq!(families.len(), 3);
        for family in families {
            let entry = format!("| `{}` |", family.name());
            assert!(
                include_str!("../../../docs/metrics.md").contains(&entry),
                "{entry} is not in docs/metrics.md"
            );
        }
    }
}
