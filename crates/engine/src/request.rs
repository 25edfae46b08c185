//! What goes into the engine and what comes out of it.

use std::{sync::Arc, time::Duration};

use locket_model::{AdapterId, kv_cache::CacheSettings};

use crate::{
    Pooling, PromptLogprobs,
    visual::{self, VisualSpan},
};

/// One request: a prompt and `n` continuations of it. The prompt is prefilled once.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    /// The id that the client sees; for logs and spans.
    pub request_id: String,
    /// Prompt token ids, at least one, all below the vocabulary size.
    pub prompt_ids: Vec<u32>,
    /// Continuations, at least one.
    pub n: u32,
    /// Most tokens to generate per continuation. 0 only with [`Self::prompt_logprobs`] or
    /// [`Self::pooling`]: the request ends with its prompt, by [`FinishReason::Length`].
    pub max_tokens: u32,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Number of alternatives to report per token; `None` reports no log-probabilities.
    pub logprobs: Option<u32>,
    /// Number of alternatives to report per prompt token; `None` scores no prompt. A prompt that is
    /// scored goes on from no snapshot, because every row of it is needed, and leaves none.
    pub prompt_logprobs: Option<u32>,
    /// Makes an embedding of the prompt; only with `max_tokens` 0 and `n` 1. Snapshots are as for
    /// [`Self::prompt_logprobs`].
    pub pooling: Option<Pooling>,
    /// How the sequence uses its block; capacity covers `prompt + max_tokens` for `full`, which gets
    /// all slots of the smallest class that has these.
    pub cache: CacheSettings,
    /// Lower is served earlier. One class is worth 5 seconds of waiting: a request goes before those
    /// of the class above that came up to 5 seconds earlier. Whoever has waited for a minute (half of
    /// [`EngineConfig::queue_timeout`](crate::EngineConfig::queue_timeout), if that is shorter) goes
    /// first.
    pub priority: i32,
    /// Whether the prompt may go on from a snapshot and leaves some itself.
    pub use_snapshots: bool,
    /// Prompt tokens before the header of the answer: a snapshot is taken there, because the answer
    /// that a client sends back may be other tokens than those sampled. Ignored outside of the prompt.
    pub snapshot_at: Option<u32>,
    /// Whose snapshots these are: requests with different salts never share any. May be empty.
    pub salt: Vec<u8>,
    /// Refuse a prompt that does not fit into the slots instead of folding it, and end the answer
    /// before anything would be folded.
    pub require_exact: bool,
    /// What restricts the tokens; `None`: nothing does.
    pub steering: Option<crate::SharedPlan>,
    /// The prompt's rows that are images', in order. Only rows that are kept are rows at all, so the lengths
    /// of prompts and blocks count what is kept.
    pub visual: Vec<VisualSpan>,
    /// The adapter that all rows go through; `None`: the model as it is.
    pub adapter: Option<AdapterId>,
}

impl GenerationRequest {
    /// A request for one continuation of `prompt_ids` and nothing beside it: sampled as by default, no
    /// log-probabilities, no priority, no snapshots, nothing that restricts it, text without an adapter.
    pub fn new(
        request_id: impl Into<String>,
        prompt_ids: Vec<u32>,
        max_tokens: u32,
        cache: CacheSettings,
    ) -> Self {
        Self {
            request_id: request_id.into(),
            prompt_ids,
            n: 1,
            max_tokens,
            sampling: SamplingParams::default(),
            logprobs: None,
            prompt_logprobs: None,
            pooling: None,
            cache,
            priority: 0,
            use_snapshots: false,
            snapshot_at: None,
            salt: Vec::new(),
            require_exact: false,
            steering: None,
            visual: Vec::new(),
            adapter: None,
        }
    }

    /// Slots per layer and head that its sequences need: those of the settings, or, where the method
    /// folds but prompt and answer are shorter, one per token.
    pub(crate) fn block_slots(&self) -> u32 {
        if !self.cache.folds() {
            return self.cache.capacity();
        }
        let tokens = (self.prompt_ids.len() as u64).saturating_add(u64::from(self.max_tokens));
        self.cache.capacity().min(u32::try_from(tokens).unwrap_or(u32::MAX))
    }

    /// Position of the token that is number `at` of prompt and answer.
    pub(crate) fn position(&self, at: u32) -> u32 {
        visual::position(&self.visual, at)
    }

    /// Whether images lose tokens inside the decoder: the prompt is then split by layers, in a step's part of
    /// its own.
    pub(crate) fn loses_tokens(&self) -> bool {
        let mut drops = self.visual.iter().filter_map(|span| span.drops.as_ref());
        drops.any(|drops| !drops.boundaries.is_empty())
    }

    /// Whether something is wanted of the prompt's own rows: all of them are run then.
    pub(crate) fn reads_prompt(&self) -> bool {
        self.prompt_logprobs.is_some() || self.pooling.is_some()
    }
}

/// Sampler settings. Ranges are checked by the caller.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass, 1 is off; 0 is greedy.
    pub top_p: f32,
    /// Keep this many best tokens; 0 is off.
    pub top_k: u32,
    /// Keep tokens with at least this share of the best token's probability; 0 is off.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of all tokens seen in prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once for tokens in the output.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, only these may be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Token sequences that must not be produced: the last token of each is masked after its prefix.
    pub bad_words: Vec<Vec<u32>>,
    /// Reproducible sampling. Continuation `i` uses a seed derived from (`seed`, `i`). `None`: random.
    pub seed: Option<u64>,
    /// Tokens that end a continuation (the model's own end tokens, unless ignored, are the caller's to add).
    pub stop_token_ids: Vec<u32>,
    /// `stop_token_ids` are masked until this many tokens were generated.
    pub min_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: None,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
        }
    }
}

/// A token and its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of the model's own probability, before bias, penalties and temperature.
    pub logprob: f32,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Token id.
    pub id: u32,
    /// Its own log-probability, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, descending, as many as asked for.
    pub top_logprobs: Vec<TokenLogprob>,
    /// Its [`Guide::Forced`](crate::Guide::Forced) left no choice.
    pub is_forced: bool,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was sampled; it is carried here and not sent as a [`SequenceEvent::Token`].
    Stop {
        /// The stop token.
        token_id: u32,
    },
    /// Its steering said [`Guide::Complete`](crate::Guide::Complete): no token could follow. To a
    /// client this is a stop without a stop token.
    Complete,
    /// `max_tokens` or the end of the context.
    Length,
}

/// What a [`SequenceStream`](crate::SequenceStream) yields, in this order: `PromptLogprobs` if
/// asked for, `Started`, `Embedding` if asked for, any number of `Token`, then exactly one of
/// `Finished` and `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum SequenceEvent {
    /// How likely the prompt's tokens were: computed once, told to every continuation.
    PromptLogprobs(Arc<PromptLogprobs>),
    /// Prefill has ended.
    Started {
        /// From submission to the first step that worked on it.
        queue_time: Duration,
        /// Prompt tokens whose prefill was skipped.
        cached_tokens: u32,
    },
    /// The prompt's pooled hidden state `[hidden_size]`, of length 1.
    Embedding(Vec<f32>),
    /// A token.
    Token(SampledToken),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens that some layer no longer holds in slots of their own; 0: every token was computed
        /// with exact attention.
        folded_tokens: u32,
    },
    /// The end without a result.
    Failed(crate::EngineFailure),
}

impl SequenceEvent {
    /// Whether nothing follows this event.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed(_))
    }
}
