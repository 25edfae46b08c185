//! GGUF metadata of each family, and what is refused.

use super::*;
use crate::{
    testing::gguf::{GgufFile, Item},
    weights::gguf::parse,
};

fn llama() -> GgufFile {
    GgufFile::empty()
        .set("general.architecture", "llama")
        .set("llama.block_count", 4)
        .set("llama.context_length", 4096)
        .set("llama.embedding_length", 256)
        .set("llama.feed_forward_length", 512)
        .set("llama.attention.head_count", 8)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5)
}

fn read_file(file: &GgufFile) -> Result<ModelConfig, Error> {
    let facts = TensorFacts { vocab_size: 100, has_head: true, ..TensorFacts::default() };
    read(&parse(&file.bytes()).unwrap().metadata, facts)
}

fn renamed(architecture: &str) -> GgufFile {
    let mut file = llama().set("general.architecture", architecture);
    for (key, _) in &mut file.metadata {
        if let Some(rest) = key.strip_prefix("llama.") {
            *key = format!("{architecture}.{rest}");
        }
    }
    file
}

#[track_caller]
fn refused(file: &GgufFile, field: &str) {
    match read_file(file) {
        Err(Error::Config { field: named, reason }) => assert_eq!(named, field, "{reason}"),
        other => panic!("{field} must be refused, not {other:?}"),
    }
}

#[test]
fn llama_defaults() {
    let config = read_file(&llama()).unwrap();
    assert_eq!((config.num_kv_heads, config.head_dim, config.rope.rotary_dim), (8, 32, 32));
    assert_eq!((config.rope.theta, config.rope.style), (10_000.0, RopeStyle::Interleaved));
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert!(!config.tie_embeddings && !config.qk_norm && !config.qkv_bias);
}

#[test]
fn qwen_rotates_halves_and_has_its_own_extras() {
    let qwen2 = read_file(&renamed("qwen2")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.qk_norm);
    assert_eq!(qwen2.rope.style, RopeStyle::HalfSplit);
    let qwen3 =
        renamed("qwen3").set("qwen3.attention.key_length", 64).set("qwen3.attention.value_length", 64);
    let qwen3 = read_file(&qwen3).unwrap();
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!((qwen3.head_dim, qwen3.rope.style), (64, RopeStyle::HalfSplit));
}

#[test]
fn per_layer_arrays_must_be_uniform() {
    let heads = |counts: Vec<i32>| llama().set("llama.attention.head_count_kv", Item::I32s(counts));
    assert_eq!(read_file(&heads(vec![2; 4])).unwrap().num_kv_heads, 2);
    refused(&heads(vec![2, 2, 4, 2]), "llama.attention.head_count_kv");
    refused(&heads(vec![2; 3]), "llama.attention.head_count_kv");
    refused(&heads(vec![-2; 4]), "llama.attention.head_count_kv");
    refused(
        &llama().set("llama.feed_forward_length", Item::I32s(vec![1, 2, 3, 4])),
        "llama.feed_forward_length",
    );
}

#[test]
fn scaling_keys_old_and_new() {
    let scaling = |file: &GgufFile| read_file(file).map(|config| config.rope.scaling);
    let linear = llama().set("llama.rope.scaling.type", "linear").set("llama.rope.scaling.factor", 4.0);
    assert_eq!(scaling(&linear).unwrap(), RopeScaling::Linear { factor: 4.0 });
    let old = llama().set("llama.rope.scale_linear", 2.0);
    assert_eq!(scaling(&old).unwrap(), RopeScaling::Linear { factor: 2.0 });
    let none = llama().set("llama.rope.scaling.factor", 0.0);
    assert_eq!(scaling(&none).unwrap(), RopeScaling::None);
    let yarn = llama()
        .set("llama.rope.scaling.type", "yarn")
        .set("llama.rope.scaling.factor", 4.0)
        .set("llama.rope.scaling.original_context_length", 4096);
    let config = read_file(&yarn).unwrap();
    assert_eq!(config.max_position, 16384);
    assert!(matches!(config.rope.scaling, RopeScaling::Yarn { attention_factor: None, .. }));
    let warmer = yarn.set("llama.rope.scaling.attn_factor", 2.0);
    let RopeScaling::Yarn { attention_factor, .. } = scaling(&warmer).unwrap() else {
        panic!("yarn expected")
    };
    assert!((attention_factor.unwrap() - 2.0 * (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    refused(&llama().set("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type");
    refused(&llama().set("llama.rope.scaling.type", "linear"), "llama.rope.scaling.factor");
}

#[test]
fn a_window_applies_to_every_layer() {
    let config = read_file(&llama().set("llama.attention.sliding_window", 100)).unwrap();
    assert_eq!(config.sliding_window, vec![Some(100); 4]);
}

#[test]
fn unsupported_and_absurd_values_are_refused_by_name() {
    refused(&llama().set("general.architecture", "gemma2"), "general.architecture");
    refused(&llama().without("general.architecture"), "general.architecture");
    refused(&llama().set("llama.expert_count", 8), "llama.expert_count");
    refused(&llama().set("llama.attention.causal", Item::Bool(false)), "llama.attention.causal");
    refused(&llama().set("llama.block_count", u32::MAX), "llama.block_count");
    refused(&llama().set("llama.block_count", "4"), "llama.block_count");
    refused(&llama().set("llama.attention.head_count", 0), "llama.attention.head_count");
    refused(&llama().set("llama.attention.head_count", 7), "llama.attention.key_length");
    refused(&llama().set("llama.attention.head_count_kv", 3), "num_key_value_heads");
    refused(&llama().set("llama.rope.dimension_count", 33), "rotary dimensions");
    refused(&llama().set("llama.rope.freq_base", f32::NAN), "llama.rope.freq_base");
    refused(&llama().set("llama.attention.layer_norm_rms_epsilon", 0.0), "rms_norm_eps");
    let unequal = llama().set("llama.attention.key_length", 32).set("llama.attention.value_length", 16);
    refused(&unequal, "llama.attention.value_length");
    for key in
        ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
    {
        let key = format!("llama.{key}");
        refused(&llama().without(&key), &key);
    }
}
