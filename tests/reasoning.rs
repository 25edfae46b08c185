//! Reasoning with a model that was not trained for it: what the server promises does not depend on the
//! model. Fast never thinks, slow always does, budgets are met to the token.

use futures_util::future::join_all;
use locket_tests::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const MESSAGE: &str = "Enough.";
/// The end token of the default model, which these tests do not want in a thought.
const END: &str = "2";

fn start() -> Server {
    Server::start(&[
        "--reasoning-open",
        "<think>",
        "--reasoning-budget-message",
        MESSAGE,
        "--max-running",
        "16",
    ])
}

fn chat(question: &str, fields: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8});
    for (name, value) in fields.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

fn reasoning_tokens(answer: &Value) -> u64 {
    answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().expect("a count")
}

/// Answers to the questions, as many at once as the server runs.
async fn answers(server: &Server, bodies: Vec<Value>) -> Vec<Value> {
    let mut answers = Vec::new();
    for bodies in bodies.chunks(16) {
        answers.extend(join_all(bodies.iter().map(|body| server.post_ok(CHAT, body))).await);
    }
    answers
}

#[tokio::test]
async fn fast_never_thinks_and_slow_always_does() {
    let server = start();
    let questions: Vec<String> = (0..50).map(|i| format!("What is {i} plus {}?", 50 - i)).collect();
    let fast =
        questions.iter().map(|question| chat(question, json!({"reasoning_effort": "none", "max_tokens": 4})));
    for answer in answers(&server, fast.collect()).await {
        let message = &answer["choices"][0]["message"];
        assert!(message["reasoning"].is_null() && message["reasoning_content"].is_null(), "{answer}");
        assert_eq!(reasoning_tokens(&answer), 0);
        assert!(!message["content"].as_str().expect("content").is_empty(), "{answer}");
    }
    let thinking = json!({"thinking": {"type": "enabled", "budget_tokens": 4}, "logit_bias": {END: -100}});
    let slow = questions.iter().map(|question| chat(question, thinking.clone()));
    for answer in answers(&server, slow.collect()).await {
        let message = &answer["choices"][0]["message"];
        assert!(!message["reasoning"].as_str().expect("a thought").is_empty(), "{answer}");
        assert_eq!(message["reasoning"], message["reasoning_content"]);
    }
    let modes = ["requested=\"fast\"", "chosen=\"slow\""];
    assert_eq!(server.metric_or_zero("locket_reasoning_mode_total", &modes).await, 0.0);
    assert_eq!(server.metric("locket_reasoning_budget_exhausted_total", &[]).await, 50.0);
}

/// N sampled tokens, then the message and the marker word for word, then the answer; alone and beside
/// others with other budgets.
#[tokio::test]
async fn budgets_are_met_to_the_token() {
    let server = start();
    let ids = async |text: &str| -> Vec<Value> {
        let body = json!({"prompt": text, "add_special_tokens": false});
        server.post_ok("/tokenize", &body).await["tokens"].as_array().expect("ids").clone()
    };
    let (close, forced) = (ids("</think>").await, ids(&format!("\n{MESSAGE}\n</think>")).await);
    let body = |budget: u64, idx: usize| {
        let question = format!("Tell me a long story about {} wolves.", idx + 2);
        let fields = json!({
            "thinking_token_budget": budget, "thinking": {"type": "enabled"}, "max_tokens": budget + 16,
            "logit_bias": {END: -100}, "return_token_ids": true,
        });
        (budget, chat(&question, fields))
    };
    for (repeats, budgets) in [(1, vec![16]), (1, vec![0, 1, 16, 64]), (4, vec![0, 1, 16, 64])] {
        let all = budgets.iter().cycle().take(budgets.len() * repeats);
        let (budgets, bodies): (Vec<u64>, Vec<Value>) =
            all.enumerate().map(|(idx, budget)| body(*budget, idx)).unzip();
        for (budget, answer) in budgets.into_iter().zip(answers(&server, bodies).await) {
            let wanted = if budget == 0 { &close } else { &forced };
            let choice = &answer["choices"][0];
            let tokens = choice["token_ids"].as_array().expect("ids");
            let end = budget as usize + wanted.len();
            assert_eq!(&tokens[budget as usize..end], wanted, "budget {budget}: {answer}");
            let thought = budget + (wanted.len() - close.len()) as u64;
            assert_eq!(reasoning_tokens(&answer), thought, "budget {budget}: {answer}");
            let text = choice["message"]["reasoning"].as_str().unwrap_or_default();
            assert!(budget == 0 || text.ends_with(&format!("\n{MESSAGE}\n")), "{answer}");
            assert!(!choice["message"]["content"].as_str().expect("content").is_empty(), "{answer}");
            assert_eq!(answer["usage"]["completion_tokens"], budget + 16);
        }
    }
}

/// Fast mode is nothing but a prompt that ends in a closed block.
#[tokio::test]
async fn greedy_fast_answers_equal_those_to_a_closed_block() {
    let server = start();
    for question in ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"] {
        let messages = json!([{"role": "user", "content": question}]);
        let tokens = server.post_ok("/tokenize", &json!({"messages": messages})).await["tokens"].clone();
        let prompt = server.post_ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].clone();
        let prompt = format!("{}<think>\n\n</think>\n\n", prompt.as_str().expect("a text"));
        let literal = json!({
            "prompt": prompt, "add_special_tokens": false, "temperature": 0, "max_tokens": 24,
            "return_token_ids": true,
        });
        let literal = server.post_ok("/v1/completions", &literal).await;
        let fields = json!({"reasoning_effort": "none", "max_tokens": 24, "return_token_ids": true});
        let fast = server.post_ok(CHAT, &chat(question, fields)).await;
        assert_eq!(fast["prompt_token_ids"], literal["prompt_token_ids"]);
        assert_eq!(fast["choices"][0]["token_ids"], literal["choices"][0]["token_ids"]);
        assert_eq!(fast["choices"][0]["message"]["content"], literal["choices"][0]["text"]);
    }
}

/// What follows a thought is what follows an answer without one: streams, stop strings, grammars.
#[tokio::test]
async fn answers_after_thoughts_keep_their_rules() {
    let server = start();
    let fields = json!({"thinking": {"type": "enabled", "budget_tokens": 4}, "max_tokens": 40});
    let body = chat("What is the capital of France?", fields);
    let whole = server.post_ok(CHAT, &body).await;
    let message = &whole["choices"][0]["message"];

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let (mut reasoning, mut content) = (String::new(), String::new());
    for chunk in server.stream(CHAT, &streamed).await {
        let delta = &chunk["choices"][0]["delta"];
        reasoning.push_str(delta["reasoning"].as_str().unwrap_or_default());
        content.push_str(delta["content"].as_str().unwrap_or_default());
    }
    assert_eq!((&message["reasoning"], &message["content"]), (&json!(reasoning), &json!(content)));

    let mut stopped = body.clone();
    stopped["stop"] = json!([" "]);
    let stopped = server.post_ok(CHAT, &stopped).await;
    assert_eq!(stopped["choices"][0]["message"]["reasoning"], message["reasoning"]);
    assert_eq!(stopped["choices"][0]["message"]["content"].as_str(), content.split(' ').next());

    let mut chosen = body;
    chosen["structured_outputs"] = json!({"choice": ["Paris", "Lyon"]});
    let chosen = server.post_ok(CHAT, &chosen).await;
    assert_eq!(chosen["choices"][0]["message"]["reasoning"], message["reasoning"]);
    let content = &chosen["choices"][0]["message"]["content"];
    assert!(content == "Paris" || content == "Lyon", "{chosen}");
}
