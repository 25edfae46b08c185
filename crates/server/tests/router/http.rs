//! Everything around the answers: routes, headers, errors, limits, failure, shutdown.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::fake::{BEYOND, DEVICE_ERROR, NOT_FINITE, TestServer, chat_body, post};
use axum::{
    body::Body,
    http::{Method, Request},
};
use futures_util::StreamExt as _;
use locket_server::ServerConfig;
use proptest::prelude::*;
use serde_json::{Value, json};
use tower::ServiceExt as _;

#[tokio::test]
async fn operator_routes() {
    let server = TestServer::start();
    for path in ["/health", "/health/live", "/ping", "/health/"] {
        assert_eq!(server.get(path).await.ok(), json!({"status": "ok"}));
    }
    for path in ["/ready", "/health/ready"] {
        assert_eq!(server.get(path).await.ok(), json!({"status": "ready"}));
    }
    assert_eq!(server.get("/version").await.ok(), json!({"version": env!("CARGO_PKG_VERSION")}));
    let models = server.get("/v1/models/").await.ok();
    assert_eq!((&models["object"], &models["data"][1]["id"]), (&json!("list"), &json!("org/tiny")));
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny", "/v1/models/tiny"] {
        let model = server.get(path).await.ok();
        assert_eq!((&model["object"], &model["max_model_len"]), (&json!("model"), &json!(512)));
    }
    for path in ["/v1/models/other", "/v1/models/%FF"] {
        assert_eq!(server.get(path).await.is_error(404, "model_not_found")["param"], "model", "{path}");
    }
}

#[tokio::test]
async fn wrong_routes_methods_and_types() {
    let server = TestServer::start();
    server.get("/v2/chat").await.is_error(404, "not_found");
    for (method, path, allow) in [
        (Method::GET, "/v1/chat/completions", "POST"),
        (Method::DELETE, "/v1/models/tiny", "GET,HEAD"),
        (Method::POST, "/health", "GET,HEAD"),
        (Method::PUT, "/tokenize/", "POST"),
    ] {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
        let answer = server.send(request).await;
        answer.is_error(405, "method_not_allowed");
        assert_eq!(answer.header("allow"), allow, "{path}");
    }
    for path in [
        "/v1/responses/compact",
        "/v1/audio/speech",
        "/v1/images/generations",
        "/v1/files/a/content",
        "/v1/conversations/a/items",
        "/v1/assistants/a",
        "/v1/videos/a",
        "/v1/realtime",
        "/v1/realtime/sessions",
        "/v1/evals",
        "/v1/evals/a/runs",
        "/v1/containers/a",
    ] {
        let answer = server.post(path, &json!({})).await;
        answer.is_error(501, "not_implemented");
        assert_eq!(answer.header("x-should-retry"), "false");
    }
    let typed = |content_type: &str, body: &'static str| {
        Request::post("/v1/completions")
            .header("content-type", content_type)
            .body(Body::from(body))
            .expect("a request")
    };
    server.send(typed("text/plain", "{}")).await.is_error(415, "unsupported_media_type");
    server
        .send(typed("application/json; charset=latin1", "{}"))
        .await
        .is_error(415, "unsupported_media_type");
    let untyped =
        |body: &'static str| Request::post("/v1/completions").body(Body::from(body)).expect("a request");
    server.send(untyped("a=b")).await.is_error(415, "unsupported_media_type");
    server.send(untyped(r#"{"prompt": "x"}"#)).await.ok();
    server.send(post("/v1/completions", "{")).await.is_error(400, "invalid_json");
    server.send(post("/v1/completions", "[]")).await.is_error(400, "invalid_type");
}

#[tokio::test]
async fn bodies_are_bounded_with_and_without_a_length() {
    let server = TestServer::with(ServerConfig { max_body_bytes: 100, ..ServerConfig::default() }, 8);
    let long = "x".repeat(200);
    server.post("/v1/completions", &json!({ "prompt": long })).await.is_error(413, "request_too_large");
    let chunks = futures_util::stream::iter(vec![Ok::<_, std::io::Error>(long.clone()), Ok(long)]);
    server.send(post("/v1/completions", Body::from_stream(chunks))).await.is_error(413, "request_too_large");
    let declared = Request::post("/tokenize")
        .header("content-type", "application/json")
        .header("content-length", "101")
        .body(Body::empty())
        .expect("a request");
    server.send(declared).await.is_error(413, "request_too_large");
}

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let server = TestServer::start();
    let with_id = |id: &str, body: Value| {
        Request::post("/v1/completions")
            .header("content-type", "application/json")
            .header("x-request-id", id)
            .body(Body::from(body.to_string()))
            .expect("a request")
    };
    let body = json!({"prompt": "x", "max_tokens": 1, "request_id": "from-body"});
    assert_eq!(server.send(with_id("abc", body.clone())).await.header("x-request-id"), "abc");
    assert_eq!(server.post("/v1/completions", &body).await.header("x-request-id"), "from-body");
    let wrong = json!({"prompt": "x", "n": 0, "request_id": "from-body"});
    let refused = server.post("/v1/completions", &wrong).await;
    refused.is_error(400, "integer_below_min_value");
    assert_eq!(refused.header("x-request-id"), "from-body");
    let tokenized = server.post("/tokenize", &json!({"prompt": "x", "request_id": "from-body"})).await;
    assert!(tokenized.header("x-request-id").starts_with("req_"));
    assert_eq!(tokenized.header("x-ignored-fields"), "request_id");
    let made = server.send(with_id("not valid", json!({}))).await;
    assert!(made.header("x-request-id").starts_with("req_"));
    made.is_error(400, "missing_required_parameter");
    let load = Request::get("/v1/models").header("endpoint-load-metrics-format", "TEXT").body(Body::empty());
    let answer = server.send(load.expect("a request")).await;
    assert!(answer.header("endpoint-load-metrics").contains("kv_cache_usage_perc=0"));
}

#[tokio::test]
async fn lengths_and_sizes_that_cannot_work() {
    let server = TestServer::with(ServerConfig::default(), 2);
    let error = server.chat(&"x".repeat(600), json!({})).await.is_error(400, "context_length_exceeded");
    assert_eq!(error["param"], "messages");
    let body = json!({"prompt": "x".repeat(100), "max_tokens": 500});
    let error = server.post("/v1/completions", &body).await.is_error(400, "context_length_exceeded");
    assert_eq!(error["param"], "prompt");
    for number in ["512", "100", "500", "600"] {
        assert!(error["message"].as_str().is_some_and(|message| message.contains(number)), "{error}");
    }
    assert_eq!(server.chat("Hi", json!({"n": 3})).await.is_error(400, "invalid_value")["param"], "n");
    let body = json!({"prompt": vec!["x"; 17], "n": 2, "max_tokens": 1});
    let error = server.post("/v1/completions", &body).await.is_error(400, "invalid_value");
    assert_eq!(error["param"], "prompt");
    assert!(["34", "32"].iter().all(|number| error["message"].as_str().is_some_and(|m| m.contains(number))));
    let long = server.chat(&"x".repeat(9 << 20), json!({})).await;
    assert_eq!(long.is_error(400, "context_length_exceeded")["param"], "messages");
    let window = json!({"max_tokens": 400, "locket": {"kv_cache": {"method": "window", "slots": 4000}}});
    server.chat("Hi", window).await.ok();
    let error = server.chat("Hi", json!({"model": "gpt-4"})).await.is_error(404, "model_not_found");
    assert_eq!(error["param"], "model");
}

#[tokio::test]
async fn tokens_that_the_model_lacks_are_the_clients_error() {
    let server = TestServer::start();
    let message = json!([{"role": "user", "content": BEYOND, "tool_call_id": "a"}]);
    let rows = [
        ("/v1/completions", json!({ "prompt": BEYOND }), "prompt"),
        ("/tokenize", json!({ "prompt": BEYOND }), "prompt"),
        ("/v1/chat/completions", json!({ "messages": message }), "messages"),
        ("/v1/completions", json!({"prompt": "x", "bad_words": [BEYOND]}), "bad_words"),
    ];
    for (path, body, param) in rows {
        let error = server.post(path, &body).await.is_error(400, "invalid_value");
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().is_some_and(|message| message.contains(BEYOND)), "{error}");
    }
    let message = json!([{"role": "user", "content": "Hi", "tool_call_id": "a"}]);
    let answer = server.post("/tokenize", &json!({ "messages": message })).await;
    answer.ok();
    assert_eq!(answer.header("x-ignored-fields"), "messages[0].tool_call_id");
}

#[tokio::test]
async fn requests_above_the_limit_are_refused_early() {
    let config = ServerConfig { max_concurrent_requests: 1, ..ServerConfig::default() };
    let server = TestServer::with(config, 8);
    let body = chat_body("Hi", json!({"stream": true}));
    let running = server
        .router
        .clone()
        .oneshot(post("/v1/chat/completions", body.to_string()))
        .await
        .expect("never fails");
    let refused = server.chat("Hi", json!({})).await;
    refused.is_error(503, "server_overloaded");
    assert_eq!((refused.header("retry-after"), refused.header("retry-after-ms")), ("1", "1000"));
    drop(running);
    server.chat("Hi", json!({})).await.ok();
}

/// With one block, the second request can only run once the first one's block is free.
#[tokio::test]
async fn a_client_that_goes_away_frees_its_block_and_counts_as_499() {
    let server = TestServer::with(ServerConfig::default(), 1);
    let body = chat_body("Hi", json!({"stream": true, "ignore_eos": true}));
    let response = server
        .router
        .clone()
        .oneshot(post("/v1/chat/completions", body.to_string()))
        .await
        .expect("never fails");
    let mut events = response.into_body().into_data_stream();
    assert!(events.next().await.is_some_and(|event| event.is_ok()));
    drop(events);
    server.chat("Hi", json!({})).await.ok();
    let metrics = server.get("/metrics").await;
    assert!(metrics.header("content-type").starts_with("text/plain; version=0.0.4"));
    for line in [
        r#"locket_http_requests_total{method="POST",route="/v1/chat/completions",status="499"} 1"#,
        r#"locket_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1"#,
    ] {
        assert!(metrics.text.contains(line), "{}", metrics.text);
    }
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let server =
        TestServer::with(ServerConfig { keep_alive: Duration::from_millis(1), ..ServerConfig::default() }, 8);
    server.gate.set_closed(true);
    let body = chat_body("Hi", json!({"stream": true, "max_tokens": 2}));
    let response = server
        .router
        .clone()
        .oneshot(post("/v1/chat/completions", body.to_string()))
        .await
        .expect("never fails");
    let mut events = response.into_body().into_data_stream();
    let first = events.next().await.expect("a comment").expect("bytes");
    assert_eq!(&first[..], b": keep-alive\n\n");
    server.gate.set_closed(false);
    let rest: Vec<u8> = events.map(|bytes| bytes.expect("bytes").to_vec()).collect::<Vec<_>>().await.concat();
    assert!(String::from_utf8(rest).expect("text").ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn failures_inside_an_answer() {
    let server = TestServer::start();
    let answer = server.post("/v1/completions", &json!({"prompt": [NOT_FINITE]})).await;
    answer.is_error(500, "internal_error");
    assert_eq!(answer.header("x-should-retry"), "false");
    let body = json!({"prompt": [NOT_FINITE], "stream": true});
    let events = server.post("/v1/completions", &body).await.events();
    let last: Value = serde_json::from_str(events.last().expect("an event")).expect("JSON, not [DONE]");
    assert_eq!(last["error"]["code"], "internal_error");
    server.chat("still alive", json!({})).await.ok();

    let body = json!({"prompt": [DEVICE_ERROR], "stream": true});
    let events = server.post("/v1/completions", &body).await.events();
    assert!(events.last().is_some_and(|event| event.contains("internal_error")), "{events:?}");
    server.get("/health").await.is_error(503, "internal_error");
    server.get("/ready").await.is_error(503, "internal_error");
    server.chat("Hi", json!({})).await.is_error(500, "internal_error");
}

#[tokio::test]
async fn cors_is_off_until_origins_are_named() {
    let preflight = || {
        Request::options("/v1/chat/completions")
            .header("origin", "https://a.example")
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty())
            .expect("a request")
    };
    let off = TestServer::start().send(preflight()).await;
    assert!(!off.headers.contains_key("access-control-allow-origin"));
    assert!(!off.headers.contains_key("vary"));
    let config = ServerConfig { cors_origins: vec!["https://a.example".into()], ..ServerConfig::default() };
    let on = TestServer::with(config, 8).send(preflight()).await;
    assert_eq!((on.status.as_u16(), on.header("access-control-allow-origin")), (200, "https://a.example"));
}

/// One HTTP/1.1 exchange on its own connection.
fn exchange(address: SocketAddr, head: &str, body: &str) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(address)?;
    let length = body.len();
    write!(
        connection,
        "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_refuses_new_requests_and_finishes_running_ones() {
    let server = TestServer::start();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async { stopped.await.expect("the signal") };
    let serving = tokio::spawn(locket_server::serve(listener, server.state.clone(), shutdown));

    server.gate.set_closed(true);
    let body = chat_body("Hi", json!({"stream": true})).to_string();
    let mut running = TcpStream::connect(address).expect("a connection");
    write!(
        running,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let client = tokio::task::spawn_blocking(move || {
        // The head comes at once; the rest only after the gate has opened.
        let mut first = [0; 12];
        running.read_exact(&mut first).expect("a status line");
        assert_eq!(&first, b"HTTP/1.1 200");
        stop.send(()).expect("the server waits for it");
        while !exchange(address, "GET /ready", "").expect("an answer").starts_with("HTTP/1.1 503") {}
        let refused = exchange(address, "POST /v1/completions", r#"{"prompt": "x"}"#).expect("an answer");
        assert!(refused.contains("shutting_down") && refused.contains("retry-after"), "{refused}");
        assert!(exchange(address, "GET /health", "").expect("an answer").starts_with("HTTP/1.1 200"));
        running
    });
    let mut running = client.await.expect("no panic");
    server.gate.set_closed(false);
    let rest = tokio::task::spawn_blocking(move || {
        let mut rest = String::new();
        running.read_to_string(&mut rest).expect("the whole stream");
        rest
    });
    assert!(rest.await.expect("no panic").contains("data: [DONE]"));
    serving.await.expect("no panic").expect("a clean end");
}

/// JSON values, some of them with names that the routes know.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3.0..3.0).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        prop_oneof![Just("user"), Just("text"), Just("window"), Just("tiny")].prop_map(Value::from),
    ];
    let name = prop_oneof![
        "[a-z_]{1,12}",
        proptest::sample::select(vec![
            "messages",
            "prompt",
            "role",
            "content",
            "type",
            "text",
            "model",
            "max_tokens",
            "temperature",
            "n",
            "seed",
            "stop",
            "logit_bias",
            "stream",
            "stream_options",
            "include_usage",
            "logprobs",
            "top_logprobs",
            "locket",
            "kv_cache",
            "method",
            "slots",
            "tools",
            "response_format",
            "bad_words",
            "allowed_token_ids",
            "stop_token_ids",
            "truncate_prompt_tokens",
            "documents",
            "chat_template_kwargs",
            "min_tokens",
            "tokens",
        ])
        .prop_map(str::to_owned),
    ];
    leaf.prop_recursive(4, 40, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((name.clone(), inner), 0..8)
                .prop_map(|entries| Value::from(entries.into_iter().collect::<serde_json::Map<_, _>>())),
        ]
    })
}

/// Random and mutilated bodies are answered with 200 or a 4xx, and the server lives on.
#[test]
fn malformed_bodies_never_give_a_server_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let server = TestServer::start();
    let cases = (any_json(), any_json(), 0usize..4, any::<prop::sample::Index>(), any::<bool>(), 0u8..255);
    let config = ProptestConfig { cases: 2000, ..ProptestConfig::default() };
    proptest!(config, |((base, messages, path, place, is_mutilated, byte) in cases)| {
        let mut body = base;
        if let Value::Object(fields) = &mut body {
            fields.entry("max_tokens").or_insert(json!(2));
            fields.entry("messages").or_insert(messages.clone());
            fields.entry("prompt").or_insert(messages);
        }
        let mut bytes = body.to_string().into_bytes();
        if is_mutilated {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        let path = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"][path];
        let answer = runtime.block_on(server.send(post(path, bytes)));
        prop_assert!(answer.status == 200 || answer.status.is_client_error(), "{}: {}", answer.status, answer.text);
        if answer.status != 200 {
            answer.is_error(answer.status.as_u16(), answer.json()["error"]["code"].as_str().expect("a code"));
        }
    });
    runtime.block_on(async { server.chat("Hi", json!({})).await.ok() });
}
