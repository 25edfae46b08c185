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
    chat_ids::PromptIds,
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::PromptSource,
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Admitted},
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
    let Admitted { body, permit } = limits::admit(&state, &context, Route::Completions, request).await?;
    let mut ignored = IgnoredFields::default();
    let mut completion = CompletionRequest::read(&Field::root(&body), state.bounds(), &mut ignored)?;
    // A stream may last long: it keeps neither the body nor the prompts.
    drop(body);
    check_queue(completion.prompts.len(), completion.generation.choices(), state.engine().max_waiting())?;

    let add_special_tokens = completion.generation.add_special_tokens.unwrap_or(true);
    let prompts = std::mem::take(&mut completion.prompts);
    let mut prompt_ids = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        prompt_ids.push(PromptIds::from(encode(&state, prompt, add_special_tokens).await?));
    }
    let stamp = Stamp {
        id: new_id("cmpl"),
        created: unix_seconds(),
        model: completion.generation.model.clone().unwrap_or_else(|| state.bounds().primary_model()),
        system_fingerprint: state.fingerprint(completion.generation.cache(&state.bounds().cache)),
    };
    let fields = &completion.generation;
    let job = Job::submit(&state, &context, fields, PromptSource::Prompt, prompt_ids).await?;
    let response = if completion.generation.stream {
        chunks::respond(&state, completion, stamp, job, permit)
    } else {
        let done = job.collect(&state).await?;
        answer::respond(&state, &completion, &stamp, done)
    };
    Ok(run::with_ignored_fields(response, &ignored))
}

/// Refuses what no queue can hold, however empty: `n` choices of each prompt wait at once.
fn check_queue(prompts: usize, n: u32, max_waiting: usize) -> Result<(), ApiError> {
    let sequences = prompts.saturating_mul(n as usize);
    if sequences <= max_waiting {
        return Ok(());
    }
    let param = if prompts > 1 { "prompt" } else { "n" };
    let message = format!(
        "The request asks for {sequences} choices ({prompts} prompts, `n` is {n}), \
         but this server queues at most {max_waiting}."
    );
    Err(ApiError::field(ErrorKind::InvalidValue, param, message))
}

/// Prompt ids.
async fn encode(state: &AppState, prompt: Prompt, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text(text) => prompt::encode_text(state, text, add_special_tokens).await,
    }
}
