//! Attention of the reference backend, over blocks or over whole sequences.

use candle_core::{D, DType, Device, Tensor};

use super::{ReferenceOps, ReferenceStep, at_least_f32};
use crate::{
    Error,
    batch::{Batch, BatchSequence},
    kv_cache::{BlockState, CacheGeometry, CacheSettings, SlotMove, SlotType},
    ops::Reg,
};

/// One block's memory.
pub(super) struct Block {
    pub(super) state: BlockState,
    /// Keys and values of each layer `[kv_heads, capacity, head_dim]` in the slot type.
    pub(super) layers: Vec<(Tensor, Tensor)>,
}

impl Block {
    pub(super) fn new(
        geometry: CacheGeometry,
        slot_type: SlotType,
        capacity: usize,
        device: &Device,
    ) -> Result<Self, Error> {
        let shape = (geometry.num_kv_heads, capacity, geometry.head_dim);
        let memory = || Tensor::zeros(shape, dtype_of(slot_type), device);
        let layers = (0..geometry.num_layers).map(|_| Ok((memory()?, memory()?)));
        let layers = layers.collect::<Result<_, Error>>()?;
        Ok(Self { state: BlockState::new(geometry, capacity), layers })
    }

    pub(super) fn open(&mut self, settings: CacheSettings) -> Result<(), Error> {
        settings.check(self.state.stride())?;
        self.close();
        self.state.open(settings);
        Ok(())
    }

    /// Takes over the state of another block, given by its parts.
    pub(super) fn copy_from(&mut self, state: &BlockState, layers: &[(Tensor, Tensor)]) -> Result<(), Error> {
        let Some(settings) = state.settings() else {
            return Err(Error::InvalidBatch("a block is to be copied but not open".into()));
        };
        settings.check(self.state.stride())?;
        self.state.copy_from(state);
        for (layer, (from, to)) in layers.iter().zip(&self.layers).enumerate() {
            let len = state.len(layer);
            if len > 0 {
                to.0.slice_set(&from.0.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
                to.1.slice_set(&from.1.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
            }
        }
        Ok(())
    }

    pub(super) fn close(&mut self) {
        self.state.close();
        for (keys, values) in &self.layers {
            // Zeroing allocated memory fails only with its device, which the next step reports.
            let _ = keys.zero_set().and_then(|()| values.zero_set());
        }
    }
}

impl ReferenceOps {
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
    pub(super) fn attend_block(
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
    pub(super) fn attend_whole(
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

    /// Checks `batch` against the blocks: open, in order, with room, each used once.
    pub(super) fn check_blocks(&self, batch: &Batch) -> Result<(), Error> {
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
