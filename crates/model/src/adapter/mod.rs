//! Low-rank adapters (LoRA, arXiv 2106.09685): per sequence, beside the weights that all share.
//!
//! An adapter gives some of the decoder's linears a second path, `x -> scale * B (A x)`. The weights stay as
//! they are: a row without an adapter has the same bits whoever is beside it. [`peft`] reads the files;
//! [`Loaded`] holds what a backend has made of them.

mod loaded;
mod peft;

pub use loaded::{AdaptedRows, LayerLora, Loaded};

use crate::{Error, ModelConfig, weights::names::Part};

/// A linear of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Linear {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    Output,
    /// The MLP's gate.
    Gate,
    /// The MLP's input.
    Up,
    /// The MLP's output.
    Down,
}

impl Linear {
    /// All, in order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Outputs and inputs.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let part = match self {
            Self::Q => Part::Q,
            Self::K => Part::K,
            Self::V => Part::V,
            Self::Output => Part::Output,
            Self::Gate => Part::Gate,
            Self::Up => Part::Up,
            Self::Down => Part::Down,
        };
        let shape = part.shape(config);
        (shape[0], shape[1])
    }

    /// Hugging Face's name of the module inside its layer.
    fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// Number type of an adapter's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

/// One linear's second path.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// `A [rank, inputs]`.
    pub a: Vec<f32>,
    /// `B [outputs, rank]`, rows in the order of the model's own weight.
    pub b: Vec<f32>,
    /// Rows of `A`.
    pub rank: usize,
    /// Factor on the result.
    pub scale: f32,
    /// What the numbers were stored as: they fit into it.
    pub stored: LoraType,
}

/// An adapter, read and checked for a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Adapter {
    /// Of each layer, the pairs of [`Linear::ALL`].
    layers: Vec<[Option<LoraPair>; 7]>,
}

impl Adapter {
    /// An adapter of `pairs` by layer and linear, for a model of `config`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a pair has another shape than its linear, is not there, or is there twice.
    pub fn new(
        config: &ModelConfig,
        pairs: impl IntoIterator<Item = (usize, Linear, LoraPair)>,
    ) -> Result<Self, Error> {
        let mut layers: Vec<[Option<LoraPair>; 7]> = vec![Default::default(); config.num_layers];
        for (layer, linear, pair) in pairs {
            let name = format!("layer {layer}, {}", linear.module());
            let wrong = |reason: String| Err(Error::Tensor { name: name.clone(), reason });
            let (outputs, inputs) = linear.shape(config);
            let LoraPair { a, b, rank, scale, .. } = &pair;
            if *rank == 0 || a.len() != rank * inputs || b.len() != rank * outputs {
                return wrong(format!("A is not [{rank}, {inputs}] or B not [{outputs}, {rank}]"));
            }
            if !scale.is_finite() || a.iter().chain(b).any(|number| !number.is_finite()) {
                return wrong("its numbers are not finite".into());
            }
            let Some(place) = layers.get_mut(layer).map(|layer| &mut layer[linear as usize]) else {
                return wrong(format!("the model has {} layers", config.num_layers));
            };
            if place.replace(pair).is_some() {
                return wrong("is there twice".into());
            }
        }
        Ok(Self { layers })
    }

    /// All pairs, by layer and linear.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, Linear, &LoraPair)> {
        self.layers.iter().enumerate().flat_map(|(idx, layer)| {
            Linear::ALL
                .into_iter()
                .zip(layer)
                .filter_map(move |(linear, pair)| Some((idx, linear, pair.as_ref()?)))
        })
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.pairs().map(|(_, _, pair)| pair.rank).max().unwrap_or(0)
    }
}

/// What a model makes room for beside weights, workspace and cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// Adapters that may be loaded at once.
    pub adapters: usize,
    /// Their largest rank.
    pub max_rank: usize,
    /// Rows of a prompt whose images lose tokens inside the decoder; 0: there are none.
    pub held_rows: usize,
}

impl Extras {
    /// Bytes that [`Model::reserve`](crate::Model::reserve) takes for a model with batches of up to
    /// `max_batch_rows` rows, and that adapters of the largest rank will take.
    pub fn planned_bytes(&self, config: &ModelConfig, max_batch_rows: usize) -> u64 {
        let rank = self.max_rank.next_multiple_of(GROUP);
        let of_pair = |linear: Linear| {
            let (outputs, inputs) = linear.shape(config);
            inputs * rank + outputs.next_multiple_of(GROUP) * self.max_rank
        };
        let of_layer: usize = Linear::ALL.into_iter().map(of_pair).sum();
        let adapters = (self.adapters * config.num_layers * of_layer) as u64 * 4;
        let scratch = if self.adapters > 0 { max_batch_rows * self.scratch_width(config) } else { 0 };
        adapters + 4 * scratch as u64 + self.held_bytes(config)
    }

    /// Numbers per row of a backend's scratch: inputs, what `A` makes of them, outputs.
    pub(crate) fn scratch_width(&self, config: &ModelConfig) -> usize {
        let widest = |of: fn((usize, usize)) -> usize| {
            Linear::ALL.into_iter().map(|linear| of(linear.shape(config))).max().unwrap_or(0)
        };
        widest(|shape| shape.1) + self.max_rank + widest(|shape| shape.0)
    }

    /// Bytes of rows that are held between layers: hidden states, keys, and queries if all rows rank.
    pub(crate) fn held_bytes(&self, config: &ModelConfig) -> u64 {
        let width = config.hidden_size + config.kv_dim() + config.q_dim();
        (self.held_rows * width * size_of::<f32>()) as u64
    }
}

/// Rows that the CPU backend packs together.
const GROUP: usize = 16;
