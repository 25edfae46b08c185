//! What happens to every request on its way in and out: ids, headers, one span, one count.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::Response,
};
use locket_engine::EngineHandle;
use tracing::Instrument as _;

use crate::{
    error::ErrorKind, generation::is_request_id, keys::Key, metrics::HttpMetrics, stall::Watched,
    state::AppState, trace::RequestTrace, unread_body::UnreadBody,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
const TRACE_RESPONSE: HeaderName = HeaderName::from_static("traceresponse");
const OPENAI_VERSION: HeaderName = HeaderName::from_static("openai-version");
const LOAD_FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
const LOAD_METRICS: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// What handlers tell the outermost layer about a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    shared: Arc<ContextShared>,
}

#[derive(Debug)]
struct ContextShared {
    /// Once it is settled.
    id: OnceLock<String>,
    arrived: Instant,
    body_read: OnceLock<Instant>,
    /// If keys are asked for.
    key: OnceLock<Arc<Key>>,
    trace: RequestTrace,
}

impl RequestContext {
    fn new(trace: RequestTrace) -> Self {
        let shared = ContextShared {
            id: OnceLock::new(),
            arrived: Instant::now(),
            body_read: OnceLock::new(),
            key: OnceLock::new(),
            trace,
        };
        Self { shared: Arc::new(shared) }
    }

    /// The last body byte has arrived: processing time starts now.
    pub(crate) fn body_was_read(&self) {
        // Called once per request; a second call would change nothing.
        let _ = self.shared.body_read.set(Instant::now());
    }

    /// Settles the request's id, the client's or a new one, and tells it to the current span.
    /// Later calls change nothing, so the header wins over the body's `request_id`.
    pub(crate) fn settle_id(&self, from_client: Option<&str>) {
        self.shared.id.get_or_init(|| {
            let id = from_client.map_or_else(new_request_id, str::to_owned);
            tracing::Span::current().record("id", id.as_str());
            self.shared.trace.set_request_id(&id);
            id
        });
    }

    /// The id that the client sees.
    pub(crate) fn request_id(&self) -> &str {
        self.shared.id.get_or_init(new_request_id)
    }

    /// Says with which key the request came.
    pub(crate) fn settle_key(&self, key: Arc<Key>) {
        // Called once per request.
        let _ = self.shared.key.set(key);
    }

    /// The key of the request; `None` where none is needed.
    pub(crate) fn key(&self) -> Option<&Arc<Key>> {
        self.shared.key.get()
    }

    /// The trace that the request belongs to.
    pub(crate) fn trace(&self) -> &RequestTrace {
        &self.shared.trace
    }

    fn processing_ms(&self) -> u64 {
        let start = self.shared.body_read.get().unwrap_or(&self.shared.arrived);
        u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn new_request_id() -> String {
    format!("req_{}", uuid::Uuid::new_v4().simple())
}

/// The client's header, if it may be echoed.
fn header_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok().filter(|id| is_request_id(id))
}

/// The outermost layer: gives the request its context and span, puts the common headers on the
/// answer and counts it when it has been sent, or as 499 when the client went away before.
pub(crate) async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "other".into(), |path| path.as_str().to_owned());
    let method = method_label(request.method());
    // Probes and scrapes would be most of the spans.
    let trace = match method {
        "POST" => RequestTrace::begin(request.headers(), method, &route),
        _ => RequestTrace::default(),
    };
    let context = RequestContext::new(trace.clone());
    let load_format = request.headers().get(LOAD_FORMAT).cloned();
    let empty = tracing::field::Empty;
    let span = tracing::info_span!("request", id = empty, trace_id = empty, method, route);
    if let Some(id) = trace.id() {
        span.record("trace_id", id);
    }
    let id = header_id(request.headers());
    // The body of a POST may name it, and is not read yet.
    if id.is_some() || method != "POST" {
        span.in_scope(|| context.settle_id(id));
    }
    let mut outcome = Outcome {
        metrics: state.metrics().clone(),
        span: span.clone(),
        trace: trace.clone(),
        route,
        method,
        arrived: context.shared.arrived,
        status: None,
    };
    request.extensions_mut().insert(context.clone());

    let version = request.version();
    let (unread, request) = UnreadBody::of(request);
    let mut response = next.run(request).instrument(span.clone()).await;
    unread.settle(version, &mut response).await;
    span.in_scope(|| context.settle_id(None));
    if let Some(kind) = response.extensions().get::<ErrorKind>() {
        state.metrics().count_error(*kind);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(context.request_id()) {
        headers.insert(REQUEST_ID, id);
    }
    if let Some(response) = trace.header() {
        headers.insert(TRACE_RESPONSE, response);
    }
    headers.insert(PROCESSING_MS, HeaderValue::from(context.processing_ms()));
    headers.insert(OPENAI_VERSION, HeaderValue::from_static("2020-10-01"));
    if let Some(report) = load_format.and_then(|format| load_report(&format, state.engine())) {
        headers.insert(LOAD_METRICS, report);
    }
    let status = response.status().as_u16();
    if !is_event_stream(response.headers()) {
        outcome.status = Some(status);
        return response;
    }
    let limit = state.config().connections.stall_timeout;
    response.map(|body| Body::from_stream(Watched::new(body.into_data_stream(), status, outcome, limit)))
}

/// Methods as metric labels; what is not of HTTP itself shares one.
fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        "PATCH" => "PATCH",
        _ => "OTHER",
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

/// A load report for Envoy-style balancers, in the format that the request asks for.
fn load_report(format: &HeaderValue, engine: &EngineHandle) -> Option<HeaderValue> {
    let (usage, waiting) = (engine.cache_usage(), engine.num_waiting());
    let text = match format.to_str().ok()?.to_ascii_uppercase().as_str() {
        "TEXT" => format!(
            "TEXT named_metrics.kv_cache_usage_perc={usage}, named_metrics.num_requests_waiting={waiting}"
        ),
        "JSON" => format!(
            "JSON {{\"named_metrics\": {{\"kv_cache_usage_perc\": {usage}, \"num_requests_waiting\": {waiting}}}}}"
        ),
        _ => return None,
    };
    HeaderValue::from_str(&text).ok()
}

/// Counts one request when dropped; without a status the client has gone away.
pub(crate) struct Outcome {
    metrics: HttpMetrics,
    span: tracing::Span,
    trace: RequestTrace,
    route: String,
    method: &'static str,
    arrived: Instant,
    status: Option<u16>,
}

impl Outcome {
    /// The answer was sent to its end.
    pub(crate) fn settle(&mut self, status: u16) {
        self.status = Some(status);
    }

    /// Of a request to nowhere.
    #[cfg(test)]
    pub(crate) fn for_test(registry: &prometheus::Registry) -> Self {
        Self {
            metrics: HttpMetrics::register(registry).expect("an empty registry"),
            span: tracing::Span::none(),
            trace: RequestTrace::default(),
            route: "/".into(),
            method: "POST",
            arrived: Instant::now(),
            status: None,
        }
    }

    /// The client has stopped reading.
    pub(crate) fn has_stalled(&self) {
        self.metrics.count_stall();
        tracing::info!(parent: &self.span, "the client has stopped reading; its answer ends");
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        const CLIENT_CLOSED_REQUEST: u16 = 499;
        let status = self.status.unwrap_or(CLIENT_CLOSED_REQUEST);
        let seconds = self.arrived.elapsed().as_secs_f64();
        self.metrics.count_request(&self.route, self.method, status, seconds);
        self.trace.end(status);
        if self.method == "POST" {
            tracing::info!(parent: &self.span, status, seconds, "request ended");
        } else {
            tracing::debug!(parent: &self.span, status, seconds, "request ended");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn ids_are_echoed_only_if_they_are_safe() {
        let id_of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(value).expect("a header"));
            header_id(&headers).map(str::to_owned)
        };
        assert_eq!(id_of("abc-1").as_deref(), Some("abc-1"));
        for bad in ["", "a b", &"x".repeat(129)] {
            assert_eq!(id_of(bad), None);
        }
    }

    #[test]
    fn the_first_id_stays() {
        let context = RequestContext::new(RequestTrace::default());
        context.settle_id(Some("header"));
        context.settle_id(Some("body"));
        assert_eq!(context.request_id(), "header");
        let context = RequestContext::new(RequestTrace::default());
        context.settle_id(None);
        let made = context.request_id();
        assert!(made.starts_with("req_") && made.len() == 36, "{made}");
    }

    /// The log's lines carry the id that the client sees.
    #[test]
    fn the_span_is_told_the_id() {
        let (mut log, writer) = std::io::pipe().expect("a pipe");
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(std::sync::Mutex::new(writer));
        tracing::subscriber::with_default(subscriber.finish(), || {
            let span = tracing::info_span!("request", id = tracing::field::Empty);
            let _entered = span.enter();
            RequestContext::new(RequestTrace::default()).settle_id(Some("from-body"));
            tracing::info!("a line");
        });
        let mut text = String::new();
        log.read_to_string(&mut text).expect("UTF-8");
        assert!(text.contains("id=\"from-body\"") && text.contains("a line"), "{text}");
    }
}
