//! Thoughts in front of answers: modes, budgets, the two strings of a message, and what is counted.
//!
//! A token of the fake model is a byte, and its text follows from the position alone: in a prompt of
//! the right length the thought begins where the text does.

use locket_processor::reasoning::{ReasoningMode, ReasoningSettings};
use locket_server::{
    ServerConfig,
    config::{ReasoningConfig, ReasoningField},
};
use serde_json::{Value, json};

use crate::fake::{TestServer, merged, script};

fn config() -> ReasoningConfig {
    let profile = ReasoningSettings { open: Some("<think>".into()), ..ReasoningSettings::default() };
    ReasoningConfig { profile, ..ReasoningConfig::default() }
}

fn thinking(reasoning: ReasoningConfig) -> TestServer {
    TestServer::with(ServerConfig { reasoning, ..ServerConfig::default() }, 8)
}

/// A question whose prompt, with these fields, ends where the model's text begins.
async fn question(server: &TestServer, fields: &Value) -> String {
    let mut question = "Hi".to_owned();
    let answer =
        server.chat(&question, merged(fields.clone(), json!({"max_tokens": 1, "stream": false}))).await;
    let prompt_tokens = answer.ok()["usage"]["prompt_tokens"].as_u64().expect("a count") as usize;
    let period = script().len();
    question.extend(std::iter::repeat_n('.', (period - prompt_tokens % period) % period));
    question
}

async fn ask(server: &TestServer, fields: Value) -> Value {
    let question = question(server, &fields).await;
    server.chat(&question, fields).await.ok()
}

fn budget(tokens: u32) -> Value {
    json!({"thinking": {"type": "enabled", "budget_tokens": tokens}})
}

fn parts(answer: &Value) -> (Option<&str>, Option<&str>, &str, u64) {
    let choice = &answer["choices"][0];
    (
        choice["message"]["reasoning"].as_str(),
        choice["message"]["content"].as_str(),
        choice["finish_reason"].as_str().expect("a reason"),
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().expect("a count"),
    )
}

#[tokio::test]
async fn a_budget_closes_the_thought_and_the_answer_follows() {
    let server = thinking(config());
    // "Grüße" in seven tokens; eight of the marker; then the text where it is by then.
    let answer = ask(&server, budget(7)).await;
    assert_eq!(parts(&answer), (Some("Grüße"), Some("swer is 42. "), "stop", 7));
    assert_eq!(answer["usage"]["completion_tokens"], 7 + 8 + 12);
    assert_eq!(answer["choices"][0]["message"]["reasoning_content"], "Grüße");
    let answer = ask(&server, budget(0)).await;
    assert_eq!(parts(&answer), (None, Some("The answer is 42. "), "stop", 0));
    // The end of the answer inside the thought.
    let answer = ask(&server, merged(budget(7), json!({"max_tokens": 3}))).await;
    assert_eq!(parts(&answer), (Some("Gr\u{FFFD}"), Some(""), "length", 3));
    let answer = ask(&server, json!({"reasoning_effort": "xhigh"})).await;
    assert_eq!(parts(&answer), (Some("Grüße! The answer is 42. "), Some(""), "stop", 27));
}

#[tokio::test]
async fn forced_words_are_reported_and_counted_in_usage_only() {
    let mut config = config();
    config.profile.budget_message = "!!".into();
    let server = thinking(config);
    let answer = ask(&server, budget(7)).await;
    assert_eq!(parts(&answer), (Some("Grüße!!"), Some("er is 42. "), "stop", 9));
    let answer = ask(&server, merged(budget(7), json!({"max_tokens": 9}))).await;
    assert_eq!(parts(&answer), (Some("Grüße!!"), Some(""), "length", 9));
}

#[tokio::test]
async fn fast_is_a_prompt_with_a_closed_block() {
    let server = thinking(config());
    let prompt_tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    let plain = server.chat("Hi", json!({})).await.ok();
    let fast = server.chat("Hi", json!({"reasoning_effort": "none"})).await.ok();
    assert_eq!(prompt_tokens(&fast), prompt_tokens(&plain) + "<think>\n\n</think>\n\n".len() as u64);
    let slow = server.chat("Hi", budget(3)).await.ok();
    assert_eq!(prompt_tokens(&slow), prompt_tokens(&plain) + "<think>".len() as u64);
    for fields in [
        json!({"reasoning_effort": "none"}),
        json!({"thinking": {"type": "disabled"}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"thinking_token_budget": 0}),
    ] {
        let answer = ask(&server, fields.clone()).await;
        assert_eq!(parts(&answer), (None, Some("Grüße! The answer is 42. "), "stop", 0), "{fields}");
    }
    // The operator's default, and a request that wins over it.
    let server = thinking(ReasoningConfig { mode: Some(ReasoningMode::Slow), budget: Some(7), ..config() });
    assert_eq!(parts(&ask(&server, json!({})).await).0, Some("Grüße"));
    assert_eq!(parts(&ask(&server, json!({"reasoning_effort": "none"})).await).0, None);
}

#[tokio::test]
async fn stop_strings_do_not_count_in_thoughts() {
    let server = thinking(config());
    let answer = ask(&server, merged(budget(12), json!({"stop": ["!", "h", " "]}))).await;
    assert_eq!(parts(&answer), (Some("Grüße! The"), Some("is"), "stop", 12));
    assert_eq!(answer["choices"][0]["stop_reason"], " ");
}

#[tokio::test]
async fn grammars_begin_with_the_answer() {
    let server = thinking(config());
    let choice = json!({"guided_choice": ["yes", "no"]});
    let answer = ask(&server, merged(budget(7), choice.clone())).await;
    assert_eq!((parts(&answer).0, parts(&answer).3), (Some("Grüße"), 7));
    assert!(matches!(parts(&answer).1, Some("yes" | "no")), "{answer}");
    // Nobody says whether to think: the first token chooses. To this model all that are allowed are
    // equal, so it takes the first of them.
    let answer = ask(&server, choice.clone()).await;
    assert_eq!((parts(&answer).0, parts(&answer).1), (Some("! The answer is 42. "), Some("")));
    let answer = ask(&server, merged(choice, json!({"logit_bias": {"60": -100}}))).await;
    assert!(matches!(parts(&answer), (None, Some("yes" | "no"), _, 0)), "{answer}");
}

/// Streamed and unstreamed are the same strings, in deltas of one kind each.
#[tokio::test]
async fn deltas_join_to_the_message() {
    let server = thinking(config());
    let fields = merged(budget(7), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let question = question(&server, &budget(7)).await;
    let chunks = server.chat(&question, fields).await.chunks();
    let (mut reasoning, mut content) = (String::new(), String::new());
    for delta in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).map(|choice| &choice["delta"]) {
        assert_eq!(delta["reasoning"], delta["reasoning_content"]);
        assert!(delta["reasoning"].is_null() || delta["content"].is_null(), "{delta}");
        reasoning.push_str(delta["reasoning"].as_str().unwrap_or_default());
        content.push_str(delta["content"].as_str().unwrap_or_default());
    }
    assert_eq!((reasoning.as_str(), content.as_str()), ("Grüße", "swer is 42. "));
    let usage = &chunks.last().expect("the usage")["usage"];
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 7);
}

#[tokio::test]
async fn a_setting_picks_the_field() {
    let server = thinking(ReasoningConfig { field: ReasoningField::ReasoningContent, ..config() });
    let message = &ask(&server, budget(7)).await["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], message.get("reasoning")), (&json!("Grüße"), None));
}

/// Thoughts of earlier turns are accepted, and left out unless the template prints them.
#[tokio::test]
async fn thoughts_in_the_history_are_dropped() {
    let server = thinking(config());
    let prompt_tokens = async |answer: Value| {
        let messages = json!([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}]);
        let answer = server.post("/v1/chat/completions", &json!({"messages": messages})).await.ok();
        answer["usage"]["prompt_tokens"].clone()
    };
    let plain = prompt_tokens(json!({"role": "assistant", "content": "c"})).await;
    for name in ["reasoning", "reasoning_content"] {
        let answer = json!({"role": "assistant", "content": "c", name: "long thoughts"});
        assert_eq!(prompt_tokens(answer).await, plain);
    }
}

#[tokio::test]
async fn responses_think_by_their_effort() {
    let server = thinking(ReasoningConfig { mode: Some(ReasoningMode::Slow), budget: Some(7), ..config() });
    let create = async |effort: Value| {
        let body = json!({"input": "Hi", "reasoning": {"effort": effort}, "max_output_tokens": 40});
        server.post("/v1/responses", &body).await.ok()
    };
    let kinds = |answer: &Value| -> Vec<Value> {
        answer["output"].as_array().expect("items").iter().map(|item| item["type"].clone()).collect()
    };
    let slow = create(Value::Null).await;
    assert_eq!(kinds(&slow), ["reasoning", "message"]);
    assert_eq!(slow["usage"]["output_tokens_details"]["reasoning_tokens"], 7);
    assert_eq!(kinds(&create(json!("none")).await), ["message"]);
}

#[tokio::test]
async fn what_a_model_without_thoughts_cannot_do_is_refused() {
    let server = TestServer::start();
    server.chat("Hi", json!({"reasoning_effort": "high"})).await.ok();
    for fields in [json!({"thinking": {"type": "enabled"}}), json!({"thinking_token_budget": 5})] {
        let error = server.chat("Hi", fields).await.is_error(400, "unsupported_parameter");
        assert!(error["message"].as_str().expect("a text").contains("reasoning.open"), "{error}");
    }
    let server = thinking(config());
    let fields = json!({"reasoning_effort": "none", "thinking_token_budget": 5});
    server.chat("Hi", fields).await.is_error(400, "invalid_value");
}

#[tokio::test]
async fn thoughts_are_counted() {
    let server = thinking(config());
    let question = question(&server, &budget(7)).await;
    let counted = |text: &str, line: &str| text.lines().any(|known| known == line);
    let before = server.get("/metrics").await.text;
    assert!(
        counted(&before, "locket_reasoning_mode_total{chosen=\"slow\",requested=\"slow\"} 1"),
        "{before}"
    );
    server.chat(&question, budget(7)).await.ok();
    server.chat(&question, json!({"reasoning_effort": "none"})).await.ok();
    server.chat(&question, json!({})).await.ok();
    let after = server.get("/metrics").await.text;
    for line in [
        "locket_reasoning_mode_total{chosen=\"slow\",requested=\"slow\"} 2",
        "locket_reasoning_mode_total{chosen=\"fast\",requested=\"fast\"} 1",
        "locket_reasoning_mode_total{chosen=\"fast\",requested=\"default\"} 1",
        "locket_reasoning_tokens_total{mode=\"slow\"} 8",
        "locket_reasoning_budget_exhausted_total 1",
        "locket_reasoning_thought_tokens_count 2",
    ] {
        assert!(counted(&after, line), "{line}: {after}");
    }
}
