//! Starts the engine and owns its thread.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use locket_model::{Extras, Model};
use prometheus::Registry;

use crate::{
    EngineConfig, EngineFacts, EngineFailure, EngineHandle, EngineStatus, Error,
    block_pool::BlockPool,
    budget::RowBudget,
    clock::{Clock, MonotonicClock},
    config::CHUNK_ROWS,
    engine::{Engine, Turn, panic_message},
    handle::{Door, Shared},
    metrics::EngineMetrics,
    runner::Runner,
    sampler::SamplerScratch,
    scheduler::{Limits, Scheduler, StepPlan},
    snapshots::Snapshots,
    steering::Workers,
};

/// The engine's thread; ends after [`EngineHandle::drain`], after a device error, or when all
/// handles and streams are gone.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<Result<(), Error>>,
}

impl EngineThread {
    /// Waits for the thread. Blocks; call it outside of an async runtime.
    ///
    /// # Errors
    /// [`Error::Died`] if a device error or a bug stopped the engine.
    pub fn join(self) -> Result<(), Error> {
        self.thread.join().unwrap_or_else(|panic| Err(Error::Died(panic_message(panic.as_ref()))))
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Starts the engine thread, runs one step to warm up and returns when the engine is ready.
///
/// # Errors
/// [`Error::Config`] for settings that cannot work with this model, [`Error::Metrics`] if
/// `registry` has an engine already, [`Error::Thread`], [`Error::WarmUp`].
pub fn start(
    model: Box<dyn Model>,
    config: EngineConfig,
    registry: &Registry,
) -> Result<(EngineHandle, EngineThread), Error> {
    let (mut engine, handle) = build(model, config, registry, Arc::new(MonotonicClock::new()))?;
    let (warm, warmed) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("locket-engine".into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| engine.warm_up()));
        let outcome = outcome.unwrap_or_else(|panic| Err(Error::WarmUp(panic_message(panic.as_ref()))));
        let is_warm = outcome.is_ok();
        // The receiver waits below for exactly this message.
        let _ = warm.send(outcome);
        if is_warm { engine.serve() } else { Ok(()) }
    })?;
    warmed.recv().unwrap_or_else(|_| Err(Error::WarmUp("the engine thread ended".into())))?;
    Ok((handle, EngineThread { thread }))
}

/// Makes an engine that does not run yet, and its handle.
pub(crate) fn build(
    mut model: Box<dyn Model>,
    config: EngineConfig,
    registry: &Registry,
    clock: Arc<dyn Clock>,
) -> Result<(Engine, EngineHandle), Error> {
    config.validate()?;
    if config.extras != Extras::default() {
        let refused = |error| Error::Config { field: "extras", reason: format!("cannot be: {error}") };
        model.reserve(&config.extras).map_err(refused)?;
    }
    let max_rows = config.max_batch_rows.min(model.max_batch_rows());
    if max_rows < 2 * CHUNK_ROWS {
        let reason = format!("is cut down to {max_rows} by the model's workspace, must be at least 32");
        return Err(Error::Config { field: "max_batch_rows", reason });
    }
    let facts = EngineFacts::of(model.as_ref());
    if facts.cache.num_blocks() == 0 {
        return Err(Error::Config { field: "cache", reason: "has no blocks: nothing could ever run".into() });
    }
    let metrics = EngineMetrics::register(registry, &config, &facts)?;
    let limits = Limits {
        max_rows,
        prefill_chunk: config.prefill_chunk,
        max_running: config.max_running,
        snapshot_interval: config.snapshot_interval,
        patience: config.patience(),
    };
    let scheduler = Scheduler::new(BlockPool::new(&facts.cache), limits);
    let budget = RowBudget::new(config.target_step, max_rows);
    let scratch = (0..config.effective_sampler_threads()).map(|_| SamplerScratch::default()).collect();
    // Waiting sequences are counted before they are sent, so there is always room for them; one
    // more place each is for the one wake-up and the one adapter that may be under way.
    let (sender, commands) = mpsc::sync_channel(config.max_waiting + 2);
    let shared = Arc::new(Shared::new(facts, config, metrics, clock));
    let door = Arc::new(Door::new(Arc::clone(&shared), sender));
    let snapshots = Snapshots::open(&shared, door.bell())?;
    let workers = Workers::new(&shared, door.bell());
    let handle = EngineHandle::new(door);
    let engine = Engine {
        shared,
        commands,
        scheduler,
        runner: Runner::new(model),
        snapshots,
        workers,
        budget,
        plan: StepPlan::default(),
        targets: Vec::new(),
        scratch,
        num_steps: 0,
        next_id: 0,
        unloading: Vec::new(),
        is_abandoned: false,
        drain_deadline: None,
        last_failure: None,
    };
    Ok((engine, handle))
}

impl Engine {
    /// Runs one full step before anybody waits for it, and measures a row's time.
    fn warm_up(&mut self) -> Result<(), Error> {
        let max_rows = self.shared.config.max_batch_rows.min(self.runner.model().max_batch_rows());
        let clock = Arc::clone(&self.shared.clock);
        let warmed = self.runner.warm_up(max_rows, clock.as_ref());
        let (rows, took) = warmed.map_err(|error| Error::WarmUp(error.to_string()))?;
        tracing::info!(rows, ?took, "engine is warm");
        self.budget.observe(rows, took);
        Ok(())
    }

    /// Turns until the engine stops.
    fn serve(mut self) -> Result<(), Error> {
        loop {
            let turn = catch_unwind(AssertUnwindSafe(|| self.turn()));
            // A panic outside of a step means that the bookkeeping itself cannot be trusted.
            match turn.unwrap_or_else(|panic| self.give_up(panic_message(panic.as_ref()))) {
                Turn::Worked => {}
                Turn::Idle => self.wait(),
                Turn::Stopped => {
                    self.shared.set_status(EngineStatus::Stopped);
                    self.fail_waiting(EngineFailure::ShuttingDown);
                    if let Some(snapshots) = &mut self.snapshots {
                        snapshots.close();
                    }
                    return Ok(());
                }
                Turn::Dead(reason) => return Err(Error::Died(reason)),
            }
        }
    }

    /// Ends without looking at the bookkeeping: readers get their last event from their streams,
    /// whose senders are dropped with the engine.
    fn give_up(&mut self, reason: String) -> Turn {
        tracing::error!(reason, "the engine stops");
        self.shared.set_status(EngineStatus::Dead);
        Turn::Dead(reason)
    }
}
