//! The engine as the server sees it: submit, watch, drain.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    mpsc::{SyncSender, TrySendError},
};

use locket_model::{
    Adapter, AdapterId, Extras, MemoryUse, Model, ModelConfig,
    kv_cache::{CacheMethod, CachePlan, CacheSettings},
};

use crate::{
    GenerationRequest, SubmitError,
    adapters::{Adapters, LoadAdapter},
    clock::Clock,
    config::EngineConfig,
    metrics::EngineMetrics,
    sequence::{WaitingRequest, WaitingSequence},
    snapshots::{self, Digest, KeyChain},
    stream::{self, SequenceStream},
    visual,
};

/// Life of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EngineStatus {
    /// Model loaded and warmed up.
    Ready,
    /// Takes nothing new, finishes what runs.
    Draining,
    /// Stopped on purpose.
    Stopped,
    /// Stopped after a device error.
    Dead,
}

/// What never changes after start.
#[derive(Debug, Clone)]
pub struct EngineFacts {
    /// Geometry.
    pub model: ModelConfig,
    /// Blocks.
    pub cache: CachePlan,
    /// Bytes by pool.
    pub memory: MemoryUse,
    /// Room for adapters, and for prompts whose images lose tokens inside the decoder.
    pub extras: Extras,
}

impl EngineFacts {
    /// What `model` says of itself.
    pub(crate) fn of(model: &dyn Model) -> Self {
        Self {
            model: model.config().clone(),
            cache: model.cache_plan().clone(),
            memory: model.memory(),
            extras: model.extras(),
        }
    }
}

/// What handles and the engine thread share. All of it is atomic but the adapters, whose lock is held for a
/// look at a map.
pub(crate) struct Shared {
    pub facts: EngineFacts,
    pub config: EngineConfig,
    pub metrics: EngineMetrics,
    pub clock: Arc<dyn Clock>,
    /// Base of the seeds of requests without one.
    pub seed: u64,
    /// What all snapshots have in common; `None` if there are to be none.
    pub fingerprint: Option<Digest>,
    status: AtomicU8,
    /// Sequences that were submitted and have no block yet.
    num_waiting: AtomicUsize,
    /// Share of slots taken, the bits of an f64.
    cache_usage: AtomicU64,
    next_order: AtomicU64,
    /// Until when readiness is off, in milliseconds of the clock.
    unsteady_until_ms: AtomicU64,
    /// Whether a [`Command::Wake`] is in the channel: one is enough.
    pub wake_pending: AtomicBool,
    /// Adapters that requests may name.
    pub adapters: Adapters,
}

impl Shared {
    pub(crate) fn new(
        facts: EngineFacts,
        config: EngineConfig,
        metrics: EngineMetrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let seed = config.seed.unwrap_or_else(rand::random);
        let fingerprint = (config.snapshot_memory_bytes > 0).then(|| snapshots::fingerprint(&config, &facts));
        Self {
            facts,
            config,
            metrics,
            clock,
            seed,
            fingerprint,
            status: AtomicU8::new(EngineStatus::Ready as u8),
            num_waiting: AtomicUsize::new(0),
            cache_usage: AtomicU64::new(0.0f64.to_bits()),
            next_order: AtomicU64::new(0),
            unsteady_until_ms: AtomicU64::new(0),
            wake_pending: AtomicBool::new(false),
            adapters: Adapters::default(),
        }
    }

    pub(crate) fn status(&self) -> EngineStatus {
        match self.status.load(Ordering::SeqCst) {
            0 => EngineStatus::Ready,
            1 => EngineStatus::Draining,
            2 => EngineStatus::Stopped,
            _ => EngineStatus::Dead,
        }
    }

    pub(crate) fn set_status(&self, status: EngineStatus) {
        self.status.store(status as u8, Ordering::SeqCst);
    }

    fn start_draining(&self) {
        let (from, to) = (EngineStatus::Ready as u8, EngineStatus::Draining as u8);
        // Refused if the engine drains already or has stopped; both are fine.
        let _ = self.status.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Counts `count` more waiting sequences unless that would exceed the bound.
    fn reserve_waiting(&self, count: usize) -> bool {
        let limit = self.config.max_waiting;
        let add = |waiting: usize| waiting.checked_add(count).filter(|&sum| sum <= limit);
        self.num_waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).is_ok()
    }

    /// Takes `count` sequences out of the count of waiting ones.
    pub(crate) fn release_waiting(&self, count: usize) {
        self.num_waiting.fetch_sub(count, Ordering::SeqCst);
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.num_waiting.load(Ordering::SeqCst)
    }

    /// Turns readiness off until `time`.
    pub(crate) fn set_unsteady_until(&self, time: std::time::Duration) {
        self.unsteady_until_ms.store(time.as_millis() as u64, Ordering::Relaxed);
    }

    pub(crate) fn set_cache_usage(&self, share: f64) {
        self.cache_usage.store(share.to_bits(), Ordering::Relaxed);
    }
}

/// What goes into the engine thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// A request whose place in the queue is reserved.
    Submit(Box<WaitingRequest>),
    /// Look again: a reader made room or left, or the engine is to drain.
    Wake,
    /// Take an adapter.
    LoadAdapter(Box<LoadAdapter>),
    /// Forget an adapter once no sequence goes through it.
    UnloadAdapter(AdapterId),
}

/// The way in: shared by handles and streams, so that the engine sees when all are gone.
pub(crate) struct Door {
    pub shared: Arc<Shared>,
    commands: SyncSender<Command>,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Door {
    pub(crate) fn new(shared: Arc<Shared>, commands: SyncSender<Command>) -> Self {
        Self { shared, commands }
    }

    pub(crate) fn status(&self) -> EngineStatus {
        self.shared.status()
    }

    /// A way to ring that does not keep the engine alive.
    pub(crate) fn bell(self: &Arc<Self>) -> impl Fn() + Send + Sync + 'static {
        let door = Arc::downgrade(self);
        move || {
            if let Some(door) = door.upgrade() {
                door.wake();
            }
        }
    }

    /// Makes an idle engine look again. Never waits.
    pub(crate) fn wake(&self) {
        if !self.shared.wake_pending.swap(true, Ordering::SeqCst)
            && self.commands.try_send(Command::Wake).is_err()
        {
            // A full channel wakes the engine anyway.
            self.shared.wake_pending.store(false, Ordering::SeqCst);
        }
    }
}

/// A cloneable handle of the engine thread. When the last handle and stream are gone, the engine
/// stops.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    door: Arc<Door>,
}

impl EngineHandle {
    pub(crate) fn new(door: Arc<Door>) -> Self {
        Self { door }
    }

    /// Queues a request and returns one stream per continuation. Never waits.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing of the request is left behind.
    pub fn submit(&self, request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        self.try_submit(request).inspect_err(|error| self.shared().metrics.rejected(error.kind()))
    }

    fn try_submit(&self, mut request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        let shared = self.shared();
        match shared.status() {
            EngineStatus::Ready => {}
            EngineStatus::Draining | EngineStatus::Stopped => return Err(SubmitError::ShuttingDown),
            EngineStatus::Dead => return Err(SubmitError::Dead),
        }
        let max_new = self.check_fit(&request)?;
        self.take_whole_block(&mut request.cache);
        // A block is laid out anew between two steps, but such a prompt has none.
        request.cache.layer_budgets &= !request.loses_tokens();
        let count = request.n as usize;
        let full = || SubmitError::QueueFull { limit: shared.config.max_waiting };
        if !shared.reserve_waiting(count) {
            return Err(full());
        }
        let order = shared.next_order.fetch_add(1, Ordering::SeqCst);
        let mut streams = Vec::with_capacity(count);
        let mut sequences = Vec::with_capacity(count);
        for choice in 0..request.n {
            let (events, stream) = stream::channel(shared.config.event_buffer, &self.door);
            sequences.push(WaitingSequence { choice, events });
            streams.push(stream);
        }
        // Unseeded requests differ from each other and from run to run.
        let drawn = shared.seed.wrapping_add(order.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let waiting = WaitingRequest {
            // Here, so that the engine thread need not hash prompts.
            chain: self.chain(&request),
            loading_until: None,
            seed: request.sampling.seed.unwrap_or(drawn),
            request: Arc::new(request),
            sequences,
            arrived: shared.clock.now(),
            order,
            is_overdue: false,
            max_new,
        };
        let sent = self.door.commands.try_send(Command::Submit(Box::new(waiting)));
        sent.map(|()| streams).map_err(|error| {
            shared.release_waiting(count);
            match (error, shared.status()) {
                (TrySendError::Full(_), _) => full(),
                (TrySendError::Disconnected(_), EngineStatus::Dead) => SubmitError::Dead,
                (TrySendError::Disconnected(_), _) => SubmitError::ShuttingDown,
            }
        })
    }

    /// Lets a full block be as long as its class: how much room one turn asked for is then no part of
    /// its state, and the next turn, which asks for more, can go on from it. Only a conversation that
    /// outgrows its class is run again.
    fn take_whole_block(&self, cache: &mut CacheSettings) {
        if cache.method == CacheMethod::Full {
            let capacities = self.shared().facts.cache.classes.iter().map(|class| class.capacity);
            cache.slots = capacities.filter(|&capacity| capacity >= cache.slots).min().unwrap_or(cache.slots);
        }
    }

    fn chain(&self, request: &GenerationRequest) -> Option<Arc<KeyChain>> {
        let is_wanted = request.use_snapshots && !request.reads_prompt();
        let fingerprint = self.shared().fingerprint.as_ref().filter(|_| is_wanted)?;
        // What is lost inside the decoder depends on the question: no part of such a prompt is shared.
        if request.loses_tokens() {
            return None;
        }
        let adapter = request.adapter.and_then(|id| self.shared().adapters.digest(id));
        let chain = KeyChain::of(fingerprint, adapter.as_ref(), request);
        Some(Arc::new(chain))
    }

    /// Checks that the request can run on an empty engine; returns the most tokens that it can
    /// generate.
    fn check_fit(&self, request: &GenerationRequest) -> Result<u32, SubmitError> {
        let EngineFacts { model, cache, .. } = &self.shared().facts;
        let config = &self.shared().config;
        let refuse = |reason: String| Err(SubmitError::DoesNotFit(reason));
        let prompt = request.prompt_ids.len();
        if prompt == 0 || request.n == 0 {
            return refuse("prompt and n must not be empty or zero".into());
        }
        if request.max_tokens == 0 && !request.reads_prompt() {
            return refuse("max_tokens may be zero only if something is wanted of the prompt".into());
        }
        if request.pooling.is_some() && (request.max_tokens > 0 || request.n > 1) {
            return refuse("an embedding goes with max_tokens 0 and n 1".into());
        }
        if let Some(id) = request.prompt_ids.iter().find(|&&id| id as usize >= model.vocab_size) {
            return refuse(format!(
                "the prompt has token {id}, but the vocabulary ends at {}",
                model.vocab_size
            ));
        }
        if let Some(id) = request.adapter.filter(|&id| self.shared().adapters.digest(id).is_none()) {
            return refuse(format!("adapter {} is not loaded", id.0));
        }
        let span = visual::check(request, model).or_else(refuse)?;
        if request.loses_tokens() {
            let held_rows = self.shared().facts.extras.held_rows;
            if prompt > held_rows {
                return refuse(format!(
                    "the prompt has {prompt} rows and images that lose tokens inside the decoder, but only \
                     {held_rows} rows can be held"
                ));
            }
            if request.reads_prompt() {
                return refuse("nothing can be wanted of a prompt whose images lose tokens".into());
            }
            if request.visual.last().is_some_and(|span| span.rows.end as usize == prompt) {
                return refuse("the prompt ends with an image, but its text ranks tokens".into());
            }
        }
        // Positions that are left out, by images of which not everything was kept.
        let gaps = span as usize - prompt;
        // A block without ring keeps every token; one with a ring is never full, and its positions
        // are compacted into the trained range.
        let (capacity, needed) = (request.cache.capacity(), request.block_slots());
        let can_fold = request.cache.ring > 0;
        if can_fold && request.require_exact && prompt > request.cache.slots as usize {
            let prompt_tokens = prompt as u64;
            return Err(SubmitError::NotExact { prompt_tokens, slots: request.cache.slots });
        }
        let room = match (can_fold, request.require_exact) {
            (false, _) => (capacity as usize).min(model.max_position.saturating_sub(gaps)),
            (true, true) => (request.cache.slots as usize).min(model.max_position.saturating_sub(gaps)),
            // The last position is never reached: it means "none".
            (true, false) => u32::MAX as usize - 1 - gaps,
        };
        if prompt > room {
            return refuse(format!("the prompt has {prompt} tokens, but only {room} fit"));
        }
        let wide_enough = cache.classes.iter().filter(|class| class.capacity >= needed);
        let blocks: usize = wide_enough.map(|class| class.blocks as usize).sum();
        if blocks == 0 {
            let largest = cache.classes.iter().map(|class| class.capacity).max().unwrap_or(0);
            return refuse(format!("the request needs {needed} slots, but the largest block has {largest}"));
        }
        let most = blocks.min(config.max_running).min(config.max_waiting);
        if request.n as usize > most {
            return refuse(format!("n is {}, but at most {most} sequences of this size can run", request.n));
        }
        // The last token is sampled and never run, so it needs no slot.
        Ok(u32::try_from(room - prompt + 1).unwrap_or(u32::MAX).min(request.max_tokens))
    }

    /// Loads an adapter that was read for this model; requests may name it from now on. Waits for the
    /// engine: call it outside of an async runtime.
    ///
    /// # Errors
    /// [`SubmitError::DoesNotFit`] if there is no room for it, or that the engine has ended.
    pub fn load_adapter(&self, adapter: Adapter) -> Result<AdapterId, SubmitError> {
        self.shared().adapters.load(adapter, |load| {
            self.door.commands.send(Command::LoadAdapter(load)).map_err(|_| self.has_ended())
        })
    }

    /// Refuses requests that name the adapter from now on, and has it forgotten once no sequence goes through
    /// it. Returns whether it was there. Waits for a place in the channel, no longer.
    pub fn unload_adapter(&self, adapter: AdapterId) -> bool {
        let was_there = self.shared().adapters.remove(adapter);
        // An engine that has ended has forgotten everything.
        was_there && self.door.commands.send(Command::UnloadAdapter(adapter)).is_ok()
    }

    fn has_ended(&self) -> SubmitError {
        if self.status() == EngineStatus::Dead { SubmitError::Dead } else { SubmitError::ShuttingDown }
    }

    fn shared(&self) -> &Shared {
        &self.door.shared
    }

    /// The engine's state now.
    pub fn status(&self) -> EngineStatus {
        self.door.status()
    }

    /// Whether new requests should be sent here: the engine takes them, and its last two steps to
    /// fail do not lie within one minute.
    pub fn is_ready(&self) -> bool {
        let unsteady_until_ms = self.shared().unsteady_until_ms.load(Ordering::Relaxed);
        let now_ms = self.shared().clock.now().as_millis() as u64;
        self.status() == EngineStatus::Ready && now_ms >= unsteady_until_ms
    }

    /// Geometry, cache plan and memory.
    pub fn facts(&self) -> &EngineFacts {
        &self.shared().facts
    }

    /// Sequences that wait for a block now.
    pub fn num_waiting(&self) -> usize {
        self.shared().num_waiting()
    }

    /// Most sequences that may wait at once: a request for more can never be queued.
    pub fn max_waiting(&self) -> usize {
        self.shared().config.max_waiting
    }

    /// Share of slots in use, 0 to 1: those of all blocks that a sequence owns.
    pub fn cache_usage(&self) -> f64 {
        f64::from_bits(self.shared().cache_usage.load(Ordering::Relaxed))
    }

    /// Stops taking requests; waiting and running ones finish, at the latest after the drain
    /// time. The thread ends then; see [`EngineThread::join`](crate::EngineThread::join).
    pub fn drain(&self) {
        self.shared().start_draining();
        self.door.wake();
    }
}
