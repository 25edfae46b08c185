//! From request fields to engine requests, for every route that generates text.

mod cache;
mod fields;
mod plan;
mod reasoning;
mod steering;
mod structured;
mod verdicts;

pub(crate) use cache::{CacheChoice, LocketFields};
pub(crate) use fields::{Bounds, GenerationFields, StreamOptions, is_request_id};
pub(crate) use plan::{Plan, PromptLength, PromptSource, sampling};
pub(crate) use reasoning::{EFFORTS, Reasoning, ReasoningChoice, ReasoningFields, Thought, ThoughtParts};
pub(crate) use steering::{CallsInText, GrammarMemory, Wanted, WantedCalls, plan as steering_plan, refused};
pub(crate) use structured::{Structured, read_named_schema};

#[cfg(test)]
pub(crate) use fields::{seeing_bounds, test_bounds};
