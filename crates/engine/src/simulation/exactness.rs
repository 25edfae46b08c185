//! What is promised about exact attention: refused, cut, counted.

use super::*;

fn run(bench: &mut Bench, request: GenerationRequest) -> (Vec<u32>, SequenceEvent) {
    let stream = bench.handle.submit(request.clone()).unwrap().pop();
    let mut readers = [Reader { stream, request, choice: 0, events: Vec::new() }];
    finish(bench, &mut readers);
    (readers[0].tokens(), readers[0].last().unwrap().clone())
}

#[test]
fn a_prompt_above_the_slots_is_refused_with_both_numbers() {
    let bench = Bench::new(&[(64, 2)], config());
    let cache = window(24, 8);
    let long = GenerationRequest { cache, require_exact: true, ..request(25, 4) };
    let error = bench.handle.submit(long.clone()).unwrap_err();
    assert_eq!(error, SubmitError::NotExact { prompt_tokens: 25, slots: 24 });
    assert_eq!(error.kind(), "not_exact");
    assert!(error.to_string().contains("25") && error.to_string().contains("24"));
    assert_eq!(metric(&bench.registry, "locket_rejections_total", Some("not_exact")), 1.0);
    assert!(bench.handle.submit(GenerationRequest { require_exact: false, ..long }).is_ok());
}

#[test]
fn an_exact_answer_ends_before_anything_is_folded() {
    let mut bench = Bench::new(&[(64, 2)], config());
    let exact = GenerationRequest { cache: window(24, 8), require_exact: true, ..request(20, 30) };
    let (tokens, end) = run(&mut bench, exact.clone());
    // 20 + 4 tokens are in the slots; the fifth is sampled and not run.
    assert_eq!(tokens.len(), 5);
    assert_eq!(end, SequenceEvent::Finished { reason: FinishReason::Length, folded_tokens: 0 });
    let (tokens, end) = run(&mut bench, GenerationRequest { require_exact: false, ..exact.clone() });
    assert_eq!(tokens.len(), 30);
    // 49 tokens were run, 24 of them have a slot.
    assert_eq!(end, SequenceEvent::Finished { reason: FinishReason::Length, folded_tokens: 25 });
    let (tokens, _) = run(&mut bench, GenerationRequest { cache: CacheSettings::full(50), ..exact });
    assert_eq!(tokens.len(), 30, "a full block is always exact");
    let exact = |label| metric(&bench.registry, "locket_exact_sequences_total", Some(label));
    assert_eq!((exact("true"), exact("false")), (2.0, 1.0));
    assert_eq!(metric(&bench.registry, "locket_folded_tokens_total", None), 25.0);
}

#[test]
fn a_reader_knows_what_was_folded_before_the_end() {
    let mut bench = Bench::new(&[(64, 1)], config());
    let folding = GenerationRequest { cache: window(24, 8), ..request(40, 30) };
    let mut stream = bench.handle.submit(folding).unwrap().pop().unwrap();
    assert_eq!(stream.folded_tokens(), 0);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    assert_eq!(stream.folded_tokens(), 16);
    assert!(matches!(stream.try_next(), Some(SequenceEvent::Started { .. })));
}

#[test]
fn positions_of_a_folding_block_may_leave_the_trained_range() {
    let mut bench = Bench::new(&[(64, 1)], config());
    let max_position = bench.handle.facts().model.max_position as u32;
    let long = GenerationRequest { cache: window(24, 8), ..request(max_position + 5, 3) };
    let (tokens, _) = run(&mut bench, long);
    assert_eq!(tokens.len(), 3);
}
