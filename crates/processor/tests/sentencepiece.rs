//! SentencePiece vocabularies: ids equal the sentencepiece library's, bytes give the text back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use locket_model::load::{GgufVocabulary, TokenizerSource};
use proptest::prelude::*;
use serde_json::Value;
use support::{joined, load, processor};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/tokenizer/sentencepiece.json")).unwrap()
}

/// The recorded vocabulary: `<unk>`, `<s>`, `</s>`, 256 bytes, pieces.
fn vocabulary() -> GgufVocabulary {
    let golden = golden();
    let list = |key: &str| golden[key].as_array().unwrap().clone();
    GgufVocabulary {
        model: "llama".into(),
        tokens: list("tokens").iter().map(|token| token.as_str().unwrap().to_string()).collect(),
        token_types: list("types")
            .iter()
            .map(|kind| i32::try_from(kind.as_i64().unwrap()).unwrap())
            .collect(),
        scores: list("scores").iter().map(|score| score.to_string().parse().unwrap()).collect(),
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        unknown_token_id: Some(0),
        ..GgufVocabulary::default()
    }
}

#[test]
fn ids_equal_the_sentencepiece_library() {
    let processor = processor(vocabulary(), None);
    for case in golden()["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(processor.encode(text, false).unwrap(), expected, "{text:?}");
    }
}

#[test]
fn the_start_token_is_added_unless_the_file_says_no() {
    let with = processor(vocabulary(), None);
    let text = "the water";
    let plain = with.encode(text, false).unwrap();
    assert_eq!(with.encode(text, true).unwrap(), [&[1][..], &plain].concat());
    let without = processor(GgufVocabulary { add_bos_token: Some(false), ..vocabulary() }, None);
    assert_eq!(without.encode(text, true).unwrap(), plain);
    assert_eq!(with.decode(&with.encode(text, true).unwrap(), true), text);
}

#[test]
fn each_text_after_a_special_token_gets_a_space_of_its_own() {
    let processor = processor(vocabulary(), None);
    let ids = |text: &str| processor.encode(text, false).unwrap();
    assert_eq!(ids("the</s>the"), [&ids("the")[..], &[2], &ids("the")].concat());
}

#[test]
fn the_space_in_front_is_in_the_bytes_but_not_in_the_decoded_text() {
    let with = processor(vocabulary(), None);
    let ids = with.encode("the", false).unwrap();
    assert_eq!((joined(&with, &ids), with.decode(&ids, true)), (" the".into(), "the".into()));
    let without = processor(GgufVocabulary { add_space_prefix: Some(false), ..vocabulary() }, None);
    let ids = without.encode(" the", false).unwrap();
    assert_eq!((joined(&without, &ids), without.decode(&ids, true)), (" the".into(), " the".into()));
}

#[test]
fn user_defined_tokens_are_written_with_real_spaces() {
    let mut user_defined = vocabulary();
    let id = user_defined.tokens.len();
    user_defined.tokens.push("▁▁▁▁".into());
    user_defined.token_types.push(4);
    user_defined.scores.push(0.0);
    let processor = processor(user_defined, None);
    let ids = processor.encode("a    the", false).unwrap();
    assert!(ids.contains(&u32::try_from(id).unwrap()), "{ids:?}");
    assert_eq!(processor.token_bytes(u32::try_from(id).unwrap()), b"    ");
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    type Change = fn(&mut GgufVocabulary);
    let cases: [(Change, &str); 5] = [
        (|v| v.scores.clear(), "tokenizer.ggml.scores is absent"),
        (|v| v.scores[300] = f32::NAN, "entry 300 is not a number"),
        (|v| v.tokens[300] = "x".repeat(2000), "entry 300 has 2000 bytes"),
        (|v| v.tokens[301] = v.tokens[300].clone(), "300 and 301 are both"),
        (|v| (v.tokens[10], v.unknown_token_id) = ("?".repeat(9), None), "neither all byte tokens"),
    ];
    for (change, expected) in cases {
        let mut vocabulary = vocabulary();
        change(&mut vocabulary);
        let vocab_size = vocabulary.tokens.len();
        let loaded = load(&TokenizerSource::Gguf(vocabulary), vocab_size, None);
        let message = loaded.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn decoding_gives_the_text_back(texts in prop::collection::vec("[a-z 0-9é日\u{1F600}\n]{0,40}|\\PC{0,30}", 16)) {
        let processor = processor(vocabulary(), None);
        // The letter for a space means a space, so it does not survive; specials are no text.
        for text in texts.iter().filter(|text| !text.contains(['▁', '<'])) {
            let ids = processor.encode(text, false).unwrap();
            prop_assert_eq!(&processor.decode(&ids, true), text);
        }
    }
}
