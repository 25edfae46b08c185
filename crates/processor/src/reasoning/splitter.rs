//! Text in, thoughts and content out, whatever the chunks.

use std::sync::Arc;

use super::scanner::{Scanner, ThoughtMarkers, ThoughtStart};

/// What a piece of text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextPart {
    /// A marker, or blanks around it: not shown.
    Markup,
    /// The thought, blanks included.
    Reasoning,
    /// The answer.
    Content,
}

/// A piece of text; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextPiece {
    /// What it is.
    pub part: TextPart,
    /// The text as it came.
    pub text: String,
}

/// Splits a text into thought and content. The pieces in a row are the text, all of it; what could be
/// the beginning of a marker is held back until it is known.
#[derive(Debug)]
pub struct ReasoningSplitter {
    scanner: Scanner,
    /// Text that was not given out.
    held: String,
    /// Bytes given out.
    given: usize,
}

impl ReasoningSplitter {
    /// The beginning of a text.
    pub fn new(markers: Arc<ThoughtMarkers>, start: ThoughtStart) -> Self {
        Self { scanner: Scanner::new(markers, start), held: String::new(), given: 0 }
    }

    /// Takes more text and gives what has become certain, in order.
    pub fn push(&mut self, text: &str) -> Vec<TextPiece> {
        text.bytes().for_each(|byte| self.scanner.push(byte));
        self.held.push_str(text);
        let until = match self.scanner.content_start() {
            Some(_) => self.given + self.held.len() - self.begun_marker(),
            None => self.scanner.certain_until(),
        };
        self.give_until(until)
    }

    /// The text has ended: gives the rest.
    pub fn finish(&mut self) -> Vec<TextPiece> {
        self.scanner.finish();
        let end = self.given + self.held.len();
        self.give_until(end)
    }

    /// Length of the longest end of the content that could become a marker: a marker that the content
    /// quotes arrives in one piece.
    fn begun_marker(&self) -> usize {
        let held = self.held.as_bytes();
        let begun = |marker: &str| {
            let longest = marker.len().saturating_sub(1).min(held.len());
            (1..=longest).rev().find(|len| held.ends_with(&marker.as_bytes()[..*len]))
        };
        self.scanner.markers().all().filter_map(begun).max().unwrap_or(0)
    }

    fn give_until(&mut self, until: usize) -> Vec<TextPiece> {
        let mut pieces = Vec::new();
        let thought = self.scanner.thought();
        let content_start = self.scanner.content_start().unwrap_or(usize::MAX);
        while self.given < until {
            let at = self.given;
            let (part, end) = if at >= content_start {
                (TextPart::Content, until)
            } else if thought.contains(&at) {
                (TextPart::Reasoning, thought.end)
            } else if at < thought.start {
                (TextPart::Markup, thought.start)
            } else {
                (TextPart::Markup, content_start)
            };
            let text: String = self.held.drain(..end.min(until) - at).collect();
            self.given += text.len();
            pieces.push(TextPiece { part, text });
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn think() -> Arc<ThoughtMarkers> {
        Arc::new(ThoughtMarkers {
            open: "<think>".into(),
            close: "</think>".into(),
            answer_open: None,
            call_openers: vec!["<tool_call>".into()],
        })
    }

    fn joined(pieces: &[TextPiece], part: TextPart) -> String {
        pieces.iter().filter(|piece| piece.part == part).map(|piece| piece.text.as_str()).collect()
    }

    fn split(markers: &Arc<ThoughtMarkers>, start: ThoughtStart, chunks: &[&str]) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(Arc::clone(markers), start);
        let mut pieces: Vec<TextPiece> = chunks.iter().flat_map(|chunk| splitter.push(chunk)).collect();
        pieces.extend(splitter.finish());
        assert!(pieces.iter().all(|piece| !piece.text.is_empty()));
        let all: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(all, chunks.concat(), "nothing is lost");
        (joined(&pieces, TextPart::Reasoning), joined(&pieces, TextPart::Content))
    }

    /// Worked example 3 of the specification.
    #[test]
    fn what_could_be_a_marker_is_held_back() {
        let mut splitter = ReasoningSplitter::new(think(), ThoughtStart::Undecided);
        assert_eq!(splitter.push("<th"), []);
        let pieces = splitter.push("ink>a b</thi");
        assert_eq!(joined(&pieces, TextPart::Reasoning), "a b");
        assert_eq!(joined(&pieces, TextPart::Content), "");
        let pieces = splitter.push("nk>c<");
        assert_eq!(joined(&pieces, TextPart::Reasoning), "");
        assert_eq!(joined(&pieces, TextPart::Content), "c");
        assert_eq!(joined(&splitter.finish(), TextPart::Content), "<");
    }

    /// Worked example 4 of the specification.
    #[test]
    fn the_prompt_may_have_opened_the_thought() {
        let split = |text| split(&think(), ThoughtStart::Thought, &[text]);
        assert_eq!(split("x</think>y"), ("x".into(), "y".into()));
        assert_eq!(split("x…"), ("x…".into(), String::new()));
        assert_eq!(split("x</thi"), ("x</thi".into(), String::new()));
    }

    #[test]
    fn thoughts_are_at_the_start_only() {
        let split = |text| split(&think(), ThoughtStart::Undecided, &[text]);
        assert_eq!(
            split(" \n<think>\na\n</think>\n\nb <think> </think>c"),
            ("\na\n".into(), "b <think> </think>c".into())
        );
        assert_eq!(split("Say <think>x</think>"), (String::new(), "Say <think>x</think>".into()));
        assert_eq!(split(" <thin"), (String::new(), " <thin".into()));
        assert_eq!(split("  x"), (String::new(), "  x".into()));
        assert_eq!(split("<think></think>"), (String::new(), String::new()));
    }

    /// A call inside an open thought belongs to the content, opener included.
    #[test]
    fn a_tool_call_ends_the_thought() {
        let split = |text| split(&think(), ThoughtStart::Thought, &[text]);
        assert_eq!(split("I call.<tool_call>{}"), ("I call.".into(), "<tool_call>{}".into()));
    }

    /// Control tokens of models trained with randomised traces: the answer's first token ends the thought.
    #[test]
    fn control_tokens() {
        let markers = ThoughtMarkers {
            open: "create".into(),
            close: "plan".into(),
            answer_open: Some("plan".into()),
            call_openers: Vec::new(),
        };
        let split = |text| split(&Arc::new(markers.clone()), ThoughtStart::Undecided, &[text]);
        assert_eq!(split("create 1 1 c0 close 1 1 plan 1 2"), (" 1 1 c0 close 1 1 ".into(), "1 2".into()));
        assert_eq!(split("plan 1 2"), (String::new(), "1 2".into()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        /// However the text is cut, thought and content are the same.
        #[test]
        fn chunks_do_not_matter(
            words in proptest::collection::vec(
                prop_oneof![
                    Just("<think>"), Just("</think>"), Just("<tool_call>"), Just("<"), Just("</th"), Just("ink>"),
                    Just("\n"), Just(" "), Just("a"), Just("é"), Just("🦀"),
                ],
                0..12,
            ),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
            start in prop_oneof![
                Just(ThoughtStart::Undecided), Just(ThoughtStart::Thought), Just(ThoughtStart::Content)
            ],
        ) {
            let text = words.concat();
            let mut ends: Vec<usize> =
                cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
            ends.push(text.len());
            ends.sort_unstable();
            let mut from = 0;
            let chunks: Vec<&str> = ends
                .iter()
                .map(|end| {
                    let chunk = &text[from..*end];
                    from = *end;
                    chunk
                })
                .collect();
            prop_assert_eq!(split(&think(), start, &chunks), split(&think(), start, &[&text]));
        }
    }
}
