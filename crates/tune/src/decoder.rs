//! The frozen decoder, batched over sequences of equal length `[b, n]`, differentiable in its inputs.

use candle_core::{D, DType, Device, Tensor};
use locket_model::{
    ModelConfig,
    config::RopeStyle,
    llama::{Layer, LlamaWeights},
    load::Checkpoint,
    ops::{
        reference::{ReferenceOps, ReferenceWeight},
        rope,
    },
};

use crate::{
    error::Result,
    gradients::{self, Rotation, linear, rms_norm, rotate, silu_mul},
};

/// Rows whose logits exist at once.
const LOGIT_ROWS: usize = 2048;

/// A matrix `[out, in]` and its bias `[out]`.
struct Matrix {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Matrix {
    fn of(weight: ReferenceWeight) -> Result<Self> {
        let (parts, bias) = weight.into_parts();
        Ok(Self { weight: Tensor::cat(&parts, 0)?, bias })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(x, &self.weight, self.bias.as_ref())?)
    }
}

struct FrozenLayer {
    attn_norm: Tensor,
    qkv: Matrix,
    qk_norm: Option<(Tensor, Tensor)>,
    output: Matrix,
    mlp_norm: Tensor,
    gate_up: Matrix,
    down: Matrix,
}

impl FrozenLayer {
    fn of(layer: Layer<ReferenceWeight>) -> Result<Self> {
        let qk_norm = match layer.qk_norm {
            Some((q, k)) => Some((Matrix::of(q)?.weight, Matrix::of(k)?.weight)),
            None => None,
        };
        Ok(Self {
            attn_norm: Matrix::of(layer.attn_norm)?.weight,
            qkv: Matrix::of(layer.qkv)?,
            qk_norm,
            output: Matrix::of(layer.output)?,
            mlp_norm: Matrix::of(layer.mlp_norm)?.weight,
            gate_up: Matrix::of(layer.gate_up)?,
            down: Matrix::of(layer.down)?,
        })
    }
}

/// Queries `[b, heads, n, head_dim]`, keys and values `[b, kv_heads, n, head_dim]`, not rotated.
pub(crate) struct Heads {
    pub queries: Tensor,
    pub keys: Tensor,
    pub values: Tensor,
}

/// The order of a key's dimensions in the model's file. Trained weights are for half-split order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyOrder {
    /// Rotary pairs are half the rotated dimensions apart.
    HalfSplit,
    /// Rotary pairs are neighbours.
    Interleaved {
        /// Leading dimensions that are rotated.
        rotary_dim: usize,
    },
}

/// The frozen model on one device.
pub(crate) struct Decoder {
    config: ModelConfig,
    device: Device,
    dtype: DType,
    embedding: Tensor,
    layers: Vec<FrozenLayer>,
    norm: Tensor,
    head: Tensor,
    /// Angle per position of each rotated pair, and the factor on cos and sin.
    frequencies: (Vec<f32>, f32),
}

impl Decoder {
    /// Loads the weights onto `device` in `dtype`.
    pub(crate) fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Self> {
        let config = checkpoint.config.clone();
        let mut ops = ReferenceOps::for_weights(config.clone(), device.clone(), dtype);
        let LlamaWeights { embedding, layers, norm, head } = checkpoint.prepare(&mut ops)?;
        let embedding = Matrix::of(embedding)?.weight;
        let head = match head {
            Some(head) => Matrix::of(head)?.weight,
            None => embedding.clone(),
        };
        let layers = layers.into_iter().map(FrozenLayer::of).collect::<Result<_>>()?;
        let frequencies = rope::frequencies(&config.rope);
        let norm = Matrix::of(norm)?.weight;
        Ok(Self { config, device: device.clone(), dtype, embedding, layers, norm, head, frequencies })
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// How the dimensions of its keys are ordered.
    pub(crate) fn key_order(&self) -> KeyOrder {
        match self.config.rope.style {
            RopeStyle::HalfSplit => KeyOrder::HalfSplit,
            RopeStyle::Interleaved => KeyOrder::Interleaved { rotary_dim: self.config.rope.rotary_dim },
        }
    }

    /// Cosine and sine of positions `first..first + rows`.
    pub(crate) fn rotation(&self, first: usize, rows: usize) -> Result<Rotation> {
        let (frequencies, factor) = &self.frequencies;
        // In f64, because f32 loses whole turns at long positions.
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = (first..first + rows)
                .flat_map(|p| frequencies.iter().map(move |&f| of(p as f64 * f64::from(f))))
                .map(|value| value * f64::from(*factor))
                .collect();
            let table = Tensor::from_vec(values, (rows, frequencies.len()), &Device::Cpu)?;
            Ok(table.to_dtype(self.dtype)?.to_device(&self.device)?)
        };
        Ok(Rotation { cos: table(f64::cos)?, sin: table(f64::sin)?, style: self.config.rope.style })
    }

    /// `ids [b, n]` to `[b, n, hidden]`.
    pub(crate) fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, rows) = ids.dims2()?;
        let x = self.embedding.index_select(&ids.flatten_all()?, 0)?;
        Ok(x.reshape((batch, rows, self.config.hidden_size))?)
    }

    /// Queries, keys and values of one layer for its input `x [b, n, hidden]`.
    pub(crate) fn project(&self, layer: usize, x: &Tensor) -> Result<Heads> {
        let Self { config, layers, .. } = self;
        let (layer, eps) = (&layers[layer], config.rms_norm_eps);
        let (batch, rows, _) = x.dims3()?;
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let all = layer.qkv.apply(&rms_norm(x, &layer.attn_norm, eps)?)?;
        let all = all.reshape((batch, rows, heads + 2 * kv_heads, config.head_dim))?;
        let part = |from, count| -> Result<Tensor> {
            Ok(all.narrow(2, from, count)?.transpose(1, 2)?.contiguous()?)
        };
        let mut split = Heads {
            queries: part(0, heads)?,
            keys: part(heads, kv_heads)?,
            values: part(heads + kv_heads, kv_heads)?,
        };
        if let Some((q, k)) = &layer.qk_norm {
            split.queries = rms_norm(&split.queries, q, eps)?;
            split.keys = rms_norm(&split.keys, k, eps)?;
        }
        Ok(split)
    }

    /// The layer's output, from its input and what attention gave `[b, heads, n, head_dim]`.
    pub(crate) fn finish(&self, layer: usize, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let layer = &self.layers[layer];
        let attended = attended.transpose(1, 2)?.contiguous()?.flatten_from(2)?;
        let x = (x + layer.output.apply(&attended)?)?;
        let y = rms_norm(&x, &layer.mlp_norm, self.config.rms_norm_eps)?;
        let y = layer.down.apply(&silu_mul(&layer.gate_up.apply(&y)?)?)?;
        Ok((x + y)?)
    }

    /// `x [b, heads, n, head_dim]` at the positions of `rotation`.
    pub(crate) fn rotate(&self, x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
        Ok(rotate(x, rotation)?)
    }

    /// Mean cross entropy of predicting `targets [b, n]` from the last layer's output `[b, n, hidden]`.
    pub(crate) fn loss(&self, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let hidden = rms_norm(&x.contiguous()?, &self.norm, self.config.rms_norm_eps)?;
        let hidden = hidden.reshape(((), self.config.hidden_size))?;
        Ok(gradients::cross_entropy(&hidden, &self.head, &targets.flatten_all()?, LOGIT_ROWS)?)
    }

    /// The scorer's input `[b, n, 2 kv_heads head_dim]` in f32: for every head its key and value, the
    /// key's rotary pairs in half-split order whatever the file's order is.
    pub(crate) fn features(&self, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let keys = match self.key_order() {
            KeyOrder::HalfSplit => keys.clone(),
            KeyOrder::Interleaved { rotary_dim } => half_split(keys, rotary_dim)?,
        };
        let features = Tensor::cat(&[&keys, values], D::Minus1)?.transpose(1, 2)?.contiguous()?;
        Ok(features.flatten_from(2)?.to_dtype(DType::F32)?)
    }
}

/// `k_half[s * r/2 + j] = k[2j + s]` within the first `r` dimensions of `keys [b, heads, n, head_dim]`.
pub(crate) fn half_split(keys: &Tensor, rotary_dim: usize) -> Result<Tensor> {
    let (batch, heads, rows, head_dim) = keys.dims4()?;
    let pairs = keys.narrow(3, 0, rotary_dim)?.contiguous()?;
    let pairs = pairs.reshape((batch, heads, rows, rotary_dim / 2, 2))?.transpose(3, 4)?.contiguous()?;
    let halves = pairs.flatten_from(3)?;
    match head_dim - rotary_dim {
        0 => Ok(halves),
        rest => Ok(Tensor::cat(&[halves, keys.narrow(3, rotary_dim, rest)?.contiguous()?], 3)?),
    }
}
