//! Under what a snapshot is found: a hash chain over the tokens and everything else that changes a
//! block's state.
//!
//! The chain has one digest per whole page of 16 tokens; digest `k` covers the first `16 k` tokens
//! and digest 0 the *namespace*: model, cache settings and tenant salt. A snapshot of `L` tokens is
//! found under digest `L / 16` and its last `L % 16` tokens. A digest is only a way to find
//! candidates: before a snapshot is used, its tokens are compared one by one.

use sha2::{Digest as _, Sha256};

use locket_model::kv_cache::CacheSettings;

use crate::{EngineConfig, EngineFacts, config::CHUNK_ROWS};

/// A SHA-256 digest.
pub(crate) type Digest = [u8; 32];

/// Tokens per link of the chain.
pub(crate) const PAGE_TOKENS: usize = CHUNK_ROWS;

/// Changes when a state that this version writes means something else to the next.
const STATE_VERSION: &str = concat!("locket-engine ", env!("CARGO_PKG_VERSION"), " state 1");

/// What all snapshots of this engine have in common: the weights (told by the caller) and the
/// geometry and number format of the cache.
pub(crate) fn fingerprint(config: &EngineConfig, facts: &EngineFacts) -> Digest {
    let mut hash = Sha256::new();
    put(&mut hash, STATE_VERSION.as_bytes());
    put(&mut hash, &config.model_fingerprint);
    put(&mut hash, format!("{:?}", facts.model).as_bytes());
    put(&mut hash, format!("{:?} {:?}", facts.cache.geometry, facts.cache.slot_type).as_bytes());
    hash.finalize().into()
}

/// Hashes `bytes` and their number, so that no two lists of fields look alike.
fn put(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// The digests of all whole pages of a prompt.
#[derive(Debug)]
pub(crate) struct KeyChain {
    /// Digest `k` covers the first `16 k` tokens.
    digests: Vec<Digest>,
    /// For the headers of files.
    settings: String,
}

impl KeyChain {
    /// The chain of `ids` in the namespace of a model, cache settings and a tenant.
    pub(crate) fn new(fingerprint: &Digest, settings: &CacheSettings, salt: &[u8], ids: &[u32]) -> Self {
        // The debug form names every field, those that later versions add included.
        let settings = format!("{settings:?}");
        let mut hash = Sha256::new();
        put(&mut hash, fingerprint);
        put(&mut hash, settings.as_bytes());
        put(&mut hash, salt);
        let mut digests = Vec::with_capacity(ids.len() / PAGE_TOKENS + 1);
        let mut last: Digest = hash.finalize().into();
        digests.push(last);
        for page in ids.chunks_exact(PAGE_TOKENS) {
            last = next_digest(&last, page);
            digests.push(last);
        }
        Self { digests, settings }
    }

    /// Digests `[pages + 1]`; number `k` covers the first `16 k` tokens of the prompt.
    pub(crate) fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// The cache settings in words.
    pub(crate) fn settings(&self) -> &str {
        &self.settings
    }

    /// The key of the state after `ids`, which are a part of the chain's prompt, or the whole
    /// prompt and what was generated after it.
    pub(crate) fn key(&self, ids: &[u32]) -> SnapshotKey {
        let pages = ids.len() / PAGE_TOKENS;
        let known = pages.min(self.digests.len() - 1);
        let new = &ids[known * PAGE_TOKENS..pages * PAGE_TOKENS];
        let page =
            new.chunks_exact(PAGE_TOKENS).fold(self.digests[known], |last, page| next_digest(&last, page));
        SnapshotKey { page, tail: ids[pages * PAGE_TOKENS..].into(), len: ids.len() as u32 }
    }
}

fn next_digest(last: &Digest, page: &[u32]) -> Digest {
    let mut hash = Sha256::new();
    hash.update(last);
    page.iter().for_each(|id| hash.update(id.to_le_bytes()));
    hash.finalize().into()
}

/// Names a snapshot: namespace and tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SnapshotKey {
    /// The chain's digest after the last whole page.
    pub page: Digest,
    /// The tokens after it, fewer than 16.
    pub tail: Box<[u32]>,
    /// All tokens.
    pub len: u32,
}

impl SnapshotKey {
    /// A name for a file: 64 hexadecimal digits.
    pub(crate) fn file_stem(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.page);
        hash.update(self.len.to_le_bytes());
        self.tail.iter().for_each(|id| hash.update(id.to_le_bytes()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locket_model::kv_cache::CacheMethod;
    use proptest::prelude::*;

    fn chain(settings: &CacheSettings, salt: &[u8], ids: &[u32]) -> KeyChain {
        KeyChain::new(&[1; 32], settings, salt, ids)
    }

    #[test]
    fn everything_that_changes_a_state_changes_its_key() {
        let ids: Vec<u32> = (0..40).collect();
        let full = CacheSettings::full(64);
        let key = chain(&full, b"", &ids).key(&ids);
        let mut window = full;
        (window.method, window.ring) = (CacheMethod::Window, 8);
        let mut sinks = window;
        sinks.sinks = 2;
        let keys = [
            key,
            chain(&window, b"", &ids).key(&ids),
            chain(&sinks, b"", &ids).key(&ids),
            chain(&full, b"a", &ids).key(&ids),
            chain(&full, b"b", &ids).key(&ids),
            KeyChain::new(&[2; 32], &full, b"", &ids).key(&ids),
            chain(&full, b"", &ids).key(&ids[..39]),
            chain(&full, b"", &ids[1..]).key(&ids[1..]),
        ];
        let stems: std::collections::BTreeSet<_> = keys.iter().map(SnapshotKey::file_stem).collect();
        assert_eq!(stems.len(), keys.len());
    }

    proptest! {
        /// Whether tokens were prompt or generated makes no difference.
        #[test]
        fn a_key_depends_on_tokens_alone(ids in prop::collection::vec(0u32..50, 1..100), at in any::<prop::sample::Index>()) {
            let full = CacheSettings::full(64);
            let prompt = at.index(ids.len());
            let whole = chain(&full, b"s", &ids);
            let grown = chain(&full, b"s", &ids[..prompt]);
            prop_assert_eq!(whole.key(&ids), grown.key(&ids));
            prop_assert_eq!(whole.key(&ids[..prompt]), grown.key(&ids[..prompt]));
        }
    }
}
