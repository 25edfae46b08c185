//! Tools over a real socket, with a model that was not trained for them: what must be a call is one,
//! by grammar; what may be one does not disturb the chat.

use std::collections::BTreeMap;

use locket_tests::{Server, chat_text, finish_reason};
use serde_json::{Map, Value, json};

fn tools() -> Value {
    json!([
        {"type": "function", "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "strict": true,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 24},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}
                },
                "required": ["city", "unit"],
                "additionalProperties": false
            }
        }},
        {"type": "function", "function": {"name": "get_time", "description": "The time now."}}
    ])
}

fn body(fields: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "model": "smollm2", "temperature": 0, "max_tokens": 80, "tools": tools()
    });
    for (name, value) in fields.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

const CHAT: &str = "/v1/chat/completions";

/// A call's arguments, which must be what its schema says.
fn arguments(name: &str, text: &str) -> Map<String, Value> {
    let object: Map<String, Value> = serde_json::from_str(text).expect("an object");
    match name {
        "get_weather" => {
            assert_eq!(object.len(), 2, "{text}");
            assert!(object["city"].as_str().is_some_and(|city| city.chars().count() <= 24), "{text}");
            assert!(["celsius", "fahrenheit"].contains(&object["unit"].as_str().expect("text")), "{text}");
        }
        "get_time" => assert!(object.is_empty(), "{text}"),
        other => panic!("nobody offered {other}"),
    }
    object
}

/// The calls of a stream, whose chunks must be in the order of the contract.
fn streamed_calls(chunks: &[Value]) -> Vec<(String, String)> {
    let mut calls: BTreeMap<u64, (String, String)> = BTreeMap::new();
    let mut ids = Vec::new();
    for chunk in chunks {
        let delta = &chunk["choices"][0]["delta"];
        let Some(fragments) = delta["tool_calls"].as_array() else { continue };
        assert!(delta.get("content").is_none() && fragments.len() == 1, "one kind in a chunk: {chunk}");
        let fragment = &fragments[0];
        let index = fragment["index"].as_u64().expect("an index");
        match fragment.get("id") {
            Some(id) => {
                assert_eq!(index, calls.len() as u64, "without gaps, in order");
                assert_eq!(
                    (&fragment["type"], &fragment["function"]["arguments"]),
                    (&json!("function"), &json!(""))
                );
                let id = id.as_str().expect("text").to_owned();
                assert!(id.starts_with("call_") && id.len() >= 29 && !ids.contains(&id), "{id}");
                ids.push(id);
                let name = fragment["function"]["name"].as_str().expect("a name").to_owned();
                calls.insert(index, (name, String::new()));
            }
            None => {
                assert_eq!(index + 1, calls.len() as u64, "the latest call only");
                assert_eq!(fragment.as_object().map(Map::len), Some(2), "index and a piece: {fragment}");
                let piece = fragment["function"]["arguments"].as_str().expect("text");
                calls.get_mut(&index).expect("it has begun").1.push_str(piece);
            }
        }
    }
    calls.into_values().collect()
}

fn unstreamed_calls(answer: &Value) -> Vec<(String, String)> {
    let calls = answer["choices"][0]["message"]["tool_calls"].as_array().expect("calls");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    calls.iter().map(|call| (text(&call["function"]["name"]), text(&call["function"]["arguments"]))).collect()
}

/// In every format: required calls, streamed and not, are the same valid calls.
#[tokio::test]
async fn required_calls() {
    for format in ["auto", "llama-json", "pythonic"] {
        let server = Server::start(&["--tool-call-format", format]);
        let fields = json!({"tool_choice": "required", "parallel_tool_calls": false});
        let answer = server.post_ok(CHAT, &body(fields.clone())).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{format}: {answer}");
        assert_eq!(choice["message"]["content"], Value::Null, "{format}");
        let calls = unstreamed_calls(&answer);
        assert_eq!(calls.len(), 1, "{format}: {calls:?}");
        arguments(&calls[0].0, &calls[0].1);

        let mut fields = fields;
        fields["stream"] = json!(true);
        let chunks = server.stream(CHAT, &body(fields)).await;
        assert_eq!(streamed_calls(&chunks), calls, "{format}");
        assert_eq!((finish_reason(&chunks, 0).as_str(), chat_text(&chunks, 0).as_str()), ("tool_calls", ""));
    }
}

/// A named function, an allowed one, and a conversation that goes on with the result.
#[tokio::test]
async fn named_calls_and_their_results() {
    let server = Server::start(&[]);
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}});
    let answer = server.post_ok(CHAT, &body(named)).await;
    let calls = unstreamed_calls(&answer);
    assert_eq!((calls.len(), calls[0].0.as_str()), (1, "get_weather"), "{answer}");
    arguments("get_weather", &calls[0].1);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");

    let only_time = json!({"type": "function", "function": {"name": "get_time"}});
    let allowed =
        json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [only_time]}});
    let fields = json!({"tool_choice": allowed, "parallel_tool_calls": false});
    assert_eq!(
        unstreamed_calls(&server.post_ok(CHAT, &body(fields)).await),
        [("get_time".to_owned(), "{}".to_owned())]
    );

    let message = answer["choices"][0]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let turns = |id: Value| {
        json!({"tool_choice": "none", "messages": [
            {"role": "user", "content": "What is the weather in Paris?"},
            message,
            {"role": "tool", "tool_call_id": id, "content": "Sunny, 21 degrees."},
        ]})
    };
    let reply = server.post_ok(CHAT, &body(turns(id))).await;
    assert!(!reply["choices"][0]["message"]["content"].as_str().expect("content").is_empty());
    assert!(reply["choices"][0]["message"].get("tool_calls").is_none());
    // The call came back as it was said, so its tokens are those that the model chose.
    assert!(reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().is_some());
    let (status, error) = server.post(CHAT, &body(turns(json!("call_unknown")))).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("messages[2].tool_call_id")));
}

/// Several calls, and a limit that cuts the last one.
#[tokio::test]
async fn several_calls_and_the_limit() {
    let server = Server::start(&[]);
    let fields =
        json!({"tool_choice": "required", "stream": true, "max_tokens": 120, "temperature": 1, "seed": 5});
    let chunks = server.stream(CHAT, &body(fields)).await;
    let mut calls = streamed_calls(&chunks);
    assert!(!calls.is_empty(), "{chunks:?}");
    if finish_reason(&chunks, 0) == "length" {
        calls.pop();
    }
    calls.iter().for_each(|(name, text)| drop(arguments(name, text)));
    let fields = json!({"tool_choice": "required", "max_tokens": 12});
    let cut = server.post_ok(CHAT, &body(fields)).await;
    assert_eq!(cut["choices"][0]["finish_reason"], "length", "{cut}");
}

/// What the model may do does not change what it says: with `auto` and no call, the text is that of
/// a free answer; log-probabilities cover it.
#[tokio::test]
async fn plain_answers_stay_plain() {
    let server = Server::start(&[]);
    let fields = json!({"tool_choice": "auto", "logprobs": true, "max_tokens": 30, "n": 2});
    let auto = server.post_ok(CHAT, &body(fields.clone())).await;
    let mut none = fields.clone();
    none["tool_choice"] = json!("none");
    let none = server.post_ok(CHAT, &body(none)).await;
    for choice in 0..2 {
        let message = &auto["choices"][choice]["message"];
        if message.get("tool_calls").is_none() {
            assert_eq!(message["content"], none["choices"][choice]["message"]["content"]);
            assert_eq!(auto["choices"][choice]["logprobs"], none["choices"][choice]["logprobs"]);
        }
    }
    let mut streamed = fields;
    streamed["stream"] = json!(true);
    let chunks = server.stream(CHAT, &body(streamed)).await;
    let content = auto["choices"][1]["message"]["content"].as_str().unwrap_or_default();
    assert_eq!(chat_text(&chunks, 1), content);
}

/// Tools count in `/tokenize`, schemas that cannot be kept are refused, and tools can be turned off.
#[tokio::test]
async fn around_the_calls() {
    let server = Server::start(&[]);
    let messages = json!([{"role": "user", "content": "What is the weather in Paris?"}]);
    let count = server.post_ok("/tokenize", &json!({"messages": messages, "tools": tools()})).await;
    let answer = server.post_ok(CHAT, &body(json!({"tool_choice": "none", "max_tokens": 1}))).await;
    assert_eq!(count["count"], answer["usage"]["prompt_tokens"]);

    let mut bad = tools();
    bad[0]["function"]["parameters"]["properties"]["city"] = json!({"not": {}});
    let (status, error) = server.post(CHAT, &body(json!({"tools": bad, "tool_choice": "required"}))).await;
    assert_eq!(status, 422, "{error}");
    let param = error["error"]["param"].as_str().expect("a path");
    assert_eq!(param, "tools[0].function.parameters.properties.city.not");
    bad[0]["function"]["strict"] = json!(false);
    let fields =
        json!({"tools": bad, "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 200});
    let lenient = server.post_ok(CHAT, &body(fields)).await;
    assert!(lenient["choices"][0]["message"]["tool_calls"].is_array(), "{lenient}");

    let server = Server::start(&["--tool-call-format", "none"]);
    let (status, error) = server.post(CHAT, &body(json!({}))).await;
    assert_eq!((status, &error["error"]["code"]), (400, &json!("unsupported_parameter")));
}
