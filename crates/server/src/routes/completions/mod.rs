//! `POST /v1/completions`

mod answer;
mod chunks;
mod request;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};

use request::{CompletionRequest, Prompt};

use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::PromptSource,
    layers::RequestContext,
    limits,
    openai::{Stamp, new_id},
    prompt,
    run::{self, Job},
    state::{AppState, unix_seconds},
};

/// Reads, queues and answers one completion request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, request).await?;
    let mut ignored = IgnoredFields::default();
    let mut completion = CompletionRequest::read(&Field::root(&admitted.body), state.bounds(), &mut ignored)?;
    context.set_body_id(completion.generation.request_id.as_ref());

    let add_special_tokens = completion.generation.add_special_tokens.unwrap_or(true);
    let prompts = std::mem::take(&mut completion.prompts);
    let mut prompt_ids = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        prompt_ids.push(encode(&state, prompt, add_special_tokens).await?);
    }
    let stamp = Stamp {
        id: new_id("cmpl"),
        created: unix_seconds(),
        model: completion.generation.model.clone().unwrap_or_else(|| state.bounds().primary_model()),
        system_fingerprint: state.fingerprint(completion.generation.cache),
    };
    let fields = &completion.generation;
    let job = Job::submit(&state, context.request_id(), fields, PromptSource::Prompt, prompt_ids)?;
    let response = if completion.generation.stream {
        chunks::respond(&state, completion, stamp, job, admitted.permit)
    } else {
        let done = job.collect(&state).await?;
        answer::respond(&state, &completion, &stamp, done)
    };
    Ok(run::with_ignored_fields(response, &ignored))
}

/// Prompt ids. An empty text is the start token alone.
async fn encode(state: &AppState, prompt: Prompt, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    let text = match prompt {
        Prompt::Ids(ids) => return Ok(ids),
        Prompt::Text(text) => text,
    };
    let ids = prompt::encode_text(state, text, add_special_tokens).await?;
    if !ids.is_empty() {
        return Ok(ids);
    }
    let start = state.processor().bos_token_id().ok_or_else(|| {
        let message = "`prompt` is empty, and this model has no start token that could stand for it.";
        ApiError::field(ErrorKind::EmptyString, "prompt", message)
    })?;
    Ok(vec![start])
}
