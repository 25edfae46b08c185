//! Sequences, scheduling and sampling. One thread owns the model, its cache and the scheduler.
//!
//! Into the thread goes one bounded channel of commands ([`EngineHandle`]), out of it goes one
//! bounded channel per sequence ([`SequenceStream`]). The scheduler knows no tensors, the model
//! knows no queues.

pub mod error;
pub mod handle;
pub mod request;

pub use error::{EngineFailure, SubmitError};
pub use handle::{EngineHandle, EngineStatus, SequenceStream};
pub use request::{
    FinishReason, GenerationRequest, SampledToken, SamplingParams, SequenceEvent, TokenLogprob,
};
