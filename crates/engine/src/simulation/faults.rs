//! What goes wrong below or inside a step, and who notices.

use super::*;
use crate::{
    EngineStatus,
    fake_model::{DEVICE_ID, INVALID_ID, NAN_ID, PANIC_ID},
};

fn poisoned(id: u32) -> GenerationRequest {
    GenerationRequest { prompt_ids: vec![1, 2, id], ..request(3, 5) }
}

fn events(stream: &mut SequenceStream) -> Vec<SequenceEvent> {
    std::iter::from_fn(|| stream.try_next()).collect()
}

#[test]
fn a_failed_step_ends_its_sequences_and_nothing_else() {
    for id in [PANIC_ID, INVALID_ID] {
        let mut bench = Bench::new(&[(64, 4)], EngineConfig { event_buffer: 16, ..config() });
        // Its channel is full, so it is not in the step that fails.
        let paused_request = request(10, 50);
        let stream = bench.handle.submit(paused_request.clone()).unwrap().pop();
        let mut paused = vec![Reader { stream, request: paused_request, choice: 0, events: Vec::new() }];
        assert!(bench.run_until_idle() < 20);
        let mut bad = bench.handle.submit(GenerationRequest { n: 2, ..poisoned(id) }).unwrap();
        assert_eq!(bench.engine.turn(), Turn::Worked);
        for stream in &mut bad {
            assert_eq!(events(stream), [SequenceEvent::Failed(EngineFailure::Internal)]);
        }
        assert_eq!(bench.engine.scheduler.running.len(), 1);
        finish(&mut bench, &mut paused);
        paused[0].check(false);
        bench.assert_empty();
        // The engine goes on.
        let mut good = bench.handle.submit(request(10, 5)).unwrap();
        bench.run_until_idle();
        assert!(matches!(events(&mut good[0]).last(), Some(SequenceEvent::Finished { .. })));
        assert_eq!(bench.handle.status(), EngineStatus::Ready);
        assert!(bench.handle.is_ready());
        bench.assert_empty();
    }
}

#[test]
fn a_second_failed_step_within_a_minute_turns_readiness_off() {
    let mut bench = Bench::new(&[(64, 4)], config());
    for _ in 0..2 {
        assert!(bench.handle.is_ready());
        let _bad = bench.handle.submit(poisoned(PANIC_ID)).unwrap();
        bench.run_until_idle();
    }
    assert!(!bench.handle.is_ready());
    assert_eq!(bench.handle.status(), EngineStatus::Ready);
    bench.clock.advance(Duration::from_secs(61));
    assert!(bench.handle.is_ready());
}

#[test]
fn logits_that_are_not_finite_end_their_sequence_only() {
    let mut bench = Bench::new(&[(64, 4)], config());
    let good_request = request(10, 5);
    let stream = bench.handle.submit(good_request.clone()).unwrap().pop();
    let mut readers = vec![Reader { stream, request: good_request, choice: 0, events: Vec::new() }];
    let mut bad = bench.handle.submit(poisoned(NAN_ID)).unwrap();
    finish(&mut bench, &mut readers);
    readers[0].check(false);
    assert_eq!(events(&mut bad[0]), [SequenceEvent::Failed(EngineFailure::NonFiniteLogits)]);
    bench.assert_empty();
}

#[test]
fn a_device_error_ends_everything() {
    let mut bench = Bench::new(&[(64, 2)], config());
    let mut running = bench.handle.submit(request(10, 40)).unwrap();
    assert_eq!(bench.engine.turn(), Turn::Worked);
    let mut bad = bench.handle.submit(poisoned(DEVICE_ID)).unwrap();
    let mut waiting = bench.handle.submit(request(10, 40)).unwrap();
    assert!(matches!(bench.engine.turn(), Turn::Dead(reason) if reason.contains("told to break")));
    for stream in running.iter_mut().chain(&mut bad).chain(&mut waiting) {
        let events = events(stream);
        assert_eq!(events.last(), Some(&SequenceEvent::Failed(EngineFailure::Internal)));
        assert_eq!(events.iter().filter(|event| event.is_last()).count(), 1);
    }
    assert_eq!(bench.handle.status(), EngineStatus::Dead);
    assert_eq!(bench.handle.submit(request(1, 1)).unwrap_err(), SubmitError::Dead);
}

#[test]
fn streams_end_even_if_the_engine_is_simply_gone() {
    let bench = Bench::new(&[(64, 2)], config());
    let mut streams = bench.handle.submit(request(10, 40)).unwrap();
    let Bench { engine, handle, .. } = bench;
    drop(engine);
    assert_eq!(events(&mut streams[0]), [SequenceEvent::Failed(EngineFailure::Internal)]);
    assert_eq!(handle.submit(request(1, 1)).unwrap_err(), SubmitError::ShuttingDown);
}
