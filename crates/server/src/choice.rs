//! One choice: engine events in, text and released tokens out. Streamed and unstreamed answers
//! are both made of these, so they cannot differ.

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use locket_engine::{
    EngineFailure, FinishReason as EngineFinish, PromptLogprobs, SampledToken, SequenceEvent, SequenceStream,
};
use locket_processor::{Processor, TextDelta, TextOptions, TextStream, reasoning::ThoughtCounter};

use crate::{
    generation::{GenerationFields, Thought},
    metrics::HttpMetrics,
    openai::{FinishReason, StopReason},
    trace::SequenceTrace,
    turns::TurnRecorder,
};

/// What the text side needs to know about tokens.
pub(crate) trait TokenTable: Send + Sync {
    /// The exact bytes of a token.
    fn token_bytes(&self, id: u32) -> &[u8];
    /// Whether the token is a control token.
    fn is_special(&self, id: u32) -> bool;
}

impl TokenTable for Processor {
    fn token_bytes(&self, id: u32) -> &[u8] {
        Processor::token_bytes(self, id)
    }

    fn is_special(&self, id: u32) -> bool {
        Processor::is_special(self, id)
    }
}

/// What a client gets to know of one choice, in this order: `Scored` if the prompt was, `Started`, any
/// number of `Delta`, then one `Finished` or `Failed`.
#[derive(Debug, PartialEq)]
pub(crate) enum ChoiceEvent {
    /// How likely the prompt's tokens were; every choice of the prompt is told.
    Scored(Arc<PromptLogprobs>),
    /// Prefill has ended.
    Started {
        /// Prompt tokens whose prefill was skipped.
        cached_tokens: u32,
    },
    /// More text, or more tokens whose text is complete; never both empty.
    Delta(Delta),
    /// The end.
    Finished(Finish),
    /// The end without a result.
    Failed(EngineFailure),
}

/// Text that has become certain, with its tokens.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Delta {
    /// New text.
    pub(crate) text: String,
    /// Tokens that are now wholly in the text.
    pub(crate) tokens: Vec<ReleasedToken>,
    /// Tokens generated so far.
    pub(crate) completion_tokens: u32,
    /// Tokens folded so far.
    pub(crate) folded_tokens: u32,
}

/// A token that belongs to the answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ReleasedToken {
    /// As sampled.
    pub(crate) sampled: SampledToken,
    /// A control token that is not shown: it adds nothing to the text.
    pub(crate) is_hidden: bool,
    /// Bytes of the text that it stands for.
    pub(crate) bytes: usize,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: FinishReason,
    /// The stop string or stop token of the request that did it.
    pub(crate) stop_reason: Option<StopReason>,
    /// Tokens generated in all, those of a stop string included, the stop token not.
    pub(crate) completion_tokens: u32,
    /// Tokens that some layer no longer holds in slots of their own.
    pub(crate) folded_tokens: u32,
}

/// The text side of one choice.
pub(crate) struct ChoiceText {
    tokens: Arc<dyn TokenTable>,
    text: TextStream,
    options: TextOptions,
    stop_token_ids: Vec<u32>,
    keep_special_tokens: bool,
    /// Control tokens that are shown all the same.
    shown_token_ids: Vec<u32>,
    unreleased: VecDeque<ReleasedToken>,
    completion_tokens: u32,
    folded_tokens: u32,
    /// Where the turn is remembered when it has ended.
    recorder: Option<TurnRecorder>,
    /// Follows the thought for the metrics.
    thought: Option<ThoughtWatch>,
    /// Makes the sequence's spans.
    trace: Option<SequenceTrace>,
}

/// What is counted of a choice's thought.
struct ThoughtWatch {
    counter: ThoughtCounter,
    requested: &'static str,
    was_closed: bool,
    metrics: HttpMetrics,
}

impl ChoiceText {
    /// Starts an empty text.
    pub(crate) fn new(tokens: Arc<dyn TokenTable>, fields: &GenerationFields) -> Self {
        let calls = fields.wanted.calls.as_ref();
        // An answer that must be calls has no content for them to count in.
        let is_content_free = calls.is_some_and(|calls| calls.in_text.is_none());
        let options = TextOptions {
            stop: if is_content_free { Vec::new() } else { fields.stop.clone() },
            include_stop: fields.include_stop,
            thought: None,
            calls: calls.map(|calls| Arc::clone(&calls.syntax)),
        };
        Self {
            tokens,
            text: TextStream::new(options.clone()),
            options,
            stop_token_ids: fields.stop_token_ids.clone(),
            keep_special_tokens: fields.keep_special_tokens,
            shown_token_ids: fields.shown_token_ids.clone(),
            unreleased: VecDeque::new(),
            completion_tokens: 0,
            folded_tokens: 0,
            recorder: None,
            thought: None,
            trace: None,
        }
    }

    /// Remembers the turn when it has ended.
    pub(crate) fn recorded_by(self, recorder: Option<TurnRecorder>) -> Self {
        Self { recorder, ..self }
    }

    /// Makes spans of what the engine says.
    pub(crate) fn traced(self, trace: Option<SequenceTrace>) -> Self {
        Self { trace, ..self }
    }

    /// The text may have a thought: stop strings count behind it, and its markers are text even where
    /// they are control tokens.
    pub(crate) fn thinking(mut self, thought: Option<(&Thought, &HttpMetrics)>) -> Self {
        let Some((thought, metrics)) = thought else { return self };
        self.shown_token_ids.extend_from_slice(&thought.marker_ids);
        self.options.thought = Some((Arc::clone(&thought.markers), thought.start));
        self.text = TextStream::new(self.options.clone());
        self.thought = Some(ThoughtWatch {
            counter: ThoughtCounter::new(Arc::clone(&thought.markers), thought.start),
            requested: thought.requested,
            was_closed: false,
            metrics: metrics.clone(),
        });
        self
    }

    /// Takes the next event of the engine, which has folded `folded_tokens` by then; `None` is a
    /// stream that broke off. Appends what the client gets to know, and returns whether more may follow.
    pub(crate) fn advance(
        &mut self,
        event: Option<SequenceEvent>,
        folded_tokens: u32,
        out: &mut VecDeque<ChoiceEvent>,
    ) -> bool {
        self.folded_tokens = folded_tokens;
        if let Some(trace) = &mut self.trace {
            trace.observe(event.as_ref(), folded_tokens);
        }
        match event {
            Some(SequenceEvent::PromptLogprobs(scores)) => {
                out.push_back(ChoiceEvent::Scored(scores));
                true
            }
            // The route of embeddings reads its sequences itself.
            Some(SequenceEvent::Embedding(_)) => true,
            Some(SequenceEvent::Started { cached_tokens, .. }) => {
                out.push_back(ChoiceEvent::Started { cached_tokens });
                true
            }
            Some(SequenceEvent::Token(token)) => self.push_token(token, out),
            Some(SequenceEvent::Finished { reason, folded_tokens }) => {
                self.folded_tokens = folded_tokens;
                let delta = self.text.finish();
                let found = self.release(delta, out);
                let finish = found.map_or_else(|| self.finish_of(reason), |stop| self.stopped_by(stop));
                self.end(finish, out);
                false
            }
            Some(SequenceEvent::Failed(failure)) => {
                out.push_back(ChoiceEvent::Failed(failure));
                false
            }
            None => {
                out.push_back(ChoiceEvent::Failed(EngineFailure::Internal));
                false
            }
        }
    }

    fn push_token(&mut self, sampled: SampledToken, out: &mut VecDeque<ChoiceEvent>) -> bool {
        let is_hidden = !self.keep_special_tokens
            && self.tokens.is_special(sampled.id)
            && !self.shown_token_ids.contains(&sampled.id);
        let bytes = if is_hidden { &[][..] } else { self.tokens.token_bytes(sampled.id) };
        if let Some(thought) = &mut self.thought {
            thought.was_closed |= sampled.is_forced && thought.counter.is_in_thought();
            thought.counter.push(bytes);
        }
        let delta = self.text.push(bytes);
        self.completion_tokens = self.completion_tokens.saturating_add(1);
        self.unreleased.push_back(ReleasedToken { sampled, is_hidden, bytes: bytes.len() });
        match self.release(delta, out) {
            Some(stop) => {
                let finish = self.stopped_by(stop);
                self.end(finish, out);
                false
            }
            None => true,
        }
    }

    fn end(&mut self, finish: Finish, out: &mut VecDeque<ChoiceEvent>) {
        if let Some(recorder) = self.recorder.take() {
            recorder.finish(self.tokens.as_ref());
        }
        if let Some(ThoughtWatch { mut counter, requested, was_closed, metrics }) = self.thought.take() {
            counter.finish();
            metrics.count_thought(requested, counter.has_thought(), counter.tokens(), was_closed);
        }
        out.push_back(ChoiceEvent::Finished(finish));
    }

    /// Hands out a delta and returns the stop string that it ended with, if any.
    fn release(&mut self, delta: TextDelta, out: &mut VecDeque<ChoiceEvent>) -> Option<usize> {
        let count = delta.released_tokens.min(self.unreleased.len());
        if count > 0 || !delta.text.is_empty() {
            let tokens: Vec<ReleasedToken> = self.unreleased.drain(..count).collect();
            if let Some(recorder) = &mut self.recorder {
                recorder.push(&delta.text, tokens.iter().map(|token| token.sampled.id));
            }
            out.push_back(ChoiceEvent::Delta(Delta {
                text: delta.text,
                tokens,
                completion_tokens: self.completion_tokens,
                folded_tokens: self.folded_tokens,
            }));
        }
        delta.stopped
    }

    fn stopped_by(&self, stop: usize) -> Finish {
        Finish {
            reason: FinishReason::Stop,
            stop_reason: self.options.stop.get(stop).cloned().map(StopReason::Text),
            completion_tokens: self.completion_tokens,
            folded_tokens: self.folded_tokens,
        }
    }

    fn finish_of(&self, reason: EngineFinish) -> Finish {
        let (reason, stop_reason) = match reason {
            EngineFinish::Stop { token_id } => {
                let is_own = self.stop_token_ids.contains(&token_id);
                (FinishReason::Stop, is_own.then_some(StopReason::Token(token_id)))
            }
            EngineFinish::Complete => (FinishReason::Stop, None),
            EngineFinish::Length => (FinishReason::Length, None),
        };
        Finish {
            reason,
            stop_reason,
            completion_tokens: self.completion_tokens,
            folded_tokens: self.folded_tokens,
        }
    }
}

/// Events of several choices, interleaved as they come. Dropping it ends all their sequences.
pub(crate) type ChoiceEvents = stream::SelectAll<Pin<Box<dyn Stream<Item = (u32, ChoiceEvent)> + Send>>>;

/// Joins sequences with their texts. Choice indices count up in the order given.
pub(crate) fn interleave(choices: Vec<(SequenceStream, ChoiceText)>) -> ChoiceEvents {
    stream::select_all((0u32..).zip(choices).map(|(index, (sequence, text))| {
        let events: Pin<Box<dyn Stream<Item = (u32, ChoiceEvent)> + Send>> =
            Box::pin(choice_events(index, sequence, text));
        events
    }))
}

/// One choice's events. The sequence is ended as soon as its text has ended.
fn choice_events(
    index: u32,
    sequence: SequenceStream,
    text: ChoiceText,
) -> impl Stream<Item = (u32, ChoiceEvent)> + Send {
    let start = (Some(sequence), text, VecDeque::new());
    stream::unfold(start, move |(mut sequence, mut text, mut pending)| async move {
        loop {
            if let Some(event) = pending.pop_front() {
                return Some(((index, event), (sequence, text, pending)));
            }
            let events = sequence.as_mut()?;
            let event = events.next().await;
            if !text.advance(event, events.folded_tokens(), &mut pending)
                && let Some(sequence) = sequence.take()
            {
                sequence.finish();
            }
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Token `i` below 256 is the byte `i`; 256 and above are control tokens.
    pub(crate) struct Bytes(Vec<[u8; 1]>);

    impl Bytes {
        pub(crate) fn new() -> Self {
            Self((0..=255).map(|byte| [byte]).collect())
        }
    }

    impl TokenTable for Bytes {
        fn token_bytes(&self, id: u32) -> &[u8] {
            self.0.get(id as usize).map_or(b"<end>", |byte| byte)
        }

        fn is_special(&self, id: u32) -> bool {
            id >= 256
        }
    }

    pub(crate) fn token(id: u32) -> SampledToken {
        SampledToken { id, logprob: None, top_logprobs: Vec::new(), is_forced: false }
    }

    fn run(fields: &GenerationFields, ids: &[u32], end: EngineFinish) -> Vec<ChoiceEvent> {
        let mut text = ChoiceText::new(Arc::new(Bytes::new()), fields);
        let mut out = VecDeque::new();
        let started = SequenceEvent::Started { queue_time: Duration::ZERO, cached_tokens: 0 };
        let events = std::iter::once(started)
            .chain(ids.iter().map(|id| SequenceEvent::Token(token(*id))))
            .chain(std::iter::once(SequenceEvent::Finished { reason: end, folded_tokens: 3 }));
        for event in events {
            if !text.advance(Some(event), 2, &mut out) {
                break;
            }
        }
        out.into()
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn joined(events: &[ChoiceEvent]) -> (String, Vec<u32>, Finish) {
        let (mut text, mut released, mut finish) = (String::new(), Vec::new(), None);
        for event in events {
            match event {
                ChoiceEvent::Delta(delta) => {
                    text.push_str(&delta.text);
                    released.extend(delta.tokens.iter().map(|token| token.sampled.id));
                }
                ChoiceEvent::Finished(end) => finish = Some(end.clone()),
                _ => {}
            }
        }
        (text, released, finish.expect("an end"))
    }

    #[test]
    fn stop_strings_end_the_text_and_are_counted() {
        let fields = GenerationFields { stop: vec!["END".into()], ..GenerationFields::default() };
        let (text, released, finish) = joined(&run(&fields, &ids("abENDxyz"), EngineFinish::Length));
        assert_eq!((text.as_str(), released), ("ab", ids("ab")));
        assert_eq!(finish.reason, FinishReason::Stop);
        assert_eq!(finish.stop_reason, Some(StopReason::Text("END".into())));
        // As far as the engine was when the text ended.
        assert_eq!((finish.completion_tokens, finish.folded_tokens), (5, 2));

        let fields = GenerationFields { include_stop: true, ..fields };
        let (text, released, _) = joined(&run(&fields, &ids("abENDxyz"), EngineFinish::Length));
        assert_eq!((text.as_str(), released), ("abEND", ids("abEND")));
    }

    #[test]
    fn held_back_text_comes_out_at_the_end() {
        let fields = GenerationFields { stop: vec!["END".into()], ..GenerationFields::default() };
        let (text, released, finish) = joined(&run(&fields, &ids("abEN"), EngineFinish::Length));
        assert_eq!((text.as_str(), released.len()), ("abEN", 4));
        assert_eq!((finish.reason, finish.stop_reason), (FinishReason::Length, None));
        let (text, _, finish) = joined(&run(&fields, &ids("{}"), EngineFinish::Complete));
        assert_eq!(text, "{}");
        assert_eq!((finish.reason, finish.stop_reason), (FinishReason::Stop, None), "a grammar is complete");
    }

    #[test]
    fn stop_tokens_are_named_if_they_came_from_the_request() {
        let fields = GenerationFields { stop_token_ids: vec![7], ..GenerationFields::default() };
        let end = |token_id| joined(&run(&fields, &ids("a"), EngineFinish::Stop { token_id })).2;
        assert_eq!(end(7).stop_reason, Some(StopReason::Token(7)));
        assert_eq!(end(256).stop_reason, None);
        assert_eq!((end(256).completion_tokens, end(256).folded_tokens), (1, 3));
    }

    #[test]
    fn control_tokens_are_hidden_unless_asked_for() {
        let sequence = [97, 256, 98];
        let hidden = joined(&run(&GenerationFields::default(), &sequence, EngineFinish::Length));
        assert_eq!((hidden.0.as_str(), hidden.1.len()), ("ab", 3));
        let fields = GenerationFields { keep_special_tokens: true, ..GenerationFields::default() };
        assert_eq!(joined(&run(&fields, &sequence, EngineFinish::Length)).0, "a<end>b");
    }

    #[test]
    fn a_stream_that_breaks_off_is_a_failure() {
        let mut out = VecDeque::new();
        let mut text = ChoiceText::new(Arc::new(Bytes::new()), &GenerationFields::default());
        assert!(!text.advance(None, 0, &mut out));
        assert_eq!(out, [ChoiceEvent::Failed(EngineFailure::Internal)]);
    }

    proptest! {
        /// Whatever the text: the deltas join to it, and every token is released once, in order.
        #[test]
        fn nothing_is_lost(text in "\\PC{0,40}") {
            let fields = GenerationFields { stop: vec!["\u{1}\u{2}".into()], ..GenerationFields::default() };
            let (joined_text, released, finish) = joined(&run(&fields, &ids(&text), EngineFinish::Length));
            prop_assert_eq!(&joined_text, &text);
            prop_assert_eq!(released, ids(&text));
            prop_assert_eq!(finish.completion_tokens as usize, text.len());
        }
    }
}
