//! Prompts in answers: echoed, and scored.

use locket_model::kv_cache::CacheMethod;
use locket_server::{CacheBounds, ServerConfig};
use serde_json::{Value, json};

use crate::fake::{IM_START, TestServer, chat_body, expected, merged};

/// Natural logarithm of the probability of a token with this logit: the script's has 20, its
/// neighbour 5 and the others 0.
fn logprob(logit: f64) -> f64 {
    logit - (20f64.exp() + 5f64.exp() + 257.0).ln()
}

fn assert_logprob(value: &Value, logit: f64) {
    let value = value.as_f64().expect("a number");
    assert!((value - logprob(logit)).abs() < 1e-5, "{value} for {logit}");
}

async fn completion(server: &TestServer, fields: Value) -> Value {
    let base = json!({"prompt": "GrüXe!", "temperature": 0, "echo": true, "logprobs": 1});
    server.post("/v1/completions", &merged(base, fields)).await.ok()
}

/// Nothing generated: the four arrays are the prompt's, without values for the first token.
#[tokio::test]
async fn a_text_is_scored_without_a_token() {
    let server = TestServer::start();
    let answer = completion(&server, json!({"max_tokens": 0})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("GrüXe!"), &json!("length")));
    let logprobs = &choice["logprobs"];
    // `ü` has two bytes, and `ß` of the script has two where `X` has one.
    assert_eq!(logprobs["tokens"], json!(["G", "r", "bytes:\\xc3", "bytes:\\xbc", "X", "e", "!"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 3, 4, 5]));
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    for (at, logit) in [(1, 20.0), (2, 20.0), (3, 20.0), (4, 0.0)] {
        assert_logprob(&logprobs["token_logprobs"][at], logit);
    }
    assert_eq!(logprobs["top_logprobs"][1].as_object().map(serde_json::Map::len), Some(1));
    // The actual token comes beside the likeliest one, from the same numbers.
    let top = logprobs["top_logprobs"][4].as_object().expect("an object");
    assert_eq!(top.keys().collect::<Vec<_>>(), ["bytes:\\xc3", "X"]);
    assert_eq!(top["X"], logprobs["token_logprobs"][4]);
    assert_logprob(&top["bytes:\\xc3"], 20.0);
    assert_eq!(
        (&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]),
        (&json!(7), &json!(0))
    );
}

/// One token more changes nothing of the prompt's values; ids give the same as text.
#[tokio::test]
async fn one_more_token_and_ids_change_nothing() {
    let server = TestServer::start();
    let alone = completion(&server, json!({"max_tokens": 0, "logprobs": 2})).await["choices"][0].clone();
    let ids: Vec<u8> = "GrüXe!".bytes().collect();
    for prompt in [json!("GrüXe!"), json!(ids), json!([ids])] {
        let fields = json!({"max_tokens": 1, "logprobs": 2, "prompt": prompt, "return_token_ids": true});
        let choice = completion(&server, fields).await["choices"][0].clone();
        let (_, next) = expected(7, 1);
        assert_eq!(choice["text"], format!("GrüXe!{next}"));
        for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let values = choice["logprobs"][key].as_array().expect("values");
            assert_eq!(values.len(), 8, "{key}");
            assert_eq!(&values[..7], alone["logprobs"][key].as_array().expect("values").as_slice(), "{key}");
        }
        assert_eq!(choice["logprobs"]["text_offset"][7], 6);
        assert_logprob(&choice["logprobs"]["token_logprobs"][7], 20.0);
        assert_eq!(choice["token_ids"].as_array().map(Vec::len), Some(1), "generated ones only");
    }
    let text = completion(&server, json!({"max_tokens": 1, "logprobs": null})).await;
    assert_eq!(text["choices"][0]["logprobs"], Value::Null);
    let special =
        completion(&server, json!({"prompt": [IM_START, 65], "max_tokens": 0, "logprobs": 0})).await;
    assert_eq!(special["choices"][0]["text"], "<|im_start|>A");
    assert_eq!(special["choices"][0]["logprobs"]["text_offset"], json!([0, 12]));
    let cut = completion(&server, json!({"truncate_prompt_tokens": 3, "max_tokens": 0})).await;
    assert_eq!(cut["choices"][0]["text"], "Xe!");
    assert_eq!(cut["choices"][0]["logprobs"]["tokens"], json!(["X", "e", "!"]));
}

/// The first chunk of each choice is its prompt; the pieces are those of the whole answer.
#[tokio::test]
async fn streams_begin_with_the_prompt() {
    let server = TestServer::start();
    for max_tokens in [0, 3] {
        let fields = json!({"prompt": ["Grü", "abc"], "n": 2, "max_tokens": max_tokens, "ignore_eos": true});
        let whole = completion(&server, fields.clone()).await;
        let body = merged(json!({"temperature": 0, "echo": true, "logprobs": 1, "stream": true}), fields);
        let chunks = server.post("/v1/completions", &body).await.chunks();
        for choice in whole["choices"].as_array().expect("choices") {
            let own: Vec<&Value> = chunks
                .iter()
                .map(|chunk| &chunk["choices"][0])
                .filter(|own| own["index"] == choice["index"])
                .collect();
            let prompt = if choice["index"].as_u64() < Some(2) { "Grü" } else { "abc" };
            assert_eq!(own[0]["text"], prompt);
            let text: String = own.iter().filter_map(|own| own["text"].as_str()).collect();
            assert_eq!(text, choice["text"]);
            for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let pieces = own.iter().filter_map(|own| own["logprobs"][key].as_array()).flatten();
                assert_eq!(
                    &pieces.cloned().collect::<Vec<_>>(),
                    choice["logprobs"][key].as_array().expect("values")
                );
            }
            assert_eq!(own.last().expect("an end")["finish_reason"], "length");
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_by_token_id() {
    let server = TestServer::start();
    let fields = json!({"prompt": ["GX", "G"], "echo": false, "logprobs": null, "max_tokens": 1, "n": 2, "prompt_logprobs": 2});
    let answer = completion(&server, fields).await;
    let choices = answer["choices"].as_array().expect("choices");
    let scores = &choices[0]["prompt_logprobs"];
    assert_eq!((scores.as_array().map(Vec::len), &scores[0]), (Some(2), &Value::Null));
    let keys: Vec<&String> = scores[1].as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["88", "114", "115"], "the prompt's own, then r and its neighbour");
    assert_eq!((&scores[1]["114"]["rank"], &scores[1]["114"]["decoded_token"]), (&json!(1), &json!("r")));
    assert_logprob(&scores[1]["115"]["logprob"], 5.0);
    // All others are equally likely: the lower ids come first.
    assert_eq!(scores[1]["88"]["rank"], 2 + 88 + 1);
    assert_eq!((&choices[1]["prompt_logprobs"], &choices[2]["prompt_logprobs"]), (scores, &json!([null])));
    assert_eq!(choices[0]["text"], expected(2, 1).1, "not echoed");

    let chat = server
        .chat("Hi", json!({"max_tokens": 2, "prompt_logprobs": 0, "return_token_ids": true}))
        .await
        .ok();
    let (scores, ids) = (chat["prompt_logprobs"].as_array().expect("scores"), &chat["prompt_token_ids"]);
    assert_eq!(scores.len(), ids.as_array().expect("ids").len());
    for (score, id) in scores.iter().zip(ids.as_array().expect("ids")).skip(1) {
        assert_eq!(score.as_object().expect("one").keys().collect::<Vec<_>>(), [&id.to_string()]);
    }
    assert!(server.chat("Hi", json!({"max_tokens": 2})).await.ok().get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn answers_of_too_many_numbers_are_refused() {
    let server = TestServer::start();
    let prompts = vec!["x".repeat(400); 16];
    let body = |fields| merged(json!({"prompt": prompts, "max_tokens": 0, "echo": true}), fields);
    let answer = server.post("/v1/completions", &body(json!({"logprobs": 20, "stream": true}))).await;
    let error = answer.is_error(400, "invalid_value");
    assert_eq!(error["param"], "prompt");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("134400") && text.contains("131072")));
    server.post("/v1/completions", &body(json!({"logprobs": 20}))).await.ok_status();
    server.post("/v1/completions", &body(json!({"logprobs": 19, "stream": true}))).await.ok_status();
}

/// Scoring with the full cache is the operator's choice, and another fingerprint.
#[tokio::test]
async fn scoring_may_use_the_full_cache() {
    let answers = async |scoring_full| {
        let cache = CacheBounds {
            allowed: vec![CacheMethod::Full, CacheMethod::Observed],
            method: CacheMethod::Observed,
            slots: 64,
            max_slots: 256,
            scoring_full,
            ..CacheBounds::default()
        };
        let server = TestServer::with(ServerConfig { cache, ..ServerConfig::default() }, 8);
        let scored = completion(&server, json!({"prompt": "x".repeat(200), "max_tokens": 0})).await;
        let plain = json!({"prompt": "x".repeat(200), "max_tokens": 1, "logprobs": 1});
        let plain = server.post("/v1/completions", &plain).await.ok();
        let named =
            json!({"prompt_logprobs": 1, "max_tokens": 1, "locket": {"kv_cache": {"method": "observed"}}});
        let named = server.chat("Hi", named).await.ok();
        [scored, plain, named]
            .map(|answer| (answer["usage"]["locket"].clone(), answer["system_fingerprint"].clone()))
    };
    let [scored, plain, _] = answers(false).await;
    assert_eq!((&scored.0["method"], &scored.0["exact"]), (&json!("observed"), &json!(false)));
    assert_eq!(scored.1, plain.1);
    let [full, plain_again, named] = answers(true).await;
    assert_eq!((&full.0["method"], &full.0["exact"]), (&json!("full"), &json!(true)));
    assert_eq!((plain_again.1, named.0["method"].clone()), (plain.1.clone(), json!("observed")));
    assert_ne!(full.1, plain.1);
}

/// An answer that goes on where the last message ends may begin with it.
#[tokio::test]
async fn chats_echo_a_begun_answer() {
    let server = TestServer::start();
    let begun = |content: Value, fields: Value| {
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]);
        let goes_on = json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false,
            "max_tokens": 4, "ignore_eos": true});
        chat_body("", merged(goes_on, fields))
    };
    let text = async |body| {
        let answer = server.post("/v1/chat/completions", &body).await.ok();
        answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
    };
    let own = text(begun(json!("So: "), json!({}))).await;
    let echoed = text(begun(json!("So: "), json!({"echo": true}))).await;
    assert_eq!(echoed, format!("So: {own}"));
    let parts = json!([{"type": "text", "text": "So"}, {"type": "text", "text": ": "}]);
    assert!(text(begun(parts, json!({"echo": true}))).await.starts_with("So: "));
    let chunks = server
        .post("/v1/chat/completions", &begun(json!("So: "), json!({"echo": true, "stream": true})))
        .await
        .chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[1]["choices"][0]["delta"], json!({"content": "So: "}));
    let streamed: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, echoed);
    // A question is not echoed.
    let asked = server.chat("Hi", json!({"echo": true, "max_tokens": 3})).await.ok();
    let plain = server.chat("Hi", json!({"max_tokens": 3})).await.ok();
    assert_eq!(asked["choices"][0]["message"], plain["choices"][0]["message"]);
}
