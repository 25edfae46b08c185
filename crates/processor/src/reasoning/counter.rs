//! How many of a text's tokens are thought.

use std::{collections::VecDeque, sync::Arc};

use super::scanner::{Scanner, ThoughtMarkers, ThoughtStart};

/// Counts the tokens that begin inside the thought; those of the markers do not.
#[derive(Debug)]
pub struct ThoughtCounter {
    scanner: Scanner,
    position: usize,
    /// Where tokens begin of which it is not known whether they are thought or its end: at most as
    /// many as the longest marker has bytes.
    begins: VecDeque<usize>,
    tokens: u32,
}

impl ThoughtCounter {
    /// The beginning of a text.
    pub fn new(markers: Arc<ThoughtMarkers>, start: ThoughtStart) -> Self {
        let scanner = Scanner::new(markers, start);
        Self { scanner, position: 0, begins: VecDeque::new(), tokens: 0 }
    }

    /// Takes in a token's bytes, empty for one that is hidden.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.scanner.is_past_thought() {
            return;
        }
        if self.scanner.is_in_thought() {
            if bytes.is_empty() {
                self.tokens = self.tokens.saturating_add(1);
                return;
            }
            self.begins.push_back(self.position);
        }
        bytes.iter().for_each(|byte| self.scanner.push(*byte));
        self.position += bytes.len();
        self.settle();
    }

    /// The text has ended.
    pub fn finish(&mut self) {
        self.scanner.finish();
        self.settle();
    }

    /// Thought tokens so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether the next token belongs to the thought, or to its end.
    pub fn is_in_thought(&self) -> bool {
        self.scanner.is_in_thought()
    }

    /// Whether there is or was a thought.
    pub fn has_thought(&self) -> bool {
        self.scanner.is_in_thought() || self.scanner.thought().end > 0
    }

    fn settle(&mut self) {
        let thought = self.scanner.thought();
        while self.begins.pop_front_if(|begin| *begin < thought.end).is_some() {
            self.tokens = self.tokens.saturating_add(1);
        }
        if self.scanner.is_past_thought() {
            self.begins = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(start: ThoughtStart, tokens: &[&str]) -> u32 {
        let markers = ThoughtMarkers {
            open: "<think>".into(),
            close: "</think>".into(),
            answer_open: None,
            call_openers: vec!["<call>".into()],
        };
        let mut counter = ThoughtCounter::new(Arc::new(markers), start);
        tokens.iter().for_each(|token| counter.push(token.as_bytes()));
        counter.finish();
        counter.tokens()
    }

    #[test]
    fn markers_are_not_counted() {
        let (thought, undecided) = (ThoughtStart::Thought, ThoughtStart::Undecided);
        assert_eq!(count(thought, &["a", "b", "</think>", "c"]), 2);
        assert_eq!(count(thought, &["a", "", "</", "think", ">", "c"]), 2);
        assert_eq!(count(thought, &["a</", "think", ">c"]), 1);
        assert_eq!(count(thought, &["a", "</", "thin", "g"]), 4);
        assert_eq!(count(thought, &["a", "</", "thin"]), 3);
        assert_eq!(count(thought, &["a", "<ca", "ll>", "c"]), 1);
        assert_eq!(count(undecided, &["\n", "<", "think>", "\n", "a", "</think>", "c"]), 2);
        assert_eq!(count(undecided, &["a", "<think>", "b"]), 0);
        assert_eq!(count(ThoughtStart::Content, &["<think>", "b"]), 0);
    }
}
