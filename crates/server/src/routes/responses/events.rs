//! The events of a streamed response: named, and numbered from 0 without gaps.

use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    answer::{Reply, ResponseObject},
    output::{Item, Listener, OutputText, Status},
};
use crate::{
    choice::{Delta, Finish},
    error::ApiError,
    generation::StreamOptions,
    limits::Permit,
    openai::{ChatLogprob, Usage},
    run::Job,
    state::AppState,
    stream::{self, Chunks, Frames, StreamParts},
};

/// What has happened, as a client is told.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = ResponseEventFields)]
pub(super) enum Event<'a> {
    Created {
        response: &'a ResponseObject<'a>,
    },
    InProgress {
        response: &'a ResponseObject<'a>,
    },
    ItemAdded {
        output_index: usize,
        item: &'a Item,
    },
    PartAdded {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        part: &'a OutputText,
    },
    TextDelta {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        delta: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    TextDone {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        text: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    PartDone {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        part: &'a OutputText,
    },
    ArgumentsDelta {
        item_id: &'a str,
        output_index: usize,
        delta: &'a str,
    },
    ArgumentsDone {
        item_id: &'a str,
        output_index: usize,
        arguments: &'a str,
        name: &'a str,
    },
    ReasoningDelta {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        delta: &'a str,
    },
    ReasoningDone {
        item_id: &'a str,
        output_index: usize,
        content_index: u32,
        text: &'a str,
    },
    ItemDone {
        output_index: usize,
        item: &'a Item,
    },
    Completed {
        response: &'a ResponseObject<'a>,
    },
    Incomplete {
        response: &'a ResponseObject<'a>,
    },
    Failed {
        response: &'a ResponseObject<'a>,
    },
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "response.created",
            Self::InProgress { .. } => "response.in_progress",
            Self::ItemAdded { .. } => "response.output_item.added",
            Self::PartAdded { .. } => "response.content_part.added",
            Self::TextDelta { .. } => "response.output_text.delta",
            Self::TextDone { .. } => "response.output_text.done",
            Self::PartDone { .. } => "response.content_part.done",
            Self::ArgumentsDelta { .. } => "response.function_call_arguments.delta",
            Self::ArgumentsDone { .. } => "response.function_call_arguments.done",
            Self::ReasoningDelta { .. } => "response.reasoning_text.delta",
            Self::ReasoningDone { .. } => "response.reasoning_text.done",
            Self::ItemDone { .. } => "response.output_item.done",
            Self::Completed { .. } => "response.completed",
            Self::Incomplete { .. } => "response.incomplete",
            Self::Failed { .. } => "response.failed",
        }
    }
}

/// An event as it is sent.
#[derive(Serialize, ToSchema)]
#[schema(as = ResponseEvent)]
pub(crate) struct Numbered<'a, 'e> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    event: &'a Event<'e>,
}

/// Writes events as they come.
pub(super) struct EventWriter<'a> {
    /// The number of the next event.
    pub(super) sequence_number: &'a mut u64,
    pub(super) frames: &'a mut Frames,
}

impl Listener for EventWriter<'_> {
    fn event(&mut self, event: &Event<'_>) {
        let (r#type, sequence_number) = (event.name(), *self.sequence_number);
        self.frames.event(r#type, &Numbered { r#type, sequence_number, event });
        *self.sequence_number += 1;
    }
}

/// The streamed answer.
pub(super) fn respond(state: &AppState, reply: Reply, job: Job, permit: Permit) -> Response {
    stream::respond(StreamParts {
        choices: job.choices,
        chunks: ResponseChunks { reply, sequence_number: 0 },
        counter: job.counter,
        // The last event has the usage, asked for or not.
        options: StreamOptions::default(),
        keep_alive: state.config().keep_alive,
        metrics: state.metrics().clone(),
        permit,
    })
}

struct ResponseChunks {
    reply: Reply,
    /// The number of the next event.
    sequence_number: u64,
}

impl Chunks for ResponseChunks {
    fn opened(&mut self, frames: &mut Frames) {
        let mut to = EventWriter { sequence_number: &mut self.sequence_number, frames };
        let response = &self.reply.in_progress();
        to.event(&Event::Created { response });
        to.event(&Event::InProgress { response });
    }

    fn started(&mut self, _: u32, _: Option<Usage>, _: &mut Frames) {}

    fn delta(&mut self, _: u32, delta: Delta, _: Option<Usage>, frames: &mut Frames) {
        self.reply.push(delta, &mut EventWriter { sequence_number: &mut self.sequence_number, frames });
    }

    fn finished(&mut self, _: u32, finish: Finish, _: Option<Usage>, frames: &mut Frames) {
        let mut to = EventWriter { sequence_number: &mut self.sequence_number, frames };
        self.reply.finish(finish.reason, &mut to);
    }

    fn usage(&mut self, _: Usage, _: &mut Frames) {}

    fn ended(&mut self, usage: Usage, frames: &mut Frames) {
        let mut to = EventWriter { sequence_number: &mut self.sequence_number, frames };
        let response = &self.reply.finished(usage);
        to.event(&match self.reply.final_status() {
            Status::Incomplete => Event::Incomplete { response },
            _ => Event::Completed { response },
        });
    }

    fn failed(&mut self, error: &ApiError, usage: Usage, frames: &mut Frames) {
        let mut to = EventWriter { sequence_number: &mut self.sequence_number, frames };
        to.event(&Event::Failed { response: &self.reply.failed(error, usage) });
    }
}
