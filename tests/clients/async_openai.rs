//! The Rust client `async-openai`: its types are narrower than JSON, so what it reads is well-formed.

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::responses::{ResponseStreamEvent, Status},
};
use futures_util::StreamExt as _;
use locket_tests::Server;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A request in the client's own type.
fn typed<T: DeserializeOwned>(request: Value) -> T {
    serde_json::from_value(request).expect("a request of the client's type")
}

fn question(extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let mut request = json!({"model": "smollm2", "messages": messages, "temperature": 0.0, "max_tokens": 40});
    for (name, value) in extra.as_object().expect("an object") {
        request[name] = value.clone();
    }
    request
}

fn weather() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                            "required": ["city"], "additionalProperties": false});
    json!({"type": "function", "function": {"name": "get_weather", "parameters": parameters}})
}

#[tokio::test]
async fn async_openai_for_rust() {
    let server = Server::start(&[]);
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url())).with_api_key("unused");
    let client = Client::with_config(config);
    models(&client).await;
    chat(&client).await;
    tools(&client).await;
    completions(&client).await;
    responses(&client).await;
    embeddings(&client).await;
    errors(&client).await;
}

type Api = Client<OpenAIConfig>;

async fn models(client: &Api) {
    let models = client.models().list().await.expect("a list");
    assert_eq!(models.data[0].id, "smollm2");
    assert_eq!(client.models().retrieve("smollm2").await.expect("a model").owned_by, "locket");
}

async fn chat(client: &Api) {
    let answer = client.chat().create(typed(question(json!({})))).await.expect("an answer");
    let whole = answer.choices[0].message.content.clone().expect("text");
    assert!(whole.contains("Paris"), "{whole}");
    let options =
        json!({"stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}});
    let mut stream = client.chat().create_stream(typed(question(options))).await.expect("a stream");
    let (mut text, mut total) = (String::new(), 0);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.expect("a chunk");
        text.extend(chunk.choices.iter().filter_map(|choice| choice.delta.content.as_deref()));
        total += chunk.usage.map_or(0, |usage| usage.total_tokens);
    }
    assert_eq!((text, total), (whole, answer.usage.expect("counts").total_tokens));
}

async fn tools(client: &Api) {
    let wanted = question(json!({"tools": [weather()], "tool_choice": "required", "max_tokens": 100}));
    let answer = client.chat().create(typed(wanted)).await.expect("an answer");
    let message = serde_json::to_value(&answer.choices[0].message).expect("JSON");
    let function = &message["tool_calls"][0]["function"];
    assert_eq!(function["name"], "get_weather", "{message}");
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().expect("text")).expect("JSON");
    assert!(arguments["city"].is_string(), "{arguments}");
}

async fn completions(client: &Api) {
    let request = json!({"model": "smollm2", "prompt": "The sky is", "max_tokens": 6, "logprobs": 2});
    let answer = client.completions().create(typed(request)).await.expect("an answer");
    assert_eq!(answer.choices[0].logprobs.as_ref().expect("log-probabilities").tokens.len(), 6);
}

async fn responses(client: &Api) {
    let request = json!({"model": "smollm2", "input": "What is the capital of France?", "temperature": 0.0,
                         "max_output_tokens": 40});
    let answer = client.responses().create(typed(request.clone())).await.expect("an answer");
    assert_eq!(answer.status, Status::Completed);
    let mut stream = client.responses().create_stream(typed(request)).await.expect("a stream");
    let (mut text, mut is_complete) = (String::new(), false);
    while let Some(event) = stream.next().await {
        match event.expect("an event") {
            ResponseStreamEvent::ResponseOutputTextDelta(event) => text.push_str(&event.delta),
            ResponseStreamEvent::ResponseCompleted(_) => is_complete = true,
            _ => {}
        }
    }
    assert!(is_complete);
    assert_eq!(answer.output_text(), Some(text));
}

async fn embeddings(client: &Api) {
    let request = json!({"model": "smollm2", "input": ["A cat.", "A dog."]});
    let answer = client.embeddings().create(typed(request)).await.expect("vectors");
    assert_eq!(answer.data.iter().map(|item| item.index).collect::<Vec<_>>(), [0, 1]);
    let norm: f32 = answer.data[0].embedding.iter().map(|value| value * value).sum();
    assert!((norm - 1.0).abs() < 1e-3, "{norm}");
}

async fn errors(client: &Api) {
    let error =
        client.chat().create(typed(question(json!({"temperature": 3.0})))).await.expect_err("too warm");
    let OpenAIError::ApiError(response) = error else { panic!("{error}") };
    let error = response.api_error;
    assert_eq!(error.code.as_deref(), Some("decimal_above_max_value"));
    assert_eq!(error.param.as_deref(), Some("temperature"));
}
