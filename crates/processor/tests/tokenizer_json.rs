//! Tokenizers from `tokenizer.json`: bytes by either spelling, special tokens by its
//! post-processor, refusal of what is not a LLaMA tokenizer.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{fs, path::PathBuf};

use locket_model::load::TokenizerSource;
use locket_processor::{ChatPrompt, Processor};
use serde_json::{Value, json};
use support::{joined, load};

const WORDS: [&str; 8] = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁ab"];

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

/// A SentencePiece-like file in Llama 2's layout.
fn llama2() -> Value {
    let vocab: serde_json::Map<String, Value> =
        WORDS.iter().enumerate().map(|(id, word)| ((*word).to_string(), id.into())).collect();
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence("A")],
            "pair": [sequence("A"), sequence("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

fn load_json(
    json: &Value,
    config: Option<Value>,
) -> Result<(Processor, tempfile::TempDir), locket_processor::Error> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    if let Some(config) = config {
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    }
    let template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}";
    load(&TokenizerSource::Json(path), WORDS.len(), Some(template)).map(|p| (p, folder))
}

#[test]
fn a_llama2_file_encodes_and_decodes() {
    let (processor, _folder) = load_json(&llama2(), None).unwrap();
    assert_eq!(processor.encode("ab\n", false).unwrap(), [4, 5, 6, 3]);
    assert_eq!(processor.encode("ab\n", true).unwrap(), [1, 4, 5, 6, 3]);
    assert_eq!(joined(&processor, &[4, 5, 6, 3, 7]), " ab\n ab");
    assert_eq!(processor.decode(&[1, 4, 5, 6, 3, 7, 2], true), "ab\n ab");
    assert!(processor.is_special(1) && !processor.is_special(5));
}

#[test]
fn template_variables_come_from_the_config_beside_it() {
    let config = json!({"eos_token": {"content": "<end>"}, "pad_token": "<pad>", "bos_token": null});
    let (processor, _folder) = load_json(&llama2(), Some(config)).unwrap();
    assert_eq!(processor.render_chat(&ChatPrompt::default()).unwrap(), "<s>|<end>|<pad>");
    let (processor, _folder) = load_json(&llama2(), None).unwrap();
    assert_eq!(processor.render_chat(&ChatPrompt::default()).unwrap(), "<s>|</s>|");
}

#[test]
fn byte_level_files_are_spelled_in_letters() {
    let mut json = llama2();
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json["decoder"] = json["pre_tokenizer"].clone();
    json["model"]["vocab"] = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "Ġ": 3, "a": 4, "Ċ": 5, "Ã": 6, "©": 7});
    let (processor, _folder) = load_json(&json, None).unwrap();
    let ids = processor.encode("a é\n", false).unwrap();
    assert_eq!(ids, [4, 3, 6, 7, 5]);
    assert_eq!(joined(&processor, &ids), "a é\n");
}

#[test]
fn other_files_are_refused() {
    let mut word_piece = llama2();
    word_piece["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let mut no_decoder = llama2();
    no_decoder["decoder"] = Value::Null;
    let mut overlong_merge = llama2();
    overlong_merge["model"]["merges"] = json!([["</s>", "<0x0A>"]]);
    for (json, expected) in [
        (word_piece, "'WordPiece' is not known"),
        (no_decoder, "decoder"),
        (overlong_merge, "tokenizer.json"),
        (json!({"model": {}}), "tokenizer.json"),
        (json!("text"), "tokenizer.json"),
    ] {
        let message = load_json(&json, None).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let missing = TokenizerSource::Json(PathBuf::from("absent/tokenizer.json"));
    let message = load(&missing, 8, None).err().unwrap().to_string();
    assert!(message.contains("cannot read absent/tokenizer.json"), "{message}");
}
