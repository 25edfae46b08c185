//! Texts scored the way evaluation harnesses do it, and embeddings, over the socket.

use futures_util::future::join_all;
use locket_tests::Server;
use serde_json::{Value, json};

const TEXT: &str = "The capital of France is Paris, and the largest city of Germany is Zürich.";

fn scoring(prompt: impl Into<Value>, max_tokens: u32) -> Value {
    json!({"prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": true})
}

async fn ids(server: &Server, text: &str) -> Vec<u32> {
    let tokens = server.post_ok("/tokenize", &json!({ "prompt": text })).await["tokens"].clone();
    serde_json::from_value(tokens).unwrap()
}

/// The log-probability of each token after those before it, one request each: the token is the only
/// one allowed, and its log-probability is the model's own.
async fn token_by_token(server: &Server, ids: &[u32]) -> Vec<Value> {
    let one = async |at: usize| {
        let body = json!({"prompt": ids[..at], "max_tokens": 1, "temperature": 0, "logprobs": 1,
            "allowed_token_ids": [ids[at]], "ignore_eos": true});
        server.post_ok("/v1/completions", &body).await["choices"][0]["logprobs"].clone()
    };
    join_all((1..ids.len()).map(one)).await
}

/// As text and as ids, with no token more and with one, alone and in a batch: the same numbers, and
/// those that generation gives.
#[tokio::test]
async fn a_text_has_the_scores_of_its_tokens() {
    for cache in [&["--cache-method", "full"][..], &[]] {
        let server = Server::start(cache);
        let ids = ids(&server, TEXT).await;
        let fed = token_by_token(&server, &ids).await;
        let bodies =
            [scoring(TEXT, 0), scoring(TEXT, 1), scoring(ids.clone(), 0), scoring(json!([ids.clone()]), 1)];
        let busy = (0..12).map(|number| {
            json!({"prompt": "Tell me more. ".repeat(5 + number), "max_tokens": 20, "ignore_eos": true})
        });
        let all: Vec<Value> = bodies.into_iter().chain(busy).collect();
        let answers = join_all(all.iter().map(|body| server.post_ok("/v1/completions", body))).await;
        for (answer, max_tokens) in answers.iter().zip([0, 1, 0, 1]) {
            let logprobs = &answer["choices"][0]["logprobs"];
            let values = logprobs["token_logprobs"].as_array().unwrap();
            assert_eq!(values.len(), ids.len() + max_tokens);
            assert!(values[0].is_null() && logprobs["top_logprobs"][0].is_null());
            for (at, fed) in (1..).zip(&fed) {
                assert_eq!(values[at], fed["token_logprobs"][0], "token {at}");
                assert_eq!(logprobs["top_logprobs"][at], fed["top_logprobs"][0], "token {at}");
            }
            assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with(TEXT));
            assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
        }
        let sum = |values: &[Value]| values.iter().filter_map(Value::as_f64).sum::<f64>();
        let scored = sum(answers[0]["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap());
        assert!(scored < -10.0 && scored > -200.0, "{scored}");
    }
}

/// The way `lm-eval` tells whether a continuation is what greedy decoding gives: each token's value is
/// the largest of its alternatives.
#[tokio::test]
async fn greedy_continuations_are_recognised() {
    let server = Server::start(&[]);
    let context = "The capital of France is";
    let body = json!({"prompt": context, "max_tokens": 6, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let greedy = server.post_ok("/v1/completions", &body).await;
    let to_ids = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
    let context = to_ids(&greedy["prompt_token_ids"]);
    let greedy = to_ids(&greedy["choices"][0]["token_ids"]);
    let mut other = greedy.clone();
    other[2] = 17;
    for (continuation, is_greedy) in [(greedy, true), (other, false)] {
        let prompt = [context.clone(), continuation].concat();
        let answer = server.post_ok("/v1/completions", &scoring(prompt, 1)).await;
        let logprobs = &answer["choices"][0]["logprobs"];
        let values = &logprobs["token_logprobs"].as_array().unwrap()[context.len()..];
        let tops = &logprobs["top_logprobs"].as_array().unwrap()[context.len()..];
        let is_best = |(value, top): (&Value, &Value)| {
            let values = top.as_object().unwrap().values().filter_map(Value::as_f64);
            value.as_f64().unwrap() == values.fold(f64::NEG_INFINITY, f64::max)
        };
        // The last one is the token more.
        assert_eq!(values.iter().zip(tops).take(6).all(is_best), is_greedy);
    }
}

#[tokio::test]
async fn embeddings_are_unit_vectors_and_the_same_in_any_company() {
    for pooling in ["last", "mean"] {
        let server = Server::start(&["--embedding-pooling", pooling]);
        let texts: Vec<String> =
            (0..24).map(|number| format!("Text {number}. {}", "More. ".repeat(number * 2))).collect();
        let embed = async |input: Value| server.post_ok("/v1/embeddings", &json!({ "input": input })).await;
        let together = embed(json!(texts)).await;
        let data = together["data"].as_array().unwrap();
        assert_eq!(data.len(), 24);
        for (item, text) in data.iter().zip(&texts).step_by(5) {
            let alone = embed(json!(text)).await;
            assert_eq!(alone["data"][0]["embedding"], item["embedding"], "the same bits");
            let numbers: Vec<f64> = serde_json::from_value(item["embedding"].clone()).unwrap();
            assert_eq!(numbers.len(), 576);
            let length: f64 = numbers.iter().map(|number| number * number).sum();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
        }
        let base64 = json!({"input": texts[3], "encoding_format": "base64"});
        let base64 = server.post_ok("/v1/embeddings", &base64).await;
        // Four bytes a number, four characters for three bytes.
        assert_eq!(base64["data"][0]["embedding"].as_str().map(str::len), Some(576 * 4 / 3 * 4));
    }
}
