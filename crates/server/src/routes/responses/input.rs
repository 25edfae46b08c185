//! `input`: items, checked one by one and joined to the messages that chat templates expect.
//!
//! Thoughts, text and calls of one answer are items of their own here and one message there.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::{
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
    generation::Bounds,
    routes::chat::{self, ImageParts, read_content},
};

const MAX_ITEMS: usize = 2048;
const MAX_PARTS: usize = 2048;
const MAX_ID: usize = 512;

/// Reads a string, or 1 to 2048 items.
///
/// # Errors
/// The first failing field, with its path.
pub(super) fn read_input(
    field: &Field<'_, '_>,
    bounds: &Bounds,
    ignored: &mut IgnoredFields,
) -> Result<chat::Conversation, ApiError> {
    match field.value() {
        Value::String(text) => {
            let messages = vec![json!({"role": "user", "content": text})];
            Ok(chat::Conversation { messages, images: Vec::new() })
        }
        Value::Array(_) => {
            let mut conversation = Conversation::new(bounds);
            field.each(field.filled_array(MAX_ITEMS)?, |item| conversation.item(&item, ignored))?;
            conversation.finish()
        }
        // The error names both types.
        _ => Err(field.error(ErrorKind::InvalidType, "must be a string or an array of items")),
    }
}

/// The items so far.
struct Conversation<'b> {
    images: ImageParts<'b>,
    messages: Vec<Value>,
    /// The assistant's message that the next item may still belong to.
    answer: Answer,
    /// The calls so far, id to name.
    calls: HashMap<String, String>,
}

/// An assistant's message, put together from items.
#[derive(Default)]
struct Answer {
    reasoning: Option<String>,
    content: Option<Value>,
    tool_calls: Vec<Value>,
}

impl Answer {
    /// Whether it has more than thoughts.
    fn is_said(&self) -> bool {
        self.content.is_some() || !self.tool_calls.is_empty()
    }

    /// The message as chat templates see it, if there is one.
    fn into_message(self) -> Option<Value> {
        if self.reasoning.is_none() && !self.is_said() {
            return None;
        }
        let mut message = Map::new();
        message.insert("role".into(), "assistant".into());
        let without = if self.tool_calls.is_empty() { "".into() } else { Value::Null };
        message.insert("content".into(), self.content.unwrap_or(without));
        if let Some(reasoning) = self.reasoning {
            message.insert("reasoning_content".into(), reasoning.into());
        }
        if !self.tool_calls.is_empty() {
            message.insert("tool_calls".into(), self.tool_calls.into());
        }
        Some(message.into())
    }
}

impl<'b> Conversation<'b> {
    fn new(bounds: &'b Bounds) -> Self {
        let images = ImageParts::new(bounds);
        Self { images, messages: Vec::new(), answer: Answer::default(), calls: HashMap::new() }
    }

    /// All messages, and their images if the model sees.
    fn finish(mut self) -> Result<chat::Conversation, ApiError> {
        self.close_answer();
        Ok(chat::Conversation { messages: self.messages, images: self.images.finish()? })
    }

    fn close_answer(&mut self) {
        self.messages.extend(std::mem::take(&mut self.answer).into_message());
    }

    /// Adds an item. What its fields mean depends on its type, which is read first.
    fn item(&mut self, item: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let mut kind = "message";
        item.entries(|name, field| {
            if name == "type" {
                kind = read_kind(&field)?;
            }
            Ok(())
        })?;
        match kind {
            "function_call" => self.call(item, ignored),
            "function_call_output" => self.call_output(item, ignored),
            "reasoning" => self.reasoning(item, ignored),
            _ => self.message(item, ignored),
        }
    }

    fn message(&mut self, item: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let (mut role, mut content) = (None, None);
        let images_before = self.images.len();
        item.entries(|name, field| {
            match name {
                "role" => role = Some(field.one_of(&["user", "assistant", "system", "developer"])?),
                "content" => {
                    content = Some(read_content(&field, |part| read_part(part, &mut self.images, ignored))?);
                }
                "phase" => drop(field.one_of(&["commentary", "final_answer"])?),
                _ => read_rest(name, &field, ignored)?,
            }
            Ok(())
        })?;
        let role = role.ok_or_else(|| item.missing("role"))?;
        let content = content.ok_or_else(|| item.missing("content"))?;
        self.images.check_role(images_before, item, role)?;
        if role != "assistant" {
            self.close_answer();
            self.messages.push(json!({"role": role, "content": content}));
            return Ok(());
        }
        if self.answer.is_said() {
            self.close_answer();
        }
        self.answer.content = Some(content);
        Ok(())
    }

    fn call(&mut self, item: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let (mut call_id, mut function, mut arguments) = (None, None, None);
        item.entries(|name, field| {
            match name {
                "call_id" => call_id = Some(field.short_string(MAX_ID)?),
                "name" => function = Some(field.short_string(MAX_ID)?),
                // As it was said, cut off or not.
                "arguments" => arguments = Some(field.string()?),
                _ => read_rest(name, &field, ignored)?,
            }
            Ok(())
        })?;
        let call_id = call_id.ok_or_else(|| item.missing("call_id"))?;
        let function = function.ok_or_else(|| item.missing("name"))?;
        let arguments = arguments.ok_or_else(|| item.missing("arguments"))?;
        self.calls.insert(call_id.to_owned(), function.to_owned());
        self.answer.tool_calls.push(json!({
            "id": call_id, "type": "function", "function": {"name": function, "arguments": arguments},
        }));
        Ok(())
    }

    fn call_output(&mut self, item: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let (mut call, mut output) = (None, None);
        let images_before = self.images.len();
        let (calls, images) = (&self.calls, &mut self.images);
        item.entries(|name, field| {
            match name {
                "call_id" => {
                    let id = field.short_string(MAX_ID)?;
                    let name = calls.get(id).ok_or_else(|| {
                        let reason = "must be the `call_id` of an earlier item of the type `function_call`";
                        field.error(ErrorKind::InvalidValue, reason)
                    })?;
                    call = Some((id, name));
                }
                "output" => output = Some(read_content(&field, |part| read_part(part, images, ignored))?),
                _ => read_rest(name, &field, ignored)?,
            }
            Ok(())
        })?;
        let (call_id, function) = call.ok_or_else(|| item.missing("call_id"))?;
        let output = output.ok_or_else(|| item.missing("output"))?;
        if self.images.len() > images_before {
            let path = format!("{}.output", item.path());
            let text = format!("`{path}` has an image; images are the user's.");
            return Err(ApiError::field(ErrorKind::UnsupportedValue, path, text));
        }
        let result = json!({"role": "tool", "content": output, "tool_call_id": call_id, "name": function});
        self.close_answer();
        self.messages.push(result);
        Ok(())
    }

    /// Thoughts belong to what the assistant says next. Summaries are not thoughts, and what is
    /// encrypted cannot be read.
    fn reasoning(&mut self, item: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let mut thoughts = String::new();
        item.entries(|name, field| {
            match name {
                "content" => {
                    let parts = field.each(field.array(MAX_PARTS)?, |part| read_thought(&part, ignored))?;
                    thoughts = parts.concat();
                }
                "summary" => drop(field.array(MAX_PARTS)?),
                "encrypted_content" => drop(field.string()?),
                _ => read_rest(name, &field, ignored)?,
            }
            Ok(())
        })?;
        if self.answer.is_said() {
            self.close_answer();
        }
        if !thoughts.is_empty() {
            self.answer.reasoning.get_or_insert_default().push_str(&thoughts);
        }
        Ok(())
    }
}

fn read_kind(field: &Field<'_, '_>) -> Result<&'static str, ApiError> {
    const KINDS: [&str; 4] = ["message", "function_call", "function_call_output", "reasoning"];
    let text = field.string()?;
    if text == "item_reference" {
        let reason = "is `item_reference`, but nothing is stored; send the item itself";
        return Err(field.error(ErrorKind::UnsupportedValue, reason));
    }
    KINDS.into_iter().find(|kind| *kind == text).ok_or_else(|| {
        let reason = format!("is {:?}, which is not offered; items are {}", clip(text), KINDS.join(", "));
        field.error(ErrorKind::UnsupportedValue, reason)
    })
}

/// What every item of an answer carries and nobody needs.
fn read_rest(name: &str, field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
    match name {
        "type" => {}
        "id" => drop(field.bounded_string(MAX_ID)?),
        "status" => drop(field.one_of(&["in_progress", "completed", "incomplete"])?),
        _ => ignored.push(field),
    }
    Ok(())
}

/// A part of text, or an image. A refusal is what the assistant said.
fn read_part(
    part: &Field<'_, '_>,
    images: &mut ImageParts<'_>,
    ignored: &mut IgnoredFields,
) -> Result<Value, ApiError> {
    let mut text_key = None;
    part.entries(|name, field| {
        if name == "type" {
            text_key = Some(match field.string()? {
                "input_text" | "output_text" => "text",
                "refusal" => "refusal",
                "input_image" => {
                    images.met(&field);
                    "image_url"
                }
                _ => {
                    let reason = "is not offered; parts are input_text, input_image, output_text, refusal";
                    return Err(field.error(ErrorKind::UnsupportedValue, reason));
                }
            });
        }
        Ok(())
    })?;
    let text_key = text_key.ok_or_else(|| part.missing("type"))?;
    if text_key == "image_url" {
        return images.read_flat(part, ignored);
    }
    let mut text = None;
    part.entries(|name, field| {
        match name {
            "type" => {}
            _ if name == text_key => text = Some(field.string()?),
            "image_url" | "file_id" | "file_url" | "file_data" => {
                return Err(field.error(ErrorKind::UnsupportedValue, "does not belong into a part of text"));
            }
            "annotations" | "logprobs" => drop(field.array(usize::MAX)?),
            _ => ignored.push(&field),
        }
        Ok(())
    })?;
    let text = text.ok_or_else(|| part.missing(text_key))?;
    Ok(json!({"type": "text", "text": text}))
}

/// `{"type": "reasoning_text", "text"}`
fn read_thought(part: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<String, ApiError> {
    let (mut is_text, mut text) = (false, None);
    part.entries(|name, field| {
        match name {
            "type" => is_text = field.one_of(&["reasoning_text"]).map(|_| true)?,
            "text" => text = Some(field.string()?),
            _ => ignored.push(&field),
        }
        Ok(())
    })?;
    if !is_text {
        return Err(part.missing("type"));
    }
    text.map(str::to_owned).ok_or_else(|| part.missing("text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::test_bounds;

    /// One transparent pixel.
    const PIXEL: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";

    fn read(input: Value) -> Result<Vec<Value>, ApiError> {
        let body = json!({ "input": input });
        let mut messages = Vec::new();
        Field::root(&body).entries(|_, field| {
            messages = read_input(&field, &test_bounds(), &mut IgnoredFields::default())?.messages;
            Ok(())
        })?;
        Ok(messages)
    }

    #[test]
    fn a_string_is_the_users() {
        assert_eq!(read(json!("Hi")).expect("valid"), [json!({"role": "user", "content": "Hi"})]);
    }

    /// Thoughts, text and calls of an answer become one message; another answer is another one.
    #[test]
    fn items_become_messages() {
        let messages = read(json!([
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "status": "completed",
             "content": [{"type": "reasoning_text", "text": "Let me"}, {"type": "reasoning_text", "text": " see."}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
                {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather",
             "arguments": "{\"city\":\"Paris\"}", "status": "completed"},
            {"type": "function_call", "call_id": "call_2", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_2", "output": "noon"},
            {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "sun"}]},
            {"role": "assistant", "content": "Sunny."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "x"}
        ]))
        .expect("all valid");
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let wanted = [
            json!({"role": "developer", "content": "Be brief."}),
            json!({"role": "user", "content": [{"type": "text", "text": "Weather?"}]}),
            json!({"role": "assistant", "content": [{"type": "text", "text": "I look."}],
                "reasoning_content": "Let me see.",
                "tool_calls": [call("call_1", "weather", "{\"city\":\"Paris\"}"), call("call_2", "time", "{}")]}),
            json!({"role": "tool", "tool_call_id": "call_2", "name": "time", "content": "noon"}),
            json!({"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": [{"type": "text", "text": "sun"}]}),
            json!({"role": "assistant", "content": "Sunny."}),
            json!({"role": "assistant", "content": [{"type": "text", "text": "No more."}]}),
        ];
        assert_eq!(messages, wanted);
    }

    #[test]
    fn bad_items_are_named() {
        use ErrorKind::*;
        let text = json!({"role": "user", "content": "x"});
        let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
        let part = |part: Value| json!([text, {"role": "user", "content": [{"type": "input_text", "text": "a"}, part]}]);
        let rows = [
            (json!(3), InvalidType, "input"),
            (json!([]), EmptyArray, "input"),
            (json!(vec![text.clone(); 2049]), ArrayAboveMaxLength, "input"),
            (json!(["Hi"]), InvalidType, "input[0]"),
            (json!([{"content": "x"}]), MissingRequiredParameter, "input[0].role"),
            (json!([{"role": "user"}]), MissingRequiredParameter, "input[0].content"),
            (json!([text, {"role": "tool", "content": "x"}]), InvalidValue, "input[1].role"),
            (json!([{"type": "message", "role": "user", "content": 3}]), InvalidType, "input[0].content"),
            (json!([{"role": "user", "content": []}]), EmptyArray, "input[0].content"),
            (json!([{"type": "item_reference", "id": "msg_1"}]), UnsupportedValue, "input[0].type"),
            (json!([{"type": "web_search_call"}]), UnsupportedValue, "input[0].type"),
            (json!([{"type": 1}]), InvalidType, "input[0].type"),
            (json!([{"role": "user", "content": "x", "status": "done"}]), InvalidValue, "input[0].status"),
            (part(json!({"text": "b"})), MissingRequiredParameter, "input[1].content[1].type"),
            (part(json!({"type": "input_text"})), MissingRequiredParameter, "input[1].content[1].text"),
            (part(json!({"type": "input_text", "text": 1})), InvalidType, "input[1].content[1].text"),
            (part(json!({"type": "input_image"})), MissingRequiredParameter, "input[1].content[1].image_url"),
            (
                part(json!({"type": "input_image", "file_id": "f"})),
                UnsupportedParameter,
                "input[1].content[1].file_id",
            ),
            (
                part(json!({"type": "input_image", "image_url": "iVBORw0KGgo="})),
                InvalidImageUrl,
                "input[1].content[1].image_url",
            ),
            (
                part(json!({"type": "input_image", "image_url": PIXEL, "detail": "low"})),
                UnsupportedValue,
                "input[1].content[1].type",
            ),
            (
                part(json!({"type": "input_file", "file_id": "x"})),
                UnsupportedValue,
                "input[1].content[1].type",
            ),
            (
                part(json!({"type": "input_text", "text": "", "image_url": "x"})),
                UnsupportedValue,
                "input[1].content[1].image_url",
            ),
            (
                json!([{"type": "function_call", "name": "f", "arguments": "{}"}]),
                MissingRequiredParameter,
                "input[0].call_id",
            ),
            (json!([{"type": "function_call", "call_id": "c", "name": ""}]), EmptyString, "input[0].name"),
            (
                json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]),
                InvalidType,
                "input[0].arguments",
            ),
            (
                json!([call, {"type": "function_call_output", "call_id": "d", "output": ""}]),
                InvalidValue,
                "input[1].call_id",
            ),
            (
                json!([call, {"type": "function_call_output", "call_id": "c"}]),
                MissingRequiredParameter,
                "input[1].output",
            ),
            (
                json!([call, {"type": "function_call_output", "call_id": "c", "output": {}}]),
                InvalidType,
                "input[1].output",
            ),
            (
                json!([{"type": "reasoning", "content": [{"type": "text"}]}]),
                InvalidValue,
                "input[0].content[0].type",
            ),
            (
                json!([{"type": "reasoning", "content": [{"type": "reasoning_text"}]}]),
                MissingRequiredParameter,
                "input[0].content[0].text",
            ),
        ];
        for (input, kind, param) in rows {
            let error = read(input.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{input}");
        }
    }
}
