//! Messages: checked one by one, handed on in the form that chat templates expect.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::images::ImageParts;
use crate::{
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
    generation::Bounds,
    visual::ImagePart,
};

const MAX_MESSAGES: usize = 2048;
const MAX_PARTS: usize = 2048;
/// Calls in one message.
const MAX_CALLS: usize = 128;
/// Longest id of a call, and longest name of a function that was called.
const MAX_ID_BYTES: usize = 512;

/// Messages as chat templates see them, and the images that they refer to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Conversation {
    /// Messages; their images are parts `{"type": "image", "index"}`.
    pub(crate) messages: Vec<Value>,
    /// By index.
    pub(crate) images: Vec<ImagePart>,
}

/// Reads 1 to 2048 messages.
///
/// # Errors
/// The first failing field, with its path.
pub(crate) fn read_messages(
    field: &Field<'_, '_>,
    bounds: &Bounds,
    ignored: &mut IgnoredFields,
) -> Result<Conversation, ApiError> {
    let mut calls = HashMap::new();
    let mut images = ImageParts::new(bounds);
    let messages = field.each(field.filled_array(MAX_MESSAGES)?, |message| {
        read_message(&message, &mut calls, &mut images, ignored)
    })?;
    Ok(Conversation { messages, images: images.finish()? })
}

/// `calls` are those of earlier messages, id to name.
fn read_message(
    message: &Field<'_, '_>,
    calls: &mut HashMap<String, String>,
    images: &mut ImageParts<'_>,
    ignored: &mut IgnoredFields,
) -> Result<Value, ApiError> {
    let mut role = None;
    let mut content = None;
    let mut refusal = None;
    let mut tool_calls = None;
    let images_before = images.len();
    // The role may stand behind what it decides about.
    let is_result = message.value().get("role").is_some_and(|role| role == "tool");
    let mut call_id = None;
    let mut rendered = Map::new();
    message.entries(|name, field| {
        match name {
            "role" => role = Some(read_role(&field)?),
            "content" => content = Some(read_content(&field, |part| read_part(part, images, ignored))?),
            "name" => {
                rendered.insert("name".into(), field.short_string(512)?.into());
            }
            "refusal" => refusal = Some(field.string()?),
            "reasoning" | "reasoning_content" => {
                rendered.insert("reasoning_content".into(), field.string()?.into());
            }
            "tool_calls" => tool_calls = Some((field.path(), read_calls(&field, ignored)?)),
            "tool_call_id" if is_result => {
                call_id = Some((field.path(), field.short_string(MAX_ID_BYTES)?));
            }
            "audio" => return Err(field.unsupported("there is no audio")),
            "function_call" => return Err(field.unsupported("it was replaced by `tool_calls`")),
            _ => ignored.push(&field),
        }
        Ok(())
    })?;
    let role = role.ok_or_else(|| message.missing("role"))?;
    images.check_role(images_before, message, role)?;
    if role == "tool" {
        let (path, id) = call_id.ok_or_else(|| message.missing("tool_call_id"))?;
        let name = calls.get(id).ok_or_else(|| {
            let message = format!("`{path}` is {:?}, which is no call of an earlier message.", clip(id));
            ApiError::field(ErrorKind::InvalidValue, path, message)
        })?;
        rendered.insert("tool_call_id".into(), id.into());
        rendered.entry("name").or_insert_with(|| name.as_str().into());
    }
    // A refused answer is what the assistant said.
    let content = content.or_else(|| refusal.filter(|_| role == "assistant").map(Value::from));
    let content = match (content, &tool_calls) {
        (Some(content), _) => content,
        (None, Some(_)) if role == "assistant" => Value::Null,
        _ => return Err(message.missing("content")),
    };
    if let Some((path, read)) = tool_calls {
        if role != "assistant" {
            let message = format!("`{path}` belongs to the assistant, but the role is `{role}`.");
            return Err(ApiError::field(ErrorKind::InvalidValue, path, message));
        }
        calls.extend(read.iter().filter_map(|call| {
            let name = call.pointer("/function/name")?.as_str()?;
            Some((call["id"].as_str()?.to_owned(), name.to_owned()))
        }));
        rendered.insert("tool_calls".into(), read.into());
    }
    if role != "assistant" {
        rendered.shift_remove("reasoning_content");
    }
    let mut value = json!({"role": role, "content": content});
    if let Value::Object(object) = &mut value {
        object.extend(rendered);
    }
    Ok(value)
}

/// Calls that the assistant made, as the template sees them.
fn read_calls(field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<Vec<Value>, ApiError> {
    field.each(field.filled_array(MAX_CALLS)?, |call| {
        let (mut id, mut has_type, mut function) = (None, false, None);
        call.entries(|name, inner| {
            match name {
                "id" => id = Some(inner.short_string(MAX_ID_BYTES)?),
                "type" => {
                    has_type = true;
                    if inner.string()? != "function" {
                        let reason = "is not offered; only `function` is";
                        return Err(inner.error(ErrorKind::UnsupportedValue, reason));
                    }
                }
                "function" => function = Some(read_called(&inner, ignored)?),
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        let id = id.ok_or_else(|| call.missing("id"))?;
        if !has_type {
            return Err(call.missing("type"));
        }
        let function = function.ok_or_else(|| call.missing("function"))?;
        Ok(json!({"id": id, "type": "function", "function": function}))
    })
}

/// `{"name", "arguments"}`
fn read_called(field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<Value, ApiError> {
    let (mut called, mut arguments) = (None, None);
    field.entries(|name, inner| {
        match name {
            "name" => called = Some(inner.short_string(MAX_ID_BYTES)?),
            "arguments" => arguments = Some(inner.string()?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    let name = called.ok_or_else(|| field.missing("name"))?;
    let arguments = arguments.ok_or_else(|| field.missing("arguments"))?;
    Ok(json!({"name": name, "arguments": arguments}))
}

fn read_role(field: &Field<'_, '_>) -> Result<&'static str, ApiError> {
    match field.one_of(&["system", "developer", "user", "assistant", "tool", "function"])? {
        "function" => {
            Err(field.error(ErrorKind::UnsupportedValue, "is `function`, which `tool` has replaced"))
        }
        role => Ok(role),
    }
}

/// A string, or an array of what `read_part` makes of each part.
pub(crate) fn read_content(
    field: &Field<'_, '_>,
    mut read_part: impl FnMut(&Field<'_, '_>) -> Result<Value, ApiError>,
) -> Result<Value, ApiError> {
    match field.value() {
        Value::String(text) => Ok(text.as_str().into()),
        Value::Array(_) => {
            let parts = field.filled_array(MAX_PARTS)?;
            Ok(Value::Array(field.each(parts, |part| read_part(&part))?))
        }
        // The error names both types.
        _ => Err(field.error(ErrorKind::InvalidType, "must be a string or an array of parts")),
    }
}

fn read_part(
    part: &Field<'_, '_>,
    images: &mut ImageParts<'_>,
    ignored: &mut IgnoredFields,
) -> Result<Value, ApiError> {
    // The type may stand behind what it decides about.
    let is_image = part.value().get("type").is_some_and(|kind| kind == "image_url");
    let mut image = None;
    let mut is_text = false;
    let mut text = None;
    let mut foreign = None;
    part.entries(|name, field| {
        match name {
            "type" => match field.string()? {
                "text" => is_text = true,
                "image_url" => images.met(&field),
                _ => {
                    let reason = "is not offered; only `text` and `image_url` are";
                    return Err(field.error(ErrorKind::UnsupportedValue, reason));
                }
            },
            "text" => text = Some(field.string()?),
            "image_url" if is_image => image = Some(images.read(&field, ignored)?),
            // A part of that type is refused by its type, which may stand behind it.
            "image_url" | "input_audio" | "file" => {
                foreign.get_or_insert_with(|| {
                    field.error(ErrorKind::UnsupportedValue, "does not belong into a part of the type `text`")
                });
            }
            _ => ignored.push(&field),
        }
        Ok(())
    })?;
    if is_image {
        return image.ok_or_else(|| part.missing("image_url"));
    }
    if !is_text {
        return Err(part.missing("type"));
    }
    if let Some(error) = foreign {
        return Err(error);
    }
    let text = text.ok_or_else(|| part.missing("text"))?;
    Ok(json!({"type": "text", "text": text}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::test_bounds;

    fn read(messages: Value) -> Result<Vec<Value>, ApiError> {
        read_with(messages, &test_bounds()).map(|read| read.messages)
    }

    fn read_with(messages: Value, bounds: &Bounds) -> Result<Conversation, ApiError> {
        let body = json!({ "messages": messages });
        let mut read = Conversation::default();
        Field::root(&body).entries(|_, field| {
            read = read_messages(&field, bounds, &mut IgnoredFields::default())?;
            Ok(())
        })?;
        Ok(read)
    }

    #[test]
    fn good_messages() {
        let messages = read(json!([
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]},
            {"content": "Hi", "role": "user", "name": "Ann"},
            {"role": "assistant", "content": null, "refusal": "No."},
            {"role": "assistant", "content": "Yes", "reasoning": "hm"},
            {"role": "user", "content": ""}
        ]))
        .expect("all valid");
        assert_eq!(messages[0]["content"][1]["text"], "b");
        assert_eq!(messages[1], json!({"role": "user", "content": "Hi", "name": "Ann"}));
        assert_eq!(messages[2]["content"], "No.");
        assert_eq!(messages[3]["reasoning_content"], "hm");
    }

    /// Calls and their results: the template gets the arguments as they came.
    #[test]
    fn calls_and_results() {
        let call = json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}, "index": 0});
        let messages = read(json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "5"}]},
            {"role": "assistant", "content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "5", "name": "own"}
        ]))
        .expect("all valid");
        assert_eq!(messages[1]["content"], Value::Null);
        assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"], "{\"x\": 1}");
        assert_eq!((&messages[2]["name"], &messages[2]["tool_call_id"]), (&json!("f"), &json!("a")));
        assert_eq!((&messages[3]["content"], &messages[4]["name"]), (&json!("Hm."), &json!("own")));
    }

    #[test]
    fn bad_messages() {
        use ErrorKind::*;
        let text = json!({"role": "user", "content": "x"});
        let rows = [
            (json!("Hi"), InvalidType, "messages"),
            (json!([]), EmptyArray, "messages"),
            (json!(vec![text.clone(); 2049]), ArrayAboveMaxLength, "messages"),
            (json!(["Hi"]), InvalidType, "messages[0]"),
            (json!([{"content": "x"}]), MissingRequiredParameter, "messages[0].role"),
            (json!([{"role": "user"}]), MissingRequiredParameter, "messages[0].content"),
            (
                json!([{"role": "assistant", "content": null}]),
                MissingRequiredParameter,
                "messages[0].content",
            ),
            (json!([text, {"role": "pope", "content": "x"}]), InvalidValue, "messages[1].role"),
            (json!([{"role": "function", "content": "x"}]), UnsupportedValue, "messages[0].role"),
            (json!([{"role": "tool", "content": "x"}]), MissingRequiredParameter, "messages[0].tool_call_id"),
            (
                json!([{"role": "tool", "content": "x", "tool_call_id": "a"}]),
                InvalidValue,
                "messages[0].tool_call_id",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "a"}]}]),
                MissingRequiredParameter,
                "messages[0].tool_calls[0].type",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}]),
                MissingRequiredParameter,
                "messages[0].tool_calls[0].function.arguments",
            ),
            (
                json!([{"role": "user", "content": "x", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]}]),
                InvalidValue,
                "messages[0].tool_calls",
            ),
            (json!([{"role": "user", "content": 3}]), InvalidType, "messages[0].content"),
            (json!([{"role": "user", "content": []}]), EmptyArray, "messages[0].content"),
            (json!([{"role": "user", "content": ["x"]}]), InvalidType, "messages[0].content[0]"),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                MissingRequiredParameter,
                "messages[0].content[0].text",
            ),
            (
                json!([{"role": "user", "content": [{"text": "x"}]}]),
                MissingRequiredParameter,
                "messages[0].content[0].type",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": 1}]}]),
                InvalidType,
                "messages[0].content[1].text",
            ),
            (
                json!([{"role": "user", "content": [{"image_url": {"url": "x"}, "type": "image_url"}]}]),
                InvalidImageUrl,
                "messages[0].content[0].image_url.url",
            ),
            (
                json!([{"role": "user", "content": [{"image_url": {}, "type": "text", "text": "x"}]}]),
                UnsupportedValue,
                "messages[0].content[0].image_url",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "x", "file": {}}]}]),
                UnsupportedValue,
                "messages[0].content[0].file",
            ),
            (
                json!([{"role": "user", "content": [{"type": "input_audio"}]}]),
                UnsupportedValue,
                "messages[0].content[0].type",
            ),
            (
                json!([{"role": "assistant", "content": "x", "tool_calls": []}]),
                EmptyArray,
                "messages[0].tool_calls",
            ),
        ];
        for (messages, kind, param) in rows {
            let error = read(messages).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)));
        }
    }

    /// References are checked before the model's lack of eyes is told, and that after all else.
    #[test]
    fn images_are_checked_and_then_refused() {
        use ErrorKind::*;
        // The head of a PNG file of 3 by 2 pixels.
        let png = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAAAAAAA";
        let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url, "detail": "low"}});
        let user = |parts: Vec<Value>| json!([{"role": "user", "content": parts}]);
        let part = |fields: Value| user(vec![json!({"type": "image_url", "image_url": fields})]);
        let rows = [
            (user(vec![json!({"type": "text", "text": "x"}), image(png)]), UnsupportedValue, "[1].type"),
            (user(vec![image(png), json!({"type": "text"})]), MissingRequiredParameter, "[1].text"),
            (user(vec![image(png), image("https://a.example/")]), InvalidImageUrl, "[1].image_url.url"),
            (user(vec![image("data:image/png;base64,#")]), InvalidBase64, "[0].image_url.url"),
            (
                user(vec![image("data:image/tiff;base64,AA==")]),
                UnsupportedImageMediaType,
                "[0].image_url.url",
            ),
            (user(vec![image("data:image/png;base64,AAAA")]), ImageParseError, "[0].image_url.url"),
            (user(vec![image(png); 17]), ArrayAboveMaxLength, "[16].image_url"),
            (part(json!({"url": png, "detail": "best"})), InvalidValue, "[0].image_url.detail"),
            (part(json!({"detail": "low"})), MissingRequiredParameter, "[0].image_url.url"),
            (part(json!(png)), InvalidType, "[0].image_url"),
            (user(vec![json!({"type": "image_url"})]), MissingRequiredParameter, "[0].image_url"),
        ];
        for (messages, kind, place) in rows {
            let error = read(messages).expect_err("must fail");
            let param = format!("messages[0].content{place}");
            assert_eq!(
                (error.kind, error.param.as_deref()),
                (kind, Some(param.as_str())),
                "{}",
                error.message
            );
        }
    }
}
