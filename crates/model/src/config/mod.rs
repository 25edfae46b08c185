//! The typed geometry of a LLaMA-family model, from `config.json` ([`hf`]) or GGUF metadata
//! ([`gguf`]).
//!
//! Both readers refuse what this decoder does not compute (other architectures, rope types, mixtures
//! of experts) instead of guessing, and bound every number before it sizes an allocation.

pub(crate) mod gguf;
pub(crate) mod hf;
mod hf_llava;
mod hf_rope;

use crate::Error;

/// Architectures that can be loaded, as `model_type` and `general.architecture` spell them.
pub const SUPPORTED_ARCHITECTURES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// How the two halves of a rotary pair lie in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs are `(2i, 2i + 1)`: GGUF files of architecture `llama`.
    Interleaved,
    /// Pairs are `(i, i + head_dim / 2)`: Hugging Face checkpoints, GGUF `qwen2` and `qwen3`.
    HalfSplit,
}

/// Scaling of rotary frequencies for contexts beyond the pre-trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain frequencies.
    None,
    /// All positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3.1's piecewise scaling.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f32,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided by `factor`.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position / high_freq_factor` stay.
        high_freq_factor: f32,
        /// The pre-trained length.
        original_max_position: usize,
    },
    /// YaRN (arXiv 2309.00071): frequency ramp plus attention temperature.
    Yarn {
        /// Extension factor.
        factor: f32,
        /// The pre-trained length.
        original_max_position: usize,
        /// Ramp start, in rotations (default 32).
        beta_fast: f32,
        /// Ramp end, in rotations (default 1).
        beta_slow: f32,
        /// Multiplies cos and sin; `None` is `0.1 ln(factor) + 1`.
        attention_factor: Option<f32>,
    },
    /// One divisor per frequency `[head_dim / 2]` (the GGUF tensor `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Rotary embedding of queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies (10,000 in LLaMA 1 and 2).
    pub theta: f32,
    /// Number of leading dimensions of a head that are rotated; usually all of `head_dim`.
    pub rotary_dim: usize,
    /// Which dimensions form a pair.
    pub style: RopeStyle,
    /// Long-context scaling.
    pub scaling: RopeScaling,
}

/// Geometry of a decoder of the LLaMA family (LLaMA 1–3.x, Mistral, Qwen2, Qwen3).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub architecture: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Dimensions of a head; not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Trained context length in tokens.
    pub max_position: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Biases on the q, k, v projections (Qwen2).
    pub qkv_bias: bool,
    /// Bias on the attention output projection (`attention_bias` in LLaMA's config sets both).
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMS norm of each query and key head before rotation (Qwen3).
    pub qk_norm: bool,
    /// Per layer: a token sees only this many latest tokens, itself included; `None` sees all.
    pub sliding_window: Vec<Option<usize>>,
    /// Tokens that end a turn.
    pub eos_token_ids: Vec<u32>,
    /// The start token, if the model has one.
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Width of all query heads: `num_heads * head_dim`.
    pub fn q_dim(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all key (or value) heads: `num_kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of the fused projection: `q_dim + 2 * kv_dim`.
    pub fn qkv_dim(&self) -> usize {
        self.q_dim() + 2 * self.kv_dim()
    }

    /// Checks what every later computation takes for granted: nothing is zero or absurdly large,
    /// heads divide, rotary dimensions are even and inside a head, all factors are finite.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first field that is wrong.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        // Each bound is far above any published model and far below what could overflow a product
        // of two of them, or make a loop over layers or positions a burden.
        bounded("vocab_size", self.vocab_size, 1 << 24)?;
        bounded("hidden_size", self.hidden_size, 1 << 20)?;
        bounded("intermediate_size", self.intermediate_size, 1 << 22)?;
        bounded("num_hidden_layers", self.num_layers, MAX_LAYERS)?;
        bounded("num_attention_heads", self.num_heads, 1 << 12)?;
        bounded("num_key_value_heads", self.num_kv_heads, 1 << 12)?;
        bounded("head_dim", self.head_dim, 1 << 12)?;
        bounded("max_position_embeddings", self.max_position, 1 << 24)?;
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(invalid(
                "num_key_value_heads",
                format!("is {}, which does not divide the {} query heads", self.num_kv_heads, self.num_heads),
            ));
        }
        let rotary_dim = self.rope.rotary_dim;
        if rotary_dim == 0 || rotary_dim % 2 == 1 || rotary_dim > self.head_dim {
            return Err(invalid(
                "rotary dimensions",
                format!("are {rotary_dim}; they must be even and at most the head's {}", self.head_dim),
            ));
        }
        positive("rms_norm_eps", self.rms_norm_eps)?;
        positive("rope_theta", self.rope.theta)?;
        self.rope.scaling.validate(rotary_dim)?;
        if self.sliding_window.len() != self.num_layers {
            return Err(invalid("sliding_window", "must be known for every layer"));
        }
        if self.sliding_window.contains(&Some(0)) {
            return Err(invalid("sliding_window", "is 0; it must be at least 1, or absent"));
        }
        Ok(())
    }
}

impl RopeScaling {
    fn validate(&self, rotary_dim: usize) -> Result<(), Error> {
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("rope_scaling.factor", *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("rope_scaling.factor", *factor)?;
                positive("rope_scaling.low_freq_factor", *low_freq_factor)?;
                positive("rope_scaling.high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(invalid(
                        "rope_scaling.high_freq_factor",
                        format!("is {high_freq_factor}; it must be above low_freq_factor, {low_freq_factor}"),
                    ));
                }
                bounded(ORIGINAL_MAX_POSITION, *original_max_position, 1 << 24)
            }
            Self::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                positive("rope_scaling.factor", *factor)?;
                positive("rope_scaling.beta_fast", *beta_fast)?;
                positive("rope_scaling.beta_slow", *beta_slow)?;
                if beta_fast < beta_slow {
                    return Err(invalid(
                        "rope_scaling.beta_fast",
                        format!("is {beta_fast}; it must not be below beta_slow, {beta_slow}"),
                    ));
                }
                if let Some(attention_factor) = attention_factor {
                    positive("rope_scaling.attention_factor", *attention_factor)?;
                }
                bounded(ORIGINAL_MAX_POSITION, *original_max_position, 1 << 24)
            }
            Self::Factors(factors) => {
                if factors.len() != rotary_dim / 2 {
                    return Err(invalid(
                        "rope_freqs.weight",
                        format!("has {} factors; {} are needed", factors.len(), rotary_dim / 2),
                    ));
                }
                factors.iter().try_for_each(|&factor| positive("rope_freqs.weight", factor))
            }
        }
    }
}

const ORIGINAL_MAX_POSITION: &str = "rope_scaling.original_max_position_embeddings";

/// The most layers that are believed; bounds the per-layer lists.
const MAX_LAYERS: usize = 1024;

fn invalid(field: &str, reason: impl Into<String>) -> Error {
    Error::Config { field: field.to_owned(), reason: reason.into() }
}

fn missing(field: &str) -> Error {
    invalid(field, "is absent, and there is no default for it")
}

fn bounded(field: &str, value: usize, max: usize) -> Result<(), Error> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(invalid(field, format!("is {value}; it must be between 1 and {max}")))
    }
}

fn positive(field: &str, value: f32) -> Result<(), Error> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(invalid(field, format!("is {value}; it must be a finite number above 0")))
    }
}

fn check_architecture(field: &str, name: &str) -> Result<(), Error> {
    if SUPPORTED_ARCHITECTURES.contains(&name) {
        return Ok(());
    }
    let reason = format!("{name:?} is not supported; supported are {}", SUPPORTED_ARCHITECTURES.join(", "));
    Err(invalid(field, reason))
}
