//! `POST /v1/completions`

mod answer;
mod chunks;
mod request;

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};

use request::{CompletionRequest, Prompt};

use crate::{
    blocking,
    chat_ids::PromptIds,
    echo::EchoedPrompt,
    error::{ApiError, ErrorKind},
    generation::PromptSource,
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    openai::new_id,
    prompt,
    run::{self, Job},
    state::AppState,
};

/// Prompts up to this length are made into text at once.
const SHORT_TOKENS: usize = 4096;

/// Reads, queues and answers one completion request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Completions, request).await?;
    let Read { fields: mut completion, ignored, permit } =
        admitted.read(&state, CompletionRequest::read).await?;
    check_queue(completion.prompts.len(), completion.generation.choices(), state.engine().max_waiting())?;

    let add_special_tokens = completion.generation.add_special_tokens.unwrap_or(true);
    let prompts = std::mem::take(&mut completion.prompts);
    let mut prompt_ids = Vec::with_capacity(prompts.len());
    let mut written = Vec::new();
    let is_alone = prompts.len() == 1;
    for (index, prompt) in prompts.into_iter().enumerate() {
        let text = prompt.text().filter(|_| completion.generation.echo).map(str::to_owned);
        let ids = encode(&state, prompt, add_special_tokens)
            .await
            .map_err(|error| if is_alone { error } else { PromptSource::Prompt.of_item(error, index) })?;
        written.push(Written { text, num_tokens: ids.len() });
        prompt_ids.push(PromptIds::from(ids));
    }
    let stamp = state.stamp(new_id("cmpl"), &completion.generation);
    let fields = &completion.generation;
    let job = Job::submit(&state, &context, fields, PromptSource::Prompt, prompt_ids).await?;
    if completion.generation.echo {
        completion.echoed = echo(&state, written, &job.prompts).await?;
    }
    let response = if completion.generation.stream {
        chunks::respond(&state, completion, stamp, job, permit)
    } else {
        let done = job.collect(&state).await?;
        // Millions of numbers may have to be written.
        let is_long = completion.generation.prompt_scores().is_some();
        blocking::run(is_long, move || answer::respond(&state, &completion, &stamp, done)).await?
    };
    Ok(run::with_ignored_fields(response, &ignored))
}

/// A prompt as it came.
struct Written {
    /// `None` for ids, and where nothing is echoed.
    text: Option<String>,
    /// Before it was cut.
    num_tokens: usize,
}

/// The echoes of prompts that were submitted as `ids`. Of one that was cut, what is left is echoed.
async fn echo(
    state: &AppState,
    written: Vec<Written>,
    ids: &[Vec<u32>],
) -> Result<Vec<EchoedPrompt>, ApiError> {
    let processor = Arc::clone(state.processor());
    let ids = ids.to_vec();
    let is_long = ids.iter().map(Vec::len).sum::<usize>() > SHORT_TOKENS;
    blocking::run(is_long, move || {
        let prompts = written.into_iter().zip(&ids);
        let echoes = prompts.map(|(Written { text, num_tokens }, ids)| {
            EchoedPrompt::new(processor.as_ref(), text.filter(|_| num_tokens == ids.len()), ids)
        });
        echoes.collect()
    })
    .await
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
