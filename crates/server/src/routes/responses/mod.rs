//! `POST /v1/responses`: the stateless part of that API. A request becomes the same prompt and the
//! same job as one to `/v1/chat/completions`.

mod answer;
mod events;
mod input;
mod output;
mod request;
mod truncation;

use std::sync::Arc;

pub(crate) use answer::ResponseObject;
use axum::{
    Extension,
    extract::{Path, Request, State},
    response::Response,
};
pub(crate) use events::Numbered as ResponseEvent;
use request::ResponsesRequest;

use crate::{
    error::{ApiError, ErrorKind, clip},
    generation::PromptSource,
    keys,
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    openai::new_item_id,
    run::{self, Job},
    state::AppState,
    visual,
};

/// Reads, renders, queues and answers one request.
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Responses, request).await?;
    let Read { fields: mut request, ignored, permit } = admitted.read(&state, ResponsesRequest::read).await?;
    let key = context.key().map(Arc::as_ref);
    request.echo.service_tier = keys::apply_tier(request.service_tier, key, &mut request.generation.priority);
    let reasoning = state.reasoning();
    request.generation.wanted.reasoning =
        reasoning.decide(&request.reasoning, &mut request.template.kwargs)?;
    request.tools.apply(&state, &mut request.generation, &mut request.message_plan).await?;
    let mut prompt = truncation::encode(&state, &mut request).await?;
    let fields = &request.generation;
    visual::see(&state, &Job::plan(&state, fields, PromptSource::Input), &mut prompt).await?;
    let stamp = state.stamp(new_item_id("resp"), fields);
    let is_streamed = fields.stream;
    let job = Job::submit(&state, &context, fields, PromptSource::Input, vec![prompt]).await?;
    job.plan_messages(&mut request.message_plan);
    let reply = answer::Reply::new(&state, request, stamp);
    let response = if is_streamed {
        events::respond(&state, reply, job, permit)
    } else {
        answer::respond(&state, reply, job).await?
    };
    Ok(run::with_ignored_fields(response, &ignored))
}

/// Responses are not stored, so there is none to fetch, delete or cancel.
pub(crate) async fn not_stored(Path(id): Path<String>) -> ApiError {
    let message = format!("There is no response {:?}: this server stores none.", clip(&id));
    ApiError::new(ErrorKind::NotFound, message)
}
