//! Every row of the error table that exists so far, and ten thousand malformed bodies: documented
//! status, the four keys, and a server that stays up.

use std::collections::BTreeMap;

use futures_util::{StreamExt, stream};
use locket_tests::Server;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

fn chat(fields: Value) -> Value {
    let mut body =
        json!({"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// Status, code and param that a chat body must be answered with.
type Row = (Value, u16, &'static str, &'static str);

fn rows() -> Vec<Row> {
    let message = |content: Value| chat(json!({"messages": [{"role": "user", "content": content}]}));
    vec![
        (json!([]), 400, "invalid_type", ""),
        (json!({"model": "smollm2"}), 400, "missing_required_parameter", "messages"),
        (chat(json!({"messages": []})), 400, "empty_array", "messages"),
        (chat(json!({"messages": "Hi"})), 400, "invalid_type", "messages"),
        (
            chat(json!({"messages": [{"content": "Hi"}]})),
            400,
            "missing_required_parameter",
            "messages[0].role",
        ),
        (
            chat(json!({"messages": [{"role": "robot", "content": "Hi"}]})),
            400,
            "invalid_value",
            "messages[0].role",
        ),
        (message(json!(5)), 400, "invalid_type", "messages[0].content"),
        (message(json!([{"type": "text", "text": 5}])), 400, "invalid_type", "messages[0].content[0].text"),
        (
            message(json!([{"type": "input_audio", "input_audio": {}}])),
            400,
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (chat(json!({"model": "gpt-17"})), 404, "model_not_found", "model"),
        (chat(json!({"model": 3})), 400, "invalid_type", "model"),
        (chat(json!({"temperature": -0.1})), 400, "decimal_below_min_value", "temperature"),
        (chat(json!({"temperature": 2.1})), 400, "decimal_above_max_value", "temperature"),
        (chat(json!({"temperature": "hot"})), 400, "invalid_type", "temperature"),
        (chat(json!({"top_p": 1.5})), 400, "decimal_above_max_value", "top_p"),
        (chat(json!({"max_tokens": 0})), 400, "integer_below_min_value", "max_tokens"),
        (chat(json!({"max_completion_tokens": 1.5})), 400, "invalid_type", "max_completion_tokens"),
        (chat(json!({"n": 0})), 400, "integer_below_min_value", "n"),
        (chat(json!({"n": 1000})), 400, "integer_above_max_value", "n"),
        (chat(json!({"stop": vec!["a"; 17]})), 400, "array_above_max_length", "stop"),
        (chat(json!({"stop": [""]})), 400, "empty_string", "stop[0]"),
        (chat(json!({"stop": "x".repeat(257)})), 400, "string_above_max_length", "stop"),
        (chat(json!({"presence_penalty": 3})), 400, "decimal_above_max_value", "presence_penalty"),
        (chat(json!({"top_logprobs": 2})), 400, "invalid_value", "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), 400, "integer_above_max_value", "top_logprobs"),
        (chat(json!({"stream_options": {"include_usage": true}})), 400, "invalid_value", "stream_options"),
        (chat(json!({"tools": []})), 400, "empty_array", "tools"),
        (
            chat(json!({"tools": [{"type": "custom", "custom": {"name": "f"}}]})),
            400,
            "unsupported_value",
            "tools[0].type",
        ),
        (chat(json!({"response_format": {"type": "xml"}})), 400, "invalid_value", "response_format.type"),
        (
            chat(json!({"structured_outputs": {"regex": "a", "choice": ["b"]}})),
            400,
            "invalid_value",
            "structured_outputs.choice",
        ),
        (chat(json!({"guided_json": {"not": {}}})), 422, "invalid_json_schema", "guided_json.not"),
        (
            chat(json!({"structured_outputs": {"regex": "("}})),
            422,
            "invalid_grammar",
            "structured_outputs.regex",
        ),
        (chat(json!({"audio": {}})), 400, "unsupported_parameter", "audio"),
        (chat(json!({"functions": []})), 400, "unsupported_parameter", "functions"),
        (chat(json!({"use_beam_search": true})), 400, "unsupported_parameter", "use_beam_search"),
        (chat(json!({"modalities": ["audio"]})), 400, "unsupported_value", "modalities[0]"),
        (
            chat(json!({"locket": {"kv_cache": {"method": "magic"}}})),
            400,
            "invalid_value",
            "locket.kv_cache.method",
        ),
        (chat(json!({"max_tokens": 200_000})), 400, "context_length_exceeded", "messages"),
        (
            chat(json!({"messages": [{"role": "user", "content": "word ".repeat(140_000)}]})),
            400,
            "context_length_exceeded",
            "messages",
        ),
    ]
}

fn check(response: &Value, code: &str, param: &str) {
    let error = response["error"].as_object().unwrap_or_else(|| panic!("no error object: {response}"));
    for key in ["message", "type", "param", "code"] {
        assert!(error.contains_key(key), "{response}");
    }
    assert_eq!(error["code"], code, "{response}");
    assert_eq!(error["type"], "invalid_request_error", "{response}");
    assert_eq!(error["param"].as_str().unwrap_or(""), param, "{response}");
    assert!(!error["message"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn every_row_of_the_table() {
    let server = Server::start(&[]);
    for (body, status, code, param) in rows() {
        let (answered, response) = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answered, status, "{body}: {response}");
        check(&response, code, param);
    }
}

#[tokio::test]
async fn routes_methods_and_media_types() {
    let server = Server::start(&["--max-body-bytes", "100000"]);
    let url = |path: &str| format!("{}{path}", server.url());
    let client = server.client();

    let response = client.get(url("/v1/nothing")).send().await.unwrap();
    assert_eq!(response.status(), 404);
    check(&response.json().await.unwrap(), "not_found", "");

    let response = client.get(url("/v1/chat/completions")).send().await.unwrap();
    assert_eq!(response.status(), 405);
    assert!(response.headers()["allow"].to_str().unwrap().contains("POST"));
    check(&response.json().await.unwrap(), "method_not_allowed", "");

    let request = client.post(url("/v1/chat/completions")).header("content-type", "text/plain").body("{}");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 415);
    check(&response.json().await.unwrap(), "unsupported_media_type", "");

    let request =
        client.post(url("/v1/chat/completions")).header("content-type", "application/json").body("{\"a\":");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 400);
    check(&response.json().await.unwrap(), "invalid_json", "");

    // The connection of a refused body serves the next request.
    for _ in 0..50 {
        let (status, response) =
            server.post("/v1/chat/completions", &chat(json!({"user": "x".repeat(200_000)}))).await;
        assert_eq!(status, 413);
        check(&response, "request_too_large", "");
        let response = client.post(url("/v1/nothing")).body("x".repeat(500_000)).send().await.unwrap();
        assert_eq!(response.status(), 404);
    }

    for path in ["/v1/files", "/v1/audio/speech", "/v1/images/generations", "/v1/evals"] {
        let (status, response) = server.post(path, &json!({})).await;
        assert_eq!(status, 501, "{path}: {response}");
        assert_eq!(response["error"]["code"], "not_implemented");
    }

    let (status, model) = server.get("/v1/models/nobody/knows").await;
    assert_eq!(status, 404);
    check(&serde_json::from_str(&model).unwrap(), "model_not_found", "model");
    assert_eq!(server.get("/v1/models/").await.0, 200);
}

#[tokio::test]
async fn request_ids_and_ignored_fields_are_told() {
    let server = Server::start(&[]);
    let post = |body: Value| {
        let url = format!("{}/v1/chat/completions", server.url());
        server.client().post(url).header("x-request-id", "abc-123").json(&body).send()
    };
    let response = post(chat(json!({"colour": 1, "flavour": 2}))).await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "abc-123");
    assert_eq!(response.headers()["x-ignored-fields"], "colour,flavour");
    assert!(response.headers().contains_key("openai-processing-ms"));
    assert_eq!(response.headers()["openai-version"], "2020-10-01");
    let response = post(json!({})).await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "abc-123");
    let response = server.client().get(format!("{}/v1/models", server.url())).send().await.unwrap();
    assert!(response.headers()["x-request-id"].to_str().unwrap().starts_with("req_"));
}

/// A random JSON value, often of a kind that some field does not expect.
fn junk(rng: &mut StdRng, depth: usize) -> Value {
    match rng.random_range(0..if depth == 0 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => json!(rng.random::<bool>()),
        2 => json!(rng.random_range(-3i64..70_000)),
        3 => json!(rng.random::<f64>() * 10f64.powi(rng.random_range(-3..300))),
        4 => json!(["", "auto", "text", "user", "\u{0}", "💥", "smollm2"].choose(rng).unwrap()),
        5 => json!(rng.random::<i64>()),
        6 => Value::Array((0..rng.random_range(0..4)).map(|_| junk(rng, depth - 1)).collect()),
        _ => {
            let names = ["type", "text", "role", "content", "function", "name", "kv_cache", "method"];
            (0..rng.random_range(0..4))
                .map(|_| (names.choose(rng).unwrap().to_string(), junk(rng, depth - 1)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        }
    }
}

const FIELDS: [&str; 40] = [
    "messages",
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "response_format",
    "tools",
    "tool_choice",
    "user",
    "metadata",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "echo",
    "suffix",
    "best_of",
    "locket",
    "priority",
    "documents",
    "chat_template_kwargs",
    "truncate_prompt_tokens",
    "service_tier",
    "modalities",
    "request_id",
    "cache_salt",
    "prompt_logprobs",
];

/// A body that is wrong in one of many ways.
fn malformed(rng: &mut StdRng) -> Vec<u8> {
    let mut body = chat(json!({"prompt": "Hi"}));
    for _ in 0..rng.random_range(1..5) {
        body[*FIELDS.choose(rng).unwrap()] = junk(rng, 3);
    }
    // Never let a body that happens to be valid generate for long.
    if body["max_tokens"].as_f64().is_some_and(|tokens| tokens > 4.0) {
        body["max_tokens"] = json!(2);
    }
    body["max_completion_tokens"] = json!(1);
    let mut bytes = body.to_string().into_bytes();
    match rng.random_range(0..6) {
        0 => bytes.truncate(rng.random_range(0..bytes.len())),
        1 => {
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
        }
        2 => bytes = "[".repeat(rng.random_range(1..20_000)).into_bytes(),
        3 => bytes = (0..rng.random_range(0..300)).map(|_| rng.random()).collect(),
        _ => {}
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_malformed_bodies() {
    let mut server = Server::start(&["--max-waiting", "64"]);
    let seed = 20_261_124;
    let mut rng = StdRng::seed_from_u64(seed);
    let paths = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];
    let requests: Vec<(usize, &str, Vec<u8>)> =
        (0..10_000).map(|number| (number, *paths.choose(&mut rng).unwrap(), malformed(&mut rng))).collect();
    let statuses = stream::iter(requests)
        .map(|(number, path, body)| {
            let request = server
                .client()
                .post(format!("{}{path}", server.url()))
                .header("content-type", "application/json")
                .body(body.clone());
            async move {
                let response =
                    request.send().await.unwrap_or_else(|e| panic!("body {number} of seed {seed}: {e}"));
                let status = response.status().as_u16();
                let text = response.text().await.expect("a body");
                let shown = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
                let documented = [200, 400, 404, 413, 422, 503].contains(&status);
                assert!(documented, "body {number} of seed {seed}: {status} {text} for {path} {shown}");
                if status != 200 {
                    let error: Value = serde_json::from_str(&text).expect("a JSON error");
                    assert!(error["error"]["code"].is_string(), "{error}");
                }
                status
            }
        })
        .buffer_unordered(16)
        .fold(BTreeMap::new(), |mut counts, status| async move {
            *counts.entry(status).or_insert(0) += 1;
            counts
        })
        .await;
    assert!(statuses[&400] > 5_000, "most bodies are refused: {statuses:?}");
    assert!(server.is_running());
    server.until_metric("vllm:num_requests_running", &[], 0.0).await;
    server.until_metric("vllm:num_requests_waiting", &[], 0.0).await;
    assert_eq!(server.get("/health").await.0, 200);
    server.post_ok("/v1/chat/completions", &chat(json!({}))).await;
}
