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

use candle_core::{D, DType, Device, Tensor};

use super::{Ops, OpsConfig, RawTensor, Reg, WeightSpec, rope};
use crate::{
    BlockId, Error, MemoryUse,
    batch::{Batch, BatchSequence},
    config::RopeStyle,
    kv_cache::{BlockState, CacheSettings, FoldScratch, SlotMove, SlotType},
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
    /// `[rows]`, on the host for masks.
    positions: Vec<u32>,
    sequences: Vec<BatchSequence>,
}

/// One block's memory.
struct Block {
    state: BlockState,
    /// Keys and values of each layer `[kv_heads, capacity, head_dim]` in the slot type.
    layers: Vec<(Tensor, Tensor)>,
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
    blocks: Option<Vec<Block>>,
    scratch: FoldScratch,
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
        let geometry = config.cache.geometry;
        let slot_dtype = dtype_of(config.cache.slot_type);
        let mut blocks = Vec::new();
        for class in &config.cache.classes {
            let capacity = class.capacity as usize;
            let shape = (geometry.num_kv_heads, capacity, geometry.head_dim);
            for _ in 0..class.blocks {
                let layers = (0..geometry.num_layers)
                    .map(|_| {
                        Ok((
                            Tensor::zeros(shape, slot_dtype, &device)?,
                            Tensor::zeros(shape, slot_dtype, &device)?,
                        ))
                    })
                    .collect::<Result<_, Error>>()?;
                blocks.push(Block { state: BlockState::new(geometry, capacity), layers });
            }
        }
        let mut ops = Self::without_cache(config, device, dtype);
        ops.blocks = Some(blocks);
        Ok(ops)
    }

    /// No cache: block ids are ignored, each sequence of a batch is whole and attends to itself.
    pub fn without_cache(config: OpsConfig, device: Device, dtype: DType) -> Self {
        let frequencies = rope::frequencies(&config.model.rope);
        Self {
            config,
            device,
            dtype,
            frequencies,
            registers: Default::default(),
            blocks: None,
            scratch: FoldScratch::default(),
            weight_bytes: 0,
        }
    }

    fn get(&self, reg: Reg) -> Result<&Tensor, Error> {
        self.registers[reg as usize]
            .as_ref()
            .ok_or_else(|| Error::InvalidBatch(format!("register {reg:?} was read before it was written")))
    }

    fn set(&mut self, reg: Reg, value: Tensor) {
        self.registers[reg as usize] = Some(value);
    }

    fn block_mut(&mut self, block: BlockId) -> Result<&mut Block, Error> {
        self.blocks
            .as_mut()
            .and_then(|blocks| blocks.get_mut(block.0 as usize))
            .ok_or_else(|| Error::InvalidBatch(format!("there is no block {}", block.0)))
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

    /// Queries `[heads, rows, head_dim]`, keys and values `[kv_heads, rows, head_dim]` of `rows`
    /// rows from `start`.
    fn heads_of(&self, start: usize, rows: usize) -> Result<[Tensor; 3], Error> {
        let model = &self.config.model;
        let qkv = self.get(Reg::Qkv)?.narrow(0, start, rows)?;
        let part = |from: usize, heads: usize| -> Result<Tensor, Error> {
            let x = qkv.narrow(1, from, heads * model.head_dim)?.contiguous()?;
            Ok(x.reshape((rows, heads, model.head_dim))?.transpose(0, 1)?.contiguous()?)
        };
        let q_dim = model.q_dim();
        Ok([
            part(0, model.num_heads)?,
            part(q_dim, model.num_kv_heads)?,
            part(q_dim + model.kv_dim(), model.num_kv_heads)?,
        ])
    }

    /// Softmax attention. `q [heads, rows, head_dim]`, `k, v [kv_heads, slots, head_dim]`, `mask
    /// [kv_heads, rows, slots]` added to the scores. Returns `[rows, q_dim]`.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor, Error> {
        let (heads, rows, head_dim) = q.dims3()?;
        let (kv_heads, slots, _) = k.dims3()?;
        let group = heads / kv_heads;
        let q = (q.reshape((kv_heads, group * rows, head_dim))? / (head_dim as f64).sqrt())?;
        let scores = q.matmul(&k.t()?)?.reshape((kv_heads, group, rows, slots))?;
        let scores = scores.to_dtype(mask.dtype())?.broadcast_add(&mask.unsqueeze(1)?)?;
        // The shift cancels out, so its gradient is zero and need not be followed.
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(self.dtype)?;
        let out = weights.reshape((kv_heads, group * rows, slots))?.matmul(v)?;
        Ok(out.reshape((heads, rows, head_dim))?.transpose(0, 1)?.contiguous()?.flatten_from(1)?)
    }

    /// What each row may see: `0` or `-inf`, `[heads, rows, slots]`; `slots` gives each head's
    /// positions.
    fn mask(&self, layer: usize, rows: &[u32], slots: &[&[u32]]) -> Result<Tensor, Error> {
        let window =
            self.config.model.sliding_window[layer].map_or(u32::MAX, |w| w.min(u32::MAX as usize) as u32);
        let mut mask = Vec::with_capacity(slots.len() * rows.len() * slots[0].len());
        for &head in slots {
            for &row in rows {
                mask.extend(head.iter().map(|&slot| {
                    let sees = slot <= row && row - slot < window;
                    if sees { 0.0f32 } else { f32::NEG_INFINITY }
                }));
            }
        }
        let shape = (slots.len(), rows.len(), slots[0].len());
        Ok(Tensor::from_vec(mask, shape, &self.device)?.to_dtype(at_least_f32(self.dtype))?)
    }

    /// Attention of one sequence over its block: fold if due, append, attend, until all rows are done.
    fn attend_block(
        &mut self,
        step: &ReferenceStep,
        layer: usize,
        sequence: &BatchSequence,
    ) -> Result<Vec<Tensor>, Error> {
        let slot_dtype = dtype_of(self.config.cache.slot_type);
        let (mut start, end) = (sequence.rows.start as usize, sequence.rows.end as usize);
        let mut outputs = Vec::new();
        while start < end {
            let mut scratch = std::mem::take(&mut self.scratch);
            let block = self.block_mut(sequence.block)?;
            let segment = block.state.next_segment(layer, end - start);
            if segment.fold {
                let len = block.state.len(layer);
                let moves = block.state.fold(layer, &mut scratch);
                apply_moves(&block.layers[layer], len, moves)?;
            }
            self.scratch = scratch;
            let [q, k, v] = self.heads_of(start, segment.rows)?;
            let rows = &step.positions[start..start + segment.rows];
            let block = self.block_mut(sequence.block)?;
            let first = block.state.append(layer, rows);
            let (keys, values) = &block.layers[layer];
            keys.slice_set(&k.to_dtype(slot_dtype)?, 1, first)?;
            values.slice_set(&v.to_dtype(slot_dtype)?, 1, first)?;
            let (keys, values) = (keys.clone(), values.clone());
            let block = self.block_mut(sequence.block)?;
            let (len, stride) = (block.state.len(layer), block.state.stride());
            let slots: Vec<Vec<u32>> =
                block.state.positions(layer).chunks(stride).map(|head| head[..len].to_vec()).collect();
            let slots: Vec<&[u32]> = slots.iter().map(Vec::as_slice).collect();
            let mask = self.mask(layer, rows, &slots)?;
            let stored = |x: &Tensor| x.narrow(1, 0, len)?.to_dtype(self.dtype)?.contiguous();
            outputs.push(self.attention(&q, &stored(&keys)?, &stored(&values)?, &mask)?);
            start += segment.rows;
        }
        Ok(outputs)
    }

    /// Attention of one whole sequence over itself.
    fn attend_whole(
        &self,
        step: &ReferenceStep,
        layer: usize,
        sequence: &BatchSequence,
    ) -> Result<Tensor, Error> {
        let (start, end) = (sequence.rows.start as usize, sequence.rows.end as usize);
        let [q, k, v] = self.heads_of(start, end - start)?;
        let rows = &step.positions[start..end];
        let mask = self.mask(layer, rows, &[rows])?;
        self.attention(&q, &k, &v, &mask)
    }

    /// Logits `[samples, vocab_size]` as a tensor of the computing type.
    fn logits_tensor(
        &self,
        step: &ReferenceStep,
        norm: &ReferenceWeight,
        head: &ReferenceWeight,
        [residual, delta]: [Reg; 2],
    ) -> Result<Tensor, Error> {
        let rows =
            |reg: Reg| -> Result<Tensor, Error> { Ok(self.get(reg)?.index_select(&step.sample_rows, 0)?) };
        let hidden = (rows(residual)? + rows(delta)?)?;
        self.product(&self.norm(&hidden, norm)?, head)
    }

    /// Checks everything about `batch` that is not the cache's matter.
    fn check(&self, batch: &Batch) -> Result<(), Error> {
        let rows = batch.num_rows();
        let invalid = |reason: String| Err(Error::InvalidBatch(reason));
        if rows == 0 || rows > self.config.max_batch_rows {
            return invalid(format!("{rows} rows; 1 to {} are possible", self.config.max_batch_rows));
        }
        if batch.positions.len() != rows {
            return invalid(format!("{rows} ids but {} positions", batch.positions.len()));
        }
        if let Some(id) = batch.ids.iter().find(|&&id| id as usize >= self.config.model.vocab_size) {
            return invalid(format!("id {id}; the vocabulary has {}", self.config.model.vocab_size));
        }
        if batch.sample_rows.iter().any(|&row| row as usize >= rows) || !batch.sample_rows.is_sorted() {
            return invalid(format!("sample rows must ascend below {rows}"));
        }
        let mut next = 0;
        for (idx, sequence) in batch.sequences.iter().enumerate() {
            if sequence.rows.start != next || sequence.rows.end <= next || sequence.rows.end as usize > rows {
                return invalid(format!(
                    "sequence {idx} has rows {:?}, expected them from {next}",
                    sequence.rows
                ));
            }
            let positions = &batch.positions[next as usize..sequence.rows.end as usize];
            if !positions.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1])) {
                return invalid(format!("positions of sequence {idx} are not consecutive"));
            }
            next = sequence.rows.end;
        }
        if next as usize != rows {
            return invalid(format!("sequences cover {next} of {rows} rows"));
        }
        Ok(())
    }

    /// Checks `batch` against the blocks: open, in order, with room, each used once.
    fn check_blocks(&self, batch: &Batch) -> Result<(), Error> {
        let Some(blocks) = &self.blocks else { return Ok(()) };
        let mut used = vec![false; blocks.len()];
        for sequence in &batch.sequences {
            let id = sequence.block.0 as usize;
            let Some(block) = blocks.get(id) else {
                return Err(Error::InvalidBatch(format!("there is no block {id}")));
            };
            if std::mem::replace(&mut used[id], true) {
                return Err(Error::InvalidBatch(format!("block {id} is in the batch twice")));
            }
            block.state.check_append(batch.positions[sequence.rows.start as usize], sequence.rows.len())?;
        }
        Ok(())
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
        self.check(batch)?;
        self.check_blocks(batch)?;
        let (frequencies, factor) = &self.frequencies;
        // In f64, because f32 loses whole turns at long positions.
        let angles: Vec<f64> = batch
            .positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |&f| f64::from(position) * f64::from(f)))
            .collect();
        let shape = (batch.num_rows(), 1, frequencies.len());
        let table = |of: fn(f64) -> f64| -> Result<Tensor, Error> {
            let values: Vec<f64> = angles.iter().map(|&angle| of(angle) * f64::from(*factor)).collect();
            Ok(Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype)?)
        };
        Ok(ReferenceStep {
            ids: Tensor::new(batch.ids.as_slice(), &self.device)?,
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            sample_rows: Tensor::new(batch.sample_rows.as_slice(), &self.device)?,
            positions: batch.positions.clone(),
            sequences: batch.sequences.clone(),
        })
    }

    fn embed(&mut self, step: &ReferenceStep, table: &ReferenceWeight, dst: Reg) -> Result<(), Error> {
        let rows = table.parts[0].index_select(&step.ids, 0)?;
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

    fn rope(&mut self, step: &ReferenceStep) -> Result<(), Error> {
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
            (x.broadcast_mul(&step.cos)? - y.broadcast_mul(&step.sin)?)?,
            (y.broadcast_mul(&step.cos)? + x.broadcast_mul(&step.sin)?)?,
        ];
        let rotated = Tensor::stack(&turned, axis)?.reshape((rows, heads, rotary_dim))?;
        let qk = match head_dim - rotary_dim {
            0 => rotated,
            rest => Tensor::cat(&[rotated, qk.narrow(2, rotary_dim, rest)?], 2)?,
        };
        self.join_qkv(&qk, &v)
    }

    fn attend(&mut self, step: &ReferenceStep, layer: usize) -> Result<(), Error> {
        let mut outputs = Vec::with_capacity(step.sequences.len());
        for sequence in &step.sequences {
            if self.blocks.is_some() {
                outputs.extend(self.attend_block(step, layer, sequence)?);
            } else {
                outputs.push(self.attend_whole(step, layer, sequence)?);
            }
        }
        let attn = Tensor::cat(&outputs, 0)?;
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
            out.extend_from_slice(&logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        let block = self.block_mut(block)?;
        settings.check(block.state.stride())?;
        block.state.open(settings);
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let source = self.block_mut(from)?;
        let (state, layers) = (source.state.clone(), source.layers.clone());
        let target = self.block_mut(to)?;
        if from == to {
            return Ok(());
        }
        if let Some(settings) = state.settings() {
            settings.check(target.state.stride())?;
        }
        target.state.copy_from(&state);
        for (layer, ((k, v), (k_to, v_to))) in layers.iter().zip(&target.layers).enumerate() {
            let len = state.len(layer);
            if len > 0 {
                k_to.slice_set(&k.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
                v_to.slice_set(&v.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
            }
        }
        Ok(())
    }

    fn close_block(&mut self, block: BlockId) {
        let Ok(block) = self.block_mut(block) else { return };
        block.state.close();
        for (keys, values) in &block.layers {
            // Zeroing allocated memory fails only with its device, which the next step reports.
            let _ = keys.zero_set().and_then(|()| values.zero_set());
        }
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

/// Moves survivors of a fold; `len` slots were filled before it.
fn apply_moves((keys, values): &(Tensor, Tensor), len: usize, moves: &[SlotMove]) -> Result<(), Error> {
    let heads = keys.dim(0)?;
    for memory in [keys, values] {
        let mut folded = Vec::with_capacity(heads);
        for head in 0..heads {
            let mut sources: Vec<u32> = (0..len as u32).collect();
            for slot in moves.iter().filter(|slot| slot.head as usize == head) {
                sources[slot.to as usize] = slot.from;
            }
            let sources = Tensor::new(sources.as_slice(), memory.device())?;
            folded.push(memory.get(head)?.contiguous()?.index_select(&sources, 0)?);
        }
        memory.slice_set(&Tensor::stack(&folded, 0)?, 1, 0)?;
    }
    Ok(())
}

fn dtype_of(slot_type: SlotType) -> DType {
    match slot_type {
        SlotType::F32 => DType::F32,
        SlotType::F16 => DType::F16,
        SlotType::Bf16 => DType::BF16,
    }
}

/// The type of sums whose terms are of type `dtype`.
fn at_least_f32(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
