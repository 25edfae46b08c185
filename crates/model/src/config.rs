//! The typed geometry of a LLaMA-family model, from `config.json` or GGUF metadata.

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
}
