//! How sequences end: one by one, with their step, or all of them with the device.

use std::time::Duration;

use super::{Engine, Turn};
use crate::{
    EngineFailure, EngineStatus, SequenceEvent,
    sequence::{End, Sequence, SequenceId},
};

/// Two failed steps within this time turn readiness off for as long.
const UNSTEADY: Duration = Duration::from_secs(60);

impl Engine {
    /// Ends the sequences of a step that failed, and those that wait for their prompts.
    pub(super) fn fail_step(&mut self, reason: &str) {
        tracing::error!(reason, rows = self.plan.num_rows(), "a step failed; its sequences end");
        self.shared.metrics.step_failed();
        let now = self.now();
        if self.last_failure.is_some_and(|last| now.saturating_sub(last) < UNSTEADY) {
            self.shared.set_unsteady_until(now + UNSTEADY);
        }
        self.last_failure = Some(now);
        let failed = Some(End::Failed(EngineFailure::Internal));
        let mut leaders: Vec<SequenceId> = Vec::with_capacity(self.plan.parts.len());
        for part in self.plan.parts.iter().chain(&self.plan.held) {
            let sequence = &mut self.scheduler.running[part.index];
            sequence.end = sequence.end.or(failed);
            leaders.push(sequence.id);
        }
        for target in &self.targets {
            let sequence = &mut self.scheduler.running[target.index];
            sequence.end = sequence.end.or(failed);
        }
        for sequence in &mut self.scheduler.running {
            // `started` without a token: copies of this step's prompts that were not sampled yet.
            let lost_leader = sequence.leader.is_some_and(|leader| leaders.contains(&leader));
            let is_new_copy = sequence.last_step == self.num_steps;
            if lost_leader || is_new_copy {
                sequence.end = sequence.end.or(failed);
            }
        }
    }

    /// Lets sequences that have ended leave: scrubs and gives back their blocks, then tells their
    /// readers, so that whoever sees the end also sees the room.
    pub(super) fn retire(&mut self) {
        let mut leaving = Vec::new();
        let mut index = 0;
        while index < self.scheduler.running.len() {
            if self.scheduler.running[index].end.is_none() {
                index += 1;
                continue;
            }
            self.pass_prefill_on(index);
            self.take_last_snapshot(index);
            let mut sequence = self.scheduler.running.remove(index);
            if let Some(steered) = sequence.steered.take() {
                steered.leave(sequence.id, &self.workers);
            }
            self.runner.close(sequence.block);
            self.scheduler.pool.give_back(sequence.block);
            leaving.push(sequence);
        }
        self.tell_state();
        self.say_goodbye(leaving);
    }

    /// Ends everything after a device error. Blocks are not scrubbed: the device is gone.
    pub(crate) fn die(&mut self, reason: String) -> Turn {
        tracing::error!(reason, "the engine stops");
        self.shared.set_status(EngineStatus::Dead);
        self.fail_waiting(EngineFailure::Internal);
        let failed = End::Failed(EngineFailure::Internal);
        let mut leaving = std::mem::take(&mut self.scheduler.running);
        for sequence in &mut leaving {
            sequence.end = sequence.end.or(Some(failed));
            self.scheduler.pool.give_back(sequence.block);
        }
        self.tell_state();
        self.say_goodbye(leaving);
        Turn::Dead(reason)
    }

    fn say_goodbye(&self, leaving: Vec<Sequence>) {
        let now = self.now();
        for sequence in leaving {
            let Some(end) = sequence.end else { continue };
            self.shared.metrics.ended(&sequence, end, now);
            match end {
                End::Finished(reason) => {
                    let folded_tokens = sequence.folded_tokens;
                    sequence.events.send(SequenceEvent::Finished { reason, folded_tokens });
                }
                End::Failed(failure) => sequence.events.send(SequenceEvent::Failed(failure)),
                End::Satisfied | End::Aborted => {}
            }
            tracing::debug!(
                request_id = sequence.request.request_id,
                choice = sequence.choice,
                ?end,
                tokens = sequence.output_ids.len(),
                "sequence ended"
            );
        }
    }

    /// The prompt of a request belongs to all its continuations: if the reader of the one that
    /// prefills it leaves, the next one takes over its block.
    fn pass_prefill_on(&mut self, leaving: usize) {
        let Sequence {
            id, block, num_cached, times, ref request, leader, cached_tokens, folded_before, ..
        } = self.scheduler.running[leaving];
        if request.n == 1 || leader.is_some() || self.scheduler.running[leaving].end != Some(End::Aborted) {
            return;
        }
        let mut heir: Option<SequenceId> = None;
        let mut freed = block;
        for sequence in &mut self.scheduler.running {
            if sequence.leader != Some(id) || sequence.end.is_some() {
                continue;
            }
            sequence.leader = heir;
            if heir.is_none() {
                heir = Some(sequence.id);
                freed = std::mem::replace(&mut sequence.block, block);
                sequence.num_cached = num_cached;
                sequence.cached_tokens = cached_tokens;
                sequence.folded_before = folded_before;
                sequence.times.started = times.started;
            }
        }
        self.scheduler.running[leaving].block = freed;
        if let Some(heir) = heir {
            self.hand_over_outputs(leaving, heir);
        }
    }
}
