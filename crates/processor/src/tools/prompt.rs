//! Tools and calls in the messages of a prompt: as the template wants them, or, for a template that
//! knows no tools, written out as text.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{ToolFormat, hermes};
use crate::ChatPrompt;

/// Makes the arguments of calls objects, where they are the text of one: most templates print them as
/// JSON, and would print a text as a string.
pub(crate) fn arguments_as_objects(message: &mut Map<String, Value>) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for arguments in calls.into_iter().flatten().filter_map(|call| call.pointer_mut("/function/arguments")) {
        if let Some(object) =
            arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok())
        {
            *arguments = object.into();
        }
    }
}

/// Writes tools into the system message, calls into the assistant's text, and results into messages
/// of the user.
pub(crate) fn write_out(chat: &mut ChatPrompt, format: ToolFormat) {
    let names = call_names(&chat.messages);
    let mut messages: Vec<Value> = Vec::with_capacity(chat.messages.len() + 1);
    let mut is_after_result = false;
    for mut message in std::mem::take(&mut chat.messages) {
        let is_result = message["role"] == "tool";
        if is_result {
            let text = result_text(&message, &names);
            match messages.last_mut().filter(|_| is_after_result) {
                Some(last) => append(last, &format!("\n{text}")),
                None => messages.push(json!({"role": "user", "content": text})),
            }
        } else {
            if let Some(calls) = message.as_object_mut().and_then(|fields| fields.shift_remove("tool_calls"))
            {
                let calls: Vec<&Value> = calls.as_array().into_iter().flatten().collect();
                append(&mut message, &calls_text(format, &calls));
            }
            messages.push(message);
        }
        is_after_result = is_result;
    }
    if let Some(tools) = chat.tools.take().filter(|tools| !tools.is_empty()) {
        let text = instructions(format, &tools);
        match messages.first_mut().filter(|first| first["role"] == "system" || first["role"] == "developer") {
            Some(first) => append(first, &format!("\n\n{text}")),
            None => messages.insert(0, json!({"role": "system", "content": text})),
        }
    }
    chat.messages = messages;
}

/// Names of called functions by the call's id.
fn call_names(messages: &[Value]) -> HashMap<String, String> {
    let calls = messages.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
    let pairs =
        calls.filter_map(|call| Some((call["id"].as_str()?, call.pointer("/function/name")?.as_str()?)));
    pairs.map(|(id, name)| (id.to_owned(), name.to_owned())).collect()
}

/// Appends to a message's content.
fn append(message: &mut Value, text: &str) {
    let Value::Object(fields) = message else { return };
    match fields.get_mut("content") {
        Some(Value::String(content)) => content.push_str(text),
        Some(Value::Array(parts)) => parts.push(json!({"type": "text", "text": text})),
        _ => {
            fields.insert("content".into(), text.into());
        }
    }
}

/// Calls exactly as the grammar of required calls writes them: an answer that comes back is the text
/// that it was.
fn calls_text(format: ToolFormat, calls: &[&Value]) -> String {
    let texts = calls.iter().filter_map(|call| {
        let function = call.get("function")?;
        let name = function.get("name")?.as_str()?;
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) => text.clone(),
            Some(value @ Value::Object(_)) => value.to_string(),
            _ => "{}".into(),
        };
        Some(match format {
            ToolFormat::Hermes => {
                format!(
                    "{}\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n{}",
                    hermes::OPEN,
                    hermes::CLOSE
                )
            }
            ToolFormat::LlamaJson => format!("{{\"name\": \"{name}\", \"parameters\": {arguments}}}"),
            ToolFormat::Pythonic => format!("{name}({})", python_arguments(&arguments)),
        })
    });
    let texts: Vec<String> = texts.collect();
    match format {
        ToolFormat::Hermes => texts.join("\n"),
        ToolFormat::LlamaJson => texts.join("; "),
        ToolFormat::Pythonic => format!("[{}]", texts.join(", ")),
    }
}

/// `city="Oslo", days=[1, 2]`
fn python_arguments(arguments: &str) -> String {
    let object: Map<String, Value> = serde_json::from_str(arguments).unwrap_or_default();
    object.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
}

fn result_text(message: &Value, names: &HashMap<String, String>) -> String {
    let content = match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    };
    let id = message["tool_call_id"].as_str().unwrap_or_default();
    match names.get(id) {
        Some(name) => format!("<tool_response name=\"{name}\">\n{content}\n</tool_response>"),
        None => format!("<tool_response>\n{content}\n</tool_response>"),
    }
}

/// What the model is told.
fn instructions(format: ToolFormat, tools: &[Value]) -> String {
    let tools: Vec<String> = tools.iter().map(Value::to_string).collect();
    let how = match format {
        ToolFormat::Hermes => {
            "To call one, write a JSON object with its name and its arguments between these tags:\n\
             <tool_call>\n{\"name\": \"NAME\", \"arguments\": {\"ARGUMENT\": \"VALUE\"}}\n</tool_call>"
        }
        ToolFormat::LlamaJson => {
            "To call one, write nothing but a JSON object with its name and its parameters:\n\
             {\"name\": \"NAME\", \"parameters\": {\"PARAMETER\": \"VALUE\"}}"
        }
        ToolFormat::Pythonic => {
            "To call one or several, write nothing but a list of calls:\n[NAME(ARGUMENT=\"VALUE\")]"
        }
    };
    format!(
        "You may call functions to answer the user. These are their definitions:\n<tools>\n{}\n</tools>\n\n{how}\n\n\
         The result comes back between <tool_response> tags.",
        tools.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(messages: Value) -> ChatPrompt {
        let Value::Array(messages) = messages else { panic!("a list") };
        let tool = json!({"type": "function", "function": {"name": "weather"}});
        ChatPrompt { messages, tools: Some(vec![tool]), ..ChatPrompt::default() }
    }

    fn call(id: &str, arguments: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}})
    }

    #[test]
    fn everything_becomes_text() {
        let mut chat = chat(json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [call("a", "{\"c\": 1}"), call("b", "{}")]},
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "rain"}]},
            {"role": "assistant", "content": "Mixed."}
        ]));
        write_out(&mut chat, ToolFormat::Hermes);
        assert!(chat.tools.is_none());
        let contents: Vec<&str> =
            chat.messages.iter().map(|message| message["content"].as_str().expect("text")).collect();
        assert!(contents[0].starts_with("Be brief.\n\nYou may call"), "{}", contents[0]);
        assert!(contents[0].contains(r#"{"type":"function","function":{"name":"weather"}}"#));
        assert_eq!(
            contents[2],
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"c\": 1}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>"
        );
        assert_eq!(
            contents[3],
            "<tool_response name=\"weather\">\nsun\n</tool_response>\n\
             <tool_response name=\"weather\">\nrain\n</tool_response>"
        );
        assert_eq!((contents.len(), contents[4]), (5, "Mixed."));
        assert!(
            chat.messages
                .iter()
                .all(|message| message["role"] != "tool" && message.get("tool_calls").is_none())
        );
    }

    #[test]
    fn each_format_writes_its_own_calls() {
        let calls = [call("a", r#"{"c": "x", "d": [1]}"#), call("b", "{}")];
        let calls: Vec<&Value> = calls.iter().collect();
        assert_eq!(
            calls_text(ToolFormat::LlamaJson, &calls),
            r#"{"name": "weather", "parameters": {"c": "x", "d": [1]}}; {"name": "weather", "parameters": {}}"#
        );
        assert_eq!(calls_text(ToolFormat::Pythonic, &calls), r#"[weather(c="x", d=[1]), weather()]"#);
        let mut without_system = chat(json!([{"role": "user", "content": "Hi"}]));
        write_out(&mut without_system, ToolFormat::Pythonic);
        assert_eq!(without_system.messages[0]["role"], "system");
    }

    #[test]
    fn arguments_become_objects_if_they_are() {
        let mut message =
            json!({"role": "assistant", "tool_calls": [call("a", "{\"c\": 1}"), call("b", "[1]")]});
        arguments_as_objects(message.as_object_mut().expect("an object"));
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], json!({"c": 1}));
        assert_eq!(message["tool_calls"][1]["function"]["arguments"], "[1]");
    }
}
