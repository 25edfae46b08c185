//! Prompts with images: rows with embeddings, at positions of their own.

use super::*;
use crate::{VisualSpan, fake_model::WIDTH, visual::tests::span};

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
