//! Natural logarithms of the model's own probabilities.

use crate::{PromptToken, TokenLogprob, scoring::NotFinite};

use super::{
    Cut, SamplerScratch,
    select::SelectScratch,
    weights::{self, WeightScratch, Weights},
};

impl SamplerScratch {
    /// Log-probability and rank of `id`, and the `count` most likely tokens: the same numbers as
    /// for a token that was sampled from these logits.
    ///
    /// # Errors
    /// [`NotFinite`], for an `id` beyond the row, too.
    pub(crate) fn score(
        &mut self,
        raw: &[f32],
        id: u32,
        count: usize,
    ) -> Result<(PromptToken, Vec<TokenLogprob>), NotFinite> {
        if !weights::all_finite(raw) {
            return Err(NotFinite);
        }
        let Self { select, weights, .. } = self;
        let (logprob, top) = logprobs(raw, id, count, select, weights);
        let (Some(logprob), Some(&logit)) = (logprob, raw.get(id as usize)) else {
            return Err(NotFinite);
        };
        let (before, after) = raw.split_at(id as usize);
        let likelier = before.iter().filter(|&&other| other >= logit).count()
            + after.iter().filter(|&&other| other > logit).count();
        Ok((PromptToken { id, logprob, rank: likelier as u32 + 1 }, top))
    }
}

/// The log-probability of `id` and the `count` most likely tokens, descending, equal ones by
/// lower id. The sum of exponentials is taken in f64 over groups of f32 terms; the result is
/// within 1e-5 of exact.
pub(crate) fn logprobs(
    raw: &[f32],
    id: u32,
    count: usize,
    select: &mut SelectScratch,
    scratch: &mut WeightScratch,
) -> (Option<f32>, Vec<TokenLogprob>) {
    let max = weights::max(raw);
    let total = Weights::new(max, 1.0, scratch).fill(raw, Cut::NONE);
    let of = |logit: f32| (f64::from(logit) - f64::from(max) - total.ln()) as f32;
    let mut top = Vec::new();
    if count > 0 {
        let best = select.best_sorted(raw, count);
        top.extend(best.iter().map(|token| TokenLogprob { id: token.id, logprob: of(token.logit) }));
    }
    (raw.get(id as usize).map(|&logit| of(logit)), top)
}
