//! Free text in which a marker starts a grammar: tool calls that the model may make or not.

use std::{fmt, sync::Arc};

use locket_engine::steering::{Advance, Guide, TokenSet};

use super::{CompiledGrammar, matching::GrammarState};

/// What is to happen when a marker appears in free text.
#[derive(Debug, Clone)]
pub struct Trigger {
    /// Texts that start the grammar, none empty, wherever in the answer they are; looked for in the
    /// bytes of the tokens, so a marker may be one token or many, or end inside one.
    pub markers: Vec<String>,
    /// The grammar begins with the marker; otherwise right after it.
    pub grammar_has_marker: bool,
    /// From the marker on.
    pub grammar: Arc<CompiledGrammar>,
    /// After so many grammars the answer is complete; without a number it is free again each time.
    pub max_calls: Option<u32>,
}

/// Where a continuation stands.
pub(super) struct TriggerState {
    trigger: Arc<Trigger>,
    /// What the markers begin with; most text has none of it.
    first_bytes: Vec<u8>,
    /// The end of the free text from the first place on where a marker may have begun.
    tail: Vec<u8>,
    calls: u32,
    stage: Stage,
}

enum Stage {
    /// Looking for a marker.
    Waiting,
    /// The marker was seen; these bytes are the grammar's first.
    Opening(Vec<u8>),
    Inside(Box<GrammarState>),
}

impl fmt::Debug for TriggerState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("TriggerState").field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl TriggerState {
    pub(super) fn new(trigger: Arc<Trigger>) -> Self {
        let first_bytes = first_bytes(&trigger.markers);
        Self { trigger, first_bytes, tail: Vec::new(), calls: 0, stage: Stage::Waiting }
    }

    /// Takes in a token.
    pub(super) fn advance(&mut self, id: u32, bytes: &[u8]) -> Advance {
        match &mut self.stage {
            Stage::Inside(grammar) => {
                grammar.take(id);
                Advance::Compute
            }
            // The grammar is opened by the computation, which comes before the next token.
            Stage::Opening(_) => Advance::Compute,
            Stage::Waiting => self.advance_bytes(bytes),
        }
    }

    /// Takes in bytes of free text.
    pub(super) fn advance_bytes(&mut self, bytes: &[u8]) -> Advance {
        if !matches!(self.stage, Stage::Waiting) {
            return Advance::Known(Guide::Free);
        }
        self.tail.extend_from_slice(bytes);
        match find(&self.tail, &self.trigger.markers, &self.first_bytes) {
            Found::Whole { at, length } => self.open(at, length),
            Found::Begun(at) => {
                self.tail.drain(..at);
                Advance::Known(Guide::Free)
            }
        }
    }

    /// Starts the grammar; the marker is in `tail`, `length` bytes from `at` on.
    fn open(&mut self, at: usize, length: usize) -> Advance {
        let start = if self.trigger.grammar_has_marker { at } else { at + length };
        self.stage = Stage::Opening(self.tail.split_off(start));
        self.tail = Vec::new();
        Advance::Compute
    }

    /// The guide of the next token.
    pub(super) fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        if let Stage::Opening(first) = &self.stage {
            let mut grammar = GrammarState::new(Arc::clone(&self.trigger.grammar));
            // A token that goes on after the marker in a way that no call does was no call's.
            self.stage =
                if grammar.opens_with(first) { Stage::Inside(Box::new(grammar)) } else { Stage::Waiting };
        }
        let Stage::Inside(grammar) = &mut self.stage else { return Guide::Free };
        match grammar.compute(allowed) {
            Guide::Complete => self.close(),
            guide => guide,
        }
    }

    /// A grammar is complete.
    fn close(&mut self) -> Guide {
        self.calls = self.calls.saturating_add(1);
        let is_last = self.trigger.max_calls.is_some_and(|most| self.calls >= most);
        if is_last {
            return Guide::Complete;
        }
        self.stage = Stage::Waiting;
        Guide::Free
    }
}

/// The bytes that markers begin with, each once.
fn first_bytes(markers: &[String]) -> Vec<u8> {
    let mut first_bytes: Vec<u8> = markers.iter().filter_map(|marker| marker.bytes().next()).collect();
    first_bytes.sort_unstable();
    first_bytes.dedup();
    first_bytes
}

/// What a text has of the markers.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// One of them.
    Whole { at: usize, length: usize },
    /// The beginning of some from here on; the text's length if of none.
    Begun(usize),
}

/// The marker that begins first; of two at one place the longer. There may be hundreds, but they begin with
/// a byte or two that most text does not have.
fn find(text: &[u8], markers: &[String], first_bytes: &[u8]) -> Found {
    let mut begun_at = text.len();
    for at in (0..text.len()).filter(|at| first_bytes.contains(&text[*at])) {
        let rest = &text[at..];
        let markers = || markers.iter().map(String::as_bytes);
        let whole = markers().filter(|marker| rest.starts_with(marker)).map(<[u8]>::len).max();
        if let Some(length) = whole {
            return Found::Whole { at, length };
        }
        if begun_at == text.len() && markers().any(|marker| marker.starts_with(rest)) {
            begun_at = at;
        }
    }
    Found::Begun(begun_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_where_they_begin() {
        let markers = ["<tool>", "<tool><x", "{\"name\": \"f\"", "{\"name\":\"f\""].map(str::to_owned);
        let first_bytes = first_bytes(&markers);
        assert_eq!(first_bytes, b"<{");
        let find = |text: &str| find(text.as_bytes(), &markers, &first_bytes);
        let rows = [
            ("", Found::Begun(0)),
            ("plain text", Found::Begun(10)),
            ("a < b {", Found::Begun(6)),
            ("a <<tool", Found::Begun(3)),
            ("<to {\"name\": \"", Found::Begun(4)),
            ("a <<tool>{", Found::Whole { at: 3, length: 6 }),
            ("<tool><x>", Found::Whole { at: 0, length: 8 }),
            ("{{\"name\":\"f\"}", Found::Whole { at: 1, length: 11 }),
        ];
        for (text, found) in rows {
            assert_eq!(find(text), found, "{text}");
        }
    }
}
