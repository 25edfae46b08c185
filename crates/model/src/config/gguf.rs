//! Geometry from GGUF metadata.
//!
//! Key names are those of the GGUF specification; where it is silent, llama.cpp's reading of a key
//! is followed. Biases, the tied head and per-frequency factors have no keys: whether their tensors
//! exist decides.

use super::{
    MAX_LAYERS, ModelConfig, RopeConfig, RopeScaling, RopeStyle, bounded, check_architecture, hf, invalid,
    missing,
};
use crate::{
    Error,
    weights::gguf::{Metadata, Value},
};

/// What the list of tensors tells about the geometry.
#[derive(Debug, Clone, Default)]
pub(crate) struct TensorFacts {
    /// Rows of `token_embd.weight`.
    pub vocab_size: usize,
    /// `output.weight` exists.
    pub has_head: bool,
    /// `blk.0.attn_q.bias` exists.
    pub qkv_bias: bool,
    /// `blk.0.attn_output.bias` exists.
    pub output_bias: bool,
    /// `blk.0.ffn_gate.bias` exists.
    pub mlp_bias: bool,
    /// Values of `rope_freqs.weight`.
    pub rope_factors: Option<Vec<f32>>,
}

/// Geometry from `metadata`, with end tokens still to be added by the vocabulary's reader.
///
/// # Errors
/// [`Error::Config`] naming the key that is absent, wrong, or asks for what is not supported.
pub(crate) fn read(metadata: &Metadata<'_>, facts: TensorFacts) -> Result<ModelConfig, Error> {
    let architecture =
        metadata.str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    check_architecture("general.architecture", architecture)?;
    let keys = Keys { metadata, architecture };
    keys.refuse_unsupported()?;
    let hidden_size = keys.required("embedding_length")?;
    let num_layers = keys.required("block_count")?;
    bounded(&keys.name("block_count"), num_layers, MAX_LAYERS)?;
    let num_heads = keys.uniform("attention.head_count", num_layers)?;
    let num_heads = num_heads.ok_or_else(|| missing(&keys.name("attention.head_count")))?;
    bounded(&keys.name("attention.head_count"), num_heads, 1 << 12)?;
    let head_dim = keys.head_dim(hidden_size, num_heads)?;
    let feed_forward = keys.uniform("feed_forward_length", num_layers)?;
    let window = keys.usize("attention.sliding_window")?.filter(|&window| window > 0);
    let max_position = keys.required("context_length")?;
    let mut config = ModelConfig {
        architecture: architecture.to_owned(),
        vocab_size: facts.vocab_size,
        hidden_size,
        intermediate_size: feed_forward.ok_or_else(|| missing(&keys.name("feed_forward_length")))?,
        num_layers,
        num_heads,
        num_kv_heads: keys.uniform("attention.head_count_kv", num_layers)?.unwrap_or(num_heads),
        head_dim,
        max_position,
        rms_norm_eps: keys
            .f32("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing(&keys.name("attention.layer_norm_rms_epsilon")))?,
        rope: keys.rope(head_dim, max_position, facts.rope_factors)?,
        tie_embeddings: !facts.has_head,
        qkv_bias: facts.qkv_bias || architecture == "qwen2",
        output_bias: facts.output_bias,
        mlp_bias: facts.mlp_bias,
        qk_norm: architecture == "qwen3",
        sliding_window: vec![window; num_layers],
        eos_token_ids: Vec::new(),
        bos_token_id: None,
    };
    if let RopeScaling::Yarn { factor, original_max_position, .. } = config.rope.scaling {
        let extended = factor * original_max_position as f32;
        if extended.is_finite() && extended > 0.0 {
            config.max_position = config.max_position.max(extended as usize);
        }
    }
    config.validate()?;
    Ok(config)
}

/// Sets the end and start tokens, without duplicates and unknown ids.
pub(crate) fn set_special_tokens(config: &mut ModelConfig, eos: Vec<u32>, bos: Option<u32>) {
    config.eos_token_ids = eos;
    config.bos_token_id = bos;
    hf::keep_known_ids(config);
}

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    metadata: &'a Metadata<'a>,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn usize(&self, key: &str) -> Result<Option<usize>, Error> {
        self.metadata.usize(&self.name(key))
    }

    fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.metadata.f32(&self.name(key))
    }

    fn required(&self, key: &str) -> Result<usize, Error> {
        self.usize(key)?.ok_or_else(|| missing(&self.name(key)))
    }

    /// A number, or an array with the same number for each layer.
    fn uniform(&self, key: &str, num_layers: usize) -> Result<Option<usize>, Error> {
        let name = self.name(key);
        let Some(Value::Array(array)) = self.metadata.get(&name) else { return self.usize(key) };
        if array.len() != num_layers {
            return Err(invalid(&name, format!("has {} entries for {num_layers} layers", array.len())));
        }
        let values = array.whole_numbers(&name)?;
        let first = values.first().copied().ok_or_else(|| missing(&name))?;
        if values.iter().any(|&value| value != first) {
            return Err(invalid(&name, "differs between layers, which is not supported"));
        }
        usize::try_from(first).map(Some).map_err(|_| invalid(&name, format!("is {first}")))
    }

    fn head_dim(&self, hidden_size: usize, num_heads: usize) -> Result<usize, Error> {
        let key_length = self.usize("attention.key_length")?;
        let value_length = self.usize("attention.value_length")?;
        match (key_length, value_length) {
            (Some(key), Some(value)) if key != value => Err(invalid(
                &self.name("attention.value_length"),
                format!("is {value} and the key length {key}; only equal ones are supported"),
            )),
            (Some(length), _) | (None, Some(length)) => Ok(length),
            (None, None) if hidden_size.is_multiple_of(num_heads) => Ok(hidden_size / num_heads),
            (None, None) => Err(invalid(
                &self.name("attention.key_length"),
                format!("is absent, and width {hidden_size} is no multiple of {num_heads} heads"),
            )),
        }
    }

    fn rope(
        &self,
        head_dim: usize,
        max_position: usize,
        factors: Option<Vec<f32>>,
    ) -> Result<RopeConfig, Error> {
        let scaling = match (self.scaling(max_position)?, factors) {
            (scaling, None) => scaling,
            (RopeScaling::None, Some(factors)) => RopeScaling::Factors(factors),
            (_, Some(_)) => {
                return Err(invalid(
                    &self.name("rope.scaling.type"),
                    "together with the tensor rope_freqs.weight is not supported",
                ));
            }
        };
        // Converters permute the query and key rows of `llama` files for interleaved pairs.
        let style = match self.architecture {
            "llama" | "mistral" => RopeStyle::Interleaved,
            _ => RopeStyle::HalfSplit,
        };
        Ok(RopeConfig {
            theta: self.f32("rope.freq_base")?.unwrap_or(10_000.0),
            rotary_dim: self.usize("rope.dimension_count")?.unwrap_or(head_dim),
            style,
            scaling,
        })
    }

    fn scaling(&self, max_position: usize) -> Result<RopeScaling, Error> {
        let factor = match self.f32("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.f32("rope.scale_linear")?,
        };
        // A factor of 0 is how converters write "none".
        let factor = factor.filter(|&factor| factor != 0.0);
        let name = self.name("rope.scaling.type");
        let kind = match self.metadata.str(&name)? {
            Some(kind) => kind,
            None if factor.is_some() => "linear",
            None => "none",
        };
        let factor = || factor.ok_or_else(|| missing(&self.name("rope.scaling.factor")));
        match kind {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "yarn" => self.yarn(factor()?, max_position),
            other => {
                Err(invalid(&name, format!("{other:?} is not supported; supported are none, linear, yarn")))
            }
        }
    }

    fn yarn(&self, factor: f32, max_position: usize) -> Result<RopeScaling, Error> {
        // llama.cpp multiplies its own temperature by the file's factor.
        let attention_factor = self
            .f32("rope.scaling.attn_factor")?
            .filter(|&multiplier| (multiplier - 1.0).abs() > f32::EPSILON)
            .map(|multiplier| multiplier * (0.1 * factor.ln() + 1.0));
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position: self
                .usize("rope.scaling.original_context_length")?
                .unwrap_or(max_position),
            beta_fast: self.f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor,
        })
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        if self.usize("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(invalid(&self.name("expert_count"), "mixtures of experts are not supported"));
        }
        if self.metadata.bool(&self.name("attention.causal"))? == Some(false) {
            return Err(invalid(&self.name("attention.causal"), "must be true: this is a decoder"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
