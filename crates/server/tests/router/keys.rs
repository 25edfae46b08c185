//! Keys: which routes ask for one, what a key may do and how much, and how keys change while the
//! server runs.

use axum::{
    body::Body,
    http::{Method, Request},
};
use locket_server::{ServerConfig, keys::KeyDigest};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::fake::{Answer, DEVICE_ERROR, TestServer, chat_body, merged};

const KEY: &str = "sk-right";

/// A server that admits [`KEY`].
fn guarded(config: ServerConfig) -> TestServer {
    TestServer::with(ServerConfig { api_keys: vec![KeyDigest::of(KEY.as_bytes())], ..config }, 8)
}

/// A server with this key file, which is kept as long as the file is.
fn with_file(text: &str) -> (TestServer, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    let config = ServerConfig { api_key_file: Some(file.path().into()), ..ServerConfig::default() };
    (TestServer::with(config, 8), file)
}

fn request(method: Method, path: &str, key: &str, body: Value) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request =
        if key.is_empty() { request } else { request.header("authorization", format!("Bearer {key}")) };
    request.body(Body::from(body.to_string())).expect("a request")
}

async fn get(server: &TestServer, path: &str, key: &str) -> Answer {
    server.send(request(Method::GET, path, key, Value::Null)).await
}

async fn chat(server: &TestServer, key: &str, fields: Value) -> Answer {
    server.send(request(Method::POST, "/v1/chat/completions", key, chat_body("Hi", fields))).await
}

#[tokio::test]
async fn every_route_but_probes_and_descriptions_asks_for_a_key() {
    let server = guarded(ServerConfig::default());
    for path in ["/health", "/health/live", "/health/ready", "/ready", "/ping", "/health/", "/metrics"] {
        get(&server, path, "").await.ok_status();
        get(&server, path, "sk-wrong").await.ok_status();
    }
    let guarded_routes = [
        (Method::POST, "/v1/chat/completions"),
        (Method::POST, "/v1/completions"),
        (Method::POST, "/tokenize"),
        (Method::POST, "/v1/detokenize"),
        (Method::GET, "/v1/models"),
        (Method::HEAD, "/v1/models"),
        (Method::GET, "/v1/models/tiny"),
        (Method::GET, "/version"),
        // What is not here, or not with this method, is not told either.
        (Method::GET, "/v1/chat/completions"),
        (Method::POST, "/v1/images/generations"),
        (Method::GET, "/nowhere"),
        (Method::GET, "/healthy"),
        (Method::GET, "/health/%2e%2e/v1/models"),
    ];
    for (method, path) in guarded_routes {
        let missing = server.send(request(method.clone(), path, "", json!({}))).await;
        let wrong = server.send(request(method.clone(), path, "sk-wrong", json!({}))).await;
        for answer in [&missing, &wrong] {
            assert_eq!(
                (answer.status.as_u16(), answer.header("www-authenticate")),
                (401, "Bearer"),
                "{path}"
            );
        }
        if method != Method::HEAD {
            assert_eq!(missing.is_error(401, Value::Null)["type"], "invalid_request_error");
            let message = wrong.is_error(401, "invalid_api_key")["message"].to_string();
            assert!(!message.contains("sk-"), "{message}");
        }
        let right = server.send(request(method, path, KEY, json!({}))).await;
        assert_ne!(right.status, 401, "{path}");
    }
    get(&server, "/nowhere", KEY).await.is_error(404, "not_found");
    chat(&server, KEY, json!({})).await.ok();
    let unauthenticated = server.send(request(Method::OPTIONS, "/v1/models", "", json!({}))).await;
    assert_ne!(unauthenticated.status, 401);
    let metrics = get(&server, "/metrics", "").await.text;
    assert!(metrics.contains("locket_requests_by_key_total{key=\"api-key-1\"}"), "{metrics}");
    assert!(!metrics.contains("sk-"), "{metrics}");

    let strict = guarded(ServerConfig { metrics_require_key: true, ..ServerConfig::default() });
    get(&strict, "/metrics", "").await.is_error(401, Value::Null);
    get(&strict, "/metrics", KEY).await.ok_status();
    get(&strict, "/health", "").await.ok_status();
}

#[tokio::test]
async fn without_keys_the_header_is_ignored() {
    let server = TestServer::start();
    chat(&server, "anything", json!({})).await.ok();
}

/// A preflight has no key, and an answer without one can be read by the page that asked.
#[tokio::test]
async fn pages_of_other_origins() {
    let server =
        guarded(ServerConfig { cors_origins: vec!["https://a.example".into()], ..ServerConfig::default() });
    let preflight = Request::options("/v1/chat/completions")
        .header("origin", "https://a.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type");
    let answer = server.send(preflight.body(Body::empty()).expect("a request")).await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("access-control-allow-origin")),
        (200, "https://a.example")
    );
    let refused = Request::get("/v1/models").header("origin", "https://a.example");
    let refused = server.send(refused.body(Body::empty()).expect("a request")).await;
    assert_eq!(
        (refused.status.as_u16(), refused.header("access-control-allow-origin")),
        (401, "https://a.example")
    );
    let exposed = refused.header("access-control-expose-headers");
    assert_eq!(exposed, "x-request-id,openai-processing-ms,retry-after");
}

#[tokio::test]
async fn models_of_a_key() {
    let (server, _file) = with_file("[[key]]\nname = \"ann\"\nkey = \"k\"\nmodels = [\"org/tiny\"]\n");
    chat(&server, "k", json!({"model": "org/tiny"})).await.ok();
    for fields in [json!({"model": "tiny"}), json!({})] {
        let error = chat(&server, "k", fields).await.is_error(403, "permission_denied");
        assert_eq!(error["param"], "model");
    }
    chat(&server, "k", json!({"model": "other"})).await.is_error(404, "model_not_found");
    chat(&server, "k", json!({"model": 3})).await.is_error(400, "invalid_type");
    let list = get(&server, "/v1/models", "k").await.ok();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "{list}");
    get(&server, "/v1/models/org/tiny", "k").await.ok();
    get(&server, "/v1/models/tiny", "k").await.is_error(403, "permission_denied");
}

#[tokio::test]
async fn requests_per_minute() {
    let (server, _file) = with_file(
        "[[key]]\nname = \"ann\"\nkey = \"k\"\nrequests-per-minute = 2\n[[key]]\nname = \"bob\"\nkey = \"b\"\n",
    );
    let first = chat(&server, "k", json!({})).await;
    first.ok();
    assert_eq!(first.header("x-ratelimit-limit-requests"), "2");
    assert_eq!(first.header("x-ratelimit-remaining-requests"), "1");
    assert_eq!(first.header("x-ratelimit-reset-requests"), "30s");
    assert!(!first.headers.contains_key("x-ratelimit-limit-tokens"));
    // A bad request counts too; a question without a body does not.
    chat(&server, "k", json!({"n": 0})).await.is_error(400, "integer_below_min_value");
    get(&server, "/v1/models", "k").await.ok();
    let refused = chat(&server, "k", json!({})).await;
    let error = refused.is_error(429, "rate_limit_exceeded");
    assert_eq!(error["type"], "rate_limit_error");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), "0");
    let seconds: u64 = refused.header("retry-after").parse().expect("whole seconds");
    let millis: u64 = refused.header("retry-after-ms").parse().expect("milliseconds");
    assert!((1..=30).contains(&seconds) && millis <= seconds * 1000, "{seconds} s, {millis} ms");
    let other = chat(&server, "b", json!({})).await;
    other.ok();
    assert!(other.headers.keys().all(|name| !name.as_str().starts_with("x-ratelimit")));
    let metrics = get(&server, "/metrics", "").await.text;
    for line in [
        "locket_rate_limited_total{key=\"ann\",limit=\"requests\"} 1",
        "locket_requests_by_key_total{key=\"ann\"} 4",
        "locket_requests_by_key_total{key=\"bob\"} 1",
        "locket_http_errors_total{kind=\"rate_limit_exceeded\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

/// Prompt and longest answer are charged at once, and what was not used is given back at the end.
#[tokio::test]
async fn tokens_per_minute() {
    let (server, _file) = with_file("[[key]]\nname = \"ann\"\nkey = \"k\"\ntokens-per-minute = 1000\n");
    let remaining =
        |answer: &Answer| answer.header("x-ratelimit-remaining-tokens").parse::<u64>().expect("a number");
    let done = chat(&server, "k", json!({"max_tokens": 300, "stop": "!"})).await;
    let used = done.ok()["usage"]["total_tokens"].as_u64().expect("a count");
    assert_eq!(done.header("x-ratelimit-limit-tokens"), "1000");
    assert!((1000 - used..=1000).contains(&remaining(&done)), "{} left, {used} used", remaining(&done));

    // Two that run at once do not fit; the model waits meanwhile.
    server.gate.set_closed(true);
    let body = chat_body("Hi", json!({"stream": true, "max_tokens": 480 - used}));
    let streamed = request(Method::POST, "/v1/chat/completions", "k", body);
    let running = server.router.clone().oneshot(streamed).await.expect("never fails");
    let held: u64 =
        running.headers()["x-ratelimit-remaining-tokens"].to_str().expect("ASCII").parse().expect("a number");
    assert!(held < 560, "{held}");
    let refused = chat(&server, "k", json!({"max_tokens": 480, "n": 2})).await;
    refused.is_error(429, "rate_limit_exceeded");
    assert!(!refused.header("retry-after").is_empty());
    server.gate.set_closed(false);
    drop(running);
    // The rest of what the stream held is free again.
    let after = remaining(&get(&server, "/v1/models", "k").await);
    assert!(after > held, "{after} left, {held} before");
    let metrics = get(&server, "/metrics", "").await.text;
    assert!(metrics.contains("locket_rate_limited_total{key=\"ann\",limit=\"tokens\"} 1"), "{metrics}");
}

/// What was embedded before another input failed is charged.
#[tokio::test]
async fn embeddings_are_charged_one_by_one() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "[[key]]\nname = \"ann\"\nkey = \"k\"\ntokens-per-minute = 1000\n")
        .expect("written");
    let config = ServerConfig { api_key_file: Some(file.path().into()), ..ServerConfig::default() };
    // One runs after the other.
    let server = TestServer::with(config, 1);
    let body = json!({"input": [vec![65; 400], vec![DEVICE_ERROR; 400]]});
    let failed = server.send(request(Method::POST, "/v1/embeddings", "k", body)).await;
    failed.is_error(500, "internal_error");
    let left: u64 = failed.header("x-ratelimit-remaining-tokens").parse().expect("a number");
    assert!((600..700).contains(&left), "{left}");
}

#[tokio::test]
async fn requests_at_once() {
    let (server, _file) = with_file("[[key]]\nname = \"ann\"\nkey = \"k\"\nmax-concurrent = 1\n");
    let streamed =
        request(Method::POST, "/v1/chat/completions", "k", chat_body("Hi", json!({"stream": true})));
    let running = server.router.clone().oneshot(streamed).await.expect("never fails");
    let refused = chat(&server, "k", json!({})).await;
    refused.is_error(429, "rate_limit_exceeded");
    assert_eq!(refused.header("retry-after"), "1");
    drop(running);
    chat(&server, "k", json!({})).await.ok();
}

#[tokio::test]
async fn service_tiers() {
    let (server, _file) = with_file(
        "[[key]]\nname = \"ann\"\nkey = \"k\"\nmay-prioritise = true\n[[key]]\nname = \"bob\"\nkey = \"b\"\n",
    );
    for (key, asked, used) in [
        ("k", "priority", "priority"),
        ("k", "fast", "fast"),
        ("k", "auto", "default"),
        ("b", "priority", "default"),
    ] {
        let answer = chat(&server, key, json!({"service_tier": asked, "max_tokens": 1})).await.ok();
        assert_eq!(answer["service_tier"], used, "{key} {asked}");
        let chunks = chat(&server, key, json!({"service_tier": asked, "max_tokens": 1, "stream": true}))
            .await
            .chunks();
        assert!(chunks.iter().all(|chunk| chunk["service_tier"] == used), "{chunks:?}");
    }
}

/// On every route that queues; an unnamed priority is 0.
#[tokio::test]
async fn only_keys_that_may_go_before_others() {
    let (server, _file) = with_file(
        "[[key]]\nname = \"ann\"\nkey = \"k\"\nmay-prioritise = true\n[[key]]\nname = \"bob\"\nkey = \"b\"\n",
    );
    for (path, field) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hi"}]})),
        ("/v1/completions", json!({"prompt": "Hi"})),
        ("/v1/responses", json!({"input": "Hi"})),
        ("/v1/embeddings", json!({"input": "Hi"})),
    ] {
        let send = async |key: &str, priority: Value| {
            let body = merged(field.clone(), json!({ "priority": priority }));
            server.send(request(Method::POST, path, key, body)).await
        };
        send("k", json!(-1)).await.ok();
        send("b", json!(1)).await.ok();
        let error = send("b", json!(-1)).await.is_error(403, "permission_denied");
        assert_eq!(error["param"], "priority");
        send("b", json!("first")).await.is_error(400, "invalid_type");
    }
}

/// A good file is in use at once; a broken one changes nothing and is counted.
#[tokio::test]
async fn key_files_can_be_read_again() {
    let (server, file) = with_file("[[key]]\nname = \"ann\"\nkey = \"old\"\n");
    let write = |text: &str| std::fs::write(file.path(), text).expect("written");
    chat(&server, "old", json!({})).await.ok();
    write("[[key]]\nname = \"bob\"\nkey = \"new\"\n");
    chat(&server, "new", json!({})).await.is_error(401, "invalid_api_key");
    server.state.reload();
    chat(&server, "new", json!({})).await.ok();
    chat(&server, "old", json!({})).await.is_error(401, "invalid_api_key");
    write("[[key]]\nname = ");
    server.state.reload();
    chat(&server, "new", json!({})).await.ok();
    let metrics = get(&server, "/metrics", "").await.text;
    for line in [
        "locket_reloads_total{file=\"keys\",result=\"ok\"} 1",
        "locket_reloads_total{file=\"keys\",result=\"failed\"} 1",
        "locket_requests_by_key_total{key=\"bob\"} 2",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    assert!(!metrics.contains("key=\"ann\""), "names that are gone are forgotten: {metrics}");
}
