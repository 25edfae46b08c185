//! What prompts give besides continuations: the same alone, in chunks and in a batch.

use super::*;
use crate::{
    Pooling, PromptLogprobs,
    embedding::Pool,
    fake_model::{NAN_ID, state_of},
};

/// Makes a request want something of its prompt.
pub(super) fn read_prompt(request: &mut GenerationRequest, rng: &mut StdRng) {
    request.prompt_logprobs = rng.random_bool(0.7).then(|| rng.random_range(0..4));
    if rng.random_bool(0.5) {
        request.max_tokens = 0;
        let pooling = if rng.random_bool(0.5) { Pooling::Last } else { Pooling::Mean };
        request.pooling = (request.n == 1 && rng.random_bool(0.7)).then_some(pooling);
    }
    if request.prompt_logprobs.is_none() && request.pooling.is_none() {
        request.prompt_logprobs = Some(0);
    }
}

/// The scores of a prompt, one token after the other.
fn scores_alone(request: &GenerationRequest) -> Option<PromptLogprobs> {
    let count = request.prompt_logprobs? as usize;
    let ids = &request.prompt_ids;
    let (mut scores, mut scratch) = (PromptLogprobs::default(), SamplerScratch::default());
    for (at, &id) in ids.iter().enumerate().skip(1) {
        let row: Vec<f32> = logits_of(state_after(request, &[], at)).collect();
        let (token, top) = scratch.score(&row, id, count).unwrap();
        scores.push(token, &top);
    }
    Some(scores)
}

/// The embedding of a prompt, one token after the other.
fn embedding_alone(request: &GenerationRequest) -> Option<Vec<f32>> {
    let mut pool = Pool::new(request.pooling?);
    let len = request.prompt_ids.len() as u32;
    for position in (0..len).filter(|&position| request.pooling == Some(Pooling::Mean) || position + 1 == len)
    {
        pool.add(&state_of(state_after(request, &[], position as usize + 1))).unwrap();
    }
    Some(pool.finish())
}

fn scores_of(reader: &Reader) -> Vec<&PromptLogprobs> {
    let scores = reader.events.iter().filter_map(|event| match event {
        SequenceEvent::PromptLogprobs(scores) => Some(scores.as_ref()),
        _ => None,
    });
    scores.collect()
}

fn embeddings_of(reader: &Reader) -> Vec<&Vec<f32>> {
    let embeddings = reader.events.iter().filter_map(|event| match event {
        SequenceEvent::Embedding(embedding) => Some(embedding),
        _ => None,
    });
    embeddings.collect()
}

/// Checks what a reader was told of its prompt: all that was asked for, by the first continuation.
pub(super) fn check(reader: &Reader) {
    let Reader { request, events, .. } = reader;
    let (scores, embeddings) = (scores_of(reader), embeddings_of(reader));
    assert!(scores.len() <= 1 && embeddings.len() <= 1, "{events:?}");
    if let Some(&scores) = scores.first() {
        assert_eq!(Some(scores), scores_alone(request).as_ref());
        assert!(matches!(events[0], SequenceEvent::PromptLogprobs(_)));
    }
    if let Some(&embedding) = embeddings.first() {
        assert_eq!(Some(embedding), embedding_alone(request).as_ref(), "the same bits");
    }
    let has_finished = matches!(reader.last(), Some(SequenceEvent::Finished { .. }));
    if has_finished {
        assert_eq!(scores.len(), usize::from(request.prompt_logprobs.is_some()));
        assert_eq!(embeddings.len(), usize::from(request.pooling.is_some()));
    }
}

fn run(bench: &mut Bench, request: &GenerationRequest) -> Vec<Reader> {
    let streams = bench.handle.submit(request.clone()).unwrap();
    let mut readers: Vec<Reader> = (0..)
        .zip(streams)
        .map(|(choice, stream)| Reader {
            stream: Some(stream),
            request: request.clone(),
            choice,
            events: vec![],
        })
        .collect();
    finish(bench, &mut readers);
    readers
}

#[test]
fn a_prompt_is_scored_without_a_token() {
    let mut bench = Bench::new(&[(256, 2)], EngineConfig { event_buffer: 4, ..config() });
    let scoring = GenerationRequest {
        prompt_logprobs: Some(2),
        pooling: Some(Pooling::Mean),
        max_tokens: 0,
        ..request(200, 0)
    };
    let readers = run(&mut bench, &scoring);
    readers[0].check(false);
    let kinds: Vec<&str> = readers[0]
        .events
        .iter()
        .map(|event| match event {
            SequenceEvent::PromptLogprobs(_) => "scores",
            SequenceEvent::Started { .. } => "started",
            SequenceEvent::Embedding(_) => "embedding",
            SequenceEvent::Token(_) => "token",
            SequenceEvent::Finished { reason: FinishReason::Length, .. } => "length",
            _ => "other",
        })
        .collect();
    assert_eq!(kinds, ["scores", "started", "embedding", "length"]);
    assert_eq!(metric(&bench.registry, "vllm:prompt_tokens_total", None), 200.0);
    assert_eq!(metric(&bench.registry, "vllm:generation_tokens_total", None), 0.0);
    assert_eq!(metric(&bench.registry, "vllm:request_success_total", Some("length")), 1.0);
    bench.assert_empty();
}

/// One token has nothing before it.
#[test]
fn a_prompt_of_one_token_has_no_scores() {
    let mut bench = Bench::new(&[(64, 1)], config());
    let scoring = GenerationRequest { prompt_logprobs: Some(2), ..request(1, 2) };
    let readers = run(&mut bench, &scoring);
    assert!(scores_of(&readers[0])[0].is_empty());
    readers[0].check(false);
}

/// Each prompt is scored once, whatever `n`, and every continuation is told.
#[test]
fn scores_are_shared_by_continuations() {
    let mut bench = Bench::new(&[(64, 4)], config());
    for max_tokens in [0, 3] {
        let scoring =
            GenerationRequest { n: 3, prompt_logprobs: Some(1), max_tokens, ..request(40, max_tokens) };
        let readers = run(&mut bench, &scoring);
        assert!(readers.iter().all(|reader| std::ptr::eq(scores_of(reader)[0], scores_of(&readers[0])[0])));
        readers.iter().for_each(|reader| reader.check(false));
    }
    bench.assert_empty();
}

/// A prompt whose first reader leaves half-way is scored wholly for the next one.
#[test]
fn an_heir_gets_all_scores() {
    let mut bench = Bench::new(&[(256, 2)], config());
    let scoring = GenerationRequest { n: 2, prompt_logprobs: Some(1), ..request(200, 2) };
    let mut streams = bench.handle.submit(scoring.clone()).unwrap();
    assert_eq!(bench.engine.turn(), Turn::Worked);
    drop(streams.remove(0));
    let mut readers = [Reader { stream: streams.pop(), request: scoring, choice: 1, events: Vec::new() }];
    finish(&mut bench, &mut readers);
    assert_eq!(scores_of(&readers[0]).len(), 1);
    readers[0].check(false);
    bench.assert_empty();
}

#[test]
fn a_scored_prompt_skips_no_row_and_leaves_no_snapshot() {
    let config = EngineConfig { snapshot_memory_bytes: 1 << 20, snapshot_interval: 16, ..config() };
    let mut bench = Bench::new(&[(256, 2)], config);
    let scoring = GenerationRequest { prompt_logprobs: Some(1), ..request(150, 2) };
    let plain = GenerationRequest { prompt_logprobs: None, ..scoring.clone() };
    for (request, cached) in [(&scoring, 0), (&plain, 0), (&scoring, 0), (&plain, 150 / 16 * 16)] {
        let readers = run(&mut bench, request);
        readers[0].check(false);
        let started = readers[0].events.iter().find_map(|event| match event {
            SequenceEvent::Started { cached_tokens, .. } => Some(*cached_tokens),
            _ => None,
        });
        assert_eq!(started, Some(cached));
    }
}

#[test]
fn what_is_not_finite_ends_the_prompt_and_nothing_else() {
    let mut bench = Bench::new(&[(64, 6)], config());
    let mut bad = GenerationRequest { n: 2, prompt_logprobs: Some(1), ..request(40, 2) };
    bad.prompt_ids[20] = NAN_ID;
    let embedding = GenerationRequest {
        n: 1,
        prompt_logprobs: None,
        pooling: Some(Pooling::Last),
        max_tokens: 0,
        ..bad.clone()
    };
    for bad in [bad, embedding] {
        let streams = bench.handle.submit(bad.clone()).unwrap();
        let good = run(&mut bench, &GenerationRequest { prompt_logprobs: Some(1), ..request(30, 2) });
        good[0].check(false);
        for mut stream in streams {
            let failed = SequenceEvent::Failed(EngineFailure::NonFiniteLogits);
            assert_eq!((stream.try_next(), stream.try_next()), (Some(failed), None));
        }
        bench.assert_empty();
    }
}

#[test]
fn contradictions_are_refused() {
    let bench = Bench::new(&[(64, 2)], config());
    let refused = |request| match bench.handle.submit(request) {
        Err(SubmitError::DoesNotFit(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(request(10, 0)).contains("max_tokens"));
    assert!(
        refused(GenerationRequest { pooling: Some(Pooling::Last), ..request(10, 1) }).contains("embedding")
    );
}
