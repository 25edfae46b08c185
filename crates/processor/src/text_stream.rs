//! Token bytes to text deltas: no half characters, stop strings across token borders.
//!
//! Three stages, each with its own hold-back. Bytes of an unfinished character wait for the rest
//! of it. Text that could still become a stop string waits until it cannot. What remains is given
//! out, and tokens whose bytes are all out are counted. The joined deltas equal what the whole
//! text would give, however it was cut into tokens.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    content_stops::ContentStops,
    reasoning::{Scanner, ThoughtMarkers, ThoughtStart},
    stop_strings::StopMatch,
    tools::ToolSyntax,
};

/// What a [`TextStream`] should look for.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Strings that end the text; empty ones are ignored. The occurrence that starts first wins;
    /// at the same start the shortest, then the first in this list.
    pub stop: Vec<String>,
    /// Leave the stop string in the text.
    pub include_stop: bool,
    /// The text may have a thought: stop strings count behind it only.
    pub thought: Option<(Arc<ThoughtMarkers>, ThoughtStart)>,
    /// The text may have these calls: stop strings count beside them only.
    pub calls: Option<Arc<ToolSyntax>>,
}

/// What became certain with one token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextDelta {
    /// New text; empty while bytes are held back.
    pub text: String,
    /// How many of the tokens pushed so far, and not yet reported, have all their bytes in the
    /// text given out so far; their log-probabilities belong to this delta. Tokens cut off by a
    /// stop string are never released.
    pub released_tokens: usize,
    /// The stop string that was found, as an index into [`TextOptions::stop`]; nothing follows.
    pub stopped: Option<usize>,
}

/// One continuation's text.
#[derive(Debug)]
pub struct TextStream {
    include_stop: bool,
    /// Finds where the content begins, in which stop strings count; none: it is all content.
    thought: Option<Scanner>,
    stops: ContentStops,
    /// Bytes of a character that is not complete yet; at most three.
    incomplete: Vec<u8>,
    /// Decoded text that was not given out yet.
    held: String,
    /// Bytes of text given out.
    given: usize,
    /// Bytes of text that the scanner of thoughts has seen.
    scanned: usize,
    /// Bytes of content that the stop matcher has seen.
    matched: usize,
    /// Bytes pushed, and how many of them are decoded.
    pushed_bytes: usize,
    decoded_bytes: usize,
    /// Ends of tokens that are not wholly decoded, in pushed bytes.
    undecoded_tokens: VecDeque<usize>,
    /// Ends of decoded tokens that are not reported, in bytes of text.
    decoded_tokens: VecDeque<usize>,
    is_over: bool,
}

impl TextStream {
    /// Starts an empty text.
    pub fn new(options: TextOptions) -> Self {
        Self {
            include_stop: options.include_stop,
            thought: options.thought.map(|(markers, start)| Scanner::new(markers, start)),
            stops: ContentStops::new(&options.stop, options.calls.as_deref()),
            incomplete: Vec::new(),
            held: String::new(),
            given: 0,
            scanned: 0,
            matched: 0,
            pushed_bytes: 0,
            decoded_bytes: 0,
            undecoded_tokens: VecDeque::new(),
            decoded_tokens: VecDeque::new(),
            is_over: false,
        }
    }

    /// Adds a token's bytes (empty for a hidden special token). After a stop string or
    /// [`Self::finish`] nothing more comes out.
    ///
    /// When one stop string lies inside a possible longer one that starts earlier, the stop is
    /// reported once the longer one has failed, or at [`Self::finish`].
    pub fn push(&mut self, bytes: &[u8]) -> TextDelta {
        if self.is_over {
            return TextDelta::default();
        }
        self.pushed_bytes += bytes.len();
        self.undecoded_tokens.push_back(self.pushed_bytes);
        self.decode(bytes, false);
        match self.scan() {
            Some(found) => self.stop_at(found),
            None => self.give_until(self.certain_until()),
        }
    }

    /// Gives out what was held back, incomplete characters as U+FFFD.
    pub fn finish(&mut self) -> TextDelta {
        if self.is_over {
            return TextDelta::default();
        }
        self.decode(&[], true);
        if let Some(thought) = &mut self.thought {
            self.held.as_bytes()[self.scanned - self.given..].iter().for_each(|byte| thought.push(*byte));
            self.scanned = self.given + self.held.len();
            thought.finish();
        }
        let found = self.scan().or_else(|| {
            let found = self.stops.finish();
            self.in_text(found)
        });
        match found {
            Some(found) => self.stop_at(found),
            None => {
                self.is_over = true;
                self.give_until(usize::MAX)
            }
        }
    }

    /// Appends the complete characters of `bytes` to the held text, each maximal invalid part as
    /// one U+FFFD, as [`String::from_utf8_lossy`] does for the whole.
    fn decode(&mut self, bytes: &[u8], is_last: bool) {
        let mut joined = std::mem::take(&mut self.incomplete);
        let input = if joined.is_empty() {
            bytes
        } else {
            joined.extend_from_slice(bytes);
            joined.as_slice()
        };
        let mut rest = input.len();
        for chunk in input.utf8_chunks() {
            self.append(chunk.valid(), chunk.valid().len());
            rest -= chunk.valid().len() + chunk.invalid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            if rest == 0 && !is_last && is_unfinished(chunk.invalid()) {
                self.incomplete = chunk.invalid().to_vec();
            } else {
                self.append("\u{FFFD}", chunk.invalid().len());
            }
        }
        // Tokens without bytes, and nothing unfinished before them.
        self.append("", 0);
    }

    /// Adds text made of the next `num_bytes` pushed bytes, and moves the tokens that end there.
    fn append(&mut self, text: &str, num_bytes: usize) {
        let text_start = self.given + self.held.len();
        let bytes_start = self.decoded_bytes;
        self.decoded_bytes += num_bytes;
        while let Some(end) = self.undecoded_tokens.pop_front_if(|end| *end <= self.decoded_bytes) {
            // A token that ends inside a character is out when the whole character is.
            let end_in_text = if num_bytes == text.len() {
                text.ceil_char_boundary(end.saturating_sub(bytes_start))
            } else {
                text.len()
            };
            self.decoded_tokens.push_back(text_start + end_in_text);
        }
        self.held.push_str(text);
    }

    /// Searches what is new of the content; positions are those of the text.
    fn scan(&mut self) -> Option<StopMatch> {
        let end = self.given + self.held.len();
        if let Some(thought) = &mut self.thought {
            self.held.as_bytes()[self.scanned - self.given..].iter().for_each(|byte| thought.push(*byte));
        }
        self.scanned = end;
        let fresh = self.content_start()? + self.matched;
        self.matched += end - fresh;
        let found = self.stops.push(&self.held[fresh - self.given..]);
        self.in_text(found)
    }

    /// Where the content begins, if that is known. Nothing behind it was given out before it was known.
    fn content_start(&self) -> Option<usize> {
        self.thought.as_ref().map_or(Some(0), Scanner::content_start)
    }

    /// A place in the content as a place in the text.
    fn in_text(&self, found: Option<StopMatch>) -> Option<StopMatch> {
        let start = self.content_start()?;
        found.map(|found| StopMatch { start: start + found.start, end: start + found.end, ..found })
    }

    /// No stop string begins in front of this place.
    fn certain_until(&self) -> usize {
        match self.content_start() {
            Some(start) => start.saturating_add(self.stops.certain_until()),
            None => self.thought.as_ref().map_or(0, Scanner::certain_until),
        }
    }

    fn stop_at(&mut self, found: StopMatch) -> TextDelta {
        let mut delta = self.give_until(if self.include_stop { found.end } else { found.start });
        delta.stopped = Some(found.index);
        self.is_over = true;
        self.held = String::new();
        delta
    }

    /// Gives out the held text up to a position in the whole text.
    fn give_until(&mut self, position: usize) -> TextDelta {
        let num_bytes = position.saturating_sub(self.given).min(self.held.len());
        let text: String = self.held.drain(..num_bytes).collect();
        self.given += num_bytes;
        let mut released_tokens = 0;
        while self.decoded_tokens.pop_front_if(|end| *end <= self.given).is_some() {
            released_tokens += 1;
        }
        TextDelta { text, released_tokens, stopped: None }
    }
}

/// Whether these bytes are the valid beginning of a longer character.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(stop: &[&str], include_stop: bool) -> TextStream {
        TextStream::new(TextOptions {
            stop: stop.iter().map(ToString::to_string).collect(),
            include_stop,
            ..TextOptions::default()
        })
    }

    fn delta(text: &str, released_tokens: usize, stopped: Option<usize>) -> TextDelta {
        TextDelta { text: text.into(), released_tokens, stopped }
    }

    #[test]
    fn an_emoji_in_byte_tokens_comes_out_whole() {
        let mut stream = stream(&[], false);
        for byte in &"😀".as_bytes()[..3] {
            assert_eq!(stream.push(&[*byte]), TextDelta::default());
        }
        assert_eq!(stream.push(&"😀".as_bytes()[3..]), delta("😀", 4, None));
        assert_eq!(stream.finish(), TextDelta::default());
    }

    #[test]
    fn a_token_that_ends_inside_a_character_is_released_with_it() {
        let mut stream = stream(&["xyz"], false);
        assert_eq!(stream.push(&[b'a', 0xC3]), delta("a", 0, None));
        assert_eq!(stream.push(&[0xA9, b'x']), delta("é", 1, None));
        assert_eq!(stream.push(b"y"), TextDelta::default());
        assert_eq!(stream.finish(), delta("xy", 2, None));
    }

    #[test]
    fn a_stop_string_across_tokens_is_cut_and_its_tokens_are_not_released() {
        let mut stream = stream(&["###", "STOP"], false);
        assert_eq!(stream.push(b"hello S"), delta("hello ", 0, None));
        assert_eq!(stream.push(b"TO"), TextDelta::default());
        assert_eq!(stream.push(b"P and more"), delta("", 0, Some(1)));
        assert_eq!(stream.push(b"more"), TextDelta::default());
        assert_eq!(stream.finish(), TextDelta::default());
    }

    #[test]
    fn include_stop_keeps_the_string_but_nothing_after_it() {
        let mut stream = stream(&["STOP"], true);
        assert_eq!(stream.push(b"a ST"), delta("a ", 0, None));
        assert_eq!(stream.push(b"OP"), delta("STOP", 2, Some(0)));
        let mut stream = self::stream(&["STOP"], true);
        assert_eq!(stream.push(b"STOP!"), delta("STOP", 0, Some(0)));
    }

    #[test]
    fn finish_reports_a_stop_that_waited_for_a_longer_one() {
        let mut stream = stream(&["bc", "abcd"], false);
        assert_eq!(stream.push(b"xabc"), delta("x", 0, None));
        assert_eq!(stream.finish(), delta("a", 0, Some(0)));
    }

    #[test]
    fn hidden_tokens_are_released_in_their_turn() {
        let mut stream = stream(&["ab"], false);
        assert_eq!(stream.push(b""), delta("", 1, None));
        assert_eq!(stream.push(b"a"), TextDelta::default());
        assert_eq!(stream.push(b""), TextDelta::default());
        assert_eq!(stream.push(b"c"), delta("ac", 3, None));
    }

    #[test]
    fn an_unfinished_character_at_the_end_is_one_replacement() {
        let mut stream = stream(&["\u{FFFD}\u{FFFD}"], false);
        assert_eq!(stream.push(&[0xF0, 0x9F, 0x98]), TextDelta::default());
        assert_eq!(stream.finish(), delta("\u{FFFD}", 1, None));
    }

    /// A stop string inside a thought, or in the blanks behind it, does not end the text.
    #[test]
    fn stop_strings_count_in_the_content_only() {
        let markers = Arc::new(ThoughtMarkers {
            open: "<think>".into(),
            close: "</think>".into(),
            ..ThoughtMarkers::default()
        });
        let run = |start, stop: &str, tokens: &[&str]| {
            let mut stream = TextStream::new(TextOptions {
                stop: vec![stop.into()],
                include_stop: false,
                thought: Some((Arc::clone(&markers), start)),
                calls: None,
            });
            let mut text = String::new();
            let mut stopped = None;
            for token in tokens {
                let delta = stream.push(token.as_bytes());
                text.push_str(&delta.text);
                stopped = stopped.or(delta.stopped);
            }
            let delta = stream.finish();
            (text + &delta.text, stopped.or(delta.stopped))
        };
        let (undecided, thought) = (ThoughtStart::Undecided, ThoughtStart::Thought);
        let whole = |text: &str| (text.to_owned(), None);
        assert_eq!(
            run(undecided, "STOP", &["<th", "ink>a STOP</thi", "nk>b"]),
            whole("<think>a STOP</think>b")
        );
        assert_eq!(
            run(thought, "STOP", &["STOP</", "think>", "b ST", "OP c"]),
            ("STOP</think>b ".into(), Some(0))
        );
        assert_eq!(run(thought, "\n", &["a\n</think>\n", "\nb\nc"]), ("a\n</think>\n\nb".into(), Some(0)));
        // What begins like a marker and is none is content from its first byte.
        assert_eq!(run(undecided, "<th", &[" <t", "hing>"]), (" ".into(), Some(0)));
        assert_eq!(run(undecided, " <", &[" <t"]), (String::new(), Some(0)));
        assert_eq!(run(thought, "k", &["thinking </thin"]), whole("thinking </thin"));
    }

    /// The rule, applied to the whole text at once.
    fn expected(text: &str, stop: &[String], include_stop: bool) -> (String, Option<usize>) {
        let occurrences = stop.iter().enumerate().filter(|(_, s)| !s.is_empty()).filter_map(|(i, s)| {
            let start = text.find(s.as_str())?;
            Some((start, start + s.len(), i))
        });
        match occurrences.min() {
            Some((start, end, i)) => (text[..if include_stop { end } else { start }].to_string(), Some(i)),
            None => (text.to_string(), None),
        }
    }

    /// A small alphabet makes overlaps and half characters likely.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte =
            prop::sample::select(vec![b'a', b'b', b'c', 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98]);
        prop_oneof![
            prop::collection::vec(byte, 0..40),
            "[abcé€😀]{0,40}".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..40),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn any_split_gives_what_the_whole_gives(
            bytes in bytes(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            stop in prop::collection::vec("[abcé€\u{FFFD}]{0,4}", 0..4),
            include_stop in any::<bool>(),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let mut stream = TextStream::new(TextOptions { stop: stop.clone(), include_stop, ..TextOptions::default() });
            let (mut text, mut stopped, mut released, mut start) = (String::new(), None, 0, 0);
            for end in &cuts {
                let delta = stream.push(&bytes[start..*end]);
                prop_assert!(stopped.is_none() || delta == TextDelta::default());
                text.push_str(&delta.text);
                stopped = stopped.or(delta.stopped);
                released += delta.released_tokens;
                start = *end;
            }
            let delta = stream.finish();
            text.push_str(&delta.text);
            released += delta.released_tokens;
            stopped = stopped.or(delta.stopped);

            let whole = String::from_utf8_lossy(&bytes);
            prop_assert_eq!((text.clone(), stopped), expected(&whole, &stop, include_stop));
            if stopped.is_none() {
                prop_assert_eq!(released, cuts.len());
            }
            if !include_stop {
                prop_assert!(stop.iter().all(|s| s.is_empty() || !text.contains(s.as_str())));
            }
        }

        #[test]
        fn only_text_that_could_become_a_stop_string_is_held(text in "[ab ]{0,60}", stop in "[ab]{1,5}") {
            let mut stream = TextStream::new(TextOptions { stop: vec![stop.clone()], ..TextOptions::default() });
            let mut given = String::new();
            for (i, byte) in text.bytes().enumerate() {
                let delta = stream.push(&[byte]);
                given.push_str(&delta.text);
                if delta.stopped.is_some() {
                    break;
                }
                let held = &text[given.len()..=i];
                prop_assert!(stop.starts_with(held));
            }
        }
    }
}
