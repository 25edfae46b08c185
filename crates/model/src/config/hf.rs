//! `config.json` and `generation_config.json` of Hugging Face checkpoints.
//!
//! Defaults of absent keys are those of transformers' configuration classes, except that an absent
//! `num_key_value_heads` always means "as many as query heads": the tensors' shapes are checked
//! anyway.

use serde_json::{Map, Value};

use super::{MAX_LAYERS, ModelConfig, bounded, check_architecture, hf_llava, hf_rope, invalid, missing};
use crate::Error;
pub(crate) use hf_llava::is_llava;

/// Typed access to a JSON object; `null` counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The object in `value`, or an error that names `file`.
    pub(crate) fn of(file: &str, value: &'a Value) -> Result<Self, Error> {
        value.as_object().map(Self).ok_or_else(|| invalid(file, "must be a JSON object"))
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn usize(self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.map(Some).ok_or_else(|| invalid(key, format!("must be a whole number, not {}", brief(value))))
    }

    pub(crate) fn f32(self, key: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| invalid(key, format!("must be a number, not {}", brief(value))))
    }

    pub(super) fn bool(self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let answer = value.as_bool();
        answer.map(Some).ok_or_else(|| invalid(key, format!("must be true or false, not {}", brief(value))))
    }

    pub(super) fn str(self, key: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let text = value.as_str();
        text.map(Some).ok_or_else(|| invalid(key, format!("must be a text, not {}", brief(value))))
    }

    pub(super) fn object(self, key: &str) -> Result<Option<Self>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let object = value.as_object().map(Self);
        object.map(Some).ok_or_else(|| invalid(key, format!("must be an object, not {}", brief(value))))
    }

    pub(crate) fn u32(self, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = self.usize(key)? else { return Ok(None) };
        u32::try_from(value).map(Some).map_err(|_| invalid(key, format!("{value} is too large")))
    }

    /// A token id or a list of them.
    fn ids(self, key: &str) -> Result<Vec<u32>, Error> {
        let wrong = |value: &Value| {
            invalid(key, format!("must be a token id or a list of them, not {}", brief(value)))
        };
        let id =
            |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(value));
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// No value is itself an object.
    pub(super) fn is_flat(self) -> bool {
        !self.0.values().any(Value::is_object)
    }
}

/// A value as error messages show it: short, whatever the file holds.
fn brief(value: &Value) -> String {
    let mut text = value.to_string();
    if text.chars().count() > 40 {
        text = text.chars().take(40).chain("…".chars()).collect();
    }
    text
}

/// Geometry from a parsed `config.json`, with the end tokens of `generation_config.json` added.
///
/// # Errors
/// [`Error::Config`] naming the key that is absent, wrong, or asks for what is not supported.
pub(crate) fn read(config: &Value, generation: Option<&Value>) -> Result<ModelConfig, Error> {
    if is_llava(config) {
        return read_decoder(&hf_llava::decoder(config)?, generation);
    }
    read_decoder(config, generation)
}

fn read_decoder(config: &Value, generation: Option<&Value>) -> Result<ModelConfig, Error> {
    let fields = Fields::of("config.json", config)?;
    let architecture = fields.str("model_type")?.ok_or_else(|| missing("model_type"))?;
    check_architecture("model_type", architecture)?;
    refuse_unsupported(fields)?;
    let is_qwen3 = architecture == "qwen3";
    let required = |key: &str| fields.usize(key)?.ok_or_else(|| missing(key));
    let hidden_size = required("hidden_size")?;
    let num_heads = required("num_attention_heads")?;
    let num_layers = required("num_hidden_layers")?;
    bounded("num_attention_heads", num_heads, 1 << 12)?;
    bounded("num_hidden_layers", num_layers, MAX_LAYERS)?;
    let head_dim = match fields.usize("head_dim")? {
        Some(head_dim) => head_dim,
        None if is_qwen3 => 128,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let reason =
                format!("is absent, and hidden_size {hidden_size} is no multiple of {num_heads} heads");
            return Err(invalid("head_dim", reason));
        }
    };
    let attention_bias = fields.bool("attention_bias")?.unwrap_or(false);
    let max_position = fields.usize("max_position_embeddings")?.unwrap_or(2048);
    let hf_rope::Rope { rope, max_position } = hf_rope::read(fields, head_dim, max_position)?;
    let mut config = ModelConfig {
        architecture: architecture.to_owned(),
        vocab_size: required("vocab_size")?,
        hidden_size,
        intermediate_size: required("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: fields.usize("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        max_position,
        rms_norm_eps: fields.f32("rms_norm_eps")?.unwrap_or(1e-6),
        rope,
        tie_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
        // Qwen2 has these biases without a key for them; Mistral never has any.
        qkv_bias: architecture == "qwen2" || (architecture != "mistral" && attention_bias),
        output_bias: matches!(architecture, "llama" | "qwen3") && attention_bias,
        mlp_bias: architecture == "llama" && fields.bool("mlp_bias")?.unwrap_or(false),
        qk_norm: is_qwen3,
        sliding_window: sliding_windows(fields, architecture, num_layers)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        bos_token_id: fields.ids("bos_token_id")?.first().copied(),
    };
    if let Some(generation) = generation {
        let generation = Fields::of("generation_config.json", generation)?;
        config.eos_token_ids.extend(generation.ids("eos_token_id")?);
        config.bos_token_id = config.bos_token_id.or(generation.ids("bos_token_id")?.first().copied());
    }
    keep_known_ids(&mut config);
    config.validate()?;
    Ok(config)
}

/// Drops duplicates and ids outside of the vocabulary, which some published configs contain.
pub(super) fn keep_known_ids(config: &mut ModelConfig) {
    let vocab_size = config.vocab_size;
    let known = |id: &u32| (*id as usize) < vocab_size;
    let mut ids = Vec::new();
    for id in std::mem::take(&mut config.eos_token_ids) {
        if !known(&id) {
            tracing::warn!(id, vocab_size, "the file names an end token outside of its vocabulary: ignored");
        } else if !ids.contains(&id) {
            ids.push(id);
        }
    }
    config.eos_token_ids = ids;
    config.bos_token_id = config.bos_token_id.filter(known);
}

fn refuse_unsupported(fields: Fields<'_>) -> Result<(), Error> {
    if let Some(quantization) = fields.object("quantization_config")? {
        let method = quantization.str("quant_method")?.unwrap_or("unnamed");
        return Err(invalid(
            "quantization_config",
            format!("method {method:?} is not supported; use the unquantised checkpoint or a GGUF file"),
        ));
    }
    for key in ["num_experts", "num_local_experts"] {
        if fields.usize(key)?.is_some_and(|experts| experts > 0) {
            return Err(invalid(key, "mixtures of experts are not supported"));
        }
    }
    match fields.str("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => Err(invalid("hidden_act", format!("{other:?} is not supported; supported is silu"))),
    }
}

/// Which layers see only the latest tokens.
///
/// Mistral: all layers, 4,096 where the key is absent and none where it is `null`. Qwen: only with
/// `use_sliding_window`, from layer `max_window_layers` on. `layer_types` overrides the choice of
/// layers. LLaMA has no window, whatever the key says.
fn sliding_windows(
    fields: Fields<'_>,
    architecture: &str,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, Error> {
    let is_qwen = architecture.starts_with("qwen");
    let window = match fields.usize("sliding_window")? {
        Some(window) => Some(window),
        None if fields.0.contains_key("sliding_window") => None,
        None => Some(4096),
    };
    let is_used =
        if is_qwen { fields.bool("use_sliding_window")?.unwrap_or(false) } else { architecture == "mistral" };
    let Some(window) = window.filter(|_| is_used) else { return Ok(vec![None; num_layers]) };
    if let Some(types) = fields.get("layer_types") {
        let types = types.as_array().filter(|types| types.len() == num_layers);
        let types = types.ok_or_else(|| {
            invalid("layer_types", format!("must be a list of {num_layers} names, one per layer"))
        })?;
        return types.iter().map(|kind| layer_window(kind, window)).collect();
    }
    let first = if is_qwen { fields.usize("max_window_layers")?.unwrap_or(28) } else { 0 };
    Ok((0..num_layers).map(|layer| (layer >= first).then_some(window)).collect())
}

fn layer_window(kind: &Value, window: usize) -> Result<Option<usize>, Error> {
    match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(Some(window)),
        _ => Err(invalid(
            "layer_types",
            format!("{} is not supported; supported are full_attention, sliding_attention", brief(kind)),
        )),
    }
}

#[cfg(test)]
#[path = "hf_tests.rs"]
mod tests;
