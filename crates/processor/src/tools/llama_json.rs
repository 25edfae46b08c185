//! `{"name": "weather", "parameters": {"city": "Oslo"}}`, with a tag in front or not; several calls are
//! separated by semicolons or lines.

use super::{
    call_object,
    cursor::{Cursor, Look},
    parser::{Opened, Rest, Syntax},
};

/// May stand in front of a call.
pub(super) const TAG: &str = "<|python_tag|>";

/// Llama 3.1 and later.
#[derive(Debug)]
pub(super) struct LlamaJson;

impl Syntax for LlamaJson {
    fn first_bytes(&self) -> &'static [u8] {
        b"{<"
    }

    fn separator(&self) -> Option<&'static str> {
        Some(";")
    }

    /// An object that only looks like a call until its arguments should come is content.
    fn open<'n>(&self, cursor: &mut Cursor<'_>, names: &'n [String]) -> Look<Opened<'n>> {
        if cursor.optional(TAG)? {
            cursor.blanks();
        }
        call_object::open(cursor, names, true)
    }

    fn rest(&self, cursor: &mut Cursor<'_>, _names: &[String]) -> Look<Rest> {
        call_object::rest_without_end(cursor)
    }
}
