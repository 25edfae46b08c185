//! Why the engine refuses or ends a sequence.

/// A request that was not accepted. Nothing of it is left in the engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The waiting queue is full.
    #[error("the queue of {limit} waiting sequences is full")]
    QueueFull {
        /// Its bound.
        limit: usize,
    },
    /// The request can never run: it needs more slots than the largest block has, or more blocks
    /// than exist (`n` too large).
    #[error("{0}")]
    DoesNotFit(String),
    /// The engine drains and takes nothing new.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine has stopped after a device error.
    #[error("the engine is not running")]
    Dead,
}

/// Why a running sequence ended without a finish reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineFailure {
    /// A broken invariant or a device error; details are in the log.
    #[error("internal error")]
    Internal,
    /// The logits were not finite.
    #[error("the model produced logits that are not finite")]
    NonFiniteLogits,
    /// It waited longer than the operator's limit.
    #[error("the request waited longer than the queue's time limit")]
    QueueTimeout,
    /// The drain time ran out.
    #[error("the server is shutting down")]
    ShuttingDown,
}
