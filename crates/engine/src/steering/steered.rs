//! What a running sequence keeps about its steering.

use std::sync::Arc;

use super::{
    Guide,
    workers::{Job, Workers},
};
use crate::{GenerationRequest, sampler::Choice, sequence::SequenceId};

/// The engine's side of one continuation's steering. The guide of the next token is known while the
/// job is at home.
#[derive(Debug)]
pub(crate) struct Steered {
    /// `None`: a worker has it, or it waits for one.
    job: Option<Job>,
    /// The row of logits `[vocab_size]` that was there before its guide; empty: none waits.
    row: Vec<f32>,
}

/// What the steering says about a row of logits.
#[derive(Debug)]
pub(crate) enum Steer<'s> {
    /// Choose like this.
    Choose(Choice<'s>),
    /// The continuation is complete.
    Complete,
    /// It cannot go on; the reason.
    Failed(&'s str),
    /// It has a bug; which.
    Broken(&'s str),
    /// It is not known yet.
    Unknown,
}

impl Steered {
    /// The state before the first token; [`Self::begin`] has its guide computed.
    pub(crate) fn new(
        sequence: SequenceId,
        request: &Arc<GenerationRequest>,
        choice: u32,
        vocab_size: usize,
    ) -> Self {
        Self { job: Some(Job::new(sequence, request, choice, vocab_size)), row: Vec::new() }
    }

    /// Has the first token's guide computed.
    pub(crate) fn begin(&mut self, workers: &mut Workers) {
        if let Some(job) = self.job.take() {
            workers.submit(job);
        }
    }

    /// Takes the job back.
    pub(crate) fn come_home(&mut self, job: Job) {
        self.job = Some(job);
    }

    /// Gives up the job of a sequence that has ended.
    pub(crate) fn leave(self, sequence: SequenceId, workers: &Workers) {
        match self.job {
            Some(job) => workers.discard(job),
            None => workers.forget(sequence),
        }
    }

    /// Whether the next token's guide is known.
    pub(crate) fn is_known(&self) -> bool {
        self.job.is_some()
    }

    /// How to choose the next token.
    pub(crate) fn steer(&self) -> Steer<'_> {
        let Some(job) = &self.job else { return Steer::Unknown };
        match &job.guide {
            Guide::Free => Steer::Choose(Choice::Free),
            Guide::Allowed => Steer::Choose(Choice::Among(&job.allowed)),
            Guide::Forced(id) => Steer::Choose(Choice::Forced(*id)),
            Guide::Complete => Steer::Complete,
            Guide::Failed(reason) if job.is_broken => Steer::Broken(reason),
            Guide::Failed(reason) => Steer::Failed(reason),
        }
    }

    /// Takes in the token that was just chosen. Whether the continuation is complete with it.
    pub(crate) fn advance(&mut self, id: u32, may_go_on: bool, workers: &mut Workers) -> bool {
        let Some(job) = &mut self.job else { return false };
        let must_compute = job.advance(id);
        if must_compute {
            if may_go_on {
                self.begin(workers);
            }
            return false;
        }
        job.guide == Guide::Complete
    }

    /// Keeps a row of logits until its guide is there.
    pub(crate) fn keep_row(&mut self, row: &[f32]) {
        self.row.clear();
        self.row.extend_from_slice(row);
    }

    /// The row that was kept.
    pub(crate) fn kept_row(&self) -> Option<&[f32]> {
        (!self.row.is_empty()).then_some(&self.row)
    }

    /// The kept row was used.
    pub(crate) fn drop_row(&mut self) {
        self.row.clear();
    }
}
