//! From rows of logits to tokens and events.
//!
//! A steered sequence needs two things for a token: a row of logits and a guide. Whichever is late, the
//! model goes on with the other sequences. A row that is early is kept by its sequence, which stands
//! still until [`Engine::catch_up`](super::Engine) finds the guide.

use std::time::Duration;

use super::Engine;
use crate::{
    EngineFailure, FinishReason, SampledToken, SequenceEvent,
    metrics::{EngineMetrics, StepFacts},
    sampler::{Choice, SampleFailure, SamplerScratch},
    sequence::{End, Sampled, Sequence},
    steering::{Steer, Workers},
};

/// Below this many rows a second sampling thread costs more than it brings.
const ROWS_PER_SAMPLER_THREAD: usize = 4;

/// A sequence that is to get a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    /// Its place among those that run.
    pub index: usize,
    /// What the token comes from.
    pub row: Row,
}

/// Where a row of logits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Row {
    /// Among those of the latest step.
    OfStep(usize),
    /// With its sequence, which kept it.
    Kept,
}

/// A sequence and its row; `None`: the one that it kept.
type Job<'r> = (&'r mut Sequence, Option<&'r [f32]>);

impl Engine {
    /// Gives sequences the guides that were computed for them.
    pub(super) fn collect_guides(&mut self) {
        if self.workers.is_unused() {
            return;
        }
        let running = &mut self.scheduler.running;
        while let Some(job) = self.workers.next_done() {
            // Sequences start in the order of their ids, and none ever changes its place.
            let at = running.binary_search_by_key(&job.sequence(), |sequence| sequence.id).ok();
            match at.and_then(|at| running[at].steered.as_mut()) {
                Some(steered) => steered.come_home(job),
                None => self.workers.discard(job),
            }
        }
    }

    /// Makes targets of the sequences whose row waited for a guide that is there now.
    pub(super) fn find_kept_rows(&mut self) {
        if self.workers.is_unused() {
            return;
        }
        for (index, sequence) in self.scheduler.running.iter().enumerate() {
            if let Some(steered) = &sequence.steered
                && steered.kept_row().is_some()
                && steered.is_known()
                && sequence.end.is_none()
            {
                self.targets.push(Target { index, row: Row::Kept });
            }
        }
    }

    /// Samples a token for each target, or keeps its row if its guide is late. A row's result depends
    /// on its sequence alone, so rows may be shared out among threads.
    pub(super) fn sample(&mut self) {
        self.targets.sort_unstable();
        let mut targets = self.targets.iter().peekable();
        let mut jobs: Vec<Job<'_>> = Vec::with_capacity(self.targets.len());
        for (index, sequence) in self.scheduler.running.iter_mut().enumerate() {
            let Some(target) = targets.next_if(|target| target.index == index) else { continue };
            let row = match target.row {
                Row::OfStep(row) => Some(self.runner.logits_row(row)),
                Row::Kept => None,
            };
            if let Some(steered) = &mut sequence.steered
                && !steered.is_known()
            {
                steered.keep_row(row.unwrap_or_default());
                self.shared.metrics.steering().row_waits();
                continue;
            }
            jobs.push((sequence, row));
        }
        let threads = self.scratch.len().min(jobs.len() / ROWS_PER_SAMPLER_THREAD).max(1);
        let per_thread = jobs.len().div_ceil(threads).max(1);
        let mut shares = jobs.chunks_mut(per_thread).zip(&mut self.scratch);
        let own = shares.next();
        std::thread::scope(|scope| {
            for (share, scratch) in shares {
                scope.spawn(|| sample_rows(share, scratch));
            }
            if let Some((share, scratch)) = own {
                sample_rows(share, scratch);
            }
        });
    }

    /// Sends the tokens and ends what has ended.
    pub(super) fn report(&mut self) {
        let now = self.now();
        let metrics = &self.shared.metrics;
        for target in &self.targets {
            let sequence = &mut self.scheduler.running[target.index];
            sequence.folded_tokens = self.runner.folded_tokens(sequence.block);
            sequence.events.set_folded_tokens(sequence.folded_tokens);
            let request_id = &sequence.request.request_id;
            match sequence.sampled.take() {
                Some(Sampled::Token(token)) => {
                    report_token(sequence, token, now, metrics, &mut self.workers);
                }
                Some(Sampled::Complete) => {
                    tell_started(sequence, now);
                    sequence.end = Some(End::Finished(FinishReason::Complete));
                }
                Some(Sampled::NonFiniteLogits) => {
                    metrics.non_finite_logits();
                    tracing::error!(request_id, "logits are not finite");
                    sequence.end = Some(End::Failed(EngineFailure::NonFiniteLogits));
                }
                Some(Sampled::Unsteerable(reason)) => {
                    metrics.steering().failed();
                    tracing::warn!(request_id, reason, "the steering of a sequence failed");
                    sequence.end = Some(End::Failed(EngineFailure::Unsteerable));
                }
                Some(Sampled::Broken(reason)) => {
                    metrics.steering().failed();
                    tracing::error!(request_id, reason, "the steering of a sequence has a bug");
                    sequence.end = Some(End::Failed(EngineFailure::Internal));
                }
                // Its guide is late.
                None => {}
            }
        }
    }

    /// Learns from a step and counts it.
    pub(super) fn count_step(&mut self, began: Duration) {
        let took = self.now().saturating_sub(began);
        // Rows of a held prompt run through some layers only and say nothing of others.
        if self.plan.held.is_none() {
            self.budget.observe(self.plan.num_rows(), took);
        }
        self.shared.metrics.step(StepFacts {
            prefill_rows: self.plan.prefill_rows,
            decode_rows: self.plan.decode_rows,
            sampled: self.targets.len(),
            took,
        });
    }
}

/// Samples a token for each of `jobs` into [`Sequence::sampled`].
fn sample_rows(jobs: &mut [Job<'_>], scratch: &mut SamplerScratch) {
    for (sequence, row) in jobs {
        sequence.sampled = sample_row(sequence, *row, scratch);
        if let (None, Some(steered)) = (row, &mut sequence.steered) {
            steered.drop_row();
        }
    }
}

/// What a row comes to; `row` is `None` for the one that the sequence kept.
fn sample_row(sequence: &mut Sequence, row: Option<&[f32]>, scratch: &mut SamplerScratch) -> Option<Sampled> {
    let Sequence { sampler, request, output_ids, steered, .. } = sequence;
    let (row, choice) = match steered {
        None => (row?, Choice::Free),
        Some(steered) => match steered.steer() {
            Steer::Choose(choice) => (row.or_else(|| steered.kept_row())?, choice),
            Steer::Complete => return Some(Sampled::Complete),
            Steer::Failed(reason) => return Some(Sampled::Unsteerable(reason.to_owned())),
            Steer::Broken(reason) => return Some(Sampled::Broken(reason.to_owned())),
            Steer::Unknown => return None,
        },
    };
    Some(match sampler.sample(row, request, output_ids, choice, scratch) {
        Ok(token) => Sampled::Token(token),
        Err(SampleFailure::NonFiniteLogits) => Sampled::NonFiniteLogits,
        Err(SampleFailure::NothingAllowed) => Sampled::Unsteerable("no token of the model is allowed".into()),
    })
}

/// Sends a token, or notes that it ends the sequence.
fn report_token(
    sequence: &mut Sequence,
    token: SampledToken,
    now: Duration,
    metrics: &EngineMetrics,
    workers: &mut Workers,
) {
    metrics.sampled(sequence, now);
    tell_started(sequence, now);
    sequence.times.last_token = Some(now);
    sequence.times.first_token.get_or_insert(now);
    let id = token.id;
    if sequence.request.sampling.stop_token_ids.contains(&id) {
        sequence.end = Some(End::Finished(FinishReason::Stop { token_id: id }));
        return;
    }
    sequence.output_ids.push(id);
    sequence.events.send(SequenceEvent::Token(token));
    let is_full = sequence.output_ids.len() >= sequence.max_new as usize;
    if let Some(steered) = &mut sequence.steered
        && steered.advance(id, !is_full, workers)
    {
        sequence.end = Some(End::Finished(FinishReason::Complete));
    } else if is_full {
        sequence.end = Some(End::Finished(FinishReason::Length));
    }
}

/// Sends `Started`, unless a token was sampled before.
fn tell_started(sequence: &Sequence, now: Duration) {
    if sequence.times.first_token.is_none() {
        let queue_time = sequence.times.started.unwrap_or(now).saturating_sub(sequence.times.arrived);
        let cached_tokens = sequence.cached_tokens;
        sequence.events.send(SequenceEvent::Started { queue_time, cached_tokens });
    }
}
