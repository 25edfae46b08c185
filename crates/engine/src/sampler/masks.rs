//! What changes logits before a token is chosen: masks, bias, penalties.

use std::collections::HashMap;

use crate::{SamplingParams, TokenSet};

use super::{SampleFailure, weights};

/// Tokens of prompt and output, for penalties.
#[derive(Debug)]
pub(crate) struct SeenTokens {
    /// Tokens of the prompt, each once, ascending; only for the repetition penalty.
    prompt: Vec<u32>,
    /// How often each token was generated.
    output: HashMap<u32, u32>,
}

impl SeenTokens {
    /// Starts counting if `params` has a penalty.
    pub(crate) fn if_needed(params: &SamplingParams, prompt_ids: &[u32]) -> Option<Self> {
        let repetition = params.repetition_penalty != 1.0;
        if !repetition && params.frequency_penalty == 0.0 && params.presence_penalty == 0.0 {
            return None;
        }
        let mut prompt = if repetition { prompt_ids.to_vec() } else { Vec::new() };
        prompt.sort_unstable();
        prompt.dedup();
        Some(Self { prompt, output: HashMap::new() })
    }

    /// Counts a generated token.
    pub(crate) fn add(&mut self, id: u32) {
        *self.output.entry(id).or_default() += 1;
    }

    /// How many different tokens were generated.
    #[cfg(test)]
    pub(crate) fn num_output(&self) -> usize {
        self.output.len()
    }
}

/// Whether [`apply`] would change anything.
pub(crate) fn is_needed(params: &SamplingParams, num_output: usize, has_penalties: bool) -> bool {
    has_penalties
        || params.allowed_token_ids.is_some()
        || !params.bad_words.is_empty()
        || !params.logit_bias.is_empty()
        || (num_output < params.min_tokens as usize && !params.stop_token_ids.is_empty())
}

/// Writes the logits `raw` after masks, bias and penalties into `logits [vocab_size]`; -inf is
/// never chosen. If the masks leave nothing, those of bad words and minimum length are lifted, then
/// `allowed_token_ids`, which a classifier relies on. The set of the steering never is.
///
/// # Errors
/// [`SampleFailure::NothingAllowed`] if that set is empty.
pub(crate) fn apply(
    raw: &[f32],
    params: &SamplingParams,
    output_ids: &[u32],
    among: Option<&TokenSet>,
    seen: Option<&SeenTokens>,
    logits: &mut Vec<f32>,
) -> Result<(), SampleFailure> {
    let leaves_nothing = |logits: &[f32]| weights::max(logits) == f32::NEG_INFINITY;
    let only_allowed = params.allowed_token_ids.as_deref();
    allow(raw, among, only_allowed, logits);
    mask(params, output_ids, logits);
    if leaves_nothing(logits) {
        allow(raw, among, only_allowed, logits);
        if leaves_nothing(logits) {
            // No allowed id is in the vocabulary, or none in the set.
            allow(raw, among, None, logits);
            if leaves_nothing(logits) {
                return Err(SampleFailure::NothingAllowed);
            }
        }
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            // Stays finite, so that a ban (-inf) stays the only way to be impossible.
            *logit += bias.clamp(-1e6, 1e6);
        }
    }
    if let Some(seen) = seen {
        penalise(params, seen, logits);
    }
    Ok(())
}

/// Copies the logits of ids that are in both, the others are -inf.
fn allow(raw: &[f32], among: Option<&TokenSet>, only: Option<&[u32]>, logits: &mut Vec<f32>) {
    logits.clear();
    match (only, among) {
        (None, None) => logits.extend_from_slice(raw),
        (None, Some(among)) => {
            logits.reserve(raw.len());
            for (word, row) in among.words().iter().zip(raw.chunks(32)) {
                // No branch on a token: grammars have words of all kinds.
                let allowed =
                    |bit: usize, logit| if word >> bit & 1 != 0 { logit } else { f32::NEG_INFINITY };
                logits.extend(row.iter().enumerate().map(|(bit, &logit)| allowed(bit, logit)));
            }
            logits.resize(raw.len(), f32::NEG_INFINITY);
        }
        (Some(only), among) => {
            logits.resize(raw.len(), f32::NEG_INFINITY);
            for &id in only.iter().filter(|&&id| among.is_none_or(|among| among.contains(id))) {
                if let (Some(logit), Some(&value)) = (logits.get_mut(id as usize), raw.get(id as usize)) {
                    *logit = value;
                }
            }
        }
    }
}

/// Masks bad words, and stop tokens before the minimum length.
fn mask(params: &SamplingParams, output_ids: &[u32], logits: &mut [f32]) {
    let mut ban = |id: u32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    };
    for word in &params.bad_words {
        if let Some((&last, prefix)) = word.split_last()
            && output_ids.ends_with(prefix)
        {
            ban(last);
        }
    }
    if output_ids.len() < params.min_tokens as usize {
        params.stop_token_ids.iter().for_each(|&id| ban(id));
    }
}

/// Repetition over prompt and output (CTRL, arXiv 1909.05858, as the field implements it:
/// divides positive and multiplies negative logits), then frequency and presence over the output.
fn penalise(params: &SamplingParams, seen: &SeenTokens, logits: &mut [f32]) {
    let repetition = params.repetition_penalty;
    if repetition != 1.0 {
        let only_in_prompt = seen.prompt.iter().filter(|id| !seen.output.contains_key(id));
        for &id in only_in_prompt.chain(seen.output.keys()) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
        }
    }
    for (&id, &count) in &seen.output {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}
