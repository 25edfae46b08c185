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
        let (mut at, mut chars) = (0, 0);
        let mut offsets = Vec::with_capacity(ids.len());
        for &id in ids {
            offsets.push(chars);
            let token = shown(tokens.token_bytes(id), &bytes[at..], at == 0);
            at += token.len();
            chars += count_chars(token);
        }
        // What no token accounts for, because the tokenizer changed it, still counts.
        chars += count_chars(&bytes[at..]);
        let text = written.unwrap_or_else(|| String::from_utf8_lossy(&bytes).into_owned());
        Self { text, ids: ids.to_vec(), offsets, chars }
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

/// Characters that begin in `bytes`.
pub(crate) fn count_chars(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn what_the_tokenizer_changed_still_counts() {
        let echo = EchoedPrompt::new(&TABLE, Some("ABC".into()), &[1, 2]);
        assert_eq!((echo.offsets.as_slice(), echo.chars), (&[0, 0][..], 3));
        assert_eq!(EchoedPrompt::new(&TABLE, Some(String::new()), &[0]).chars, 0);
    }
}
