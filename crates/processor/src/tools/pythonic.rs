//! `[weather(city="Oslo"), time()]`

use super::{
    cursor::{Cursor, Look, Miss},
    parser::{Opened, Opening, Rest, Syntax},
};

/// May stand in front of the list: a control token of Llama 4.
pub(super) const START: &str = "<|python_start|>";
/// May stand behind it.
pub(super) const END: &str = "<|python_end|>";

/// Llama 3.2 and 4, and others.
#[derive(Debug)]
pub(super) struct Pythonic;

impl Syntax for Pythonic {
    fn first_bytes(&self) -> &'static [u8] {
        b"[<"
    }

    fn separator(&self) -> Option<&'static str> {
        None
    }

    /// Arguments have names; a call with others is content.
    fn open<'n>(&self, cursor: &mut Cursor<'_>, names: &'n [String]) -> Look<Opened<'n>> {
        if cursor.optional(START)? {
            cursor.blanks();
        }
        cursor.literal("[")?;
        head(cursor.blanks(), names)
    }

    fn rest(&self, cursor: &mut Cursor<'_>, names: &[String]) -> Look<Rest> {
        let start = cursor.clone();
        let is_followed = cursor.blanks().optional(",")?;
        if is_followed && !matches!(cursor.blanks().peek()?, ']') {
            return match head(cursor, names) {
                Ok(Opened { name, .. }) => Ok(Rest::Next(name.to_owned())),
                Err(Miss::Incomplete) => Err(Miss::Incomplete),
                Err(Miss::Wrong) => {
                    *cursor = start;
                    Ok(Rest::Ended)
                }
            };
        }
        match cursor.literal("]") {
            Ok(()) => {}
            Err(Miss::Incomplete) => return Err(Miss::Incomplete),
            Err(Miss::Wrong) => {
                *cursor = start;
                return Ok(Rest::Ended);
            }
        }
        let mut end = cursor.clone();
        match end.blanks().literal(END) {
            Ok(()) => *cursor = end,
            Err(Miss::Wrong) => {}
            Err(Miss::Incomplete) => return Err(Miss::Incomplete),
        }
        Ok(Rest::Ended)
    }
}

/// A name, the bracket behind it, and a look at what the arguments begin with.
fn head<'n>(cursor: &mut Cursor<'_>, names: &'n [String]) -> Look<Opened<'n>> {
    let opened: Vec<String> = names.iter().map(|name| format!("{name}(")).collect();
    let index = cursor.one_of(opened.iter().map(String::as_str))?;
    let name = names.get(index).ok_or(Miss::Wrong)?;
    let mut ahead = cursor.clone();
    if ahead.blanks().peek()? != ')' {
        let rest = ahead.rest();
        let length = rest.find(|next: char| !is_name(next)).ok_or(Miss::Incomplete)?;
        let behind = rest[length..].trim_ascii_start();
        match behind.chars().next() {
            Some('=') if behind.len() == 1 => return Err(Miss::Incomplete),
            Some('=') if length > 0 && !behind.starts_with("==") => {}
            None if length > 0 => return Err(Miss::Incomplete),
            _ => return Err(Miss::Wrong),
        }
    }
    Ok(Opened { name, opening: Opening::Python })
}

/// Whether a character may be part of an argument's name.
pub(super) fn is_name(next: char) -> bool {
    !next.is_whitespace() && !matches!(next, '=' | ',' | '(' | ')' | '[' | ']' | '{' | '}' | '"' | '\'')
}
