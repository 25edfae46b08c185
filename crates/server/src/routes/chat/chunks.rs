//! The streamed answer: a role chunk, deltas, and a finish chunk for each choice.

use std::sync::Arc;

use axum::response::Response;
use locket_processor::Processor;

use super::ChatRequest;
use crate::{
    choice::{Delta, Finish},
    config::ReasoningField,
    limits::Permit,
    logprobs,
    message::{MessageDelta, MessagePart, MessageReader},
    openai::{ChatChunk, ChatChunkChoice, ChatDelta, ChatFunction, ChatToolCall, Stamp, Usage},
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
    let readers = (0..chat.generation.choices()).map(|_| chat.message_plan.reader()).collect();
    let chunks = ChatChunks {
        chat,
        stamp,
        processor: Arc::clone(state.processor()),
        prompt_ids,
        readers,
        reasoning_field: state.config().reasoning.field,
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

struct ChatChunks {
    chat: ChatRequest,
    stamp: Stamp,
    processor: Arc<Processor>,
    /// Sent with the first chunk.
    prompt_ids: Option<Vec<u32>>,
    /// By choice.
    readers: Vec<MessageReader>,
    reasoning_field: ReasoningField,
}

impl ChatChunks {
    fn chunk(&mut self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>, frames: &mut Frames) {
        let usage = usage.map(|usage| usage.map(|usage| self.with_reasoning(usage)));
        let prompt_ids = self.prompt_ids.take();
        frames.data(&ChatChunk {
            id: &self.stamp.id,
            object: "chat.completion.chunk",
            created: self.stamp.created,
            model: &self.stamp.model,
            system_fingerprint: &self.stamp.system_fingerprint,
            choices,
            service_tier: self.chat.service_tier.map(|_| self.chat.used_tier),
            usage,
            prompt_token_ids: prompt_ids.as_deref(),
        });
    }

    /// Only the readers know which tokens are thoughts.
    fn with_reasoning(&self, mut usage: Usage) -> Usage {
        let tokens = self.readers.iter().map(|reader| u64::from(reader.reasoning_tokens())).sum();
        usage.completion_tokens_details.reasoning_tokens = tokens;
        usage
    }

    /// Sends a piece of a message, unless a client would see nothing of it.
    fn part(&mut self, index: u32, part: MessagePart, usage: Option<Usage>, frames: &mut Frames) {
        let fields = &self.chat.generation;
        let is_content = matches!(part.delta, MessageDelta::Content(_));
        let wants_tokens = fields.return_token_ids || (fields.logprobs.is_some() && is_content);
        if !part.delta.is_visible() && (!wants_tokens || part.tokens.is_empty()) {
            return;
        }
        let logprobs = fields
            .logprobs
            .filter(|_| is_content)
            .map(|_| logprobs::chat(&part.tokens, self.processor.as_ref(), token_style(fields)));
        let choice = ChatChunkChoice {
            token_ids: fields.return_token_ids.then(|| token_ids(&part.tokens)),
            delta: delta_of(part.delta, self.reasoning_field),
            logprobs,
            ..empty_choice(index)
        };
        let usage = self.usage_key(usage);
        self.chunk(vec![choice], usage, frames);
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

/// The delta as it is sent.
fn delta_of(delta: MessageDelta, reasoning_field: ReasoningField) -> ChatDelta {
    let call = |call| ChatDelta { tool_calls: vec![call], ..ChatDelta::default() };
    match delta {
        MessageDelta::Content(text) => ChatDelta { content: Some(text), ..ChatDelta::default() },
        MessageDelta::Reasoning(text) => {
            let (reasoning, reasoning_content) = reasoning_field.values(Some(text));
            ChatDelta { reasoning, reasoning_content, ..ChatDelta::default() }
        }
        MessageDelta::ToolCall { index, id, name } => call(ChatToolCall {
            index: Some(index),
            id: Some(id),
            kind: Some("function"),
            function: ChatFunction { name: Some(name), arguments: String::new() },
        }),
        MessageDelta::ToolArguments { index, text } => call(ChatToolCall {
            index: Some(index),
            function: ChatFunction { name: None, arguments: text },
            ..ChatToolCall::default()
        }),
        MessageDelta::Markup => ChatDelta::default(),
    }
}

impl Chunks for ChatChunks {
    fn started(&mut self, index: u32, usage: Option<Usage>, frames: &mut Frames) {
        let delta =
            ChatDelta { role: Some("assistant"), content: Some(String::new()), ..ChatDelta::default() };
        let key = self.usage_key(usage.clone());
        self.chunk(vec![ChatChunkChoice { delta, ..empty_choice(index) }], key, frames);
        if let Some(echoed) = self.chat.echoed.clone() {
            let delta = ChatDelta { content: Some(echoed), ..ChatDelta::default() };
            let key = self.usage_key(usage);
            self.chunk(vec![ChatChunkChoice { delta, ..empty_choice(index) }], key, frames);
        }
    }

    fn delta(&mut self, index: u32, delta: Delta, usage: Option<Usage>, frames: &mut Frames) {
        let Some(reader) = self.readers.get_mut(index as usize) else { return };
        for part in reader.push(delta) {
            self.part(index, part, usage.clone(), frames);
        }
    }

    fn finished(&mut self, index: u32, finish: Finish, usage: Option<Usage>, frames: &mut Frames) {
        let Some(reader) = self.readers.get_mut(index as usize) else { return };
        let (parts, reason) = reader.finish(finish.reason);
        for part in parts {
            self.part(index, part, usage.clone(), frames);
        }
        let choice = ChatChunkChoice {
            finish_reason: Some(reason),
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
