//! How likely a prompt's own tokens were, from the logits of its rows.
//!
//! Logits of a whole prompt are far too many to hold: they are made and used up a few rows at a time.

use crate::{TokenLogprob, sampler::SamplerScratch};

/// Rows of logits that are held at once for scoring.
pub(crate) const SCORED_ROWS: usize = 32;

/// Logits or hidden states of a prompt hold NaN or infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// A prompt token, seen from those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptToken {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of the model's own probability.
    pub logprob: f32,
    /// How many tokens were at least as likely, itself included (equal ones by lower id): 1 for the
    /// likeliest.
    pub rank: u32,
}

/// Log-probabilities of a prompt's tokens but the first, which has none before it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PromptLogprobs {
    tokens: Vec<PromptToken>,
    /// The likeliest tokens of all places one after the other, equally many of each.
    top: Vec<TokenLogprob>,
}

impl PromptLogprobs {
    /// One entry per prompt token but the first, in order: the token and the likeliest ones in its
    /// place, descending, as many as asked for.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (PromptToken, &[TokenLogprob])> {
        let per_token = self.top.len().checked_div(self.tokens.len()).unwrap_or(0);
        let top = move |at: usize| &self.top[at * per_token..(at + 1) * per_token];
        self.tokens.iter().enumerate().map(move |(at, &token)| (token, top(at)))
    }

    /// Appends the next token. `top` must be as long as those before.
    pub fn push(&mut self, token: PromptToken, top: &[TokenLogprob]) {
        debug_assert_eq!(self.top.len(), self.tokens.len() * top.len(), "equally many alternatives");
        self.tokens.push(token);
        self.top.extend_from_slice(top);
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none: the prompt has one token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// A row of logits to be scored, and its result.
pub(crate) struct ScoreJob<'l> {
    /// Logits `[vocab_size]`.
    pub logits: &'l [f32],
    /// The token that follows in the prompt.
    pub id: u32,
    /// Alternatives to report.
    pub count: usize,
    /// What came out.
    pub score: Result<(PromptToken, Vec<TokenLogprob>), NotFinite>,
}

/// Scores all jobs, shared out among the threads that have a scratch. A job's result depends on
/// itself alone.
pub(crate) fn score(jobs: &mut [ScoreJob<'_>], scratch: &mut [SamplerScratch]) {
    let per_thread = jobs.len().div_ceil(scratch.len().max(1)).max(1);
    let mut shares = jobs.chunks_mut(per_thread).zip(scratch);
    let own = shares.next();
    let run = |(jobs, scratch): (&mut [ScoreJob<'_>], &mut SamplerScratch)| {
        for job in jobs {
            job.score = scratch.score(job.logits, job.id, job.count);
        }
    };
    std::thread::scope(|scope| {
        for share in shares {
            scope.spawn(move || run(share));
        }
        if let Some(share) = own {
            run(share);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(logits: &[f32], id: u32, count: usize) -> (PromptToken, Vec<TokenLogprob>) {
        SamplerScratch::default().score(logits, id, count).unwrap()
    }

    #[test]
    fn ranks_count_likelier_tokens_and_equal_ones_by_id() {
        let logits = [1.0, 3.0, 1.0, -2.0, 3.0];
        let ranks: Vec<u32> = (0..5).map(|id| scored(&logits, id, 0).0.rank).collect();
        assert_eq!(ranks, [3, 1, 4, 5, 2]);
        let (token, top) = scored(&logits, 2, 3);
        assert_eq!(top.iter().map(|top| top.id).collect::<Vec<_>>(), [1, 4, 0]);
        assert_eq!(token.logprob, top[2].logprob, "the same number for equal logits");
        let sum: f64 = (0..5).map(|id| f64::from(scored(&logits, id, 0).0.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(scored(&logits, 0, 20).1.len(), 5, "no more than there are");
    }

    #[test]
    fn threads_change_nothing() {
        let rows: Vec<Vec<f32>> =
            (0..17).map(|row| (0..50).map(|id| ((row * 31 + id * 17) % 23) as f32).collect()).collect();
        let run = |threads: usize| {
            let mut scratch: Vec<_> = (0..threads).map(|_| SamplerScratch::default()).collect();
            let job = |logits| ScoreJob { logits, id: 7, count: 3, score: Err(NotFinite) };
            let mut jobs: Vec<_> = rows.iter().map(|row| job(row.as_slice())).collect();
            score(&mut jobs, &mut scratch);
            jobs.into_iter().map(|job| job.score.unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(4));
        assert_eq!(run(1), run(40));
    }

    #[test]
    fn logits_that_are_no_numbers_are_no_score() {
        assert_eq!(SamplerScratch::default().score(&[0.0, f32::NAN], 0, 1), Err(NotFinite));
    }

    #[test]
    fn entries_keep_their_alternatives() {
        let mut logprobs = PromptLogprobs::default();
        assert!(logprobs.is_empty() && logprobs.iter().next().is_none());
        let token = |id| PromptToken { id, logprob: -1.0, rank: 2 };
        let top = |id| [id, id + 1].map(|id| TokenLogprob { id, logprob: -0.5 });
        for id in 0..3 {
            logprobs.push(token(id), &top(id));
        }
        assert_eq!(logprobs.len(), 3);
        assert!(logprobs.iter().zip(0..).all(|(entry, id)| entry == (token(id), &top(id)[..])));
    }
}
