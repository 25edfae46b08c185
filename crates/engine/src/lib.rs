//! Sequences, scheduling and sampling. One thread owns the model, its cache and the scheduler.
//!
//! Into the thread goes one bounded channel of commands ([`EngineHandle`]), out of it goes one
//! bounded channel per sequence ([`SequenceStream`]). The scheduler knows no tensors, the model
//! knows no queues. Read first: `sequence.rs`, `scheduler.rs`, `engine.rs`.

mod adapters;
mod block_pool;
mod budget;
mod clock;
pub mod config;
mod embedding;
mod engine;
pub mod error;
pub mod handle;
mod metrics;
pub mod request;
mod runner;
mod sampler;
mod scheduler;
mod scoring;
mod sequence;
mod snapshots;
pub mod steering;
mod stream;
mod thread;
pub mod visual;

#[cfg(test)]
mod fake_model;
#[cfg(test)]
mod simulation;

pub use config::EngineConfig;
pub use embedding::Pooling;
pub use error::{EngineFailure, Error, SubmitError};
pub use handle::{EngineFacts, EngineHandle, EngineStatus};
pub use locket_model::{Adapter, AdapterId, Boundary, Extras, Keep, LayerDrops, Rank};
pub use request::{
    FinishReason, GenerationRequest, SampledToken, SamplingParams, SequenceEvent, TokenLogprob,
};
pub use scoring::{PromptLogprobs, PromptToken};
pub use steering::{Advance, Guide, SharedPlan, Steering, SteeringPlan, TokenSet};
pub use stream::SequenceStream;
pub use thread::{EngineThread, start};
pub use visual::VisualSpan;
