//! Under what a snapshot is found: a hash chain over the tokens and everything else that changes a
//! block's state.
//!
//! The chain has one digest per whole page of 16 tokens; digest `k` covers the first `16 k` tokens
//! and digest 0 the *namespace*: model, cache settings and tenant salt. A snapshot of `L` tokens is
//! found under digest `L / 16` and its last `L % 16` tokens. A digest is only a way to find
//! candidates: before a snapshot is used, its tokens are compared one by one.
//!
//! **Images.** Here a visual token is called by a *name*, 31 bits made of its image's key and its place in it
//! above all ids; the whole key is in the digest of the page in which the image begins.

use sha2::{Digest as _, Sha256};

use locket_model::kv_cache::CacheSettings;

use crate::{EngineConfig, EngineFacts, GenerationRequest, VisualSpan, config::CHUNK_ROWS, visual};

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
    /// Names of the prompt's tokens; `None`: their ids.
    names: Option<Vec<u32>>,
    /// First rows of its images.
    images: Vec<u32>,
}

/// Set in the names of visual tokens.
const VISUAL: u32 = 1 << 31;

/// Visual tokens of an image whose names tell it from all others.
const TELLING_NAMES: u32 = 5;

impl KeyChain {
    /// The chain of `ids` in the namespace of a model, cache settings and a tenant.
    #[cfg(test)]
    pub(crate) fn new(fingerprint: &Digest, settings: &CacheSettings, salt: &[u8], ids: &[u32]) -> Self {
        Self::build(namespace(fingerprint, settings, salt, None), settings, ids, &[])
    }

    /// The chain of a request's prompt in the namespace of a model, its adapter, cache settings and a
    /// tenant.
    pub(crate) fn of(fingerprint: &Digest, adapter: Option<&Digest>, request: &GenerationRequest) -> Self {
        let GenerationRequest { cache, salt, prompt_ids, visual, .. } = request;
        Self::build(namespace(fingerprint, cache, salt, adapter), cache, prompt_ids, visual)
    }

    fn build(namespace: Digest, settings: &CacheSettings, ids: &[u32], spans: &[VisualSpan]) -> Self {
        let names = (!spans.is_empty()).then(|| names(ids, spans));
        let tokens = names.as_deref().unwrap_or(ids);
        let mut digests = Vec::with_capacity(ids.len() / PAGE_TOKENS + 1);
        let mut last = namespace;
        digests.push(last);
        let mut images = spans.iter().peekable();
        for (page, tokens) in tokens.chunks_exact(PAGE_TOKENS).enumerate() {
            last = next_digest(&last, tokens);
            let end = ((page + 1) * PAGE_TOKENS) as u32;
            while let Some(image) = images.next_if(|image| image.rows.start < end) {
                last = image_digest(&last, image);
            }
            digests.push(last);
        }
        Self {
            digests,
            settings: format!("{settings:?}"),
            names,
            images: spans.iter().map(|span| span.rows.start).collect(),
        }
    }

    /// The tokens of the prompt `ids` as they are called here.
    pub(crate) fn names<'a>(&'a self, ids: &'a [u32]) -> &'a [u32] {
        self.names.as_deref().unwrap_or(ids)
    }

    /// Calls the first tokens of the prompt and its answer as they are called here.
    pub(crate) fn rename(&self, ids: &mut [u32]) {
        if let Some(names) = &self.names {
            ids.iter_mut().zip(names).for_each(|(id, name)| *id = *name);
        }
    }

    /// Whether the state after `len` tokens may be kept: its key names all images in it.
    pub(crate) fn is_named(&self, len: u32) -> bool {
        let page = len / PAGE_TOKENS as u32 * PAGE_TOKENS as u32;
        let mut in_tail = self.images.iter().filter(|&&start| (page..len).contains(&start));
        in_tail.all(|start| {
            let names = self.names.as_deref().unwrap_or_default().get(*start as usize..len as usize);
            let run = names.into_iter().flatten().take_while(|&&name| name >= VISUAL);
            run.take(TELLING_NAMES as usize).count() == TELLING_NAMES as usize
        })
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

fn namespace(
    fingerprint: &Digest,
    settings: &CacheSettings,
    salt: &[u8],
    adapter: Option<&Digest>,
) -> Digest {
    let mut hash = Sha256::new();
    put(&mut hash, fingerprint);
    // The debug form names every field, those that later versions add included.
    put(&mut hash, format!("{settings:?}").as_bytes());
    put(&mut hash, salt);
    if let Some(adapter) = adapter {
        put(&mut hash, adapter);
    }
    hash.finalize().into()
}

/// The tokens of a prompt, those of images by their names.
fn names(ids: &[u32], spans: &[VisualSpan]) -> Vec<u32> {
    let mut names = ids.to_vec();
    for (rows, span) in visual::overlapping(spans, 0..ids.len() as u32) {
        let mut hash = Sha256::new();
        put(&mut hash, &span.key.to_le_bytes());
        for (row, name) in names[rows.start as usize..rows.end as usize].iter_mut().enumerate() {
            let digest: Digest = hash.clone().chain_update((row as u32).to_le_bytes()).finalize().into();
            *name = VISUAL | u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]);
        }
    }
    names
}

/// A page's digest with an image that begins in it.
fn image_digest(last: &Digest, image: &VisualSpan) -> Digest {
    let mut hash = Sha256::new();
    hash.update(last);
    put(&mut hash, b"image");
    hash.update(image.key.to_le_bytes());
    hash.update(image.run.to_le_bytes());
    image.offsets.iter().for_each(|offset| hash.update(offset.to_le_bytes()));
    hash.finalize().into()
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

    fn request(visual: Vec<VisualSpan>) -> GenerationRequest {
        GenerationRequest {
            use_snapshots: true,
            visual,
            ..GenerationRequest::new("keys", (0..60).collect(), 1, CacheSettings::full(64))
        }
    }

    #[test]
    fn images_and_adapters_change_keys() {
        let image = |start, key| visual::tests::span(start, &[0, 1, 2, 3, 5, 6, 7, 9], 10, key, 2);
        let key = |spans: Vec<VisualSpan>, adapter: Option<&Digest>, len: usize| {
            let request = request(spans);
            let chain = KeyChain::of(&[1; 32], adapter, &request);
            let mut tokens = request.prompt_ids[..len].to_vec();
            chain.rename(&mut tokens);
            chain.key(&tokens)
        };
        let moved = VisualSpan { offsets: [0, 1, 2, 3, 4, 6, 7, 9].into(), ..image(20, 1) };
        let keys = [
            key(vec![], None, 50),
            key(vec![], Some(&[3; 32]), 50),
            key(vec![image(20, 1)], None, 50),
            key(vec![image(20, 2)], None, 50),
            key(vec![image(21, 1)], None, 50),
            key(vec![image(20, 1), image(40, 1)], None, 50),
            key(vec![moved], None, 50),
        ];
        let stems: std::collections::BTreeSet<_> = keys.iter().map(SnapshotKey::file_stem).collect();
        assert_eq!(stems.len(), keys.len());
        // Before an image nothing of it is in a key.
        assert_eq!(key(vec![image(20, 1)], None, 20), key(vec![], None, 20));
        assert_eq!(key(vec![image(20, 1)], None, 27), key(vec![image(20, 1), image(40, 1)], None, 27));
        assert_ne!(key(vec![image(20, 1)], None, 25), key(vec![image(20, 2)], None, 25));
    }

    /// A key may not call an image by less than 155 bits.
    #[test]
    fn doubtful_states_are_not_kept() {
        let image = visual::tests::span(20, &[0, 1, 2, 3, 5, 6, 7, 9], 10, 7, 2);
        let chain = KeyChain::of(&[1; 32], None, &request(vec![image]));
        let doubtful: Vec<u32> = (16..40).filter(|&len| !chain.is_named(len)).collect();
        assert_eq!(doubtful, [21, 22, 23, 24], "a tail with few rows of the image");
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
