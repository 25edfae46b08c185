//! Building a backend and preparing the weights for it.

use candle_core::Tensor;

use super::{Backend, BuildOptions, Checkpoint, threads};
use crate::{
    Error, Model,
    kv_cache::CacheGeometry,
    llama::{Layer, Llama, LlamaWeights},
    ops::{Ops, OpsConfig, WeightRole, WeightSpec, reference::ReferenceOps},
    weights::{
        StoredType,
        names::{self, Part},
    },
};

pub(super) fn build(checkpoint: &Checkpoint, options: &BuildOptions) -> Result<Box<dyn Model>, Error> {
    if options.max_batch_rows == 0 {
        return Err(Error::Plan("max_batch_rows is 0; a step needs at least one row".into()));
    }
    let geometry = CacheGeometry::of(&checkpoint.config);
    if options.cache.geometry != geometry {
        let planned = options.cache.geometry;
        return Err(Error::Plan(format!(
            "the cache was planned for {planned:?}, but the model has {geometry:?}"
        )));
    }
    let config = OpsConfig {
        model: checkpoint.config.clone(),
        cache: options.cache.clone(),
        max_batch_rows: options.max_batch_rows,
        threads: threads::resolve(options.threads),
    };
    match options.backend {
        Backend::Cpu => Err(Error::Plan("the cpu backend is not built yet".into())),
        Backend::Reference => finish(checkpoint, ReferenceOps::new(config, candle_core::Device::Cpu)?),
        #[cfg(feature = "cuda")]
        Backend::Cuda => finish(checkpoint, ReferenceOps::new(config, candle_core::Device::new_cuda(0)?)?),
    }
}

fn finish<O>(checkpoint: &Checkpoint, mut ops: O) -> Result<Box<dyn Model>, Error>
where
    O: Ops + Send + 'static,
    O::Weight: Send,
{
    let weights = Preparer { checkpoint, ops: &mut ops }.weights()?;
    Ok(Box::new(Llama::new(ops, weights)))
}

/// Takes tensors out of the files in the decoder's order and gives each to the backend at once, so
/// that no more than one prepared weight's parts exist beside what the backend keeps.
struct Preparer<'a, O> {
    checkpoint: &'a Checkpoint,
    ops: &'a mut O,
}

impl<O: Ops> Preparer<'_, O> {
    fn weights(mut self) -> Result<LlamaWeights<O::Weight>, Error> {
        let config = &self.checkpoint.config;
        let role = if config.tie_embeddings { WeightRole::TiedEmbedding } else { WeightRole::Embedding };
        let embedding = self.matrix(&[Part::Embedding], &[], 0, role)?;
        let layers = (0..config.num_layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let norm = self.norm(Part::FinalNorm, 0)?;
        let head = if config.tie_embeddings {
            None
        } else {
            Some(self.matrix(&[Part::Head], &[], 0, WeightRole::Head)?)
        };
        Ok(LlamaWeights { embedding, layers, norm, head })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer<O::Weight>, Error> {
        use Part::{
            Down, DownBias, Gate, GateBias, K, KBias, Output, OutputBias, Q, QBias, Up, UpBias, V, VBias,
        };
        let linear = WeightRole::Linear;
        let attn_norm = self.norm(Part::AttnNorm, layer)?;
        let qkv = self.matrix(&[Q, K, V], &[QBias, KBias, VBias], layer, linear)?;
        let qk_norm = if self.checkpoint.config.qk_norm {
            Some((self.norm(Part::QNorm, layer)?, self.norm(Part::KNorm, layer)?))
        } else {
            None
        };
        Ok(Layer {
            attn_norm,
            qkv,
            qk_norm,
            output: self.matrix(&[Output], &[OutputBias], layer, linear)?,
            mlp_norm: self.norm(Part::MlpNorm, layer)?,
            gate_up: self.matrix(&[Gate, Up], &[GateBias, UpBias], layer, linear)?,
            down: self.matrix(&[Down], &[DownBias], layer, linear)?,
        })
    }

    /// `parts` stacked along their rows, with those `biases` that the geometry has.
    fn matrix(
        &mut self,
        parts: &[Part],
        biases: &[Part],
        layer: usize,
        role: WeightRole,
    ) -> Result<O::Weight, Error> {
        let Checkpoint { config, weights, naming, .. } = self.checkpoint;
        let parts =
            parts.iter().map(|part| weights.load(&part.name(*naming, layer))).collect::<Result<_, _>>()?;
        let biases = biases
            .iter()
            .filter(|bias| bias.is_needed(config))
            .map(|bias| weights.load_vector(&bias.name(*naming, layer)))
            .collect::<Result<Vec<_>, _>>()?;
        let bias = if biases.is_empty() { None } else { Some(Tensor::cat(&biases, 0)?) };
        self.ops.prepare(WeightSpec { parts, bias, role })
    }

    fn norm(&mut self, part: Part, layer: usize) -> Result<O::Weight, Error> {
        let Checkpoint { weights, naming, .. } = self.checkpoint;
        let weight = weights.load_vector(&part.name(*naming, layer))?;
        let parts = vec![crate::ops::RawTensor::Dense(weight)];
        self.ops.prepare(WeightSpec { parts, bias: None, role: WeightRole::Norm })
    }
}

/// Weights in the backend's form plus registers for `max_batch_rows`.
///
/// The reference backend widens everything to f32. The CPU backend keeps block formats at their
/// stored size (packing reorders them) and dense matrices as f32; norms and biases are always f32.
/// The workspace is every register once in f32, half as much again for quantised copies and
/// attention scratch, and one row of logits per batch row.
pub(super) fn planned_bytes(checkpoint: &Checkpoint, backend: Backend, max_batch_rows: usize) -> u64 {
    let Checkpoint { config, weights, naming, .. } = checkpoint;
    let keeps_blocks = backend == Backend::Cpu;
    let mut bytes = 0u64;
    let visited = names::for_each(config, |part, layer| {
        let numbers: usize = part.shape(config).iter().product();
        let stored = weights.info(&part.name(*naming, layer));
        bytes += match stored {
            Some(info) if keeps_blocks && matches!(info.stored, StoredType::Quantized(_)) => info.len as u64,
            _ => 4 * numbers as u64,
        };
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the closure never fails");
    let row = 2 * config.hidden_size + config.qkv_dim() + config.q_dim() + 3 * config.intermediate_size;
    bytes + max_batch_rows as u64 * (row as u64 * 6 + config.vocab_size as u64 * 4)
}
