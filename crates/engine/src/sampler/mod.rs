//! Logits to a token.
//!
//! Order: log-probabilities from the model's own logits → masks (steering, allowed ids, bad words,
//! minimum length) → bias → penalties → greedy choice, or temperature → top-k → min-p → top-p → draw.
//!
//! Every filter keeps a prefix of the tokens in descending order, so it is a [`Cut`], a
//! threshold, and nothing is ever sorted as a whole. A sequence has its own random numbers, so
//! what it draws does not depend on its neighbours.

mod logprobs;
mod masks;
mod select;
mod weights;

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{GenerationRequest, SampledToken, SamplingParams, TokenSet};
use masks::SeenTokens;
pub(crate) use select::Cut;
use weights::Weights;

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SampleFailure {
    /// The model's logits held NaN or infinity.
    NonFiniteLogits,
    /// The steering's set has no id of the vocabulary.
    NothingAllowed,
}

/// What the steering leaves to choose from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Choice<'s> {
    /// Everything.
    Free,
    /// These.
    Among(&'s TokenSet),
    /// Nothing: it is this one.
    Forced(u32),
}

/// Buffers of one sampling thread, reused for every token.
#[derive(Debug, Default)]
pub(crate) struct SamplerScratch {
    /// Logits after masks, bias and penalties `[vocab_size]`.
    logits: Vec<f32>,
    select: select::SelectScratch,
    weights: weights::WeightScratch,
}

/// The sampling state of one sequence.
#[derive(Debug)]
pub(crate) struct SequenceSampler {
    rng: StdRng,
    /// What penalties look at; `None` if there are none.
    seen: Option<SeenTokens>,
}

impl SequenceSampler {
    /// The state before the first token. Equal `seed` and `choice` draw equal numbers.
    pub(crate) fn new(request: &GenerationRequest, choice: u32, seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(&choice.to_le_bytes());
        Self {
            rng: StdRng::from_seed(key),
            seen: SeenTokens::if_needed(&request.sampling, &request.prompt_ids),
        }
    }

    /// Chooses the next token from the model's logits `raw [vocab_size]`; `output_ids` is what was
    /// generated so far.
    ///
    /// # Errors
    /// [`SampleFailure`]; nothing was drawn then.
    pub(crate) fn sample(
        &mut self,
        raw: &[f32],
        request: &GenerationRequest,
        output_ids: &[u32],
        choice: Choice<'_>,
        scratch: &mut SamplerScratch,
    ) -> Result<SampledToken, SampleFailure> {
        if !weights::all_finite(raw) {
            return Err(SampleFailure::NonFiniteLogits);
        }
        let (id, is_forced) = match choice {
            Choice::Forced(id) if (id as usize) < raw.len() => (id, true),
            Choice::Forced(_) => return Err(SampleFailure::NothingAllowed),
            Choice::Free => (self.choose(raw, &request.sampling, output_ids, None, scratch)?, false),
            Choice::Among(set) => {
                (self.choose(raw, &request.sampling, output_ids, Some(set), scratch)?, false)
            }
        };
        if let Some(seen) = &mut self.seen {
            seen.add(id);
        }
        let SamplerScratch { select, weights, .. } = scratch;
        let (logprob, top_logprobs) = match request.logprobs {
            Some(count) => logprobs::logprobs(raw, id, count as usize, select, weights),
            None => (None, Vec::new()),
        };
        Ok(SampledToken { id, logprob, top_logprobs, is_forced })
    }

    /// Masks, filters and draws.
    fn choose(
        &mut self,
        raw: &[f32],
        params: &SamplingParams,
        output_ids: &[u32],
        among: Option<&TokenSet>,
        scratch: &mut SamplerScratch,
    ) -> Result<u32, SampleFailure> {
        let SamplerScratch { logits, select, weights } = scratch;
        let seen = self.seen.as_ref();
        let row = if among.is_some() || masks::is_needed(params, output_ids.len(), seen.is_some()) {
            masks::apply(raw, params, output_ids, among, seen, logits)?;
            &logits[..]
        } else {
            raw
        };
        if is_greedy(params) {
            return Ok(select::argmax(row));
        }
        let (_, weights) = keep(row, params, select, weights);
        let drawn = weights.draw(self.rng.random::<f64>());
        // The best token always has weight 1.
        Ok(drawn.unwrap_or_else(|| select::argmax(row)))
    }
}

/// Whether the best token is taken without a draw.
fn is_greedy(params: &SamplingParams) -> bool {
    params.temperature <= 0.0 || params.top_p <= 0.0 || params.top_k == 1
}

/// Applies top-k, min-p and top-p to `row`: which tokens remain, and their weights.
fn keep<'s>(
    row: &[f32],
    params: &SamplingParams,
    select: &mut select::SelectScratch,
    scratch: &'s mut weights::WeightScratch,
) -> (Cut, Weights<'s>) {
    let max = weights::max(row);
    let mut weights = Weights::new(max, params.temperature, scratch);
    let mut cut = Cut::NONE;
    if params.top_k > 0 {
        cut = cut.tighter(select.best(row, params.top_k as usize));
    }
    if params.min_p > 0.0 {
        // p ≥ min_p · p_max in terms of logits.
        let lowest = max + params.temperature * params.min_p.min(1.0).ln();
        cut = cut.tighter(Cut::at_least(lowest.min(max)));
    }
    let total = weights.fill(row, cut);
    if params.top_p < 1.0 {
        let mass = f64::from(params.top_p) * total;
        cut = cut.tighter(select.nucleus(row, &weights, mass, total));
        weights.fill(row, cut);
    }
    (cut, weights)
}

#[cfg(test)]
mod tests;
