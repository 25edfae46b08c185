//! Finds the first of several stop strings in a text that arrives byte by byte.
//!
//! One Knuth–Morris–Pratt automaton per string: the work per byte is constant on average, and the
//! automaton's state is at the same time the length of the tail that could still become a match,
//! which is exactly what must be held back.

/// An occurrence of a stop string; positions are bytes from the start of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StopMatch {
    /// First byte of the occurrence.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// Which string, as an index into the caller's list.
    pub index: usize,
}

/// One string and how much of it the text's tail matches.
#[derive(Debug)]
pub(crate) struct Pattern {
    bytes: Box<[u8]>,
    /// `borders[i]`: length of the longest proper prefix of `bytes[..=i]` that is also its suffix.
    borders: Box<[usize]>,
    matched: usize,
    index: usize,
}

impl Pattern {
    /// `text` must not be empty; `index` is the caller's.
    pub fn new(index: usize, text: &str) -> Self {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for i in 1..bytes.len() {
            while border > 0 && bytes[i] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[i] == bytes[border]);
            borders[i] = border;
        }
        Self { bytes, borders: borders.into(), matched: 0, index }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Length of the tail that could still become a match, which is less than [`Self::len`].
    pub fn matched(&self) -> usize {
        self.matched
    }

    /// Takes one byte; true if the string ends with it.
    pub fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        let complete = self.matched == self.bytes.len();
        if complete {
            self.matched = self.borders[self.matched - 1];
        }
        complete
    }
}

/// Searches for several strings at once. The match that starts first wins; of those that start at
/// the same place the shortest; of equal strings the first in the list.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    patterns: Vec<Pattern>,
    position: usize,
    best: Option<StopMatch>,
}

impl StopMatcher {
    /// Prepares the search. Empty strings are ignored: they would match before the first byte.
    pub fn new(stop: &[String]) -> Self {
        let patterns = stop.iter().enumerate().filter(|(_, text)| !text.is_empty());
        Self { patterns: patterns.map(|(i, text)| Pattern::new(i, text)).collect(), ..Self::default() }
    }

    /// Takes the next byte. `Some` once the winner is certain; it may lie some bytes back, because
    /// a longer string that starts earlier has to fail first.
    pub fn push(&mut self, byte: u8) -> Option<StopMatch> {
        self.position += 1;
        for pattern in &mut self.patterns {
            if pattern.push(byte) {
                let start = self.position - pattern.bytes.len();
                if self.best.is_none_or(|best| start < best.start) {
                    self.best = Some(StopMatch { start, end: self.position, index: pattern.index });
                }
            }
        }
        self.best.filter(|best| self.earliest_partial() >= best.start)
    }

    /// Everything before this position is certainly not part of a stop string.
    pub fn certain_until(&self) -> usize {
        self.best.map_or(usize::MAX, |best| best.start).min(self.earliest_partial())
    }

    /// The winner, given that no more bytes follow.
    pub fn finish(&self) -> Option<StopMatch> {
        self.best
    }

    /// Begins again, as at the start of a text.
    pub fn restart(&mut self) {
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        (self.position, self.best) = (0, None);
    }

    /// Where the longest unfinished match starts; the current position if there is none.
    fn earliest_partial(&self) -> usize {
        self.position - self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_match(stop: &[&str], text: &str) -> Option<StopMatch> {
        let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
        let mut matcher = StopMatcher::new(&stop);
        text.bytes().find_map(|byte| matcher.push(byte)).or_else(|| matcher.finish())
    }

    #[test]
    fn an_earlier_start_beats_an_earlier_end() {
        let found = first_match(&["bc", "abcd"], "xabcd");
        assert_eq!(found, Some(StopMatch { start: 1, end: 5, index: 1 }));
        let found = first_match(&["bc", "abcd"], "xabce");
        assert_eq!(found, Some(StopMatch { start: 2, end: 4, index: 0 }));
        let found = first_match(&["bc", "abcd"], "xabc");
        assert_eq!(found, Some(StopMatch { start: 2, end: 4, index: 0 }));
    }

    #[test]
    fn at_the_same_start_the_shortest_then_the_first_wins() {
        assert_eq!(first_match(&["abc", "ab", "ab"], "abc").map(|m| (m.end, m.index)), Some((2, 1)));
    }

    #[test]
    fn a_failed_beginning_does_not_hide_a_match_inside_it() {
        assert_eq!(first_match(&["aab"], "aaab").map(|m| m.start), Some(1));
        assert_eq!(first_match(&[""], "anything"), None);
    }
}
