//! Prompts as a part of answers: their text, and where in it each token begins.

use crate::choice::TokenTable;

/// A prompt that is echoed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EchoedPrompt {
    /// The prompt as the client wrote it, or the text of its ids.
    pub(crate) text: String,
    /// Token ids as submitted.
    pub(crate) ids: Vec<u32>,
    /// Characters of the text before each token.
    pub(crate) offsets: Vec<usize>,
    /// Characters of the whole text.
    pub(crate) chars: usize,
}

impl EchoedPrompt {
    /// The echo of `ids`, which are all tokens of `written`; without it their own text is echoed,
    /// control tokens included.
    pub(crate) fn new(tokens: &dyn TokenTable, written: Option<String>, ids: &[u32]) -> Self {
        let bytes = match &written {
            Some(text) => text.as_bytes().to_vec(),
            None => ids.iter().flat_map(|&id| tokens.token_bytes(id)).copied().collect(),
        };
        let (mut at, mut counter) = (0, CharCounter::default());
        let mut offsets = Vec::with_capacity(ids.len());
        for &id in ids {
            offsets.push(counter.chars());
            let token = shown(tokens.token_bytes(id), &bytes[at..], at == 0);
            at += token.len();
            counter.count(token);
        }
        // What no token accounts for, because the tokenizer changed it, still counts.
        counter.count(&bytes[at..]);
        let text = written.unwrap_or_else(|| String::from_utf8_lossy(&bytes).into_owned());
        Self { text, ids: ids.to_vec(), offsets, chars: counter.chars() }
    }
}

/// What of a token's bytes stands at the front of `rest`: all, or nothing, because the tokenizer
/// added the token; of the first one all but a space that some tokenizers put before every text.
fn shown<'t>(token: &'t [u8], rest: &[u8], is_first: bool) -> &'t [u8] {
    if rest.starts_with(token) {
        return token;
    }
    match token.strip_prefix(b" ") {
        Some(token) if is_first && rest.starts_with(token) => token,
        _ => &[],
    }
}

/// Counts the characters of a text whose bytes come in pieces, as the text shows them: bytes that are
/// no UTF-8 count as the characters that stand for them. A character counts with its first byte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CharCounter {
    chars: usize,
    /// The bytes of the last character, which is counted, while some are still to come.
    begun: Vec<u8>,
}

impl CharCounter {
    /// Behind a text of so many characters.
    pub(crate) fn behind(chars: usize) -> Self {
        Self { chars, begun: Vec::new() }
    }

    /// Characters so far.
    pub(crate) fn chars(&self) -> usize {
        self.chars
    }

    /// Goes on.
    pub(crate) fn count(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let counted = usize::from(!self.begun.is_empty());
        self.begun.extend_from_slice(bytes);
        let (mut chars, mut last) = (0, &[][..]);
        for chunk in self.begun.utf8_chunks() {
            last = chunk.invalid();
            chars += chunk.valid().chars().count() + usize::from(!last.is_empty());
        }
        let is_begun = str::from_utf8(last).is_err_and(|error| error.error_len().is_none());
        let begun = if is_begun { last.len() } else { 0 };
        self.chars += chars - counted;
        self.begun.drain(..self.begun.len() - begun);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Token `i` is the `i`-th text.
    struct Table(&'static [&'static [u8]]);

    impl TokenTable for Table {
        fn token_bytes(&self, id: u32) -> &[u8] {
            self.0[id as usize]
        }

        fn is_special(&self, _: u32) -> bool {
            false
        }
    }

    const TABLE: Table = Table(&[b"<s>", b" Hel", b"lo", b"\xC3", b"\xBC", b" \xE2\x82\xAC"]);

    #[test]
    fn a_written_prompt_is_echoed_as_it_was() {
        let echo = EchoedPrompt::new(&TABLE, Some("Hello \u{20AC}\u{FC}".into()), &[0, 1, 2, 5, 3, 4]);
        assert_eq!(echo.text, "Hello \u{20AC}\u{FC}");
        assert_eq!(echo.offsets, [0, 0, 3, 5, 7, 8]);
        assert_eq!(echo.chars, 8);
    }

    #[test]
    fn ids_are_echoed_as_their_text() {
        let echo = EchoedPrompt::new(&TABLE, None, &[0, 1, 2, 3]);
        assert_eq!(echo.text, "<s> Hello\u{FFFD}");
        assert_eq!(echo.offsets, [0, 3, 7, 9]);
        assert_eq!(echo.chars, 10);
    }

    /// `\xBC` alone is shown as one character.
    #[test]
    fn ids_may_begin_inside_a_character() {
        let echo = EchoedPrompt::new(&TABLE, None, &[4, 2, 3, 2]);
        assert_eq!(echo.text, "\u{FFFD}lo\u{FFFD}lo");
        assert_eq!((echo.offsets.as_slice(), echo.chars), (&[0, 1, 3, 4][..], 6));
    }

    proptest! {
        /// However bytes are cut, their characters are those of the text that is shown.
        #[test]
        fn characters_are_those_of_the_shown_text(
            pieces in proptest::collection::vec("[a\u{E9}\u{20AC}\u{1F600}]{0,3}", 0..4),
            junk in proptest::collection::vec(any::<u8>(), 0..8), cut in 1usize..4,
        ) {
            let bytes = [pieces.concat().into_bytes(), junk, pieces.concat().into_bytes()].concat();
            let mut counter = CharCounter::default();
            bytes.chunks(cut).for_each(|piece| counter.count(piece));
            prop_assert_eq!(counter.chars(), String::from_utf8_lossy(&bytes).chars().count());
        }
    }

    #[test]
    fn what_the_tokenizer_changed_still_counts() {
        let echo = EchoedPrompt::new(&TABLE, Some("ABC".into()), &[1, 2]);
        assert_eq!((echo.offsets.as_slice(), echo.chars), (&[0, 0][..], 3));
        assert_eq!(EchoedPrompt::new(&TABLE, Some(String::new()), &[0]).chars, 0);
    }
}
