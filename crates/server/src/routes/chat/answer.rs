//! The unstreamed answer.

use axum::{
    Json,
    response::{IntoResponse, Response},
};

use super::ChatRequest;
use crate::{
    logprobs,
    openai::{AssistantMessage, ChatChoice, ChatCompletion, Stamp},
    run::{Done, FinishedChoice, token_ids, token_style},
    state::AppState,
};

pub(super) fn respond(state: &AppState, chat: &ChatRequest, stamp: &Stamp, done: Done) -> Response {
    let prompt_token_ids = chat.generation.return_token_ids.then(|| done.prompts.first()).flatten();
    let choices = (0..).zip(done.choices).map(|(index, choice)| one_choice(state, chat, index, choice));
    Json(ChatCompletion {
        id: &stamp.id,
        object: "chat.completion",
        created: stamp.created,
        model: &stamp.model,
        choices: choices.collect(),
        usage: done.usage,
        // No key has a tier of its own yet.
        service_tier: "default",
        system_fingerprint: &stamp.system_fingerprint,
        metadata: chat.metadata.as_ref(),
        prompt_token_ids: prompt_token_ids.map(Vec::as_slice),
    })
    .into_response()
}

fn one_choice(state: &AppState, chat: &ChatRequest, index: u32, choice: FinishedChoice) -> ChatChoice {
    let fields = &chat.generation;
    let logprobs = fields
        .logprobs
        .map(|_| logprobs::chat(&choice.tokens, state.processor().as_ref(), token_style(fields)));
    ChatChoice {
        index,
        message: AssistantMessage { role: "assistant", content: choice.text, refusal: None },
        logprobs,
        finish_reason: choice.finish.reason,
        stop_reason: choice.finish.stop_reason,
        token_ids: fields.return_token_ids.then(|| token_ids(&choice.tokens)),
    }
}
