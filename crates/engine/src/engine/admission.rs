//! The waiting side of the loop: admission, time limits, draining.

use std::{sync::Arc, time::Duration};

use crate::{
    EngineFailure, EngineStatus, GenerationRequest, SequenceEvent,
    sampler::SequenceSampler,
    sequence::{End, Sequence, SequenceId, Times, WaitingRequest},
    steering::Steered,
};

use super::{
    Command, Engine, PromptOutputs, StepFailure,
    resume::{self, Opened},
};

/// Output tokens for which room is made at the start.
const OUTPUT_RESERVE: u32 = 1024;

impl Engine {
    /// Starts the waiting requests that fit. An error is a device error.
    pub(super) fn admit(&mut self) -> Result<(), String> {
        self.scheduler.age(self.shared.clock.now());
        let Self { scheduler, runner, shared, next_id, snapshots, .. } = self;
        let vocab_size = shared.facts.model.vocab_size;
        let already_running = scheduler.running.len();
        let mut device_error = None;
        let mut has_failed = false;
        scheduler.admit(|waiting, blocks| {
            shared.release_waiting(blocks.len());
            let leader = SequenceId(*next_id);
            *next_id += blocks.len() as u64;
            let (mut opened, mut end) = (Opened::default(), None);
            // The others get the state of the first one when the prompt is complete.
            match resume::open(runner, snapshots.as_mut(), shared, &waiting, blocks[0]) {
                Ok(resumed) => opened = resumed,
                Err(error) => {
                    tracing::error!(request_id = waiting.request.request_id, %error, "cannot open a block");
                    end = Some(End::Failed(EngineFailure::Internal));
                    has_failed = true;
                    if let StepFailure::Device(reason) = error.into() {
                        device_error = Some(reason);
                    }
                }
            }
            start(waiting, blocks, leader, opened, end, vocab_size)
        });
        self.begin_steering(already_running);
        match device_error {
            Some(reason) => return Err(reason),
            None if has_failed => self.retire(),
            None => {}
        }
        Ok(())
    }

    /// Has the first guides of sequences that have just started computed, while their prompts run.
    fn begin_steering(&mut self, already_running: usize) {
        let Self { scheduler, workers, .. } = self;
        for sequence in &mut scheduler.running[already_running..] {
            if let Some(steered) = &mut sequence.steered
                && sequence.end.is_none()
            {
                steered.begin(workers);
            }
        }
    }

    /// Removes waiting sequences whose reader has left or whose time is up.
    pub(super) fn drop_waiting(&mut self) {
        let now = self.now();
        let limit = self.shared.config.queue_timeout;
        let Self { scheduler, shared, .. } = self;
        scheduler.waiting.retain_mut(|waiting| {
            let before = waiting.sequences.len();
            waiting.sequences.retain(|sequence| !sequence.events.is_closed());
            let aborted = before - waiting.sequences.len();
            shared.release_waiting(aborted);
            (0..aborted).for_each(|_| shared.metrics.ended_waiting(End::Aborted));
            if !limit.is_zero() && now.saturating_sub(waiting.arrived) >= limit {
                shared.release_waiting(waiting.sequences.len());
                fail(waiting, EngineFailure::QueueTimeout, shared);
                return false;
            }
            !waiting.sequences.is_empty()
        });
    }

    /// Ends everything that is left once the drain time is over.
    pub(super) fn check_drain(&mut self) {
        if self.shared.status() != EngineStatus::Draining {
            return;
        }
        let now = self.now();
        let deadline = *self.drain_deadline.get_or_insert(now + self.shared.config.drain_timeout);
        if now < deadline {
            return;
        }
        self.fail_waiting(EngineFailure::ShuttingDown);
        for sequence in &mut self.scheduler.running {
            sequence.end = sequence.end.or(Some(End::Failed(EngineFailure::ShuttingDown)));
        }
    }

    /// Ends all waiting requests, those in the channel included.
    pub(crate) fn fail_waiting(&mut self, failure: EngineFailure) {
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(waiting) = command {
                self.scheduler.enqueue(*waiting);
            }
        }
        for waiting in std::mem::take(&mut self.scheduler.waiting) {
            self.shared.release_waiting(waiting.sequences.len());
            fail(&waiting, failure, &self.shared);
        }
    }

    /// When time alone will change something.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let limit = self.shared.config.queue_timeout;
        let oldest = self.scheduler.waiting.iter().map(|waiting| waiting.arrived).min();
        let queue = oldest.filter(|_| !limit.is_zero()).map(|arrived| arrived + limit);
        let loading = self.scheduler.waiting.iter().filter_map(|waiting| waiting.loading_until).min();
        [queue, loading, self.drain_deadline].into_iter().flatten().min()
    }
}

/// Tells the readers of a waiting request that it has failed.
pub(crate) fn fail(waiting: &WaitingRequest, failure: EngineFailure, shared: &crate::handle::Shared) {
    for sequence in &waiting.sequences {
        shared.metrics.ended_waiting(End::Failed(failure));
        sequence.events.send(SequenceEvent::Failed(failure));
    }
}

/// Makes running sequences of a waiting request: the first prefills, the others follow it.
fn start(
    waiting: WaitingRequest,
    blocks: Vec<locket_model::BlockId>,
    leader: SequenceId,
    opened: Opened,
    end: Option<End>,
    vocab_size: usize,
) -> impl Iterator<Item = Sequence> {
    let WaitingRequest { request, sequences, arrived, seed, max_new, chain, .. } = waiting;
    let steered = move |id, request: &Arc<GenerationRequest>, choice| {
        request.steering.as_ref().map(|_| Box::new(Steered::new(id, request, choice, vocab_size)))
    };
    sequences.into_iter().zip(blocks).enumerate().map(move |(at, (sequence, block))| Sequence {
        id: SequenceId(leader.0 + at as u64),
        choice: sequence.choice,
        block,
        leader: (at > 0).then_some(leader),
        num_cached: if at == 0 { opened.cached_tokens } else { 0 },
        output_ids: Vec::with_capacity(max_new.min(OUTPUT_RESERVE) as usize),
        max_new,
        chain: chain.clone(),
        cached_tokens: opened.cached_tokens,
        folded_tokens: opened.folded_tokens,
        folded_before: opened.folded_tokens,
        outputs: if at == 0 { PromptOutputs::new(&request) } else { PromptOutputs::default() },
        sampler: SequenceSampler::new(&request, sequence.choice, seed),
        steered: steered(SequenceId(leader.0 + at as u64), &request, sequence.choice),
        sampled: None,
        events: sequence.events,
        times: Times { arrived, started: None, first_token: None, last_token: None },
        last_step: 0,
        end,
        request: Arc::clone(&request),
    })
}
