//! Looks at a text whose end may not have come yet.

/// Why a text is not what was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Miss {
    /// It may become that with more text.
    Incomplete,
    /// It cannot.
    Wrong,
}

/// What was found.
pub(super) type Look<T> = Result<T, Miss>;

/// A place in a text.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Cursor<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    /// Bytes passed.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// Passes blanks.
    pub(super) fn blanks(&mut self) -> &mut Self {
        self.at = self.text.len() - self.rest().trim_ascii_start().len();
        self
    }

    /// The next character, which is not passed.
    pub(super) fn peek(&self) -> Look<char> {
        self.rest().chars().next().ok_or(Miss::Incomplete)
    }

    /// Passes exactly this.
    pub(super) fn literal(&mut self, wanted: &str) -> Look<()> {
        self.one_of([wanted]).map(drop)
    }

    /// Passes this if it is there.
    pub(super) fn optional(&mut self, wanted: &str) -> Look<bool> {
        match self.literal(wanted) {
            Ok(()) => Ok(true),
            Err(Miss::Wrong) => Ok(false),
            Err(Miss::Incomplete) => Err(Miss::Incomplete),
        }
    }

    /// Passes the longest of these and says which.
    pub(super) fn one_of<'w>(&mut self, wanted: impl IntoIterator<Item = &'w str>) -> Look<usize> {
        let (mut found, mut may_come): (Option<(usize, usize)>, bool) = (None, false);
        for (index, wanted) in wanted.into_iter().enumerate() {
            if self.rest().starts_with(wanted) {
                found = found.filter(|(_, len)| *len >= wanted.len()).or(Some((index, wanted.len())));
            } else {
                may_come |= wanted.starts_with(self.rest());
            }
        }
        match found {
            // A longer one may still come.
            _ if may_come => Err(Miss::Incomplete),
            Some((index, len)) => {
                self.at += len;
                Ok(index)
            }
            None => Err(Miss::Wrong),
        }
    }

    /// Passes a JSON value, whose text it returns. A number needs a character behind it.
    pub(super) fn json_value(&mut self) -> Look<&'t str> {
        let start = self.at;
        let rest = self.rest();
        let length = match self.peek()? {
            '"' => string_length(rest)?,
            '{' | '[' => container_length(rest)?,
            _ => rest.find([',', '}', ']', ' ', '\n', '\r', '\t']).ok_or(Miss::Incomplete)?,
        };
        let value = &rest[..length];
        if serde_json::from_str::<serde_json::Value>(value).is_err() {
            return Err(Miss::Wrong);
        }
        self.at = start + length;
        Ok(value)
    }
}

/// Length of the JSON string that `text` begins with.
fn string_length(text: &str) -> Look<usize> {
    let mut is_escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => return Ok(at + 1),
            _ => {}
        }
    }
    Err(Miss::Incomplete)
}

/// Length of the JSON object or array that `text` begins with, as its brackets say.
fn container_length(text: &str) -> Look<usize> {
    let (mut depth, mut at) = (0usize, 0);
    while let Some(byte) = text.as_bytes().get(at) {
        match byte {
            b'"' => {
                at += string_length(&text[at..])?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Ok(at);
        }
    }
    Err(Miss::Incomplete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_still_come_is_incomplete() {
        let look = |text| Cursor::new(text).one_of(["ab", "abc", "x"]);
        assert_eq!(look("a"), Err(Miss::Incomplete));
        assert_eq!(look("ab"), Err(Miss::Incomplete), "`abc` may come");
        assert_eq!((look("abd"), look("abc"), look("xy")), (Ok(0), Ok(1), Ok(2)));
        assert_eq!(look("b"), Err(Miss::Wrong));
    }

    #[test]
    fn values() {
        let value = |text| Cursor::new(text).json_value();
        assert_eq!(value(r#"{"a": "}\"", "b": [1, {}]} x"#), Ok(r#"{"a": "}\"", "b": [1, {}]}"#));
        assert_eq!((value("12,"), value("null}"), value("\"a\"")), (Ok("12"), Ok("null"), Ok("\"a\"")));
        assert!(["12", "{\"a\": \"}", ""].iter().all(|text| value(text) == Err(Miss::Incomplete)));
        assert!(["{a}", "x,"].iter().all(|text| value(text) == Err(Miss::Wrong)));
    }
}
