//! Where blocks meet snapshots: prompts go on from them, sequences leave some behind.
//!
//! A snapshot is a shortcut and nothing more: whatever goes wrong with one is logged and counted,
//! and the prompt is run as if there were none.

use std::time::Duration;

use locket_model::{BlockId, Error};

use super::Engine;
use crate::{
    FinishReason,
    handle::Shared,
    runner::Runner,
    sequence::{End, Sequence, WaitingRequest},
    snapshots::{Moment, Snapshots},
};

/// How long a request waits for the disk before its prompt is run after all.
const LOAD_PATIENCE: Duration = Duration::from_secs(10);

/// How a block was opened.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Opened {
    /// Prompt tokens that are in it.
    pub cached_tokens: u32,
    /// Of these, those that were folded.
    pub folded_tokens: u32,
}

/// Opens `block` for a request: with the longest snapshot of its prompt, or empty.
pub(super) fn open(
    runner: &mut Runner,
    snapshots: Option<&mut Snapshots>,
    shared: &Shared,
    waiting: &WaitingRequest,
    block: BlockId,
) -> Result<Opened, Error> {
    let (request, metrics) = (&waiting.request, shared.metrics.snapshots());
    let Some((snapshots, chain)) = snapshots.zip(waiting.chain.as_ref()) else {
        runner.open(block, request.cache)?;
        return Ok(Opened::default());
    };
    let mut opened = Opened::default();
    if let Some(snapshot) = snapshots.find(chain, chain.names(&request.prompt_ids)) {
        let began = shared.clock.now();
        match runner.import(block, &snapshot.image) {
            Ok(()) => {
                metrics.moved("import", shared.clock.now().saturating_sub(began));
                opened.cached_tokens = snapshot.key.len;
                opened.folded_tokens = runner.folded_tokens(block);
            }
            Err(error @ Error::Device(_)) => return Err(error),
            Err(error) => {
                tracing::warn!(request_id = request.request_id, %error, "a snapshot is refused");
                snapshots.discard(&snapshot.key);
            }
        }
    }
    if opened.cached_tokens == 0 {
        runner.open(block, request.cache)?;
    }
    metrics.looked_up(request.prompt_ids.len(), opened.cached_tokens);
    Ok(opened)
}

impl Engine {
    /// Begins to read a snapshot if the disk has a better one than RAM.
    pub(super) fn start_load(&mut self, waiting: &mut WaitingRequest) {
        let Some((snapshots, chain)) = self.snapshots.as_mut().zip(waiting.chain.as_ref()) else { return };
        if snapshots.start_load(waiting.order, chain, chain.names(&waiting.request.prompt_ids)) {
            waiting.loading_until = Some(self.shared.clock.now() + LOAD_PATIENCE);
        }
    }

    /// Lets requests go on whose snapshot is there, or has let them wait for too long.
    pub(super) fn finish_loads(&mut self) {
        let now = self.now();
        let Some(snapshots) = &mut self.snapshots else { return };
        let waiting = &mut self.scheduler.waiting;
        snapshots.finish_loads(|order| {
            if let Some(waiting) = waiting.iter_mut().find(|waiting| waiting.order == order) {
                waiting.loading_until = None;
            }
        });
        for waiting in waiting {
            if waiting.loading_until.is_some_and(|until| now >= until) {
                tracing::warn!(
                    request_id = waiting.request.request_id,
                    "the disk is slow; the prompt is run"
                );
                self.shared.metrics.snapshots().refused("slow");
                waiting.loading_until = None;
            }
        }
    }

    /// Takes what is due after a step, of sequences that go on.
    pub(super) fn take_snapshots(&mut self) {
        let Self { snapshots: Some(snapshots), plan, scheduler, runner, shared, .. } = self else { return };
        for part in &plan.parts {
            let sequence = &scheduler.running[part.index];
            let at = Some(sequence.num_cached);
            let moment = if sequence.request.snapshot_at == at {
                Moment::PromptEnd
            } else if sequence.num_cached.is_multiple_of(shared.config.snapshot_interval) {
                Moment::Border
            } else {
                continue;
            };
            // One that ends leaves the same state as its last one.
            if sequence.end.is_none() {
                take(snapshots, runner, shared, sequence, moment);
            }
        }
    }

    /// Takes the state of a sequence that has ended well and is about to leave.
    pub(super) fn take_last_snapshot(&mut self, leaving: usize) {
        let Self { snapshots: Some(snapshots), scheduler, runner, shared, .. } = self else { return };
        let sequence = &scheduler.running[leaving];
        let is_answered = matches!(
            sequence.end,
            Some(
                End::Satisfied
                    | End::Finished(
                        FinishReason::Stop { .. } | FinishReason::Complete | FinishReason::Length
                    )
            )
        );
        if is_answered && !sequence.is_prefill() {
            take(snapshots, runner, shared, sequence, Moment::TurnEnd);
        }
    }
}

/// Takes the state of `sequence` as it is now, unless it is there already.
fn take(snapshots: &mut Snapshots, runner: &Runner, shared: &Shared, sequence: &Sequence, moment: Moment) {
    let Some(chain) = &sequence.chain else { return };
    if !chain.is_named(sequence.num_cached) {
        return;
    }
    let mut tokens = sequence.cached_ids();
    chain.rename(&mut tokens);
    let key = chain.key(&tokens);
    if snapshots.has(&key) {
        return;
    }
    let began = shared.clock.now();
    match runner.export(sequence.block) {
        Ok(image) => {
            shared.metrics.snapshots().moved("export", shared.clock.now().saturating_sub(began));
            snapshots.keep(key, tokens, chain.settings(), image, moment);
        }
        Err(error) => {
            let request_id = &sequence.request.request_id;
            tracing::warn!(request_id, %error, "a snapshot could not be taken");
            shared.metrics.snapshots().refused("export_failed");
        }
    }
}
