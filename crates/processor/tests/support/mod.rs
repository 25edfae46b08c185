//! Processors without weights, and a small vocabulary.
#![allow(dead_code, reason = "each test file uses a part")]

use locket_model::{
    config::{ModelConfig, RopeConfig, RopeScaling, RopeStyle},
    load::{GgufVocabulary, TokenizerSource},
};
use locket_processor::{Error, Processor};

/// The geometry of a tiny model with `vocab_size` rows, start token 1 and end token 2.
fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab_size,
        hidden_size: 8,
        intermediate_size: 8,
        num_layers: 1,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 8,
        max_position: 64,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            rotary_dim: 8,
            style: RopeStyle::HalfSplit,
            scaling: RopeScaling::None,
        },
        tie_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: vec![None],
        eos_token_ids: vec![2],
        bos_token_id: Some(1),
    }
}

/// Builds a processor for a model with `vocab_size` embedding rows.
pub fn load(source: &TokenizerSource, vocab_size: usize, template: Option<&str>) -> Result<Processor, Error> {
    Processor::new(&config(vocab_size), source, template)
}

/// The letters of the byte-level alphabet, by byte.
fn byte_letters() -> Vec<String> {
    let mut next = 0x100;
    let letters = (0..=u8::MAX).map(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap().to_string()
        }
    });
    letters.collect()
}

/// A byte-level vocabulary: `<unk>`, `<s>`, `</s>`, 256 bytes, a few merges, and `<tool>`.
pub fn byte_level_vocabulary(pre: &str) -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend(byte_letters());
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello"].map(String::from).to_vec();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.push("<tool>".into());
    let mut token_types = vec![1; tokens.len()];
    token_types[..3].copy_from_slice(&[2, 3, 3]);
    *token_types.last_mut().unwrap() = 4;
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types,
        merges,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        unknown_token_id: Some(0),
        ..GgufVocabulary::default()
    }
}

/// A processor of a GGUF vocabulary.
pub fn processor(vocabulary: GgufVocabulary, chat_template: Option<&str>) -> Processor {
    let vocab_size = vocabulary.tokens.len();
    load(&TokenizerSource::Gguf(vocabulary), vocab_size, chat_template).unwrap()
}

/// The text that the bytes of these tokens make.
pub fn joined(processor: &Processor, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| processor.token_bytes(*id)).copied().collect();
    String::from_utf8(bytes).unwrap()
}
