//! Engine events to server-sent events.
//!
//! Dropping the response drops the choices, which ends their sequences within one engine step.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderName, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt as _, stream};
use locket_engine::PromptLogprobs;
use serde::Serialize;

use crate::{
    choice::{ChoiceEvent, ChoiceEvents, Delta, Finish},
    error::ApiError,
    generation::{CacheChoice, StreamOptions},
    keys::TokenReservation,
    limits::Permit,
    metrics::HttpMetrics,
    openai::{LocketUsage, Usage},
    visual::{PromptImages, VisualReports},
};

/// Bytes of events that are ready to be sent.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Appends one named event: the lines `event: <name>` and `data: <json>`, and an empty line.
    pub(crate) fn event(&mut self, name: &str, value: &impl Serialize) {
        self.bytes.extend_from_slice(format!("event: {name}\n").as_bytes());
        self.data(value);
    }

    /// Appends one event: a line `data: <json>` and an empty line.
    pub(crate) fn data(&mut self, value: &impl Serialize) {
        self.bytes.extend_from_slice(b"data: ");
        if let Err(error) = serde_json::to_writer(&mut self.bytes, value) {
            // Wire types have string keys and finite numbers, so this is a bug; the event is
            // broken, and the client will say so.
            tracing::error!(%error, "an event could not be written");
        }
        self.bytes.extend_from_slice(b"\n\n");
    }

    fn raw(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n\n");
    }

    pub(crate) fn take(&mut self) -> Bytes {
        Bytes::from(std::mem::take(&mut self.bytes))
    }
}

/// How a route writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// Before anything else, while the request still waits.
    fn opened(&mut self, _frames: &mut Frames) {}
    /// How likely the tokens of a choice's prompt were; before its start.
    fn scored(&mut self, _index: u32, _scores: Arc<PromptLogprobs>) {}
    /// Prefill of a choice has ended.
    fn started(&mut self, index: u32, usage: Option<Usage>, frames: &mut Frames);
    /// Text of a choice.
    fn delta(&mut self, index: u32, delta: Delta, usage: Option<Usage>, frames: &mut Frames);
    /// The end of a choice.
    fn finished(&mut self, index: u32, finish: Finish, usage: Option<Usage>, frames: &mut Frames);
    /// The chunk that has only the usage; sent where `include_usage` asks for it.
    fn usage(&mut self, usage: Usage, frames: &mut Frames);
    /// After the end of all choices.
    fn ended(&mut self, _usage: Usage, frames: &mut Frames) {
        frames.raw("data: [DONE]");
    }
    /// The engine gave up; nothing follows, and the other choices end too.
    fn failed(&mut self, error: &ApiError, _usage: Usage, frames: &mut Frames) {
        frames.data(&error.body());
    }
}

/// The images of a request's prompt.
#[derive(Debug)]
struct ImageUsage {
    tokens: u64,
    kept: u64,
    reports: Option<VisualReports>,
}

/// Counts tokens over all choices of a request.
#[derive(Debug)]
pub(crate) struct UsageCounter {
    prompt_tokens: Vec<u64>,
    /// Prompts of which the engine has said something.
    has_run: Vec<bool>,
    /// Choices of the same prompt: `cached_tokens` counts once for each prompt.
    choices_per_prompt: u32,
    cached_tokens: Vec<u64>,
    completion_tokens: Vec<u64>,
    /// The most of any choice.
    folded_tokens: u64,
    cache: CacheChoice,
    images: Option<ImageUsage>,
    /// Of the key's budget; settled when the request ends, however it does.
    reservation: Option<TokenReservation>,
}

impl Drop for UsageCounter {
    fn drop(&mut self) {
        // Prompts that never left the queue cost nothing.
        let prompts = self.prompt_tokens.iter().zip(&self.has_run).filter(|(_, has_run)| **has_run);
        let used = prompts.map(|(tokens, _)| tokens).chain(&self.completion_tokens).sum::<u64>();
        if let Some(reservation) = &mut self.reservation {
            reservation.use_up(used);
        }
    }
}

impl UsageCounter {
    /// Nothing generated yet. `prompt_lengths` has one entry per prompt.
    pub(crate) fn new(prompt_lengths: &[usize], choices_per_prompt: u32, cache: CacheChoice) -> Self {
        let choices = prompt_lengths.len() * choices_per_prompt as usize;
        Self {
            prompt_tokens: prompt_lengths.iter().map(|length| *length as u64).collect(),
            has_run: vec![false; prompt_lengths.len()],
            choices_per_prompt: choices_per_prompt.max(1),
            cached_tokens: vec![0; prompt_lengths.len()],
            completion_tokens: vec![0; choices],
            folded_tokens: 0,
            cache,
            images: None,
            reservation: None,
        }
    }

    /// Tells of the images of a conversation too.
    pub(crate) fn with_images(mut self, images: &PromptImages) -> Self {
        let PromptImages { tokens, kept, reports, .. } = images;
        let usage = ImageUsage { tokens: *tokens, kept: *kept, reports: reports.clone() };
        self.images = (usage.tokens > 0).then_some(usage);
        self
    }

    /// Settles what the request holds of its key's budget when it ends.
    pub(crate) fn settling(mut self, reservation: Option<TokenReservation>) -> Self {
        self.reservation = reservation;
        self
    }

    /// Takes an event into account.
    pub(crate) fn count(&mut self, index: u32, event: &ChoiceEvent) {
        let prompt = (index / self.choices_per_prompt) as usize;
        let has_run = matches!(event, ChoiceEvent::Started { .. } | ChoiceEvent::Scored(_));
        if let Some(place) = self.has_run.get_mut(prompt).filter(|_| has_run) {
            *place = true;
        }
        let (tokens, folded_tokens) = match event {
            ChoiceEvent::Started { cached_tokens } => {
                if let Some(cached) = self.cached_tokens.get_mut(prompt) {
                    *cached = (*cached).max(u64::from(*cached_tokens));
                }
                return;
            }
            ChoiceEvent::Delta(delta) => (delta.completion_tokens, delta.folded_tokens),
            ChoiceEvent::Finished(finish) => (finish.completion_tokens, finish.folded_tokens),
            ChoiceEvent::Scored(_) | ChoiceEvent::Failed(_) => return,
        };
        self.folded_tokens = self.folded_tokens.max(u64::from(folded_tokens));
        if let Some(count) = self.completion_tokens.get_mut(index as usize) {
            *count = u64::from(tokens);
        }
    }

    /// Totals so far.
    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.prompt_tokens.iter().sum();
        let completion_tokens = self.completion_tokens.iter().sum();
        let locket = LocketUsage {
            exact: self.folded_tokens == 0,
            folded_tokens: self.folded_tokens,
            method: self.cache.method.name(),
            slots: self.cache.folds().then_some(self.cache.slots),
            visual: None,
        };
        let mut usage = Usage::new(prompt_tokens, completion_tokens, self.cached_tokens.iter().sum(), locket);
        if let Some(images) = &self.images {
            usage.prompt_tokens_details.image_tokens = images.tokens;
            usage.prompt_tokens_details.image_tokens_kept = Some(images.kept);
        }
        usage
    }

    /// Totals at the end, with what became of the images.
    pub(crate) fn final_usage(&self) -> Usage {
        let mut usage = self.usage();
        usage.locket.visual = self.images.as_ref().and_then(|images| images.reports.clone());
        usage
    }
}

/// A running stream.
struct Streaming<C> {
    choices: ChoiceEvents,
    chunks: C,
    counter: UsageCounter,
    options: StreamOptions,
    keep_alive: Duration,
    frames: Frames,
    metrics: HttpMetrics,
    has_opened: bool,
    has_ended: bool,
    _permit: Permit,
}

/// What a streamed answer needs.
pub(crate) struct StreamParts<C> {
    pub(crate) choices: ChoiceEvents,
    pub(crate) chunks: C,
    pub(crate) counter: UsageCounter,
    pub(crate) options: StreamOptions,
    /// Silence after which a comment line is sent.
    pub(crate) keep_alive: Duration,
    pub(crate) metrics: HttpMetrics,
    /// Held until the last byte is sent or the client has gone.
    pub(crate) permit: Permit,
}

/// The streamed answer.
pub(crate) fn respond<C: Chunks>(parts: StreamParts<C>) -> Response {
    let streaming = Streaming {
        choices: parts.choices,
        chunks: parts.chunks,
        counter: parts.counter,
        options: parts.options,
        keep_alive: parts.keep_alive,
        frames: Frames::default(),
        metrics: parts.metrics,
        has_opened: false,
        has_ended: false,
        _permit: parts.permit,
    };
    let bytes = stream::unfold(streaming, |mut streaming| async move {
        let bytes = streaming.next_bytes().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), streaming))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(bytes)).into_response()
}

impl<C: Chunks> Streaming<C> {
    /// The next events as bytes, or `None` after the last one. Events without bytes do not put the
    /// comment line off.
    async fn next_bytes(&mut self) -> Option<Bytes> {
        if !std::mem::replace(&mut self.has_opened, true) {
            self.chunks.opened(&mut self.frames);
            if !self.frames.bytes.is_empty() {
                return Some(self.frames.take());
            }
        }
        let deadline = tokio::time::Instant::now() + self.keep_alive;
        while !self.has_ended {
            match tokio::time::timeout_at(deadline, self.choices.next()).await {
                Err(_) => self.frames.raw(": keep-alive"),
                Ok(Some((index, event))) => self.event(index, event),
                Ok(None) => self.end(),
            }
            if !self.frames.bytes.is_empty() {
                return Some(self.frames.take());
            }
        }
        None
    }

    fn event(&mut self, index: u32, event: ChoiceEvent) {
        self.counter.count(index, &event);
        let usage = self.options.continuous_usage_stats.then(|| self.counter.usage());
        match event {
            ChoiceEvent::Scored(scores) => self.chunks.scored(index, scores),
            ChoiceEvent::Started { .. } => self.chunks.started(index, usage, &mut self.frames),
            ChoiceEvent::Delta(delta) => self.chunks.delta(index, delta, usage, &mut self.frames),
            ChoiceEvent::Finished(finish) => self.chunks.finished(index, finish, usage, &mut self.frames),
            ChoiceEvent::Failed(failure) => {
                let error = ApiError::from_failure(&failure);
                self.metrics.count_error(error.kind);
                let usage = self.counter.usage();
                self.chunks.failed(&error, usage, &mut self.frames);
                // The other choices end with the stream: no `[DONE]` follows an error.
                self.choices.clear();
                self.has_ended = true;
            }
        }
    }

    fn end(&mut self) {
        let usage = self.counter.final_usage();
        if self.options.include_usage {
            self.chunks.usage(usage.clone(), &mut self.frames);
        }
        self.chunks.ended(usage, &mut self.frames);
        self.has_ended = true;
    }
}

/// The `usage` key of a chunk that is not the usage chunk: absent, null or the running totals.
pub(crate) fn usage_key(options: StreamOptions, usage: Option<Usage>) -> Option<Option<Usage>> {
    (usage.is_some() || options.include_usage).then_some(usage)
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        sync::atomic::{AtomicBool, Ordering},
    };

    use axum::http::HeaderMap;
    use eventsource_stream::Eventsource as _;
    use futures_util::Stream;
    use locket_engine::EngineFailure;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::CacheBounds,
        keys::{KeyLimits, LimitSettings},
        limits::Permits,
        openai::FinishReason,
    };

    fn counter(prompt_lengths: &[usize], choices_per_prompt: u32) -> UsageCounter {
        let cache = CacheChoice::default_of(&CacheBounds::default());
        UsageCounter::new(prompt_lengths, choices_per_prompt, cache)
    }

    /// A route that shows nothing.
    struct Silent;

    impl Chunks for Silent {
        fn started(&mut self, _: u32, _: Option<Usage>, _: &mut Frames) {}
        fn delta(&mut self, _: u32, _: Delta, _: Option<Usage>, _: &mut Frames) {}
        fn finished(&mut self, _: u32, _: Finish, _: Option<Usage>, _: &mut Frames) {}
        fn usage(&mut self, _: Usage, _: &mut Frames) {}
    }

    /// Tokens without text, as fast as they can come, until the comment line was seen.
    #[tokio::test]
    async fn events_without_bytes_do_not_put_the_comment_off() {
        const ENOUGH: u32 = 10_000_000;
        let was_seen = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&was_seen);
        let events = stream::unfold(0, move |count| {
            let is_over = is_over.load(Ordering::Relaxed) || count == ENOUGH;
            async move {
                tokio::task::yield_now().await;
                (!is_over).then(|| ((0, ChoiceEvent::Delta(Delta::default())), count + 1))
            }
        });
        let events: Pin<Box<dyn Stream<Item = (u32, ChoiceEvent)> + Send>> = Box::pin(events);
        let response = respond(StreamParts {
            choices: stream::select_all([events]),
            chunks: Silent,
            counter: counter(&[1], 1),
            options: StreamOptions::default(),
            keep_alive: Duration::from_millis(1),
            metrics: HttpMetrics::register(&prometheus::Registry::new()).expect("an empty registry"),
            permit: Permits::new(1).take().expect("one permit"),
        });
        let mut bytes = response.into_body().into_data_stream();
        assert_eq!(&bytes.next().await.expect("a comment").expect("bytes")[..], b": keep-alive\n\n");
        was_seen.store(true, Ordering::Relaxed);
        let mut last = Bytes::new();
        while let Some(next) = bytes.next().await {
            last = next.expect("bytes");
        }
        assert_eq!(&last[..], b"data: [DONE]\n\n");
    }

    proptest! {
        /// Any text, line breaks of all kinds included, arrives as it was sent, one event each,
        /// however the bytes are cut into packets.
        #[test]
        fn framing(texts in proptest::collection::vec("(?s).{0,30}", 1..8), cut in 1usize..40) {
            let mut frames = Frames::default();
            for text in &texts {
                frames.data(text);
            }
            frames.raw(": keep-alive");
            frames.raw("data: [DONE]");
            let bytes = frames.take();
            let packets: Vec<Result<Vec<u8>, std::io::Error>> = bytes.chunks(cut).map(|packet| Ok(packet.to_vec())).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let events: Vec<String> = runtime.block_on(
                stream::iter(packets).eventsource().map(|event| event.expect("well-formed").data).collect());
            let (last, events) = events.split_last().expect("the end");
            prop_assert_eq!(last, "[DONE]");
            let received: Vec<String> = events.iter().map(|data| serde_json::from_str(data).expect("JSON")).collect();
            prop_assert_eq!(received, texts);
        }
    }

    #[test]
    fn usage_counts_each_prompt_and_each_choice_once() {
        let mut counter = counter(&[10, 5], 2);
        for index in 0..4 {
            counter.count(index, &ChoiceEvent::Started { cached_tokens: 3 });
            counter.count(index, &ChoiceEvent::Delta(Delta { completion_tokens: 1, ..Delta::default() }));
        }
        counter.count(
            3,
            &ChoiceEvent::Finished(Finish {
                reason: FinishReason::Length,
                stop_reason: None,
                completion_tokens: 7,
                folded_tokens: 9,
            }),
        );
        let usage = counter.usage();
        let locket =
            LocketUsage { exact: false, folded_tokens: 9, method: "full", slots: None, visual: None };
        assert_eq!(usage, Usage::new(15, 10, 6, locket));
    }

    /// Of two prompts one ends in the queue, and costs nothing.
    #[test]
    fn keys_pay_for_prompts_that_ran() {
        let limits = LimitSettings { tokens_per_minute: Some(1_000_000), ..LimitSettings::default() };
        let limits = Arc::new(KeyLimits::new(limits));
        let reservation = TokenReservation::take(&limits, 900_000).expect("enough");
        let mut counter = counter(&[300_000, 500_000], 1).settling(Some(reservation));
        counter.count(0, &ChoiceEvent::Started { cached_tokens: 0 });
        counter.count(1, &ChoiceEvent::Failed(EngineFailure::QueueTimeout));
        drop(counter);
        let mut headers = HeaderMap::new();
        limits.write_headers(&mut headers);
        let left = headers["x-ratelimit-remaining-tokens"].to_str().expect("ASCII");
        assert!(("700000".."800000").contains(&left), "{left}");
    }

    #[test]
    fn usage_key_is_absent_null_or_filled() {
        let on = StreamOptions { include_usage: true, ..StreamOptions::default() };
        assert_eq!(usage_key(StreamOptions::default(), None), None);
        assert_eq!(usage_key(on, None), Some(None));
        let usage = counter(&[1], 1).usage();
        assert_eq!(usage_key(StreamOptions::default(), Some(usage.clone())), Some(Some(usage)));
    }
}
