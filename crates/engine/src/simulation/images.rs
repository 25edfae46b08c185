//! Prompts with images: rows with embeddings, at positions of their own.

use super::*;
use crate::{Boundary, Keep, LayerDrops, Rank, VisualSpan, fake_model::WIDTH, visual::tests::span};

/// Puts up to three images into a request's prompt; their rows keep their places among its tokens.
pub(super) fn see(request: &mut GenerationRequest, rng: &mut StdRng) {
    let mut start = rng.random_range(0..12);
    for _ in 0..rng.random_range(1..4) {
        let (mut offsets, mut offset) = (Vec::new(), rng.random_range(0..3));
        for _ in 0..rng.random_range(1..40) {
            offsets.push(offset);
            offset += rng.random_range(1..4);
        }
        offsets.truncate((request.prompt_ids.len() as u32).saturating_sub(start) as usize);
        if offsets.is_empty() {
            return;
        }
        let run = offset + rng.random_range(0..5);
        let image = span(start, &offsets, run, rng.random_range(0..3), WIDTH);
        start = image.rows.end + rng.random_range(0..9);
        request.visual.push(image);
    }
}

/// Lets a request's images lose tokens inside the decoder, if its prompt may.
pub(super) fn lose(request: &mut GenerationRequest, rng: &mut StdRng) {
    let ends_with_image =
        request.visual.last().is_some_and(|span| span.rows.end as usize == request.prompt_ids.len());
    if ends_with_image || request.max_tokens == 0 {
        return;
    }
    for span in &mut request.visual {
        if rng.random_bool(0.7) {
            let boundary =
                Boundary { layer: 1, keep: Keep::Exactly(rng.random_range(0..9)), rank: Rank::LastToken };
            span.drops = Some(Arc::new(LayerDrops { boundaries: vec![boundary], ..LayerDrops::default() }));
        }
    }
    if request.loses_tokens() {
        (request.prompt_logprobs, request.pooling) = (None, None);
    }
}

/// Takes some tokens of a conversation for images: the same ones in every turn and branch.
pub(super) fn see_in_history(request: &mut GenerationRequest) {
    for start in (20..request.prompt_ids.len().saturating_sub(12) as u32).step_by(50) {
        let key = request.prompt_ids[start as usize];
        let offsets: Vec<u32> = (0..12).map(|row| row * (1 + key % 3)).collect();
        request.visual.push(span(start, &offsets, 40, key.into(), WIDTH));
    }
}

fn run(bench: &mut Bench, request: &GenerationRequest) -> u32 {
    let stream = bench.handle.submit(request.clone()).unwrap().pop();
    let mut readers = [Reader { stream, request: request.clone(), choice: 0, events: Vec::new() }];
    finish(bench, &mut readers);
    readers[0].check(false);
    match readers[0].events[0] {
        SequenceEvent::Started { cached_tokens, .. } => cached_tokens,
        ref other => panic!("{other:?}"),
    }
}

/// Other pixels, another plan or another adapter: another state, though all ids are the same.
#[test]
fn snapshots_know_images_apart() {
    let config = EngineConfig { snapshot_memory_bytes: 1 << 20, snapshot_interval: 16, ..config() };
    let mut bench = Bench::new(&[(256, 2)], config);
    let of = |key, run| GenerationRequest {
        visual: vec![span(10, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], run, key, WIDTH)],
        ..request(70, 1)
    };
    assert_eq!(run(&mut bench, &of(1, 10)), 0);
    assert_eq!(run(&mut bench, &of(1, 10)), 64);
    assert_eq!(run(&mut bench, &of(2, 10)), 0);
    assert_eq!(run(&mut bench, &of(1, 30)), 0);
    assert_eq!(run(&mut bench, &request(70, 1)), 0);
    assert_eq!(run(&mut bench, &of(2, 10)), 64);
    bench.assert_empty();
}

/// Blocks and lengths go by rows that were kept; the context by positions.
#[test]
fn what_was_dropped_takes_no_slot() {
    let mut bench = Bench::new(&[(32, 1)], config());
    let kept = GenerationRequest {
        visual: vec![span(2, &[0, 500, 4000], 8150, 1, WIDTH)],
        cache: CacheSettings::full(32),
        ..request(20, 12)
    };
    assert_eq!(run(&mut bench, &kept), 0);
    let longer = |run| VisualSpan { run, ..kept.visual[0].clone() };
    let refused = |visual| match bench.handle.submit(GenerationRequest { visual, ..kept.clone() }) {
        Err(SubmitError::DoesNotFit(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(vec![longer(8180)]).contains("only 15 fit"), "8177 of 8192 positions are gaps");
    assert!(refused(vec![longer(u32::MAX)]).contains("positions"));
    assert!(refused(vec![longer(3999)]).contains("offsets"));
    assert!(refused(vec![longer(8150), longer(8150)]).contains("image 1"));
    let narrow = VisualSpan { embeddings: vec![0.0; 5].into(), ..longer(8150) };
    assert!(refused(vec![narrow]).contains("numbers"));
}

fn losing(prompt: u32, max_tokens: u32) -> GenerationRequest {
    let mut image = span(3, &[0, 1, 2, 3, 4, 5], 6, 1, WIDTH);
    let boundary = Boundary { layer: 1, keep: Keep::Exactly(2), rank: Rank::LastToken };
    image.drops = Some(Arc::new(LayerDrops { boundaries: vec![boundary], ..LayerDrops::default() }));
    GenerationRequest { visual: vec![image], ..request(prompt, max_tokens) }
}

/// While one prompt is split by layers others go on decoding; the next such prompt waits for it; whoever
/// leaves in the middle leaves nothing behind.
#[test]
fn prompts_are_held_one_at_a_time_and_hold_nobody_up() {
    let mut bench = Bench::new(&[(256, 6)], EngineConfig { prefill_chunk: 16, ..config() });
    let handle = bench.handle.clone();
    let submit = |request: &GenerationRequest| {
        let streams = handle.submit(request.clone()).unwrap();
        let readers = (0..).zip(streams).map(|(choice, stream)| Reader {
            stream: Some(stream),
            request: request.clone(),
            choice,
            events: Vec::new(),
        });
        readers.collect::<Vec<Reader>>()
    };
    let mut readers = submit(&request(10, 40));
    readers.extend(submit(&GenerationRequest { n: 2, ..losing(150, 5) }));
    readers.extend(submit(&losing(100, 5)));
    readers.extend(submit(&losing(120, 5)));
    let mut tokens = 0;
    for _ in 0..12 {
        assert_eq!(bench.engine.turn(), Turn::Worked);
        tokens += readers[0].read(usize::MAX);
    }
    assert!(tokens > 10, "somebody decodes meanwhile");
    // The first of two continuations leaves: the other takes over what is held.
    readers[1].stream = None;
    assert_eq!(bench.engine.turn(), Turn::Worked);
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(false));
    // And one that leaves with all it has.
    let mut readers = submit(&losing(150, 5));
    bench.engine.turn();
    readers[0].stream = None;
    finish(&mut bench, &mut readers);
    bench.assert_empty();
}

/// What is lost depends on the question, so such prompts share nothing.
#[test]
fn prompts_that_lose_tokens_leave_no_snapshots() {
    let config = EngineConfig { snapshot_memory_bytes: 1 << 20, snapshot_interval: 16, ..config() };
    let mut bench = Bench::new(&[(256, 2)], config);
    assert_eq!([(); 2].map(|()| run(&mut bench, &losing(70, 3))), [0, 0]);
    let plain = GenerationRequest { visual: Vec::new(), ..losing(70, 3) };
    assert_eq!(run(&mut bench, &plain), 0);
    bench.assert_empty();
}

#[test]
fn prompts_that_cannot_be_held_are_refused() {
    let bench = Bench::new(&[(512, 1)], config());
    let refused = |request: GenerationRequest| match bench.handle.submit(request) {
        Err(SubmitError::DoesNotFit(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(losing(300, 5)).contains("only 256 rows can be held"));
    assert!(refused(losing(9, 5)).contains("ends with an image"));
    assert!(refused(GenerationRequest { prompt_logprobs: Some(1), ..losing(50, 5) }).contains("wanted of"));
    let mut deep = losing(50, 5);
    let boundary = Boundary { layer: 2, keep: Keep::Exactly(2), rank: Rank::LastToken };
    deep.visual[0].drops = Some(Arc::new(LayerDrops { boundaries: vec![boundary], ..LayerDrops::default() }));
    assert!(refused(deep).contains("layer 2"));
    assert!(
        refused(GenerationRequest { adapter: Some(AdapterId(0)), ..request(5, 5) }).contains("not loaded")
    );
}

/// Adapters come and go while sequences go through them; snapshots know them apart.
#[test]
fn adapters_are_forgotten_when_nobody_needs_them() {
    let config = EngineConfig { snapshot_memory_bytes: 1 << 20, snapshot_interval: 16, ..config() };
    let mut bench = Bench::new(&[(256, 3)], config);
    (0..2).for_each(|_| bench.load_adapter());
    let with = |adapter| GenerationRequest { adapter, ..request(70, 20) };
    assert_eq!(run(&mut bench, &with(Some(AdapterId(0)))), 0);
    assert_eq!(run(&mut bench, &with(Some(AdapterId(0)))), 64);
    assert_eq!(run(&mut bench, &with(None)), 0, "another state without it");
    // Its reader does not read, so it stands still before its end.
    let running = GenerationRequest { adapter: Some(AdapterId(1)), ..request(70, 150) };
    let stream = bench.handle.submit(running.clone()).unwrap().pop();
    let mut readers = [Reader { stream, request: running.clone(), choice: 0, events: Vec::new() }];
    bench.engine.turn();
    assert!(bench.handle.unload_adapter(AdapterId(1)) && !bench.handle.unload_adapter(AdapterId(1)));
    assert!(bench.handle.submit(running).is_err());
    bench.load_adapter();
    assert!(bench.engine.runner.has_adapter(AdapterId(1)), "somebody goes through it");
    finish(&mut bench, &mut readers);
    readers[0].check(false);
    bench.engine.turn();
    assert!(!bench.engine.runner.has_adapter(AdapterId(1)));
    bench.load_adapter();
    assert!(bench.engine.runner.has_adapter(AdapterId(2)), "there is room again");
    bench.assert_empty();
}
