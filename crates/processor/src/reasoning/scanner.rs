//! Finds the thought in a text that arrives byte by byte: where it begins, where it ends, and where the
//! content begins. Everything that must agree on these places asks the same scanner: the splitter of
//! texts, the search for stop strings, the budget in the sampler, and the count of thought tokens.

use std::{ops::Range, sync::Arc};

use crate::stop_strings::Pattern;

/// The texts that separate a thought from the content. None is empty or begins with a blank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThoughtMarkers {
    /// Opens the thought.
    pub open: String,
    /// Ends the thought.
    pub close: String,
    /// Opens an answer without a thought, for models that mark it.
    pub answer_open: Option<String>,
    /// Openers of tool calls, which end a thought too and belong to the content.
    pub call_openers: Vec<String>,
}

impl ThoughtMarkers {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &str> {
        let others = self.answer_open.iter().chain(&self.call_openers);
        [&self.open, &self.close].into_iter().chain(others).map(String::as_str)
    }
}

/// What a text begins with, as its prompt left it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ThoughtStart {
    /// The text decides: after blanks, [`ThoughtMarkers::open`] or something else.
    #[default]
    Undecided,
    /// A thought that the prompt has opened.
    Thought,
    /// Content: there is no thought.
    Content,
}

/// A text, some of its bytes to come.
#[derive(Debug)]
pub(crate) struct Scanner {
    markers: Arc<ThoughtMarkers>,
    state: State,
    /// Bytes so far.
    position: usize,
    thought_start: Option<usize>,
    thought_end: Option<usize>,
    content_start: Option<usize>,
}

#[derive(Debug)]
enum State {
    /// Blanks and the beginning of an opening marker; its bytes.
    Start(Vec<u8>),
    /// Looking for an ending marker: `close` first, then openers of calls.
    Thought(Vec<Pattern>),
    /// Blanks between a marker and the content.
    Gap,
    Content,
}

impl Scanner {
    pub fn new(markers: Arc<ThoughtMarkers>, start: ThoughtStart) -> Self {
        let mut scanner = Self {
            markers,
            state: State::Start(Vec::new()),
            position: 0,
            thought_start: None,
            thought_end: None,
            content_start: None,
        };
        match start {
            ThoughtStart::Undecided => {}
            ThoughtStart::Thought => scanner.open_thought(),
            ThoughtStart::Content => scanner.open_content(0),
        }
        scanner
    }

    /// Takes the next byte.
    pub fn push(&mut self, byte: u8) {
        self.position += 1;
        match &mut self.state {
            State::Content => {}
            State::Gap => {
                if !is_blank(byte) {
                    self.open_content(self.position - 1);
                }
            }
            State::Start(seen) => {
                if !(seen.is_empty() && is_blank(byte)) {
                    seen.push(byte);
                    self.decide();
                }
            }
            State::Thought(ends) => {
                let mut found: Option<(usize, usize)> = None;
                for (index, end) in ends.iter_mut().enumerate() {
                    // Of those that end here, the longest began first.
                    if end.push(byte) && found.is_none_or(|(_, len)| end.len() > len) {
                        found = Some((index, end.len()));
                    }
                }
                if let Some((index, len)) = found {
                    let start = self.position - len;
                    self.thought_end = Some(start);
                    if index == 0 {
                        self.state = State::Gap;
                    } else {
                        self.open_content(start);
                    }
                }
            }
        }
    }

    /// No more bytes come: what was undecided is content, an ending marker that was begun is thought.
    pub fn finish(&mut self) {
        match self.state {
            State::Start(_) => self.open_content(0),
            State::Thought(_) => self.thought_end = Some(self.position),
            State::Gap | State::Content => {}
        }
    }

    /// Whether the next byte belongs to the thought, or could be its end.
    pub fn is_in_thought(&self) -> bool {
        matches!(self.state, State::Thought(_))
    }

    /// Whether the thought is over, or there is none.
    pub fn is_past_thought(&self) -> bool {
        matches!(self.state, State::Gap | State::Content)
    }

    /// The thought as far as it is known, without what may be its end.
    pub fn thought(&self) -> Range<usize> {
        let Some(start) = self.thought_start else { return 0..0 };
        start..self.thought_end.unwrap_or_else(|| self.certain_until())
    }

    /// Where the content begins, once that is known.
    pub fn content_start(&self) -> Option<usize> {
        self.content_start
    }

    /// The parts of everything before this position are known.
    pub fn certain_until(&self) -> usize {
        match &self.state {
            State::Start(_) => 0,
            State::Thought(ends) => self.position - ends.iter().map(Pattern::matched).max().unwrap_or(0),
            State::Gap | State::Content => self.position,
        }
    }

    pub fn markers(&self) -> &ThoughtMarkers {
        &self.markers
    }

    fn decide(&mut self) {
        let State::Start(seen) = &self.state else { return };
        let is_begun = |marker: &str| marker.as_bytes().starts_with(seen);
        let is_open = self.markers.open.as_bytes() == seen.as_slice();
        let answer_open = self.markers.answer_open.as_deref();
        if is_open {
            self.open_thought();
        } else if answer_open.is_some_and(|marker| marker.as_bytes() == seen.as_slice()) {
            self.state = State::Gap;
        } else if !is_begun(&self.markers.open) && !answer_open.is_some_and(is_begun) {
            self.open_content(0);
        }
    }

    fn open_thought(&mut self) {
        self.thought_start = Some(self.position);
        let ends = std::iter::once(&self.markers.close).chain(&self.markers.call_openers);
        self.state = State::Thought(ends.map(|end| Pattern::new(0, end)).collect());
    }

    fn open_content(&mut self, start: usize) {
        self.content_start = Some(start);
        self.state = State::Content;
    }
}

fn is_blank(byte: u8) -> bool {
    byte.is_ascii_whitespace()
}
