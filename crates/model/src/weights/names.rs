//! Which tensors a geometry needs, what they are called in each format, and their shapes.

use crate::{Error, ModelConfig};

/// A format's way to name tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `blk.0.attn_q.weight`
    Gguf,
    /// `model.layers.0.self_attn.q_proj.weight`
    HuggingFace,
    /// `language_model.model.layers.0.self_attn.q_proj.weight`: a LLaVA model in the older layout.
    LlavaOuter,
    /// `model.language_model.layers.0.self_attn.q_proj.weight`: a LLaVA model in the newer layout.
    LlavaInner,
}

impl Naming {
    /// The names that a LLaVA folder uses, by its embedding's. The original repository names the decoder's
    /// tensors as if it were alone.
    pub(crate) fn of_llava(has_tensor: impl Fn(&str) -> bool) -> Self {
        let layouts = [Self::LlavaOuter, Self::LlavaInner];
        let found = layouts.into_iter().find(|&naming| has_tensor(&Part::Embedding.name(naming, 0)));
        found.unwrap_or(Self::HuggingFace)
    }

    /// The name of a Hugging Face decoder's tensor inside this layout.
    fn place(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Self::LlavaOuter, _) => format!("language_model.{name}"),
            (Self::LlavaInner, Some(inner)) => format!("model.language_model.{inner}"),
            _ => name.to_owned(),
        }
    }

    /// Tensors that checkpoints often carry and no decoder needs: stored inverse frequencies, the
    /// per-frequency factors that went into the configuration, a head beside a tied embedding, and what
    /// belongs to the vision model.
    pub(crate) fn is_known_leftover(self, name: &str) -> bool {
        const VISION: [&str; 4] =
            ["vision_tower.", "multi_modal_projector.", "mm_projector.", "image_newline"];
        let is_vision = || {
            let name = name.strip_prefix("model.").unwrap_or(name);
            VISION.iter().any(|part| name.starts_with(part))
        };
        name.ends_with("rotary_emb.inv_freq")
            || name == "rope_freqs.weight"
            || name == Part::Head.name(self, 0)
            || is_vision()
    }
}

/// A stored tensor of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Embedding,
    FinalNorm,
    Head,
    AttnNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    Output,
    OutputBias,
    MlpNorm,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
}

impl Part {
    const OUTSIDE: [Self; 3] = [Self::Embedding, Self::FinalNorm, Self::Head];
    const PER_LAYER: [Self; 18] = [
        Self::AttnNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::QNorm,
        Self::KNorm,
        Self::Output,
        Self::OutputBias,
        Self::MlpNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
        Self::GateBias,
        Self::UpBias,
        Self::DownBias,
    ];

    /// Whether the geometry has this tensor.
    pub(crate) fn is_needed(self, config: &ModelConfig) -> bool {
        match self {
            Self::Head => !config.tie_embeddings,
            Self::QBias | Self::KBias | Self::VBias => config.qkv_bias,
            Self::QNorm | Self::KNorm => config.qk_norm,
            Self::OutputBias => config.output_bias,
            Self::GateBias | Self::UpBias | Self::DownBias => config.mlp_bias,
            _ => true,
        }
    }

    /// `[outputs, inputs]` of a matrix, `[width]` of a norm or bias.
    pub(crate) fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let ModelConfig { hidden_size, intermediate_size, vocab_size, head_dim, .. } = *config;
        match self {
            Self::Embedding | Self::Head => vec![vocab_size, hidden_size],
            Self::FinalNorm | Self::AttnNorm | Self::MlpNorm => vec![hidden_size],
            Self::OutputBias | Self::DownBias => vec![hidden_size],
            Self::Q => vec![config.q_dim(), hidden_size],
            Self::K | Self::V => vec![config.kv_dim(), hidden_size],
            Self::QBias => vec![config.q_dim()],
            Self::KBias | Self::VBias => vec![config.kv_dim()],
            Self::QNorm | Self::KNorm => vec![head_dim],
            Self::Output => vec![hidden_size, config.q_dim()],
            Self::Gate | Self::Up => vec![intermediate_size, hidden_size],
            Self::GateBias | Self::UpBias => vec![intermediate_size],
            Self::Down => vec![hidden_size, intermediate_size],
        }
    }

    /// The tensor's name in the file; `layer` counts for parts of a layer only.
    pub(crate) fn name(self, naming: Naming, layer: usize) -> String {
        let (gguf, hugging_face) = self.stems();
        let is_layer = !Self::OUTSIDE.contains(&self);
        match naming {
            Naming::Gguf if is_layer => format!("blk.{layer}.{gguf}"),
            Naming::Gguf => gguf.to_owned(),
            _ if is_layer => naming.place(&format!("model.layers.{layer}.{hugging_face}")),
            _ => naming.place(hugging_face),
        }
    }

    fn stems(self) -> (&'static str, &'static str) {
        match self {
            Self::Embedding => ("token_embd.weight", "model.embed_tokens.weight"),
            Self::FinalNorm => ("output_norm.weight", "model.norm.weight"),
            Self::Head => ("output.weight", "lm_head.weight"),
            Self::AttnNorm => ("attn_norm.weight", "input_layernorm.weight"),
            Self::Q => ("attn_q.weight", "self_attn.q_proj.weight"),
            Self::K => ("attn_k.weight", "self_attn.k_proj.weight"),
            Self::V => ("attn_v.weight", "self_attn.v_proj.weight"),
            Self::QBias => ("attn_q.bias", "self_attn.q_proj.bias"),
            Self::KBias => ("attn_k.bias", "self_attn.k_proj.bias"),
            Self::VBias => ("attn_v.bias", "self_attn.v_proj.bias"),
            Self::QNorm => ("attn_q_norm.weight", "self_attn.q_norm.weight"),
            Self::KNorm => ("attn_k_norm.weight", "self_attn.k_norm.weight"),
            Self::Output => ("attn_output.weight", "self_attn.o_proj.weight"),
            Self::OutputBias => ("attn_output.bias", "self_attn.o_proj.bias"),
            Self::MlpNorm => ("ffn_norm.weight", "post_attention_layernorm.weight"),
            Self::Gate => ("ffn_gate.weight", "mlp.gate_proj.weight"),
            Self::Up => ("ffn_up.weight", "mlp.up_proj.weight"),
            Self::Down => ("ffn_down.weight", "mlp.down_proj.weight"),
            Self::GateBias => ("ffn_gate.bias", "mlp.gate_proj.bias"),
            Self::UpBias => ("ffn_up.bias", "mlp.up_proj.bias"),
            Self::DownBias => ("ffn_down.bias", "mlp.down_proj.bias"),
        }
    }
}

/// Calls `visit` with every tensor that `config` needs, and its layer (0 outside of layers).
///
/// # Errors
/// The first error of `visit`.
pub(crate) fn for_each(
    config: &ModelConfig,
    mut visit: impl FnMut(Part, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    for part in Part::OUTSIDE.into_iter().filter(|part| part.is_needed(config)) {
        visit(part, 0)?;
    }
    for layer in 0..config.num_layers {
        for part in Part::PER_LAYER.into_iter().filter(|part| part.is_needed(config)) {
            visit(part, layer)?;
        }
    }
    Ok(())
}
