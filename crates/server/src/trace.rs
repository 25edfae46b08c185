//! Spans of requests for OpenTelemetry, in the W3C's trace context.
//!
//! A request that generates is a span, and each of its sequences has spans below it: `queue`,
//! `prefill`, `decode`, and `fold` for steps after which the cache held fewer tokens than it had seen.
//! They hold times, counts and names, never text. Where the process has no tracer
//! ([`opentelemetry::global`]) nothing is recorded; the log still names a caller's trace.

use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, HeaderValue};
use locket_engine::{FinishReason, SequenceEvent};
use opentelemetry::{
    Context, KeyValue, global,
    propagation::Extractor,
    trace::{Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _},
};

/// Who makes the spans, as backends show it.
const SCOPE: &str = "locket";
/// Spans of folds per sequence; a long answer with a small cache folds for as long as it runs.
const MAX_FOLD_SPANS: u32 = 64;

/// The trace that a request belongs to.
#[derive(Debug, Clone, Default)]
pub(crate) struct RequestTrace {
    context: Context,
}

impl RequestTrace {
    /// Begins the request's span, below the one that its header `traceparent` names.
    pub(crate) fn begin(headers: &HeaderMap, method: &'static str, route: &str) -> Self {
        let parent = global::get_text_map_propagator(|propagator| {
            propagator.extract_with_context(&Context::new(), &Headers(headers))
        });
        let tracer = global::tracer(SCOPE);
        let attributes =
            [KeyValue::new("http.request.method", method), KeyValue::new("http.route", route.to_owned())];
        let builder = tracer
            .span_builder(format!("{method} {route}"))
            .with_kind(SpanKind::Server)
            .with_attributes(attributes);
        let span = tracer.build_with_context(builder, &parent);
        Self { context: parent.with_span(span) }
    }

    /// The trace's id in hexadecimal, if the request belongs to one.
    pub(crate) fn id(&self) -> Option<String> {
        self.named().map(|context| context.trace_id().to_string())
    }

    /// The header `traceresponse`: trace, span of this request, and whether it is recorded.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let context = self.named()?;
        let flags = context.trace_flags().to_u8();
        let text = format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id());
        HeaderValue::from_str(&text).ok()
    }

    /// Tells the span under which id the client and the log know the request.
    pub(crate) fn set_request_id(&self, id: &str) {
        if self.is_recorded() {
            self.context.span().set_attribute(KeyValue::new("locket.request_id", id.to_owned()));
        }
    }

    /// Ends the request's span.
    pub(crate) fn end(&self, status: u16) {
        if !self.is_recorded() {
            return;
        }
        let span = self.context.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        if status >= 500 {
            span.set_status(Status::error(""));
        }
        span.end();
    }

    /// Follows a sequence that is submitted now; `None` where nothing is recorded.
    pub(crate) fn sequence(&self, choice: usize, prompt_tokens: usize) -> Option<SequenceTrace> {
        let now = SystemTime::now();
        self.is_recorded().then(|| SequenceTrace {
            parent: self.context.clone(),
            choice: i64::try_from(choice).unwrap_or(i64::MAX),
            prompt_tokens: i64::try_from(prompt_tokens).unwrap_or(i64::MAX),
            phase: Phase::Queued,
            since: now,
            latest: now,
            tokens: 0,
            folded_tokens: 0,
            fold_spans: 0,
            folding: None,
        })
    }

    fn is_recorded(&self) -> bool {
        self.context.span().is_recording()
    }

    fn named(&self) -> Option<SpanContext> {
        let context = self.context.span().span_context().clone();
        context.is_valid().then_some(context)
    }
}

/// What the client sends.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued,
    Decoding,
    Ended,
}

/// The spans of one sequence, made when a phase has ended. Times are those at which the answer's
/// reader saw it; the engine itself says how long the sequence was queued.
#[derive(Debug)]
pub(crate) struct SequenceTrace {
    parent: Context,
    choice: i64,
    prompt_tokens: i64,
    phase: Phase,
    /// When the phase began.
    since: SystemTime,
    /// When the latest token came.
    latest: SystemTime,
    tokens: i64,
    folded_tokens: u32,
    fold_spans: u32,
    /// Steps in a row that folded: since when, and how many tokens.
    folding: Option<(SystemTime, u32)>,
}

impl SequenceTrace {
    /// Takes what the engine said next, which has folded so many tokens by then.
    pub(crate) fn observe(&mut self, event: Option<&SequenceEvent>, folded_tokens: u32) {
        let now = SystemTime::now();
        match event {
            Some(SequenceEvent::Started { queue_time, cached_tokens }) => {
                self.start(*queue_time, *cached_tokens, folded_tokens, now);
            }
            Some(SequenceEvent::Token(_)) => {
                self.tokens += 1;
                self.fold(folded_tokens);
                self.latest = now;
            }
            Some(SequenceEvent::Finished { reason, folded_tokens }) => {
                self.fold(*folded_tokens);
                self.end(finish_name(*reason), now);
            }
            Some(SequenceEvent::Failed(failure)) => self.fail(&failure.to_string(), now),
            None => self.fail("the engine was lost", now),
            Some(SequenceEvent::PromptLogprobs(_) | SequenceEvent::Embedding(_)) => {}
        }
    }

    fn start(&mut self, queue_time: Duration, cached_tokens: u32, folded_tokens: u32, now: SystemTime) {
        let begun = self.since.checked_add(queue_time).map_or(now, |begun| begun.min(now));
        self.span("queue", self.since, begun, Vec::new(), None);
        let counts = vec![
            KeyValue::new("locket.prompt_tokens", self.prompt_tokens),
            KeyValue::new("locket.cached_tokens", i64::from(cached_tokens)),
            KeyValue::new("locket.folded_tokens", i64::from(folded_tokens)),
        ];
        self.span("prefill", begun, now, counts, None);
        (self.phase, self.since, self.latest, self.folded_tokens) =
            (Phase::Decoding, now, now, folded_tokens);
    }

    fn fold(&mut self, folded_tokens: u32) {
        let more = folded_tokens.saturating_sub(self.folded_tokens);
        self.folded_tokens = self.folded_tokens.max(folded_tokens);
        if more > 0 {
            let (since, tokens) = self.folding.unwrap_or((self.latest, 0));
            self.folding = Some((since, tokens.saturating_add(more)));
        } else {
            self.end_fold(self.latest);
        }
    }

    fn end_fold(&mut self, end: SystemTime) {
        if let Some((since, tokens)) = self.folding.take()
            && self.fold_spans < MAX_FOLD_SPANS
        {
            self.fold_spans += 1;
            let count = vec![KeyValue::new("locket.tokens", i64::from(tokens))];
            self.span("fold", since, end, count, None);
        }
    }

    fn end(&mut self, finish: &'static str, now: SystemTime) {
        self.end_fold(now);
        let counts = vec![
            KeyValue::new("locket.generated_tokens", self.tokens),
            KeyValue::new("locket.folded_tokens", i64::from(self.folded_tokens)),
            KeyValue::new("locket.finish", finish),
        ];
        self.span("decode", self.since, now, counts, None);
        self.phase = Phase::Ended;
    }

    fn fail(&mut self, why: &str, now: SystemTime) {
        let name = if self.phase == Phase::Queued { "queue" } else { "decode" };
        self.span(name, self.since, now, Vec::new(), Some(why));
        self.phase = Phase::Ended;
    }

    fn span(
        &self,
        name: &'static str,
        start: SystemTime,
        end: SystemTime,
        mut attributes: Vec<KeyValue>,
        error: Option<&str>,
    ) {
        attributes.push(KeyValue::new("locket.choice", self.choice));
        let tracer = global::tracer(SCOPE);
        let builder = tracer.span_builder(name).with_start_time(start).with_attributes(attributes);
        let mut span = tracer.build_with_context(builder, &self.parent);
        if let Some(why) = error {
            span.set_status(Status::error(why.to_owned()));
        }
        span.end_with_timestamp(end);
    }
}

/// A stop string, or a client that went away, ends a sequence before the engine does.
impl Drop for SequenceTrace {
    fn drop(&mut self) {
        let now = SystemTime::now();
        match self.phase {
            Phase::Queued => self.span("queue", self.since, now, Vec::new(), None),
            Phase::Decoding => self.end("ended by its reader", now),
            Phase::Ended => {}
        }
    }
}

fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        _ => "stop",
    }
}
