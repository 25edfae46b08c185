//! SHA-256 of a key, as it is kept and written down.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// SHA-256 of an API key. Keys are long random strings, so a plain digest needs no salt and no
/// stretching: nobody can try them all.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// The digest of a key.
    pub fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| char::from(digit).to_digit(16);
            // Two hexadecimal digits are at most 255.
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Some(Self(bytes))
    }

    /// 64 hexadecimal digits, for the key file.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_there_and_back() {
        // The published example of FIPS 180-2.
        let abc = KeyDigest::of(b"abc");
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(abc.to_hex(), hex);
        assert_eq!(KeyDigest::from_hex(hex), Some(abc.clone()));
        assert_eq!(KeyDigest::from_hex(&hex.to_uppercase()), Some(abc));
        for wrong in ["", &hex[1..], &format!("{hex}0"), &hex.replace('b', "g"), &"ü".repeat(32)] {
            assert_eq!(KeyDigest::from_hex(wrong), None, "{wrong}");
        }
    }
}
