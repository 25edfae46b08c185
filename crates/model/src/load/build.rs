//! Building a backend and preparing the weights for it.

use candle_core::Tensor;

use super::{Backend, BuildOptions, Checkpoint, threads};
use crate::{
    Error, Model,
    kv_cache::CacheGeometry,
    llama::{Layer, Llama, LlamaWeights},
    ops::{
        Ops, OpsConfig, RawTensor, WeightRole, WeightSpec,
        cpu::{self, CpuOps},
        reference::ReferenceOps,
    },
    weights::{
        StoredType, TensorInfo,
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
        side_car: options.side_car.clone(),
    };
    match options.backend {
        Backend::Cpu => finish(checkpoint, CpuOps::new(config)?),
        Backend::Reference => finish(checkpoint, ReferenceOps::new(config, candle_core::Device::Cpu)?),
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            // Products of f32 in TF32, with sums in f32: about the rounding of f16 weights, and twice the speed
            // of an evaluation.
            candle_core::cuda::set_gemm_reduced_precision_f32(true);
            finish(checkpoint, ReferenceOps::new(config, candle_core::Device::new_cuda(0)?)?)
        }
    }
}

fn finish<O>(checkpoint: &Checkpoint, mut ops: O) -> Result<Box<dyn Model>, Error>
where
    O: Ops + Send + 'static,
    O::Weight: Send,
{
    let weights = prepare(checkpoint, &mut ops)?;
    Ok(Box::new(Llama::new(ops, weights)))
}

pub(super) fn prepare<O: Ops>(
    checkpoint: &Checkpoint,
    ops: &mut O,
) -> Result<LlamaWeights<O::Weight>, Error> {
    Preparer { checkpoint, ops }.weights()
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
        let parts = vec![RawTensor::Dense(weight)];
        self.ops.prepare(WeightSpec { parts, bias: None, role: WeightRole::Norm })
    }
}

/// Rows of logits that the engine is expected to hold at once: its default of most running sequences.
const LOGIT_ROWS: usize = 64;

/// Weights in the backend's form, workspace for `max_batch_rows`, and the caller's logits.
///
/// The reference backend widens every tensor to f32 and has about two sets of registers alive at
/// once. The CPU backend keeps each matrix in its stored type, its rows padded to the kernels'
/// groups; `Q4_0` takes the form of `Q4_1`. How many threads it will have is not known here: scratch
/// is counted for all physical cores, which is what it takes unless told otherwise. A step samples one
/// row per running sequence, so logits are counted for [`LOGIT_ROWS`] rows or all, if they are fewer;
/// every further sequence that may run takes another `4 * vocab_size` bytes.
pub(super) fn planned_bytes(checkpoint: &Checkpoint, backend: Backend, max_batch_rows: usize) -> u64 {
    let Checkpoint { config, weights, naming, .. } = checkpoint;
    let mut bytes = 0u64;
    let visited = names::for_each(config, |part, layer| {
        let shape = part.shape(config);
        let numbers = shape.iter().product::<usize>() as u64;
        bytes += match (backend, weights.info(&part.name(*naming, layer))) {
            (Backend::Cpu, Some(info)) if shape.len() == 2 => packed_bytes(info),
            _ => 4 * numbers,
        };
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the closure never fails");
    let workspace = match backend {
        Backend::Cpu => {
            let scratch_width = scratch_width(checkpoint);
            cpu::workspace_bytes(config, max_batch_rows, threads::resolve(0), scratch_width)
        }
        _ => None,
    };
    let workspace = workspace.unwrap_or_else(|| {
        let outputs = config.q_dim() + config.qkv_dim();
        2 * 4 * max_batch_rows * (2 * config.hidden_size + outputs + 3 * config.intermediate_size)
    });
    let logits = max_batch_rows.min(LOGIT_ROWS) * config.vocab_size * size_of::<f32>();
    bytes + workspace as u64 + logits as u64
}

/// Numbers per row of the CPU backend's scratch: where matrices of several types are stacked, products
/// with a type that has no kernel cannot go straight to their place.
pub(super) fn scratch_width(checkpoint: &Checkpoint) -> usize {
    let Checkpoint { config, weights, naming, .. } = checkpoint;
    let stacked = [&[Part::Q, Part::K, Part::V][..], &[Part::Gate, Part::Up]];
    let of_layer = |layer: usize| {
        stacked.map(|parts| {
            let infos = parts.iter().filter_map(|part| weights.info(&part.name(*naming, layer)));
            let infos: Vec<&TensorInfo> = infos.collect();
            // Neighbours of one type are one product, which is as wide as the whole.
            let runs: Vec<&[&TensorInfo]> = infos.chunk_by(|a, b| a.stored == b.stored).collect();
            let rows = |run: &&[&TensorInfo]| run.iter().filter_map(|info| info.shape.first()).sum();
            let without_kernel = runs.iter().filter(|run| !has_kernel(run[0].stored)).map(rows);
            if runs.len() > 1 { without_kernel.max().unwrap_or(0) } else { 0 }
        })
    };
    (0..config.num_layers).flat_map(of_layer).max().unwrap_or(0)
}

fn has_kernel(stored: StoredType) -> bool {
    match stored {
        StoredType::Quantized(block) => cpu::kernel_format(block.dtype()).is_some(),
        _ => true,
    }
}

/// Bytes of a matrix in the CPU kernels' groups of 16 rows, or as stored if they have not its type.
fn packed_bytes(info: &TensorInfo) -> u64 {
    const GROUP_ROWS: u64 = 16;
    if !has_kernel(info.stored) {
        return info.len as u64;
    }
    let rows = info.shape.first().map_or(1, |&rows| rows as u64);
    let row_bytes = info.len as u64 / rows.max(1);
    let row_bytes = if info.stored.name() == "Q4_0" { row_bytes * 20 / 18 } else { row_bytes };
    rows.next_multiple_of(GROUP_ROWS) * row_bytes
}
