//! `POST /v1/chat/completions`

mod answer;
mod chunks;
mod images;
mod messages;
mod request;
pub(crate) mod tools;

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use locket_processor::ChatPrompt;
use serde_json::Value;

pub(crate) use images::ImageParts;
pub(crate) use messages::{Conversation, read_content, read_messages};
use request::ChatRequest;

pub(crate) use request::{TemplateFields, read_metadata, read_service_tier};
pub(crate) use tools::{ToolFields, ToolStyle, read_rendered_tools};

use crate::{
    blocking,
    error::ApiError,
    generation::PromptSource,
    keys,
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    openai::new_id,
    prompt::{self, ChatNeeds},
    run::{self, Job},
    state::AppState,
    visual,
};

/// Reads, renders, queues and answers one chat request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Chat, request).await?;
    let Read { fields: mut chat, ignored, permit } = admitted.read(&state, ChatRequest::read).await?;
    let key = context.key().map(Arc::as_ref);
    chat.used_tier = keys::apply_tier(chat.service_tier, key, &mut chat.generation.priority);
    let reasoning = state.reasoning();
    chat.generation.wanted.reasoning = reasoning.decide(&chat.reasoning, &mut chat.template.kwargs)?;
    let messages = std::mem::take(&mut chat.messages);
    chat.echoed = messages.last().filter(|_| chat.echo).and_then(begun_answer);
    let prompt = ChatPrompt {
        messages,
        tools: chat.tools.rendered(),
        tool_format: state.tool_format().unwrap_or_default(),
        ..std::mem::take(&mut chat.template).into_prompt()
    };
    let tools = std::mem::take(&mut chat.tools);
    tools.apply(&state, &mut chat.generation, &mut chat.message_plan).await?;
    let pictures = visual::collect(&state, std::mem::take(&mut chat.images), &chat.generation).await?;
    let needs = ChatNeeds::of(&state, &chat.generation);
    let mut prompt = prompt::encode_chat(&state, PromptSource::Messages, prompt, needs, &pictures).await?;
    let plan = Job::plan(&state, &chat.generation, PromptSource::Messages);
    visual::see(&state, &plan, &mut prompt).await?;
    let stamp = state.stamp(new_id("chatcmpl"), &chat.generation);
    let job = Job::submit(&state, &context, &chat.generation, PromptSource::Messages, vec![prompt]).await?;
    job.plan_messages(&mut chat.message_plan);
    let response = if chat.generation.stream {
        chunks::respond(&state, chat, stamp, job, permit)
    } else {
        let done = job.collect(&state).await?;
        // Very many numbers may have to be written.
        let is_long = chat.generation.prompt_logprobs.is_some();
        blocking::run(is_long, move || answer::respond(&state, &chat, &stamp, done)).await?
    };
    Ok(run::with_ignored_fields(response, &ignored))
}

/// The text of a message of the assistant, which an answer may go on.
fn begun_answer(message: &Value) -> Option<String> {
    if message["role"] != "assistant" {
        return None;
    }
    match &message["content"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        _ => None,
    }
}
