//! Snapshots in RAM: least recently used first out, never more bytes than the bound.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{
    key::{KeyChain, SnapshotKey},
    lru::PrefixLru,
};

/// Bytes that one snapshot costs besides its image and tokens: its places in maps and lists.
const ENTRY_BYTES: u64 = 512;

/// A block's state after some tokens.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Under what it is found.
    pub key: SnapshotKey,
    /// Everything that the block has seen `[key.len]`: compared before the state is used.
    pub tokens: Vec<u32>,
    /// Cache settings in words, for the file's header.
    pub settings: String,
    /// What the model wrote.
    pub image: Vec<u8>,
    /// Its share of the bound, given back when the last owner drops it.
    pub _room: Room,
}

impl Snapshot {
    /// Bytes that a snapshot of this size takes.
    pub(crate) fn bytes(num_tokens: usize, image_bytes: usize) -> u64 {
        ENTRY_BYTES + 4 * num_tokens as u64 + image_bytes as u64
    }
}

/// Bytes taken out of the bound. Whoever holds the bytes holds this, the writer's queue and a load
/// under way included, so that the bound holds for all of them together.
#[derive(Debug)]
pub(crate) struct Room {
    held: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// It alone is larger than the bound.
    TooLarge,
    /// What is left is being written to disk or read from it.
    Busy,
}

/// The snapshots in RAM. Owned by the engine thread.
#[derive(Debug)]
pub(crate) struct Store {
    bound: u64,
    /// Bytes of all [`Room`]s.
    held: Arc<AtomicU64>,
    snapshots: PrefixLru<Arc<Snapshot>>,
}

impl Store {
    /// An empty store for `bound` bytes.
    pub(crate) fn new(bound: u64) -> Self {
        Self { bound, held: Arc::default(), snapshots: PrefixLru::default() }
    }

    /// Bytes held: of stored snapshots, and of those under way to or from the disk.
    pub(crate) fn bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Snapshots that can be found.
    pub(crate) fn len(&self) -> usize {
        self.snapshots.len()
    }

    /// Sets `bytes` aside; old snapshots leave until there is room, and are counted. Those that
    /// somebody else holds too would free nothing and stay.
    pub(crate) fn make_room(&mut self, bytes: u64, evicted: &mut u64) -> Result<Room, NoRoom> {
        if bytes > self.bound {
            return Err(NoRoom::TooLarge);
        }
        while self.bytes() + bytes > self.bound {
            let mut stored = self.snapshots.oldest_first();
            let idle = stored.find(|(_, snapshot)| Arc::strong_count(snapshot) == 1);
            let key = idle.map(|(key, _)| key.clone()).ok_or(NoRoom::Busy)?;
            drop(stored);
            self.snapshots.remove(&key);
            *evicted += 1;
        }
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Ok(Room { held: Arc::clone(&self.held), bytes })
    }

    /// Whether `key` is stored; it counts as used now.
    pub(crate) fn touch(&mut self, key: &SnapshotKey) -> bool {
        self.snapshots.touch(key).is_some()
    }

    /// Stores a snapshot that has its room; one that is there already stays.
    pub(crate) fn insert(&mut self, snapshot: Arc<Snapshot>) {
        self.snapshots.insert(&Arc::clone(&snapshot).key, snapshot);
    }

    /// Length of the longest stored prefix, 0 if there is none.
    pub(crate) fn longest(&self, chain: &KeyChain, prompt_ids: &[u32]) -> u32 {
        self.snapshots.longest(chain, prompt_ids).map_or(0, |(key, _)| key.len)
    }

    /// The longest stored prefix of a prompt, its tokens compared one by one.
    pub(crate) fn find(&mut self, chain: &KeyChain, prompt_ids: &[u32]) -> Option<Arc<Snapshot>> {
        let (_, snapshot) = self.snapshots.longest(chain, prompt_ids)?;
        let snapshot = Arc::clone(snapshot);
        self.snapshots.touch(&snapshot.key);
        prompt_ids.starts_with(&snapshot.tokens).then_some(snapshot)
    }

    /// Removes a snapshot that turned out to be of no use.
    pub(crate) fn remove(&mut self, key: &SnapshotKey) {
        self.snapshots.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locket_model::kv_cache::CacheSettings;
    use proptest::prelude::*;

    fn chain(ids: &[u32]) -> KeyChain {
        KeyChain::new(&[0; 32], &CacheSettings::full(1), b"", ids)
    }

    fn put(store: &mut Store, ids: &[u32], image_bytes: usize) -> Result<Arc<Snapshot>, NoRoom> {
        let room = store.make_room(Snapshot::bytes(ids.len(), image_bytes), &mut 0)?;
        let (key, tokens) = (chain(ids).key(ids), ids.to_vec());
        let snapshot =
            Snapshot { key, tokens, settings: String::new(), image: vec![0; image_bytes], _room: room };
        let snapshot = Arc::new(snapshot);
        store.insert(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    fn has(store: &mut Store, id: u32) -> bool {
        store.find(&chain(&[id, 9]), &[id, 9]).is_some()
    }

    #[test]
    fn the_least_recently_used_leaves_first() {
        let size = Snapshot::bytes(1, 100);
        let mut store = Store::new(2 * size);
        drop(put(&mut store, &[1], 100));
        drop(put(&mut store, &[2], 100));
        assert!(has(&mut store, 1));
        drop(put(&mut store, &[3], 100));
        assert!(!has(&mut store, 2) && has(&mut store, 1));
        assert_eq!((store.len(), store.bytes()), (2, 2 * size));
        assert_eq!(put(&mut store, &[4], 2 * size as usize).unwrap_err(), NoRoom::TooLarge);
        assert_eq!(store.len(), 2, "what cannot fit drives nobody out");
    }

    #[test]
    fn what_is_being_written_counts_and_stays() {
        let size = Snapshot::bytes(1, 100);
        let mut store = Store::new(2 * size);
        let first = put(&mut store, &[1], 100).unwrap();
        let second = put(&mut store, &[2], 100).unwrap();
        assert_eq!(put(&mut store, &[3], 100).unwrap_err(), NoRoom::Busy);
        drop(second);
        drop(put(&mut store, &[3], 100));
        assert!(has(&mut store, 1) && !has(&mut store, 2));
        store.remove(&first.key);
        assert_eq!(store.bytes(), 2 * size, "the writer still holds it");
        drop(first);
        assert_eq!(store.bytes(), size);
    }

    proptest! {
        #[test]
        fn never_above_the_bound(
            bound in 0u64..6000,
            steps in prop::collection::vec(
                (prop::collection::vec(0u32..3, 1..5), 0usize..2000, any::<bool>()), 1..80),
        ) {
            let mut store = Store::new(bound);
            let mut writing = std::collections::VecDeque::new();
            for (ids, image_bytes, is_written) in steps {
                if store.touch(&chain(&ids).key(&ids)) {
                    continue;
                }
                let fits = Snapshot::bytes(ids.len(), image_bytes) <= bound;
                match put(&mut store, &ids, image_bytes) {
                    Ok(snapshot) if is_written => writing.push_back(snapshot),
                    Ok(_) => prop_assert!(fits),
                    Err(NoRoom::TooLarge) => prop_assert!(!fits),
                    Err(NoRoom::Busy) => prop_assert!(writing.pop_front().is_some()),
                }
                if writing.len() > 2 {
                    writing.pop_front();
                }
                prop_assert!(store.bytes() <= bound);
                let stored = store.snapshots.oldest_first();
                let sizes = stored.map(|(_, kept)| Snapshot::bytes(kept.tokens.len(), kept.image.len()));
                prop_assert!(sizes.sum::<u64>() <= store.bytes());
                let prompt = [ids.as_slice(), &[9]].concat();
                if let Some(found) = store.find(&chain(&prompt), &prompt) {
                    prop_assert!(prompt.starts_with(&found.tokens));
                }
            }
            drop(writing);
            store.snapshots = PrefixLru::default();
            prop_assert_eq!(store.bytes(), 0);
        }
    }
}
