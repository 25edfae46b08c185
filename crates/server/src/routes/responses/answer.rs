//! The response object, and the unstreamed answer.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use locket_processor::Processor;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    ResponsesRequest,
    output::{Item, Listener, Output, Status},
    request::Echo,
};
use crate::{
    choice::Delta,
    error::ApiError,
    generation::GenerationFields,
    logprobs::{self, TokenStyle},
    message::{MessageDelta, MessagePart, MessageReader},
    openai::{FinishReason, LocketUsage, Stamp, Usage},
    run::{Job, token_style},
    state::{AppState, unix_seconds},
};

/// A response in the making: what the request said, and the answer so far.
pub(super) struct Reply {
    stamp: Stamp,
    echo: Echo,
    temperature: f32,
    top_p: f32,
    reader: MessageReader,
    processor: Arc<Processor>,
    /// How tokens are named, if log-probabilities are wanted.
    logprobs: Option<TokenStyle>,
    output: Output,
    finish_reason: Option<FinishReason>,
}

impl Reply {
    pub(super) fn new(state: &AppState, request: ResponsesRequest, stamp: Stamp) -> Self {
        let ResponsesRequest { generation, echo, message_plan, .. } = request;
        let GenerationFields { temperature, top_p, .. } = generation;
        let defaults = state.config().generation;
        Self {
            stamp,
            echo,
            temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: top_p.or(defaults.top_p).unwrap_or(1.0),
            reader: message_plan.reader(),
            processor: Arc::clone(state.processor()),
            logprobs: generation.logprobs.map(|_| token_style(&generation)),
            output: Output::default(),
            finish_reason: None,
        }
    }

    /// Takes in what the choice released.
    pub(super) fn push(&mut self, delta: Delta, to: &mut impl Listener) {
        for part in self.reader.push(delta) {
            self.push_part(part, to);
        }
    }

    /// The text has ended for `reason`.
    pub(super) fn finish(&mut self, reason: FinishReason, to: &mut impl Listener) {
        let (parts, reason) = self.reader.finish(reason);
        for part in parts {
            self.push_part(part, to);
        }
        self.output.finish(reason == FinishReason::Length, to);
        self.finish_reason = Some(reason);
    }

    fn push_part(&mut self, part: MessagePart, to: &mut impl Listener) {
        let style = self.logprobs.filter(|_| matches!(part.delta, MessageDelta::Content(_)));
        let logprobs =
            style.map(|style| logprobs::chat(&part.tokens, self.processor.as_ref(), style).content);
        self.output.push(part.delta, logprobs.unwrap_or_default(), to);
    }

    /// The response before it has an answer.
    pub(super) fn in_progress(&self) -> ResponseObject<'_> {
        self.object(Status::InProgress, None, None)
    }

    /// The response after the end of its answer.
    pub(super) fn finished(&self, usage: Usage) -> ResponseObject<'_> {
        self.object(self.final_status(), Some(usage), None)
    }

    /// How the answer has ended.
    pub(super) fn final_status(&self) -> Status {
        let is_cut = self.finish_reason == Some(FinishReason::Length);
        if is_cut { Status::Incomplete } else { Status::Completed }
    }

    /// The response whose answer the engine gave up.
    pub(super) fn failed<'a>(&'a mut self, error: &'a ApiError, usage: Usage) -> ResponseObject<'a> {
        self.output.abandon();
        // The API's list of codes is closed, and has no other for what can go wrong here.
        let error = ResponseError { code: "server_error", message: &error.message };
        self.object(Status::Failed, Some(usage), Some(error))
    }

    fn object<'a>(
        &'a self,
        status: Status,
        usage: Option<Usage>,
        error: Option<ResponseError<'a>>,
    ) -> ResponseObject<'a> {
        let echo = &self.echo;
        let usage = usage.map(|usage| ResponseUsage::new(&usage, self.reader.reasoning_tokens()));
        ResponseObject {
            id: &self.stamp.id,
            object: "response",
            created_at: self.stamp.created,
            completed_at: (status == Status::Completed).then(unix_seconds),
            status,
            background: false,
            error,
            incomplete_details: (status == Status::Incomplete)
                .then_some(IncompleteDetails { reason: "max_output_tokens" }),
            instructions: echo.instructions.as_deref(),
            max_output_tokens: echo.max_output_tokens,
            metadata: &echo.metadata,
            model: &self.stamp.model,
            output: self.output.items(),
            parallel_tool_calls: echo.parallel_tool_calls,
            previous_response_id: None,
            reasoning: &echo.reasoning,
            service_tier: echo.service_tier,
            store: false,
            temperature: self.temperature,
            text: &echo.text,
            tool_choice: &echo.tool_choice,
            tools: &echo.tools,
            top_logprobs: echo.top_logprobs,
            top_p: self.top_p,
            truncation: echo.truncation,
            usage,
        }
    }
}

/// `{"object": "response"}`
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ResponseObject<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    #[schema(required)]
    completed_at: Option<u64>,
    status: Status,
    background: bool,
    #[schema(required)]
    error: Option<ResponseError<'a>>,
    #[schema(required)]
    incomplete_details: Option<IncompleteDetails>,
    #[schema(required)]
    instructions: Option<&'a str>,
    #[schema(required)]
    max_output_tokens: Option<u32>,
    #[schema(value_type = Object)]
    metadata: &'a Value,
    model: &'a str,
    output: &'a [Item],
    parallel_tool_calls: bool,
    /// Nothing is stored.
    #[schema(required)]
    previous_response_id: Option<&'a str>,
    #[schema(value_type = Object)]
    reasoning: &'a Value,
    service_tier: &'static str,
    store: bool,
    temperature: f32,
    #[schema(value_type = Object)]
    text: &'a Value,
    tool_choice: &'a Value,
    #[schema(value_type = Vec<Object>)]
    tools: &'a Value,
    top_logprobs: u32,
    top_p: f32,
    truncation: &'static str,
    #[schema(required)]
    usage: Option<ResponseUsage>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ResponseError<'a> {
    code: &'static str,
    message: &'a str,
}

#[derive(Debug, Serialize, ToSchema)]
struct IncompleteDetails {
    reason: &'static str,
}

/// Token counts, under this API's names.
#[derive(Debug, Serialize, ToSchema)]
struct ResponseUsage {
    input_tokens: u64,
    input_tokens_details: InputDetails,
    output_tokens: u64,
    output_tokens_details: OutputDetails,
    total_tokens: u64,
    locket: LocketUsage,
}

#[derive(Debug, Serialize, ToSchema)]
struct InputDetails {
    cached_tokens: u64,
    cache_write_tokens: u64,
    image_tokens: u64,
    /// Those that went into the decoder; absent without images.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_tokens_kept: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl ResponseUsage {
    fn new(usage: &Usage, reasoning_tokens: u32) -> Self {
        let prompt = usage.prompt_tokens_details;
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails {
                cached_tokens: prompt.cached_tokens,
                cache_write_tokens: 0,
                image_tokens: prompt.image_tokens,
                image_tokens_kept: prompt.image_tokens_kept,
            },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: u64::from(reasoning_tokens) },
            total_tokens: usage.total_tokens,
            locket: usage.locket.clone(),
        }
    }
}

/// Runs the job to its end and answers at once.
///
/// # Errors
/// The engine's failure.
pub(super) async fn respond(state: &AppState, mut reply: Reply, job: Job) -> Result<Response, ApiError> {
    let done = job.collect(state).await?;
    for choice in done.choices {
        reply.push(Delta { text: choice.text, tokens: choice.tokens, ..Delta::default() }, &mut ());
        reply.finish(choice.finish.reason, &mut ());
    }
    Ok(Json(reply.finished(done.usage)).into_response())
}
