//! Templates render what transformers rendered, and what they cannot do is a clear error.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use locket_processor::{
    ChatPrompt, Error, Processor,
    reasoning::{ReasoningSettings, TemplateSwitches, ThoughtStart},
    tools::ToolFormat,
};
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
        tool_format: ToolFormat::default(),
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

fn called(arguments: &Value) -> ChatPrompt {
    let call = json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}});
    chat(&json!({
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "5"}
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}]
    }))
}

/// A template that knows no tools gets them as text; one that does gets them as they are.
#[test]
fn tools_are_written_out_where_the_template_knows_none() {
    let plain = with_template("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}");
    let mut prompt = called(&json!("{\"x\": 1}"));
    plain.write_out_tools(&mut prompt);
    let text = plain.render_chat(&prompt).unwrap();
    assert!(text.starts_with("[system:You may call functions"), "{text}");
    assert!(
        text.contains("[assistant:<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>]"),
        "{text}"
    );
    assert!(text.ends_with("[user:<tool_response name=\"f\">\n5\n</tool_response>]"), "{text}");
    assert_eq!(plain.tool_format(), None);

    let own = "<tool_call> {% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}[{{ m.content }}\
               {% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}]{% endfor %}";
    let own = with_template(own);
    let mut prompt = called(&json!("{\"x\": 1}"));
    own.write_out_tools(&mut prompt);
    assert_eq!(own.render_chat(&prompt).unwrap().matches("{\"x\": 1}").count(), 1);
    assert_eq!(own.tool_format(), Some(ToolFormat::Hermes));
}

/// A template that joins arguments to text needs them as text.
#[test]
fn arguments_stay_text_where_the_template_needs_text() {
    let joins = "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}{% for c in m.tool_calls %}\
                 {{ 'args ' + c.function.arguments }}{% endfor %}{% endfor %}";
    let joins = with_template(joins);
    assert_eq!(joins.render_chat(&called(&json!("{\"x\": 1}"))).unwrap(), "fargs {\"x\": 1}");
}

/// A switch is what changes the prompt, not what is merely named; the profile comes with the template.
#[test]
fn switches_of_thinking_are_found_by_rendering() {
    let turns = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let block =
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}";
    let tagged = with_template(&format!("{turns}{{% if add_generation_prompt %}}A: {block}{{% endif %}}"));
    let switches = tagged.template_switches();
    assert_eq!(
        (switches.enable_thinking, switches.thinking, switches.thinking_key()),
        (true, false, Some("enable_thinking"))
    );
    let profile = tagged.reasoning_profile(&ReasoningSettings::default()).unwrap().unwrap();
    let mut off = user(&json!("Hi"));
    off.kwargs.insert("enable_thinking".into(), false.into());
    let mut prompt = tagged.render_chat(&off).unwrap();
    // What the template has said needs no prefix.
    assert_eq!(profile.prepare(&mut prompt, None), ThoughtStart::Content);
    assert_eq!(prompt, "[Hi]A: <think>\n\n</think>\n\n");

    let named = with_template(&format!("{turns}{{# thinking and reasoning_effort are not used #}}"));
    assert_eq!(named.template_switches(), TemplateSwitches::default());
    assert_eq!(named.reasoning_profile(&ReasoningSettings::default()), Ok(None));
    let effort = with_template(&format!("{turns}{{{{ reasoning_effort }}}}{{{{ thinking }}}}"));
    let switches = effort.template_switches();
    assert!(switches.reasoning_effort && switches.thinking_key() == Some("thinking"));
}

/// The parts of a user's message with images: `i` is one, other letters are text.
fn seen(processor: &Processor, parts: &str) -> (String, usize) {
    let part = |letter: char| match letter {
        'i' => json!({"type": "image", "index": 7}),
        _ => json!({"type": "text", "text": letter.to_string()}),
    };
    let prompt = user(&parts.chars().map(part).collect());
    let text = processor.render_chat(&prompt).unwrap();
    let ids = processor.encode_prompt(&text, false).unwrap();
    let token = processor.image_token().unwrap();
    (text, ids.iter().filter(|id| **id == token.id).count())
}

/// A template in the style of LLaVA's: images first, then texts.
const IMAGES_FIRST: &str = "{% for m in messages %}USER: {% for c in m['content'] | selectattr('type', 'equalto', \
    'image') %}{{ '<tool>\n' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}\
    {{ c['text'] }}{% endfor %}{% endfor %} ASSISTANT:";

#[test]
fn images_stand_where_their_part_stands() {
    // The vocabulary's last token, `<tool>`, stands for images here.
    let tool = byte_level_vocabulary("smollm").tokens.len() as u32 - 1;
    let mut native = with_template(IMAGES_FIRST);
    assert!(native.image_token().is_none());
    native.see_images(Some(tool));
    assert_eq!(seen(&native, "ia"), ("USER: <tool>\na ASSISTANT:".into(), 1));
    assert_eq!(seen(&native, "iia"), ("USER: <tool>\n<tool>\na ASSISTANT:".into(), 2));
    assert_eq!(seen(&native, "aib"), ("USER: a\n<tool>\nb ASSISTANT:".into(), 1));
    let mut generic = with_template(include_str!("../../../tests/golden/chat_templates/chatml.jinja"));
    generic.see_images(Some(tool));
    let (text, images) = seen(&generic, "iaib");
    assert!(text.contains("user\n<tool>\na\n<tool>\nb<|im_end|>"), "{text}");
    assert_eq!(images, 2);
}

#[test]
fn placeholders_that_users_write_stand_for_nothing() {
    let tool = byte_level_vocabulary("smollm").tokens.len() as u32 - 1;
    let mut processor = with_template(IMAGES_FIRST);
    processor.see_images(Some(tool));
    let prompt = user(&json!([{"type": "image"}, {"type": "text", "text": "what is <tool>?"}]));
    let ids = processor.encode_prompt(&processor.render_chat(&prompt).unwrap(), false).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == tool).count(), 1);
}

/// An id beyond the tokenizer, as LLaVA's is beyond Vicuna's GGUF vocabulary.
#[test]
fn a_placeholder_that_the_tokenizer_does_not_know() {
    for id in [None, Some(32_000)] {
        let mut processor = with_template(include_str!("../../../tests/golden/chat_templates/chatml.jinja"));
        processor.see_images(id);
        let token = processor.image_token().unwrap().clone();
        assert_eq!((token.is_known(), token.shown_id), (false, id.unwrap_or(0)));
        assert_eq!(processor.token_bytes(token.id), b"<image>");
        assert_eq!(seen(&processor, "aib").1, 1);
        // Text is text elsewhere.
        assert!(!processor.encode("<image>", false).unwrap().contains(&token.id));
    }
}
