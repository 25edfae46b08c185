//! Prompts that go on from snapshots in RAM.

use super::*;
use crate::snapshots::{KeyChain, Moment};

const HEADER: [u32; 3] = [37, 38, 39];

fn remembering(bytes: u64) -> EngineConfig {
    EngineConfig { snapshot_memory_bytes: bytes, snapshot_interval: 64, ..config() }
}

/// A conversation as a client holds it.
#[derive(Clone)]
struct Chat {
    history: Vec<u32>,
    cache: Option<CacheSettings>,
    salt: Vec<u8>,
}

impl Chat {
    fn new() -> Self {
        Self { history: Vec::new(), cache: None, salt: Vec::new() }
    }

    fn ask(&mut self, question: &[u32], max_tokens: u32) -> GenerationRequest {
        self.history.extend_from_slice(question);
        let snapshot_at = self.history.len() as u32;
        self.history.extend_from_slice(&HEADER);
        let mut request = request(self.history.len() as u32, max_tokens);
        request.prompt_ids.clone_from(&self.history);
        request.cache = self.cache.unwrap_or(request.cache);
        request.snapshot_at = Some(snapshot_at);
        request.salt.clone_from(&self.salt);
        request
    }
}

fn reader(bench: &Bench, request: GenerationRequest) -> Reader {
    let stream = bench.handle.submit(request.clone()).unwrap().pop();
    Reader { stream, request, choice: 0, events: Vec::new() }
}

fn cached(reader: &Reader) -> u32 {
    match reader.events[0] {
        SequenceEvent::Started { cached_tokens, .. } => cached_tokens,
        ref other => panic!("{other:?}"),
    }
}

/// Asks and checks the answer against a model that remembers nothing.
fn answer(bench: &mut Bench, request: GenerationRequest) -> (Vec<u32>, u32) {
    let mut readers = [reader(bench, request)];
    finish(bench, &mut readers);
    readers[0].check(false);
    (readers[0].tokens(), cached(&readers[0]))
}

/// Many chats in one engine, with branches, tenants, methods and a bound that is often too small.
fn conversations(seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let mut bench = Bench::new(&[(64, 4), (2048, 4)], remembering(rng.random_range(100..30_000)));
    let mut chats: Vec<Chat> = (0..rng.random_range(1..5))
        .map(|at| Chat {
            cache: rng.random_bool(0.4).then(|| window(24, 8)),
            salt: vec![rng.random_range(0..2); at % 2],
            ..Chat::new()
        })
        .collect();
    for _ in 0..rng.random_range(2..10) {
        if rng.random_bool(0.2) {
            let branch = chats[rng.random_range(0..chats.len())].clone();
            chats.push(branch);
        }
        let mut readers: Vec<Reader> = Vec::new();
        for chat in &mut chats {
            // Few different questions, so that chats share beginnings by chance.
            let question = vec![rng.random_range(0..2); rng.random_range(1..40)];
            let mut request = chat.ask(&question, rng.random_range(1..20));
            request.sampling.stop_token_ids = vec![rng.random_range(0..40)];
            request.use_snapshots = rng.random_bool(0.9);
            images::see_in_history(&mut request);
            readers.push(reader(&bench, request));
        }
        finish(&mut bench, &mut readers);
        for (chat, reader) in chats.iter_mut().zip(&readers) {
            reader.check(false);
            assert!((cached(reader) as usize) < reader.request.prompt_ids.len());
            chat.history.extend(reader.tokens());
        }
        check_bounds(&bench, &bench.engine.shared.config);
    }
    bench.assert_empty();
}

#[test]
fn with_snapshots_and_without_the_same_is_said() {
    for seed in 0..300 {
        let outcome = std::panic::catch_unwind(|| conversations(seed));
        if let Err(panic) = outcome {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_returning_chat_runs_only_new_tokens() {
    let mut bench = Bench::new(&[(4096, 1)], remembering(1 << 20));
    let mut chat = Chat::new();
    let (mut in_block, mut prompts, mut hits) = (0, 0, 0);
    for turn in 0..20 {
        let request = chat.ask(&[turn; 25], 10);
        let prompt = request.prompt_ids.len() as u32;
        let (tokens, cached) = answer(&mut bench, request);
        assert_eq!(cached, in_block, "turn {turn}");
        chat.history.extend(&tokens);
        // The last token was sampled and not run.
        in_block = prompt + tokens.len() as u32 - 1;
        (prompts, hits) = (prompts + prompt, hits + cached);
    }
    let rows: u32 =
        bench.seen.lock().unwrap().steps.iter().flat_map(|step| &step.parts).map(|part| part.2).sum();
    assert_eq!(rows, in_block, "every token was run once");
    let counter = |name| metric(&bench.registry, name, None);
    assert_eq!(counter("vllm:prefix_cache_queries_total"), f64::from(prompts));
    assert_eq!(counter("vllm:prefix_cache_hits_total"), f64::from(hits));
    assert_eq!(counter("vllm:prompt_tokens_total"), f64::from(prompts));
    let taken = |at| metric(&bench.registry, "locket_snapshots_taken_total", Some(at));
    assert_eq!((taken("prompt_end"), taken("turn_end")), (20.0, 20.0));
    assert_eq!(taken("border"), f64::from(in_block / 64));
    bench.assert_empty();
}

#[test]
fn an_answer_that_comes_back_changed_goes_on_from_the_prompt_end() {
    let mut bench = Bench::new(&[(512, 1)], remembering(1 << 20));
    let mut chat = Chat::new();
    let (tokens, _) = answer(&mut bench, chat.ask(&[1; 25], 10));
    chat.history.extend(tokens.iter().map(|token| (token + 1) % 40));
    let (_, cached) = answer(&mut bench, chat.ask(&[2; 25], 10));
    assert_eq!(cached, 25);
}

#[test]
fn a_reader_that_has_enough_leaves_a_snapshot_and_one_that_aborts_does_not() {
    let mut bench = Bench::new(&[(512, 1)], remembering(1 << 20));
    for (is_satisfied, snapshots) in [(false, 0.0), (true, 1.0)] {
        let mut stream = bench.handle.submit(request(20, 100)).unwrap().pop().unwrap();
        while !matches!(stream.try_next(), Some(SequenceEvent::Token(_))) {
            bench.engine.turn();
        }
        if is_satisfied {
            stream.finish();
        } else {
            drop(stream);
        }
        bench.run_until_idle();
        assert_eq!(metric(&bench.registry, "locket_snapshots_taken_total", Some("turn_end")), snapshots);
    }
    bench.assert_empty();
}

#[test]
fn prompts_that_share_a_beginning_share_its_borders() {
    let mut bench = Bench::new(&[(4096, 2)], remembering(1 << 20));
    let first = GenerationRequest { snapshot_at: None, ..request(1000, 1) };
    answer(&mut bench, first.clone());
    let mut second = first.clone();
    second.prompt_ids.truncate(600);
    second.prompt_ids.extend([3; 100]);
    let (_, cached) = answer(&mut bench, second.clone());
    assert_eq!(cached, 576);
    // At least one token has to be run.
    let (_, cached) = answer(&mut bench, GenerationRequest { snapshot_at: None, ..first });
    assert_eq!(cached, 960);
    second.prompt_ids.truncate(577);
    assert_eq!(answer(&mut bench, second.clone()).1, 576);
    second.prompt_ids.truncate(576);
    assert_eq!(answer(&mut bench, second).1, 512);
}

#[test]
fn tenants_and_settings_never_share() {
    let mut bench = Bench::new(&[(512, 2)], remembering(1 << 20));
    let plain = request(200, 5);
    answer(&mut bench, plain.clone());
    let salted = |salt: &[u8]| GenerationRequest { salt: salt.to_vec(), ..plain.clone() };
    let windowed = |slots| GenerationRequest { cache: window(slots, 8), ..plain.clone() };
    for other in [salted(b"a"), salted(b"b"), windowed(24), windowed(32)] {
        assert_eq!(answer(&mut bench, other.clone()).1, 0);
        assert_eq!(answer(&mut bench, other).1, 192);
    }
    let roomier = GenerationRequest { cache: CacheSettings::full(500), ..plain };
    assert_eq!(answer(&mut bench, roomier).1, 192, "room is no part of a full block's state");
}

#[test]
fn forks_share() {
    let mut bench = Bench::new(&[(512, 4)], remembering(1 << 20));
    let mut chat = Chat::new();
    let (tokens, _) = answer(&mut bench, chat.ask(&[1; 60], 10));
    chat.history.extend(&tokens);
    let in_block = chat.history.len() as u32 - 1;
    for number in 0..3 {
        let request = GenerationRequest { n: 3, ..chat.clone().ask(&[number; 10], 10) };
        let streams = bench.handle.submit(request.clone()).unwrap();
        let mut readers: Vec<Reader> = (0..)
            .zip(streams)
            .map(|(choice, stream)| Reader {
                stream: Some(stream),
                request: request.clone(),
                choice,
                events: Vec::new(),
            })
            .collect();
        finish(&mut bench, &mut readers);
        for reader in &readers {
            reader.check(false);
            assert_eq!(cached(reader), in_block);
        }
    }
    assert_eq!(bench.seen.lock().unwrap().imports, 3, "one per request, not per continuation");
    bench.assert_empty();
}

#[test]
fn a_state_that_the_model_refuses_costs_only_time() {
    let mut bench = Bench::new(&[(512, 1)], remembering(1 << 20));
    let request = request(100, 5);
    let fingerprint = bench.engine.shared.fingerprint.unwrap();
    let chain = KeyChain::new(&fingerprint, &CacheSettings::full(512), b"", &request.prompt_ids);
    let tokens = request.prompt_ids[..70].to_vec();
    let snapshots = bench.engine.snapshots.as_mut().unwrap();
    snapshots.keep(chain.key(&tokens), tokens, chain.settings(), vec![7; 100], Moment::TurnEnd);
    assert_eq!(answer(&mut bench, request.clone()).1, 0);
    assert_eq!(metric(&bench.registry, "locket_snapshots_refused_total", Some("import_failed")), 1.0);
    assert_eq!(answer(&mut bench, request).1, 64, "the border");
    bench.assert_empty();
}

#[test]
fn a_disk_that_does_not_answer_is_not_waited_for() {
    let mut bench = Bench::new(&[(512, 1)], remembering(1 << 20));
    let mut slow = [reader(&bench, request(100, 5))];
    let Ok(crate::handle::Command::Submit(mut waiting)) = bench.engine.commands.try_recv() else {
        panic!("it was submitted");
    };
    // As if a file was being read.
    waiting.loading_until = Some(Duration::from_secs(10));
    bench.engine.scheduler.enqueue(*waiting);
    let mut other = [reader(&bench, request(50, 5))];
    finish_all_but_waiting(&mut bench, &mut other);
    assert_eq!(bench.handle.num_waiting(), 1, "the other one passes it");
    bench.clock.advance(Duration::from_secs(10));
    finish(&mut bench, &mut slow);
    slow[0].check(false);
    assert_eq!(metric(&bench.registry, "locket_snapshots_refused_total", Some("slow")), 1.0);
    bench.assert_empty();
}

fn finish_all_but_waiting(bench: &mut Bench, readers: &mut [Reader]) {
    bench.run_until_idle();
    for reader in readers {
        reader.read(usize::MAX);
        reader.check(false);
    }
}

#[test]
fn who_wants_no_snapshots_gets_and_leaves_none() {
    let mut bench = Bench::new(&[(512, 1)], remembering(1 << 20));
    let plain = GenerationRequest { use_snapshots: false, ..request(100, 5) };
    for _ in 0..2 {
        assert_eq!(answer(&mut bench, plain.clone()).1, 0);
    }
    assert_eq!(metric(&bench.registry, "locket_snapshots", Some("ram")), 0.0);
    assert_eq!(metric(&bench.registry, "vllm:prefix_cache_queries_total", None), 0.0);
    let mut off = Bench::new(&[(512, 1)], remembering(0));
    let plain = request(100, 5);
    for _ in 0..2 {
        assert_eq!(answer(&mut off, plain.clone()).1, 0);
    }
    assert_eq!(off.seen.lock().unwrap().exports, 0);
}

#[test]
fn a_state_larger_than_the_bound_is_not_kept() {
    let mut bench = Bench::new(&[(512, 1)], remembering(600));
    let plain = request(100, 5);
    for _ in 0..2 {
        assert_eq!(answer(&mut bench, plain.clone()).1, 0);
    }
    assert!(metric(&bench.registry, "locket_snapshots_refused_total", Some("too_large")) >= 2.0);
    assert_eq!(metric(&bench.registry, "locket_snapshot_bytes", Some("ram")), 0.0);
}

#[test]
fn what_was_folded_earlier_is_reported_and_not_counted_twice() {
    let mut bench = Bench::new(&[(64, 1)], remembering(1 << 20));
    let first = GenerationRequest { cache: window(24, 8), ..request(100, 1) };
    let mut second = first.clone();
    second.prompt_ids.extend([5; 20]);
    for (request, folded) in [(first, 76), (second, 96)] {
        let mut readers = [reader(&bench, request)];
        finish(&mut bench, &mut readers);
        let end = SequenceEvent::Finished { reason: FinishReason::Length, folded_tokens: folded };
        assert_eq!(readers[0].last(), Some(&end));
    }
    assert_eq!(metric(&bench.registry, "locket_folded_tokens_total", None), 96.0);
}
