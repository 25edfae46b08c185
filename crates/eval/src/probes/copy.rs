//! Going on with a passage of the text whose first twelve tokens are quoted at the end.

use rand::Rng as _;

use super::{Draft, Probe, SHALLOWEST};
use crate::Error;

/// Tokens of the passage that are quoted.
const QUOTED: usize = 12;
/// Tokens that must follow.
const CONTINUED: usize = 20;
/// The passage begins before this share of the text.
const DEEPEST: f64 = 0.85;

pub(super) fn probe(draft: &mut Draft<'_>) -> Result<Probe, Error> {
    let mut ids = draft.generator.start.clone();
    let separator = draft.encode("\n\n")?;
    let (length, beside) = (draft.generator.length, ids.len() + separator.len() + QUOTED + CONTINUED);
    let hay = length.checked_sub(beside).filter(|&hay| hay >= 8 * (QUOTED + CONTINUED)).ok_or_else(|| {
        Error::options("probe-context", format!("{length} tokens are too few for a passage and its quote"))
    })?;
    let haystack = draft.haystack(hay);
    let place = draft.rng.random_range((SHALLOWEST * hay as f64) as usize..(DEEPEST * hay as f64) as usize);
    let passage = place..place + QUOTED + CONTINUED;
    let needle = ids.len() + passage.start..ids.len() + passage.end;
    ids.extend_from_slice(&haystack);
    ids.extend_from_slice(&separator);
    ids.extend_from_slice(&haystack[passage]);
    let answer = length - CONTINUED..length;
    Ok(draft.finish(ids, needle, vec![answer]))
}
