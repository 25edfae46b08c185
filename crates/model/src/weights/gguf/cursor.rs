//! Reads of an untrusted header, each checked against the file's end.

use super::metadata::Kind;

/// More keys or tensors than this are not believed; the largest published models have about 1,200
/// tensors and 60 keys.
pub(super) const MAX_ENTRIES: u64 = 100_000;

/// A position in the file; every read is checked against its end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Lengths are u64 (versions 2 and 3) instead of u32.
    wide: bool,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], wide: bool) -> Self {
        Self { bytes, at: 0, wide }
    }

    /// The same position, with lengths of version 1.
    pub(super) fn narrow(self) -> Self {
        Self { wide: false, ..self }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn is_wide(&self) -> bool {
        self.wide
    }

    /// What was passed since `start`.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }

    pub(super) fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(format!(
                "{what} of {len} bytes at byte {} passes the end of the file at {}",
                self.at,
                self.bytes.len()
            ));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(super) fn wide_number(&mut self, what: &str) -> Result<u64, String> {
        if self.wide { self.u64(what) } else { self.u32(what).map(u64::from) }
    }

    pub(super) fn length(&mut self, what: &str) -> Result<usize, String> {
        let length = self.wide_number(what)?;
        usize::try_from(length).map_err(|_| format!("{what} is {length}, which cannot be addressed"))
    }

    pub(super) fn count(&mut self, what: &str) -> Result<u64, String> {
        let count = self.wide_number(&format!("the number of {what}"))?;
        if count > MAX_ENTRIES {
            return Err(format!("it claims {count} {what}; at most {MAX_ENTRIES} are believed"));
        }
        Ok(count)
    }

    pub(super) fn array_len(&mut self, element: Kind) -> Result<usize, String> {
        let len = self.length("an array's length")?;
        let left = self.bytes.len() - self.at;
        if len > left / element.min_bytes(self.wide) {
            return Err(format!("an array claims {len} elements, more than the {left} bytes left can hold"));
        }
        Ok(len)
    }

    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let len = self.length("a text's length")?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| format!("{what} is not UTF-8: {e}"))
    }
}

/// A name as messages show it: escaped and short.
pub(super) fn shown(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    format!("{short:?}")
}
