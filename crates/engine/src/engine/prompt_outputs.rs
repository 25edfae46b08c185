//! What prompts give besides continuations: log-probabilities of their own tokens, and embeddings.

use std::{sync::Arc, time::Duration};

use super::{Engine, StepFailure};
use crate::{
    EngineFailure, FinishReason, GenerationRequest, PromptLogprobs, SequenceEvent,
    embedding::{POOLED_ROWS, Pool},
    scoring::{self, NotFinite, SCORED_ROWS, ScoreJob},
    sequence::{End, Sequence, SequenceId},
};

/// What a request wants of its prompt's rows, so far. The continuation that prefills the prompt
/// has it.
#[derive(Debug, Default)]
pub(crate) struct PromptOutputs {
    scores: Option<PromptLogprobs>,
    pool: Option<Pool>,
}

impl PromptOutputs {
    /// Nothing seen yet.
    pub(crate) fn new(request: &GenerationRequest) -> Self {
        Self {
            scores: request.prompt_logprobs.map(|_| PromptLogprobs::default()),
            pool: request.pooling.map(Pool::new),
        }
    }

    fn is_empty(&self) -> bool {
        self.scores.is_none() && self.pool.is_none()
    }
}

/// A row of the step that somebody wants something of.
#[derive(Debug, Clone, Copy)]
struct WantedRow {
    /// In the batch.
    row: u32,
    /// Place among the running sequences.
    index: usize,
    /// The prompt token that follows.
    next_id: u32,
}

impl Engine {
    /// Takes from the step that was just run what prompts are to give. Comes before the sequences
    /// are moved on.
    pub(super) fn read_prompt_rows(&mut self) -> Result<(), StepFailure> {
        let (mut scored, mut pooled) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for part in &self.plan.parts {
            let sequence = &self.scheduler.running[part.index];
            if sequence.is_prefill() && !sequence.outputs.is_empty() {
                want(sequence, part.index, first_row, part.rows, &mut scored, &mut pooled);
            }
            first_row += part.rows;
        }
        for rows in scored.chunks(SCORED_ROWS) {
            self.score_rows(rows)?;
        }
        for rows in pooled.chunks(POOLED_ROWS) {
            self.pool_rows(rows)?;
        }
        Ok(())
    }

    fn score_rows(&mut self, wanted: &[WantedRow]) -> Result<(), StepFailure> {
        let Self { runner, scheduler, scratch, .. } = self;
        let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
        let (logits, width) = runner.row_logits(&rows)?;
        let mut jobs: Vec<ScoreJob<'_>> = wanted
            .iter()
            .zip(logits.chunks_exact(width))
            .map(|(wanted, logits)| {
                let count = scheduler.running[wanted.index].request.prompt_logprobs.unwrap_or(0);
                ScoreJob { logits, id: wanted.next_id, count: count as usize, score: Err(NotFinite) }
            })
            .collect();
        scoring::score(&mut jobs, scratch);
        let scores: Vec<_> = jobs.into_iter().map(|job| job.score).collect();
        for (wanted, score) in wanted.iter().zip(scores) {
            let outputs = &mut self.scheduler.running[wanted.index].outputs;
            match (score, &mut outputs.scores) {
                (Ok((token, top)), Some(scores)) => scores.push(token, &top),
                (Ok(_), None) => {}
                (Err(NotFinite), _) => self.fail_prompt(wanted.index),
            }
        }
        Ok(())
    }

    fn pool_rows(&mut self, wanted: &[WantedRow]) -> Result<(), StepFailure> {
        let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
        let (states, width) = self.runner.row_states(&rows)?;
        let mut broken = Vec::new();
        for (wanted, state) in wanted.iter().zip(states.chunks_exact(width)) {
            if let Some(pool) = &mut self.scheduler.running[wanted.index].outputs.pool
                && pool.add(state).is_err()
            {
                broken.push(wanted.index);
            }
        }
        broken.into_iter().for_each(|index| self.fail_prompt(index));
        Ok(())
    }

    /// Ends all continuations of a prompt whose logits or states are not finite.
    fn fail_prompt(&mut self, leader: usize) {
        let Sequence { id, ref request, end, .. } = self.scheduler.running[leader];
        if end.is_some() {
            return;
        }
        self.shared.metrics.non_finite_logits();
        tracing::error!(request_id = request.request_id, "a prompt's logits are not finite");
        let failed = Some(End::Failed(EngineFailure::NonFiniteLogits));
        for sequence in &mut self.scheduler.running {
            if sequence.id == id || sequence.leader == Some(id) {
                sequence.end = sequence.end.or(failed);
            }
        }
    }

    /// A prompt is wholly in its block: hands out what it gave. A request without tokens to generate
    /// has ended then, with all its continuations.
    pub(super) fn finish_prompt(&mut self, leader: usize) {
        let folded_tokens = self.runner.folded_tokens(self.scheduler.running[leader].block);
        let sequence = &mut self.scheduler.running[leader];
        let PromptOutputs { scores, pool } = std::mem::take(&mut sequence.outputs);
        let scores = scores.map(Arc::new);
        let (id, started, max_new) = (sequence.id, sequence.times.started, sequence.max_new);
        let now = self.shared.clock.now();
        for sequence in &mut self.scheduler.running {
            if sequence.id != id && sequence.leader != Some(id) {
                continue;
            }
            // Those that wait for the prompt were told nothing yet, so there is room.
            if let Some(scores) = &scores {
                sequence.events.send(SequenceEvent::PromptLogprobs(Arc::clone(scores)));
            }
            if max_new == 0 {
                if sequence.id != id {
                    sequence.leader = None;
                    sequence.folded_before = folded_tokens;
                    sequence.times.started = started;
                }
                sequence.folded_tokens = folded_tokens;
                end_without_tokens(sequence, now);
            }
        }
        if let Some(pool) = pool {
            let embedding = SequenceEvent::Embedding(pool.finish());
            self.scheduler.running[leader].events.send(embedding);
        }
    }

    /// What the prompt of `leaving` gave so far goes to the one who takes it over.
    pub(super) fn hand_over_outputs(&mut self, leaving: usize, heir: SequenceId) {
        let outputs = std::mem::take(&mut self.scheduler.running[leaving].outputs);
        if let Some(heir) = self.scheduler.running.iter_mut().find(|sequence| sequence.id == heir) {
            heir.outputs = outputs;
        }
    }
}

/// Notes which of `rows` rows, from `first_row` of the batch, are wanted of a sequence.
fn want(
    sequence: &Sequence,
    index: usize,
    first_row: u32,
    rows: u32,
    scored: &mut Vec<WantedRow>,
    pooled: &mut Vec<WantedRow>,
) {
    let (len, ids) = (sequence.prompt_len(), &sequence.request.prompt_ids);
    for (row, position) in (first_row..first_row + rows).zip(sequence.num_cached..) {
        let next_id = ids.get(position as usize + 1).copied();
        if let Some(next_id) = next_id.filter(|_| sequence.outputs.scores.is_some()) {
            scored.push(WantedRow { row, index, next_id });
        }
        if sequence.outputs.pool.as_ref().is_some_and(|pool| pool.wants(position, len)) {
            pooled.push(WantedRow { row, index, next_id: 0 });
        }
    }
}

/// Ends a continuation that generates nothing.
fn end_without_tokens(sequence: &mut Sequence, now: Duration) {
    let queue_time = sequence.times.started.unwrap_or(now).saturating_sub(sequence.times.arrived);
    sequence.events.set_folded_tokens(sequence.folded_tokens);
    sequence.events.send(SequenceEvent::Started { queue_time, cached_tokens: sequence.cached_tokens });
    sequence.end = sequence.end.or(Some(End::Finished(FinishReason::Length)));
}
