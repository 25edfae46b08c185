//! `POST /v1/embeddings`

mod answer;
mod request;
mod vectors;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};

pub(crate) use answer::EmbeddingList;
use request::EmbeddingRequest;

use crate::{
    blocking,
    chat_ids::PromptIds,
    error::ApiError,
    generation::{PromptSource, sampling},
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    prompt,
    run::{self, Job},
    state::AppState,
};

/// Answers with more numbers are written on a blocking thread.
const SHORT_NUMBERS: usize = 16_384;

/// Reads, queues and answers one request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Embeddings, request).await?;
    let Read { fields: mut embedding, ignored, permit } =
        admitted.read(&state, EmbeddingRequest::read).await?;
    embedding.generation.pooling = Some(state.config().embedding_pooling);
    let fields = &embedding.generation;
    let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
    let inputs = std::mem::take(&mut embedding.inputs);
    let prompts = prompt::encode_inputs(&state, inputs, add_special_tokens).await?;

    let source = PromptSource::Embedded;
    let plan = Job::plan(&state, fields, source);
    let sampling = sampling(fields, state.config().generation, &[], Vec::new());
    let mut requests = Vec::with_capacity(prompts.len());
    let is_alone = prompts.len() == 1;
    for (index, ids) in prompts.into_iter().enumerate() {
        let mut prompt = PromptIds::from(ids);
        plan.truncate(&mut prompt);
        let planned = plan.request(context.request_id(), &prompt, sampling.clone());
        requests.push(planned.map_err(|error| if is_alone { error } else { source.of_item(error, index) })?);
    }
    let prompt_tokens: u64 = requests.iter().map(|request| request.prompt_ids.len() as u64).sum();
    let mut reservation = run::reserve_tokens(&state, &context, &requests, 0)?;
    let vectors = vectors::embed(&state, requests, reservation.as_mut()).await?;
    let model = fields.model.clone().unwrap_or_else(|| state.bounds().primary_model());
    let numbers: usize = vectors.iter().map(Vec::len).sum();
    let is_base64 = embedding.is_base64;
    let response = blocking::run(numbers > SHORT_NUMBERS, move || {
        answer::respond(&model, vectors, is_base64, prompt_tokens)
    })
    .await?;
    drop(permit);
    Ok(run::with_ignored_fields(response, &ignored))
}
