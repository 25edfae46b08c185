//! What the model said, as tokens, for when a client sends it back as text.
//!
//! A client returns an answer as text, and text has many tokenisations: the model's own choice is
//! often not the one that the tokenizer makes. Snapshots are keyed by tokens, so the prompt of the
//! next turn must consist of those that were sampled. A turn is remembered under a digest of all
//! that came before it and of its own text; the same text after another conversation is another turn.

mod journal;

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest as _, Sha256};

use crate::{
    choice::TokenTable,
    metrics::TurnMetrics,
    recent::{Key, Recent},
};
use journal::Journal;

/// Everything in front of a turn: its text, the ids of the remembered turns in it, and whose it is.
/// Two prompts with the same prefix have the same ids.
#[derive(Debug, Clone)]
pub(crate) struct TurnPrefix {
    hash: Sha256,
}

impl TurnPrefix {
    /// An empty prompt. Turns are remembered for the same `salt` alone.
    pub(crate) fn new(salt: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update((salt.len() as u64).to_le_bytes());
        hash.update(salt);
        Self { hash }
    }

    /// Text that is tokenised. It does not matter into which parts it is cut.
    pub(crate) fn push_text(&mut self, text: &str) {
        self.hash.update(text);
    }

    /// A turn that consists of these ids.
    pub(crate) fn push_turn(&mut self, ids: &[u32]) {
        // No text has the byte 0xFF, so ids cannot be taken for text.
        self.hash.update([0xFF]);
        self.hash.update((ids.len() as u64).to_le_bytes());
        for id in ids {
            self.hash.update(id.to_le_bytes());
        }
    }

    /// The key of a turn with this text.
    fn key(&self, text: &str) -> Key {
        let mut hash = self.hash.clone();
        hash.update([0xFE]);
        hash.update(text);
        hash.finalize().into()
    }
}

/// Remembered turns; those used least recently go first. Bounded in bytes.
#[derive(Debug)]
pub(crate) struct TurnMemory {
    turns: Mutex<Turns>,
    metrics: Option<TurnMetrics>,
}

#[derive(Debug)]
struct Turns {
    kept: Recent<[u32]>,
    /// Where turns outlive the process.
    journal: Option<Journal>,
}

impl TurnMemory {
    /// An empty memory of at most `max_bytes`.
    pub(crate) fn new(max_bytes: usize) -> Self {
        let turns = Turns { kept: Recent::new(max_bytes), journal: None };
        Self { turns: Mutex::new(turns), metrics: None }
    }

    /// Counts what is looked up from now on.
    pub(crate) fn counted(self, metrics: TurnMetrics) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// A memory that goes on from the file `path`, and writes to it what is remembered. A file of
    /// another `fingerprint` is replaced.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(crate) fn open(max_bytes: usize, path: &Path, fingerprint: &str) -> io::Result<Self> {
        let (journal, records) = Journal::open(path, fingerprint, max_bytes)?;
        let memory = Self::new(max_bytes);
        let mut turns = memory.lock();
        for (key, ids) in records {
            turns.insert(key, ids);
        }
        turns.journal = Some(journal);
        drop(turns);
        Ok(memory)
    }

    /// Whether nothing is remembered.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().kept.len() == 0
    }

    /// How many turns are remembered, and in how many bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        let turns = self.lock();
        (turns.kept.len(), turns.kept.bytes())
    }

    /// The ids of the turn with this text after `prefix`.
    pub(crate) fn find(&self, prefix: &TurnPrefix, text: &str) -> Option<Arc<[u32]>> {
        let found = self.lock().kept.get(&prefix.key(text));
        if let Some(metrics) = &self.metrics {
            metrics.looked_up(found.is_some());
        }
        found
    }

    /// Remembers a turn. One with the same text after the same prefix is replaced: of several choices
    /// with one text, the client goes on with any.
    fn remember(&self, prefix: &TurnPrefix, text: &str, ids: &[u32]) {
        let (key, ids) = (prefix.key(text), Arc::from(ids));
        let mut turns = self.lock();
        if !turns.insert(key, Arc::clone(&ids)) {
            return;
        }
        let Some(mut journal) = turns.journal.take() else { return };
        journal.append(key, &ids);
        if journal.is_too_long() {
            journal.rewrite(turns.oldest_first());
        }
        turns.journal = Some(journal);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Turns> {
        // No step between two consistent states can panic.
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turns {
    /// Whether the turn is remembered.
    fn insert(&mut self, key: Key, ids: Arc<[u32]>) -> bool {
        let bytes = size_of_val(&*ids);
        self.kept.insert(key, ids, bytes)
    }

    fn oldest_first(&self) -> Vec<journal::Record> {
        self.kept.oldest_first().map(|(key, ids)| (key, Arc::clone(ids))).collect()
    }
}

/// Follows one choice to its end, then remembers it.
#[derive(Debug)]
pub(crate) struct TurnRecorder {
    memory: Arc<TurnMemory>,
    prefix: TurnPrefix,
    text: String,
    ids: Vec<u32>,
}

impl TurnRecorder {
    /// Records what comes after `prefix`.
    pub(crate) fn new(memory: Arc<TurnMemory>, prefix: TurnPrefix) -> Self {
        Self { memory, prefix, text: String::new(), ids: Vec::new() }
    }

    /// Text as the client gets it, and the tokens that are in it.
    pub(crate) fn push(&mut self, text: &str, ids: impl Iterator<Item = u32>) {
        self.text.push_str(text);
        self.ids.extend(ids);
    }

    /// Remembers the turn, unless its tokens say something else than its text: one that was cut
    /// inside a token by a stop string, has hidden tokens, or is not UTF-8.
    pub(crate) fn finish(self, tokens: &dyn TokenTable) {
        let is_same = spell(tokens, &self.ids, &self.text);
        if is_same && !self.ids.is_empty() {
            self.memory.remember(&self.prefix, &self.text, &self.ids);
        }
    }
}

/// Whether the bytes of `ids` are those of `text`.
fn spell(tokens: &dyn TokenTable, ids: &[u32], text: &str) -> bool {
    let mut rest = text.as_bytes();
    for id in ids {
        let Some(after) = rest.strip_prefix(tokens.token_bytes(*id)) else { return false };
        rest = after;
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::choice::tests::Bytes;

    fn bytes_of(ids: &[u32]) -> usize {
        size_of_val(ids) + crate::recent::ENTRY_BYTES
    }

    fn prefix(salt: &str, parts: &[&str]) -> TurnPrefix {
        let mut prefix = TurnPrefix::new(salt.as_bytes());
        parts.iter().for_each(|part| prefix.push_text(part));
        prefix
    }

    #[test]
    fn a_turn_is_found_after_the_same_conversation_only() {
        let memory = TurnMemory::new(1 << 20);
        assert!(memory.is_empty());
        memory.remember(&prefix("", &["Hello", " there"]), "Yes", &[1, 2]);
        assert_eq!(memory.find(&prefix("", &["Hello there"]), "Yes").as_deref(), Some(&[1, 2][..]));
        assert_eq!(memory.find(&prefix("", &["Hello there"]), "Yes."), None);
        assert_eq!(memory.find(&prefix("", &["Hello there", "Y"]), "es"), None);
        assert_eq!(memory.find(&prefix("", &["Other"]), "Yes"), None);
        assert_eq!(memory.find(&prefix("tenant", &["Hello there"]), "Yes"), None);
        memory.remember(&prefix("", &["Hello there"]), "Yes", &[3]);
        assert_eq!(memory.find(&prefix("", &["Hello there"]), "Yes").as_deref(), Some(&[3][..]));
    }

    /// The same text made of other tokens is another prefix.
    #[test]
    fn earlier_turns_count_with_their_ids() {
        let memory = TurnMemory::new(1 << 20);
        let after = |ids: &[u32]| {
            let mut prefix = prefix("", &["a"]);
            prefix.push_turn(ids);
            prefix.push_text("b");
            prefix
        };
        memory.remember(&after(&[1, 2]), "Yes", &[7]);
        assert_eq!(memory.find(&after(&[1, 2]), "Yes").as_deref(), Some(&[7][..]));
        assert_eq!(memory.find(&after(&[3]), "Yes"), None);
    }

    #[test]
    fn the_memory_is_bounded_and_forgets_what_was_not_used() {
        let one = bytes_of(&[0; 10]);
        let memory = TurnMemory::new(3 * one);
        let at = |i: usize| prefix("", &[&i.to_string()]);
        for i in 0..3 {
            memory.remember(&at(i), "x", &[i as u32; 10]);
        }
        assert!(memory.find(&at(0), "x").is_some());
        memory.remember(&at(3), "x", &[3; 10]);
        assert!(memory.find(&at(1), "x").is_none(), "used least recently");
        assert!([0, 2, 3].iter().all(|i| memory.find(&at(*i), "x").is_some()));
        memory.remember(&at(4), "x", &[4; 1000]);
        assert!(memory.find(&at(4), "x").is_none(), "larger than the whole memory");
        assert_eq!(memory.lock().kept.bytes(), 3 * one);
    }

    #[test]
    fn a_turn_that_does_not_spell_its_text_is_not_remembered() {
        let remembered = |text: &str, ids: &[u32]| {
            let memory = Arc::new(TurnMemory::new(1 << 20));
            let mut recorder = TurnRecorder::new(Arc::clone(&memory), TurnPrefix::new(&[]));
            recorder.push(text, ids.iter().copied());
            recorder.finish(&Bytes::new());
            !memory.is_empty()
        };
        assert!(remembered("ab", &[97, 98]));
        assert!(!remembered("", &[]));
        assert!(!remembered("abc", &[97, 98]), "a stop string inside a token");
        assert!(!remembered("ab", &[97, 256, 98]), "a hidden token");
        assert!(!remembered("\u{FFFD}", &[0xC3]), "not UTF-8");
    }

    #[test]
    fn turns_outlive_the_process_in_order_of_use() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("turns");
        let one = bytes_of(&[0; 10]);
        let open = |max_bytes| TurnMemory::open(max_bytes, &path, "model").expect("a file");
        let at = |i: u32| prefix("", &[&i.to_string()]);
        let memory = open(3 * one);
        // Far more than the file may hold: it is written anew now and then.
        for i in 0..200 {
            memory.remember(&at(i), "x", &[i; 10]);
        }
        drop(memory);
        let longest = 2 * 3 * one + one;
        assert!(std::fs::metadata(&path).expect("the file").len() as usize <= longest);
        let memory = open(3 * one);
        assert!((197..200).all(|i| memory.find(&at(i), "x").as_deref() == Some(&[i; 10][..])));
        assert!(memory.find(&at(196), "x").is_none());
        drop(memory);
        assert!(open(one).find(&at(199), "x").is_some(), "the latest one is kept");
        assert!(TurnMemory::open(one, &path, "other").expect("a file").is_empty());
    }

    proptest! {
        /// Whatever happens, the bytes are counted right and stay in bounds.
        #[test]
        fn bookkeeping(steps in proptest::collection::vec((0usize..6, 0usize..40, any::<bool>()), 0..60)) {
            let memory = TurnMemory::new(1000);
            for (name, len, is_find) in steps {
                let prefix = prefix("", &[&name.to_string()]);
                if is_find {
                    memory.find(&prefix, "x");
                } else {
                    memory.remember(&prefix, "x", &vec![0; len]);
                }
                let turns = memory.lock();
                let bytes: usize = turns.oldest_first().iter().map(|(_, ids)| bytes_of(ids)).sum();
                prop_assert_eq!(turns.kept.bytes(), bytes);
                prop_assert!(bytes <= 1000);
                prop_assert_eq!(turns.oldest_first().len(), turns.kept.len());
            }
        }
    }
}
