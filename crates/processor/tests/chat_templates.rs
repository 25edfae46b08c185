//! Templates render what transformers rendered, and what they cannot do is a clear error.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use locket_processor::{ChatPrompt, Error, Processor};
use serde_json::{Value, json};
use support::{byte_level_vocabulary, processor};

fn with_template(source: &str) -> Processor {
    processor(byte_level_vocabulary("smollm"), Some(source))
}

fn chat(chat: &Value) -> ChatPrompt {
    let list = |key: &str| chat[key].as_array().cloned();
    let flag = |key: &str| chat[key].as_bool().unwrap_or(false);
    ChatPrompt {
        messages: list("messages").unwrap_or_default(),
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        kwargs: chat["kwargs"].as_object().cloned().unwrap_or_default(),
    }
}

fn user(content: &Value) -> ChatPrompt {
    chat(&json!({"messages": [{"role": "user", "content": content}], "add_generation_prompt": true}))
}

#[test]
fn renderings_equal_transformers() {
    let sources = [
        ("chatml", include_str!("../../../tests/golden/chat_templates/chatml.jinja")),
        ("headers", include_str!("../../../tests/golden/chat_templates/headers.jinja")),
        ("inst", include_str!("../../../tests/golden/chat_templates/inst.jinja")),
    ];
    let processors = sources.map(|(name, source)| (name, with_template(source)));
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/golden/chat_templates/renderings.json")).unwrap();
    for case in &cases {
        let (_, processor) = processors.iter().find(|(name, _)| case["template"] == *name).unwrap();
        match processor.render_chat(&chat(&case["chat"])) {
            Ok(prompt) => assert_eq!(prompt, case["prompt"], "{case}"),
            Err(Error::Template(message)) => assert_eq!(message, case["error"], "{case}"),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(cases.len() > 20);
}

#[test]
fn parts_become_text_where_the_template_takes_text_only() {
    let parts = json!([{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]);
    let text_only = with_template("{% for m in messages %}[{{ m.content }}]{% endfor %}");
    assert_eq!(text_only.render_chat(&user(&parts)).unwrap(), "[One.\nTwo.]");
    let image = json!([{"type": "image_url", "image_url": {"url": "data:"}}]);
    let message = text_only.render_chat(&user(&image)).unwrap_err().to_string();
    assert!(message.contains("messages[0].content[0]"), "{message}");

    let parts_only = with_template(
        "{% for m in messages %}{% for p in m.content %}<{{ p['text'] }}>{% endfor %}{% endfor %}",
    );
    assert_eq!(parts_only.render_chat(&user(&parts)).unwrap(), "<One.><Two.>");
    assert_eq!(parts_only.render_chat(&user(&json!("Three."))).unwrap(), "<Three.>");
}

#[test]
fn the_developer_is_the_system_unless_the_template_knows_better() {
    let developer = chat(&json!({"messages": [{"role": "developer", "content": "x"}]}));
    let plain = with_template("{{ messages[0].role }}");
    assert_eq!(plain.render_chat(&developer).unwrap(), "system");
    let knowing = with_template("{# developer #}{{ messages[0].role }}");
    assert_eq!(knowing.render_chat(&developer).unwrap(), "developer");
}

#[test]
fn special_tokens_are_variables_and_requests_cannot_replace_them() {
    let template = with_template("{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ color }}");
    let mut prompt = user(&json!("x"));
    prompt.kwargs.insert("color".into(), json!("red"));
    assert_eq!(template.render_chat(&prompt).unwrap(), "<s></s><unk>red");
    prompt.kwargs.insert("messages".into(), json!([]));
    assert!(template.render_chat(&prompt).unwrap_err().to_string().contains("'messages'"));
}

#[test]
fn what_cannot_be_rendered_is_an_error() {
    let template = with_template("{% for m in messages %}{{ m.content.upper() }}{% endfor %}");
    let is_template_error =
        |prompt: &ChatPrompt| matches!(template.render_chat(prompt), Err(Error::Template(_)));
    assert!(is_template_error(&chat(&json!({"messages": ["text"]}))));
    assert!(is_template_error(&user(&json!(7))));
    let both = json!({"messages": [{"role": "assistant", "content": "x"}],
        "continue_final_message": true, "add_generation_prompt": true});
    assert!(is_template_error(&chat(&both)));
    assert!(is_template_error(&chat(&json!({"messages": [], "continue_final_message": true}))));

    let silent = with_template("nothing");
    let open = chat(&json!({"messages": [{"role": "user", "content": "x"}], "continue_final_message": true}));
    assert!(silent.render_chat(&open).unwrap_err().to_string().contains("does not print the last message"));

    let none = processor(byte_level_vocabulary("smollm"), None);
    assert!(matches!(none.render_chat(&user(&json!("x"))), Err(Error::NoTemplate)));
}

#[test]
fn a_prompt_has_a_largest_size() {
    let template = with_template("{% for i in range(3) %}{{ messages[0].content }}{% endfor %}");
    let message = template.render_chat(&user(&json!("x".repeat(3 << 20)))).unwrap_err().to_string();
    assert!(message.contains("the limit is 8388608"), "{message}");
}
