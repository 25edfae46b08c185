//! The oracle: plain candle operations on any device, registers rebound to new tensors.
//!
//! Slow on purpose. Every operation of the forward pass has a gradient: candle's fused norms,
//! softmax, rotary embedding and quantised products silently have none, so their slow forms are
//! used. Quantised weights are widened at [`Ops::prepare`].
//!
//! The cache comes in two modes. With blocks, keys and values are written into memory allocated at
//! start, as the serving backends do (this cuts gradients). [`ReferenceOps::without_cache`] has no
//! blocks: each sequence of a batch is whole and attends to itself, and logits are differentiable
//! in the weights ([`Llama::forward_train`]).

mod cache;
mod folds;
mod scorer;
mod slots;

use candle_core::{D, DType, Device, Tensor};

use cache::Blocks;
use scorer::LayerScorer;

use super::{Ops, OpsConfig, RawTensor, Reg, WeightSpec, rope};
use crate::{
    BlockId, Error, Extras, MemoryUse, ModelConfig, TokenScore,
    adapter::{Linear, LoraPair},
    batch::{Batch, BatchSequence},
    config::RopeStyle,
    kv_cache::{CacheGeometry, CachePlan, CacheSettings, FoldContext, Rotation, SideArrays, SlotType},
    llama::Llama,
};

/// A weight as candle tensors in the computing type.
#[derive(Debug, Clone)]
pub struct ReferenceWeight {
    /// Matrices `[out_i, in]`, kept apart so that a trained part is read anew in every step.
    parts: Vec<Tensor>,
    /// `[sum of out_i]`.
    bias: Option<Tensor>,
}

impl ReferenceWeight {
    /// The matrices `[out_i, in]` that are stacked along their rows (one vector for a norm), and the
    /// bias `[sum of out_i]`, for callers that compute with them themselves (training).
    pub fn into_parts(self) -> (Vec<Tensor>, Option<Tensor>) {
        (self.parts, self.bias)
    }
}

/// A linear's second path as candle tensors in the computing type.
#[derive(Debug, Clone)]
pub struct ReferenceLora {
    /// `[inputs, rank]`.
    down: Tensor,
    /// `[rank, outputs]`, scaled.
    up: Tensor,
}

/// An uploaded batch.
#[derive(Debug, Clone)]
pub struct ReferenceStep {
    /// `[rows]`.
    ids: Tensor,
    /// `[rows, 1, rotary_dim / 2]`.
    cos: Tensor,
    /// `[rows, 1, rotary_dim / 2]`.
    sin: Tensor,
    /// `[samples]`.
    sample_rows: Tensor,
    /// The rows whose embedding is given, `[rows, 1]`, and their embeddings `[rows, hidden]`.
    embedded: Option<(Tensor, Tensor)>,
    /// Positions in their sequences `[rows]`, on the host.
    positions: Vec<u32>,
    sequences: Vec<BatchSequence>,
    /// The layer that the angles are of.
    first_layer: usize,
}

/// Plain candle operations. See the [module](self).
pub struct ReferenceOps {
    config: OpsConfig,
    device: Device,
    dtype: DType,
    /// Angle per position of each rotated pair, and the factor on cos and sin.
    frequencies: (Vec<f32>, f32),
    registers: [Option<Tensor>; 6],
    /// `None`: no cache, every sequence of a batch is whole.
    blocks: Option<Blocks>,
    fold_context: FoldContext,
    scorers: Vec<LayerScorer>,
    /// The learned method's scores of the step's rows `[rows, kv_heads, 2]`.
    row_scores: Vec<f32>,
    weight_bytes: u64,
}

impl ReferenceOps {
    /// Computes in f32 with the blocks of `config.cache`, allocated here.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has no room for the blocks.
    pub fn new(config: OpsConfig, device: Device) -> Result<Self, Error> {
        Self::with_dtype(config, device, DType::F32)
    }

    /// As [`Self::new`], with weights and activations in `dtype` (norms and softmax of half types
    /// still run in f32).
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_dtype(config: OpsConfig, device: Device, dtype: DType) -> Result<Self, Error> {
        let shares = config.side_car.as_deref().and_then(|side_car| side_car.layer_shares.as_deref());
        let blocks = Blocks::new(&config.cache, shares, &device)?;
        let scorers = scorer::scorers(config.side_car.as_deref(), &device)?;
        let mut ops = Self::without_cache(config, device, dtype);
        ops.scorers = scorers;
        ops.blocks = Some(blocks);
        Ok(ops)
    }

    /// No cache: block ids are ignored, each sequence of a batch is whole and attends to itself.
    pub fn without_cache(config: OpsConfig, device: Device, dtype: DType) -> Self {
        let frequencies = rope::frequencies(&config.model.rope);
        let rotation = Rotation::of(&config.model);
        let (side_car, slot_type) = (config.side_car.clone(), config.cache.slot_type);
        let fold_context = FoldContext { rotation, side_car, slot_type };
        Self {
            config,
            device,
            dtype,
            frequencies,
            registers: Default::default(),
            blocks: None,
            fold_context,
            scorers: Vec::new(),
            row_scores: Vec::new(),
            weight_bytes: 0,
        }
    }

    /// A backend that only prepares weights, for callers that compute with them themselves
    /// ([`ReferenceWeight::into_parts`]): no cache, no rows.
    pub fn for_weights(model: ModelConfig, device: Device, dtype: DType) -> Self {
        let cache = CachePlan {
            geometry: CacheGeometry::of(&model),
            slot_type: SlotType::F32,
            side: SideArrays::default(),
            classes: Vec::new(),
        };
        Self::without_cache(
            OpsConfig { model, cache, max_batch_rows: 0, threads: 1, side_car: None },
            device,
            dtype,
        )
    }

    fn get(&self, reg: Reg) -> Result<&Tensor, Error> {
        self.registers[reg as usize]
            .as_ref()
            .ok_or_else(|| Error::InvalidBatch(format!("register {reg:?} was read before it was written")))
    }

    fn set(&mut self, reg: Reg, value: Tensor) {
        self.registers[reg as usize] = Some(value);
    }

    fn blocks(&self) -> Result<&Blocks, Error> {
        self.blocks.as_ref().ok_or_else(|| Error::InvalidBatch("this backend has no blocks".into()))
    }

    fn blocks_mut(&mut self) -> Result<&mut Blocks, Error> {
        self.blocks.as_mut().ok_or_else(|| Error::InvalidBatch("this backend has no blocks".into()))
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
    fn norm(&self, x: &Tensor, weight: &ReferenceWeight) -> Result<Tensor, Error> {
        let wide = x.to_dtype(at_least_f32(self.dtype))?;
        let mean_square = (wide.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
        let root = (mean_square + f64::from(self.config.model.rms_norm_eps))?.sqrt()?;
        let scaled = wide.broadcast_div(&root)?.to_dtype(self.dtype)?;
        Ok(scaled.broadcast_mul(&weight.parts[0])?)
    }

    fn product(&self, x: &Tensor, weight: &ReferenceWeight) -> Result<Tensor, Error> {
        let parts = weight.parts.iter().map(|part| x.matmul(&part.t()?));
        let product = Tensor::cat(&parts.collect::<Result<Vec<_>, _>>()?, 1)?;
        match &weight.bias {
            Some(bias) => Ok(product.broadcast_add(bias)?),
            None => Ok(product),
        }
    }

    /// Queries and keys `[rows, heads + kv_heads, head_dim]` and values `[rows, kv_dim]`.
    fn split_qkv(&self) -> Result<(Tensor, Tensor), Error> {
        let model = &self.config.model;
        let qkv = self.get(Reg::Qkv)?;
        let rows = qkv.dim(0)?;
        let heads = model.num_heads + model.num_kv_heads;
        let qk = qkv.narrow(1, 0, heads * model.head_dim)?.contiguous()?;
        let v = qkv.narrow(1, heads * model.head_dim, model.kv_dim())?;
        Ok((qk.reshape((rows, heads, model.head_dim))?, v))
    }

    fn join_qkv(&mut self, qk: &Tensor, v: &Tensor) -> Result<(), Error> {
        let qkv = Tensor::cat(&[&qk.flatten_from(1)?, v], 1)?;
        self.set(Reg::Qkv, qkv);
        Ok(())
    }

    /// Logits `[samples, vocab_size]` as a tensor of the computing type.
    fn logits_tensor(
        &self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        head: &ReferenceWeight,
        [residual, delta]: [Reg; 2],
    ) -> Result<Tensor, Error> {
        self.product(&self.states_tensor(step, norm, [residual, delta])?, head)
    }

    /// Hidden states `[samples, hidden_size]` after the final norm.
    fn states_tensor(
        &self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        [residual, delta]: [Reg; 2],
    ) -> Result<Tensor, Error> {
        let rows =
            |reg: Reg| -> Result<Tensor, Error> { Ok(self.get(reg)?.index_select(&step.sample_rows, 0)?) };
        self.norm(&(rows(residual)? + rows(delta)?)?, norm)
    }
}

impl Llama<ReferenceOps> {
    /// Logits `[samples, vocab_size]` of whole sequences, differentiable in the weights; for a
    /// backend made by [`ReferenceOps::without_cache`].
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the batch contradicts itself, [`Error::Device`].
    pub fn forward_train(&mut self, batch: &Batch) -> Result<Tensor, Error> {
        let step = self.hidden(batch)?;
        let (ops, weights) = self.parts_mut();
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        ops.logits_tensor(&step, &weights.norm, head, [Reg::H, Reg::X])
    }
}

impl Ops for ReferenceOps {
    type Weight = ReferenceWeight;
    type Step = ReferenceStep;
    type Lora = ReferenceLora;

    fn prepare(&mut self, spec: WeightSpec) -> Result<ReferenceWeight, Error> {
        let widen = |raw: &RawTensor| -> Result<Tensor, Error> {
            let dense = match raw {
                RawTensor::Dense(tensor) => tensor.clone(),
                RawTensor::Quantized(tensor) => tensor.dequantize(&Device::Cpu)?,
            };
            Ok(dense.to_device(&self.device)?.to_dtype(self.dtype)?)
        };
        let parts = spec.parts.iter().map(widen).collect::<Result<Vec<_>, _>>()?;
        let bias = spec.bias.map(|bias| widen(&RawTensor::Dense(bias))).transpose()?;
        let numbers: usize = parts.iter().chain(&bias).map(Tensor::elem_count).sum();
        self.weight_bytes += (numbers * self.dtype.size_in_bytes()) as u64;
        Ok(ReferenceWeight { parts, bias })
    }

    fn upload(&mut self, batch: &Batch) -> Result<ReferenceStep, Error> {
        let model = &self.config.model;
        batch.check(self.config.max_batch_rows, model.vocab_size, model.hidden_size)?;
        let positions = self.frame_positions(batch)?;
        if let Some(blocks) = self.blocks.as_mut().filter(|_| batch.first_layer == 0) {
            blocks.spread_if_due(batch, &self.fold_context)?;
        }
        let [cos, sin] = self.angles(&positions)?;
        Ok(ReferenceStep {
            ids: Tensor::new(batch.ids.as_slice(), &self.device)?,
            cos,
            sin,
            first_layer: batch.first_layer as usize,
            sample_rows: Tensor::new(batch.sample_rows.as_slice(), &self.device)?,
            embedded: self.upload_embeddings(batch)?,
            positions: batch.positions.clone(),
            sequences: batch.sequences.clone(),
        })
    }

    fn embed(&mut self, step: &ReferenceStep, table: &ReferenceWeight, dst: Reg) -> Result<(), Error> {
        let mut rows = table.parts[0].index_select(&step.ids, 0)?;
        if let Some((is_given, given)) = &step.embedded {
            rows = is_given.broadcast_as(rows.shape())?.where_cond(given, &rows)?;
        }
        self.set(dst, rows);
        Ok(())
    }

    fn rms_norm(
        &mut self,
        _step: &ReferenceStep,
        weight: &ReferenceWeight,
        src: Reg,
        dst: Reg,
    ) -> Result<(), Error> {
        let normed = self.norm(self.get(src)?, weight)?;
        self.set(dst, normed);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        _step: &ReferenceStep,
        weight: &ReferenceWeight,
        residual: Reg,
        delta: Reg,
        dst: Reg,
    ) -> Result<(), Error> {
        let sum = (self.get(residual)? + self.get(delta)?)?;
        let normed = self.norm(&sum, weight)?;
        self.set(residual, sum);
        self.set(dst, normed);
        Ok(())
    }

    fn linear(
        &mut self,
        _step: &ReferenceStep,
        weight: &ReferenceWeight,
        src: Reg,
        dst: Reg,
    ) -> Result<(), Error> {
        let product = self.product(self.get(src)?, weight)?;
        self.set(dst, product);
        Ok(())
    }

    fn prepare_lora(&mut self, pair: &LoraPair, linear: Linear) -> Result<ReferenceLora, Error> {
        let (outputs, inputs) = linear.shape(&self.config.model);
        let tensor = |numbers: &[f32], shape: (usize, usize)| -> Result<Tensor, Error> {
            let tensor = Tensor::from_slice(numbers, shape, &self.device)?.t()?.contiguous()?;
            Ok(tensor.to_dtype(at_least_f32(self.dtype))?)
        };
        let down = tensor(&pair.a, (pair.rank, inputs))?.to_dtype(self.dtype)?;
        let up = (tensor(&pair.b, (outputs, pair.rank))? * f64::from(pair.scale))?.to_dtype(self.dtype)?;
        Ok(ReferenceLora { down, up })
    }

    fn lora_bytes(lora: &ReferenceLora) -> u64 {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        (bytes(&lora.down) + bytes(&lora.up)) as u64
    }

    fn add_lora(
        &mut self,
        _step: &ReferenceStep,
        rows: &[u32],
        lora: &ReferenceLora,
        (src, dst): (Reg, Reg),
        offset: usize,
    ) -> Result<(), Error> {
        let rows = Tensor::new(rows, &self.device)?;
        let more = self.get(src)?.index_select(&rows, 0)?.matmul(&lora.down)?.matmul(&lora.up)?;
        let into = self.get(dst)?;
        let behind = into.dim(1)? - offset - more.dim(1)?;
        let more = more.pad_with_zeros(1, offset, behind)?.contiguous()?;
        let sum = into.contiguous()?.index_add(&rows, &more, 0)?;
        self.set(dst, sum);
        Ok(())
    }

    fn reserve(&mut self, _extras: &Extras) -> Result<(), Error> {
        Ok(())
    }

    fn head_norm(
        &mut self,
        _step: &ReferenceStep,
        q: &ReferenceWeight,
        k: &ReferenceWeight,
    ) -> Result<(), Error> {
        let (heads, kv_heads) = (self.config.model.num_heads, self.config.model.num_kv_heads);
        let (qk, v) = self.split_qkv()?;
        let queries = self.norm(&qk.narrow(1, 0, heads)?, q)?;
        let keys = self.norm(&qk.narrow(1, heads, kv_heads)?, k)?;
        self.join_qkv(&Tensor::cat(&[queries, keys], 1)?, &v)
    }

    fn rope(&mut self, step: &ReferenceStep, layer: usize) -> Result<(), Error> {
        let [cos, sin] = &self.angles_in(step, layer)?;
        let (rotary_dim, style) = (self.config.model.rope.rotary_dim, self.config.model.rope.style);
        let (qk, v) = self.split_qkv()?;
        let (rows, heads, head_dim) = qk.dims3()?;
        let half = rotary_dim / 2;
        let rotated = qk.narrow(2, 0, rotary_dim)?.contiguous()?;
        // Both styles as pairs (x, y) [rows, heads, rotary_dim / 2].
        let (shape, axis) = match style {
            RopeStyle::HalfSplit => ((rows, heads, 2, half), 2),
            RopeStyle::Interleaved => ((rows, heads, half, 2), 3),
        };
        let pairs = rotated.reshape(shape)?;
        let x = pairs.narrow(axis, 0, 1)?.squeeze(axis)?;
        let y = pairs.narrow(axis, 1, 1)?.squeeze(axis)?;
        let turned = [
            (x.broadcast_mul(cos)? - y.broadcast_mul(sin)?)?,
            (y.broadcast_mul(cos)? + x.broadcast_mul(sin)?)?,
        ];
        let rotated = Tensor::stack(&turned, axis)?.reshape((rows, heads, rotary_dim))?;
        let qk = match head_dim - rotary_dim {
            0 => rotated,
            rest => Tensor::cat(&[rotated, qk.narrow(2, rotary_dim, rest)?], 2)?,
        };
        self.join_qkv(&qk, &v)
    }

    fn observe(&mut self, step: &ReferenceStep, layer: usize) -> Result<(), Error> {
        self.observe_rows(step, layer)
    }

    fn attend(&mut self, step: &ReferenceStep, layer: usize) -> Result<(), Error> {
        let attn = if self.blocks.is_some() {
            self.attend_blocks(step, layer)?
        } else {
            let outputs = step.sequences.iter().map(|sequence| self.attend_whole(step, layer, sequence));
            Tensor::cat(&outputs.collect::<Result<Vec<_>, _>>()?, 0)?
        };
        self.set(Reg::Attn, attn);
        Ok(())
    }

    fn silu_mul(&mut self, _step: &ReferenceStep) -> Result<(), Error> {
        let width = self.config.model.intermediate_size;
        let gate_up = self.get(Reg::GateUp)?;
        let act = (gate_up.narrow(1, 0, width)?.silu()? * gate_up.narrow(1, width, width)?)?;
        self.set(Reg::Act, act);
        Ok(())
    }

    fn write_rows(&mut self, step: &ReferenceStep, rows: &[f32]) -> Result<(), Error> {
        let shape = (step.positions.len(), self.config.model.hidden_size);
        let rows = Tensor::from_slice(rows, shape, &self.device)?.to_dtype(self.dtype)?;
        self.set(Reg::X, rows.zeros_like()?);
        self.set(Reg::H, rows);
        Ok(())
    }

    fn read_rows(&mut self, _step: &ReferenceStep, reg: Reg, out: &mut Vec<f32>) -> Result<(), Error> {
        out.clear();
        append_f32(self.get(reg)?, out)
    }

    fn logits(
        &mut self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        head: &ReferenceWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        out.clear();
        if step.sample_rows.elem_count() > 0 {
            let logits = self.logits_tensor(step, norm, head, [residual, delta])?;
            append_f32(&logits, out)?;
        }
        Ok(())
    }

    fn select_rows(&mut self, step: &mut ReferenceStep, rows: &[u32]) -> Result<(), Error> {
        step.sample_rows = Tensor::new(rows, &self.device)?;
        Ok(())
    }

    fn states(
        &mut self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        out.clear();
        if step.sample_rows.elem_count() > 0 {
            let states = self.states_tensor(step, norm, [residual, delta])?;
            append_f32(&states, out)?;
        }
        Ok(())
    }

    fn score(
        &mut self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        head: &ReferenceWeight,
        residual: Reg,
        delta: Reg,
        targets: &[u32],
        out: &mut Vec<TokenScore>,
    ) -> Result<(), Error> {
        out.clear();
        for (i, targets) in targets.chunks(SCORED_ROWS).enumerate() {
            let sample_rows = step.sample_rows.narrow(0, i * SCORED_ROWS, targets.len())?;
            let part = ReferenceStep { sample_rows, ..step.clone() };
            let logits = self.logits_tensor(&part, norm, head, [residual, delta])?.to_dtype(DType::F32)?;
            let targets = Tensor::new(targets, &self.device)?.unsqueeze(1)?;
            let max = logits.max_keepdim(1)?;
            let sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()?;
            let nll = ((max + sum)? - logits.gather(&targets, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
            let best = logits.argmax(1)?.to_vec1::<u32>()?;
            out.extend(nll.into_iter().zip(best).map(|(nll, best)| TokenScore { nll, best }));
        }
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        let context = self.fold_context.clone();
        self.blocks_mut()?.open(block, settings, &context)
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let context = self.fold_context.clone();
        self.blocks_mut()?.copy(from, to, &context)
    }

    fn close_block(&mut self, block: BlockId) {
        if let Ok(blocks) = self.blocks_mut() {
            blocks.close(block);
        }
    }

    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        self.blocks()?.export(block, &self.fold_context)
    }

    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        let context = self.fold_context.clone();
        self.blocks_mut()?.import(block, image, &context)
    }

    fn check_held(&self, block: BlockId, positions: &[u32]) -> Result<(), Error> {
        self.blocks()?.state(block)?.check_held(positions)
    }

    fn remove_slots(&mut self, block: BlockId, layer: usize, slots: &[u32]) -> Result<(), Error> {
        self.blocks_mut()?.remove_slots(block, layer, slots)
    }

    fn settle_block(&mut self, block: BlockId, next: u32) -> Result<(), Error> {
        self.blocks_mut()?.state_mut(block)?.settle(next);
        Ok(())
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        self.blocks().and_then(|blocks| blocks.state(block)).map_or(0, |state| state.folded_tokens())
    }

    fn config(&self) -> &OpsConfig {
        &self.config
    }

    fn memory(&self) -> MemoryUse {
        let model = &self.config.model;
        // Tensors live until rebound; about twice the registers are alive at once.
        let width = 2 * model.hidden_size + model.qkv_dim() + model.q_dim() + 3 * model.intermediate_size;
        let workspace = 2 * self.config.max_batch_rows * width * self.dtype.size_in_bytes();
        let cache = if self.blocks.is_some() { self.config.cache.total_bytes() } else { 0 };
        MemoryUse { weights: self.weight_bytes, workspace: workspace as u64, cache }
    }
}

/// Rows whose logits are on the device at once when tokens are scored.
const SCORED_ROWS: usize = 1024;

impl ReferenceOps {
    /// The positions that the rows of `batch` are rotated to. Checks `batch` against the blocks.
    fn frame_positions(&self, batch: &Batch) -> Result<Vec<u32>, Error> {
        let Some(blocks) = &self.blocks else {
            let limit = self.config.model.max_position;
            return match batch.positions.iter().find(|&&position| position as usize >= limit) {
                Some(position) => {
                    Err(Error::InvalidBatch(format!("position {position}; the model was trained on {limit}")))
                }
                None => Ok(batch.positions.clone()),
            };
        };
        blocks.check(batch)?;
        let mut positions = Vec::with_capacity(batch.num_rows());
        for sequence in &batch.sequences {
            let state = blocks.state(sequence.block)?;
            let rows = batch.positions_of(sequence).iter();
            let layer = batch.first_layer as usize;
            positions.extend(rows.map(|&position| state.frame_position(layer, position)));
        }
        Ok(positions)
    }

    /// Cosines and sines `[rows, 1, rotary_dim / 2]` of these positions.
    fn angles(&self, positions: &[u32]) -> Result<[Tensor; 2], Error> {
        let (frequencies, factor) = &self.frequencies;
        // In f64, because f32 loses whole turns at long positions.
        let angles: Vec<f64> = positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |&f| f64::from(position) * f64::from(f)))
            .collect();
        let shape = (positions.len(), 1, frequencies.len());
        let table = |of: fn(f64) -> f64| -> Result<Tensor, Error> {
            let values: Vec<f64> = angles.iter().map(|&angle| of(angle) * f64::from(*factor)).collect();
            Ok(Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype)?)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }

    /// The angles of a step's rows in `layer`: the step's own, unless some sequence's positions differ there.
    fn angles_in(&self, step: &ReferenceStep, layer: usize) -> Result<[Tensor; 2], Error> {
        let own = || Ok([step.cos.clone(), step.sin.clone()]);
        let Some(blocks) = &self.blocks else { return own() };
        let (mut positions, mut has_moved) = (Vec::with_capacity(step.positions.len()), false);
        for sequence in &step.sequences {
            let state = blocks.state(sequence.block)?;
            has_moved |= state.shift(layer) != state.shift(step.first_layer);
            let rows = &step.positions[sequence.rows.start as usize..sequence.rows.end as usize];
            positions.extend(rows.iter().map(|&position| state.frame_position(layer, position)));
        }
        if has_moved { self.angles(&positions) } else { own() }
    }

    /// The embeddings of rows that have some.
    fn upload_embeddings(&self, batch: &Batch) -> Result<Option<(Tensor, Tensor)>, Error> {
        if batch.embedded.is_empty() {
            return Ok(None);
        }
        let (rows, width) = (batch.num_rows(), self.config.model.hidden_size);
        let (mut is_given, mut given) = (vec![0u8; rows], vec![0.0; rows * width]);
        for (row, embedding) in batch.embeddings(width) {
            is_given[row] = 1;
            given[row * width..(row + 1) * width].copy_from_slice(embedding);
        }
        let given = Tensor::from_vec(given, (rows, width), &self.device)?.to_dtype(self.dtype)?;
        Ok(Some((Tensor::from_vec(is_given, (rows, 1), &self.device)?, given)))
    }
}

/// Appends all numbers of `tensor`, wherever it lies.
fn append_f32(tensor: &Tensor, out: &mut Vec<f32>) -> Result<(), Error> {
    out.extend_from_slice(&tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

/// The type of sums whose terms are of type `dtype`.
fn at_least_f32(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
