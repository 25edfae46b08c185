//! One stream of tokens and its state. Waiting, running, ended: there is nothing else.

use std::{sync::Arc, time::Duration};

use locket_model::BlockId;

use crate::{
    EngineFailure, FinishReason, GenerationRequest, SampledToken, engine::PromptOutputs,
    sampler::SequenceSampler, snapshots::KeyChain, steering::Steered, stream::EventSender,
};

/// Names a sequence for the life of the engine; later ones are larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId(pub(crate) u64);

/// A continuation that waits for its block.
#[derive(Debug)]
pub(crate) struct WaitingSequence {
    /// Which of the request's `n` continuations, from 0.
    pub choice: u32,
    /// Its reader.
    pub events: EventSender,
}

/// A request in the queue. All its continuations start together.
#[derive(Debug)]
pub(crate) struct WaitingRequest {
    /// What was asked for.
    pub request: Arc<GenerationRequest>,
    /// Its continuations; those whose reader has left are taken out.
    pub sequences: Vec<WaitingSequence>,
    /// When it was submitted.
    pub arrived: Duration,
    /// Place in the order of submission.
    pub order: u64,
    /// It has waited so long that its priority no longer matters.
    pub is_overdue: bool,
    /// Seed of the request, its own or drawn at submission.
    pub seed: u64,
    /// Tokens after which the context or the block is full, at most `max_tokens`.
    pub max_new: u32,
    /// Under which keys its snapshots are; `None`: it uses none.
    pub chain: Option<Arc<KeyChain>>,
    /// Until when it waits for a snapshot that is being read; `None`: for blocks only.
    pub loading_until: Option<Duration>,
}

/// How a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With a result.
    Finished(FinishReason),
    /// Without one.
    Failed(EngineFailure),
    /// Its reader has found a stop string and left with all it wanted.
    Satisfied,
    /// Its reader has left.
    Aborted,
}

/// What a row of logits came to.
#[derive(Debug, PartialEq)]
pub(crate) enum Sampled {
    /// A token.
    Token(SampledToken),
    /// The steering wants no further one.
    Complete,
    /// The row was not finite.
    NonFiniteLogits,
    /// The steering leaves no token; why.
    Unsteerable(String),
    /// The steering has a bug; which.
    Broken(String),
}

/// When things happened to a sequence, on the engine's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// It was submitted.
    pub arrived: Duration,
    /// The first step that worked on it began.
    pub started: Option<Duration>,
    /// Its first token was sampled.
    pub first_token: Option<Duration>,
    /// Its latest token was sampled.
    pub last_token: Option<Duration>,
}

/// A running sequence: it owns a block.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Its name.
    pub id: SequenceId,
    /// What was asked for, shared by the continuations of a request.
    pub request: Arc<GenerationRequest>,
    /// Which continuation of the request, from 0.
    pub choice: u32,
    /// Its cache.
    pub block: BlockId,
    /// The sequence that prefills the prompt for this one; `None`: it works for itself.
    pub leader: Option<SequenceId>,
    /// Tokens whose keys and values went into the block; below the prompt's length while it
    /// prefills.
    pub num_cached: u32,
    /// Tokens generated so far.
    pub output_ids: Vec<u32>,
    /// Most tokens to generate: `max_tokens`, or what context and block allow.
    pub max_new: u32,
    /// Under which keys its snapshots are; `None`: it uses none.
    pub chain: Option<Arc<KeyChain>>,
    /// Prompt tokens that came from a snapshot.
    pub cached_tokens: u32,
    /// Tokens that some layer no longer holds in slots of their own.
    pub folded_tokens: u32,
    /// Of these, those that were folded before this sequence ran: another one's work.
    pub folded_before: u32,
    /// What the prompt gives besides, so far; empty in those that wait for its prefill.
    pub outputs: PromptOutputs,
    /// How it chooses tokens.
    pub sampler: SequenceSampler,
    /// What restricts its tokens; `None`: nothing does.
    pub steered: Option<Box<Steered>>,
    /// This step's choice, between sampling and reporting.
    pub sampled: Option<Sampled>,
    /// Its reader.
    pub events: EventSender,
    /// For queue time and latencies.
    pub times: Times,
    /// Number of the latest step that worked on it.
    pub last_step: u64,
    /// Set when it has ended; it leaves at the end of the step.
    pub end: Option<End>,
}

impl Sequence {
    /// Tokens of the prompt.
    pub(crate) fn prompt_len(&self) -> u32 {
        self.request.prompt_ids.len() as u32
    }

    /// Whether the prompt is not yet wholly in the block.
    pub(crate) fn is_prefill(&self) -> bool {
        self.num_cached < self.prompt_len()
    }

    /// Prompt tokens that are not in the block yet.
    pub(crate) fn prefill_remaining(&self) -> u32 {
        self.prompt_len().saturating_sub(self.num_cached)
    }

    /// Whether a row of logits waits for its guide: until then the model does not run it.
    pub(crate) fn awaits_guide(&self) -> bool {
        self.steered.as_ref().is_some_and(|steered| steered.kept_row().is_some())
    }

    /// All tokens whose keys and values went into the block.
    pub(crate) fn cached_ids(&self) -> Vec<u32> {
        let prompt = self.request.prompt_ids.len();
        let cached = self.num_cached as usize;
        let mut ids = Vec::with_capacity(cached);
        ids.extend_from_slice(&self.request.prompt_ids[..cached.min(prompt)]);
        ids.extend_from_slice(&self.output_ids[..cached.saturating_sub(prompt)]);
        ids
    }

    /// Rows after which a snapshot is due, if one is; chunks of the prompt end there.
    pub(crate) fn rows_to_snapshot(&self, interval: u32) -> Option<u32> {
        self.chain.as_ref()?;
        let border = interval - self.num_cached % interval;
        let end = self.request.snapshot_at.and_then(|at| at.checked_sub(self.num_cached));
        Some(end.filter(|&rows| rows > 0).map_or(border, |rows| rows.min(border)))
    }

    /// The next `rows` tokens to run, first the one at position [`Self::num_cached`].
    pub(crate) fn next_ids(&self, rows: u32) -> &[u32] {
        let (from, to) = (self.num_cached as usize, (self.num_cached + rows) as usize);
        let prompt_len = self.request.prompt_ids.len();
        if from < prompt_len {
            &self.request.prompt_ids[from..to]
        } else {
            &self.output_ids[from - prompt_len..to - prompt_len]
        }
    }
}
