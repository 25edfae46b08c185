//! Arguments as in a call in Python, turned into a JSON object while they come:
//! `city="Oslo", days=[1, 2])` becomes `{"city": "Oslo", "days": [1, 2]}`.

use super::{
    json_text::{MAX_DEPTH, Malformed, push_escaped},
    python_string::{Progress, PythonString},
    pythonic::is_name,
};

/// Longest number or word.
const MAX_WORD_BYTES: usize = 400;

/// The arguments of one call, behind its opening bracket.
#[derive(Debug)]
pub(super) struct PythonArguments {
    open: Vec<Container>,
    state: State,
    /// The object has begun, and so has an item of it.
    has_begun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Container {
    List,
    Tuple,
    Dict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// In front of an argument's name, or the end.
    Argument,
    Name(String),
    /// Between a name and `=`.
    Equals(String),
    /// In front of a value that must come.
    Value,
    /// In front of an item of a list, or its end. Whether one came before.
    Item {
        is_first: bool,
    },
    /// The same of a dictionary's key.
    Key {
        is_first: bool,
    },
    Colon,
    /// Behind a value.
    CommaOrEnd,
    /// A number or a word so far.
    Word {
        text: String,
        is_key: bool,
    },
    Text {
        text: PythonString,
        is_key: bool,
    },
    Done,
}

impl PythonArguments {
    pub(super) fn new() -> Self {
        Self { open: Vec::new(), state: State::Argument, has_begun: false }
    }

    /// Whether the closing bracket has come.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Takes the next character and appends the JSON text that it makes certain.
    ///
    /// # Errors
    /// The character cannot stand here; what was handed on can be completed.
    pub(super) fn push(&mut self, next: char, out: &mut String) -> Result<(), Malformed> {
        match std::mem::replace(&mut self.state, State::Argument) {
            State::Text { text, is_key } => self.in_text(text, is_key, next, out),
            State::Word { mut text, is_key } => {
                if next.is_ascii_alphanumeric() || matches!(next, '.' | '_') || is_exponent_sign(&text, next)
                {
                    if text.len() == MAX_WORD_BYTES {
                        return self.fail(State::Word { text, is_key });
                    }
                    text.push(next);
                    self.state = State::Word { text, is_key };
                    return Ok(());
                }
                let Some(value) = json_of(&text) else { return self.fail(State::Word { text, is_key }) };
                if is_key {
                    push_text(out, &value);
                } else {
                    out.push_str(&value);
                }
                self.state = if is_key { State::Colon } else { State::CommaOrEnd };
                self.push(next, out)
            }
            State::Name(mut name) if is_name(next) => {
                if name.len() >= MAX_WORD_BYTES {
                    return self.fail(State::Name(name));
                }
                name.push(next);
                self.state = State::Name(name);
                Ok(())
            }
            State::Name(name) => {
                self.state = State::Equals(name);
                self.push(next, out)
            }
            state if next.is_whitespace() => {
                self.state = state;
                Ok(())
            }
            state => match self.structure(&state, next, out) {
                Some(after) => {
                    self.state = after;
                    Ok(())
                }
                None => self.fail(state),
            },
        }
    }

    fn fail(&mut self, state: State) -> Result<(), Malformed> {
        self.state = state;
        Err(Malformed)
    }

    /// What is neither inside a string nor inside a word.
    fn structure(&mut self, state: &State, next: char, out: &mut String) -> Option<State> {
        match (state, next) {
            (State::Argument, ')') => {
                out.push_str(if self.has_begun { "}" } else { "{}" });
                Some(State::Done)
            }
            (State::Argument, _) if is_name(next) => Some(State::Name(next.into())),
            (State::Equals(name), '=') => {
                out.push_str(if self.has_begun { ", " } else { "{" });
                self.has_begun = true;
                push_text(out, name);
                out.push_str(": ");
                Some(State::Value)
            }
            (State::CommaOrEnd, ',') => Some(match self.open.last() {
                None => State::Argument,
                Some(Container::Dict) => State::Key { is_first: false },
                Some(_) => State::Item { is_first: false },
            }),
            (State::CommaOrEnd, ')') if self.open.is_empty() => self.structure(&State::Argument, ')', out),
            (State::CommaOrEnd | State::Item { .. } | State::Key { .. }, ')' | ']' | '}') => {
                let wanted = match next {
                    ')' => Container::Tuple,
                    ']' => Container::List,
                    _ => Container::Dict,
                };
                self.open.pop_if(|open| *open == wanted)?;
                out.push(if next == '}' { '}' } else { ']' });
                Some(State::CommaOrEnd)
            }
            (State::Colon, ':') => {
                out.push_str(": ");
                Some(State::Value)
            }
            (State::Key { is_first }, '"' | '\'') => {
                out.push_str(if *is_first { "\"" } else { ", \"" });
                Some(State::Text { text: PythonString::new(next), is_key: true })
            }
            (State::Key { is_first }, _) if is_word_start(next) => {
                out.push_str(if *is_first { "" } else { ", " });
                Some(State::Word { text: next.into(), is_key: true })
            }
            (State::Item { is_first }, _) => {
                // Only what begins a value gets a comma.
                let mut value = String::new();
                let after = self.value(next, &mut value)?;
                out.push_str(if *is_first { "" } else { ", " });
                out.push_str(&value);
                Some(after)
            }
            (State::Value, _) => self.value(next, out),
            _ => None,
        }
    }

    /// The first character of a value.
    fn value(&mut self, next: char, out: &mut String) -> Option<State> {
        let (container, after) = match next {
            '"' | '\'' => {
                out.push('"');
                return Some(State::Text { text: PythonString::new(next), is_key: false });
            }
            '[' => (Container::List, State::Item { is_first: true }),
            '(' => (Container::Tuple, State::Item { is_first: true }),
            '{' => (Container::Dict, State::Key { is_first: true }),
            _ if is_word_start(next) => return Some(State::Word { text: next.into(), is_key: false }),
            _ => return None,
        };
        if self.open.len() + 1 >= MAX_DEPTH {
            return None;
        }
        self.open.push(container);
        out.push(if container == Container::Dict { '{' } else { '[' });
        Some(after)
    }

    fn in_text(
        &mut self,
        mut text: PythonString,
        is_key: bool,
        next: char,
        out: &mut String,
    ) -> Result<(), Malformed> {
        let after = if is_key { State::Colon } else { State::CommaOrEnd };
        match text.push(next, out) {
            Ok(Progress::Inside) => self.state = State::Text { text, is_key },
            Ok(Progress::Ended) => {
                text.end(out);
                self.state = after;
            }
            Ok(Progress::EndedBefore) => {
                text.end(out);
                self.state = after;
                return self.push(next, out);
            }
            Err(Malformed) => return self.fail(State::Text { text, is_key }),
        }
        Ok(())
    }

    /// What makes a complete object of the text so far.
    pub(super) fn completion(&self) -> String {
        let mut end = String::new();
        match &self.state {
            State::Value => end.push_str("null"),
            State::Colon => end.push_str(": null"),
            State::Word { text, is_key: false } => {
                end.push_str(&json_of(text).unwrap_or_else(|| "null".into()));
            }
            State::Word { text, is_key: true } => {
                push_text(&mut end, text);
                end.push_str(": null");
            }
            State::Text { text, is_key } => {
                text.end(&mut end);
                end.push_str(if *is_key { ": null" } else { "" });
            }
            State::Done => return end,
            _ => {}
        }
        end.extend(self.open.iter().rev().map(|open| if *open == Container::Dict { '}' } else { ']' }));
        end.push_str(if self.has_begun { "}" } else { "{}" });
        end
    }
}

fn is_word_start(next: char) -> bool {
    next.is_ascii_alphanumeric() || matches!(next, '-' | '+' | '.')
}

/// Whether a sign stands behind the `e` of a number.
fn is_exponent_sign(text: &str, next: char) -> bool {
    let is_number =
        !text.starts_with(|first: char| first.is_ascii_alphabetic()) && !text.contains(['x', 'X']);
    matches!(next, '-' | '+') && text.ends_with(['e', 'E']) && is_number
}

/// Appends a JSON string.
fn push_text(out: &mut String, text: &str) {
    out.push('"');
    text.chars().for_each(|next| push_escaped(out, next));
    out.push('"');
}

/// A number or a word of Python, or of JSON, as JSON.
fn json_of(word: &str) -> Option<String> {
    match word {
        "True" | "true" => return Some("true".into()),
        "False" | "false" => return Some("false".into()),
        "None" | "null" => return Some("null".into()),
        _ => {}
    }
    let (sign, digits) = match word.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", word.strip_prefix('+').unwrap_or(word)),
    };
    let digits = digits.replace('_', "");
    let lower = digits.to_ascii_lowercase();
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(digits) = lower.strip_prefix(prefix) {
            return u64::from_str_radix(digits, radix).ok().map(|value| format!("{sign}{value}"));
        }
    }
    // JSON wants a digit on both sides of the point.
    let mut number = format!("{sign}{}{digits}", if digits.starts_with('.') { "0" } else { "" });
    if let Some(at) =
        number.find('.').filter(|at| !number[at + 1..].starts_with(|next: char| next.is_ascii_digit()))
    {
        number.insert(at + 1, '0');
    }
    serde_json::from_str::<serde_json::Number>(&number).is_ok().then_some(number)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::{super::json_text::tests::any_object, *};

    fn pass(text: &str) -> (PythonArguments, String, String) {
        let (mut arguments, mut out) = (PythonArguments::new(), String::new());
        let mut rest = text.chars();
        while !arguments.is_done() {
            let before = rest.as_str();
            let Some(next) = rest.next() else { break };
            if arguments.push(next, &mut out).is_err() {
                return (arguments, out, before.to_owned());
            }
        }
        (arguments, out, rest.as_str().to_owned())
    }

    #[test]
    fn values_of_python_become_json() {
        let rows = [
            (")", json!({})),
            ("a=1)", json!({"a": 1})),
            (
                r#"city='Oslo', n = -1.5e-3, on=True, off=False, no=None,)"#,
                json!({"city": "Oslo", "n": -0.0015, "on": true, "off": false, "no": null}),
            ),
            (
                r#"a=[1, 'x', [], (2, 3),], d={'k': {"z": [1.]}, 5: '', None: 1})"#,
                json!({"a": [1, "x", [], [2, 3]], "d": {"k": {"z": [1.0]}, "5": "", "null": 1}}),
            ),
            (
                "a=1_000, b=0x1F, c=.5, d=+2, e=true, f=null)",
                json!({"a": 1000, "b": 31, "c": 0.5, "d": 2, "e": true, "f": null}),
            ),
            ("a='', b='''q''')", json!({"a": "", "b": "q"})),
            ("größe=\"é\n🦀\")", json!({"größe": "é\n🦀"})),
        ];
        for (text, wanted) in rows {
            let (arguments, out, rest) = pass(text);
            assert!(arguments.is_done() && rest.is_empty(), "{text}: {out} {rest:?}");
            let value: Value =
                serde_json::from_str(&out).unwrap_or_else(|error| panic!("{text}: {out}: {error}"));
            assert_eq!(value, wanted, "{text}");
        }
    }

    #[test]
    fn what_is_no_literal_stops() {
        for (text, rest) in [
            ("1)", ")"),
            ("a)", ")"),
            ("a=f(1))", "(1))"),
            ("a=b)", ")"),
            ("a=01)", ")"),
            ("a=[1)", ")"),
            ("a=1 2)", "2)"),
            ("a={1, 2})", ", 2})"),
            ("a=f'x')", "'x')"),
            ("a=[,1])", ",1])"),
            ("a={'k'})", "})"),
        ] {
            let (arguments, out, left) = pass(text);
            assert_eq!(left, rest, "{text}");
            let whole = out + &arguments.completion();
            assert!(serde_json::from_str::<Map<String, Value>>(&whole).is_ok(), "{text}: {whole}");
        }
    }

    /// A value as Python prints it, with single quotes.
    pub(crate) fn python(value: &Value) -> String {
        match value {
            Value::Null => "None".into(),
            Value::Bool(true) => "True".into(),
            Value::Bool(false) => "False".into(),
            Value::Number(number) => number.to_string(),
            Value::String(text) => quoted(text),
            Value::Array(items) => format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", ")),
            Value::Object(entries) => {
                let entries =
                    entries.iter().map(|(key, value)| format!("{}: {}", quoted(key), python(value)));
                format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
            }
        }
    }

    fn quoted(text: &str) -> String {
        let text =
            text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n").replace('\u{1}', "\\x01");
        format!("'{text}'")
    }

    proptest! {
        #[test]
        fn whatever_python_prints_is_read(values in proptest::collection::vec(super::super::json_text::tests::any_value(), 0..4), cut in any::<proptest::sample::Index>()) {
            let wanted: Map<String, Value> =
                values.iter().enumerate().map(|(index, value)| (format!("a{index}"), value.clone())).collect();
            let arguments: Vec<String> = wanted.iter().map(|(name, value)| format!("{name}={}", python(value))).collect();
            let text = arguments.join(", ") + ")";
            let (arguments, out, _) = pass(&text);
            prop_assert!(arguments.is_done());
            prop_assert_eq!(serde_json::from_str::<Map<String, Value>>(&out).expect("an object"), wanted);
            let cut = text.floor_char_boundary(cut.index(text.len() + 1));
            let (arguments, out, _) = pass(&text[..cut]);
            let whole = out + &arguments.completion();
            prop_assert!(serde_json::from_str::<Map<String, Value>>(&whole).is_ok(), "{} of {}", whole, text);
        }

        #[test]
        fn values_of_json_are_read_too(object in any_object()) {
            let text = format!("a={})", serde_json::to_string(&object).expect("plain data"));
            let (_, out, _) = pass(&text);
            let value: Value = serde_json::from_str(&out).expect("an object");
            prop_assert_eq!(&value["a"], &Value::from(object));
        }
    }
}
