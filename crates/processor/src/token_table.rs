//! The exact bytes of each token, and which tokens are control tokens.

use std::{collections::HashMap, sync::LazyLock};

/// Byte-level vocabularies write each byte as one printable letter; this undoes it.
///
/// Printable bytes stand for themselves; the others were given the code points from U+0100 on, in
/// order (GPT-2's `bytes_to_unicode`).
static LETTER_BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let mut next_letter = 0x100_u32;
    let letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next_letter += 1;
            char::from_u32(next_letter - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    };
    (0..=u8::MAX).map(letter).zip(0..=u8::MAX).collect()
});

/// The letter that stands for a space in SentencePiece vocabularies.
pub(crate) const SPACE_LETTER: char = '\u{2581}';

/// Bytes of a token of a byte-level vocabulary. A text with other letters is not in the byte
/// alphabet (a token added later) and stands for itself.
pub(crate) fn byte_level_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|letter| LETTER_BYTES.get(&letter).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Bytes of a SentencePiece token: its letter for the space is a space.
pub(crate) fn sentencepiece_bytes(token: &str) -> Vec<u8> {
    token.replace(SPACE_LETTER, " ").into_bytes()
}

/// The byte of a token `<0xNN>`.
pub(crate) fn hex_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// One token of the table under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenEntry {
    /// What the token adds to the text.
    pub bytes: Vec<u8>,
    /// A control token, hidden from the reader.
    pub is_special: bool,
}

/// Bytes of all tokens in one piece of memory.
#[derive(Debug)]
pub(crate) struct TokenTable {
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`: where a token's bytes start; the last is the end.
    starts: Vec<usize>,
    /// `[vocab_size]`
    special: Vec<bool>,
}

impl TokenTable {
    /// Lays `vocab_size` tokens out; absent ones are empty, surplus ones are left out.
    pub fn new(vocab_size: usize, entries: impl IntoIterator<Item = TokenEntry>) -> Self {
        let mut table = Self { bytes: Vec::new(), starts: vec![0], special: Vec::new() };
        let padding = std::iter::repeat_with(TokenEntry::default);
        for entry in entries.into_iter().chain(padding).take(vocab_size) {
            table.bytes.extend_from_slice(&entry.bytes);
            table.starts.push(table.bytes.len());
            table.special.push(entry.is_special);
        }
        table
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Bytes of a token; empty out of range.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }

    /// Whether a token is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_letters_are_undone() {
        assert_eq!(LETTER_BYTES.len(), 256);
        assert_eq!(byte_level_bytes("ĠHello"), b" Hello");
        assert_eq!(byte_level_bytes("Ċ"), b"\n");
        assert_eq!(byte_level_bytes("Ã©"), "é".as_bytes());
        assert_eq!(byte_level_bytes("日本"), "日本".as_bytes());
    }

    #[test]
    fn only_two_hex_digits_are_a_byte() {
        assert_eq!(hex_byte("<0x0A>"), Some(10));
        for other in ["<0x+1>", "<0xA>", "<0x0AB>", "0x0A", "<0xgg>", "<0x>"] {
            assert_eq!(hex_byte(other), None, "{other}");
        }
    }

    #[test]
    fn ids_out_of_range_are_empty() {
        let entry = |bytes: &[u8]| TokenEntry { bytes: bytes.to_vec(), is_special: true };
        let table = TokenTable::new(3, [entry(b"ab"), entry(b"c")]);
        assert_eq!((table.len(), table.bytes(0), table.bytes(1)), (3, &b"ab"[..], &b"c"[..]));
        assert!(table.bytes(2).is_empty() && table.bytes(3).is_empty() && table.bytes(u32::MAX).is_empty());
        assert!(table.is_special(1) && !table.is_special(2) && !table.is_special(u32::MAX));
    }
}
