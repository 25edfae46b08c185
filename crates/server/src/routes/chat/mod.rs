//! `POST /v1/chat/completions`

mod answer;
mod chunks;
mod messages;
mod request;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use locket_processor::ChatPrompt;

pub(crate) use messages::read_messages;
use request::ChatRequest;
pub(crate) use request::TemplateFields;

use crate::{
    error::ApiError,
    fields::{Field, IgnoredFields},
    generation::PromptSource,
    layers::RequestContext,
    limits,
    openai::{Stamp, new_id},
    prompt,
    run::{self, Job},
    state::{AppState, unix_seconds},
};

/// Reads, renders, queues and answers one chat request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, request).await?;
    let mut ignored = IgnoredFields::default();
    let chat = ChatRequest::read(&Field::root(&admitted.body), state.bounds(), &mut ignored)?;
    context.set_body_id(chat.generation.request_id.as_ref());

    let prompt_ids = prompt::encode_chat(
        &state,
        ChatPrompt { messages: chat.messages.clone(), tools: None, ..chat.template.prompt() },
        chat.generation.add_special_tokens.unwrap_or(false),
    )
    .await?;
    let stamp = Stamp {
        id: new_id("chatcmpl"),
        created: unix_seconds(),
        model: chat.generation.model.clone().unwrap_or_else(|| state.bounds().primary_model()),
        system_fingerprint: state.fingerprint(chat.generation.cache),
    };
    let job = Job::submit(
        &state,
        context.request_id(),
        &chat.generation,
        PromptSource::Messages,
        vec![prompt_ids],
    )?;
    let response = if chat.generation.stream {
        chunks::respond(&state, chat, stamp, job, admitted.permit)
    } else {
        let done = job.collect(&state).await?;
        answer::respond(&state, &chat, &stamp, done)
    };
    Ok(run::with_ignored_fields(response, &ignored))
}
