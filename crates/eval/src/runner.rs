//! Sequences through a model, several in lockstep, and the scores of the rows that count.

use locket_model::{Batch, BlockId, Model, TokenScore, kv_cache::CacheSettings};

use crate::Error;

/// A text and which of its tokens are to be scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Indices into `ids` of the tokens to be predicted, each from all before it: ascending, from 1.
    pub predicted: Vec<u32>,
}

impl<'a> Sequence<'a> {
    /// Every token of `ids` but the first is predicted.
    pub fn all(ids: &'a [u32]) -> Self {
        Self { ids, predicted: (1..ids.len() as u32).collect() }
    }
}

/// How sequences run.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How each sequence uses its block.
    pub settings: CacheSettings,
    /// Sequences that advance together; the model must have blocks 0 up to this number.
    pub lockstep: u32,
    /// Most rows per sequence and step; `lockstep * chunk` is at most the model's batch.
    pub chunk: usize,
}

/// A sequence on its way through a block.
struct Active<'s, 'a> {
    sequence: &'s Sequence<'a>,
    /// Index among all sequences.
    idx: usize,
    block: BlockId,
    /// Rows that the model has seen.
    done: usize,
    /// Predictions that were asked for.
    asked: usize,
}

/// Runs `sequences`, each in a block of its own, and returns the scores of their predicted tokens in
/// order. `progress` is told the rows of each step.
///
/// # Errors
/// The model's; [`Error::NotFinite`] for a score that is no number.
pub fn run(
    model: &mut dyn Model,
    pace: Pace,
    sequences: &[Sequence<'_>],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<TokenScore>>, Error> {
    let mut scores: Vec<Vec<TokenScore>> =
        sequences.iter().map(|sequence| Vec::with_capacity(sequence.predicted.len())).collect();
    let mut waiting = sequences.iter().enumerate();
    let mut free: Vec<BlockId> = (0..pace.lockstep).rev().map(BlockId).collect();
    let mut active: Vec<Active<'_, '_>> = Vec::with_capacity(free.len());
    let mut step = Step::default();
    loop {
        while let Some(block) = free.pop() {
            let Some((idx, sequence)) = waiting.next() else { break };
            model.open_block(block, pace.settings)?;
            active.push(Active { sequence, idx, block, done: 0, asked: 0 });
        }
        if active.is_empty() {
            return Ok(scores);
        }
        step.clear();
        for one in &mut active {
            let to_border = pace.settings.rows_to_border(one.done as u32) as usize;
            step.push(one, pace.chunk.min(to_border));
        }
        model.score_tokens(&step.batch, &step.targets, &mut step.scores)?;
        progress(step.batch.num_rows());
        for (score, &(idx, row)) in step.scores.iter().zip(&step.origins) {
            if !score.nll.is_finite() {
                let (method, slots) = (pace.settings.method.name(), pace.settings.slots);
                return Err(Error::NotFinite { what: format!("{method} with {slots} slots"), row });
            }
            scores[idx].push(*score);
        }
        active.retain(|one| {
            let is_going_on = one.asked < one.sequence.predicted.len();
            if !is_going_on {
                model.close_block(one.block);
                free.push(one.block);
            }
            is_going_on
        });
        // The lowest first again: neighbours in the batch that are neighbours among the blocks attend together.
        free.sort_unstable_by_key(|&block| std::cmp::Reverse(block));
    }
}

/// One step's input and output, allocations reused.
#[derive(Default)]
struct Step {
    batch: Batch,
    targets: Vec<u32>,
    /// Sequence and row of each sample.
    origins: Vec<(usize, u32)>,
    scores: Vec<TokenScore>,
}

impl Step {
    fn clear(&mut self) {
        self.batch.clear();
        self.targets.clear();
        self.origins.clear();
        self.scores.clear();
    }

    /// Adds the next rows of `one`, none after the row that predicts its last wanted token.
    fn push(&mut self, one: &mut Active<'_, '_>, chunk: usize) {
        let Sequence { ids, predicted } = one.sequence;
        let needed = predicted.last().map_or(0, |&last| last as usize);
        let end = (one.done + chunk).min(needed);
        let first_row = self.batch.num_rows();
        self.batch.push(one.block, one.done as u32, &ids[one.done..end], false);
        while let Some(&target) = predicted.get(one.asked).filter(|&&target| (target as usize) <= end) {
            let row = target as usize - 1;
            self.batch.sample_rows.push((first_row + row - one.done) as u32);
            self.targets.push(ids[target as usize]);
            self.origins.push((one.idx, row as u32));
            one.asked += 1;
        }
        one.done = end;
    }
}

/// Checks that `sequences` can be run: something is predicted, in order, and inside the text.
///
/// # Errors
/// [`Error::Options`] naming the sequence.
pub fn check(sequences: &[Sequence<'_>]) -> Result<(), Error> {
    for (idx, Sequence { ids, predicted }) in sequences.iter().enumerate() {
        let is_inside = predicted.first().is_some_and(|&first| first > 0)
            && predicted.last().is_some_and(|&last| (last as usize) < ids.len());
        if !is_inside || !predicted.is_sorted_by(|a, b| a < b) {
            let reason = format!("sequence {idx} of {} tokens predicts {predicted:?}", ids.len());
            return Err(Error::options("sequences", reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
