//! From request fields to engine requests, for every route that generates text.

mod cache;
mod fields;
mod plan;

pub(crate) use cache::{CacheChoice, LocketFields};
pub(crate) use fields::{Bounds, GenerationFields, StreamOptions, is_request_id};
pub(crate) use plan::{Plan, PromptSource, sampling};

#[cfg(test)]
pub(crate) use fields::test_bounds;
