//! Byte-level vocabularies of GGUF files: ids, special tokens, bytes, and refusal of broken ones.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use locket_model::load::{GgufVocabulary, TokenizerSource};
use proptest::prelude::*;
use support::{byte_level_vocabulary, joined, load, processor};

#[test]
fn special_tokens_are_found_in_text_and_merges_are_applied() {
    let processor = processor(byte_level_vocabulary("smollm"), None);
    let id = |text: &str| processor.encode(text, false).unwrap();
    let (hello, space_hello, tool) = (262, 263, 264);
    assert_eq!(id("hello hello"), [hello, space_hello]);
    assert_eq!(id("hello<s>hello<tool></s>"), [hello, 1, hello, tool, 2]);
    assert_eq!(processor.token_bytes(space_hello), b" hello");
    assert!(processor.is_special(1) && processor.is_special(0) && !processor.is_special(tool));
    assert_eq!(processor.decode(&[1, hello, tool, 2], true), "hello<tool>");
    assert_eq!(processor.decode(&[1, hello, tool, 2], false), "<s>hello<tool></s>");
    assert_eq!(processor.token_text(3 + 0xC3), "\u{FFFD}");
}

#[test]
fn start_and_end_tokens_follow_the_file_then_the_kind() {
    let ids = |change: fn(&mut GgufVocabulary)| {
        let mut vocabulary = byte_level_vocabulary("llama-bpe");
        change(&mut vocabulary);
        let processor = processor(vocabulary, None);
        assert_eq!(processor.encode("hello", false).unwrap(), [262]);
        processor.encode("hello", true).unwrap()
    };
    assert_eq!(ids(|_| ()), [1, 262]);
    assert_eq!(ids(|v| v.pre = Some("smollm".into())), [262]);
    assert_eq!(ids(|v| v.add_bos_token = Some(false)), [262]);
    assert_eq!(ids(|v| (v.add_bos_token, v.add_eos_token) = (Some(true), Some(true))), [1, 262, 2]);
}

#[test]
fn a_model_smaller_than_its_tokenizer_refuses_the_surplus() {
    let source = TokenizerSource::Gguf(byte_level_vocabulary("smollm"));
    let processor = load(&source, 262, None).unwrap();
    assert_eq!(processor.vocab_size(), 262);
    assert!(processor.encode("hell", false).is_ok());
    let message = processor.encode("hello", false).unwrap_err().to_string();
    assert!(message.contains("ends at token 261"), "{message}");
    assert!(processor.token_bytes(262).is_empty());
}

#[test]
fn a_model_larger_than_its_tokenizer_has_empty_tokens() {
    let source = TokenizerSource::Gguf(byte_level_vocabulary("smollm"));
    let processor = load(&source, 300, None).unwrap();
    assert_eq!(processor.vocab_size(), 300);
    assert_eq!((processor.token_bytes(299), processor.token_text(299).as_ref()), (&b""[..], ""));
}

#[test]
fn bad_words_are_spelled_with_and_without_a_space() {
    let processor = processor(byte_level_vocabulary("smollm"), None);
    let sequences = processor.bad_word_sequences(&[" hello".into(), "xy".into()]).unwrap();
    let byte = |byte: u8| 3 + u32::from(byte);
    assert_eq!(sequences, [vec![262], vec![263], vec![byte(b'x'), byte(b'y')]]);
    assert!(processor.bad_word_sequences(&["  ".into()]).is_err());
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    type Change = fn(&mut GgufVocabulary);
    let cases: [(Change, &str); 12] = [
        (|v| v.pre = None, "tokenizer.ggml.pre is absent"),
        (|v| v.pre = Some("viking".into()), "'viking'"),
        (|v| v.model = "bert".into(), "tokenizer.ggml.model is 'bert'"),
        (|v| v.tokens.clear(), "tokenizer.ggml.tokens has 0 entries"),
        (|v| v.tokens[5] = v.tokens[4].clone(), "4 and 5 are both"),
        (|v| v.token_types.truncate(7), "tokenizer.ggml.token_type has 7 entries"),
        (|v| v.scores = vec![0.0; 3], "tokenizer.ggml.scores has 3 entries"),
        (|v| v.bos_token_id = Some(1000), "tokenizer.ggml.bos_token_id is 1000"),
        (|v| v.eos_token_id = Some(u32::MAX), "tokenizer.ggml.eos_token_id"),
        (|v| v.merges.clear(), "tokenizer.ggml.merges is absent or empty"),
        (|v| v.merges[1] = "hello hellohellohellohello".into(), "entry 1"),
        (|v| (v.add_bos_token, v.bos_token_id) = (Some(true), None), "bos_token_id is absent"),
    ];
    for (change, expected) in cases {
        let mut vocabulary = byte_level_vocabulary("smollm");
        change(&mut vocabulary);
        let vocab_size = vocabulary.tokens.len();
        let loaded = load(&TokenizerSource::Gguf(vocabulary), vocab_size, None);
        let message = loaded.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

proptest! {
    #[test]
    fn bytes_of_the_ids_join_to_the_text(text in any::<String>(), pre in prop::sample::select(vec!["smollm", "gpt-2", "llama-bpe", "tekken", "deepseek-coder"])) {
        let processor = processor(byte_level_vocabulary(pre), None);
        let ids = processor.encode(&text, false).unwrap();
        prop_assert_eq!(joined(&processor, &ids), text);
    }
}
