//! The loop: receive, schedule, run, sample, report.
//!
//! One turn is one step of the model. Everything that can change between two steps (new requests,
//! readers that left, time limits, draining) is taken in by `receive`, so a step never sees a
//! half-made change.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::Duration,
};

use crate::{
    EngineFailure, EngineStatus,
    budget::RowBudget,
    handle::{Command, Shared},
    metrics,
    runner::Runner,
    sampler::SamplerScratch,
    scheduler::{Scheduler, StepPlan},
    sequence::{End, Sequence},
    snapshots::Snapshots,
    steering::Workers,
};

mod admission;
mod ending;
mod prompt_outputs;
mod resume;
mod sampling;

pub(crate) use admission::fail;
pub(crate) use prompt_outputs::PromptOutputs;
use sampling::{Row, Target};

/// What a turn came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// A step was run.
    Worked,
    /// Nothing can run until a command arrives or time passes.
    Idle,
    /// Drained, or all handles are gone.
    Stopped,
    /// A device error; the reason.
    Dead(String),
}

/// Why a step did not end.
enum StepFailure {
    /// The next step may work: an own bug, confined to the sequences of the step.
    Internal(String),
    /// The model must not be used again.
    Device(String),
}

impl From<locket_model::Error> for StepFailure {
    fn from(error: locket_model::Error) -> Self {
        match error {
            locket_model::Error::InvalidBatch(_) => Self::Internal(error.to_string()),
            _ => Self::Device(error.to_string()),
        }
    }
}

/// Everything that the engine thread owns.
pub(crate) struct Engine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) scheduler: Scheduler,
    pub(crate) runner: Runner,
    /// States kept for later prompts, unless turned off.
    pub(crate) snapshots: Option<Snapshots>,
    /// Who computes what may come next.
    pub(crate) workers: Workers,
    pub(crate) budget: RowBudget,
    pub(crate) plan: StepPlan,
    /// Sequences that get a token in this step.
    pub(crate) targets: Vec<Target>,
    /// One per sampling thread.
    pub(crate) scratch: Vec<SamplerScratch>,
    pub(crate) num_steps: u64,
    pub(crate) next_id: u64,
    /// Adapters that are forgotten once no sequence goes through them.
    pub(crate) unloading: Vec<locket_model::AdapterId>,
    /// All handles and streams are gone.
    pub(crate) is_abandoned: bool,
    /// When draining must end.
    pub(crate) drain_deadline: Option<Duration>,
    pub(crate) last_failure: Option<Duration>,
}

impl Engine {
    /// One turn: at most one step.
    pub(crate) fn turn(&mut self) -> Turn {
        self.num_steps += 1;
        self.plan.clear();
        self.targets.clear();
        self.receive();
        let has_caught_up = match self.catch_up() {
            Ok(has_caught_up) => has_caught_up,
            Err(stopped) => return stopped,
        };
        match self.schedule() {
            Ok(true) => {}
            Ok(false) if has_caught_up => return Turn::Worked,
            Ok(false) => return self.rest(),
            Err(reason) => return self.die(reason),
        }
        self.guarded(Self::step).map_or_else(|stopped| stopped, |()| Turn::Worked)
    }

    /// Samples rows that had to wait for their guides, if any of these are there now.
    fn catch_up(&mut self) -> Result<bool, Turn> {
        self.collect_guides();
        self.find_kept_rows();
        if self.targets.is_empty() {
            return Ok(false);
        }
        self.guarded(|engine| {
            engine.sample();
            engine.report();
            Ok(())
        })?;
        self.targets.clear();
        Ok(true)
    }

    /// One step of the model and all that follows from it.
    fn step(&mut self) -> Result<(), StepFailure> {
        let began = self.now();
        self.run()?;
        self.collect_guides();
        self.sample();
        self.report();
        self.count_step(began);
        self.take_snapshots();
        Ok(())
    }

    /// Does a part of a turn; what it fails at costs the sequences that it was about. Those that have
    /// ended leave. An error is how the turn ends then.
    fn guarded(&mut self, part: impl FnOnce(&mut Self) -> Result<(), StepFailure>) -> Result<(), Turn> {
        let done = catch_unwind(AssertUnwindSafe(|| part(self)));
        let done = done.unwrap_or_else(|panic| Err(StepFailure::Internal(panic_message(panic.as_ref()))));
        let done = match done {
            Ok(()) => Ok(()),
            Err(StepFailure::Internal(reason)) => {
                self.fail_step(&reason);
                Err(Turn::Worked)
            }
            Err(StepFailure::Device(reason)) => return Err(self.die(reason)),
        };
        self.retire();
        done
    }

    /// Takes in what happened since the last step.
    fn receive(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.is_abandoned = true;
                    break;
                }
            }
        }
        self.finish_loads();
        self.drop_waiting();
        for sequence in &mut self.scheduler.running {
            if sequence.events.is_closed() {
                let is_satisfied = sequence.events.is_satisfied();
                sequence.end = Some(if is_satisfied { End::Satisfied } else { End::Aborted });
            }
        }
        self.check_drain();
        self.retire();
        self.unload_adapters();
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(mut waiting) => {
                if self.has_adapter(&waiting) {
                    self.start_load(&mut waiting);
                    self.scheduler.enqueue(*waiting);
                }
            }
            Command::LoadAdapter(load) => self.load_adapter(*load),
            Command::UnloadAdapter(id) => self.unloading.push(id),
            // Cleared before anything is looked at: what changes later rings again.
            Command::Wake => self.shared.wake_pending.store(false, Ordering::SeqCst),
        }
    }

    /// Starts what fits and plans a step; `false` if nothing can run. An error is a device error.
    fn schedule(&mut self) -> Result<bool, String> {
        self.admit()?;
        self.scheduler.plan(|decode_rows| self.budget.rows(decode_rows), &mut self.plan);
        Ok(!self.plan.is_empty())
    }

    /// Runs the planned rows; continuations of a request whose prompt is complete get its state.
    fn run(&mut self) -> Result<(), StepFailure> {
        let now = self.now();
        for part in self.plan.parts.iter().chain(&self.plan.held) {
            let sequence = &mut self.scheduler.running[part.index];
            sequence.last_step = self.num_steps;
            if sequence.times.started.is_none() {
                sequence.times.started = Some(now);
                self.shared.metrics.started(now.saturating_sub(sequence.times.arrived));
            }
        }
        self.runner.run(&self.plan, &self.scheduler.running)?;
        self.read_prompt_rows()?;
        let mut row = 0;
        for at in 0..self.plan.parts.len() {
            let part = self.plan.parts[at];
            let sequence = &mut self.scheduler.running[part.index];
            let was_prefill = sequence.is_prefill();
            sequence.num_cached += part.rows;
            let is_complete = was_prefill && !sequence.is_prefill();
            // One whose prompt could not be scored has ended.
            let goes_on = sequence.end.is_none();
            if is_complete && goes_on {
                let prompt_tokens = sequence.request.prompt_ids.len();
                self.shared.metrics.prefilled(prompt_tokens, sequence.cached_tokens);
                self.finish_prompt(part.index);
            }
            if part.sample {
                if goes_on {
                    self.targets.push(Target { index: part.index, row: Row::OfStep(row) });
                    if is_complete {
                        self.copy_to_followers(part.index, row)?;
                    }
                }
                row += 1;
            }
        }
        self.run_held(row)
    }

    /// Runs a part of a prompt that is split by layers; `row` is where its logits come to among those of
    /// the step.
    fn run_held(&mut self, row: usize) -> Result<(), StepFailure> {
        let Some(part) = self.plan.held else { return Ok(()) };
        if !self.runner.advance_held(&self.scheduler.running[part.index], part.rows as usize)? {
            return Ok(());
        }
        let sequence = &mut self.scheduler.running[part.index];
        sequence.num_cached = sequence.prompt_len();
        self.shared.metrics.prefilled(sequence.request.prompt_ids.len(), 0);
        self.finish_prompt(part.index);
        self.targets.push(Target { index: part.index, row: Row::OfStep(row) });
        self.copy_to_followers(part.index, row)
    }

    /// Gives the state of a prompt that was just completed to the continuations that waited for
    /// it. They sample from the same row of logits, each with its own seed.
    fn copy_to_followers(&mut self, leader: usize, row: usize) -> Result<(), StepFailure> {
        let Sequence { id, block, num_cached, times, cached_tokens, .. } = self.scheduler.running[leader];
        let folded_tokens = self.runner.folded_tokens(block);
        for (index, sequence) in self.scheduler.running.iter_mut().enumerate() {
            if sequence.leader != Some(id) {
                continue;
            }
            sequence.leader = None;
            sequence.last_step = self.num_steps;
            sequence.times.started = times.started;
            let queue_time = times.started.unwrap_or_default().saturating_sub(sequence.times.arrived);
            self.shared.metrics.started(queue_time);
            if let Err(error) = self.runner.copy(block, sequence.block) {
                sequence.end = Some(End::Failed(EngineFailure::Internal));
                return Err(error.into());
            }
            sequence.num_cached = num_cached;
            sequence.cached_tokens = cached_tokens;
            sequence.folded_before = folded_tokens;
            self.targets.push(Target { index, row: Row::OfStep(row) });
        }
        Ok(())
    }

    /// Nothing to run: stop, or wait for something to happen.
    fn rest(&mut self) -> Turn {
        let is_ending = self.is_abandoned || self.shared.status() == EngineStatus::Draining;
        if self.scheduler.running.is_empty() {
            // The idle check: a block that is taken now is lost for ever.
            assert!(self.scheduler.pool.is_all_free(), "nothing runs, but blocks are taken");
        }
        if is_ending && self.scheduler.is_empty() { Turn::Stopped } else { Turn::Idle }
    }

    /// Blocks the thread until a command arrives or a time limit is reached.
    pub(crate) fn wait(&mut self) {
        let received = match self.next_deadline() {
            Some(deadline) => self.commands.recv_timeout(deadline.saturating_sub(self.now())),
            None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(command) => self.handle(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.is_abandoned = true,
        }
    }

    /// Publishes the state between two steps.
    fn tell_state(&self) {
        let Scheduler { running, waiting, pool, .. } = &self.scheduler;
        self.shared.set_cache_usage(metrics::usage(pool));
        let queue = metrics::Queue {
            waiting,
            num_waiting: self.shared.num_waiting(),
            is_crowded: running.len() >= self.shared.config.max_running,
            now: self.now(),
        };
        self.shared.metrics.set_state(running, &queue, pool);
    }

    pub(crate) fn now(&self) -> Duration {
        self.shared.clock.now()
    }
}

/// The text of a panic.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without text".into())
}
