//! API keys: who may call, what for, and how much.
//!
//! Keys come from the settings and from a file ([`read_file`]) that can be read again while the
//! server runs. Only their SHA-256 digests are kept, and a key that is presented is compared with all
//! of them in constant time. Names of keys are shown in logs and metrics, keys themselves never.

mod bucket;
mod digest;
mod file;
mod guard;
mod limits;
mod tier;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

pub use digest::KeyDigest;
pub use file::read_file;
pub(crate) use guard::check;
pub(crate) use limits::{KeyLimits, KeySlot, Limit, TokenReservation};
pub(crate) use tier::{apply_tier, check_priority};

use crate::state::unix_seconds;

/// One key as the operator wrote it down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEntry {
    /// Shown in logs and metrics.
    pub name: String,
    /// Digest of the key.
    pub digest: KeyDigest,
    /// What the key may use.
    pub limits: LimitSettings,
    /// `service_tier` `priority` and `fast` have an effect, and `priority` may be negative.
    pub may_prioritise: bool,
    /// Served names that the key may use; empty: all.
    pub models: Vec<String>,
    /// From when on the key is refused, in Unix seconds.
    pub expires: Option<u64>,
}

/// Limits of one key; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitSettings {
    /// Requests with a body in a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers in a minute.
    pub tokens_per_minute: Option<u32>,
    /// Requests at once, streams included.
    pub max_concurrent: Option<u32>,
}

impl KeyEntry {
    /// A key without limits.
    pub fn unlimited(name: impl Into<String>, digest: KeyDigest) -> Self {
        Self {
            name: name.into(),
            digest,
            limits: LimitSettings::default(),
            may_prioritise: false,
            models: Vec::new(),
            expires: None,
        }
    }
}

/// Keys that cannot be used. No text of it holds a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// The file is not there, or may not be read.
    #[error("key file {path}: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the operating system says.
        reason: String,
    },
    /// The file is not TOML, or an entry of it is wrong.
    #[error("key file {path}, {place}: {reason}")]
    Invalid {
        /// The file.
        path: String,
        /// Line, or number of the entry.
        place: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Two keys have the same name, or two names the same key.
    #[error("API keys: {0}")]
    Ambiguous(String),
}

/// A key in use.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) entry: KeyEntry,
    pub(crate) limits: Arc<KeyLimits>,
}

impl Key {
    /// Whether the key may use the model under this served name.
    pub(crate) fn may_use(&self, model: &str) -> bool {
        self.entry.models.is_empty() || self.entry.models.iter().any(|name| name == model)
    }
}

type KeySet = Vec<Arc<Key>>;

/// All keys of a server.
#[derive(Debug)]
pub(crate) struct ApiKeys {
    /// From the settings; they stay.
    fixed: Vec<KeyEntry>,
    file: Option<PathBuf>,
    current: RwLock<Arc<KeySet>>,
}

impl ApiKeys {
    /// Keys of the settings and of a file.
    ///
    /// # Errors
    /// A file that cannot be used, or two keys that cannot be told apart.
    pub(crate) fn open(digests: &[KeyDigest], file: Option<&Path>) -> Result<Self, KeysError> {
        let fixed = (1..).zip(digests).map(|(number, digest): (usize, _)| {
            KeyEntry::unlimited(format!("api-key-{number}"), digest.clone())
        });
        let keys =
            Self { fixed: fixed.collect(), file: file.map(Path::to_path_buf), current: RwLock::default() };
        keys.reload()?;
        Ok(keys)
    }

    /// Whether callers need a key.
    pub(crate) fn is_required(&self) -> bool {
        // A file always holds keys; see `read_file`.
        !self.fixed.is_empty() || self.file.is_some()
    }

    /// Reads the file again. What keys have used up stays with their names, unless their limits
    /// changed. Returns the names that are gone.
    ///
    /// # Errors
    /// As [`Self::open`]; then the keys are those of before.
    pub(crate) fn reload(&self) -> Result<Vec<String>, KeysError> {
        let mut entries = self.fixed.clone();
        if let Some(path) = &self.file {
            entries.extend(file::read_file(path)?);
        }
        check_distinct(&entries)?;
        let old = self.current();
        let keys: KeySet = entries
            .into_iter()
            .map(|entry| {
                let known =
                    old.iter().find(|key| key.entry.name == entry.name && key.entry.limits == entry.limits);
                let limits = known
                    .map_or_else(|| Arc::new(KeyLimits::new(entry.limits)), |key| Arc::clone(&key.limits));
                Arc::new(Key { entry, limits })
            })
            .collect();
        let names: HashSet<&str> = keys.iter().map(|key| key.entry.name.as_str()).collect();
        let gone = old.iter().map(|key| &key.entry.name).filter(|name| !names.contains(name.as_str()));
        let gone = gone.cloned().collect();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        Ok(gone)
    }

    fn current(&self) -> Arc<KeySet> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Names of all keys.
    pub(crate) fn names(&self) -> Vec<String> {
        self.current().iter().map(|key| key.entry.name.clone()).collect()
    }

    /// Names of keys with those of their models that are not served.
    pub(crate) fn unserved_models(&self, served: &[String]) -> Vec<(String, String)> {
        let keys = self.current();
        let models =
            keys.iter().flat_map(|key| key.entry.models.iter().map(|model| (&key.entry.name, model)));
        let unserved = models.filter(|(_, model)| !served.contains(model));
        unserved.map(|(name, model)| (name.clone(), model.clone())).collect()
    }

    /// The key that was presented, if it is one of ours and has not expired. The time does not
    /// depend on which one it is: all are compared, and none is left out.
    fn find(&self, presented: &[u8]) -> Option<Arc<Key>> {
        let keys = self.current();
        let digest = KeyDigest::of(presented);
        let mut found = u32::MAX;
        for (index, key) in (0u32..).zip(keys.iter()) {
            found.conditional_assign(&index, key.entry.digest.as_bytes().ct_eq(digest.as_bytes()));
        }
        let key = keys.get(found as usize)?;
        let is_alive = key.entry.expires.is_none_or(|end| unix_seconds() < end);
        is_alive.then(|| Arc::clone(key))
    }
}

fn check_distinct(entries: &[KeyEntry]) -> Result<(), KeysError> {
    let (mut names, mut digests) = (HashSet::new(), HashSet::new());
    for entry in entries {
        if !names.insert(&entry.name) {
            return Err(KeysError::Ambiguous(format!("two are called {:?}", entry.name)));
        }
        if !digests.insert(entry.digest.as_bytes()) {
            return Err(KeysError::Ambiguous(format!("{:?} has the same key as another", entry.name)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(key: &str) -> KeyDigest {
        KeyDigest::of(key.as_bytes())
    }

    fn found(keys: &ApiKeys, key: &str) -> Option<String> {
        keys.find(key.as_bytes()).map(|key| key.entry.name.clone())
    }

    #[test]
    fn keys_are_found_by_their_digest() {
        let keys = ApiKeys::open(&[digest("first"), digest("second")], None).expect("two keys");
        assert!(keys.is_required());
        assert_eq!(found(&keys, "first").as_deref(), Some("api-key-1"));
        assert_eq!(found(&keys, "second").as_deref(), Some("api-key-2"));
        for wrong in ["", "firs", "first ", "FIRST", &digest("first").to_hex()] {
            assert_eq!(found(&keys, wrong), None, "{wrong}");
        }
        let none = ApiKeys::open(&[], None).expect("no keys");
        assert!(!none.is_required());
        assert_eq!(found(&none, ""), None);
    }

    #[test]
    fn expired_keys_are_not_found() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "[[key]]\nname = \"old\"\nkey = \"k1\"\nexpires = 2001-01-01\n\
                    [[key]]\nname = \"new\"\nkey = \"k2\"\nexpires = 2999-01-01T00:00:00Z\n";
        std::fs::write(file.path(), text).expect("written");
        let keys = ApiKeys::open(&[], Some(file.path())).expect("two keys");
        assert_eq!((found(&keys, "k1"), found(&keys, "k2").as_deref()), (None, Some("new")));
    }

    #[test]
    fn models_that_are_not_served_are_noticed() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "[[key]]\nname = \"a\"\nkey = \"k1\"\nmodels = [\"m\", \"smol\"]\n[[key]]\nname = \"b\"\nkey = \"k2\"\n";
        std::fs::write(file.path(), text).expect("written");
        let keys = ApiKeys::open(&[], Some(file.path())).expect("two keys");
        assert_eq!(keys.unserved_models(&["m".into(), "n".into()]), [("a".to_owned(), "smol".to_owned())]);
        assert_eq!(keys.unserved_models(&["m".into(), "smol".into()]), []);
    }

    #[test]
    fn keys_that_cannot_be_told_apart_are_refused() {
        let twice = ApiKeys::open(&[digest("a"), digest("a")], None).expect_err("the same key");
        assert!(twice.to_string().contains("api-key-2"), "{twice}");
    }

    /// A good file replaces all keys, a broken one none; what was used up stays used up.
    #[test]
    fn reloading() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        let entry = |name: &str, key: &str, rate: u32| {
            format!("[[key]]\nname = \"{name}\"\nkey = \"{key}\"\nrequests-per-minute = {rate}\n")
        };
        write(&(entry("a", "k1", 5) + &entry("b", "k2", 5)));
        let keys = ApiKeys::open(&[digest("fixed")], Some(file.path())).expect("three keys");
        let old = keys.find(b"k1").expect("a key");
        write("[[key]]\nname = 3\n");
        assert!(keys.reload().is_err());
        assert_eq!(found(&keys, "k2").as_deref(), Some("b"));
        write("");
        assert!(keys.reload().is_err(), "an emptied file must not open the server or lock all out");
        write(&(entry("a", "k3", 5) + &entry("c", "k2", 6)));
        assert_eq!(keys.reload(), Ok(vec!["b".to_owned()]));
        assert_eq!((found(&keys, "k1"), found(&keys, "k2").as_deref()), (None, Some("c")));
        assert!(Arc::ptr_eq(&keys.find(b"k3").expect("a key").limits, &old.limits));
        assert_eq!(found(&keys, "fixed").as_deref(), Some("api-key-1"));
        write(&entry("a", "k3", 7));
        assert_eq!(keys.reload(), Ok(vec!["c".to_owned()]));
        assert!(!Arc::ptr_eq(&keys.find(b"k3").expect("a key").limits, &old.limits));
    }

    #[test]
    fn nothing_shows_a_key() {
        let keys = ApiKeys::open(&[digest("secret-key")], None).expect("a key");
        let shown = format!("{keys:?}");
        assert!(!shown.contains("secret") && !shown.contains(&digest("secret-key").to_hex()), "{shown}");
        assert!(shown.contains("***"), "{shown}");
    }
}
