//! Snapshots that outlive the process: restarts, broken files, a directory that is taken.

use std::path::{Path, PathBuf};

use super::*;
use crate::{EngineThread, Error, start};

struct Server {
    handle: EngineHandle,
    thread: EngineThread,
    registry: prometheus::Registry,
}

fn settings(directory: &Path) -> EngineConfig {
    EngineConfig {
        snapshot_memory_bytes: 1 << 20,
        snapshot_interval: 64,
        snapshot_dir: Some(directory.to_owned()),
        model_fingerprint: [1; 32],
        ..config()
    }
}

impl Server {
    fn start(config: EngineConfig) -> Self {
        let model = FakeModel::new(&[(1024, 4)], config.max_batch_rows).leaving_grid();
        let registry = prometheus::Registry::new();
        let (handle, thread) = start(Box::new(model), config, &registry).unwrap();
        Self { handle, thread, registry }
    }

    /// Tokens that came from a snapshot; the text is checked.
    fn ask(&self, request: &GenerationRequest) -> u32 {
        let mut stream = self.handle.submit(request.clone()).unwrap().pop().unwrap();
        let events: Vec<_> = std::iter::from_fn(|| stream.blocking_next()).collect();
        let SequenceEvent::Started { cached_tokens, .. } = events[0] else { panic!("{events:?}") };
        let reader = Reader { stream: Some(stream), request: request.clone(), choice: 0, events };
        reader.check(false);
        cached_tokens
    }

    fn refused(&self, reason: &str) -> f64 {
        metric(&self.registry, "locket_snapshots_refused_total", Some(reason))
    }

    /// Ends in order: everything that was taken is on disk.
    fn stop(self) {
        self.handle.drain();
        self.thread.join().unwrap();
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "snapshot")).collect();
    files.sort();
    files
}

/// A prompt of 100 tokens whose snapshots are at 64 (border) and 104 (turn end), and its sequel.
fn two_turns() -> [GenerationRequest; 2] {
    let first = request(100, 5);
    let mut second = request(150, 5);
    second.prompt_ids = first.prompt_ids.iter().copied().chain(alone(&first, 0).0).collect();
    second.prompt_ids.extend([4; 45]);
    [first, second]
}

#[test]
fn a_conversation_goes_on_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = two_turns();
    let server = Server::start(settings(directory.path()));
    assert_eq!(server.ask(&first), 0);
    server.stop();
    assert_eq!(files(directory.path()).len(), 2);
    let server = Server::start(settings(directory.path()));
    assert_eq!(metric(&server.registry, "locket_snapshots", Some("disk")), 2.0);
    assert_eq!(server.ask(&second), 104);
    assert_eq!(server.ask(&first), 64);
    assert_eq!(server.ask(&GenerationRequest { salt: b"other".to_vec(), ..second }), 0);
    server.stop();
}

#[test]
fn unfinished_files_are_swept_and_broken_ones_refused() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = two_turns();
    let server = Server::start(settings(directory.path()));
    server.ask(&first);
    server.stop();
    // As a process leaves it that is killed while it writes.
    let unfinished = directory.path().join("0123.snapshot.tmp");
    std::fs::write(&unfinished, b"LOCKETSN").unwrap();
    let unrelated = directory.path().join("notes.txt");
    std::fs::write(&unrelated, b"mine").unwrap();
    // One bit of each image; the headers are whole, so the start does not see it.
    for path in files(directory.path()) {
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 40;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let server = Server::start(settings(directory.path()));
    assert!(!unfinished.exists() && unrelated.exists());
    assert_eq!(server.ask(&second), 0);
    assert_eq!(server.refused("corrupt"), 1.0);
    // The other one is found broken when its turn comes.
    assert_eq!(server.ask(&first), 64, "the second prompt has left its own");
    server.stop();
    let server = Server::start(settings(directory.path()));
    assert_eq!(server.refused("corrupt"), 0.0, "broken files are deleted and written again");
    server.stop();
}

#[test]
fn truncated_files_are_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = two_turns();
    let server = Server::start(settings(directory.path()));
    server.ask(&first);
    server.stop();
    for path in files(directory.path()) {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    }
    let server = Server::start(settings(directory.path()));
    assert_eq!(server.refused("corrupt"), 2.0);
    assert!(files(directory.path()).is_empty());
    assert_eq!(server.ask(&second), 0);
    server.stop();
}

#[test]
fn files_of_another_model_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = two_turns();
    let server = Server::start(settings(directory.path()));
    server.ask(&first);
    server.stop();
    let other = EngineConfig { model_fingerprint: [2; 32], ..settings(directory.path()) };
    let server = Server::start(other);
    assert_eq!(server.refused("foreign"), 2.0);
    assert_eq!(server.ask(&second), 0);
    server.stop();
    let server = Server::start(settings(directory.path()));
    assert_eq!(server.ask(&second), 104);
    server.stop();
}

#[test]
fn a_directory_has_one_owner() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(settings(directory.path()));
    let model = Box::new(FakeModel::new(&[(64, 1)], 64));
    let error = start(model, settings(directory.path()), &prometheus::Registry::new()).unwrap_err();
    assert!(matches!(&error, Error::Config { field: "snapshot_dir", .. }), "{error}");
    server.stop();
    Server::start(settings(directory.path())).stop();
}

#[test]
fn the_disk_keeps_to_its_bound() {
    let directory = tempfile::tempdir().unwrap();
    let bound = 4000;
    let config = EngineConfig { snapshot_disk_bytes: bound, ..settings(directory.path()) };
    let server = Server::start(config.clone());
    for prompt_len in 20..60 {
        server.ask(&request(prompt_len, 3));
    }
    server.stop();
    let bytes: u64 = files(directory.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes > 0 && bytes <= bound, "{bytes}");
    // A smaller bound holds from the start.
    let server = Server::start(EngineConfig { snapshot_disk_bytes: 1000, ..config });
    assert!(metric(&server.registry, "locket_snapshot_bytes", Some("disk")) <= 1000.0);
    server.stop();
}
