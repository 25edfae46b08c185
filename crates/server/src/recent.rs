//! Values by digest, bounded in bytes: those used least recently go first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// What a value is found by.
pub(crate) type Key = [u8; 32];

/// Bytes that an entry needs beside its value, roughly: keys and nodes of both maps, allocations.
pub(crate) const ENTRY_BYTES: usize = 256;

/// The values. What is done to them takes microseconds, and no step between two consistent states can panic.
#[derive(Debug)]
pub(crate) struct Recent<T: ?Sized> {
    max_bytes: usize,
    by_key: HashMap<Key, Entry<T>>,
    /// Keys by the time of their last use.
    by_use: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<T: ?Sized> {
    value: Arc<T>,
    bytes: usize,
    last_use: u64,
}

impl<T: ?Sized> Recent<T> {
    /// Room for `max_bytes`, [`ENTRY_BYTES`] of each value included; 0 keeps nothing.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, by_key: HashMap::new(), by_use: BTreeMap::new(), uses: 0, bytes: 0 }
    }

    /// The value under `key`, which has been used now.
    pub(crate) fn get(&mut self, key: &Key) -> Option<Arc<T>> {
        let now = self.next_use();
        let entry = self.by_key.get_mut(key)?;
        let last_use = std::mem::replace(&mut entry.last_use, now);
        self.by_use.remove(&last_use);
        self.by_use.insert(now, *key);
        Some(Arc::clone(&entry.value))
    }

    /// Whether a value of `bytes` on the heap can be kept: then it is, in place of what was under `key`, and
    /// the oldest ones make room.
    pub(crate) fn insert(&mut self, key: Key, value: Arc<T>, bytes: usize) -> bool {
        let bytes = bytes.saturating_add(ENTRY_BYTES);
        if bytes > self.max_bytes {
            return false;
        }
        self.remove(&key);
        while self.bytes + bytes > self.max_bytes
            && let Some((_, oldest)) = self.by_use.first_key_value()
        {
            let oldest = *oldest;
            self.remove(&oldest);
        }
        let last_use = self.next_use();
        self.by_use.insert(last_use, key);
        self.by_key.insert(key, Entry { value, bytes, last_use });
        self.bytes += bytes;
        true
    }

    /// Bytes of what is kept.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Keys and values, least recently used first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = (Key, &Arc<T>)> {
        self.by_use.values().filter_map(|key| Some((*key, &self.by_key.get(key)?.value)))
    }

    fn next_use(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    fn remove(&mut self, key: &Key) {
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

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut recent = Recent::new(3 * (100 + ENTRY_BYTES));
        (0..3).for_each(|name| assert!(recent.insert([name; 32], Arc::new(name), 100)));
        assert!(recent.get(&[0; 32]).is_some());
        assert!(recent.insert([3; 32], Arc::new(3), 100));
        assert!(recent.get(&[1; 32]).is_none());
        assert!([0, 2, 3].iter().all(|name| recent.get(&[*name; 32]).is_some()));
        assert!(!recent.insert([4; 32], Arc::new(4), 10_000));
        assert!(recent.get(&[4; 32]).is_none(), "larger than everything");
        assert!(recent.get(&[0; 32]).is_some(), "and nothing went for it");
    }

    #[test]
    fn no_room_keeps_nothing() {
        let mut recent = Recent::new(0);
        assert!(!recent.insert([0; 32], Arc::new(()), 0));
        assert!(recent.get(&[0; 32]).is_none() && recent.bytes() == 0);
    }

    proptest! {
        /// Whatever happens, the bytes are counted right and stay in bounds.
        #[test]
        fn bookkeeping(steps in proptest::collection::vec((0u8..6, 0usize..2000, any::<bool>()), 0..60)) {
            let mut recent = Recent::new(4000);
            for (name, bytes, is_find) in steps {
                if is_find {
                    recent.get(&[name; 32]);
                } else {
                    recent.insert([name; 32], Arc::new(()), bytes);
                }
                let bytes: usize = recent.by_key.values().map(|entry| entry.bytes).sum();
                prop_assert!(recent.bytes == bytes && bytes <= 4000);
                prop_assert!(recent.by_use.len() == recent.by_key.len());
                prop_assert!(recent.by_use.values().all(|key| recent.by_key.contains_key(key)));
            }
        }
    }
}
