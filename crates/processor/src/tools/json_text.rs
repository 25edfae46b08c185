//! A JSON object that arrives in pieces: checked as it comes, and handed on in pieces that join to
//! valid JSON whenever they end.

/// The text is no JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Deepest nesting.
pub(super) const MAX_DEPTH: usize = 128;

/// The text of one object.
#[derive(Debug)]
pub(super) struct JsonText {
    /// Closing brackets of what is open.
    open: Vec<char>,
    state: State,
    /// A comma and blanks that are handed on with what follows them.
    separator: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The object has not begun.
    Start,
    Value,
    /// Right after `[`.
    ValueOrEnd,
    Key,
    /// Right after `{`.
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    String {
        is_key: bool,
        escape: Escape,
    },
    Number(Number),
    /// Inside `true`, `false` or `null`: what is still to come.
    Word(&'static str),
    Done,
}

/// How far an escape has come; its text is handed on when it is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    /// After a backslash.
    Begun,
    /// Digits after `\u`: how many, and their value.
    Unicode {
        digits: u8,
        value: u16,
        high: Option<u16>,
    },
    /// After the first half of a surrogate pair.
    High(u16),
    /// After that and a backslash.
    HighBegun(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Sign,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl JsonText {
    pub(super) fn new() -> Self {
        Self { open: Vec::new(), state: State::Start, separator: String::new() }
    }

    /// Whether the object is complete.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Takes the next character and appends what may be handed on. Raw control characters in
    /// strings, which some models write, are escaped.
    ///
    /// # Errors
    /// The character cannot stand here; the state stays as it was.
    pub(super) fn push(&mut self, next: char, out: &mut String) -> Result<(), Malformed> {
        match self.state {
            State::String { is_key, escape } => self.in_string(next, is_key, escape, out),
            State::Number(number) => match number.after(next) {
                Some(number) => {
                    out.push(next);
                    self.state = State::Number(number);
                    Ok(())
                }
                None if number.is_whole() => {
                    self.state = State::CommaOrEnd;
                    self.push(next, out)
                }
                None => Err(Malformed),
            },
            State::Word(rest) => {
                let rest = rest.strip_prefix(next).ok_or(Malformed)?;
                out.push(next);
                self.state = if rest.is_empty() { State::CommaOrEnd } else { State::Word(rest) };
                Ok(())
            }
            _ if matches!(next, ' ' | '\n' | '\r' | '\t') => {
                self.separator.push(next);
                Ok(())
            }
            _ => self.structure(next, out),
        }
    }

    /// Brackets, commas, colons, and the first character of a value.
    fn structure(&mut self, next: char, out: &mut String) -> Result<(), Malformed> {
        let state = match (self.state, next) {
            (State::Start, '{') => self.nest('}', State::KeyOrEnd)?,
            (State::Value | State::ValueOrEnd, '{') => self.nest('}', State::KeyOrEnd)?,
            (State::Value | State::ValueOrEnd, '[') => self.nest(']', State::ValueOrEnd)?,
            (State::KeyOrEnd | State::ValueOrEnd | State::CommaOrEnd, '}' | ']') => {
                if self.open.last() != Some(&next) {
                    return Err(Malformed);
                }
                self.open.pop();
                if self.open.is_empty() { State::Done } else { State::CommaOrEnd }
            }
            (State::CommaOrEnd, ',') => {
                self.separator.push(',');
                self.state = if self.open.last() == Some(&'}') { State::Key } else { State::Value };
                return Ok(());
            }
            (State::Key | State::KeyOrEnd, '"') => State::String { is_key: true, escape: Escape::None },
            (State::Colon, ':') => State::Value,
            (State::Value | State::ValueOrEnd, '"') => State::String { is_key: false, escape: Escape::None },
            (State::Value | State::ValueOrEnd, 't') => State::Word("rue"),
            (State::Value | State::ValueOrEnd, 'f') => State::Word("alse"),
            (State::Value | State::ValueOrEnd, 'n') => State::Word("ull"),
            (State::Value | State::ValueOrEnd, _) => State::Number(Number::first(next).ok_or(Malformed)?),
            _ => return Err(Malformed),
        };
        out.push_str(&std::mem::take(&mut self.separator));
        out.push(next);
        self.state = state;
        Ok(())
    }

    fn nest(&mut self, close: char, state: State) -> Result<State, Malformed> {
        if self.open.len() == MAX_DEPTH {
            return Err(Malformed);
        }
        self.open.push(close);
        Ok(state)
    }

    fn in_string(
        &mut self,
        next: char,
        is_key: bool,
        escape: Escape,
        out: &mut String,
    ) -> Result<(), Malformed> {
        let escape = match (escape, next) {
            (Escape::None, '"') => {
                out.push('"');
                self.state = if is_key { State::Colon } else { State::CommaOrEnd };
                return Ok(());
            }
            (Escape::None, '\\') => Escape::Begun,
            (Escape::None, _) => {
                push_escaped(out, next);
                Escape::None
            }
            (Escape::Begun, 'u') => Escape::Unicode { digits: 0, value: 0, high: None },
            (Escape::Begun, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => {
                out.extend(['\\', next]);
                Escape::None
            }
            (Escape::Begun, _) => return Err(Malformed),
            (Escape::Unicode { digits, value, high }, _) => {
                let digit = next.to_digit(16).ok_or(Malformed)?;
                unicode_digit(digits + 1, (value << 4) | digit as u16, high, out)
            }
            (Escape::High(high), '\\') => Escape::HighBegun(high),
            (Escape::HighBegun(high), 'u') => Escape::Unicode { digits: 0, value: 0, high: Some(high) },
            // Half a pair is no character.
            (Escape::High(_), _) => {
                out.push_str("\\ufffd");
                return self.in_string(next, is_key, Escape::None, out);
            }
            (Escape::HighBegun(_), _) => {
                out.push_str("\\ufffd");
                return self.in_string(next, is_key, Escape::Begun, out);
            }
        };
        self.state = State::String { is_key, escape };
        Ok(())
    }

    /// What makes a complete object of the text so far.
    pub(super) fn completion(&self) -> String {
        let mut end = String::new();
        match self.state {
            State::Start => end.push_str("{}"),
            State::String { is_key, escape } => {
                if matches!(escape, Escape::High(_) | Escape::HighBegun(_)) {
                    end.push_str("\\ufffd");
                }
                end.push_str(if is_key { "\":null" } else { "\"" });
            }
            State::Colon => end.push_str(":null"),
            // A comma that was not handed on needs nothing behind it.
            State::Value if !self.separator.contains(',') => end.push_str("null"),
            State::Number(number) if !number.is_whole() => end.push('0'),
            State::Word(rest) => end.push_str(rest),
            _ => {}
        }
        end.extend(self.open.iter().rev());
        end
    }
}

/// A digit of `\uXXXX` has come, the `digits`th, and `value` is that of all.
fn unicode_digit(digits: u8, value: u16, high: Option<u16>, out: &mut String) -> Escape {
    if digits < 4 {
        return Escape::Unicode { digits, value, high };
    }
    let is_low = (0xDC00..0xE000).contains(&value);
    let is_high = (0xD800..0xDC00).contains(&value);
    match high {
        Some(high) if is_low => out.push_str(&format!("\\u{high:04x}\\u{value:04x}")),
        Some(_) => {
            out.push_str("\\ufffd");
            return unicode_digit(digits, value, None, out);
        }
        None if is_high => return Escape::High(value),
        None if is_low => out.push_str("\\ufffd"),
        None => out.push_str(&format!("\\u{value:04x}")),
    }
    Escape::None
}

/// Appends a character of a string, escaped if it cannot stand in one as it is.
pub(super) fn push_escaped(out: &mut String, next: char) {
    match next {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\0'..='\u{1F}' => out.push_str(&format!("\\u{:04x}", next as u32)),
        _ => out.push(next),
    }
}

impl Number {
    fn first(next: char) -> Option<Self> {
        match next {
            '-' => Some(Self::Sign),
            '0' => Some(Self::Zero),
            '1'..='9' => Some(Self::Integer),
            _ => None,
        }
    }

    fn after(self, next: char) -> Option<Self> {
        match (self, next) {
            (Self::Sign, '0') => Some(Self::Zero),
            (Self::Sign, '1'..='9') | (Self::Integer, '0'..='9') => Some(Self::Integer),
            (Self::Zero | Self::Integer, '.') => Some(Self::Point),
            (Self::Point | Self::Fraction, '0'..='9') => Some(Self::Fraction),
            (Self::Zero | Self::Integer | Self::Fraction, 'e' | 'E') => Some(Self::Exponent),
            (Self::Exponent, '+' | '-') => Some(Self::ExponentSign),
            (Self::Exponent | Self::ExponentSign | Self::ExponentDigits, '0'..='9') => {
                Some(Self::ExponentDigits)
            }
            _ => None,
        }
    }

    fn is_whole(self) -> bool {
        matches!(self, Self::Zero | Self::Integer | Self::Fraction | Self::ExponentDigits)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;

    /// The whole text through, as far as it is JSON; what is left.
    fn pass(text: &str) -> (JsonText, String, String) {
        let (mut json, mut out) = (JsonText::new(), String::new());
        let mut rest = text.chars();
        while !json.is_done() {
            let before = rest.as_str();
            let Some(next) = rest.next() else { break };
            if json.push(next, &mut out).is_err() {
                return (json, out, before.to_owned());
            }
        }
        (json, out, rest.as_str().to_owned())
    }

    #[test]
    fn valid_texts_pass_as_they_are() {
        for text in [
            "{}",
            r#"{"a": "\" \\ \/ \b \u00e9 \ud83e\udd80 é🦀", "b": [1, -0.5e+10, {}], "c" : null}"#,
            r#"{ "a":[ ] ,"b":[true,false , [[]]]}"#,
        ] {
            let (json, out, rest) = pass(text);
            assert!(json.is_done(), "{text}");
            assert_eq!((out.as_str(), rest.as_str()), (text, ""));
        }
    }

    #[test]
    fn what_models_get_wrong_is_put_right() {
        assert_eq!(pass("{\"a\": \"x\ny\t\"}").1, r#"{"a": "x\ny\t"}"#);
        assert_eq!(pass(r#"{"a": "\ud83e!\udd80"}"#).1, r#"{"a": "\ufffd!\ufffd"}"#);
        assert_eq!(
            pass(r#"{"a": "\ud83e\n\ud83e\ud83e\udd80"}"#).1,
            r#"{"a": "\ufffd\n\ufffd\ud83e\udd80"}"#
        );
    }

    #[test]
    fn invalid_texts_stop_where_they_are() {
        for (text, rest) in [
            ("[1]", "[1]"),
            ("{a: 1}", "a: 1}"),
            (r#"{"a": 01}"#, "1}"),
            (r#"{"a": [1}"#, "}"),
            (r#"{"a": [}"#, "}"),
            (r#"{"a": "\x"}"#, "x\"}"),
            (r#"{"a": 1,}"#, "}"),
            (r#"{"a": tru}"#, "}"),
            (r#"{"a" 1}"#, "1}"),
            (r#"{"a": -}"#, "}"),
        ] {
            let (json, out, left) = pass(text);
            assert_eq!(left, rest, "{text}");
            let whole = out + &json.completion();
            assert!(serde_json::from_str::<Map<String, Value>>(&whole).is_ok(), "{text}: {whole}");
        }
        let deep = format!("{{\"a\": {}", "[".repeat(200));
        assert_eq!(pass(&deep).2.len(), 200 - (MAX_DEPTH - 1));
    }

    /// Any JSON value.
    pub(crate) fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9f64..1e9).prop_map(Value::from),
            "[a-z\"'\\\\\n\u{1}é🦀€ ]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                any_object_of(inner).prop_map(Value::from),
            ]
        })
    }

    fn any_object_of(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Map<String, Value>> {
        proptest::collection::vec(("[a-z\"\\\\é🦀 ]{0,6}", value), 0..4)
            .prop_map(|pairs| pairs.into_iter().collect())
    }

    /// Any object.
    pub(crate) fn any_object() -> impl Strategy<Value = Map<String, Value>> {
        any_object_of(any_value())
    }

    proptest! {
        #[test]
        fn whatever_is_cut_off_can_be_completed(object in any_object(), is_pretty in any::<bool>(), cut in any::<proptest::sample::Index>()) {
            let text = if is_pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) }.expect("plain data");
            let (json, out, _) = pass(&text);
            prop_assert!(json.is_done());
            prop_assert_eq!(&out, &text);
            let cut = text.floor_char_boundary(cut.index(text.len() + 1));
            let (json, out, _) = pass(&text[..cut]);
            let whole = out + &json.completion();
            prop_assert!(serde_json::from_str::<Map<String, Value>>(&whole).is_ok(), "{} of {}", whole, text);
        }
    }
}
