//! Sequences that are steered: the text depends on the steering alone, never on when a guide is there.

use std::sync::{Condvar, Mutex};

use super::*;
use crate::{Steering, SteeringPlan, fake_model::FIRST_RARE_ID, start};

/// Steers by a hash of all tokens: everything that a steering may say, at random places.
#[derive(Debug)]
pub(super) struct Script {
    pub seed: u64,
}

#[derive(Debug)]
struct Follower {
    rng: StdRng,
    seed: u64,
    ids: Vec<u32>,
}

impl SteeringPlan for Script {
    fn start(&self, choice: u32) -> Box<dyn Steering> {
        let seed = self.seed.wrapping_add(u64::from(choice));
        let mut follower = Follower { rng: StdRng::seed_from_u64(0), seed, ids: Vec::new() };
        follower.look();
        Box::new(follower)
    }
}

impl Follower {
    /// What is drawn from now on depends on the plan and on the tokens so far.
    fn look(&mut self) {
        self.rng = StdRng::seed_from_u64(self.seed ^ hash_of(&self.ids));
    }

    fn id(&mut self) -> u32 {
        self.rng.random_range(0..FIRST_RARE_ID)
    }
}

impl Steering for Follower {
    fn advance(&mut self, id: u32) -> Advance {
        self.ids.push(id);
        self.look();
        match self.rng.random_range(0..20) {
            0..=2 => Advance::Known(Guide::Free),
            3..=8 => Advance::Known(Guide::Forced(self.id())),
            9 => Advance::Known(Guide::Complete),
            _ => Advance::Compute,
        }
    }

    fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        match self.rng.random_range(0..60) {
            0 => Guide::Complete,
            1 => Guide::Failed("told to".into()),
            2..10 => Guide::Free,
            10..16 => Guide::Forced(self.id()),
            _ => {
                allowed.clear();
                (0..self.rng.random_range(0..12)).for_each(|_| allowed.insert(self.id()));
                Guide::Allowed
            }
        }
    }
}

/// Steers with nothing but sets, each of which waits until the gate is open.
#[derive(Debug, Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

impl SteeringPlan for Gate {
    fn start(&self, _: u32) -> Box<dyn Steering> {
        Box::new(self.clone())
    }
}

impl Steering for Gate {
    fn advance(&mut self, _: u32) -> Advance {
        Advance::Compute
    }

    fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        let (is_open, opened) = &*self.0;
        drop(opened.wait_while(is_open.lock().unwrap(), |is_open| !*is_open).unwrap());
        allowed.clear();
        (10..20).for_each(|id| allowed.insert(id));
        Guide::Allowed
    }
}

fn opened() -> Gate {
    let gate = Gate::default();
    gate.open();
    gate
}

fn steered(plan: impl SteeringPlan + 'static, request: GenerationRequest) -> GenerationRequest {
    GenerationRequest { steering: Some(SharedPlan::new(plan)), ..request }
}

fn submit_all(handle: &EngineHandle, requests: &[GenerationRequest]) -> Vec<Reader> {
    let mut readers = Vec::new();
    for request in requests {
        let streams = handle.submit(request.clone()).unwrap();
        readers.extend((0..).zip(streams).map(|(choice, stream)| Reader {
            stream: Some(stream),
            request: request.clone(),
            choice,
            events: Vec::new(),
        }));
    }
    readers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    /// Whatever is computed when, and whoever else runs: the same text, and nothing is lost.
    #[test]
    fn the_text_does_not_depend_on_when_guides_come(
        seed in any::<u64>(), count in 1u32..10, haste in 0.0f64..1.0,
    ) {
        let rng = &mut StdRng::seed_from_u64(seed);
        let requests: Vec<_> = (0..count)
            .map(|at| {
                let request = request(1 + 13 * at, 1 + rng.random_range(0..30));
                let n = rng.random_range(1..4);
                if at % 3 == 2 { request } else { steered(Script { seed: rng.random() }, GenerationRequest { n, ..request }) }
            })
            .collect();
        let mut bench = Bench::new(&[(160, 20)], config());
        let mut readers = submit_all(&bench.handle, &requests);
        for _ in 0..60 {
            while rng.random_bool(haste) && bench.compute_a_guide(rng) {}
            bench.engine.turn();
            if rng.random_bool(0.02) {
                let at = rng.random_range(0..readers.len());
                readers[at].stream = None;
            }
        }
        finish(&mut bench, &mut readers);
        readers.iter().for_each(|reader| reader.check(false));
        bench.assert_empty();
        prop_assert_eq!(bench.engine.workers.num_todo(), 0);
    }
}

#[test]
fn a_late_guide_delays_its_own_sequence_only() {
    let mut bench = Bench::new(&[(128, 2)], config());
    let requests = [steered(opened(), request(10, 20)), request(11, 20)];
    let mut readers = submit_all(&bench.handle, &requests);
    let waits = |bench: &Bench| metric(&bench.registry, "locket_steering_waits_total", None);
    for turn in 1..=20 {
        assert_eq!(bench.engine.turn(), Turn::Worked);
        readers[1].read(100);
        assert_eq!(readers[1].tokens().len(), turn, "the neighbour gets a token in every step");
    }
    assert_eq!(readers[0].read(100), 0);
    assert_eq!(waits(&bench), 1.0, "one row waits, and the model does not run it again");
    assert_eq!(metric(&bench.registry, "locket_steering_waiting", None), 1.0);
    let num_steps = bench.seen.lock().unwrap().steps.len();
    assert_eq!(bench.engine.turn(), Turn::Idle, "an engine that waits for a guide sleeps");
    assert_eq!(bench.seen.lock().unwrap().steps.len(), num_steps);
    // The guide comes: its row is sampled, and the same turn runs the token.
    bench.engine.workers.compute_one(0);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    readers[0].read(100);
    assert_eq!(readers[0].tokens().len(), 1);
    assert_eq!(bench.seen.lock().unwrap().steps.len(), num_steps + 1);
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(false));
    bench.assert_empty();
}

#[test]
fn a_guide_in_time_costs_no_turn() {
    let mut bench = Bench::new(&[(128, 1)], config());
    let mut readers = submit_all(&bench.handle, &[steered(opened(), request(60, 20))]);
    assert_eq!(bench.engine.turn(), Turn::Worked, "its first guide is computed beside the prompt");
    for turn in 1..20 {
        bench.engine.workers.compute_one(0);
        assert_eq!(bench.engine.turn(), Turn::Worked);
        readers[0].read(100);
        assert!(readers[0].tokens().len() >= turn);
    }
    finish(&mut bench, &mut readers);
    readers[0].check(false);
}

#[test]
fn a_sequence_that_waits_can_be_left_and_drained() {
    let mut bench =
        Bench::new(&[(128, 3)], EngineConfig { drain_timeout: Duration::from_millis(50), ..config() });
    let request = steered(opened(), request(10, 20));
    let mut readers = submit_all(&bench.handle, &[request.clone(), GenerationRequest { n: 2, ..request }]);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    assert_eq!(bench.engine.workers.num_todo(), 3);
    readers.remove(0);
    assert_eq!(bench.engine.turn(), Turn::Idle);
    assert_eq!(bench.engine.workers.num_todo(), 2, "nobody wants that guide any more");
    // A guide that was begun before its reader left comes back to nobody.
    bench.engine.workers.compute_one(0);
    readers.remove(0);
    assert_eq!(bench.engine.turn(), Turn::Idle);
    bench.handle.drain();
    assert_eq!(bench.engine.turn(), Turn::Idle);
    bench.clock.advance(Duration::from_millis(60));
    assert_eq!(bench.engine.turn(), Turn::Stopped);
    readers[0].read(10);
    assert_eq!(readers[0].events, [SequenceEvent::Failed(EngineFailure::ShuttingDown)]);
    bench.assert_empty();
}

#[test]
fn a_failed_step_leaves_sequences_that_wait_alone() {
    let mut bench = Bench::new(&[(128, 3)], config());
    let mut readers = submit_all(&bench.handle, &[steered(opened(), request(10, 20))]);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    let bad = GenerationRequest { prompt_ids: vec![1, crate::fake_model::PANIC_ID], ..request(2, 5) };
    let mut bad = submit_all(&bench.handle, &[steered(opened(), bad)]);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    bad[0].read(10);
    assert_eq!(bad[0].events, [SequenceEvent::Failed(EngineFailure::Internal)]);
    finish(&mut bench, &mut readers);
    readers[0].check(false);
    bench.assert_empty();
}

/// One known guide from the start.
#[derive(Debug, Clone)]
struct Always(Guide);

impl SteeringPlan for Always {
    fn start(&self, _: u32) -> Box<dyn Steering> {
        Box::new(self.clone())
    }
}

impl Steering for Always {
    fn advance(&mut self, _: u32) -> Advance {
        Advance::Known(self.0.clone())
    }

    fn compute(&mut self, _: &mut TokenSet) -> Guide {
        self.0.clone()
    }
}

fn events_of(bench: &mut Bench, request: GenerationRequest) -> Vec<SequenceEvent> {
    let mut readers = submit_all(&bench.handle, &[request]);
    finish(bench, &mut readers);
    bench.assert_empty();
    readers.remove(0).events
}

#[test]
fn ends_without_a_token_are_in_order() {
    let mut bench = Bench::new(&[(128, 3)], config());
    let events = events_of(&mut bench, steered(Always(Guide::Complete), request(10, 20)));
    let end = SequenceEvent::Finished { reason: FinishReason::Complete, folded_tokens: 0 };
    assert!(matches!(events[0], SequenceEvent::Started { .. }));
    assert_eq!(events[1..], [end]);
    assert_eq!(metric(&bench.registry, "vllm:request_success_total", Some("stop")), 1.0);
    for guide in [Guide::Failed("too much".into()), Guide::Forced(VOCAB_SIZE as u32)] {
        let events = events_of(&mut bench, steered(Always(guide), request(10, 20)));
        assert_eq!(events, [SequenceEvent::Failed(EngineFailure::Unsteerable)]);
    }
    assert_eq!(metric(&bench.registry, "locket_steering_failures_total", None), 2.0);
}

/// Panics in its `at`-th call: start, compute, advance.
#[derive(Debug, Clone)]
struct Buggy {
    at: u32,
}

impl SteeringPlan for Buggy {
    fn start(&self, _: u32) -> Box<dyn Steering> {
        assert_ne!(self.at, 0, "told to panic");
        Box::new(self.clone())
    }
}

impl Steering for Buggy {
    fn advance(&mut self, _: u32) -> Advance {
        panic!("told to panic");
    }

    fn compute(&mut self, _: &mut TokenSet) -> Guide {
        assert_ne!(self.at, 1, "told to panic");
        Guide::Free
    }
}

#[test]
fn a_bug_in_a_steering_ends_its_sequence_only() {
    let mut bench = Bench::new(&[(128, 4)], config());
    let mut requests: Vec<_> = (0..3).map(|at| steered(Buggy { at }, request(10, 20))).collect();
    requests.push(request(11, 20));
    let mut readers = submit_all(&bench.handle, &requests);
    finish(&mut bench, &mut readers);
    for reader in &readers[..3] {
        assert_eq!(reader.last(), Some(&SequenceEvent::Failed(EngineFailure::Internal)));
    }
    readers[3].check(false);
    assert_eq!(metric(&bench.registry, "locket_step_failures_total", None), 0.0);
    assert_eq!(metric(&bench.registry, "locket_steering_failures_total", None), 3.0);
    bench.assert_empty();
}

#[test]
fn forced_tokens_are_marked_and_keep_the_models_own_probability() {
    let mut bench = Bench::new(&[(128, 3)], config());
    let request = GenerationRequest { logprobs: Some(1), ..request(10, 5) };
    let events = events_of(&mut bench, steered(Always(Guide::Forced(3)), request));
    let tokens = events.iter().filter_map(|event| match event {
        SequenceEvent::Token(token) => Some(token),
        _ => None,
    });
    let tokens: Vec<_> = tokens.collect();
    assert_eq!(tokens.len(), 5);
    for token in tokens {
        assert!(token.id == 3 && token.is_forced);
        assert!(token.logprob.unwrap() <= token.top_logprobs[0].logprob);
    }
}

#[test]
fn real_threads_say_the_same_and_wake_a_sleeping_engine() {
    let (model, config) = (FakeModel::new(&[(160, 16)], 64), config());
    let (handle, thread) = start(Box::new(model), config, &prometheus::Registry::new()).unwrap();
    let gate = Gate::default();
    let mut requests: Vec<_> = (0..8).map(|at| request(5 + 15 * at, 30)).collect();
    for (at, request) in (0..).zip(&mut requests) {
        match at % 4 {
            0 => {}
            // Both threads are held up until the gate opens.
            1 => *request = steered(gate.clone(), request.clone()),
            _ => *request = steered(Script { seed: at }, GenerationRequest { n: 2, ..request.clone() }),
        }
    }
    let mut readers = submit_all(&handle, &requests);
    let read_all = |reader: &mut Reader| {
        let stream = reader.stream.as_mut().unwrap();
        reader.events.extend(std::iter::from_fn(|| stream.blocking_next()));
    };
    for reader in readers.iter_mut().filter(|reader| reader.request.steering.is_none()) {
        read_all(reader);
        reader.check(false);
    }
    gate.open();
    for reader in readers.iter_mut().filter(|reader| reader.request.steering.is_some()) {
        read_all(reader);
        reader.check(false);
    }
    handle.drain();
    thread.join().unwrap();
}

/// A machine that starts no more threads: the request fails, and waits for nobody.
#[test]
fn without_a_thread_a_steered_sequence_fails() {
    let mut bench = Bench::new(&[(160, 20)], config());
    bench.engine.workers.refuse_threads();
    let mut readers = submit_all(&bench.handle, &[steered(opened(), request(5, 3))]);
    bench.run_until_idle();
    readers[0].read(usize::MAX);
    assert_eq!(readers[0].last(), Some(&SequenceEvent::Failed(EngineFailure::Internal)));
    bench.assert_empty();
}
