//! Answers, streamed and not, over the real engine and a model whose text is known.

use crate::fake::{BEYOND, IM_END, IM_START, TestServer, expected, merged};
use serde_json::{Value, json};

/// `<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n`
fn chat_tokens(content: &str) -> usize {
    content.len() + 1 + 5 + 1 + 1 + 1 + 10
}

fn delta_text(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices").clone());
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| {
        choice["delta"]["content"].as_str().or(choice["text"].as_str()).map(str::to_owned)
    })
    .collect()
}

#[tokio::test]
async fn chat_answers_as_documented() {
    let server = TestServer::start();
    let answer = server.chat("Hi", json!({"model": "org/tiny", "metadata": {"a": "b"}, "foo": 1})).await;
    let body = answer.ok();
    let (ids, text) = expected(chat_tokens("Hi"), 999);
    assert_eq!(body["choices"][0]["message"], json!({"role": "assistant", "content": text, "refusal": null}));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["stop_reason"], Value::Null);
    assert_eq!(body["choices"][0]["logprobs"], Value::Null);
    assert_eq!(body["usage"]["prompt_tokens"], chat_tokens("Hi"));
    assert_eq!(body["usage"]["completion_tokens"], ids.len());
    assert_eq!(body["usage"]["total_tokens"], chat_tokens("Hi") + ids.len());
    assert_eq!(body["usage"]["prompt_tokens_details"], json!({"cached_tokens": 0, "image_tokens": 0}));
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("org/tiny")));
    assert_eq!(body["metadata"], json!({"a": "b"}));
    assert!(body["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-") && id.len() >= 33));
    assert!(body["system_fingerprint"].as_str().is_some_and(|print| print.starts_with("fp_")));
    assert_eq!(answer.header("x-ignored-fields"), "foo");
    assert_eq!(answer.header("openai-version"), "2020-10-01");
    assert!(answer.header("openai-processing-ms").parse::<u64>().is_ok());
}

#[tokio::test]
async fn a_stream_has_role_deltas_finish_usage_and_done() {
    let server = TestServer::start();
    let fields = json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 9, "ignore_eos": true});
    let answer = server.chat("Hi", fields.clone()).await;
    assert_eq!(answer.header("cache-control"), "no-cache");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    let chunks = answer.chunks();
    let role = &chunks[0]["choices"][0];
    assert_eq!(role["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!((&role["logprobs"], &role["finish_reason"]), (&Value::Null, &Value::Null));
    let unstreamed =
        server.chat("Hi", merged(fields, json!({"stream": false, "stream_options": null}))).await.ok();
    assert_eq!(delta_text(&chunks, 0), unstreamed["choices"][0]["message"]["content"]);
    let finish = &chunks[chunks.len() - 2]["choices"][0];
    assert_eq!((&finish["delta"], &finish["finish_reason"]), (&json!({}), &json!("length")));
    let last = &chunks[chunks.len() - 1];
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &unstreamed["usage"]));
    for chunk in &chunks {
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert!(chunk.get("usage").is_some());
        assert!(chunk["choices"].as_array().is_some_and(|choices| choices.len() <= 1));
    }
    assert!(chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    let plain = server.chat("Hi", json!({"stream": true, "max_tokens": 3})).await.chunks();
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none()));
    let running =
        json!({"stream": true, "max_tokens": 3, "stream_options": {"continuous_usage_stats": true}});
    let running = server.chat("Hi", running).await.chunks();
    assert_eq!(running[0]["usage"]["completion_tokens"], 0);
    assert_eq!(running[running.len() - 1]["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn stop_strings_and_stop_tokens() {
    let server = TestServer::start();
    // As long as the script, so that the answer begins at its first letter.
    let prompt = "x".repeat(crate::fake::script().len());
    let (ids, text) = expected(prompt.len(), 999);
    let stop = "answer";
    let before = text.split(stop).next().expect("the text before");
    let body = json!({"prompt": prompt, "max_tokens": 99, "temperature": 0, "stop": ["never", stop]});
    let answer = server.post("/v1/completions", &body).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], before);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(answer["usage"]["completion_tokens"], before.len() + stop.len());
    let chunks =
        server.post("/v1/completions", &merged(body.clone(), json!({"stream": true}))).await.chunks();
    assert_eq!(delta_text(&chunks, 0), before);
    let kept = merged(body, json!({"include_stop_str_in_output": true}));
    let answer = server.post("/v1/completions", &kept).await.ok();
    assert_eq!(answer["choices"][0]["text"], format!("{before}{stop}"));

    let body = json!({"prompt": prompt, "max_tokens": 99, "temperature": 0, "stop_token_ids": [ids[3]]});
    let answer = server.post("/v1/completions", &body).await.ok();
    assert_eq!(answer["choices"][0]["stop_reason"], ids[3]);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn logprobs_of_chat_join_to_the_content() {
    let server = TestServer::start();
    let fields = json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true});
    let body = server.chat("Hi", fields.clone()).await.ok();
    let choice = &body["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().expect("entries");
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| serde_json::from_value::<Vec<u8>>(entry["bytes"].clone()).expect("bytes"))
        .collect();
    assert_eq!(String::from_utf8(bytes).expect("text"), choice["message"]["content"]);
    assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().is_some_and(|top| top.len() == 2)));
    assert_eq!(choice["token_ids"].as_array().map(Vec::len), Some(entries.len()));
    assert_eq!(body["prompt_token_ids"][0], IM_START);

    let chunks = server.chat("Hi", merged(fields, json!({"stream": true}))).await.chunks();
    let streamed: Vec<&Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    assert_eq!(streamed, entries.iter().collect::<Vec<_>>());
    let ids: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten().collect();
    assert_eq!(ids, choice["token_ids"].as_array().expect("ids").iter().collect::<Vec<_>>());
    assert_eq!(chunks[0]["prompt_token_ids"], body["prompt_token_ids"]);
    assert!(chunks[1..].iter().all(|chunk| chunk.get("prompt_token_ids").is_none()));
}

#[tokio::test]
async fn completions_with_several_prompts_and_choices() {
    let server = TestServer::start();
    let body =
        json!({"prompt": ["abc", "abcdefg"], "n": 2, "max_tokens": 5, "temperature": 0, "logprobs": 1});
    let answer = server.post("/v1/completions", &body).await.ok();
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        let prompt_tokens = [3, 7][index / 2];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], expected(prompt_tokens, 5).1);
        assert_eq!(choice["logprobs"]["tokens"].as_array().map(Vec::len), Some(5));
        assert_eq!(choice["logprobs"]["text_offset"][0], 0);
    }
    assert_eq!(answer["usage"]["prompt_tokens"], 10);
    assert_eq!(answer["usage"]["completion_tokens"], 20);

    let streamed = merged(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.post("/v1/completions", &streamed).await.chunks();
    for index in 0..4u64 {
        assert_eq!(delta_text(&chunks, index), choices[index as usize]["text"]);
        let own: Vec<&Value> = chunks
            .iter()
            .flat_map(|chunk| chunk["choices"].as_array().expect("choices"))
            .filter(|choice| choice["index"] == index)
            .collect();
        let finished = own.iter().filter(|choice| !choice["finish_reason"].is_null()).count();
        assert_eq!((finished, own.last().expect("some")["finish_reason"].as_str()), (1, Some("length")));
        let offsets: Vec<&Value> =
            own.iter().filter_map(|choice| choice["logprobs"]["text_offset"].as_array()).flatten().collect();
        assert_eq!(
            offsets,
            choices[index as usize]["logprobs"]["text_offset"]
                .as_array()
                .expect("offsets")
                .iter()
                .collect::<Vec<_>>()
        );
    }
    assert_eq!(chunks[chunks.len() - 1]["usage"], answer["usage"]);
}

#[tokio::test]
async fn prompts_as_ids_and_empty_ones() {
    let server = TestServer::start();
    let complete = async |prompt: Value| {
        let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": 0, "return_token_ids": true});
        server.post("/v1/completions", &body).await.ok()
    };
    assert_eq!(complete(json!([97, 98, 99])).await["choices"][0]["text"], expected(3, 4).1);
    assert_eq!(complete(json!("")).await["prompt_token_ids"], json!([IM_START]));
    assert_eq!(complete(json!([[97], [98, 99]])).await["choices"][1]["prompt_token_ids"], json!([98, 99]));
}

#[tokio::test]
async fn masks_biases_and_truncation_reach_the_engine() {
    let server = TestServer::start();
    let complete = async |fields: Value| {
        let body = merged(json!({"prompt": "abcdef", "max_tokens": 3, "temperature": 0}), fields);
        server.post("/v1/completions", &body).await.ok()
    };
    assert_eq!(complete(json!({"allowed_token_ids": [65]})).await["choices"][0]["text"], "AAA");
    assert_eq!(complete(json!({"logit_bias": {"66": 100}})).await["choices"][0]["text"], "BBB");
    let truncated = complete(json!({"truncate_prompt_tokens": 2})).await;
    assert_eq!(truncated["usage"]["prompt_tokens"], 2);
    assert_eq!(truncated["choices"][0]["text"], expected(2, 3).1);
    let (ids, _) = expected(6, 3);
    let named = complete(json!({"logprobs": 0, "return_tokens_as_token_ids": true})).await;
    assert_eq!(named["choices"][0]["logprobs"]["tokens"][0], format!("token_id:{}", ids[0]));
    // The first token of the answer is masked, so the next likely one comes.
    let banned = complete(
        json!({"logit_bias": {ids[0].to_string(): -100}, "max_tokens": 1, "return_token_ids": true}),
    )
    .await;
    assert_eq!(banned["choices"][0]["token_ids"], json!([ids[0] + 1]));
    // Behind the end token the script starts again.
    let prompt_tokens = crate::fake::script().len() - 2;
    let past = json!({"prompt": "x".repeat(prompt_tokens), "ignore_eos": true, "return_token_ids": true});
    assert_eq!(complete(past.clone()).await["choices"][0]["token_ids"][1], IM_END);
    let shown = complete(merged(past, json!({"skip_special_tokens": false}))).await;
    assert!(shown["choices"][0]["text"].as_str().is_some_and(|text| text.contains("<|im_end|>")));
}

#[tokio::test]
async fn the_same_seed_gives_the_same_choices() {
    let server = TestServer::start();
    let fields = json!({"temperature": 2, "seed": 7, "n": 3, "max_tokens": 20, "ignore_eos": true,
                        "logit_bias": {"97": 19, "98": 19}});
    let first = server.chat("Hi", fields.clone()).await.ok();
    let second = server.chat("Hi", fields).await.ok();
    assert_eq!(first["choices"], second["choices"]);
    assert_ne!(first["choices"][0]["message"], first["choices"][1]["message"]);
    assert_eq!(first["usage"]["completion_tokens"], 60);
    assert_eq!(first["usage"]["prompt_tokens"], chat_tokens("Hi"));
}

#[tokio::test]
async fn tokenize_and_detokenize_agree_with_generation() {
    let server = TestServer::start();
    for path in ["/tokenize", "/v1/tokenize", "/tokenize/"] {
        let body = json!({"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": true});
        let answer = server.post(path, &body).await.ok();
        assert_eq!(answer["count"], chat_tokens("Hi"));
        assert_eq!(
            (&answer["max_model_len"], &answer["token_strs"][0]),
            (&json!(512), &json!("<|im_start|>"))
        );
    }
    // An empty prompt is the start token here as it is for completions.
    let answer = server.post("/tokenize", &json!({"prompt": ""})).await.ok();
    assert_eq!(answer["tokens"], json!([IM_START]));
    let answer = server.post("/tokenize", &json!({"prompt": "ab", "model": "tiny"})).await.ok();
    assert_eq!(answer, json!({"count": 2, "max_model_len": 512, "tokens": [97, 98], "token_strs": null}));
    for path in ["/detokenize", "/v1/detokenize"] {
        let answer = server.post(path, &json!({"tokens": [97, 98, IM_END]})).await.ok();
        assert_eq!(answer, json!({"prompt": "ab<|im_end|>"}));
    }
}

#[tokio::test]
async fn text_parts_and_developer_messages_are_rendered() {
    let server = TestServer::start();
    let body = json!({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]});
    let tokens = server.post("/tokenize", &body).await.ok()["tokens"].clone();
    let text = server.post("/detokenize", &json!({ "tokens": tokens })).await.ok()["prompt"].clone();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[tokio::test]
async fn too_long_prompts_are_named() {
    let server = TestServer::start();
    let long = "x".repeat(513);
    for (prompt, param) in [
        (json!(["a", long]), "prompt[1]"),
        (json!([[65], vec![65; 513]]), "prompt[1]"),
        (json!([long]), "prompt"),
        (json!(["a", BEYOND]), "prompt[1]"),
    ] {
        let answer = server.post("/v1/completions", &json!({ "prompt": prompt })).await;
        assert_eq!(answer.status, 400, "{}", answer.text);
        let error = answer.json()["error"].clone();
        assert_eq!(error["param"], param);
        let message = error["message"].as_str().expect("text");
        assert!(message.contains(&format!("`{param}`")), "{message}");
    }
}
