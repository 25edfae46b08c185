//! The unstreamed answer.

use axum::{
    Json,
    response::{IntoResponse, Response},
};

use super::ChatRequest;
use crate::{
    logprobs,
    message::Message,
    openai::{AssistantMessage, ChatChoice, ChatCompletion, ChatFunction, ChatToolCall, Stamp, Usage},
    run::{Done, FinishedChoice, token_ids, token_style},
    state::AppState,
};

pub(super) fn respond(state: &AppState, chat: &ChatRequest, stamp: &Stamp, done: Done) -> Response {
    let prompt_token_ids = chat.generation.return_token_ids.then(|| done.prompts.first()).flatten();
    let mut usage = done.usage;
    let scores = done.choices.first().and_then(|choice| choice.prompt_scores.clone());
    let scores = chat.generation.prompt_logprobs.zip(scores);
    let prompt_logprobs =
        scores.map(|(count, scores)| logprobs::prompt(&scores, count, state.processor().as_ref()));
    let choices = (0..).zip(done.choices);
    let choices = choices.map(|(index, choice)| one_choice(state, chat, index, choice, &mut usage)).collect();
    Json(ChatCompletion {
        id: &stamp.id,
        object: "chat.completion",
        created: stamp.created,
        model: &stamp.model,
        choices,
        usage,
        service_tier: chat.used_tier,
        system_fingerprint: &stamp.system_fingerprint,
        metadata: chat.metadata.as_ref(),
        prompt_token_ids: prompt_token_ids.map(Vec::as_slice),
        prompt_logprobs,
    })
    .into_response()
}

/// One choice; its thoughts are added to the usage.
fn one_choice(
    state: &AppState,
    chat: &ChatRequest,
    index: u32,
    choice: FinishedChoice,
    usage: &mut Usage,
) -> ChatChoice {
    let fields = &chat.generation;
    let token_ids = fields.return_token_ids.then(|| token_ids(&choice.tokens));
    let (message, finish_reason) =
        Message::read(&chat.message_plan, choice.text, choice.tokens, choice.finish.reason);
    usage.completion_tokens_details.reasoning_tokens += u64::from(message.reasoning_tokens);
    let logprobs = fields
        .logprobs
        .map(|_| logprobs::chat(&message.content_tokens, state.processor().as_ref(), token_style(fields)));
    let (reasoning, reasoning_content) = state.config().reasoning.field.values(message.reasoning);
    let calls = message.tool_calls.into_iter().map(|call| ChatToolCall {
        index: None,
        id: Some(call.id),
        kind: Some("function"),
        function: ChatFunction { name: Some(call.name), arguments: call.arguments },
    });
    ChatChoice {
        index,
        message: AssistantMessage {
            role: "assistant",
            content: chat.echoed.iter().cloned().chain(message.content).reduce(|echoed, own| echoed + &own),
            refusal: None,
            reasoning,
            reasoning_content,
            tool_calls: calls.collect(),
        },
        logprobs,
        finish_reason,
        stop_reason: choice.finish.stop_reason,
        token_ids,
    }
}
