//! Streams: framing, order of events, and that streamed equals unstreamed.

use futures_util::future::join_all;
use locket_tests::{Server, chat_text, finish_reason};
use serde_json::{Value, json};

fn body(fields: Value) -> Value {
    let mut body = json!({
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me about rivers. Use an emoji and the word naïve."}],
        "max_tokens": 60,
        "seed": 3,
    });
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn streamed_equals_unstreamed() {
    let server = Server::start(&[]);
    let variants = [
        json!({"temperature": 0}),
        json!({"temperature": 1.2, "n": 3}),
        json!({"temperature": 0, "stop": [". "]}),
        json!({"temperature": 0, "stop": ["er"], "include_stop_str_in_output": true}),
        json!({"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.02, "repetition_penalty": 1.1}),
        json!({"temperature": 0.7, "frequency_penalty": 0.5, "presence_penalty": 0.5, "ignore_eos": true}),
    ];
    join_all(variants.into_iter().map(|fields| async {
        let plain = server.post_ok("/v1/chat/completions", &body(fields.clone())).await;
        let mut streamed = body(fields);
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let chunks = server.stream("/v1/chat/completions", &streamed).await;
        for choice in plain["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap();
            assert_eq!(chat_text(&chunks, index), choice["message"]["content"].as_str().unwrap());
            assert_eq!(finish_reason(&chunks, index), choice["finish_reason"].as_str().unwrap());
        }
        let (usage, rest) = chunks.split_last().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"]["completion_tokens"], plain["usage"]["completion_tokens"]);
        assert_eq!(usage["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
        assert!(rest.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    }))
    .await;
}

#[tokio::test]
async fn events_come_in_the_documented_order() {
    let server = Server::start(&[]);
    let chunks = server
        .stream("/v1/chat/completions", &body(json!({"stream": true, "temperature": 0, "ignore_eos": true})))
        .await;
    let first = &chunks[0];
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], first["id"]);
        assert_eq!(chunk["created"], first["created"]);
        assert_eq!(chunk["system_fingerprint"], first["system_fingerprint"]);
        assert!(chunk.get("usage").is_none());
    }
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    for chunk in &chunks[1..chunks.len() - 1] {
        assert!(chunk["choices"][0]["finish_reason"].is_null());
        assert!(!chunk["choices"][0]["delta"]["content"].as_str().unwrap().is_empty());
        assert!(chunk["choices"][0]["delta"].get("role").is_none());
    }
}

#[tokio::test]
async fn streamed_logprobs_belong_to_their_deltas() {
    let server = Server::start(&[]);
    let fields = json!({"stream": true, "temperature": 0, "logprobs": true, "top_logprobs": 1});
    let chunks = server.stream("/v1/chat/completions", &body(fields)).await;
    let mut compared = 0;
    for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
        let Some(text) = choice["delta"]["content"].as_str().filter(|text| !text.is_empty()) else {
            continue;
        };
        let bytes: Vec<u8> = choice["logprobs"]["content"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|entry| entry["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(bytes, text.as_bytes());
        compared += 1;
    }
    assert!(compared > 10, "only {compared} deltas had text");
}

#[tokio::test]
async fn completions_stream_too() {
    let server = Server::start(&[]);
    let request = json!({"model": "smollm2", "prompt": ["One, two,", "Red, green,"], "max_tokens": 12, "temperature": 0});
    let plain = server.post_ok("/v1/completions", &request).await;
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let chunks = server.stream("/v1/completions", &streamed).await;
    for choice in plain["choices"].as_array().unwrap() {
        let text: String = chunks
            .iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap())
            .filter(|part| part["index"] == choice["index"])
            .map(|part| part["text"].as_str().unwrap())
            .collect();
        assert_eq!(text, choice["text"].as_str().unwrap());
    }
}
