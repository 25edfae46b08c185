//! Free text in which a marker starts a grammar: tool calls that the model may make or not.

use std::{fmt, sync::Arc};

use locket_engine::steering::{Advance, Guide, TokenSet};

use super::{CompiledGrammar, matching::GrammarState};

/// What is to happen when a marker appears in free text.
#[derive(Debug, Clone)]
pub struct Trigger {
    /// Texts that start the grammar, none empty; looked for in the bytes of the tokens, so a marker
    /// may be one token or many, or end inside one.
    pub markers: Vec<String>,
    /// The marker counts only as the first text of the answer, blanks left out; an answer that begins
    /// otherwise is free to its end.
    pub is_only_first: bool,
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
    /// The last bytes of the free text, as many as a marker may have begun with; with
    /// `is_only_first` all of them since the first that is no blank.
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
    /// Nothing more can come of it.
    Free,
}

impl fmt::Debug for TriggerState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("TriggerState").field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl TriggerState {
    pub(super) fn new(trigger: Arc<Trigger>) -> Self {
        Self { trigger, tail: Vec::new(), calls: 0, stage: Stage::Waiting }
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
            Stage::Waiting | Stage::Free => self.advance_bytes(bytes),
        }
    }

    /// Takes in bytes of free text.
    pub(super) fn advance_bytes(&mut self, bytes: &[u8]) -> Advance {
        if !matches!(self.stage, Stage::Waiting) {
            return Advance::Known(Guide::Free);
        }
        self.tail.extend_from_slice(bytes);
        if self.trigger.is_only_first { self.match_first() } else { self.match_anywhere() }
    }

    fn match_first(&mut self) -> Advance {
        let blanks = self.tail.len() - self.tail.trim_ascii_start().len();
        self.tail.drain(..blanks);
        if self.tail.is_empty() {
            return Advance::Known(Guide::Free);
        }
        let trigger = Arc::clone(&self.trigger);
        if let Some(marker) = trigger.markers.iter().find(|marker| self.tail.starts_with(marker.as_bytes())) {
            return self.open(0, marker.len());
        }
        if !trigger.markers.iter().any(|marker| marker.as_bytes().starts_with(&self.tail)) {
            self.tail = Vec::new();
            self.stage = Stage::Free;
        }
        Advance::Known(Guide::Free)
    }

    fn match_anywhere(&mut self) -> Advance {
        let trigger = Arc::clone(&self.trigger);
        let found = trigger.markers.iter().filter_map(|marker| {
            let marker = marker.as_bytes();
            let at = self.tail.windows(marker.len().max(1)).position(|window| window == marker)?;
            Some((at, marker.len()))
        });
        // The first to begin; of two at one place the longer.
        if let Some((at, length)) = found.min_by_key(|(at, length)| (*at, usize::MAX - length)) {
            return self.open(at, length);
        }
        let longest = trigger.markers.iter().map(String::len).max().unwrap_or(0);
        let surplus = self.tail.len().saturating_sub(longest.saturating_sub(1));
        self.tail.drain(..surplus);
        Advance::Known(Guide::Free)
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
        if is_last || self.trigger.is_only_first {
            return Guide::Complete;
        }
        self.stage = Stage::Waiting;
        Guide::Free
    }
}
