//! What changes logits before a token is chosen: masks, bias, penalties.

use std::collections::HashMap;

use crate::SamplingParams;

use super::weights;

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
/// never chosen. If the masks leave nothing, those of bad words and minimum length are lifted:
/// `allowed_token_ids` is the one that a grammar or a classifier relies on.
pub(crate) fn apply(
    raw: &[f32],
    params: &SamplingParams,
    output_ids: &[u32],
    seen: Option<&SeenTokens>,
    logits: &mut Vec<f32>,
) {
    allow(raw, params, logits);
    mask(params, output_ids, logits);
    if weights::max(logits) == f32::NEG_INFINITY {
        allow(raw, params, logits);
        if weights::max(logits) == f32::NEG_INFINITY {
            // No allowed id is in the vocabulary.
            logits.copy_from_slice(raw);
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
}

/// Copies the allowed logits.
fn allow(raw: &[f32], params: &SamplingParams, logits: &mut Vec<f32>) {
    logits.clear();
    let Some(allowed) = &params.allowed_token_ids else {
        logits.extend_from_slice(raw);
        return;
    };
    logits.resize(raw.len(), f32::NEG_INFINITY);
    for &id in allowed {
        if let (Some(logit), Some(&value)) = (logits.get_mut(id as usize), raw.get(id as usize)) {
            *logit = value;
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
