//! The default model: scores of prompts are those of the model alone, embeddings those of the reference.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use locket_engine::{
    EngineConfig, EngineHandle, FinishReason, GenerationRequest, Pooling, SamplingParams, SequenceEvent,
    start,
};
use locket_model::{
    Batch, BlockId, Model,
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::default_model,
};

/// Folds many times within a prompt of 300 tokens.
fn folding() -> CacheSettings {
    CacheSettings { sinks: 4, recent: 16, ..CacheSettings::of(CacheMethod::Observed, 96, 64) }
}

fn model(backend: Backend, blocks: u32) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(&default_model()).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let cache = CachePlan {
        geometry,
        slot_type: SlotType::F32,
        side: SideArrays::of(&[CacheMethod::Full, CacheMethod::Observed], geometry, None),
        classes: vec![BlockClass { capacity: 512, blocks }],
    };
    let options = BuildOptions { backend, cache, max_batch_rows: 128, threads: 2, side_car: None };
    checkpoint.build(&options).unwrap()
}

fn engine() -> EngineHandle {
    let config = EngineConfig { max_batch_rows: 128, prefill_chunk: 64, ..EngineConfig::default() };
    start(model(Backend::Cpu, 8), config, &prometheus::Registry::new()).unwrap().0
}

fn prompt(number: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| 1000 + (at * at * 31 + number * 977) % 20_000).collect()
}

fn request(prompt_ids: Vec<u32>, cache: CacheSettings) -> GenerationRequest {
    GenerationRequest {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        use_snapshots: true,
        ..GenerationRequest::new("test", prompt_ids, 0, cache)
    }
}

fn full() -> CacheSettings {
    CacheSettings::full(400)
}

/// What one request says of its prompt.
fn outputs(engine: &EngineHandle, requests: &[GenerationRequest]) -> Vec<Vec<SequenceEvent>> {
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    let read = |mut streams: Vec<locket_engine::SequenceStream>| {
        let mut events = Vec::new();
        while let Some(event) = streams[0].blocking_next() {
            match event {
                SequenceEvent::Started { .. } => {}
                SequenceEvent::Finished { reason, .. } => assert_eq!(reason, FinishReason::Length),
                SequenceEvent::Failed(failure) => panic!("{failure}"),
                event => events.push(event),
            }
        }
        events
    };
    streams.into_iter().map(read).collect()
}

/// Chunks of 64 rows in the engine, 16 here: the same probabilities, folds included. Tolerance 1e-4:
/// the sums of exponentials are taken in another order.
#[test]
fn scores_are_those_of_the_model() {
    let engine = engine();
    let mut alone = model(Backend::Cpu, 1);
    for cache in [full(), folding()] {
        let ids = prompt(1, 300);
        let scoring = GenerationRequest { prompt_logprobs: Some(3), ..request(ids.clone(), cache) };
        let events = outputs(&engine, &[scoring]).remove(0);
        let [SequenceEvent::PromptLogprobs(scores)] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!(scores.len(), ids.len() - 1);
        alone.open_block(BlockId(0), cache).unwrap();
        let (mut batch, mut expected, mut at) = (Batch::default(), Vec::new(), 0);
        while at < ids.len() - 1 {
            let end = (at + 16).min(ids.len() - 1);
            batch.clear();
            batch.push(BlockId(0), at as u32, &ids[at..end], false);
            batch.sample_rows = (0..(end - at) as u32).collect();
            let mut part = Vec::new();
            alone.score_tokens(&batch, &ids[at + 1..=end], &mut part).unwrap();
            expected.extend(part);
            at = end;
        }
        let mut apart = 0.0f32;
        for ((token, top), expected) in scores.iter().zip(&expected) {
            apart = apart.max((token.logprob + expected.nll).abs());
            assert_eq!((top.len(), top[0].id), (3, expected.best));
            assert_eq!(token.rank == 1, token.id == expected.best);
        }
        println!("{:?}: at most {apart} apart", cache.method);
        assert!(apart < 1e-4, "{apart}");
    }
}

/// Bit for bit, with prompts of many lengths in the same steps, some of which generate.
#[test]
fn alone_equals_together() {
    let engine = engine();
    let requests: Vec<GenerationRequest> = (0..16)
        .map(|number| {
            let cache = if number % 3 == 0 { folding() } else { full() };
            let plain = request(prompt(number, 20 + number * 17), cache);
            match number % 4 {
                0 => GenerationRequest { prompt_logprobs: Some(2), ..plain },
                1 => GenerationRequest { pooling: Some(Pooling::Mean), ..plain },
                2 => GenerationRequest { pooling: Some(Pooling::Last), ..plain },
                _ => GenerationRequest { prompt_logprobs: Some(0), max_tokens: 8, ..plain },
            }
        })
        .collect();
    let together = outputs(&engine, &requests);
    for (request, together) in requests.iter().zip(&together) {
        assert_eq!(&outputs(&engine, std::slice::from_ref(request))[0], together);
    }
}

/// The cosine between both backends' vectors is above 1 - 1e-5.
#[test]
fn embeddings_are_those_of_the_reference() {
    let engine = engine();
    let mut reference = model(Backend::Reference, 1);
    let ids = prompt(5, 90);
    reference.open_block(BlockId(0), full()).unwrap();
    let (mut batch, mut states) = (Batch::default(), Vec::new());
    batch.push(BlockId(0), 0, &ids, false);
    reference.forward(&batch, &mut Vec::new()).unwrap();
    reference.row_states(&(0..90).collect::<Vec<_>>(), &mut states).unwrap();
    let width = reference.config().hidden_size;
    let last = states[89 * width..].to_vec();
    let mean: Vec<f32> =
        (0..width).map(|at| states.iter().skip(at).step_by(width).sum::<f32>() / 90.0).collect();
    for (pooling, expected) in [(Pooling::Last, last), (Pooling::Mean, mean)] {
        let embedding = GenerationRequest { pooling: Some(pooling), ..request(ids.clone(), full()) };
        let events = outputs(&engine, &[embedding]).remove(0);
        let [SequenceEvent::Embedding(vector)] = events.as_slice() else { panic!("{events:?}") };
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        assert!((dot(vector, vector) - 1.0).abs() < 1e-6);
        let cosine = dot(vector, &expected) / dot(&expected, &expected).sqrt();
        println!("{pooling:?}: cosine {cosine}");
        assert!(cosine > 1.0 - 1e-5, "{cosine}");
    }
}
