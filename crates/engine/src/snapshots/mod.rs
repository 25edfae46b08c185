//! Snapshots, our prefix cache: the state of a block after some tokens, kept so that a prompt that
//! begins with these tokens need not run them again.
//!
//! A block's state is small and of fixed size, whatever the length of the conversation. It is taken
//! every 1,024 tokens from the start, where the prompt ends and its answer's header begins, and at
//! the end of a turn. The longest stored prefix of a prompt wins ([`lru`]); it is found by a hash
//! chain over tokens, model, cache settings and tenant ([`key`]) and compared token by token.
//! [`store`] keeps snapshots in RAM within a bound; [`disk`] may keep more, in files ([`file`]).
//!
//! **Why loads run beside the queue.** A state on disk takes time to read. The submitting thread is
//! an async runtime's and the engine thread has others to serve, so neither may wait: a reader
//! thread fetches the file while the request waits in the engine's queue, passed over by those
//! behind it. The state then enters RAM like any other. Should it be gone again when the request's
//! turn comes, or the disk not answer, the prompt is simply run.
//!
//! **The bound** covers everything that is held: stored states, those that the writer has not
//! written yet and those that are being read. Only the one state that is being taken is not in it.

pub(crate) mod disk;
mod file;
pub(crate) mod key;
mod lru;
mod store;

use std::{sync::Arc, time::Duration};

use crate::{Error, config::CHUNK_ROWS, handle::Shared, metrics::SnapshotMetrics};

use self::{
    disk::Disk,
    store::{NoRoom, Store},
};
pub(crate) use self::{
    key::{Digest, KeyChain, SnapshotKey, fingerprint},
    store::Snapshot,
};

/// How long the writer may take to finish what is queued when the engine stops.
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);

/// When a snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Every so many tokens from the start.
    Border,
    /// Before the header of the answer.
    PromptEnd,
    /// After the answer.
    TurnEnd,
}

impl Moment {
    /// For metric labels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Border => "border",
            Self::PromptEnd => "prompt_end",
            Self::TurnEnd => "turn_end",
        }
    }
}

/// All snapshots. Owned by the engine thread.
pub(crate) struct Snapshots {
    store: Store,
    disk: Option<Disk>,
    metrics: SnapshotMetrics,
}

impl Snapshots {
    /// Nothing if they are turned off. `wake` is called when a file has been read.
    ///
    /// # Errors
    /// [`Error::Config`] if the directory cannot be used.
    pub(crate) fn open(shared: &Shared, wake: impl Fn() + Send + 'static) -> Result<Option<Self>, Error> {
        let Some(fingerprint) = shared.fingerprint else { return Ok(None) };
        let (config, metrics) = (&shared.config, shared.metrics.snapshots());
        let disk = config.snapshot_dir.as_ref().map(|directory| {
            let opened =
                Disk::open(directory, config.snapshot_disk_bytes, fingerprint, metrics.clone(), wake);
            opened.map_err(|error| Error::Config {
                field: "snapshot_dir",
                reason: format!("{} cannot be used: {error}", directory.display()),
            })
        });
        let store = Store::new(config.snapshot_memory_bytes);
        Ok(Some(Self { store, disk: disk.transpose()?, metrics: metrics.clone() }))
    }

    /// Starts to read the longest prefix from disk if it is worth it: longer than what RAM has by
    /// at least a chunk. Returns whether a load is under way for the request `order`.
    pub(crate) fn start_load(&mut self, order: u64, chain: &KeyChain, prompt_ids: &[u32]) -> bool {
        let Some(disk) = &self.disk else { return false };
        let Some(found) = disk.longest(chain, prompt_ids) else { return false };
        if found.key.len < self.store.longest(chain, prompt_ids) + CHUNK_ROWS as u32 {
            return false;
        }
        let bytes = Snapshot::bytes(found.key.len as usize, found.image_len as usize);
        let room = make_room(&mut self.store, &self.metrics, bytes);
        room.is_some_and(|room| disk.load(order, found, room))
    }

    /// Takes in the states that were read; `ended` gets the orders of the requests whose load has
    /// ended, well or not.
    pub(crate) fn finish_loads(&mut self, mut ended: impl FnMut(u64)) {
        let Some(disk) = &self.disk else { return };
        for loaded in disk.loaded() {
            if let Some(snapshot) = loaded.snapshot {
                self.store.insert(Arc::new(snapshot));
            }
            ended(loaded.order);
            self.metrics.set_ram(self.store.bytes(), self.store.len());
        }
    }

    /// The longest prefix of a prompt that is in RAM.
    pub(crate) fn find(&mut self, chain: &KeyChain, prompt_ids: &[u32]) -> Option<Arc<Snapshot>> {
        self.store.find(chain, prompt_ids)
    }

    /// Whether there is such a state in RAM; it counts as used.
    pub(crate) fn has(&mut self, key: &SnapshotKey) -> bool {
        self.store.touch(key)
    }

    /// Keeps a state, and passes it to the disk if there is one.
    pub(crate) fn keep(
        &mut self,
        key: SnapshotKey,
        tokens: Vec<u32>,
        settings: &str,
        image: Vec<u8>,
        moment: Moment,
    ) {
        let bytes = Snapshot::bytes(tokens.len(), image.capacity());
        if let Some(room) = make_room(&mut self.store, &self.metrics, bytes) {
            let snapshot =
                Arc::new(Snapshot { key, tokens, settings: settings.to_owned(), image, _room: room });
            self.store.insert(Arc::clone(&snapshot));
            self.metrics.taken(moment.name());
            if let Some(disk) = &self.disk {
                disk.write(snapshot, moment != Moment::Border);
            }
        }
        self.tell();
    }

    /// Forgets a state that the model would not take.
    pub(crate) fn discard(&mut self, key: &SnapshotKey) {
        self.metrics.refused("import_failed");
        self.store.remove(key);
        if let Some(disk) = &self.disk {
            disk.remove(key);
        }
        self.tell();
    }

    /// Lets the disk finish, for a bounded time.
    pub(crate) fn close(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.close(FLUSH_PATIENCE);
        }
    }

    fn tell(&self) {
        self.metrics.set_ram(self.store.bytes(), self.store.len());
    }

    /// Bytes held now.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> u64 {
        self.store.bytes()
    }
}

/// Room for a snapshot; counts those that had to leave, and a refusal.
fn make_room(store: &mut Store, metrics: &SnapshotMetrics, bytes: u64) -> Option<store::Room> {
    let mut evicted = 0;
    let room = store.make_room(bytes, &mut evicted);
    metrics.evicted("ram", evicted);
    room.map_err(|error| {
        metrics.refused(match error {
            NoRoom::TooLarge => "too_large",
            NoRoom::Busy => "no_room",
        });
    })
    .ok()
}
