//! A request in the engine: submitted, and read to its end if it is not streamed.

use std::sync::Arc;

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};
use futures_util::StreamExt as _;
use locket_engine::{AdapterId, GenerationRequest, PromptLogprobs};

use crate::{
    chat_ids::PromptIds,
    choice::{self, ChoiceEvent, ChoiceEvents, ChoiceText, Finish, ReleasedToken, TokenTable},
    error::{ApiError, ErrorKind},
    fields::IgnoredFields,
    generation::{GenerationFields, Plan, PromptSource, Thought, ThoughtParts, sampling, steering_plan},
    keys::TokenReservation,
    layers::RequestContext,
    logprobs::TokenStyle,
    message::MessagePlan,
    openai::Usage,
    prompt,
    state::AppState,
    stream::UsageCounter,
    turns::TurnRecorder,
};

/// The running choices of a request.
pub(crate) struct Job {
    /// Prompt ids as submitted.
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) choices: ChoiceEvents,
    pub(crate) counter: UsageCounter,
    /// The thought in the choices' texts, if the model thinks.
    thought: Option<Thought>,
}

/// The finished choices of a request.
pub(crate) struct Done {
    /// Prompt ids as submitted.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// By index.
    pub(crate) choices: Vec<FinishedChoice>,
    pub(crate) usage: Usage,
}

/// One finished choice.
pub(crate) struct FinishedChoice {
    /// Of its prompt, if they were asked for.
    pub(crate) prompt_scores: Option<Arc<PromptLogprobs>>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<ReleasedToken>,
    pub(crate) finish: Finish,
}

/// A choice that is being read.
#[derive(Default)]
struct OpenChoice {
    prompt_scores: Option<Arc<PromptLogprobs>>,
    text: String,
    tokens: Vec<ReleasedToken>,
    finish: Option<Finish>,
}

impl OpenChoice {
    fn close(self) -> Option<FinishedChoice> {
        let Self { prompt_scores, text, tokens, finish } = self;
        Some(FinishedChoice { prompt_scores, text, tokens, finish: finish? })
    }
}

impl Job {
    /// What a request's lengths are checked against.
    pub(crate) fn plan<'a>(
        state: &'a AppState,
        fields: &'a GenerationFields,
        source: PromptSource,
    ) -> Plan<'a> {
        let default_max_tokens = source.default_max_tokens(state.config().default_max_tokens);
        Plan { fields, bounds: state.bounds(), default_max_tokens, source }
    }

    /// Queues `n` choices of each prompt. Choice `i` belongs to prompt `i / n`.
    ///
    /// # Errors
    /// Lengths that do not fit, 422 for a schema or grammar, 429 for the tokens of the request's key,
    /// and the engine's refusals; nothing is left behind.
    pub(crate) async fn submit(
        state: &AppState,
        context: &RequestContext,
        fields: &GenerationFields,
        source: PromptSource,
        mut prompts: Vec<PromptIds>,
    ) -> Result<Self, ApiError> {
        let plan = Self::plan(state, fields, source);
        let bad_words = prompt::encode_bad_words(state, &fields.bad_words).await?;
        let eos_token_ids = state.processor().eos_token_ids();
        let sampling = sampling(fields, state.config().generation, eos_token_ids, bad_words);
        let mut requests = Vec::with_capacity(prompts.len());
        let is_alone = prompts.len() == 1;
        for (index, prompt) in prompts.iter_mut().enumerate() {
            plan.truncate(prompt);
            let planned = plan.request(context.request_id(), prompt, sampling.clone());
            requests
                .push(planned.map_err(|error| if is_alone { error } else { source.of_item(error, index) })?);
        }
        check_scores(fields, source, &requests)?;
        let thought = thought(state, fields, &prompts, &requests)?;
        let thinking = thought.as_ref().and_then(|thought| thought.plan.clone());
        let steering = steering_plan(state, fields, thinking).await?;
        for (request, prompt) in requests.iter_mut().zip(&prompts) {
            request.steering.clone_from(&steering);
            request.adapter = adapter(state, fields, prompt);
        }
        let dropped = prompts.iter().map(|prompt| prompt.images.tokens - prompt.images.kept).sum();
        let reservation = reserve_tokens(state, context, &requests, dropped)?;
        let tokens: Arc<dyn TokenTable> = Arc::<locket_processor::Processor>::clone(state.processor());
        let mut choices = Vec::new();
        for (request, prompt) in requests.into_iter().zip(&mut prompts) {
            let prompt_tokens = request.prompt_ids.len();
            let turn = prompt.turn.take().zip(state.turns());
            let recorder = || {
                turn.as_ref().map(|(prefix, memory)| TurnRecorder::new(Arc::clone(memory), prefix.clone()))
            };
            let sequences = state
                .engine()
                .submit(request)
                .map_err(|error| ApiError::from_submit(&error, blamed_field(fields, source)))?;
            let first = choices.len();
            let texts = sequences.into_iter().enumerate().map(|(number, sequence)| {
                (
                    sequence,
                    ChoiceText::new(Arc::clone(&tokens), fields)
                        .recorded_by(recorder())
                        .traced(context.trace().sequence(first + number, prompt_tokens))
                        .thinking(thought.as_ref().map(|thought| (thought, state.metrics()))),
                )
            });
            choices.extend(texts);
        }
        let lengths: Vec<usize> = prompts.iter().map(PromptIds::counted_tokens).collect();
        let mut counter = UsageCounter::new(&lengths, fields.choices(), fields.cache(&state.bounds().cache))
            .settling(reservation);
        // Only conversations have images, and they are alone.
        if let [prompt] = prompts.as_slice() {
            counter = counter.with_images(&prompt.images);
        }
        let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|prompt| prompt.ids).collect();
        Ok(Self { prompts, choices: choice::interleave(choices), counter, thought })
    }

    /// Tells a plan of messages how the choices' thoughts are marked.
    pub(crate) fn plan_messages(&self, plan: &mut MessagePlan) {
        if let Some(thought) = &self.thought {
            plan.set_thoughts(Arc::clone(&thought.markers), thought.start);
        }
    }

    /// Reads all choices to their end.
    ///
    /// # Errors
    /// The first choice that fails fails the request.
    pub(crate) async fn collect(mut self, state: &AppState) -> Result<Done, ApiError> {
        let mut open: Vec<OpenChoice> = Vec::new();
        while let Some((index, event)) = self.choices.next().await {
            self.counter.count(index, &event);
            let index = index as usize;
            if open.len() <= index {
                open.resize_with(index + 1, Default::default);
            }
            match event {
                ChoiceEvent::Started { .. } => {}
                ChoiceEvent::Scored(scores) => open[index].prompt_scores = Some(scores),
                ChoiceEvent::Delta(delta) => {
                    open[index].text.push_str(&delta.text);
                    open[index].tokens.extend(delta.tokens);
                }
                ChoiceEvent::Finished(finish) => open[index].finish = Some(finish),
                ChoiceEvent::Failed(failure) => return Err(ApiError::from_failure(&failure)),
            }
        }
        let choices =
            open.into_iter().map(OpenChoice::close).collect::<Option<Vec<_>>>().ok_or_else(|| {
                ApiError::internal(&format!("{}: a choice without an end", state.bounds().primary_model()))
            })?;
        Ok(Done { prompts: self.prompts, choices, usage: self.counter.final_usage() })
    }
}

/// What a prompt goes through: the adapter that its model's name is, else the one for images if it has any.
fn adapter(state: &AppState, fields: &GenerationFields, prompt: &PromptIds) -> Option<AdapterId> {
    let named = fields.model.as_ref().and_then(|name| state.bounds().adapters.find(name));
    let has_images = !prompt.images.spans.is_empty();
    let visual = || state.config().visual_adapter.filter(|_| has_images);
    named.map(|adapter| adapter.id).or_else(visual)
}

/// Most log-probabilities of prompts, alternatives included, that one answer may have, and one stream,
/// whose chunks are made between those of others.
const MAX_SCORES: u64 = 1 << 20;
const MAX_STREAMED_SCORES: u64 = 1 << 17;

/// Refuses answers that would be too large to be made or read.
fn check_scores(
    fields: &GenerationFields,
    source: PromptSource,
    requests: &[GenerationRequest],
) -> Result<(), ApiError> {
    let Some(count) = fields.prompt_scores() else { return Ok(()) };
    let of = |request: &GenerationRequest| request.prompt_ids.len() as u64 * u64::from(request.n);
    let tokens: u64 = requests.iter().map(of).sum();
    let scores = tokens.saturating_mul(u64::from(count) + 1);
    let limit = if fields.stream { MAX_STREAMED_SCORES } else { MAX_SCORES };
    if scores <= limit {
        return Ok(());
    }
    let param = source.param();
    let message = format!(
        "The answer would have {scores} log-probabilities of prompts ({tokens} tokens in all choices, {count} \
         alternatives each), but may have {limit}: send fewer or shorter prompts, or ask for fewer alternatives."
    );
    Err(ApiError::field(ErrorKind::InvalidValue, param, message))
}

/// The thought of a conversation's answers; prompts that are none have none.
fn thought(
    state: &AppState,
    fields: &GenerationFields,
    prompts: &[PromptIds],
    requests: &[GenerationRequest],
) -> Result<Option<Thought>, ApiError> {
    let Some((prompt, request)) = prompts.first().zip(requests.first()) else { return Ok(None) };
    let calls = fields.wanted.calls.as_ref();
    let opener = state.tool_format().filter(|_| calls.is_some()).and_then(|format| format.markers().first());
    let call_openers: Vec<String> = opener.into_iter().map(|opener| (*opener).to_owned()).collect();
    let parts = ThoughtParts {
        start: prompt.thought,
        max_tokens: request.max_tokens,
        is_constrained: calls.is_some() || fields.structured.constraint().is_some(),
        call_openers: &call_openers,
    };
    fields.wanted.reasoning.thought(state.reasoning(), state.processor(), parts)
}

/// Takes prompts and longest answers from the budget of the request's key; `dropped` visual tokens, which
/// are no rows, count too.
pub(crate) fn reserve_tokens(
    state: &AppState,
    context: &RequestContext,
    requests: &[GenerationRequest],
    dropped: u64,
) -> Result<Option<TokenReservation>, ApiError> {
    let Some(key) = context.key() else { return Ok(None) };
    let most = |request: &GenerationRequest| {
        request.prompt_ids.len() as u64 + u64::from(request.n) * u64::from(request.max_tokens)
    };
    let reserved = TokenReservation::take(&key.limits, dropped + requests.iter().map(most).sum::<u64>());
    reserved.map(Some).map_err(|exceeded| {
        state.metrics().count_limited(&key.entry.name, exceeded.limit);
        exceeded.into_error()
    })
}

/// The field to name when the engine says that a request can never run.
fn blamed_field(fields: &GenerationFields, source: PromptSource) -> &'static str {
    if fields.choices() > 1 {
        "n"
    } else if fields.locket.cache.is_some() {
        "locket.kv_cache"
    } else if source == PromptSource::Input {
        "max_output_tokens"
    } else {
        "max_tokens"
    }
}

/// How log-probability entries name tokens.
pub(crate) fn token_style(fields: &GenerationFields) -> TokenStyle {
    if fields.tokens_as_token_ids { TokenStyle::Id } else { TokenStyle::Text }
}

/// The ids of released tokens.
pub(crate) fn token_ids(tokens: &[ReleasedToken]) -> Vec<u32> {
    tokens.iter().map(|token| token.sampled.id).collect()
}

/// Names the fields that the server did not know.
pub(crate) fn with_ignored_fields(mut response: Response, ignored: &IgnoredFields) -> Response {
    const IGNORED: HeaderName = HeaderName::from_static("x-ignored-fields");
    if let Some(value) = ignored.header().and_then(|names| HeaderValue::from_str(&names).ok()) {
        response.headers_mut().insert(IGNORED, value);
    }
    response
}
