//! The default model: chats with snapshots say what they say without, after a restart too, and run
//! new tokens only.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use std::path::Path;

use locket_engine::{
    EngineConfig, EngineHandle, EngineThread, FinishReason, GenerationRequest, SamplingParams, SequenceEvent,
    start,
};
use locket_model::{
    Model,
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::default_model,
};

const TURNS: u32 = 4;
const METHODS: [CacheMethod; 3] = [CacheMethod::Full, CacheMethod::Window, CacheMethod::Observed];

fn model(classes: &[(u32, u32)]) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(&default_model()).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let cache = CachePlan {
        geometry,
        slot_type: SlotType::F16,
        side: SideArrays::of(&METHODS, geometry, None),
        classes: classes.iter().map(|&(capacity, blocks)| BlockClass { capacity, blocks }).collect(),
    };
    let options =
        BuildOptions { backend: Backend::Cpu, cache, max_batch_rows: 128, threads: 2, side_car: None };
    checkpoint.build(&options).unwrap()
}

fn engine(directory: Option<&Path>) -> (EngineHandle, EngineThread, prometheus::Registry) {
    let config = EngineConfig {
        max_batch_rows: 128,
        prefill_chunk: 128,
        snapshot_memory_bytes: if directory.is_some() { 256 << 20 } else { 0 },
        snapshot_interval: 128,
        snapshot_dir: directory.map(Path::to_owned),
        model_fingerprint: [1; 32],
        ..EngineConfig::default()
    };
    let registry = prometheus::Registry::new();
    let (handle, thread) = start(model(&[(512, 2)]), config, &registry).unwrap();
    (handle, thread, registry)
}

/// A chat's next turn: greedy, 8 tokens. Returns the answer and the prompt tokens that were not run.
fn ask(engine: &EngineHandle, history: &mut Vec<u32>, cache: CacheSettings, turn: u32) -> (Vec<u32>, u32) {
    history.extend((0..37).map(|at| 1000 + (at * 31 + turn * 977) % 20_000));
    let snapshot_at = history.len() as u32;
    history.extend([1, 520, 9531, 198]);
    let request = GenerationRequest {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        use_snapshots: true,
        snapshot_at: Some(snapshot_at),
        salt: b"tenant".to_vec(),
        ..GenerationRequest::new("chat", history.clone(), 8, cache)
    };
    let mut stream = engine.submit(request).unwrap().pop().unwrap();
    let (mut answer, mut cached) = (Vec::new(), 0);
    while let Some(event) = stream.blocking_next() {
        match event {
            SequenceEvent::Started { cached_tokens, .. } => cached = cached_tokens,
            SequenceEvent::Token(token) => answer.push(token.id),
            SequenceEvent::Finished { reason: FinishReason::Length, .. } => {}
            other => panic!("{other:?}"),
        }
    }
    history.extend(&answer);
    (answer, cached)
}

fn stop(engine: (EngineHandle, EngineThread, prometheus::Registry)) {
    engine.0.drain();
    engine.1.join().unwrap();
}

/// Folding methods fold from the third turn on; full asks for more room in every turn.
fn settings(method: CacheMethod, history: &[u32]) -> CacheSettings {
    match method {
        CacheMethod::Full => CacheSettings::full(history.len() as u32 + 60),
        _ => CacheSettings::of(method, 64, 48),
    }
}

#[test]
fn a_chat_says_the_same_and_runs_new_tokens_only() {
    let plain = engine(None);
    let expected = METHODS.map(|method| {
        let mut history = Vec::new();
        let turns = (0..TURNS).map(|turn| {
            let settings = settings(method, &history);
            let (answer, cached) = ask(&plain.0, &mut history, settings, turn);
            assert_eq!(cached, 0);
            answer
        });
        turns.collect::<Vec<_>>()
    });
    stop(plain);
    let directory = tempfile::tempdir().unwrap();
    let mut histories = METHODS.map(|_| Vec::new());
    let mut server = engine(Some(directory.path()));
    for turn in 0..TURNS {
        if turn == 2 {
            stop(server);
            server = engine(Some(directory.path()));
        }
        for ((method, history), expected) in METHODS.into_iter().zip(&mut histories).zip(&expected) {
            // All but the last sampled token, which was not run.
            let in_block = (history.len() as u32).saturating_sub(1);
            let settings = settings(method, history);
            let (answer, cached) = ask(&server.0, history, settings, turn);
            assert_eq!(cached, in_block, "{method:?} turn {turn}");
            assert_eq!(answer, expected[turn as usize], "{method:?} turn {turn}");
        }
    }
    stop(server);
}
