//! Snapshots on disk: two threads, so that the engine never waits for a file.
//!
//! The engine thread knows from the index what is there. It hands snapshots to the *writer*, whose
//! queue is bounded: what does not fit is dropped and counted. It asks the *reader* for a file and
//! goes on; the request waits in the queue meanwhile and is admitted when the answer comes. The
//! index is shared with both under a lock that is held for single look-ups, never over a file
//! operation.
//!
//! A directory belongs to one process at a time (a lock on its file `lock`, which the system gives
//! back however the process ends), so whatever lies there under a temporary name at the start was
//! left by a process that died and is swept.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    time::Duration,
};

use super::{
    file::{self, Refusal},
    key::{Digest, KeyChain, SnapshotKey},
    lru::PrefixLru,
    store::{Room, Snapshot},
};
use crate::metrics::SnapshotMetrics;

mod start;

/// Snapshots that may wait for the writer.
const WRITE_QUEUE: usize = 8;
/// Of these, places that only ends of prompts and turns may take: a long prompt's borders must not
/// push out the state that a client comes back to.
const KEPT_FOR_ENDS: usize = 4;
/// Errands that may wait for the reader.
const LOAD_QUEUE: usize = 64;
const SUFFIX: &str = "snapshot";
const TEMPORARY_SUFFIX: &str = "tmp";

/// What the index knows of a file.
#[derive(Debug, Clone, Copy)]
struct FileFacts {
    bytes: u64,
    image_len: u64,
}

/// The files that are there.
#[derive(Debug, Default)]
struct Index {
    files: PrefixLru<FileFacts>,
    bytes: u64,
}

impl Index {
    fn insert(&mut self, key: &SnapshotKey, facts: FileFacts) {
        if self.files.touch(key).is_none() {
            self.files.insert(key, facts);
            self.bytes += facts.bytes;
        }
    }

    fn remove(&mut self, key: &SnapshotKey) {
        self.bytes -= self.files.remove(key).map_or(0, |facts| facts.bytes);
    }
}

/// What the engine thread and both others share.
struct Shared {
    directory: PathBuf,
    fingerprint: Digest,
    bound: u64,
    index: Mutex<Index>,
    num_queued: AtomicUsize,
    must_stop: AtomicBool,
    metrics: SnapshotMetrics,
    /// Keeps other processes out for as long as anything here lives.
    _lock: File,
}

/// What the reader is to do.
enum Errand {
    /// Read a file.
    Fetch(Load),
    /// Delete one that the model would not take.
    Delete(SnapshotKey),
}

/// A file that the reader is to fetch.
struct Load {
    order: u64,
    key: SnapshotKey,
    image_len: u64,
    room: Room,
}

/// The reader's answer.
pub(crate) struct Loaded {
    /// The request's place in the order of submission.
    pub order: u64,
    /// The state, unless the file was gone or refused.
    pub snapshot: Option<Snapshot>,
}

/// A stored state that is on disk.
pub(crate) struct OnDisk {
    pub key: SnapshotKey,
    pub image_len: u64,
}

/// The engine thread's end.
pub(crate) struct Disk {
    shared: Arc<Shared>,
    writes: Option<SyncSender<Arc<Snapshot>>>,
    errands: Option<SyncSender<Errand>>,
    loaded: Receiver<Loaded>,
    /// Disconnected when both threads have ended.
    threads: Receiver<()>,
}

impl Disk {
    /// Takes the directory (made with mode 0700 if it is not there), indexes what is in it and
    /// starts the threads. `wake` is called when a load has ended.
    pub(crate) fn open(
        directory: &Path,
        bound: u64,
        fingerprint: Digest,
        metrics: SnapshotMetrics,
        wake: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let lock = start::take_directory(directory)?;
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            fingerprint,
            bound,
            index: Mutex::default(),
            num_queued: AtomicUsize::new(0),
            must_stop: AtomicBool::new(false),
            metrics,
            _lock: lock,
        });
        shared.scan()?;
        let (writes, to_write) = mpsc::sync_channel::<Arc<Snapshot>>(WRITE_QUEUE);
        let (writer_lives, threads) = mpsc::sync_channel::<()>(0);
        let reader_lives = writer_lives.clone();
        let for_writer = Arc::clone(&shared);
        std::thread::Builder::new().name("locket-snapshot-writer".into()).spawn(move || {
            while let Ok(snapshot) = to_write.recv() {
                for_writer.write(&snapshot);
                for_writer.num_queued.fetch_sub(1, Ordering::SeqCst);
            }
            // In this order: whoever waits for the thread may then take the directory.
            drop(for_writer);
            drop(writer_lives);
        })?;
        let (errands, to_do) = mpsc::sync_channel::<Errand>(LOAD_QUEUE);
        // One more than can be asked for at a time: the reader never waits for the engine.
        let (answers, loaded) = mpsc::sync_channel(LOAD_QUEUE + 2);
        let for_reader = Arc::clone(&shared);
        std::thread::Builder::new().name("locket-snapshot-reader".into()).spawn(move || {
            while let Ok(errand) = to_do.recv() {
                let load = match errand {
                    Errand::Fetch(load) => load,
                    Errand::Delete(key) => {
                        for_reader.delete(&for_reader.path(&key));
                        continue;
                    }
                };
                let answer = Loaded { order: load.order, snapshot: for_reader.load(load) };
                if answers.send(answer).is_err() {
                    break;
                }
                wake();
            }
            drop(for_reader);
            drop(reader_lives);
        })?;
        Ok(Self { shared, writes: Some(writes), errands: Some(errands), loaded, threads })
    }

    /// The longest prefix of a prompt that is on disk.
    pub(crate) fn longest(&self, chain: &KeyChain, prompt_ids: &[u32]) -> Option<OnDisk> {
        let index = self.shared.index();
        let (key, facts) = index.files.longest(chain, prompt_ids)?;
        Some(OnDisk { key: key.clone(), image_len: facts.image_len })
    }

    /// Asks for a file; the answer comes through [`Self::loaded`]. `false` if too many are asked
    /// for already.
    pub(crate) fn load(&self, order: u64, found: OnDisk, room: Room) -> bool {
        let load = Load { order, key: found.key, image_len: found.image_len, room };
        self.send(Errand::Fetch(load))
    }

    /// Answers that have come.
    pub(crate) fn loaded(&self) -> impl Iterator<Item = Loaded> + '_ {
        self.loaded.try_iter()
    }

    /// Queues a snapshot for the writer, or drops it if the queue is full.
    pub(crate) fn write(&self, snapshot: Arc<Snapshot>, is_end: bool) {
        let limit = if is_end { WRITE_QUEUE } else { WRITE_QUEUE - KEPT_FOR_ENDS };
        let has_room = self.shared.num_queued.load(Ordering::SeqCst) < limit;
        self.shared.num_queued.fetch_add(1, Ordering::SeqCst);
        let writes = self.writes.as_ref().filter(|_| has_room);
        if writes.is_none_or(|writes| writes.try_send(snapshot).is_err()) {
            self.shared.num_queued.fetch_sub(1, Ordering::SeqCst);
            self.shared.metrics.write_dropped();
        }
    }

    /// Takes a state of no use out: its file goes too, if the reader has time for it.
    pub(crate) fn remove(&self, key: &SnapshotKey) {
        self.shared.forget(key);
        self.send(Errand::Delete(key.clone()));
    }

    fn send(&self, errand: Errand) -> bool {
        self.errands.as_ref().is_some_and(|errands| errands.try_send(errand).is_ok())
    }

    /// Lets the threads finish what is queued, at most for as long as `patience`.
    pub(crate) fn close(&mut self, patience: Duration) {
        self.errands = None;
        self.writes = None;
        if self.threads.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            self.shared.must_stop.store(true, Ordering::SeqCst);
            let left = self.shared.num_queued.load(Ordering::SeqCst);
            tracing::warn!(left, ?patience, "snapshots were not written in time and are lost");
        }
    }
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        // Every change is one call, so a panic elsewhere leaves nothing half done.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, key: &SnapshotKey) -> PathBuf {
        self.directory.join(key.file_stem()).with_extension(SUFFIX)
    }

    fn tell(&self, index: &Index) {
        self.metrics.set_disk(index.bytes, index.files.len());
    }

    fn forget(&self, key: &SnapshotKey) {
        let mut index = self.index();
        index.remove(key);
        self.tell(&index);
    }

    fn delete(&self, path: &Path) {
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot delete a snapshot");
        }
    }

    /// Logs and counts a file that is not used. Broken files are deleted; foreign ones may be of
    /// use to somebody else and stay.
    fn refuse(&self, path: &Path, refusal: &Refusal) {
        let reason = match refusal {
            Refusal::Foreign(_) => "foreign",
            Refusal::Corrupt(_) => "corrupt",
            Refusal::Io(_) => "read_failed",
        };
        tracing::warn!(path = %path.display(), reason = %refusal, "a snapshot file is refused");
        self.metrics.refused(reason);
        if matches!(refusal, Refusal::Corrupt(_)) {
            self.delete(path);
        }
    }

    /// Writer: makes room and writes one file.
    fn write(&self, snapshot: &Snapshot) {
        if self.must_stop.load(Ordering::SeqCst) {
            return self.metrics.write_dropped();
        }
        if self.index().files.touch(&snapshot.key).is_some() {
            return;
        }
        let bytes = file::file_bytes(&self.fingerprint, snapshot);
        if bytes > self.bound {
            return self.metrics.refused("too_large");
        }
        self.shrink_to(self.bound - bytes);
        let path = self.path(&snapshot.key);
        let written = file::write(&path, &temporary(&path), &self.fingerprint, snapshot);
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot write a snapshot");
            return self.metrics.refused("write_failed");
        }
        let mut index = self.index();
        index.insert(&snapshot.key, FileFacts { bytes, image_len: snapshot.image.len() as u64 });
        self.tell(&index);
    }

    /// Deletes the least recently used files until at most `bytes` are left.
    fn shrink_to(&self, bytes: u64) {
        loop {
            let mut index = self.index();
            if index.bytes <= bytes {
                return;
            }
            let Some(key) = index.files.oldest_first().next().map(|(key, _)| key.clone()) else { return };
            index.remove(&key);
            self.tell(&index);
            drop(index);
            self.metrics.evicted("disk", 1);
            self.delete(&self.path(&key));
        }
    }

    /// Reader: fetches one file.
    fn load(&self, load: Load) -> Option<Snapshot> {
        let path = self.path(&load.key);
        match file::read(&path, &self.fingerprint, &load.key, load.image_len) {
            Ok((tokens, image, settings)) => {
                self.index().files.touch(&load.key);
                Some(Snapshot { key: load.key, tokens, settings, image, _room: load.room })
            }
            // The writer has made room in the meantime.
            Err(Refusal::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                self.forget(&load.key);
                None
            }
            Err(refusal) => {
                self.forget(&load.key);
                self.refuse(&path, &refusal);
                None
            }
        }
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(TEMPORARY_SUFFIX);
    name.into()
}

#[cfg(test)]
mod tests;
