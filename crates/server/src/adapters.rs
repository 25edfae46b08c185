//! Adapters beside the model: names under which clients ask for them, and what they are in the engine.

use std::sync::{Arc, PoisonError, RwLock};

use locket_engine::AdapterId;

/// An adapter that is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAdapter {
    /// The model's name with it.
    pub name: String,
    /// `root` in `/v1/models`: the name of its folder.
    pub root: String,
    /// What the engine knows it by.
    pub id: AdapterId,
}

/// Adapters as they are now, shared by all who look.
#[derive(Debug, Clone, Default)]
pub(crate) struct Adapters {
    /// In the order in which they were loaded.
    named: Arc<RwLock<Vec<NamedAdapter>>>,
}

impl Adapters {
    /// Those that are there at start.
    pub(crate) fn new(at_start: Vec<NamedAdapter>) -> Self {
        Self { named: Arc::new(RwLock::new(at_start)) }
    }

    /// The adapter of this name.
    pub(crate) fn find(&self, name: &str) -> Option<NamedAdapter> {
        self.read(|named| named.iter().find(|adapter| adapter.name == name).cloned())
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<NamedAdapter> {
        self.read(<[NamedAdapter]>::to_vec)
    }

    /// Adds one; `false` if its name is taken.
    pub(crate) fn add(&self, adapter: NamedAdapter) -> bool {
        let mut named = self.named.write().unwrap_or_else(PoisonError::into_inner);
        let is_free = named.iter().all(|other| other.name != adapter.name);
        if is_free {
            named.push(adapter);
        }
        is_free
    }

    /// Takes one away.
    pub(crate) fn remove(&self, name: &str) -> Option<NamedAdapter> {
        let mut named = self.named.write().unwrap_or_else(PoisonError::into_inner);
        let index = named.iter().position(|adapter| adapter.name == name)?;
        Some(named.remove(index))
    }

    fn read<T>(&self, look: impl FnOnce(&[NamedAdapter]) -> T) -> T {
        // A list is replaced or not: no panic leaves it half-done.
        look(&self.named.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_found_by_their_names() {
        let adapter =
            |name: &str, id| NamedAdapter { name: name.into(), root: "folder".into(), id: AdapterId(id) };
        let adapters = Adapters::new(vec![adapter("a", 3), adapter("b", 4)]);
        assert_eq!(adapters.find("b").map(|adapter| adapter.id), Some(AdapterId(4)));
        assert_eq!((adapters.find("c"), adapters.all().len()), (None, 2));
        assert!(!adapters.add(adapter("a", 5)) && adapters.add(adapter("c", 5)));
        assert_eq!(adapters.remove("a").map(|adapter| adapter.id), Some(AdapterId(3)));
        assert_eq!((adapters.remove("a"), adapters.all().len()), (None, 2));
    }
}
