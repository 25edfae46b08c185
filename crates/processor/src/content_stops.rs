//! Stop strings in the content of an answer, which may have calls of tools in it.
//!
//! What is a call is told by the same parser that reads the calls, so a stop string counts exactly where
//! the client sees content. It must lie in one piece: content in front of a call and behind it do not
//! make one together.

use crate::{
    stop_strings::{StopMatch, StopMatcher},
    tools::{ToolDelta, ToolParser, ToolPiece, ToolSyntax},
};

/// Searches one answer. Positions are bytes from its start.
#[derive(Debug)]
pub(crate) struct ContentStops {
    stops: StopMatcher,
    /// Tells calls from content; none: it is all content.
    parser: Option<ToolParser>,
    /// How much the parser has told.
    told: usize,
    /// Where the piece of content that is searched begins, or the next may.
    start: usize,
}

impl ContentStops {
    /// Prepares the search; `calls` are those that the answer may have.
    pub fn new(stop: &[String], calls: Option<&ToolSyntax>) -> Self {
        // With nothing to search for, nothing has to wait for the parser.
        let has_stops = stop.iter().any(|text| !text.is_empty());
        let calls = calls.filter(|_| has_stops);
        let parser = calls.map(|calls| ToolParser::new(calls.format, calls.names(), calls.max_calls()));
        Self { stops: StopMatcher::new(stop), parser, told: 0, start: 0 }
    }

    /// Takes more text. `Some` once the winner is certain.
    pub fn push(&mut self, text: &str) -> Option<StopMatch> {
        match &mut self.parser {
            None => text.bytes().find_map(|byte| self.stops.push(byte)),
            Some(parser) => {
                let pieces = parser.push(text);
                pieces.into_iter().find_map(|piece| self.read(&piece))
            }
        }
    }

    /// The winner, given that no more text follows.
    pub fn finish(&mut self) -> Option<StopMatch> {
        let pieces = self.parser.as_mut().map(|parser| parser.finish(false)).unwrap_or_default();
        let found = pieces.into_iter().find_map(|piece| self.read(&piece));
        found.or_else(|| self.placed(self.stops.finish()))
    }

    /// Everything before this position is certainly not part of a stop string.
    pub fn certain_until(&self) -> usize {
        self.start + self.stops.certain_until()
    }

    fn read(&mut self, piece: &ToolPiece) -> Option<StopMatch> {
        self.told += piece.bytes;
        if let ToolDelta::Content(text) = &piece.delta {
            let found = text.bytes().find_map(|byte| self.stops.push(byte));
            return self.placed(found);
        }
        // The content ends here, and with it what might have become a longer stop string.
        let found = self.placed(self.stops.finish());
        self.stops.restart();
        self.start = self.told;
        found
    }

    fn placed(&self, found: Option<StopMatch>) -> Option<StopMatch> {
        let at = self.start;
        found.map(|found| StopMatch { start: at + found.start, end: at + found.end, ..found })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tools::{ToolFormat, ToolSpec};

    fn syntax(format: ToolFormat) -> ToolSyntax {
        let tool = ToolSpec { name: "f".into(), ..ToolSpec::default() };
        ToolSyntax { format, tools: vec![tool], is_parallel: true }
    }

    /// The rule, applied to the whole text at once: content in one piece, and the first stop in it.
    fn expected(syntax: &ToolSyntax, text: &str, stop: &[String]) -> Option<StopMatch> {
        let mut parser = ToolParser::new(syntax.format, syntax.names(), syntax.max_calls());
        let mut pieces = parser.push(text);
        pieces.extend(parser.finish(false));
        let (mut at, mut start, mut runs) = (0, 0, vec![String::new()]);
        let mut starts = vec![0];
        for piece in pieces {
            at += piece.bytes;
            match piece.delta {
                ToolDelta::Content(text) => runs.last_mut().expect("one").push_str(&text),
                _ => {
                    start = at;
                    runs.push(String::new());
                    starts.push(start);
                }
            }
        }
        assert!(start <= text.len() && at == text.len());
        starts.into_iter().zip(runs).find_map(|(start, run)| {
            let found = stop.iter().enumerate().filter_map(|(index, stop)| {
                let at = run.find(stop.as_str())?;
                Some((start + at, start + at + stop.len(), index))
            });
            found.min().map(|(start, end, index)| StopMatch { start, end, index })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// However the text is cut: the stop string is the first one in the content, and what was certain
        /// before it was found has no part of it.
        #[test]
        fn stop_strings_are_found_in_content_only(
            format in prop::sample::select(ToolFormat::ALL.to_vec()),
            parts in prop::collection::vec(prop::sample::select(vec![
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"}\"}}</tool_call>", "[f(a=1), f()]",
                "{\"name\": \"f\", \"parameters\": {\"b\": []}}", "a", "}", "]", "<tool", "\n", ";", "{\"name\"", "é",
            ]), 0..10),
            stop in prop::collection::vec(prop::sample::select(vec![
                "}", "]", "a", "\n", "<", "name", "\"a\"", "a}", "a\n}", "f(", "é]", ";", "{\"na",
            ]), 1..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let (text, syntax) = (parts.concat(), syntax(format));
            let stop: Vec<String> = stop.into_iter().map(str::to_owned).collect();
            let mut ends: Vec<usize> =
                cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
            ends.push(text.len());
            ends.sort_unstable();
            let mut stops = ContentStops::new(&stop, Some(&syntax));
            let (mut from, mut certain, mut found) = (0, 0, None);
            for end in ends {
                found = stops.push(&text[from..end]);
                if found.is_some() {
                    break;
                }
                prop_assert!(certain <= stops.certain_until() && stops.certain_until() <= end);
                certain = stops.certain_until();
                from = end;
            }
            let found = found.or_else(|| stops.finish());
            prop_assert_eq!(found, expected(&syntax, &text, &stop));
            prop_assert!(found.is_none_or(|found| certain <= found.start));
        }
    }
}
