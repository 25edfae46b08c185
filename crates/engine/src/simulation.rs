//! The real scheduler and loop over a fake model in virtual time: thousands of random schedules
//! of arrivals, slow readers, aborts and drains. A failure names its seed; run it again with
//! `schedule(seed)`.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use locket_model::{
    adapter::{Linear, LoraPair, LoraType},
    kv_cache::{CacheMethod, CacheSettings},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    Adapter, AdapterId, Advance, EngineConfig, EngineFailure, EngineHandle, Extras, FinishReason,
    GenerationRequest, Guide, SampledToken, SamplingParams, SequenceEvent, SequenceStream, SharedPlan,
    SubmitError, TokenSet,
    engine::{Engine, Turn},
    fake_model::{FakeModel, Seen, VOCAB_SIZE, VirtualClock, hash_of, logits_of, state_after},
    sampler::{Choice, SamplerScratch, SequenceSampler},
    thread::build,
};

mod alone;
mod exactness;
mod fairness;
mod faults;
mod gauges;
mod images;
mod prompts;
mod resume;
mod returning;
mod steered;
mod threaded;

use alone::alone;

/// An engine that is turned by hand.
struct Bench {
    engine: Engine,
    handle: EngineHandle,
    clock: Arc<VirtualClock>,
    seen: Arc<Mutex<Seen>>,
    registry: prometheus::Registry,
    /// Adapters made so far.
    adapters: f32,
}

impl Bench {
    fn new(classes: &[(u32, u32)], config: EngineConfig) -> Self {
        let mut model = FakeModel::new(classes, config.max_batch_rows);
        if config.snapshot_memory_bytes > 0 {
            model = model.leaving_grid();
        }
        let (clock, seen) = (model.clock(), model.seen());
        let registry = prometheus::Registry::new();
        let time = Arc::clone(&clock) as Arc<dyn crate::clock::Clock>;
        let (mut engine, handle) = build(Box::new(model), config, &registry, time).unwrap();
        // Guides are computed when a test says so.
        engine.workers.work_by_hand();
        Self { engine, handle, clock, seen, registry, adapters: 0.0 }
    }

    /// Has an adapter loaded, unless there is no room, as a thread of the server would.
    fn load_adapter(&mut self) {
        let handle = self.handle.clone();
        // Each another one.
        self.adapters += 1.0;
        let (scale, stored) = (self.adapters, LoraType::F32);
        let pair = LoraPair { a: vec![1.0; 2], b: vec![1.0; 2], rank: 1, scale, stored };
        let adapter = Adapter::new(&handle.facts().model, [(0, Linear::Q, pair)]).unwrap();
        let loading = std::thread::spawn(move || handle.load_adapter(adapter));
        while !loading.is_finished() {
            if self.engine.turn() != Turn::Worked {
                std::thread::yield_now();
            }
        }
        let loaded = loading.join().unwrap();
        assert!(
            matches!(loaded, Ok(_) | Err(SubmitError::DoesNotFit(_) | SubmitError::ShuttingDown)),
            "{loaded:?}"
        );
    }

    /// Turns until nothing can run.
    fn run_until_idle(&mut self) -> usize {
        let mut turns = 0;
        while self.engine.turn() == Turn::Worked {
            turns += 1;
            assert!(turns < 100_000, "the engine never rests");
        }
        turns
    }

    /// Computes one of the guides that are wanted, if any is.
    fn compute_a_guide(&self, rng: &mut StdRng) -> bool {
        let count = self.engine.workers.num_todo();
        if count > 0 {
            self.engine.workers.compute_one(rng.random_range(0..count));
        }
        count > 0
    }

    fn assert_empty(&self) {
        assert!(self.engine.scheduler.is_empty());
        assert!(self.engine.scheduler.pool.is_all_free(), "a block is lost");
        assert_eq!(self.handle.num_waiting(), 0);
        assert_eq!(self.handle.cache_usage(), 0.0);
        let seen = self.seen.lock().unwrap();
        assert_eq!(seen.open_blocks, 0, "a block was not scrubbed");
        assert_eq!(seen.violations, Vec::<String>::new());
    }
}

/// The sum of a metric's series; those with the label value, if one is given.
fn metric(registry: &prometheus::Registry, name: &str, label: Option<&str>) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).expect("a series");
    let has_label = |metric: &&prometheus::proto::Metric| {
        label.is_none_or(|value| metric.get_label().iter().any(|pair| pair.value() == value))
    };
    let values = family.get_metric().iter().filter(has_label);
    values.map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
}

fn config() -> EngineConfig {
    EngineConfig {
        max_batch_rows: 64,
        prefill_chunk: 64,
        max_waiting: 64,
        max_running: 16,
        event_buffer: 64,
        sampler_threads: 1,
        seed: Some(7),
        target_step: Duration::from_millis(4),
        queue_timeout: Duration::ZERO,
        extras: Extras { adapters: 2, max_rank: 8, held_rows: 256 },
        ..EngineConfig::default()
    }
}

fn request(prompt_len: u32, max_tokens: u32) -> GenerationRequest {
    GenerationRequest {
        sampling: SamplingParams { seed: Some(u64::from(prompt_len)), ..SamplingParams::default() },
        use_snapshots: true,
        ..GenerationRequest::new(
            format!("{prompt_len}+{max_tokens}"),
            (0..prompt_len).map(|at| (at * 7 + prompt_len) % 40).collect(),
            max_tokens,
            CacheSettings::full(prompt_len + max_tokens),
        )
    }
}

/// Settings that keep 2 sinks and the newest tokens.
fn window(slots: u32, ring: u32) -> CacheSettings {
    let mut settings = CacheSettings::full(slots);
    (settings.method, settings.ring, settings.sinks) = (CacheMethod::Window, ring, 2);
    settings
}

/// A reader and what it has read.
struct Reader {
    stream: Option<SequenceStream>,
    request: GenerationRequest,
    choice: u32,
    events: Vec<SequenceEvent>,
}

impl Reader {
    fn read(&mut self, most: usize) -> usize {
        let Some(stream) = &mut self.stream else { return 0 };
        let before = self.events.len();
        while self.events.len() - before < most {
            let Some(event) = stream.try_next() else { break };
            self.events.push(event);
        }
        self.events.len() - before
    }

    fn tokens(&self) -> Vec<u32> {
        let tokens = self.events.iter().filter_map(|event| match event {
            SequenceEvent::Token(token) => Some(token.id),
            _ => None,
        });
        tokens.collect()
    }

    fn last(&self) -> Option<&SequenceEvent> {
        self.events.last().filter(|event| event.is_last())
    }

    /// Checks order and text; `may_fail` allows an end by draining or time limit.
    fn check(&self, may_fail: bool) {
        let (expected, reason) = alone(&self.request, self.choice);
        let tokens = self.tokens();
        let num_last = self.events.iter().filter(|event| event.is_last()).count();
        let num_started =
            self.events.iter().filter(|event| matches!(event, SequenceEvent::Started { .. })).count();
        assert!(num_started <= 1 && num_last <= 1, "{:?}", self.events);
        prompts::check(self);
        let is_output = |event: &&SequenceEvent| !matches!(event, SequenceEvent::PromptLogprobs(_));
        if num_started == 1 {
            let first = self.events.iter().find(is_output);
            assert!(matches!(first, Some(SequenceEvent::Started { .. })));
        } else {
            assert!(tokens.is_empty());
        }
        assert!(expected.starts_with(&tokens), "alone {expected:?}, in the batch {tokens:?}");
        if self.stream.is_none() {
            return; // aborted: what was read is a prefix
        }
        match self.last().expect("every stream ends") {
            SequenceEvent::Finished { reason: end, .. } => {
                assert_eq!((tokens, Ok(*end)), (expected, reason), "alone = in a batch");
            }
            SequenceEvent::Failed(failure) if reason == Err(*failure) => assert_eq!(tokens, expected),
            SequenceEvent::Failed(failure) => {
                let expected = [EngineFailure::ShuttingDown, EngineFailure::QueueTimeout];
                assert!(may_fail && expected.contains(failure), "{failure:?}");
            }
            _ => unreachable!(),
        }
    }
}

/// A random request that fits into the classes of [`schedule`].
fn random_request(rng: &mut StdRng) -> GenerationRequest {
    let prompt_len = if rng.random_bool(0.2) { rng.random_range(100..200) } else { rng.random_range(1..50) };
    let mut request = request(prompt_len, rng.random_range(1..30));
    request.n = if rng.random_bool(0.2) { rng.random_range(2..4) } else { 1 };
    request.priority = rng.random_range(-1..2);
    request.snapshot_at = rng.random_bool(0.5).then(|| rng.random_range(0..prompt_len + 2));
    request.use_snapshots = rng.random_bool(0.9);
    request.sampling.seed = Some(rng.random());
    request.sampling.temperature = if rng.random_bool(0.3) { 0.0 } else { 1.0 };
    request.sampling.top_k = if rng.random_bool(0.3) { 5 } else { 0 };
    request.sampling.repetition_penalty = if rng.random_bool(0.2) { 1.3 } else { 1.0 };
    request.sampling.stop_token_ids = vec![rng.random_range(0..40)];
    if rng.random_bool(0.3) {
        request.cache = window(24, 8);
        request.cache.layer_budgets = rng.random_bool(0.5);
    }
    if rng.random_bool(0.2) {
        prompts::read_prompt(&mut request, rng);
    }
    if rng.random_bool(0.3) {
        images::see(&mut request, rng);
        if rng.random_bool(0.5) {
            images::lose(&mut request, rng);
        }
    }
    request.adapter = rng.random_bool(0.2).then(|| AdapterId(rng.random_range(0..3)));
    if rng.random_bool(0.4) {
        request.steering = Some(SharedPlan::new(steered::Script { seed: rng.random() }));
        request.sampling.min_tokens = rng.random_range(0..4);
        request.sampling.allowed_token_ids = rng.random_bool(0.2).then(|| (0..20).collect());
    }
    request
}

/// One random schedule.
fn schedule(seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let with_timeout = rng.random_bool(0.2);
    let with_drain = rng.random_bool(0.3);
    let with_snapshots = rng.random_bool(0.5);
    let config = EngineConfig {
        snapshot_memory_bytes: if with_snapshots { rng.random_range(1..20_000) } else { 0 },
        snapshot_interval: 16 * rng.random_range(1..5),
        max_batch_rows: rng.random_range(32..100),
        prefill_chunk: 16 * rng.random_range(1..5),
        max_waiting: rng.random_range(4..20),
        max_running: rng.random_range(3..12),
        event_buffer: rng.random_range(4..12),
        sampler_threads: 1 + usize::from(rng.random_bool(0.01)),
        queue_timeout: if with_timeout { Duration::from_millis(40) } else { Duration::ZERO },
        drain_timeout: Duration::from_millis(rng.random_range(0..300)),
        ..config()
    };
    let mut bench = Bench::new(&[(32, 4), (80, 3), (256, 3)], config.clone());
    (0..2).for_each(|_| bench.load_adapter());
    let mut readers: Vec<Reader> = Vec::new();
    let num_actions = rng.random_range(20..150);
    for action in 0..num_actions {
        match rng.random_range(0..10) {
            0..=2 => submit(&bench, rng, &mut readers),
            3 if !readers.is_empty() => {
                let at = rng.random_range(0..readers.len());
                readers[at].stream = None;
            }
            4 => {
                bench.compute_a_guide(rng);
                if rng.random_bool(0.02) {
                    bench.handle.unload_adapter(AdapterId(rng.random_range(0..3)));
                    bench.load_adapter();
                }
            }
            5 => {
                for reader in &mut readers {
                    reader.read(rng.random_range(0..6));
                }
            }
            _ => {
                if bench.engine.turn() == Turn::Idle {
                    bench.clock.advance(Duration::from_millis(10));
                }
            }
        }
        if with_drain && action == num_actions / 2 {
            bench.handle.drain();
        }
        check_bounds(&bench, &config);
    }
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(with_timeout || with_drain));
    bench.assert_empty();
}

fn submit(bench: &Bench, rng: &mut StdRng, readers: &mut Vec<Reader>) {
    let request = random_request(rng);
    match bench.handle.submit(request.clone()) {
        Ok(streams) => readers.extend((0..).zip(streams).map(|(choice, stream)| Reader {
            stream: Some(stream),
            request: request.clone(),
            choice,
            events: Vec::new(),
        })),
        Err(SubmitError::QueueFull { .. } | SubmitError::ShuttingDown) => {}
        Err(SubmitError::DoesNotFit(reason)) if reason.starts_with("adapter") => {}
        Err(error) => panic!("{error}"),
    }
}

fn check_bounds(bench: &Bench, config: &EngineConfig) {
    let scheduler = &bench.engine.scheduler;
    assert!(scheduler.running.len() <= config.max_running);
    assert!(bench.handle.num_waiting() <= config.max_waiting);
    assert!(bench.engine.plan.num_rows() <= config.max_batch_rows);
    let held = bench.engine.snapshots.as_ref().map_or(0, |snapshots| snapshots.bytes());
    assert!(held <= config.snapshot_memory_bytes);
}

/// Reads everything until the engine rests.
fn finish(bench: &mut Bench, readers: &mut [Reader]) {
    let mut read_all = || readers.iter_mut().map(|reader| reader.read(usize::MAX)).sum::<usize>();
    for _ in 0..100_000 {
        read_all();
        match bench.engine.turn() {
            Turn::Worked => {}
            // The turn itself may have ended what was left.
            Turn::Idle if bench.engine.scheduler.is_empty() && read_all() == 0 => return,
            Turn::Idle if bench.engine.workers.num_todo() > 0 => bench.engine.workers.compute_one(0),
            Turn::Idle => bench.clock.advance(Duration::from_millis(5)),
            Turn::Stopped => {
                bench.engine.fail_waiting(EngineFailure::ShuttingDown);
                read_all();
                return;
            }
            Turn::Dead(reason) => panic!("{reason}"),
        }
    }
    panic!("somebody waits for ever");
}

#[test]
fn thousands_of_schedules_lose_nothing() {
    for seed in 0..3000 {
        let outcome = std::panic::catch_unwind(|| schedule(seed));
        if let Err(panic) = outcome {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_schedule_ends_every_stream_once(seed in any::<u64>()) {
        schedule(seed);
    }

    /// Alone, and among 1 to 31 others: the same text.
    #[test]
    fn alone_equals_in_a_batch(lens in prop::collection::vec((1u32..120, 1u32..20), 2..32)) {
        let mut bench = Bench::new(&[(160, 32)], EngineConfig { max_running: 32, ..config() });
        let mut readers = Vec::new();
        for (prompt_len, max_tokens) in lens {
            let request = request(prompt_len, max_tokens);
            let stream = bench.handle.submit(request.clone()).unwrap().pop();
            readers.push(Reader { stream, request, choice: 0, events: Vec::new() });
        }
        finish(&mut bench, &mut readers);
        readers.iter().for_each(|reader| reader.check(false));
        bench.assert_empty();
    }
}
