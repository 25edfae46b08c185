//! Chat and completions over a real socket: sensible text, fields honoured, arithmetic of usage.

use locket_tests::Server;
use serde_json::{Value, json};

fn content(response: &Value, choice: usize) -> &str {
    response["choices"][choice]["message"]["content"].as_str().expect("content")
}

fn question(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "model": "smollm2", "temperature": 0, "max_tokens": 40})
}

fn with(mut body: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn answers_the_capital_of_france() {
    let server = Server::start(&[]);
    let response = server.post_ok("/v1/chat/completions", &question("What is the capital of France?")).await;
    assert!(content(&response, 0).contains("Paris"), "{response}");
    assert_eq!(response["object"], "chat.completion");
    assert_eq!(response["choices"][0]["finish_reason"], "stop");
    let usage = &response["usage"];
    let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);
    let count = server
        .post_ok(
            "/tokenize",
            &json!({"messages": [{"role": "user", "content": "What is the capital of France?"}]}),
        )
        .await;
    assert_eq!(usage["prompt_tokens"], count["count"]);
}

#[tokio::test]
async fn sampling_is_reproducible_by_seed_and_differs_between_choices() {
    let server = Server::start(&[]);
    let body = with(
        question("Write a short story about a fox."),
        json!({"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 24, "ignore_eos": true}),
    );
    let first = server.post_ok("/v1/chat/completions", &body).await;
    let second = server.post_ok("/v1/chat/completions", &body).await;
    for choice in 0..3 {
        assert_eq!(first["choices"][choice]["index"], choice);
        assert_eq!(content(&first, choice), content(&second, choice));
    }
    assert_ne!(content(&first, 0), content(&first, 1));
    assert_eq!(first["usage"]["completion_tokens"], 72);
    let other = server.post_ok("/v1/chat/completions", &with(body, json!({"seed": 8}))).await;
    assert_ne!(content(&first, 0), content(&other, 0));
}

#[tokio::test]
async fn stop_strings_end_the_text_across_token_borders() {
    let server = Server::start(&[]);
    let body = question("What is the capital of France?");
    let whole = server.post_ok("/v1/chat/completions", &body).await;
    let text = content(&whole, 0);
    // Every substring of three characters is a stop string somewhere inside or across tokens.
    let characters: Vec<char> = text.chars().collect();
    for start in 1..characters.len().min(20) - 3 {
        let stop: String = characters[start..start + 3].iter().collect();
        let response =
            server.post_ok("/v1/chat/completions", &with(body.clone(), json!({"stop": [stop]}))).await;
        let expected = &text[..text.find(&stop).unwrap()];
        assert_eq!(content(&response, 0), expected, "stop {stop:?}");
        assert_eq!(response["choices"][0]["finish_reason"], "stop");
        assert_eq!(response["choices"][0]["stop_reason"], stop);
    }
}

#[tokio::test]
async fn logprobs_are_of_the_tokens_and_join_to_the_text() {
    let server = Server::start(&[]);
    let body = with(question("Name three colours."), json!({"logprobs": true, "top_logprobs": 3}));
    let response = server.post_ok("/v1/chat/completions", &body).await;
    let entries = response["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), content(&response, 0));
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the sampled token is the most likely one.
        assert_eq!(top[0]["token"], entry["token"]);
        assert_eq!(top[0]["logprob"], entry["logprob"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[tokio::test]
async fn completions_take_text_and_ids_and_report_logprobs() {
    let server = Server::start(&[]);
    let tokens = server.post_ok("/tokenize", &json!({"prompt": "The sky is"})).await["tokens"].clone();
    let body =
        json!({"model": "smollm2", "prompt": "The sky is", "max_tokens": 6, "temperature": 0, "logprobs": 2});
    let text = server.post_ok("/v1/completions", &body).await;
    let ids = server.post_ok("/v1/completions", &with(body.clone(), json!({"prompt": tokens}))).await;
    assert_eq!(text["choices"][0]["text"], ids["choices"][0]["text"]);
    let logprobs = &text["choices"][0]["logprobs"];
    let joined: String =
        logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(text["choices"][0]["text"], joined);
    for name in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[name].as_array().unwrap().len(), 6, "{name}");
    }
    let many = server
        .post_ok("/v1/completions", &with(body, json!({"prompt": ["The sky is", "Two plus two is"], "n": 2})))
        .await;
    let choices = many["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert_eq!(choices[0]["text"], choices[1]["text"]);
    assert_eq!(choices[0]["text"], text["choices"][0]["text"]);
}

#[tokio::test]
async fn biases_and_masks_are_obeyed() {
    let server = Server::start(&[]);
    let token = |text: &'static str| {
        let server = &server;
        async move { server.post_ok("/tokenize", &json!({"prompt": text})).await["tokens"][0].clone() }
    };
    let (yes, no) = (token("yes").await, token("no").await);
    let body = question("Is the sky blue?");
    let forced = with(body.clone(), json!({"allowed_token_ids": [yes], "max_tokens": 3}));
    let response = server.post_ok("/v1/chat/completions", &forced).await;
    assert_eq!(content(&response, 0), "yesyesyes");
    assert_eq!(response["choices"][0]["finish_reason"], "length");
    let biased = with(body, json!({"logit_bias": {no.to_string(): 100}, "max_tokens": 2}));
    let response = server.post_ok("/v1/chat/completions", &biased).await;
    assert_eq!(content(&response, 0), "nono");
}

#[tokio::test]
async fn window_cache_answers_beyond_its_slots() {
    let server = Server::start(&["--cache-method", "window", "--cache-slots", "64", "--cache-ring", "64"]);
    let body =
        with(question("Count from one to fifty in words."), json!({"max_tokens": 300, "ignore_eos": true}));
    let response = server.post_ok("/v1/chat/completions", &body).await;
    assert_eq!(response["usage"]["completion_tokens"], 300);
}
