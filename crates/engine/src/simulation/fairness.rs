//! Who waits for whom: prompts, blocks, readers, time limits.

use super::*;

fn first_token_at(bench: &mut Bench, stream: &mut SequenceStream, most: usize) -> usize {
    for turns in 0..most {
        while let Some(event) = stream.try_next() {
            if matches!(event, SequenceEvent::Token(_)) {
                return turns;
            }
        }
        assert_eq!(bench.engine.turn(), Turn::Worked);
    }
    panic!("no token after {most} turns");
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut bench = Bench::new(&[(4096, 4)], config());
    let _long = bench.handle.submit(request(4000, 8)).unwrap();
    (0..3).for_each(|_| assert_eq!(bench.engine.turn(), Turn::Worked));
    let mut short = bench.handle.submit(request(20, 8)).unwrap();
    assert!(first_token_at(&mut bench, &mut short[0], 4) <= 2);
}

#[test]
fn a_long_prompt_gets_a_quarter_beside_any_number_of_short_ones() {
    let mut bench = Bench::new(&[(64, 8), (2048, 1)], EngineConfig { max_waiting: 64, ..config() });
    let mut long = bench.handle.submit(request(1600, 1)).unwrap();
    let mut short: Vec<SequenceStream> = Vec::new();
    let mut turns = 0;
    loop {
        // There are always short prompts that have less left.
        while bench.handle.num_waiting() < 32 {
            short.extend(bench.handle.submit(request(48, 1)).unwrap());
        }
        assert_eq!(bench.engine.turn(), Turn::Worked);
        turns += 1;
        short.retain_mut(|stream| {
            while let Some(event) = stream.try_next() {
                if event.is_last() {
                    return false;
                }
            }
            true
        });
        if matches!(long[0].try_next(), Some(SequenceEvent::Started { .. })) {
            break;
        }
    }
    let seen = bench.seen.lock().unwrap();
    let all: u32 = seen.steps.iter().flat_map(|step| &step.parts).map(|part| part.2).sum();
    // A credited row per four of others: a fifth of all, less one chunk and one step's rounding.
    assert!(all <= 5 * (1600 + 16 + 64), "{all} rows passed in {turns} turns");
    let longest_wait = 8;
    let mut since = 0;
    for step in &seen.steps {
        since = if step.parts.iter().any(|part| part.0 == 8) { 0 } else { since + 1 };
        assert!(since <= longest_wait, "the long prompt stood still");
    }
}

#[test]
fn small_requests_do_not_take_the_block_that_a_large_one_waits_for() {
    let mut bench = Bench::new(&[(32, 1), (256, 1)], config());
    let first = bench.handle.submit(request(8, 20)).unwrap();
    let second = bench.handle.submit(request(8, 20)).unwrap(); // falls up into the large block
    assert_eq!(bench.engine.turn(), Turn::Worked);
    assert_eq!(bench.engine.scheduler.running.len(), 2);
    let mut large = bench.handle.submit(request(100, 1)).unwrap();
    let mut small: Vec<_> = (0..20).map(|_| bench.handle.submit(request(8, 20)).unwrap()).collect();
    drop((first, second));
    // Both blocks are free in the next turn: the large block is the large request's.
    assert_eq!(bench.engine.turn(), Turn::Worked);
    let running: Vec<u32> = bench.engine.scheduler.running.iter().map(|s| s.prompt_len()).collect();
    assert_eq!(running, vec![100, 8]);
    bench.run_until_idle();
    assert!(matches!(large[0].try_next(), Some(SequenceEvent::Started { .. })));
    small.clear();
    drop(large);
    bench.run_until_idle();
    bench.assert_empty();
}

#[test]
fn lower_priority_numbers_start_first() {
    let mut bench = Bench::new(&[(32, 1)], config());
    let submit = |priority| bench.handle.submit(GenerationRequest { priority, ..request(8, 1) }).unwrap();
    let mut late = submit(5);
    let mut early = submit(-5);
    assert_eq!(bench.engine.turn(), Turn::Worked);
    assert!(late[0].try_next().is_none());
    assert!(early[0].try_next().is_some());
}

/// How long a request waits beside an endless stream of requests of another priority.
fn wait_beside(priority: i32, others: i32, queue_timeout: Duration) -> Duration {
    let mut bench = Bench::new(&[(32, 1)], EngineConfig { queue_timeout, ..config() });
    let submit = |priority| bench.handle.submit(GenerationRequest { priority, ..request(8, 1) }).unwrap();
    let mut streams = submit(others);
    let mut patient = submit(priority);
    let begin = crate::clock::Clock::now(bench.clock.as_ref());
    loop {
        while bench.handle.num_waiting() < 6 {
            streams.extend(submit(others));
        }
        assert_eq!(bench.engine.turn(), Turn::Worked);
        bench.clock.advance(Duration::from_millis(200));
        streams.retain_mut(|stream| !std::iter::from_fn(|| stream.try_next()).any(|event| event.is_last()));
        match patient[0].try_next() {
            Some(SequenceEvent::Started { .. }) => break,
            Some(event) => panic!("{event:?}"),
            None => {}
        }
    }
    crate::clock::Clock::now(bench.clock.as_ref()) - begin
}

#[test]
fn a_class_is_worth_five_seconds_and_nobody_starves() {
    let beside =
        |priority, others, seconds| wait_beside(priority, others, Duration::from_secs(seconds)).as_secs_f64();
    // A turn takes 0.2 seconds, and six others may have come before a class is made up for.
    let is_about = |wait: f64, expected: f64| (expected..expected + 2.0).contains(&wait);
    assert!(is_about(beside(0, 0, 0), 0.0));
    assert!(is_about(beside(-1, 0, 0), 0.0));
    assert!(is_about(beside(1, 0, 0), 5.0));
    assert!(is_about(beside(4, 1, 0), 15.0));
    assert!(is_about(beside(i32::MAX, i32::MIN, 0), 60.0));
    assert!(is_about(beside(i32::MAX, i32::MIN, 40), 20.0), "before it would have waited too long");
}

#[test]
fn a_slow_reader_pauses_only_itself_and_loses_nothing() {
    let mut bench = Bench::new(&[(128, 2)], EngineConfig { event_buffer: 8, ..config() });
    let mut readers: Vec<Reader> = [request(10, 60), request(11, 60)]
        .into_iter()
        .map(|request| {
            let stream = bench.handle.submit(request.clone()).unwrap().pop();
            Reader { stream, request, choice: 0, events: Vec::new() }
        })
        .collect();
    // Reader 0 does not read.
    while readers[1].last().is_none() {
        assert_eq!(bench.engine.turn(), Turn::Worked);
        readers[1].read(100);
    }
    assert_eq!(bench.engine.turn(), Turn::Idle, "the slow one is all that is left");
    assert_eq!(bench.engine.scheduler.running.len(), 1);
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(false));
    bench.assert_empty();
}

#[test]
fn readers_that_leave_free_their_blocks_within_a_step() {
    let mut bench =
        Bench::new(&[(128, 64)], EngineConfig { max_running: 64, max_batch_rows: 1024, ..config() });
    let streams: Vec<_> = (0..64).map(|_| bench.handle.submit(request(10, 100)).unwrap()).collect();
    (0..5).for_each(|_| assert_eq!(bench.engine.turn(), Turn::Worked));
    assert_eq!(bench.handle.cache_usage(), 1.0);
    drop(streams);
    assert_eq!(bench.engine.turn(), Turn::Idle);
    bench.assert_empty();
}

#[test]
fn continuations_share_one_prefill_and_differ_by_seed() {
    let mut bench = Bench::new(&[(128, 3)], config());
    let request = GenerationRequest { n: 3, ..request(100, 12) };
    let mut readers: Vec<Reader> = (0..)
        .zip(bench.handle.submit(request.clone()).unwrap())
        .map(|(choice, stream)| Reader {
            stream: Some(stream),
            request: request.clone(),
            choice,
            events: Vec::new(),
        })
        .collect();
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(false));
    assert_ne!(readers[0].tokens(), readers[1].tokens());
    let prefilled: u32 = {
        let seen = bench.seen.lock().unwrap();
        seen.steps.iter().flat_map(|step| &step.parts).filter(|part| part.1 < 100).map(|part| part.2).sum()
    };
    assert_eq!(prefilled, 100, "the prompt ran once");
    bench.assert_empty();
}

#[test]
fn the_prefill_passes_on_when_its_reader_leaves() {
    let mut bench = Bench::new(&[(256, 3)], config());
    let request = GenerationRequest { n: 3, ..request(200, 5) };
    let mut streams = bench.handle.submit(request.clone()).unwrap();
    assert_eq!(bench.engine.turn(), Turn::Worked);
    drop(streams.remove(0));
    assert_eq!(bench.engine.turn(), Turn::Worked);
    let mut readers = vec![Reader { stream: streams.pop(), request, choice: 2, events: Vec::new() }];
    drop(streams);
    finish(&mut bench, &mut readers);
    readers[0].check(false);
    let prefilled: u32 = {
        let seen = bench.seen.lock().unwrap();
        seen.steps.iter().flat_map(|step| &step.parts).filter(|part| part.1 < 200).map(|part| part.2).sum()
    };
    assert_eq!(prefilled, 200);
    bench.assert_empty();
}

#[test]
fn while_something_decodes_a_step_keeps_to_its_target() {
    // 4 ms at 100 µs a row and 1 ms a step.
    let mut bench =
        Bench::new(&[(2048, 2)], EngineConfig { max_batch_rows: 512, prefill_chunk: 512, ..config() });
    let mut decoding = bench.handle.submit(request(16, 400)).unwrap();
    assert!(first_token_at(&mut bench, &mut decoding[0], 3) <= 1);
    let _long = bench.handle.submit(request(2000, 1)).unwrap();
    let mut steps = 0;
    while bench.engine.scheduler.running.len() < 2 || bench.engine.scheduler.running[1].is_prefill() {
        let begin = crate::clock::Clock::now(bench.clock.as_ref());
        assert_eq!(bench.engine.turn(), Turn::Worked);
        let took = crate::clock::Clock::now(bench.clock.as_ref()) - begin;
        // Never less than one chunk: 1 + 0.1 * (1 + 16) = 2.7 ms.
        assert!(took <= Duration::from_millis(5), "a step took {took:?}");
        while decoding[0].try_next().is_some() {}
        steps += 1;
        if bench.engine.scheduler.running.len() == 1 {
            break;
        }
    }
    assert!(steps > 50, "{steps}");
}

#[test]
fn waiting_too_long_ends_with_queue_timeout() {
    let config = EngineConfig { queue_timeout: Duration::from_millis(500), ..config() };
    let mut bench = Bench::new(&[(2048, 1)], config);
    let _first = bench.handle.submit(request(10, 2000)).unwrap();
    let mut second = bench.handle.submit(request(10, 10)).unwrap();
    assert_eq!(bench.engine.turn(), Turn::Worked);
    assert!(second[0].try_next().is_none());
    bench.clock.advance(Duration::from_secs(1));
    bench.engine.turn();
    assert_eq!(second[0].try_next(), Some(SequenceEvent::Failed(EngineFailure::QueueTimeout)));
    assert_eq!(second[0].try_next(), None);
    assert_eq!(bench.handle.num_waiting(), 0);
}

#[test]
fn draining_finishes_what_it_can_and_fails_the_rest() {
    let config = EngineConfig { drain_timeout: Duration::from_millis(100), event_buffer: 1000, ..config() };
    let mut bench = Bench::new(&[(1024, 2)], config);
    let mut quick = bench.handle.submit(request(10, 3)).unwrap();
    let mut endless = bench.handle.submit(request(10, 900)).unwrap();
    let mut waiting = bench.handle.submit(request(10, 3)).unwrap();
    assert_eq!(bench.engine.turn(), Turn::Worked);
    bench.handle.drain();
    assert_eq!(bench.handle.submit(request(1, 1)).unwrap_err(), SubmitError::ShuttingDown);
    let stopped = loop {
        match bench.engine.turn() {
            Turn::Worked => {}
            other => break other,
        }
    };
    assert_eq!(stopped, Turn::Stopped);
    let last = |stream: &mut SequenceStream| std::iter::from_fn(|| stream.try_next()).last().unwrap();
    assert!(matches!(last(&mut quick[0]), SequenceEvent::Finished { .. }));
    assert!(matches!(last(&mut waiting[0]), SequenceEvent::Finished { .. }), "there was a block for it");
    assert_eq!(last(&mut endless[0]), SequenceEvent::Failed(EngineFailure::ShuttingDown));
    bench.assert_empty();
}

#[test]
fn more_decoding_sequences_than_rows_take_turns() {
    let config = EngineConfig { max_batch_rows: 32, max_running: 48, max_waiting: 48, ..config() };
    let mut bench = Bench::new(&[(32, 48)], config);
    let mut readers: Vec<Reader> = (0..48)
        .map(|at| {
            let request = request(2 + at % 5, 20);
            let stream = bench.handle.submit(request.clone()).unwrap().pop();
            Reader { stream, request, choice: 0, events: Vec::new() }
        })
        .collect();
    finish(&mut bench, &mut readers);
    readers.iter().for_each(|reader| reader.check(false));
    bench.assert_empty();
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let bench = Bench::new(&[(64, 2), (128, 1)], config());
    let refused = |request: GenerationRequest| match bench.handle.submit(request).unwrap_err() {
        SubmitError::DoesNotFit(reason) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(request(120, 9)).contains("129 slots"));
    assert!(refused(GenerationRequest { n: 2, ..request(100, 9) }).contains("at most 1"));
    assert!(refused(GenerationRequest { prompt_ids: vec![48], ..request(1, 1) }).contains("token 48"));
    assert!(refused(GenerationRequest { prompt_ids: vec![], ..request(1, 1) }).contains("empty"));
    let cache = CacheSettings::full(16);
    assert!(refused(GenerationRequest { cache, ..request(17, 1) }).contains("only 16 fit"));
    assert_eq!(bench.handle.num_waiting(), 0);
    // A full block ends the sequence, with its last token sampled but not stored.
    let mut bench = bench;
    let mut stream = bench.handle.submit(GenerationRequest { cache, ..request(10, 50) }).unwrap();
    bench.run_until_idle();
    let events: Vec<_> = std::iter::from_fn(|| stream[0].try_next()).collect();
    assert_eq!(events.len(), 1 + 7 + 1);
    let end = SequenceEvent::Finished { reason: FinishReason::Length, folded_tokens: 0 };
    assert_eq!(events.last(), Some(&end));
}
