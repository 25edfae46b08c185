//! `config.json` of each family, as published (shortened), and what is refused.

use serde_json::{Value, json};

use super::*;
use crate::config::{RopeScaling, RopeStyle};

fn llama() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16", "rope_scaling": null, "head_dim": null
    })
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn scaled(scaling: Value) -> Result<RopeScaling, Error> {
    read(&with(llama(), "rope_scaling", scaling), None).map(|config| config.rope.scaling)
}

#[track_caller]
fn refused(config: &Value, field: &str) {
    match read(config, None) {
        Err(Error::Config { field: named, reason }) => assert_eq!(named, field, "{reason}"),
        other => panic!("{field} must be refused, not {other:?}"),
    }
}

#[test]
fn llama_1_without_key_value_heads_and_context_length() {
    let config = read(&llama(), None).unwrap();
    assert_eq!((config.num_kv_heads, config.head_dim, config.max_position), (32, 128, 2048));
    assert_eq!((config.rope.theta, config.rope.rotary_dim), (10_000.0, 128));
    assert_eq!(config.rope.style, RopeStyle::HalfSplit);
    assert!(!config.tie_embeddings && !config.qkv_bias && !config.output_bias && !config.mlp_bias);
    assert_eq!(config.sliding_window, vec![None; 32]);
    assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![2], Some(1)));
}

#[test]
fn llama_3_1_with_scaling_and_several_end_tokens() {
    let mut config = llama();
    config["num_key_value_heads"] = json!(8);
    config["vocab_size"] = json!(128256);
    config["rope_theta"] = json!(500000.0);
    config["max_position_embeddings"] = json!(131072);
    config["eos_token_id"] = json!([128001, 128008, 128009]);
    config["rope_scaling"] = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    let generation = json!({ "eos_token_id": [128009, 7], "bos_token_id": 128000 });
    let config = read(&config, Some(&generation)).unwrap();
    assert_eq!((config.num_kv_heads, config.max_position), (8, 131072));
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009, 7]);
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    assert_eq!(config.rope.scaling, expected);
}

#[test]
fn mistral_window_is_absent_null_or_a_number() {
    let mistral = with(llama(), "model_type", json!("mistral"));
    let windows = |config: &Value| read(config, None).unwrap().sliding_window;
    assert_eq!(windows(&mistral), vec![Some(4096); 32]);
    assert_eq!(windows(&with(mistral.clone(), "sliding_window", json!(null))), vec![None; 32]);
    assert_eq!(windows(&with(mistral.clone(), "sliding_window", json!(100))), vec![Some(100); 32]);
    refused(&with(mistral, "sliding_window", json!(0)), "sliding_window");
}

#[test]
fn qwen2_has_biases_and_a_window_only_when_used() {
    let mut config = with(llama(), "model_type", json!("qwen2"));
    config["sliding_window"] = json!(4096);
    config["max_window_layers"] = json!(28);
    config["use_sliding_window"] = json!(false);
    config["tie_word_embeddings"] = json!(true);
    let read_config = read(&config, None).unwrap();
    assert!(read_config.qkv_bias && !read_config.output_bias && read_config.tie_embeddings);
    assert_eq!(read_config.sliding_window, vec![None; 32]);
    config["use_sliding_window"] = json!(true);
    let windows = read(&config, None).unwrap().sliding_window;
    assert_eq!((windows[27], windows[28]), (None, Some(4096)));
    let types: Vec<_> =
        (0..32).map(|layer| if layer % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect();
    config["layer_types"] = json!(types);
    let windows = read(&config, None).unwrap().sliding_window;
    assert_eq!(windows[..3], [Some(4096), None, Some(4096)]);
    config["layer_types"] = json!(["chunked_attention"]);
    refused(&config, "layer_types");
}

#[test]
fn qwen3_has_head_norms_and_its_own_head_size() {
    let mut config = with(llama(), "model_type", json!("qwen3"));
    let head_dim = |config: &Value| read(config, None).unwrap().head_dim;
    config["num_attention_heads"] = json!(16);
    assert_eq!(head_dim(&config), 128, "the class's default, not width / heads");
    config["head_dim"] = json!(64);
    let read_config = read(&config, None).unwrap();
    assert!(read_config.qk_norm && !read_config.qkv_bias);
    assert_eq!((read_config.head_dim, read_config.q_dim()), (64, 1024));
}

#[test]
fn attention_bias_means_all_four_projections_in_llama() {
    let config = read(&with(llama(), "attention_bias", json!(true)), None).unwrap();
    assert!(config.qkv_bias && config.output_bias);
}

#[test]
fn rope_scaling_in_every_spelling() {
    assert_eq!(
        scaled(json!({ "type": "linear", "factor": 4.0 })).unwrap(),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        scaled(json!({ "rope_type": "linear", "factor": 4 })).unwrap(),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(scaled(json!({ "rope_type": "default" })).unwrap(), RopeScaling::None);
    let parameters = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0 });
    let config = read(&with(llama(), "rope_parameters", parameters), None).unwrap();
    assert_eq!((config.rope.theta, config.rope.scaling), (5000.0, RopeScaling::Linear { factor: 2.0 }));
    let nested = json!({ "full_attention": { "rope_type": "default" } });
    refused(&with(llama(), "rope_parameters", nested), "rope_parameters");
}

#[test]
fn yarn_extends_the_context_and_keeps_its_temperature() {
    let mut config = with(llama(), "max_position_embeddings", json!(32768));
    config["rope_scaling"] =
        json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 });
    let extended = read(&config, None).unwrap();
    assert_eq!(extended.max_position, 131072);
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 32768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    };
    assert_eq!(extended.rope.scaling, expected);
    config["rope_scaling"]["mscale"] = json!(1.0);
    config["rope_scaling"]["mscale_all_dim"] = json!(1.0);
    let RopeScaling::Yarn { attention_factor, .. } = read(&config, None).unwrap().rope.scaling else {
        panic!("yarn expected");
    };
    assert_eq!(attention_factor, Some(1.0));
    config["rope_scaling"]["truncate"] = json!(false);
    refused(&config, "rope_scaling.truncate");
}

#[test]
fn what_the_decoder_does_not_compute_is_refused() {
    for kind in ["dynamic", "longrope", "su", "mrope"] {
        refused(
            &with(llama(), "rope_scaling", json!({ "type": kind, "factor": 2.0 })),
            "rope_scaling.rope_type",
        );
    }
    for kind in ["gemma", "mixtral", "phi3", "qwen2_moe", "qwen3_moe", "llama4"] {
        refused(&with(llama(), "model_type", json!(kind)), "model_type");
    }
    let error = read(&with(llama(), "model_type", json!("gemma")), None).unwrap_err().to_string();
    assert!(error.contains("llama, mistral, qwen2, qwen3"), "{error}");
    refused(&with(llama(), "quantization_config", json!({ "quant_method": "gptq" })), "quantization_config");
    refused(&with(llama(), "hidden_act", json!("gelu")), "hidden_act");
    refused(&with(llama(), "num_local_experts", json!(8)), "num_local_experts");
    refused(&with(llama(), "partial_rotary_factor", json!(0.5)), "partial_rotary_factor");
}

#[test]
fn absurd_numbers_are_refused_by_name() {
    for (key, value) in [
        ("num_hidden_layers", json!(1u64 << 40)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(5)),
        ("num_key_value_heads", json!(0)),
        ("vocab_size", json!(u64::MAX)),
        ("vocab_size", json!(-1)),
        ("hidden_size", json!("4096")),
        ("hidden_size", json!(1.5)),
        ("intermediate_size", json!(0)),
        ("head_dim", json!(1 << 30)),
        ("max_position_embeddings", json!(1u64 << 50)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!([])),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(1e300)),
        ("eos_token_id", json!("</s>")),
        ("eos_token_id", json!([1, -5])),
        ("tie_word_embeddings", json!("yes")),
        ("rope_scaling", json!([1])),
    ] {
        refused(&with(llama(), key, value), key);
    }
    refused(&with(llama(), "head_dim", json!(127)), "rotary dimensions");
    refused(
        &with(llama(), "rope_scaling", json!({ "type": "linear", "factor": 0.0 })),
        "rope_scaling.factor",
    );
    refused(&with(llama(), "rope_scaling", json!({ "type": "linear" })), "rope_scaling.factor");
    for key in ["vocab_size", "hidden_size", "num_hidden_layers", "model_type"] {
        refused(&with(llama(), key, json!(null)), key);
    }
    refused(&json!([]), "config.json");
}

#[test]
fn end_tokens_outside_of_the_vocabulary_are_dropped() {
    let config = read(&with(llama(), "eos_token_id", json!([2, 2, 99999])), None).unwrap();
    assert_eq!(config.eos_token_ids, [2]);
}
