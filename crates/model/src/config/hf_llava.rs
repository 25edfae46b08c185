//! The decoder inside of a LLaVA configuration.
//!
//! Hugging Face's classes keep it in `text_config` and leave out what equals the defaults of the decoder's own
//! class. The original repository has the decoder's keys at the top.

use serde_json::{Map, Value, json};

use super::{check_architecture, invalid};
use crate::Error;

/// Whether the configuration is one of LLaVA-1.5 or LLaVA-NeXT, in Hugging Face's or the original form.
pub(crate) fn is_llava(config: &Value) -> bool {
    let model_type = config.get("model_type").and_then(Value::as_str);
    model_type.is_some_and(|name| matches!(name, "llava" | "llava_next" | "llava_llama" | "llava_mistral"))
}

/// The decoder's own configuration, complete.
///
/// # Errors
/// [`Error::Config`] for a decoder of another family.
pub(super) fn decoder(config: &Value) -> Result<Value, Error> {
    let Some(text) = config.get("text_config") else { return Ok(original(config)) };
    let text = text.as_object().ok_or_else(|| invalid("text_config", "must be an object"))?;
    let architecture = text.get("model_type").and_then(Value::as_str).unwrap_or("llama");
    check_architecture("text_config.model_type", architecture)?;
    let mut decoder = class_defaults(architecture);
    decoder.extend(text.iter().map(|(key, value)| (key.clone(), value.clone())));
    // What the decoder says of itself is about itself; these are about the whole and win where they are given.
    for key in ["tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config"] {
        if let Some(value) = config.get(key).filter(|value| !value.is_null()) {
            decoder.insert(key.to_owned(), value.clone());
        }
    }
    Ok(decoder.into())
}

fn original(config: &Value) -> Value {
    let mut decoder = config.as_object().cloned().unwrap_or_default();
    let is_mistral = decoder.get("model_type").and_then(Value::as_str) == Some("llava_mistral");
    decoder.insert("model_type".into(), if is_mistral { "mistral" } else { "llama" }.into());
    decoder.into()
}

/// What transformers' configuration class of the decoder assumes where the file is silent.
fn class_defaults(architecture: &str) -> Map<String, Value> {
    let defaults = match architecture {
        "mistral" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
            "bos_token_id": 1, "eos_token_id": 2
        }),
        "qwen2" => json!({
            "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768
        }),
        "qwen3" => json!({
            "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
            "head_dim": 128
        }),
        _ => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2
        }),
    };
    let Value::Object(mut defaults) = defaults else { return Map::new() };
    defaults.insert("model_type".into(), architecture.into());
    defaults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RopeStyle, hf};

    #[test]
    fn a_vicuna_that_names_nothing_is_a_7b_llama() {
        let config = json!({
            "model_type": "llava", "image_token_index": 32000,
            "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096,
                            "rms_norm_eps": 1e-5}
        });
        let config = hf::read(&config, None).unwrap();
        assert_eq!((config.hidden_size, config.intermediate_size, config.num_layers), (4096, 11008, 32));
        assert_eq!((config.num_heads, config.num_kv_heads, config.vocab_size), (32, 32, 32064));
        assert_eq!((config.rope.theta, config.rope.style), (10_000.0, RopeStyle::HalfSplit));
        assert_eq!((config.rms_norm_eps, config.tie_embeddings), (1e-5, false));
        assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![2], Some(1)));
    }

    #[test]
    fn mistral_defaults_and_ids_of_the_whole_model() {
        let config = json!({
            "model_type": "llava_next", "eos_token_id": [2, 7], "tie_word_embeddings": true,
            "text_config": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": null,
                            "tie_word_embeddings": false}
        });
        let config = hf::read(&config, None).unwrap();
        assert_eq!((config.num_kv_heads, config.intermediate_size), (8, 14336));
        assert_eq!((config.rope.theta, config.eos_token_ids), (1e6, vec![2, 7]));
        assert!(config.tie_embeddings);
        assert!(config.sliding_window.iter().all(Option::is_none));
    }

    #[test]
    fn the_original_repository_keeps_the_keys_at_the_top() {
        let config = json!({
            "model_type": "llava_mistral", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": null,
            "mm_hidden_size": 1024
        });
        let config = hf::read(&config, None).unwrap();
        assert_eq!((config.architecture.as_str(), config.hidden_size), ("mistral", 64));
        let other = json!({"model_type": "llava", "text_config": {"model_type": "opt"}});
        let error = hf::read(&other, None).unwrap_err().to_string();
        assert!(error.contains("text_config.model_type"), "{error}");
    }
}
