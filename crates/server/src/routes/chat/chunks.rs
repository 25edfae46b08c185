//! The streamed answer: a role chunk, deltas, and a finish chunk for each choice.

use std::sync::Arc;

use axum::response::Response;
use locket_processor::Processor;

use super::ChatRequest;
use crate::{
    choice::{Delta, Finish},
    limits::Permit,
    logprobs,
    openai::{ChatChunk, ChatChunkChoice, ChatDelta, Stamp, Usage},
    run::{Job, token_ids, token_style},
    state::AppState,
    stream::{self, Chunks, Frames, StreamParts, usage_key},
};

pub(super) fn respond(
    state: &AppState,
    chat: ChatRequest,
    stamp: Stamp,
    job: Job,
    permit: Permit,
) -> Response {
    let prompt_ids = chat.generation.return_token_ids.then(|| job.prompts.first().cloned()).flatten();
    let options = chat.generation.stream_options();
    let chunks = ChatChunks { chat, stamp, processor: Arc::clone(state.processor()), prompt_ids };
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

struct ChatChunks {
    chat: ChatRequest,
    stamp: Stamp,
    processor: Arc<Processor>,
    /// Sent with the first chunk.
    prompt_ids: Option<Vec<u32>>,
}

impl ChatChunks {
    fn chunk(&mut self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>, frames: &mut Frames) {
        let prompt_ids = self.prompt_ids.take();
        frames.data(&ChatChunk {
            id: &self.stamp.id,
            object: "chat.completion.chunk",
            created: self.stamp.created,
            model: &self.stamp.model,
            system_fingerprint: &self.stamp.system_fingerprint,
            choices,
            service_tier: self.chat.has_service_tier.then_some("default"),
            usage,
            prompt_token_ids: prompt_ids.as_deref(),
        });
    }

    fn usage_key(&self, usage: Option<Usage>) -> Option<Option<Usage>> {
        usage_key(self.chat.generation.stream_options(), usage)
    }
}

/// A choice of a chunk with nothing in it.
fn empty_choice(index: u32) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta: ChatDelta::default(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}

impl Chunks for ChatChunks {
    fn started(&mut self, index: u32, usage: Option<Usage>, frames: &mut Frames) {
        let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
        let usage = self.usage_key(usage);
        self.chunk(vec![ChatChunkChoice { delta, ..empty_choice(index) }], usage, frames);
    }

    fn delta(&mut self, index: u32, delta: Delta, usage: Option<Usage>, frames: &mut Frames) {
        let fields = &self.chat.generation;
        let wants_tokens = fields.logprobs.is_some() || fields.return_token_ids;
        if delta.text.is_empty() && !wants_tokens {
            return;
        }
        let logprobs = fields
            .logprobs
            .map(|_| logprobs::chat(&delta.tokens, self.processor.as_ref(), token_style(fields)));
        let choice = ChatChunkChoice {
            token_ids: fields.return_token_ids.then(|| token_ids(&delta.tokens)),
            delta: ChatDelta { role: None, content: Some(delta.text) },
            logprobs,
            ..empty_choice(index)
        };
        let usage = self.usage_key(usage);
        self.chunk(vec![choice], usage, frames);
    }

    fn finished(&mut self, index: u32, finish: Finish, usage: Option<Usage>, frames: &mut Frames) {
        let choice = ChatChunkChoice {
            finish_reason: Some(finish.reason),
            stop_reason: Some(finish.stop_reason),
            ..empty_choice(index)
        };
        let usage = self.usage_key(usage);
        self.chunk(vec![choice], usage, frames);
    }

    fn usage(&mut self, usage: Usage, frames: &mut Frames) {
        self.chunk(Vec::new(), Some(Some(usage)), frames);
    }
}
