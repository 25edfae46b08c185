//! Values by snapshot key: finds the longest stored prefix of a prompt, and knows which value was
//! used least recently. RAM and disk have one each.

use std::collections::{BTreeMap, HashMap};

use super::key::{Digest, KeyChain, PAGE_TOKENS, SnapshotKey};

#[derive(Debug)]
struct Entry<T> {
    key: SnapshotKey,
    value: T,
    /// Place in [`PrefixLru::order`].
    used: u64,
}

/// Entries that have seen the same whole pages: the tokens after these, and the entry's number.
type Tails = Vec<(Box<[u32]>, u64)>;

/// Values by key and by time of use.
#[derive(Debug)]
pub(crate) struct PrefixLru<T> {
    entries: HashMap<u64, Entry<T>>,
    /// By the digest after the last whole page.
    pages: HashMap<Digest, Tails>,
    /// Numbers of entries by time of use, oldest first.
    order: BTreeMap<u64, u64>,
    /// Counts uses and numbers entries.
    next: u64,
}

impl<T> Default for PrefixLru<T> {
    fn default() -> Self {
        Self { entries: HashMap::new(), pages: HashMap::new(), order: BTreeMap::new(), next: 0 }
    }
}

impl<T> PrefixLru<T> {
    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The value under `key`, which counts as used now.
    pub(crate) fn touch(&mut self, key: &SnapshotKey) -> Option<&T> {
        let number = self.number_of(key)?;
        self.use_now(number)
    }

    /// Puts `value` under `key` unless something is there already.
    pub(crate) fn insert(&mut self, key: &SnapshotKey, value: T) {
        if self.touch(key).is_some() {
            return;
        }
        self.next += 1;
        let number = self.next;
        self.pages.entry(key.page).or_default().push((key.tail.clone(), number));
        self.order.insert(number, number);
        self.entries.insert(number, Entry { key: key.clone(), value, used: number });
    }

    /// Removes `key` and returns its value.
    pub(crate) fn remove(&mut self, key: &SnapshotKey) -> Option<T> {
        let number = self.number_of(key)?;
        let entry = self.entries.remove(&number)?;
        self.order.remove(&entry.used);
        if let Some(page) = self.pages.get_mut(&key.page) {
            page.retain(|&(_, other)| other != number);
            if page.is_empty() {
                self.pages.remove(&key.page);
            }
        }
        Some(entry.value)
    }

    /// Keys and values, least recently used first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = (&SnapshotKey, &T)> {
        let entries = self.order.values().filter_map(|number| self.entries.get(number));
        entries.map(|entry| (&entry.key, &entry.value))
    }

    /// The longest stored prefix of a prompt that leaves at least one token to run. Equal by digest
    /// and tail; the caller compares all tokens.
    pub(crate) fn longest(&self, chain: &KeyChain, prompt_ids: &[u32]) -> Option<(&SnapshotKey, &T)> {
        let usable = &prompt_ids[..prompt_ids.len().checked_sub(1)?];
        let pages = chain.digests().iter().take(usable.len() / PAGE_TOKENS + 1).enumerate();
        let number = pages.rev().find_map(|(page, digest)| {
            let rest = &usable[page * PAGE_TOKENS..];
            let stored = self.pages.get(digest)?.iter();
            let fitting = stored.filter(|(tail, _)| rest.starts_with(tail));
            fitting.max_by_key(|(tail, _)| tail.len()).map(|&(_, number)| number)
        })?;
        self.entries.get(&number).map(|entry| (&entry.key, &entry.value))
    }

    fn number_of(&self, key: &SnapshotKey) -> Option<u64> {
        let page = self.pages.get(&key.page)?;
        page.iter().find(|(tail, _)| *tail == key.tail).map(|&(_, number)| number)
    }

    fn use_now(&mut self, number: u64) -> Option<&T> {
        self.next += 1;
        let entry = self.entries.get_mut(&number)?;
        self.order.remove(&entry.used);
        self.order.insert(self.next, number);
        entry.used = self.next;
        Some(&entry.value)
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

    proptest! {
        /// Against trying every prefix.
        #[test]
        fn finds_the_longest_proper_prefix(
            stored in prop::collection::vec(prop::collection::vec(0u32..2, 1..40), 1..30),
            prompt in prop::collection::vec(0u32..2, 1..40),
        ) {
            let mut lru = PrefixLru::default();
            let mut known = std::collections::BTreeSet::new();
            for ids in &stored {
                lru.insert(&chain(ids).key(ids), ids.clone());
                known.insert(ids.clone());
            }
            prop_assert_eq!(lru.len(), known.len());
            let expected = (1..prompt.len()).rev().find(|&len| known.contains(&prompt[..len]));
            let found = lru.longest(&chain(&prompt), &prompt).map(|(_, ids)| ids.len());
            prop_assert_eq!(found, expected);
            for ids in &known {
                let removed = lru.remove(&chain(ids).key(ids));
                prop_assert_eq!(removed.as_ref(), Some(ids));
            }
            prop_assert!(lru.longest(&chain(&prompt), &prompt).is_none());
            prop_assert!(lru.pages.is_empty() && lru.order.is_empty() && lru.entries.is_empty());
        }

        /// Against a list.
        #[test]
        fn order_is_that_of_use(uses in prop::collection::vec(0u32..6, 1..60)) {
            let mut lru = PrefixLru::default();
            let mut expected: Vec<u32> = Vec::new();
            for id in uses {
                let key = chain(&[id]).key(&[id]);
                if lru.touch(&key).is_none() {
                    lru.insert(&key, id);
                }
                expected.retain(|&other| other != id);
                expected.push(id);
                let order: Vec<u32> = lru.oldest_first().map(|(_, &id)| id).collect();
                prop_assert_eq!(&order, &expected);
            }
        }
    }
}
