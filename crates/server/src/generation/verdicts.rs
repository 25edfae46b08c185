//! Which schemas can be grammars, remembered.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::{Mutex, PoisonError},
};

use locket_processor::steering::GrammarSource;
use serde_json::Value;

/// What stands for a schema: two hashes with secret keys of their own, so that no two schemas have the same.
pub(super) type SchemaKey = (u64, u64);

/// What was found out about the latest schemas.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    hashers: (RandomState, RandomState),
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    verdicts: HashMap<SchemaKey, bool>,
    /// The oldest first.
    order: VecDeque<SchemaKey>,
}

impl Verdicts {
    /// Schemas remembered at most: those of some dozens of long lists of tools.
    const MAX_ENTRIES: usize = 4096;

    pub(super) fn key(&self, schema: &Value) -> SchemaKey {
        let source = GrammarSource::JsonSchema(schema.clone());
        (self.hashers.0.hash_one(&source), self.hashers.1.hash_one(&source))
    }

    pub(super) fn get(&self, key: SchemaKey) -> Option<bool> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).verdicts.get(&key).copied()
    }

    pub(super) fn put(&self, key: SchemaKey, is_grammar: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.verdicts.insert(key, is_grammar).is_none() {
            known.order.push_back(key);
        }
        if known.order.len() > Self::MAX_ENTRIES
            && let Some(oldest) = known.order.pop_front()
        {
            known.verdicts.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_latest_are_remembered() {
        let verdicts = Verdicts::default();
        let key = |number: usize| verdicts.key(&json!({"const": number}));
        assert_eq!(key(1), key(1));
        for number in 0..=Verdicts::MAX_ENTRIES {
            verdicts.put(key(number), number % 2 == 0);
            verdicts.put(key(number), number % 2 == 0);
        }
        assert_eq!((verdicts.get(key(0)), verdicts.get(key(1))), (None, Some(false)));
        assert_eq!(verdicts.get(key(Verdicts::MAX_ENTRIES)), Some(true));
    }
}
