//! Token windows of one length, each inside a single document, in a seeded order.

use std::{collections::VecDeque, path::PathBuf};

use locket_processor::Processor;
use rand::Rng as _;
use serde::{Deserialize, Serialize};

use crate::{
    corpus::{Corpus, Place},
    error::{Error, Result},
    parameters::random,
};

/// Text is tokenized in parts of about this many bytes, because encodings are much larger than text.
const ENCODE_BYTES: usize = 64 << 10;

/// Tokens that wait in the shuffle buffer: bounds its memory to 16 MiB.
const BUFFER_TOKENS: usize = 4 << 20;

/// Number of this stream's random draws among a run's purposes.
const SHUFFLE: u64 = 1;

/// Everything that decides which windows come next.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WindowState {
    pub place: Place,
    /// Windows given out.
    pub drawn: u64,
    /// Complete readings of the corpus.
    pub epochs: u64,
    /// Whether the shuffle buffer was filled once.
    pub is_filled: bool,
    /// Tokens of the current document that are in no window yet.
    pub pending: VecDeque<u32>,
    /// The shuffle buffer.
    pub buffer: Vec<Vec<u32>>,
}

/// An endless stream of windows: the corpus is read again when it ends.
pub(crate) struct Windows<'a> {
    corpus: Corpus,
    processor: &'a Processor,
    /// The start token, where the tokenizer adds one; every window begins with it.
    start: Option<u32>,
    length: usize,
    capacity: usize,
    seed: u64,
    state: WindowState,
}

impl<'a> Windows<'a> {
    /// Windows of `length` tokens from `files`.
    pub(crate) fn new(files: &[PathBuf], processor: &'a Processor, length: usize, seed: u64) -> Result<Self> {
        let prefix = processor.encode("", true)?;
        let start = prefix.first().copied().filter(|id| processor.bos_token_id() == Some(*id));
        Ok(Self {
            corpus: Corpus::new(files)?,
            processor,
            start,
            length,
            capacity: (BUFFER_TOKENS / length).clamp(1, 512),
            seed,
            state: WindowState::default(),
        })
    }

    /// What [`Self::resume`] takes.
    pub(crate) fn state(&self) -> WindowState {
        WindowState { place: self.corpus.place(), ..self.state.clone() }
    }

    /// Goes on where another stream of the same files, length and seed stood.
    pub(crate) fn resume(&mut self, state: WindowState) {
        self.corpus.seek(state.place);
        self.state = state;
    }

    /// The next window: a random one of the buffer, which is replaced by the next of the text.
    pub(crate) fn next(&mut self) -> Result<Vec<u32>> {
        while !self.state.is_filled {
            match self.cut()? {
                Some(window) => self.state.buffer.push(window),
                None if self.state.buffer.is_empty() => return Err(self.no_window()),
                None => self.state.is_filled = true,
            }
            self.state.is_filled |= self.state.buffer.len() == self.capacity;
        }
        let at = random(self.seed, SHUFFLE, self.state.drawn).random_range(0..self.state.buffer.len());
        self.state.drawn += 1;
        let next = match self.cut()? {
            Some(window) => window,
            None => self.cut()?.ok_or_else(|| self.no_window())?,
        };
        Ok(std::mem::replace(&mut self.state.buffer[at], next))
    }

    fn no_window(&self) -> Error {
        Error::Corpus(format!(
            "no document has {} tokens; use longer documents or a smaller --sequence",
            self.length
        ))
    }

    /// The next window in the order of the text; `None` once at the end of the corpus.
    fn cut(&mut self) -> Result<Option<Vec<u32>>> {
        let own = self.length - usize::from(self.start.is_some());
        while self.state.pending.len() < own {
            let Some(piece) = self.corpus.next()? else {
                self.state.pending.clear();
                self.state.epochs += 1;
                return Ok(None);
            };
            if piece.begins_document {
                self.state.pending.clear();
            }
            let mut rest = piece.text.as_str();
            while !rest.is_empty() {
                let (part, after) = rest.split_at(part_len(rest));
                self.state.pending.extend(self.processor.encode(part, false)?);
                rest = after;
            }
        }
        Ok(Some(self.start.into_iter().chain(self.state.pending.drain(..own)).collect()))
    }
}

/// Bytes of the next part to tokenize: up to a blank, at most about [`ENCODE_BYTES`].
fn part_len(text: &str) -> usize {
    if text.len() <= ENCODE_BYTES {
        return text.len();
    }
    let end = text.floor_char_boundary(ENCODE_BYTES);
    match text[..end].rfind(char::is_whitespace) {
        Some(at) if at > 0 => at,
        _ => end,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::testing;

    #[test]
    fn windows_stay_inside_documents_and_resume() {
        let (folder, processor) = (tempfile::tempdir().unwrap(), testing::processor());
        let path = folder.path().join("a.jsonl");
        let lines = ('a'..='j').map(|c| format!("{{\"text\": \"{}\"}}\n", c.to_string().repeat(25)));
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        let stream = || Windows::new(std::slice::from_ref(&path), &processor, 10, 3).unwrap();
        let mut windows = stream();
        let mut counts = BTreeMap::new();
        for _ in 0..30 {
            let window = windows.next().unwrap();
            assert_eq!(window.len(), 10);
            assert!(window.iter().all(|id| *id == window[0]), "one document per window: {window:?}");
            *counts.entry(window[0]).or_insert(0) += 1;
        }
        assert!(counts.len() >= 8, "{counts:?}");
        let state = windows.state();
        let mut resumed = stream();
        resumed.resume(state);
        for _ in 0..30 {
            assert_eq!(windows.next().unwrap(), resumed.next().unwrap());
        }
    }

    #[test]
    fn too_short_documents_are_an_error() {
        let (folder, processor) = (tempfile::tempdir().unwrap(), testing::processor());
        for (name, text) in [("empty.txt", ""), ("short.txt", "abc")] {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            let error = Windows::new(&[path], &processor, 10, 0).unwrap().next().unwrap_err();
            assert!(error.to_string().contains("no document has 10 tokens"), "{error}");
        }
    }
}
