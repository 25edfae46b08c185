//! The streamed answer. The finish reason comes in a last chunk with empty text.
use std::sync::Arc;

use axum::response::Response;
use locket_engine::PromptLogprobs;
use locket_processor::Processor;

use super::CompletionRequest;
use crate::{
    choice::{Delta, Finish},
    echo::CharCounter,
    limits::Permit,
    logprobs,
    openai::{Completion, CompletionChoice, CompletionLogprobs, Stamp, Usage},
    run::{Job, token_ids, token_style},
    state::AppState,
    stream::{self, Chunks, Frames, StreamParts, usage_key},
};

pub(super) fn respond(
    state: &AppState,
    request: CompletionRequest,
    stamp: Stamp,
    job: Job,
    permit: Permit,
) -> Response {
    let fields = &request.generation;
    let options = fields.stream_options();
    let choices = job.prompts.len() * fields.choices() as usize;
    let prompts = if fields.return_token_ids { job.prompts } else { Vec::new() };
    let chunks = CompletionChunks {
        counters: counters(&request, choices),
        scores: vec![None; choices],
        is_first: vec![true; choices],
        processor: Arc::clone(state.processor()),
        prompts,
        request,
        stamp,
    };
    stream::respond(StreamParts {
        choices: job.choices,
        chunks,
        counter: job.counter,
        options,
        keep_alive: state.config().keep_alive,
        metrics: state.metrics().clone(),
        permit,
    })
}

/// In front of the first generated token of each choice: behind the echoed prompt.
fn counters(request: &CompletionRequest, choices: usize) -> Vec<CharCounter> {
    let per_prompt = request.generation.choices() as usize;
    let chars = |choice: usize| request.echoed.get(choice / per_prompt).map_or(0, |echo| echo.chars);
    (0..choices).map(chars).map(CharCounter::behind).collect()
}

struct CompletionChunks {
    request: CompletionRequest,
    stamp: Stamp,
    processor: Arc<Processor>,
    /// Prompt ids, if they are to be returned.
    prompts: Vec<Vec<u32>>,
    /// Count the text before the next token, per choice.
    counters: Vec<CharCounter>,
    /// Of the prompt, per choice, until it is echoed.
    scores: Vec<Option<Arc<PromptLogprobs>>>,
    /// Nothing sent yet, per choice.
    is_first: Vec<bool>,
}

impl CompletionChunks {
    fn chunk(
        &mut self,
        choice: Option<CompletionChoice>,
        usage: Option<Option<Usage>>,
        prompt_token_ids: Option<Vec<u32>>,
        frames: &mut Frames,
    ) {
        frames.data(&Completion {
            id: &self.stamp.id,
            object: "text_completion",
            created: self.stamp.created,
            model: &self.stamp.model,
            choices: choice.into_iter().collect(),
            usage,
            system_fingerprint: &self.stamp.system_fingerprint,
            prompt_token_ids: prompt_token_ids.as_deref(),
        });
    }

    /// Sends a choice; its first chunk carries the prompt's ids if they were asked for.
    fn choice(&mut self, mut choice: CompletionChoice, usage: Option<Usage>, frames: &mut Frames) {
        let fields = &self.request.generation;
        let usage = usage_key(fields.stream_options(), usage);
        let index = choice.index as usize;
        let is_first = self.is_first.get_mut(index).is_some_and(std::mem::take);
        let ids = self.prompts.get(index / fields.choices() as usize).filter(|_| is_first).cloned();
        if self.prompts.len() == 1 {
            return self.chunk(Some(choice), usage, ids, frames);
        }
        choice.prompt_token_ids = ids;
        self.chunk(Some(choice), usage, None, frames);
    }
}

/// A choice of a chunk with nothing in it.
fn empty_choice(index: u32) -> CompletionChoice {
    CompletionChoice {
        index,
        text: String::new(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        prompt_token_ids: None,
        prompt_logprobs: None,
    }
}

impl Chunks for CompletionChunks {
    fn scored(&mut self, index: u32, scores: Arc<PromptLogprobs>) {
        if let Some(place) = self.scores.get_mut(index as usize) {
            *place = Some(scores);
        }
    }

    /// There is no role chunk; an echoed prompt comes first.
    fn started(&mut self, index: u32, usage: Option<Usage>, frames: &mut Frames) {
        let fields = &self.request.generation;
        let Some(echo) = self.request.echoed.get((index / fields.choices()) as usize) else { return };
        let scores = self.scores.get_mut(index as usize).and_then(Option::take);
        let (tokens, style) = (self.processor.as_ref(), token_style(fields));
        let logprobs = fields
            .logprobs
            .zip(scores)
            .map(|(count, scores)| logprobs::echoed(echo, &scores, count, tokens, style));
        let choice = CompletionChoice { text: echo.text.clone(), logprobs, ..empty_choice(index) };
        self.choice(choice, usage, frames);
    }

    fn delta(&mut self, index: u32, delta: Delta, usage: Option<Usage>, frames: &mut Frames) {
        let fields = &self.request.generation;
        let wants_tokens = fields.logprobs.is_some() || fields.return_token_ids;
        if delta.text.is_empty() && !wants_tokens {
            return;
        }
        let logprobs = fields.logprobs.and_then(|_| {
            let counter = self.counters.get_mut(index as usize)?;
            let mut arrays = CompletionLogprobs::default();
            let tokens = self.processor.as_ref();
            logprobs::completions(&delta.tokens, tokens, token_style(fields), counter, &mut arrays);
            Some(arrays)
        });
        let choice = CompletionChoice {
            logprobs,
            token_ids: fields.return_token_ids.then(|| token_ids(&delta.tokens)),
            text: delta.text,
            ..empty_choice(index)
        };
        self.choice(choice, usage, frames);
    }

    fn finished(&mut self, index: u32, finish: Finish, usage: Option<Usage>, frames: &mut Frames) {
        let choice = CompletionChoice {
            finish_reason: Some(finish.reason),
            stop_reason: Some(finish.stop_reason),
            ..empty_choice(index)
        };
        self.choice(choice, usage, frames);
    }

    fn usage(&mut self, usage: Usage, frames: &mut Frames) {
        self.chunk(None, Some(Some(usage)), None, frames);
    }
}
