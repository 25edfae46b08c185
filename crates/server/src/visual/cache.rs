//! Visual tokens of images that were seen: bounded in bytes, those used least recently go first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What an image's tokens depend on, as a digest.
pub(crate) type CacheKey = [u8; 32];

/// What an entry costs.
pub(crate) trait Sized {
    /// Bytes on the heap, roughly.
    fn bytes(&self) -> usize;
}

/// The cache. One lock: what is done under it takes microseconds.
pub(crate) struct ImageCache<T> {
    max_bytes: usize,
    entries: Mutex<Entries<T>>,
}

struct Entries<T> {
    by_key: HashMap<CacheKey, Entry<T>>,
    /// Keys by the time of their last use.
    by_use: BTreeMap<u64, CacheKey>,
    uses: u64,
    bytes: usize,
}

struct Entry<T> {
    value: Arc<T>,
    bytes: usize,
    last_use: u64,
}

/// Bytes that an entry needs beside its value, roughly: keys and nodes of both maps, allocations.
const ENTRY_BYTES: usize = 256;

impl<T: Sized> ImageCache<T> {
    /// An empty cache of at most `max_bytes`; 0 keeps nothing.
    pub(crate) fn new(max_bytes: usize) -> Self {
        let entries = Entries { by_key: HashMap::new(), by_use: BTreeMap::new(), uses: 0, bytes: 0 };
        Self { max_bytes, entries: Mutex::new(entries) }
    }

    /// What is kept under `key`.
    pub(crate) fn get(&self, key: &CacheKey) -> Option<Arc<T>> {
        let mut entries = self.lock();
        entries.uses += 1;
        let now = entries.uses;
        let entry = entries.by_key.get_mut(key)?;
        let last_use = std::mem::replace(&mut entry.last_use, now);
        let value = Arc::clone(&entry.value);
        entries.by_use.remove(&last_use);
        entries.by_use.insert(now, *key);
        Some(value)
    }

    /// Keeps a value, unless it is larger than the cache; the oldest ones make room.
    pub(crate) fn insert(&self, key: CacheKey, value: &Arc<T>) {
        let bytes = value.bytes().saturating_add(ENTRY_BYTES);
        if bytes > self.max_bytes {
            return;
        }
        let mut entries = self.lock();
        entries.remove(&key);
        while entries.bytes + bytes > self.max_bytes
            && let Some((_, oldest)) = entries.by_use.first_key_value()
        {
            let oldest = *oldest;
            entries.remove(&oldest);
        }
        entries.uses += 1;
        let last_use = entries.uses;
        entries.by_use.insert(last_use, key);
        entries.by_key.insert(key, Entry { value: Arc::clone(value), bytes, last_use });
        entries.bytes += bytes;
    }

    /// Bytes of what is kept.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        // No step between two consistent states can panic.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Entries<T> {
    fn remove(&mut self, key: &CacheKey) {
        if let Some(entry) = self.by_key.remove(key) {
            self.by_use.remove(&entry.last_use);
            self.bytes -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Weight(usize);

    impl Sized for Weight {
        fn bytes(&self) -> usize {
            self.0
        }
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let cache = ImageCache::new(3 * (100 + ENTRY_BYTES));
        let insert = |name: u8| cache.insert([name; 32], &Arc::new(Weight(100)));
        (0..3).for_each(insert);
        assert!(cache.get(&[0; 32]).is_some());
        insert(3);
        assert!(cache.get(&[1; 32]).is_none());
        assert!([0, 2, 3].iter().all(|name| cache.get(&[*name; 32]).is_some()));
        cache.insert([4; 32], &Arc::new(Weight(10_000)));
        assert!(cache.get(&[4; 32]).is_none(), "larger than the whole cache");
        assert!(cache.get(&[0; 32]).is_some(), "and nothing went for it");
    }

    #[test]
    fn a_cache_of_nothing_keeps_nothing() {
        let cache = ImageCache::new(0);
        cache.insert([0; 32], &Arc::new(Weight(0)));
        assert!(cache.get(&[0; 32]).is_none() && cache.bytes() == 0);
    }

    proptest! {
        /// Whatever happens, the bytes are counted right and stay in bounds.
        #[test]
        fn bookkeeping(steps in proptest::collection::vec((0u8..6, 0usize..2000, any::<bool>()), 0..60)) {
            let cache = ImageCache::new(4000);
            for (name, bytes, is_find) in steps {
                if is_find {
                    cache.get(&[name; 32]);
                } else {
                    cache.insert([name; 32], &Arc::new(Weight(bytes)));
                }
                let entries = cache.lock();
                let bytes: usize = entries.by_key.values().map(|entry| entry.bytes).sum();
                prop_assert!(entries.bytes == bytes && bytes <= 4000);
                prop_assert!(entries.by_use.len() == entries.by_key.len());
                prop_assert!(entries.by_use.values().all(|key| entries.by_key.contains_key(key)));
            }
        }
    }
}
