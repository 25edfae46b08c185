//! The real thread: wake-ups, bounds under concurrency, shutdown.

use super::*;
use crate::{EngineStatus, start};

fn started(classes: &[(u32, u32)], config: EngineConfig) -> (EngineHandle, crate::EngineThread) {
    let model = FakeModel::new(classes, config.max_batch_rows);
    start(Box::new(model), config, &prometheus::Registry::new()).unwrap()
}

fn read_all(stream: &mut SequenceStream) -> Vec<SequenceEvent> {
    std::iter::from_fn(|| stream.blocking_next()).collect()
}

#[test]
fn serves_drains_and_joins() {
    let (handle, thread) = started(&[(128, 4)], config());
    let request = request(100, 20);
    let mut streams = handle.submit(request.clone()).unwrap();
    let events = read_all(&mut streams[0]);
    let reader = Reader { stream: streams.pop(), request, choice: 0, events };
    reader.check(false);
    handle.drain();
    thread.join().unwrap();
    assert_eq!(handle.status(), EngineStatus::Stopped);
}

#[test]
fn a_reader_that_makes_room_wakes_an_idle_engine() {
    // Every pause and every wake-up must meet: a lost one hangs this test.
    let config = EngineConfig { event_buffer: 4, ..config() };
    let (handle, thread) = started(&[(2048, 4)], config);
    std::thread::scope(|scope| {
        for at in 0..4 {
            let handle = &handle;
            scope.spawn(move || {
                let request = request(10 + at, 2000);
                let mut streams = handle.submit(request).unwrap();
                let events = read_all(&mut streams[0]);
                assert_eq!(events.len(), 2002);
            });
        }
    });
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn concurrent_submissions_never_exceed_the_queue() {
    // One block, taken by a sequence whose reader does not read: nothing else can start.
    let config = EngineConfig { max_waiting: 8, event_buffer: 4, ..config() };
    let (handle, thread) = started(&[(2048, 1)], config);
    let mut blocker = handle.submit(request(10, 2000)).unwrap();
    assert!(matches!(blocker[0].blocking_next(), Some(SequenceEvent::Started { .. })));
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..64).map(|_| scope.spawn(|| handle.submit(request(10, 1)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (accepted, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((accepted.len(), refused.len()), (8, 56));
    for error in refused {
        assert_eq!(error.unwrap_err(), SubmitError::QueueFull { limit: 8 });
    }
    assert_eq!(handle.num_waiting(), 8);
    // The blocker's reader leaves: the others get their turn without anybody else ringing. Their
    // events fit into the channels, so the order in which they are read here does not matter.
    drop(blocker);
    for streams in accepted {
        let events = read_all(&mut streams.unwrap()[0]);
        assert!(matches!(events.last(), Some(SequenceEvent::Finished { .. })));
    }
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn stops_when_all_handles_and_streams_are_gone() {
    let (handle, thread) = started(&[(2048, 1)], config());
    let stream = handle.submit(request(10, 2000)).unwrap();
    drop(handle);
    drop(stream);
    thread.join().unwrap();
}

#[test]
fn two_engines_cannot_share_a_registry() {
    let registry = prometheus::Registry::new();
    let model = || Box::new(FakeModel::new(&[(64, 1)], 64));
    let (handle, thread) = start(model(), config(), &registry).unwrap();
    assert!(matches!(start(model(), config(), &registry), Err(crate::Error::Metrics(_))));
    drop(handle);
    thread.join().unwrap();
}
