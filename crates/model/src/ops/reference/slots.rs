//! The reference backend's keys and values: one pair of tensors per layer and class of blocks.

use candle_core::{D, DType, Device, Tensor};

use super::cache::sources;
use crate::{
    Error,
    kv_cache::{BlockState, CachePlan, Rotation, SlotMove, SlotType, Turn, most_slots},
};

/// Numbers that share a scale in 4-bit slots.
const INT4_GROUP: usize = 32;

/// Keys and values of all blocks of one class.
pub(super) struct Slots {
    slot_type: SlotType,
    /// `[blocks, kv_heads, capacity, head_dim]` per layer, whose capacity is the block's or what its budget
    /// may be, whichever is more: the one backend whose memory is not that of the plan then. Integer types hold the numbers that their
    /// integers stand for, in f32.
    layers: Vec<(Tensor, Tensor)>,
}

impl Slots {
    pub(super) fn new(
        plan: &CachePlan,
        blocks: usize,
        capacity: usize,
        shares: Option<&[f32]>,
        device: &Device,
    ) -> Result<Self, Error> {
        let geometry = plan.geometry;
        let memory = |capacity| {
            let shape = (blocks, geometry.num_kv_heads, capacity, geometry.head_dim);
            Tensor::zeros(shape, stored_dtype(plan.slot_type), device)
        };
        let most = shares.map(|shares| most_slots(shares, capacity, geometry.max_position));
        let layers = (0..geometry.num_layers).map(|layer| {
            let capacity = most.as_ref().map_or(capacity, |most| most[layer]);
            Ok((memory(capacity)?, memory(capacity)?))
        });
        Ok(Self { slot_type: plan.slot_type, layers: layers.collect::<Result<_, Error>>()? })
    }

    /// A block's part of a layer's keys and values `[kv_heads, capacity, head_dim]`: views of the memory.
    fn block(&self, index: usize, layer: usize) -> Result<[Tensor; 2], Error> {
        let (keys, values) = &self.layers[layer];
        Ok([keys.get(index)?, values.get(index)?])
    }

    pub(super) fn clear(&self, index: usize) {
        for layer in 0..self.layers.len() {
            // Zeroing allocated memory fails only with its device, which the next step reports.
            let _ = self.block(index, layer).and_then(|parts| {
                parts.iter().try_for_each(|part| Ok(part.slice_set(&part.zeros_like()?, 1, 0)?))
            });
        }
    }

    /// Copies the filled slots of a block to a block of `to`.
    pub(super) fn copy_to(
        &self,
        from: usize,
        to: &Self,
        index: usize,
        state: &BlockState,
    ) -> Result<(), Error> {
        for layer in 0..self.layers.len() {
            let len = state.len(layer);
            if len > 0 {
                for (source, target) in self.block(from, layer)?.iter().zip(to.block(index, layer)?) {
                    target.slice_set(&source.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
                }
            }
        }
        Ok(())
    }

    /// Numbers as the slot type rounds them.
    fn stored(&self, x: &Tensor) -> Result<Tensor, Error> {
        let dtype = stored_dtype(self.slot_type);
        match self.slot_type {
            SlotType::F32 | SlotType::F16 | SlotType::Bf16 => Ok(x.to_dtype(dtype)?),
            SlotType::I8 => {
                let x = x.to_dtype(dtype)?;
                let scale = (x.abs()?.max_keepdim(D::Minus1)? / 127.0)?;
                let integers = x.broadcast_div(&scale.maximum(f32::MIN_POSITIVE)?)?.round()?;
                Ok(integers.broadcast_mul(&scale)?)
            }
            SlotType::I4 => {
                let shape = x.dims().to_vec();
                let groups = x.to_dtype(dtype)?.reshape(((), INT4_GROUP.min(shape[shape.len() - 1])))?;
                let half = |x: Tensor| x.to_dtype(DType::F16)?.to_dtype(dtype);
                let least = half(groups.min_keepdim(D::Minus1)?)?;
                let step = half((groups.max_keepdim(D::Minus1)?.sub(&least)? / 15.0)?)?;
                let above = groups.broadcast_sub(&least)?;
                let integers = above.broadcast_div(&step.maximum(1e-8f32)?)?.round()?.clamp(0f32, 15f32)?;
                Ok(integers.broadcast_mul(&step)?.broadcast_add(&least)?.reshape(shape)?)
            }
        }
    }

    /// Stores rows `k, v [count, kv_heads, rows, head_dim]` of as many blocks from `index` on.
    pub(super) fn append(
        &self,
        index: usize,
        layer: usize,
        slot: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), Error> {
        let (keys, values) = &self.layers[layer];
        for (memory, new) in [(keys, k), (values, v)] {
            let part = memory.narrow(0, index, new.dim(0)?)?;
            part.slice_set(&self.stored(new)?.contiguous()?, 2, slot)?;
        }
        Ok(())
    }

    /// Keys and values of the first `len` slots of `count` blocks, `[count, kv_heads, len, head_dim]`.
    pub(super) fn filled(
        &self,
        index: usize,
        count: usize,
        layer: usize,
        len: usize,
    ) -> Result<[Tensor; 2], Error> {
        let (keys, values) = &self.layers[layer];
        let part = |memory: &Tensor| memory.narrow(0, index, count)?.narrow(2, 0, len)?.contiguous();
        Ok([part(keys)?, part(values)?])
    }

    /// Writes `[kv_heads, slots, head_dim]` over the first slots.
    pub(super) fn write(
        &self,
        index: usize,
        layer: usize,
        slots: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), Error> {
        for (part, numbers) in self.block(index, layer)?.iter().zip([keys, values]) {
            let (kv_heads, _, dim) = part.dims3()?;
            let new = Tensor::from_slice(numbers, (kv_heads, slots, dim), part.device())?;
            part.slice_set(&self.stored(&new)?, 1, 0)?;
        }
        Ok(())
    }

    /// Moves survivors of the folds of neighbouring blocks, the first at `index`, one list of moves each;
    /// `len` slots were filled before.
    pub(super) fn apply_moves(
        &self,
        index: usize,
        layer: usize,
        len: usize,
        moves: &[&[SlotMove]],
    ) -> Result<(), Error> {
        if moves.iter().all(|moves| moves.is_empty()) {
            return Ok(());
        }
        let (keys, values) = &self.layers[layer];
        let (_, kv_heads, capacity, dim) = keys.dims4()?;
        // One gather over the flat slots of all heads of all blocks.
        let flat: Vec<u32> = (0..moves.len() * kv_heads)
            .flat_map(|row| {
                let sources = sources(row % kv_heads, len, moves[row / kv_heads]);
                sources.into_iter().map(move |slot| ((index * kv_heads + row) * capacity) as u32 + slot)
            })
            .collect();
        let flat = Tensor::from_vec(flat, moves.len() * kv_heads * len, keys.device())?;
        for memory in [keys, values] {
            let folded = memory.flatten_to(2)?.index_select(&flat, 0)?;
            let part = memory.narrow(0, index, moves.len())?;
            part.slice_set(&folded.reshape((moves.len(), kv_heads, len, dim))?, 2, 0)?;
        }
        Ok(())
    }

    /// Turns keys on; `len` slots are filled.
    pub(super) fn turn(
        &self,
        index: usize,
        layer: usize,
        len: usize,
        turns: &[Turn],
        rotation: &Rotation,
    ) -> Result<(), Error> {
        let [keys, _] = self.block(index, layer)?;
        let (kv_heads, _, dim) = keys.dims3()?;
        let filled = keys.narrow(1, 0, len)?.to_dtype(DType::F32)?.contiguous()?;
        let mut numbers = filled.flatten_all()?.to_vec1::<f32>()?;
        for turn in turns {
            let at = (turn.head as usize * len + turn.slot as usize) * dim;
            rotation.shift(&mut numbers[at..at + dim], turn.by);
        }
        let new = Tensor::from_vec(numbers, (kv_heads, len, dim), keys.device())?;
        keys.slice_set(&self.stored(&new)?, 1, 0)?;
        Ok(())
    }

    /// Appends the filled slots of a block as f32, layer by layer, keys then values.
    pub(super) fn export(&self, index: usize, state: &BlockState, image: &mut Vec<u8>) -> Result<(), Error> {
        for layer in 0..self.layers.len() {
            for part in self.block(index, layer)? {
                let filled = part.narrow(1, 0, state.len(layer))?.to_dtype(DType::F32)?;
                let numbers = filled.flatten_all()?.to_vec1::<f32>()?;
                image.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
        }
        Ok(())
    }

    /// Reads what [`Self::export`] wrote.
    pub(super) fn import(&self, index: usize, state: &BlockState, mut image: &[u8]) -> Result<(), Error> {
        let broken = || Error::InvalidBatch("a block's image has another length".into());
        for layer in 0..self.layers.len() {
            for part in self.block(index, layer)? {
                let (kv_heads, _, dim) = part.dims3()?;
                let len = state.len(layer);
                let (bytes, rest) = image.split_at_checked(4 * kv_heads * len * dim).ok_or_else(broken)?;
                image = rest;
                if len > 0 {
                    let numbers: Vec<f32> =
                        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                    // Rounded already: what was exported is what is stored.
                    let new = Tensor::from_vec(numbers, (kv_heads, len, dim), part.device())?;
                    part.slice_set(&new.to_dtype(part.dtype())?, 1, 0)?;
                }
            }
        }
        if image.is_empty() { Ok(()) } else { Err(broken()) }
    }
}

fn stored_dtype(slot_type: SlotType) -> DType {
    match slot_type {
        SlotType::F32 | SlotType::I8 | SlotType::I4 => DType::F32,
        SlotType::F16 => DType::F16,
        SlotType::Bf16 => DType::BF16,
    }
}
