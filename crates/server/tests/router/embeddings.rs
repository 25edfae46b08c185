//! `/v1/embeddings` over the real engine; a row's hidden state is made of its token id.

use locket_engine::Pooling;
use locket_server::ServerConfig;
use serde_json::{Value, json};

use crate::fake::{DEVICE_ERROR, TestServer, merged};

/// The hidden state of a row with this token.
fn state(id: u32) -> Vec<f64> {
    (1..=32).map(|i| f64::from((id + 1) * i % 7) - 3.0).collect()
}

fn unit(mut vector: Vec<f64>) -> Vec<f32> {
    let length = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
    vector.iter_mut().for_each(|value| *value /= length);
    vector.into_iter().map(|value| value as f32).collect()
}

fn vector(value: &Value) -> Vec<f32> {
    value.as_array().expect("numbers").iter().map(|value| value.as_f64().expect("a number") as f32).collect()
}

fn assert_close(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} {expected:?}");
}

async fn embed(server: &TestServer, input: Value) -> Value {
    server.post("/v1/embeddings", &json!({ "input": input })).await.ok()
}

#[tokio::test]
async fn answers_have_the_shape_of_the_api() {
    let server = TestServer::start();
    let body =
        json!({"input": ["ab", "c"], "model": "org/tiny", "encoding_format": "float", "user": "u", "foo": 1});
    let answer = server.post("/v1/embeddings", &body).await;
    assert_eq!(answer.header("x-ignored-fields"), "foo");
    let answer = answer.ok();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("org/tiny")));
    assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
    let data = answer["data"].as_array().expect("data");
    assert_eq!(data.len(), 2);
    for (index, (item, last)) in data.iter().zip([b'b', b'c']).enumerate() {
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(index)));
        assert_close(&vector(&item["embedding"]), &unit(state(u32::from(last))));
    }
}

/// The bytes of base64 are those of the numbers, bit for bit.
#[tokio::test]
async fn both_encodings_say_the_same() {
    let server = TestServer::start();
    let floats = embed(&server, json!("abc")).await;
    let body = json!({"input": "abc", "encoding_format": "base64"});
    let text = server.post("/v1/embeddings", &body).await.ok();
    let text = text["data"][0]["embedding"].as_str().expect("text");
    assert!(!text.contains('\n'));
    let digit = |byte: u8| {
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|&b| b == byte)
    };
    let bits: Vec<u8> = text
        .bytes()
        .filter_map(digit)
        .flat_map(|digit| (0..6).rev().map(move |bit| (digit >> bit & 1) as u8))
        .collect();
    let bytes: Vec<u8> =
        bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |value, bit| value << 1 | bit)).collect();
    let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(numbers, vector(&floats["data"][0]["embedding"]));
}

/// Strings and ids, one and many, alone and together, more than run at once: the same vectors.
#[tokio::test]
async fn inputs_of_all_forms_in_any_number() {
    let server = TestServer::start();
    let texts: Vec<String> = (0..40).map(|at| format!("text {at}{}", "x".repeat(at * 3))).collect();
    let many = embed(&server, json!(texts)).await;
    let ids: Vec<Vec<u8>> = texts.iter().map(|text| text.bytes().collect()).collect();
    assert_eq!(embed(&server, json!(ids)).await["data"], many["data"]);
    for at in [0, 17, 39] {
        for one in [json!(texts[at]), json!(ids[at])] {
            let alone = embed(&server, one).await;
            assert_eq!(alone["data"][0]["embedding"], many["data"][at]["embedding"]);
        }
    }
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("route=\"/v1/embeddings\"") || metrics.contains("/v1/embeddings"), "{metrics}");
}

#[tokio::test]
async fn the_mean_of_all_states() {
    let config = ServerConfig { embedding_pooling: Pooling::Mean, ..ServerConfig::default() };
    let server = TestServer::with(config, 8);
    let text = "many words".repeat(20);
    let answer = embed(&server, json!(text)).await;
    let sum = text.bytes().fold(vec![0.0; 32], |sum, byte| {
        sum.iter().zip(state(u32::from(byte))).map(|(a, b)| a + b).collect()
    });
    assert_close(&vector(&answer["data"][0]["embedding"]), &unit(sum));
}

#[tokio::test]
async fn too_long_inputs_are_named() {
    let server = TestServer::start();
    let body = json!({"input": ["x".repeat(512), "x".repeat(513)]});
    let error = server.post("/v1/embeddings", &body).await.is_error(400, "context_length_exceeded");
    assert_eq!(error["param"], "input[1]");
    let message = error["message"].as_str().expect("text");
    assert!(message.contains("513") && message.contains("512") && !message.contains("answer"), "{message}");
    let alone = json!({"input": "x".repeat(513)});
    let error = server.post("/v1/embeddings", &alone).await.is_error(400, "context_length_exceeded");
    assert_eq!(error["param"], "input");
    for (keep, tokens) in [(-1, 1024), (10, 20)] {
        let cut = merged(body.clone(), json!({"truncate_prompt_tokens": keep}));
        assert_eq!(server.post("/v1/embeddings", &cut).await.ok()["usage"]["prompt_tokens"], tokens);
    }
}

#[tokio::test]
async fn refusals_and_failures() {
    let server = TestServer::start();
    for (body, code, param) in [
        (json!({"input": "a", "dimensions": 8}), "unsupported_parameter", "dimensions"),
        (json!({"input": ["a", ""]}), "empty_string", "input[1]"),
        (json!({"input": []}), "empty_array", "input"),
        (json!({}), "missing_required_parameter", "input"),
    ] {
        assert_eq!(server.post("/v1/embeddings", &body).await.is_error(400, code)["param"], param);
    }
    let broken = json!({"input": [[DEVICE_ERROR], [65]]});
    server.post("/v1/embeddings", &broken).await.is_error(500, "internal_error");
}
