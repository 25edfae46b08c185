//! The engine as the server sees it: submit, watch, drain.

use std::sync::Arc;

use locket_model::{MemoryUse, ModelConfig, kv_cache::CachePlan};

use crate::{GenerationRequest, SequenceEvent, SubmitError};

/// Life of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EngineStatus {
    /// Model loaded and warmed up.
    Ready,
    /// Takes nothing new, finishes what runs.
    Draining,
    /// Stopped on purpose.
    Stopped,
    /// Stopped after a device error.
    Dead,
}

/// One continuation's events. Dropping it ends the sequence at the next step.
#[derive(Debug)]
pub struct SequenceStream {
    #[allow(dead_code, reason = "replaced by the engine's author")]
    events: tokio::sync::mpsc::Receiver<SequenceEvent>,
}

impl SequenceStream {
    /// The next event, or `None` after the last one. Cancel-safe.
    pub async fn next(&mut self) -> Option<SequenceEvent> {
        self.events.recv().await
    }
}

/// A cloneable handle of the engine thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    shared: Arc<EngineFacts>,
}

/// What never changes after start.
#[derive(Debug, Clone)]
pub struct EngineFacts {
    /// Geometry.
    pub model: ModelConfig,
    /// Blocks.
    pub cache: CachePlan,
    /// Bytes by pool.
    pub memory: MemoryUse,
}

impl EngineHandle {
    /// Queues a request and returns one stream per continuation. Never waits.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing of the request is left behind.
    pub fn submit(&self, request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        let _ = request;
        Err(SubmitError::Dead)
    }

    /// The engine's state now.
    pub fn status(&self) -> EngineStatus {
        EngineStatus::Dead
    }

    /// Geometry, cache plan and memory.
    pub fn facts(&self) -> &EngineFacts {
        &self.shared
    }

    /// Sequences that wait for a block now.
    pub fn num_waiting(&self) -> usize {
        0
    }

    /// Share of slots in use, 0 to 1.
    pub fn cache_usage(&self) -> f64 {
        0.0
    }

    /// Stops taking requests; running ones finish, at the latest after the drain time.
    pub fn drain(&self) {}
}
