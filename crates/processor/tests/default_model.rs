//! The default model's own tokenizer: ids equal Hugging Face's, any text comes back, its template.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::LazyLock;

use locket_model::{load::Checkpoint, testing::default_model};
use locket_processor::{ChatPrompt, Processor, TextOptions, TextStream};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::joined;

static PROCESSOR: LazyLock<Processor> =
    LazyLock::new(|| Processor::load(&Checkpoint::open(&default_model()).unwrap()).unwrap());

#[test]
fn ids_equal_the_hugging_face_tokenizer() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/golden/tokenizer/smollm2.json")).unwrap();
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(PROCESSOR.encode(text, false).unwrap(), expected, "{text:?}");
        assert_eq!(PROCESSOR.encode(text, true).unwrap(), expected, "no start token: {text:?}");
        assert_eq!(PROCESSOR.decode(&expected, false), text);
    }
    assert!(cases.len() > 30);
}

#[test]
fn control_tokens_and_sizes_are_the_models() {
    assert_eq!((PROCESSOR.vocab_size(), PROCESSOR.bos_token_id()), (49152, Some(1)));
    assert_eq!(PROCESSOR.eos_token_ids().first(), Some(&2));
    assert!((0..17).all(|id| PROCESSOR.is_special(id)) && !PROCESSOR.is_special(17));
    assert_eq!(PROCESSOR.token_bytes(2), b"<|im_end|>");
    assert_eq!(PROCESSOR.decode(&[1, 19556, 2], true), "Hello");
}

#[test]
fn its_template_is_chatml_with_a_default_system_message() {
    let chat = ChatPrompt {
        messages: vec![json!({"role": "user", "content": [{"type": "text", "text": "Hi"}]})],
        add_generation_prompt: true,
        ..ChatPrompt::default()
    };
    assert_eq!(
        PROCESSOR.render_chat(&chat).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

proptest! {
    #[test]
    fn any_text_comes_back(text in any::<String>(), code in "[ \t\na-zA-Z0-9(){};=+'\"é日😀]{0,80}") {
        for text in [text, code] {
            let ids = PROCESSOR.encode(&text, false).unwrap();
            prop_assert_eq!(joined(&PROCESSOR, &ids), text.as_str());
            prop_assert_eq!(PROCESSOR.decode(&ids, false), text.as_str());
            let mut stream = TextStream::new(TextOptions::default());
            let mut streamed: String = ids.iter().map(|id| stream.push(PROCESSOR.token_bytes(*id)).text).collect();
            streamed.push_str(&stream.finish().text);
            prop_assert_eq!(streamed, text);
        }
    }
}
