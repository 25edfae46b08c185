//! `/v1/responses`: the object, the events, lengths, failures.

use locket_processor::reasoning::ReasoningSettings;
use locket_server::{ServerConfig, config::ReasoningConfig};
use serde_json::{Value, json};

use crate::fake::{Answer, NOT_FINITE, TestServer, merged};

const PATH: &str = "/v1/responses";

/// Knows tools, calls and results, in the manner of Hermes, and says little of them.
const TEMPLATE: &str = "{% if tools %}<tool_call>{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}\
    {% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}\
    {{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn body(fields: Value) -> Value {
    merged(json!({"input": "Hi", "temperature": 0}), fields)
}

/// The events of a stream: named lines and numbers are checked.
#[track_caller]
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let events = answer.text.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
    events
        .enumerate()
        .map(|(number, event)| {
            let (name, data) = event.split_once('\n').expect("two lines");
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            assert_eq!(data["sequence_number"], number);
            data
        })
        .collect()
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event["type"].as_str()).collect()
}

/// Without what differs from request to request.
fn anonymous(mut response: Value) -> Value {
    for key in ["id", "created_at", "completed_at"] {
        response[key] = Value::Null;
    }
    for item in response["output"].as_array_mut().expect("items") {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response
}

/// The response of the last event, which must be the unstreamed one.
#[track_caller]
fn same_when_streamed(answer: &Answer, unstreamed: &Value) {
    let events = events(answer);
    let last = events.last().expect("an end");
    assert_eq!(anonymous(last["response"].clone()), anonymous(unstreamed.clone()));
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().expect("text")
}

#[tokio::test]
async fn the_response_object_is_as_documented() {
    let server = TestServer::start();
    let fields = json!({
        "model": "org/tiny", "instructions": "Be brief.", "max_output_tokens": 60, "metadata": {"a": "b"},
        "store": true, "user": "u", "top_p": 0.5, "text": {"verbosity": "low"}, "foo": 1,
        "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]
    });
    let answer = server.post(PATH, &body(fields)).await;
    let response = answer.ok();
    assert_eq!(answer.header("x-ignored-fields"), "foo");
    let chat = json!({"temperature": 0, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]});
    let chat = server.post("/v1/chat/completions", &chat).await.ok();
    let output = json!([{
        "type": "message", "id": null, "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": chat["choices"][0]["message"]["content"],
                     "annotations": [], "logprobs": []}]}]);
    let usage = &chat["usage"];
    let wanted = json!({
        "id": null, "object": "response", "created_at": null, "completed_at": null, "status": "completed",
        "background": false, "error": null, "incomplete_details": null, "instructions": "Be brief.",
        "max_output_tokens": 60, "metadata": {"a": "b"}, "model": "org/tiny", "output": output,
        "parallel_tool_calls": true, "previous_response_id": null,
        "reasoning": {"effort": null, "summary": "auto"}, "service_tier": "default", "store": false,
        "temperature": 0.0, "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "auto",
        "tools": [], "top_logprobs": 0, "top_p": 0.5, "truncation": "disabled",
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "image_tokens": 0},
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"], "locket": usage["locket"]
        }
    });
    assert_eq!(anonymous(response.clone()), wanted);
    let id = |value: &Value, prefix: &str| {
        value.as_str().is_some_and(|id| id.starts_with(prefix) && id.len() >= prefix.len() + 24)
    };
    assert!(id(&response["id"], "resp_") && id(&response["output"][0]["id"], "msg_"), "{response}");
    assert!(response["completed_at"].as_u64() >= response["created_at"].as_u64());
}

#[tokio::test]
async fn a_stream_ends_with_the_unstreamed_response() {
    let server = TestServer::start();
    for fields in [json!({}), json!({"max_output_tokens": 9, "ignore_eos": true})] {
        let unstreamed = server.post(PATH, &body(fields.clone())).await.ok();
        let answer = server.post(PATH, &body(merged(fields, json!({"stream": true})))).await;
        assert_eq!(answer.header("cache-control"), "no-cache");
        let events = events(&answer);
        let types = types(&events);
        let (start, end) = (&types[..4], &types[types.len() - 4..]);
        assert_eq!(
            start,
            [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added"
            ]
        );
        let last = format!("response.{}", unstreamed["status"].as_str().expect("a status"));
        assert_eq!(
            end,
            [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                last.as_str()
            ]
        );
        assert!(types[4..types.len() - 4].iter().all(|name| *name == "response.output_text.delta"));
        let joined: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
        assert_eq!(joined, text(&unstreamed));
        for early in &events[..2] {
            let response = &early["response"];
            assert_eq!((&response["status"], &response["output"]), (&json!("in_progress"), &json!([])));
            assert_eq!((&response["usage"], &response["completed_at"]), (&Value::Null, &Value::Null));
        }
        let response = &events[events.len() - 1]["response"];
        assert_eq!(response["id"], events[0]["response"]["id"]);
        assert_eq!(anonymous(response.clone()), anonymous(unstreamed));
    }
}

#[tokio::test]
async fn a_cut_off_response_is_incomplete() {
    let server = TestServer::start();
    let response = server.post(PATH, &body(json!({"max_output_tokens": 5, "ignore_eos": true}))).await.ok();
    assert_eq!((&response["status"], &response["completed_at"]), (&json!("incomplete"), &Value::Null));
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["usage"]["output_tokens"], 5);
}

#[tokio::test]
async fn logprobs_of_the_text() {
    let server = TestServer::start();
    let fields = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let response = server.post(PATH, &body(fields.clone())).await.ok();
    let part = &response["output"][0]["content"][0];
    let entries = part["logprobs"].as_array().expect("entries");
    assert_eq!(response["usage"]["output_tokens"], entries.len());
    assert_eq!(response["top_logprobs"], 2);
    assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().is_some_and(|top| top.len() == 2)));
    let events = events(&server.post(PATH, &body(merged(fields, json!({"stream": true})))).await);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let streamed: Vec<&Value> = deltas.filter_map(|event| event["logprobs"].as_array()).flatten().collect();
    assert_eq!(streamed, entries.iter().collect::<Vec<_>>());
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").expect("the end");
    assert_eq!(done["logprobs"], part["logprobs"]);
}

/// Thoughts are an item in front of the message: the same texts as in chat.
#[tokio::test]
async fn thoughts_are_an_item_of_their_own() {
    let profile = ReasoningSettings { open: Some("<think>".into()), ..ReasoningSettings::default() };
    let reasoning = ReasoningConfig { profile, ..ReasoningConfig::default() };
    let server = TestServer::with(ServerConfig { reasoning, ..ServerConfig::default() }, 8);
    let fields = json!({"thinking": {"type": "enabled", "budget_tokens": 7}});
    let chat = server.chat("Hi", fields.clone()).await.ok();
    let said = &chat["choices"][0]["message"];
    let response = server.post(PATH, &body(fields.clone())).await.ok();
    let output = response["output"].as_array().expect("items");
    assert_eq!(output.len(), 2, "{response}");
    let thoughts = json!([{"type": "reasoning_text", "text": said["reasoning"]}]);
    assert_eq!((&output[0]["type"], &output[0]["content"]), (&json!("reasoning"), &thoughts));
    assert_eq!((&output[0]["summary"], &output[0]["status"]), (&json!([]), &json!("completed")));
    assert!(output[0]["id"].as_str().is_some_and(|id| id.starts_with("rs_")));
    assert_eq!(output[1]["content"][0]["text"], said["content"]);
    let counted = &chat["usage"]["completion_tokens_details"]["reasoning_tokens"];
    assert_eq!(&response["usage"]["output_tokens_details"]["reasoning_tokens"], counted);
    let streamed = server.post(PATH, &body(merged(fields, json!({"stream": true})))).await;
    same_when_streamed(&streamed, &response);
    assert!(types(&events(&streamed)).contains(&"response.reasoning_text.delta"));
    // An effort of none is the answer alone.
    let fields = json!({"reasoning": {"effort": "none"}});
    let response = server.post(PATH, &body(fields)).await.ok();
    assert_eq!((&response["output"][0]["type"], &response["output"][1]), (&json!("message"), &Value::Null));
    assert_eq!(response["reasoning"]["effort"], "none");
}

/// A model that says whatever its script says calls what it must, and the call goes back in.
#[tokio::test]
async fn calls_are_items() {
    let server = TestServer::with_template(ServerConfig::default(), 8, TEMPLATE);
    let unit = json!({"type": "object", "properties": {"unit": {"enum": ["°C"]}}, "required": ["unit"],
                      "additionalProperties": false});
    let tools = json!([{"type": "function", "name": "weather", "parameters": unit, "strict": true},
                       {"type": "function", "name": "time"}]);
    let fields = json!({"tools": tools, "tool_choice": {"type": "function", "name": "time"}});
    let response = server.post(PATH, &body(fields.clone())).await.ok();
    let output = response["output"].as_array().expect("items");
    let call = &output[0];
    assert_eq!((output.len(), &call["type"], &call["name"]), (1, &json!("function_call"), &json!("time")));
    assert_eq!((&call["arguments"], &call["status"]), (&json!("{}"), &json!("completed")));
    assert!(call["call_id"].as_str().is_some_and(|id| id.starts_with("call_")));
    assert_eq!((&response["tools"], &response["tool_choice"]["name"]), (&tools, &json!("time")));
    let streamed = server.post(PATH, &body(merged(fields.clone(), json!({"stream": true})))).await;
    same_when_streamed(&streamed, &response);
    assert!(types(&events(&streamed)).contains(&"response.function_call_arguments.done"));
    let result = json!({"type": "function_call_output", "call_id": call["call_id"], "output": "noon"});
    let input = json!([{"role": "user", "content": "Hi"}, call, result]);
    let fields = merged(fields, json!({"input": input, "tool_choice": "none"}));
    assert_eq!(server.post(PATH, &body(fields)).await.ok()["output"][0]["type"], "message");
}

/// What the model said comes back as items, and is the same conversation as in chat.
#[tokio::test]
async fn output_goes_back_in() {
    let server = TestServer::start();
    let first = server.post(PATH, &body(json!({}))).await.ok();
    let mut input = json!([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]);
    let items = input.as_array_mut().expect("items");
    items.extend(first["output"].as_array().expect("items").clone());
    items.push(json!({"role": "user", "content": "More?"}));
    let second = server.post(PATH, &body(json!({ "input": input }))).await.ok();
    let chat = json!({"temperature": 0, "messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": text(&first)},
        {"role": "user", "content": "More?"}]});
    let chat = server.post("/v1/chat/completions", &chat).await.ok();
    assert_eq!(text(&second), chat["choices"][0]["message"]["content"]);
    assert_eq!(second["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
}

/// The context has 512 tokens, and each of these messages about 60.
#[tokio::test]
async fn the_oldest_items_are_dropped_where_that_is_allowed() {
    let server = TestServer::start();
    let message =
        |role: &str, index: usize| json!({"role": role, "content": format!("{index:02}{}", "x".repeat(40))});
    let input: Vec<Value> =
        (0..20).map(|index| message(if index % 2 == 0 { "user" } else { "assistant" }, index)).collect();
    let fields = |input: &[Value]| {
        body(json!({"input": input, "instructions": "Stay.", "max_output_tokens": 40, "truncation": "auto"}))
    };
    let refused = server.post(PATH, &merged(fields(&input), json!({"truncation": null}))).await;
    assert_eq!(refused.is_error(400, "context_length_exceeded")["param"], "input");
    let cut = server.post(PATH, &fields(&input)).await.ok();
    assert_eq!((&cut["truncation"], &cut["status"]), (&json!("auto"), &json!("completed")));
    // The longest end that begins with a question and fits beside the answer.
    let mut fitting = Vec::new();
    for start in (0..20).step_by(2) {
        let shorter =
            server.post(PATH, &merged(fields(&input[start..]), json!({"truncation": "disabled"}))).await;
        if shorter.status == 200 {
            fitting.push((start, shorter.ok()));
        }
    }
    let (start, longest) = &fitting[0];
    assert!(*start > 0 && fitting.len() > 1);
    assert_eq!(cut["usage"]["input_tokens"], longest["usage"]["input_tokens"]);
    assert_eq!(text(&cut), text(longest));
    let short = server.post(PATH, &fields(&input[18..])).await.ok();
    assert_eq!(short["usage"]["input_tokens"], fitting[fitting.len() - 1].1["usage"]["input_tokens"]);
    let hopeless = server.post(PATH, &fields(&[json!({"role": "user", "content": "x".repeat(600)})])).await;
    assert_eq!(hopeless.is_error(400, "context_length_exceeded")["param"], "input");
}

/// A sampled token after which the logits are not finite.
#[tokio::test]
async fn a_failure_in_a_stream_is_an_event() {
    let server = TestServer::start();
    let fields = json!({"logit_bias": {NOT_FINITE.to_string(): 100}, "stream": true});
    let events = events(&server.post(PATH, &body(fields.clone())).await);
    let last = &events[events.len() - 1];
    assert_eq!(last["type"], "response.failed");
    let response = &last["response"];
    assert_eq!((&response["status"], &response["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert!(response["error"]["message"].is_string() && response["usage"]["input_tokens"].is_u64());
    let unstreamed = server.post(PATH, &body(merged(fields, json!({"stream": false})))).await;
    unstreamed.is_error(500, "internal_error");
    assert_eq!(unstreamed.header("x-should-retry"), "false");
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let server = TestServer::start();
    let rows = [
        (json!({"input": null}), 400, "missing_required_parameter", "input"),
        (json!({"model": "nobody"}), 404, "model_not_found", "model"),
        (json!({"previous_response_id": "resp_1"}), 400, "unsupported_parameter", "previous_response_id"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}),
            400,
            "invalid_type",
            "input[0].content[0].text",
        ),
        (json!({"max_output_tokens": 600}), 400, "context_length_exceeded", "input"),
        (json!({"stream_options": {"include_obfuscation": false}}), 400, "invalid_value", "stream_options"),
    ];
    for (fields, status, code, param) in rows {
        let error = server.post(PATH, &body(fields)).await.is_error(status, code);
        assert_eq!(error["param"], param);
    }
}

#[tokio::test]
async fn nothing_is_stored() {
    use axum::{body::Body, http::Request};
    let server = TestServer::start();
    let stored = server.post(PATH, &body(json!({"store": true}))).await.ok();
    let id = stored["id"].as_str().expect("an id");
    let rows = [
        ("GET", format!("{PATH}/{id}"), 404, "not_found"),
        ("DELETE", format!("{PATH}/{id}"), 404, "not_found"),
        ("POST", format!("{PATH}/{id}/cancel"), 404, "not_found"),
        ("GET", format!("{PATH}/{id}/input_items"), 404, "not_found"),
        ("GET", PATH.to_owned(), 405, "method_not_allowed"),
        ("PUT", format!("{PATH}/{id}"), 405, "method_not_allowed"),
        ("POST", format!("{PATH}/compact"), 501, "not_implemented"),
        ("POST", format!("{PATH}/input_tokens"), 501, "not_implemented"),
    ];
    for (method, path, status, code) in rows {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
        server.send(request).await.is_error(status, code);
    }
}
