//! Why the engine does not start, refuses a request or ends a sequence.

/// The engine cannot start, or did not stop in order.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that the engine cannot work with.
    #[error("engine configuration: {field} {reason}")]
    Config {
        /// The field of [`EngineConfig`](crate::EngineConfig).
        field: &'static str,
        /// What it is and what it must be.
        reason: String,
    },
    /// The metrics cannot be registered (two engines in one registry).
    #[error("cannot register the engine's metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The operating system gave no thread.
    #[error("cannot start the engine thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The model failed in its first step.
    #[error("the warm-up step failed: {0}")]
    WarmUp(String),
    /// A device error or a bug stopped the engine while it ran.
    #[error("the engine stopped: {0}")]
    Died(String),
}

impl Error {
    /// A stable snake-case name for logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config { .. } => "engine_config",
            Self::Metrics(_) => "metrics",
            Self::Thread(_) => "thread",
            Self::WarmUp(_) => "warm_up",
            Self::Died(_) => "died",
        }
    }
}

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
    /// An exact answer was asked for, but attention is exact for `slots` tokens only.
    #[error(
        "the prompt has {prompt_tokens} tokens, but only {slots} fit without folding: shorten the prompt, \
         take more slots or method full, or do without an exact answer"
    )]
    NotExact {
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// Slots of the request's cache settings.
        slots: u32,
    },
    /// The engine drains and takes nothing new.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine has stopped after a device error.
    #[error("the engine is not running")]
    Dead,
}

impl SubmitError {
    /// A stable snake-case name for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } => "queue_full",
            Self::DoesNotFit(_) => "does_not_fit",
            Self::NotExact { .. } => "not_exact",
            Self::ShuttingDown => "shutting_down",
            Self::Dead => "dead",
        }
    }
}

/// Why a running sequence ended without a finish reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EngineFailure {
    /// A broken invariant or a device error; details are in the log.
    #[error("internal error")]
    Internal,
    /// The logits were not finite.
    #[error("the model produced logits that are not finite")]
    NonFiniteLogits,
    /// Its steering could not go on: a constraint that is beyond its limits, or that leaves no token
    /// beside what else restricts the tokens; the reason is in the log.
    #[error("no token can follow what constrains the answer")]
    Unsteerable,
    /// It waited longer than the operator's limit.
    #[error("the request waited longer than the queue's time limit")]
    QueueTimeout,
    /// The drain time ran out.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl EngineFailure {
    /// A stable snake-case name for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Internal => "internal_error",
            Self::NonFiniteLogits => "non_finite_logits",
            Self::Unsteerable => "unsteerable",
            Self::QueueTimeout => "queue_timeout",
            Self::ShuttingDown => "shutting_down",
        }
    }
}
