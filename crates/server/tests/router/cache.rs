//! What requests say about the cache, what answers say of it, and turns that come back.

use locket_model::kv_cache::CacheMethod;
use locket_server::{CacheBounds, ServerConfig};
use serde_json::{Value, json};

use crate::fake::{FORTY_TWO, TestServer, merged};

/// Slots 64, ring 64.
fn folding() -> CacheBounds {
    CacheBounds {
        allowed: vec![CacheMethod::Full, CacheMethod::Window, CacheMethod::Observed],
        method: CacheMethod::Observed,
        slots: 64,
        max_slots: 256,
        ..CacheBounds::default()
    }
}

fn server(cache: CacheBounds) -> TestServer {
    TestServer::with(ServerConfig { cache, ..ServerConfig::default() }, 8)
}

fn completion(prompt_tokens: usize, max_tokens: u32, fields: Value) -> Value {
    let base = json!({"prompt": "x".repeat(prompt_tokens), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    merged(base, fields)
}

#[tokio::test]
async fn usage_says_whether_attention_was_exact() {
    let server = server(folding());
    let usage =
        async |body: Value| server.post("/v1/completions", &body).await.ok()["usage"]["locket"].clone();
    let exact = json!({"exact": true, "folded_tokens": 0, "method": "observed", "slots": 64});
    assert_eq!(usage(completion(10, 5, json!({}))).await, exact);
    assert_eq!(usage(completion(100, 28, json!({}))).await, exact);
    // The last token is not run: 139 tokens are, 64 of them stay as they were.
    let folded = json!({"exact": false, "folded_tokens": 75, "method": "observed", "slots": 64});
    assert_eq!(usage(completion(100, 40, json!({"n": 2}))).await, folded);
    let full = json!({"locket": {"kv_cache": {"method": "full"}}});
    assert_eq!(
        usage(completion(100, 40, full)).await,
        json!({"exact": true, "folded_tokens": 0, "method": "full"})
    );
    let window = json!({"locket": {"kv_cache": {"method": "window", "slots": 100}}});
    assert_eq!(
        usage(completion(100, 40, window)).await,
        json!({"exact": true, "folded_tokens": 0, "method": "window", "slots": 100})
    );
    // A stop string ends the answer before the engine says so.
    let stopped = usage(completion(150, 200, json!({"stop": "answer"}))).await;
    assert_eq!(stopped["exact"], false);
    assert!(stopped["folded_tokens"].as_u64().is_some_and(|folded| folded >= 86), "{stopped}");

    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.post("/v1/completions", &completion(100, 40, streamed.clone())).await.chunks();
    assert_eq!(chunks[chunks.len() - 1]["usage"]["locket"], folded);
    let chat = merged(streamed, json!({"max_tokens": 40, "ignore_eos": true}));
    let chunks = server.chat(&"x".repeat(200), chat.clone()).await.chunks();
    let unstreamed = merged(chat, json!({"stream": false, "stream_options": null}));
    let body = server.chat(&"x".repeat(200), unstreamed).await.ok();
    assert_eq!(body["usage"]["locket"]["exact"], false);
    assert_eq!(chunks[chunks.len() - 1]["usage"], body["usage"]);
}

#[tokio::test]
async fn exact_answers_end_or_are_refused_before_anything_folds() {
    let server = server(folding());
    let exact = json!({"locket": {"require_exact": true}});
    let body = server.post("/v1/completions", &completion(60, 99, exact.clone())).await.ok();
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    // 64 tokens are run; the one after them is sampled and never run.
    assert_eq!(body["usage"]["total_tokens"], 65);
    assert_eq!(body["usage"]["locket"]["exact"], true);
    let refused = server.post("/v1/completions", &completion(65, 9, exact.clone())).await;
    let error = refused.is_error(400, "exact_length_exceeded");
    assert_eq!(error["param"], "prompt");
    let message = error["message"].as_str().expect("a message");
    for part in ["65 tokens", "64 only", "at most 256", "`full`", "`locket.require_exact`"] {
        assert!(message.contains(part), "{message}");
    }
    let error = server.chat(&"x".repeat(99), exact.clone()).await.is_error(400, "exact_length_exceeded");
    assert_eq!(error["param"], "messages");
    let full = json!({"locket": {"require_exact": true, "kv_cache": {"method": "full"}}});
    server.post("/v1/completions", &completion(65, 9, full)).await.ok();

    let strict = self::server(CacheBounds { require_exact: true, ..folding() });
    strict
        .post("/v1/completions", &completion(65, 9, json!({})))
        .await
        .is_error(400, "exact_length_exceeded");
    let relaxed = json!({"locket": {"require_exact": false}});
    strict.post("/v1/completions", &completion(65, 9, relaxed)).await.ok();
}

#[tokio::test]
async fn limits_of_the_operator() {
    let server = server(CacheBounds { max_full_len: 200, ..folding() });
    let ask = async |kv_cache: Value| {
        let body = completion(4, 4, json!({"locket": {"kv_cache": kv_cache}}));
        server.post("/v1/completions", &body).await
    };
    let error = ask(json!({"method": "tova"})).await.is_error(400, "unsupported_value");
    assert_eq!(error["param"], "locket.kv_cache.method");
    assert!(error["message"].as_str().is_some_and(|message| message.contains("full, window, observed")));
    let error = ask(json!({"slots": 257})).await.is_error(400, "integer_above_max_value");
    assert_eq!(error["param"], "locket.kv_cache.slots");
    ask(json!({"slots": 256, "sinks": 8, "recent": 100})).await.ok();
    // A method that keeps all ends earlier than one that folds.
    let full = json!({"locket": {"kv_cache": {"method": "full"}}});
    let error = server.post("/v1/completions", &completion(190, 20, full)).await;
    let error = error.is_error(400, "context_length_exceeded");
    assert!(
        error["message"].as_str().is_some_and(|message| message.contains("200") && message.contains("folds"))
    );
    server.post("/v1/completions", &completion(190, 20, json!({}))).await.ok();

    let card = server.get("/v1/models/tiny").await.ok();
    let kv_cache = json!({"method": "observed", "methods": ["full", "window", "observed"], "slots": 64,
                          "ring": 64, "min_slots": 16, "max_slots": 256});
    assert_eq!(card["locket"], json!({"kv_cache": kv_cache, "require_exact": false}));
    // Another size could give another text for the same seed.
    let print = async |kv_cache: Value| ask(kv_cache).await.ok()["system_fingerprint"].clone();
    assert_eq!(print(json!({})).await, print(json!({"slots": 64})).await);
    assert_ne!(print(json!({})).await, print(json!({"slots": 65})).await);
    assert_ne!(print(json!({})).await, print(json!({"recent": 3})).await);
}

/// A conversation that sends back what it got; returns prompt ids and answer of each turn.
async fn talk(server: &TestServer, turns: usize, fields: Value) -> Vec<Value> {
    let mut messages = vec![json!({"role": "system", "content": "Be brief."})];
    let mut bodies: Vec<Value> = Vec::new();
    for turn in 0..turns {
        // As long as the script, so that every answer is a whole one.
        messages.push(json!({"role": "user", "content": format!("Question {turn}: 42?")}));
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": 60, "ignore_eos": false,
                          "return_token_ids": true});
        let body = server.post("/v1/chat/completions", &merged(body, fields.clone())).await.ok();
        messages.push(json!({"role": "assistant", "content": body["choices"][0]["message"]["content"]}));
        bodies.push(body);
    }
    bodies
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

#[tokio::test]
async fn a_returned_turn_is_made_of_the_sampled_tokens_and_not_run_again() {
    let server = server(CacheBounds { snapshots: true, ..folding() });
    let turns = talk(&server, 6, json!({})).await;
    let mut has_split = false;
    for pair in turns.windows(2) {
        let [first, second] = pair else { continue };
        let (prompt, answer) = (ids(&first["prompt_token_ids"]), ids(&first["choices"][0]["token_ids"]));
        let known = [prompt, answer.clone()].concat();
        let next = ids(&second["prompt_token_ids"]);
        assert!(next.starts_with(&known));
        assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], known.len());
        // The tokenizer would have made one token of "42".
        has_split |= answer.windows(2).any(|pair| pair == [52, 50]);
        assert!(!answer.contains(&FORTY_TWO));
    }
    assert!(has_split, "some answer has the tokens that no tokenizer makes");
    assert_eq!(turns[5]["usage"]["locket"]["exact"], false);

    // The prompt that another tenant, or a server without memory, would see.
    let plain = |body: &Value| ids(&body["prompt_token_ids"]).iter().filter(|id| **id == FORTY_TWO).count();
    let others = talk(&server, 2, json!({"cache_salt": "other"})).await;
    assert_eq!(others[0]["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(others[1]["prompt_token_ids"], turns[1]["prompt_token_ids"]);
    let forgetful = TestServer::with(
        ServerConfig { cache: folding(), turn_memory_bytes: 0, ..ServerConfig::default() },
        8,
    );
    let forgotten = talk(&forgetful, 6, json!({})).await;
    let texts = |bodies: &[Value]| -> Vec<Value> {
        bodies.iter().map(|body| body["choices"][0]["message"]["content"].clone()).collect()
    };
    assert_eq!(texts(&forgotten)[0], texts(&turns)[0]);
    assert!(plain(&forgotten[5]) > plain(&turns[5]));
    assert_eq!(forgotten[5]["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn streamed_turns_are_remembered_too_and_tokenize_shows_them() {
    let server = server(CacheBounds { snapshots: true, ..folding() });
    let question = json!({"role": "user", "content": "Hi"});
    // "42" is in the answer, whatever comes before it.
    let fields = json!({"stream": true, "return_token_ids": true, "max_tokens": 60, "ignore_eos": false});
    let first = merged(json!({"messages": [question], "temperature": 0}), fields);
    let chunks = server.post("/v1/chat/completions", &first).await.chunks();
    let choices = || chunks.iter().filter_map(|chunk| chunk["choices"].get(0));
    let text: String = choices().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    let answer: Vec<u32> = choices()
        .filter(|choice| choice["token_ids"].is_array())
        .flat_map(|choice| ids(&choice["token_ids"]))
        .collect();
    let known = [ids(&chunks[0]["prompt_token_ids"]), answer].concat();
    let messages =
        json!([question, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]);
    let tokens = server.post("/tokenize", &json!({ "messages": messages })).await.ok()["tokens"].clone();
    assert!(ids(&tokens).starts_with(&known));
    let second = json!({"messages": messages, "temperature": 0, "max_tokens": 3, "return_token_ids": true});
    let body = server.post("/v1/chat/completions", &second).await.ok();
    assert_eq!(body["prompt_token_ids"], tokens);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], known.len());
}

#[tokio::test]
async fn remembered_turns_outlive_the_server() {
    let directory = tempfile::tempdir().expect("a directory");
    let start = || {
        let config = ServerConfig {
            cache: folding(),
            turn_file: Some(directory.path().join("turns")),
            ..ServerConfig::default()
        };
        TestServer::with(config, 8)
    };
    let server = start();
    let turns = talk(&server, 6, json!({})).await;
    drop(server);
    let server = start();
    let messages: Vec<Value> = (0..6)
        .flat_map(|turn| {
            let answer = &turns[turn]["choices"][0]["message"]["content"];
            [
                json!({"role": "user", "content": format!("Question {turn}: 42?")}),
                json!({"role": "assistant", "content": answer}),
            ]
        })
        .collect();
    let messages = [&[json!({"role": "system", "content": "Be brief."})], messages.as_slice()].concat();
    let tokens = server.post("/tokenize", &json!({ "messages": messages })).await.ok()["tokens"].clone();
    let known = [ids(&turns[5]["prompt_token_ids"]), ids(&turns[5]["choices"][0]["token_ids"])].concat();
    assert!(ids(&tokens).starts_with(&known));
}

/// A client that says something else than the answer goes on from the question at least.
#[tokio::test]
async fn an_edited_answer_goes_on_from_the_prompt() {
    let server = server(CacheBounds { snapshots: true, ..folding() });
    let question = json!({"role": "user", "content": "Hi"});
    let first = json!({"messages": [question], "temperature": 0, "max_tokens": 9});
    let first = server.post("/v1/chat/completions", &first).await.ok();
    let messages =
        json!([question, {"role": "assistant", "content": "No."}, {"role": "user", "content": "?"}]);
    let second = json!({"messages": messages, "temperature": 0, "max_tokens": 3});
    let body = server.post("/v1/chat/completions", &second).await.ok();
    let header = "<|im_start|>assistant\n".len() - "<|im_start|>".len() + 1;
    let before_header = first["usage"]["prompt_tokens"].as_u64().expect("a number") - header as u64;
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], before_header);
}
