//! A string as in Python, turned into a JSON string while it comes.

use super::json_text::{Malformed, push_escaped};

/// The string behind its first quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PythonString {
    quote: char,
    stage: Stage,
    escape: Escape,
    /// The first half of a surrogate pair.
    high: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// One quote.
    Opened,
    /// Two: an empty string, or the beginning of a long one.
    Doubled,
    Short,
    /// Between three quotes; how many of the last have come.
    Long {
        quotes: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Begun,
    /// Digits to come, and their value so far.
    Hex {
        left: u8,
        value: u32,
    },
    Octal {
        left: u8,
        value: u32,
    },
}

/// What a character did to the string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It belongs to it.
    Inside,
    /// It ended it.
    Ended,
    /// The string had ended in front of it.
    EndedBefore,
}

impl PythonString {
    pub(super) fn new(quote: char) -> Self {
        Self { quote, stage: Stage::Opened, escape: Escape::None, high: None }
    }

    /// Takes the next character and appends what it makes certain of the JSON string, quotes not
    /// included.
    ///
    /// # Errors
    /// An escape is broken.
    pub(super) fn push(&mut self, next: char, out: &mut String) -> Result<Progress, Malformed> {
        if self.escape != Escape::None && self.in_escape(next, out)? {
            return Ok(Progress::Inside);
        }
        let is_quote = next == self.quote;
        match (self.stage, is_quote) {
            (Stage::Opened, true) => self.stage = Stage::Doubled,
            (Stage::Doubled, true) => self.stage = Stage::Long { quotes: 0 },
            (Stage::Doubled, false) => return Ok(Progress::EndedBefore),
            (Stage::Short, true) => return Ok(Progress::Ended),
            (Stage::Long { quotes: 2 }, true) => return Ok(Progress::Ended),
            (Stage::Long { quotes }, true) => self.stage = Stage::Long { quotes: quotes + 1 },
            (Stage::Opened | Stage::Short, false) => {
                self.stage = Stage::Short;
                self.inside(next, out);
            }
            (Stage::Long { quotes }, false) => {
                for _ in 0..quotes {
                    self.character(self.quote, out);
                }
                self.stage = Stage::Long { quotes: 0 };
                self.inside(next, out);
            }
        }
        Ok(Progress::Inside)
    }

    /// Appends what is due at the end, the quote included.
    pub(super) fn end(&self, out: &mut String) {
        if self.high.is_some() {
            push_escaped(out, char::REPLACEMENT_CHARACTER);
        }
        out.push('"');
    }

    fn inside(&mut self, next: char, out: &mut String) {
        if next == '\\' {
            self.escape = Escape::Begun;
        } else {
            self.character(next, out);
        }
    }

    /// Whether the character belongs to the escape.
    fn in_escape(&mut self, next: char, out: &mut String) -> Result<bool, Malformed> {
        let escape = std::mem::replace(&mut self.escape, Escape::None);
        match (escape, next) {
            (Escape::Octal { left, value }, '0'..='7') if left > 0 => {
                self.escape =
                    Escape::Octal { left: left - 1, value: value * 8 + next as u32 - u32::from(b'0') };
            }
            (Escape::Octal { value, .. }, _) => {
                self.code(value, out);
                return Ok(false);
            }
            (Escape::Hex { left, value }, _) => {
                let Some(digit) = next.to_digit(16) else {
                    self.escape = escape;
                    return Err(Malformed);
                };
                let value = (value << 4) | digit;
                if left > 1 {
                    self.escape = Escape::Hex { left: left - 1, value };
                } else {
                    self.code(value, out);
                }
            }
            (_, 'x') => self.escape = Escape::Hex { left: 2, value: 0 },
            (_, 'u') => self.escape = Escape::Hex { left: 4, value: 0 },
            (_, 'U') => self.escape = Escape::Hex { left: 8, value: 0 },
            (_, '0'..='7') => self.escape = Escape::Octal { left: 2, value: next as u32 - u32::from(b'0') },
            (_, 'n') => self.character('\n', out),
            (_, 't') => self.character('\t', out),
            (_, 'r') => self.character('\r', out),
            (_, 'a') => self.character('\u{7}', out),
            (_, 'b') => self.character('\u{8}', out),
            (_, 'v') => self.character('\u{B}', out),
            (_, 'f') => self.character('\u{C}', out),
            // The last one is JSON's.
            (_, '\\' | '\'' | '"' | '/') => self.character(next, out),
            // The line goes on.
            (_, '\n') => {}
            _ => {
                self.character('\\', out);
                self.character(next, out);
            }
        }
        Ok(true)
    }

    fn character(&mut self, next: char, out: &mut String) {
        if self.high.take().is_some() {
            push_escaped(out, char::REPLACEMENT_CHARACTER);
        }
        push_escaped(out, next);
    }

    /// A character by its number; halves of pairs are joined as in JSON.
    fn code(&mut self, code: u32, out: &mut String) {
        match (code, self.high) {
            (0xD800..0xDC00, _) => {
                if self.high.replace(code).is_some() {
                    push_escaped(out, char::REPLACEMENT_CHARACTER);
                }
            }
            (0xDC00..0xE000, Some(high)) => {
                self.high = None;
                let code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00);
                self.character(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), out);
            }
            _ => self.character(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> String {
        let mut chars = text.chars();
        let mut string = PythonString::new(chars.next().expect("a quote"));
        let mut out = "\"".to_owned();
        for next in chars {
            if string.push(next, &mut out) != Ok(Progress::Inside) {
                break;
            }
        }
        string.end(&mut out);
        serde_json::from_str(&out).expect("a JSON string")
    }

    #[test]
    fn strings_of_python() {
        let rows = [
            (r#"'it\'s "x"'"#, "it's \"x\""),
            (r#""a\n\t\\\x41\u00e9\U0001f980""#, "a\n\t\\Aé🦀"),
            (r#""\ud83e\udd80""#, "🦀"),
            (r#""\ud83e!""#, "\u{FFFD}!"),
            (r#""\udd80\ud83e""#, "\u{FFFD}\u{FFFD}"),
            (r"'\101\0\18'", "A\0\u{1}8"),
            (r"'\q\/'", "\\q/"),
            ("'''a'b''c\n'''", "a'b''c\n"),
            ("'' ", ""),
            ("'a\\\nb'", "ab"),
            ("'é🦀\u{1}'", "é🦀\u{1}"),
        ];
        for (text, wanted) in rows {
            assert_eq!(json(text), wanted, "{text}");
        }
        let mut string = PythonString::new('"');
        let results: Vec<_> = "\\xg".chars().map(|next| string.push(next, &mut String::new())).collect();
        assert_eq!(results[2], Err(Malformed));
    }
}
