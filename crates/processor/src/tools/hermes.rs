//! `<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>`

use super::{
    call_object,
    cursor::{Cursor, Look, Miss},
    parser::{Opened, Rest, Syntax},
};

/// In front of a call.
pub(super) const OPEN: &str = "<tool_call>";
/// Behind it.
pub(super) const CLOSE: &str = "</tool_call>";

/// Hermes, Qwen and many others.
#[derive(Debug)]
pub(super) struct Hermes;

impl Syntax for Hermes {
    fn first_bytes(&self) -> &'static [u8] {
        b"<"
    }

    fn separator(&self) -> Option<&'static str> {
        None
    }

    fn open<'n>(&self, cursor: &mut Cursor<'_>, names: &'n [String]) -> Look<Opened<'n>> {
        cursor.literal(OPEN)?;
        call_object::open(cursor.blanks(), names, false)
    }

    /// A tag without its bracket, or a bracket without its tag, still ends the call.
    fn rest(&self, cursor: &mut Cursor<'_>, _names: &[String]) -> Look<Rest> {
        call_object::rest_without_end(cursor)?;
        let mut end = cursor.clone();
        match end.blanks().literal(CLOSE) {
            Ok(()) => *cursor = end,
            Err(Miss::Wrong) => {}
            Err(Miss::Incomplete) => return Err(Miss::Incomplete),
        }
        Ok(Rest::Ended)
    }
}
