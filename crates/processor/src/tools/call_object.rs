//! A call as a JSON object: `{"name": "weather", "arguments": {"city": "Oslo"}}`.

use serde_json::{Map, Value};

use super::{
    cursor::{Cursor, Look, Miss},
    parser::{Opened, Opening, Rest},
};

/// Keys of the object. The arguments have two names; the last two mean nothing here.
const KEYS: [&str; 5] = ["\"name\"", "\"arguments\"", "\"parameters\"", "\"type\"", "\"id\""];

/// What is known of a call.
#[derive(Default)]
struct Known<'n> {
    name: Option<&'n str>,
    /// Arguments that came whole, in front of the name or as a string.
    arguments: Option<String>,
}

/// Looks at the object's beginning, up to its arguments. Only the names of tools make it a call.
pub(super) fn open<'n>(
    cursor: &mut Cursor<'_>,
    names: &'n [String],
    needs_arguments: bool,
) -> Look<Opened<'n>> {
    cursor.literal("{")?;
    let mut known = Known::default();
    loop {
        if let Some(opened) = entry(cursor, names, &mut known)? {
            return Ok(opened);
        }
        let is_last = match cursor.blanks().peek()? {
            ',' => false,
            '}' => true,
            _ => return Err(Miss::Wrong),
        };
        // The bracket is left for `rest`.
        match (known.name, &mut known.arguments) {
            (Some(name), arguments) if is_last && (arguments.is_some() || !needs_arguments) => {
                let whole = arguments.take().unwrap_or_else(|| "{}".into());
                return Ok(Opened { name, opening: Opening::Whole(whole) });
            }
            _ if is_last => return Err(Miss::Wrong),
            _ => cursor.literal(",")?,
        }
    }
}

/// One key and its value. `Some` once the arguments begin that can be handed on as they come.
fn entry<'n>(
    cursor: &mut Cursor<'_>,
    names: &'n [String],
    known: &mut Known<'n>,
) -> Look<Option<Opened<'n>>> {
    let key = cursor.blanks().one_of(KEYS)?;
    cursor.blanks().literal(":")?;
    cursor.blanks();
    match (key, known.name) {
        (0, None) => {
            let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
            let index = cursor.one_of(quoted.iter().map(String::as_str))?;
            known.name = names.get(index).map(String::as_str);
        }
        (1 | 2, name) if known.arguments.is_none() => match (cursor.peek()?, name) {
            ('{', Some(name)) => return Ok(Some(Opened { name, opening: Opening::Json })),
            _ => known.arguments = Some(whole_arguments(cursor.json_value()?)?),
        },
        (3 | 4, _) => drop(cursor.json_value()?),
        _ => return Err(Miss::Wrong),
    }
    Ok(None)
}

/// Arguments as an object, as text of one in a string, or none.
fn whole_arguments(value: &str) -> Look<String> {
    let is_object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).is_ok();
    if value == "null" {
        return Ok("{}".into());
    }
    let text = serde_json::from_str::<String>(value).unwrap_or_else(|_| value.to_owned());
    if is_object(&text) { Ok(text) } else { Err(Miss::Wrong) }
}

/// Looks at what comes behind the arguments, up to the object's end.
pub(super) fn close(cursor: &mut Cursor<'_>) -> Look<()> {
    while cursor.blanks().optional(",")? {
        cursor.blanks().json_value()?;
        cursor.blanks().literal(":")?;
        cursor.blanks().json_value()?;
    }
    cursor.literal("}")
}

/// The end of a call that may have text behind it: nothing of the object is missing that matters.
pub(super) fn rest_without_end(cursor: &mut Cursor<'_>) -> Look<Rest> {
    let mut end = cursor.clone();
    match close(&mut end) {
        Ok(()) => *cursor = end,
        Err(Miss::Wrong) => {}
        Err(Miss::Incomplete) => return Err(Miss::Incomplete),
    }
    Ok(Rest::Ended)
}
