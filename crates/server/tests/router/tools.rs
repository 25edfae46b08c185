//! Tools over the real engine: a model that says whatever its script says makes calls where it must.

use crate::fake::{Answer, TestServer, merged};
use locket_server::{ServerConfig, ToolCallFormat};
use serde_json::{Value, json};

/// Prints tools and calls in the manner of Hermes, shortly.
const TEMPLATE: &str = "{% if tools %}<tool_call>{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}\
    {% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}\
    {{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn server() -> TestServer {
    TestServer::with_template(ServerConfig::default(), 8, TEMPLATE)
}

/// Two functions whose arguments leave no choice.
fn tools() -> Value {
    let unit = json!({"type": "object", "properties": {"unit": {"enum": ["°C"]}}, "required": ["unit"], "additionalProperties": false});
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": unit, "strict": true}},
        {"type": "function", "function": {"name": "time"}}
    ])
}

fn named(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name}})
}

fn fields(more: Value) -> Value {
    merged(json!({"tools": tools(), "max_tokens": 400}), more)
}

async fn ask(server: &TestServer, more: Value) -> Answer {
    server.chat("Hi", fields(more)).await
}

#[tokio::test]
async fn a_named_call_is_all_there_is() {
    let server = server();
    let body = ask(&server, json!({"tool_choice": named("weather"), "logprobs": true})).await.ok();
    let choice = &body["choices"][0];
    let call = &choice["message"]["tool_calls"][0];
    let id = call["id"].as_str().expect("an id");
    assert!(id.starts_with("call_") && id.len() >= 29, "{id}");
    let arguments = call["function"]["arguments"].as_str().expect("text");
    assert_eq!(serde_json::from_str::<Value>(arguments).expect("JSON"), json!({"unit": "°C"}));
    let function = json!({"name": "weather", "arguments": arguments});
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": null, "refusal": null,
               "tool_calls": [{"id": id, "type": "function", "function": function}]})
    );
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["logprobs"], json!({"content": [], "refusal": null}), "those of the content alone");
    let without = ask(&server, json!({"tool_choice": named("time")})).await.ok();
    assert_eq!(without["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"], "{}");
}

#[tokio::test]
async fn streamed_calls_have_the_fragments_of_the_contract() {
    let server = server();
    let more = json!({"tool_choice": named("weather"), "stream": true, "n": 2});
    let chunks = ask(&server, more).await.chunks();
    for index in 0..2 {
        let mut own =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        let deltas: Vec<&Value> = own.clone().map(|choice| &choice["delta"]).collect();
        assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
        let first = &deltas[1]["tool_calls"][0];
        let head = json!({"index": 0, "id": first["id"], "type": "function", "function": {"name": "weather", "arguments": ""}});
        assert_eq!(*deltas[1], json!({ "tool_calls": [head] }));
        let pieces: Vec<&Value> =
            deltas[2..deltas.len() - 1].iter().map(|delta| &delta["tool_calls"][0]).collect();
        let mut joined = String::new();
        for piece in &pieces {
            let text = piece["function"]["arguments"].as_str().expect("a piece");
            assert_eq!(**piece, json!({"index": 0, "function": {"arguments": text}}));
            joined.push_str(text);
        }
        assert!(pieces.len() > 3, "as they come");
        assert_eq!(serde_json::from_str::<Value>(&joined).expect("JSON"), json!({"unit": "°C"}));
        assert_eq!(own.next_back().expect("a finish")["finish_reason"], "tool_calls");
    }
}

#[tokio::test]
async fn other_formats_make_the_same_calls() {
    use locket_processor::tools::ToolFormat;
    for format in ToolFormat::ALL {
        let config = ServerConfig { tool_calls: ToolCallFormat::Format(format), ..ServerConfig::default() };
        let server = TestServer::with_template(config, 8, TEMPLATE);
        let more = json!({"tool_choice": "required", "parallel_tool_calls": false});
        let body = ask(&server, more).await.ok();
        let calls = body["choices"][0]["message"]["tool_calls"].as_array().expect("calls");
        assert_eq!(
            (calls.len(), &body["choices"][0]["finish_reason"]),
            (1, &json!("tool_calls")),
            "{format:?}"
        );
    }
    let config = ServerConfig { tool_calls: ToolCallFormat::Off, ..ServerConfig::default() };
    let server = TestServer::with_template(config, 8, TEMPLATE);
    let error = ask(&server, json!({})).await.is_error(400, "unsupported_parameter");
    assert_eq!(error["param"], "tools");
}

/// Without a call, and with calls forbidden, the answer is what the script says.
#[tokio::test]
async fn text_is_not_disturbed() {
    let server = server();
    let auto = ask(&server, json!({"max_tokens": 20})).await.ok();
    let none = ask(&server, json!({"tool_choice": "none", "max_tokens": 20})).await.ok();
    assert_eq!(auto["choices"][0]["message"], none["choices"][0]["message"]);
    assert!(auto["choices"][0]["message"]["content"].as_str().is_some_and(|text| !text.is_empty()));
    assert_eq!(auto["usage"]["prompt_tokens"], none["usage"]["prompt_tokens"], "both are told of the tools");
}

/// The model writes `[`, `a` and `(` at random, which sooner or later begins a call of `a`.
#[tokio::test]
async fn forbidden_calls_are_not_written() {
    use locket_processor::tools::ToolFormat;
    let config =
        ServerConfig { tool_calls: ToolCallFormat::Format(ToolFormat::Pythonic), ..ServerConfig::default() };
    let server = TestServer::with_template(config, 8, TEMPLATE);
    let letters: Vec<u32> = "[a(".bytes().map(u32::from).collect();
    let ask = async |choice: Value| {
        let tools = json!([{"type": "function", "function": {"name": "a"}}]);
        let fields = json!({"tools": tools, "tool_choice": choice, "allowed_token_ids": letters, "max_tokens": 100,
                            "seed": 1, "temperature": 2.0, "top_p": 1.0, "n": 2});
        let body = server.chat("Hi", fields).await.ok();
        let choices = body["choices"].as_array().expect("choices").clone();
        choices.into_iter().map(|choice| choice["message"]["content"].as_str().expect("text").to_owned())
    };
    for text in ask(json!("none")).await {
        assert!(text.len() == 100 && text.contains("[a") && text.contains("a("), "{text}");
        assert!(!text.contains("[a("), "{text}");
    }
}

/// A stop string inside of calls does not cut them.
#[tokio::test]
async fn calls_are_not_cut_by_stop_strings() {
    let server = server();
    let more = json!({"tool_choice": named("weather"), "stop": ["}", "unit"]});
    let body = ask(&server, more).await.ok();
    let choice = &body["choices"][0];
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().expect("text");
    assert_eq!(serde_json::from_str::<Value>(arguments).expect("JSON"), json!({"unit": "°C"}));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("tool_calls"), &Value::Null));
}

/// `response_format` says what messages are that are no calls.
#[tokio::test]
async fn a_format_goes_together_with_tools() {
    let server = server();
    let schema = json!({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let body = ask(&server, json!({"response_format": format, "parallel_tool_calls": false})).await.ok();
    let message = &body["choices"][0]["message"];
    let is_content = message["content"]
        .as_str()
        .is_some_and(|text| serde_json::from_str::<Value>(text).is_ok_and(|value| value == json!({"a": 1})));
    assert!(is_content != message["tool_calls"].is_array(), "{message}");
    let forced = json!({"structured_outputs": {"regex": "a"}, "tool_choice": "required"});
    ask(&server, forced).await.is_error(400, "invalid_value");
}

#[tokio::test]
async fn results_follow_their_calls() {
    let server = server();
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}});
    let body = |id: &str| {
        json!({"tools": tools(), "max_tokens": 3, "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": id, "content": "noon"}
        ]})
    };
    server.post("/v1/chat/completions", &body("call_1")).await.ok_status();
    let error = server.post("/v1/chat/completions", &body("call_2")).await.is_error(400, "invalid_value");
    assert_eq!(error["param"], "messages[2].tool_call_id");
    let mut question = body("call_1");
    question.as_object_mut().expect("an object").shift_remove("max_tokens");
    let count = server.post("/tokenize", &question).await.ok();
    assert!(count["count"].as_u64().is_some_and(|count| count > 30), "{count}");
}

#[tokio::test]
async fn a_schema_that_is_no_grammar_is_refused_if_it_is_strict() {
    let server = server();
    let tool = |is_strict: bool| {
        let parameters = json!({"type": "object", "properties": {"a": {"not": {}}}});
        json!([{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": is_strict}}])
    };
    let error = ask(&server, json!({"tools": tool(true)})).await.is_error(422, "invalid_json_schema");
    assert_eq!(error["param"], "tools[0].function.parameters.properties.a.not");
    ask(&server, json!({"tools": tool(false), "max_tokens": 2})).await.ok_status();
}
