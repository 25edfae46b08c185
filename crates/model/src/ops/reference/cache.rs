//! Attention of the reference backend, over blocks or over whole sequences.
//!
//! Sequences that are alike (neighbours in the batch and among the blocks, with as many rows and
//! filled slots) attend together, so that a device gets few large operations.

use candle_core::{D, DType, Device, Tensor};

use super::{ReferenceOps, ReferenceStep, at_least_f32, slots::Slots};
use crate::{
    BlockId, Error,
    batch::{Batch, BatchSequence},
    kv_cache::{BlockState, CachePlan, CacheSettings, FoldContext, FoldScratch, Received, Segment, SlotMove},
    ops::Reg,
};

/// All blocks: bookkeeping, and the memory of each class.
pub(super) struct Blocks {
    pub(super) states: Vec<BlockState>,
    /// Class and index in it of each block.
    pub(super) places: Vec<(usize, usize)>,
    pub(super) classes: Vec<Slots>,
    scratch: FoldScratch,
}

/// Sequences that attend together, consecutive in the batch and in one class.
struct Group {
    /// Index in the batch of the first.
    sequence: usize,
    count: usize,
    /// First row in the batch; the next sequence's is `stride` rows on.
    row: usize,
    stride: usize,
    rows: usize,
    class: usize,
    /// Index in its class of the first block.
    block: usize,
    /// First slot of the new rows.
    slot: usize,
}

impl Blocks {
    /// Allocates the blocks of `plan`; `shares` are those of the layers, if a side-car names some.
    pub(super) fn new(plan: &CachePlan, shares: Option<&[f32]>, device: &Device) -> Result<Self, Error> {
        let mut blocks = Self {
            states: Vec::new(),
            places: Vec::new(),
            classes: Vec::new(),
            scratch: FoldScratch::default(),
        };
        for (class, sizes) in plan.classes.iter().enumerate() {
            let capacity = sizes.capacity as usize;
            blocks.classes.push(Slots::new(plan, sizes.blocks as usize, capacity, shares, device)?);
            for index in 0..sizes.blocks as usize {
                blocks.states.push(BlockState::new(plan.geometry, capacity, plan.side));
                blocks.places.push((class, index));
            }
        }
        Ok(blocks)
    }

    fn index(&self, block: BlockId) -> Result<usize, Error> {
        let idx = block.0 as usize;
        if idx < self.states.len() {
            Ok(idx)
        } else {
            Err(Error::InvalidBatch(format!("there is no block {idx}")))
        }
    }

    pub(super) fn state(&self, block: BlockId) -> Result<&BlockState, Error> {
        Ok(&self.states[self.index(block)?])
    }

    pub(super) fn state_mut(&mut self, block: BlockId) -> Result<&mut BlockState, Error> {
        let idx = self.index(block)?;
        Ok(&mut self.states[idx])
    }

    fn memory(&self, block: BlockId) -> (&Slots, usize) {
        let (class, index) = self.places[block.0 as usize];
        (&self.classes[class], index)
    }

    pub(super) fn open(
        &mut self,
        block: BlockId,
        settings: CacheSettings,
        context: &FoldContext,
    ) -> Result<(), Error> {
        let idx = self.index(block)?;
        let (memory, index) = self.memory(block);
        memory.clear(index);
        self.states[idx].open(settings, context)
    }

    pub(super) fn close(&mut self, block: BlockId) {
        if let Ok(idx) = self.index(block) {
            self.states[idx].close();
            let (memory, index) = self.memory(block);
            memory.clear(index);
        }
    }

    pub(super) fn copy(&mut self, from: BlockId, to: BlockId, context: &FoldContext) -> Result<(), Error> {
        let (source, target) = (self.index(from)?, self.index(to)?);
        let Some(settings) = self.states[source].settings() else {
            return Err(Error::InvalidBatch("a block is to be copied but not open".into()));
        };
        if source == target {
            return Ok(());
        }
        self.open(to, settings, context)?;
        let state = self.states[source].clone();
        self.states[target].copy_from(&state);
        let ((from, a), (to, b)) = (self.memory(from), self.memory(to));
        from.copy_to(a, to, b, &state)
    }

    pub(super) fn export(&self, block: BlockId, context: &FoldContext) -> Result<Vec<u8>, Error> {
        let state = self.state(block)?;
        let mut image = Vec::new();
        state.export(context, &mut image)?;
        let (memory, index) = self.memory(block);
        memory.export(index, state, &mut image)?;
        Ok(image)
    }

    pub(super) fn import(
        &mut self,
        block: BlockId,
        image: &[u8],
        context: &FoldContext,
    ) -> Result<(), Error> {
        let idx = self.index(block)?;
        let rest = self.states[idx].import(image, context)?;
        let (memory, index) = self.memory(block);
        memory.clear(index);
        let imported = memory.import(index, &self.states[idx], rest);
        if imported.is_err() {
            self.close(block);
        }
        imported
    }

    /// Checks `batch` against the blocks: open, in order, with room, each used once.
    pub(super) fn check(&self, batch: &Batch) -> Result<(), Error> {
        let mut used = vec![false; self.states.len()];
        for sequence in &batch.sequences {
            let id = self.index(sequence.block)?;
            if std::mem::replace(&mut used[id], true) {
                return Err(Error::InvalidBatch(format!("block {id} is in the batch twice")));
            }
            self.states[id].check_append(batch.first_layer as usize, batch.positions_of(sequence))?;
        }
        Ok(())
    }

    /// Takes tokens out of a layer; see [`BlockState::remove`].
    pub(super) fn remove_slots(&mut self, block: BlockId, layer: usize, slots: &[u32]) -> Result<(), Error> {
        let idx = self.index(block)?;
        let (class, index) = self.places[idx];
        let len = self.states[idx].len(layer);
        let moves = self.states[idx].remove(layer, slots, &mut self.scratch);
        self.classes[class].apply_moves(index, layer, len, &[moves])
    }

    /// Spreads blocks that are due; see [`BlockState::is_to_be_spread`]. The tensors have room for every
    /// layer's budget, so keys and values stay.
    pub(super) fn spread_if_due(&mut self, batch: &Batch, context: &FoldContext) -> Result<(), Error> {
        let mut due = Vec::new();
        for sequence in &batch.sequences {
            let idx = self.index(sequence.block)?;
            if self.states[idx].is_to_be_spread() {
                due.push(idx);
            }
        }
        let layers = due.first().map_or(0, |&idx| self.states[idx].geometry().num_layers);
        for layer in 0..layers {
            self.fold_all(&due, layer, context)?;
        }
        due.into_iter().for_each(|idx| self.states[idx].spread());
        Ok(())
    }

    /// Folds and compacts `layer` as far as the next rows of each sequence ask for, given its block and the
    /// positions of the rows it has left; returns how many rows come next in each.
    fn make_room(
        &mut self,
        waiting: &[(BlockId, &[u32])],
        layer: usize,
        context: &FoldContext,
    ) -> Result<Vec<usize>, Error> {
        let segments: Vec<Segment> = waiting
            .iter()
            .map(|(block, positions)| self.states[block.0 as usize].next_segment(layer, positions))
            .collect();
        let due = waiting.iter().zip(&segments).filter(|(_, segment)| segment.fold);
        let due: Vec<usize> = due.map(|((block, _), _)| block.0 as usize).collect();
        self.fold_all(&due, layer, context)?;
        for ((block, _), segment) in waiting.iter().zip(&segments) {
            if segment.compact > 0 {
                let (class, index) = self.places[block.0 as usize];
                let (memory, state) = (&self.classes[class], &mut self.states[block.0 as usize]);
                let len = state.len(layer);
                let turns = state.compact(layer, segment.compact, &mut self.scratch);
                memory.turn(index, layer, len, turns, &context.rotation)?;
            }
        }
        Ok(segments.into_iter().map(|segment| segment.rows).collect())
    }
}

impl ReferenceOps {
    /// Queries, keys or values of a group: `heads` heads from column `from` of [`Reg::Qkv`],
    /// `[count, heads, rows, head_dim]`.
    fn part(&self, group: &Group, from: usize, heads: usize) -> Result<Tensor, Error> {
        let dim = self.config.model.head_dim;
        let qkv = self.get(Reg::Qkv)?;
        let all = qkv.narrow(0, group.row, (group.count - 1) * group.stride + group.rows)?;
        let columns = all.narrow(1, from, heads * dim)?;
        let rows = if group.count == 1 {
            columns.contiguous()?.reshape((1, group.rows, heads, dim))?
        } else {
            // Every sequence's rows lie `stride` apart; the last one's end short.
            let short = group.stride - group.rows;
            let padded = if short == 0 { columns } else { columns.pad_with_zeros(0, 0, short)? };
            let padded = padded.contiguous()?.reshape((group.count, group.stride, heads, dim))?;
            padded.narrow(1, 0, group.rows)?
        };
        Ok(rows.transpose(1, 2)?.contiguous()?)
    }

    /// Softmax attention. `q [count, heads, rows, head_dim]`, `k, v [count, kv_heads, slots,
    /// head_dim]`, `mask [1 or count, 1 or kv_heads, rows, slots]` added to the scores. Returns `[count, rows,
    /// q_dim]` and the weights `[count, kv_heads, group, rows, slots]`.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<[Tensor; 2], Error> {
        let (count, heads, rows, head_dim) = q.dims4()?;
        let (_, kv_heads, slots, _) = k.dims4()?;
        let group = heads / kv_heads;
        let q = (q.reshape((count, kv_heads, group * rows, head_dim))? / (head_dim as f64).sqrt())?;
        let scores = q.matmul(&k.t()?)?.reshape((count, kv_heads, group, rows, slots))?;
        let scores = scores.to_dtype(mask.dtype())?.broadcast_add(&mask.unsqueeze(2)?)?;
        let weights = if self.blocks.is_some() {
            // Nothing asks for gradients here: one kernel instead of five.
            candle_nn::ops::softmax_last_dim(&scores)?
        } else {
            // The shift cancels out, so its gradient is zero and need not be followed.
            let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
            exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
        };
        let mixed =
            weights.to_dtype(self.dtype)?.reshape((count, kv_heads, group * rows, slots))?.matmul(v)?;
        let out = mixed.reshape((count, heads, rows, head_dim))?.transpose(1, 2)?.contiguous()?;
        Ok([out.flatten_from(2)?, weights])
    }

    /// What rows at positions `rows` may see of slots at positions `slots`: `0` or `-inf`.
    fn mask_numbers(&self, layer: usize, rows: &[u32], slots: &[u32], out: &mut Vec<f32>) {
        let window =
            self.config.model.sliding_window[layer].map_or(u32::MAX, |w| w.min(u32::MAX as usize) as u32);
        for &row in rows {
            out.extend(slots.iter().map(|&slot| {
                let sees = slot <= row && row - slot < window;
                if sees { 0.0f32 } else { f32::NEG_INFINITY }
            }));
        }
    }

    fn mask_tensor(&self, numbers: Vec<f32>, shape: (usize, usize, usize, usize)) -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(numbers, shape, &self.device)?.to_dtype(at_least_f32(self.dtype))?)
    }

    /// Attention of all sequences over their blocks: fold if due, append, attend, until all rows are
    /// done. Returns `[rows, q_dim]`.
    pub(super) fn attend_blocks(&mut self, step: &ReferenceStep, layer: usize) -> Result<Tensor, Error> {
        let mut done = vec![0; step.sequences.len()];
        let mut rounds: Vec<Vec<(Group, Tensor)>> = Vec::new();
        loop {
            let groups = self.next_groups(step, layer, &mut done)?;
            if groups.is_empty() {
                break;
            }
            let attend = |group| {
                let out = self.attend_group(step, layer, &group)?;
                Ok((group, out))
            };
            rounds.push(groups.into_iter().map(attend).collect::<Result<_, Error>>()?);
        }
        // The usual case of an evaluation, without a copy per sequence: all are alike in every round.
        let all = step.sequences.len();
        if rounds.iter().all(|round| matches!(&round[..], [(group, _)] if group.count == all)) {
            let outputs: Vec<&Tensor> = rounds.iter().flatten().map(|(_, out)| out).collect();
            return Ok(Tensor::cat(&outputs, 1)?.flatten_to(1)?);
        }
        // Pieces of the output by first row.
        let mut pieces: Vec<(usize, Tensor)> = Vec::new();
        for (group, out) in rounds.iter().flatten() {
            for i in 0..group.count {
                pieces.push((group.row + i * group.stride, out.get(i)?));
            }
        }
        pieces.sort_by_key(|piece| piece.0);
        let pieces: Vec<Tensor> = pieces.into_iter().map(|piece| piece.1).collect();
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// Makes room for the next rows of every sequence that has some left, and groups them.
    fn next_groups(
        &mut self,
        step: &ReferenceStep,
        layer: usize,
        done: &mut [usize],
    ) -> Result<Vec<Group>, Error> {
        let heads = self.config.model.num_kv_heads;
        let (context, row_scores) = (self.fold_context.clone(), std::mem::take(&mut self.row_scores));
        let blocks = self.blocks_mut()?;
        let mut waiting = Vec::new();
        for (i, (sequence, done)) in step.sequences.iter().zip(&*done).enumerate() {
            let row = sequence.rows.start as usize + done;
            let left = &step.positions[row..sequence.rows.end as usize];
            if !left.is_empty() {
                waiting.push((i, row, sequence.block, left));
            }
        }
        let asking: Vec<_> = waiting.iter().map(|&(_, _, block, left)| (block, left)).collect();
        let rooms = blocks.make_room(&asking, layer, &context)?;
        let mut groups: Vec<Group> = Vec::new();
        for ((i, row, block, left), rows) in waiting.into_iter().zip(rooms) {
            done[i] += rows;
            let state = &mut blocks.states[block.0 as usize];
            let slot = state.append(layer, &left[..rows]);
            if state.settings().is_some_and(|settings| settings.method.scores_rows()) {
                state.set_scores(layer, slot, &row_scores[2 * heads * row..2 * heads * (row + rows)]);
            }
            let (class, index) = blocks.places[block.0 as usize];
            if let Some(last) = groups.last_mut() {
                let stride = row - (last.row + (last.count - 1) * last.stride);
                let is_next = last.sequence + last.count == i
                    && (last.class, last.block + last.count) == (class, index)
                    && (last.rows, last.slot) == (rows, slot)
                    && (last.count == 1 || last.stride == stride);
                if is_next {
                    last.stride = stride;
                    last.count += 1;
                    continue;
                }
            }
            let new = Group { sequence: i, count: 1, row, stride: rows, rows, class, block: index, slot };
            groups.push(new);
        }
        self.row_scores = row_scores;
        Ok(groups)
    }

    /// Stores the group's new keys and values and attends; returns `[count, rows, q_dim]`.
    fn attend_group(&mut self, step: &ReferenceStep, layer: usize, group: &Group) -> Result<Tensor, Error> {
        let model = &self.config.model;
        let (heads, kv_heads) = (model.num_heads, model.num_kv_heads);
        let q = self.part(group, 0, heads)?;
        let k = self.part(group, model.q_dim(), kv_heads)?;
        let v = self.part(group, model.q_dim() + model.kv_dim(), kv_heads)?;
        let len = group.slot + group.rows;
        let blocks = self.blocks_mut()?;
        let memory = &blocks.classes[group.class];
        memory.append(group.block, layer, group.slot, &k, &v)?;
        let [keys, values] = memory.filled(group.block, group.count, layer, len)?;
        self.keep_queries(step, layer, group, &q)?;
        let mask = self.group_mask(step, layer, group, len)?;
        let [keys, values] = [keys.to_dtype(self.dtype)?, values.to_dtype(self.dtype)?];
        let [out, weights] = self.attention(&q, &keys, &values, &mask)?;
        self.add_received(step, layer, group, &weights)?;
        Ok(out)
    }

    /// `[1 or count, 1 or kv_heads, rows, len]`: new rows see what is older than themselves. Without a
    /// window that is all slots before them, whatever they hold.
    fn group_mask(
        &self,
        step: &ReferenceStep,
        layer: usize,
        group: &Group,
        len: usize,
    ) -> Result<Tensor, Error> {
        let mut numbers = Vec::new();
        if self.config.model.sliding_window[layer].is_none() {
            let rows: Vec<u32> = (group.slot as u32..len as u32).collect();
            let slots: Vec<u32> = (0..len as u32).collect();
            self.mask_numbers(layer, &rows, &slots, &mut numbers);
            return self.mask_tensor(numbers, (1, 1, group.rows, len));
        }
        let kv_heads = self.config.model.num_kv_heads;
        for sequence in &step.sequences[group.sequence..group.sequence + group.count] {
            let state = self.blocks()?.state(sequence.block)?;
            for head in 0..kv_heads {
                let slots = &state.positions(layer)[head * state.stride_of(layer)..][..len];
                self.mask_numbers(layer, &slots[group.slot..], slots, &mut numbers);
            }
        }
        self.mask_tensor(numbers, (group.count, kv_heads, group.rows, len))
    }

    /// Keeps queries `[count, heads, rows, head_dim]` of new rows for methods that look at them.
    fn keep_queries(
        &mut self,
        step: &ReferenceStep,
        layer: usize,
        group: &Group,
        q: &Tensor,
    ) -> Result<(), Error> {
        let context = self.fold_context.clone();
        let (_, heads, rows, dim) = q.dims4()?;
        let sequences = &step.sequences[group.sequence..group.sequence + group.count];
        let positions = |i: usize| &step.positions[group.row + i * group.stride..][..rows];
        let blocks = self.blocks_mut()?;
        for (i, sequence) in sequences.iter().enumerate() {
            let state = blocks.state_mut(sequence.block)?;
            if state.settings().is_some_and(|settings| settings.method.keeps_queries()) {
                let queries = q.get(i)?.transpose(0, 1)?.contiguous()?.to_dtype(DType::F32)?;
                let queries = queries.flatten_all()?.to_vec1::<f32>()?;
                state.keep_queries(layer, positions(i), &queries, heads * dim, &context.rotation);
            }
        }
        Ok(())
    }

    /// Adds the weights `[count, kv_heads, group, rows, slots]` to what slots received, for methods
    /// that ask.
    fn add_received(
        &mut self,
        step: &ReferenceStep,
        layer: usize,
        group: &Group,
        weights: &Tensor,
    ) -> Result<(), Error> {
        let sequences = &step.sequences[group.sequence..group.sequence + group.count];
        let blocks = self.blocks_mut()?;
        let mut modes = Vec::with_capacity(group.count);
        for sequence in sequences {
            modes.push(
                blocks.state(sequence.block)?.settings().and_then(|settings| settings.method.received()),
            );
        }
        let (_, kv_heads, _, rows, len) = weights.dims5()?;
        let download = |weights: &Tensor| -> Result<Vec<f32>, Error> {
            Ok(weights.sum((2, 3))?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
        };
        let wanted = |mode: Received| modes.contains(&Some(mode));
        let sums = if wanted(Received::Sum) { download(weights)? } else { Vec::new() };
        let last =
            if wanted(Received::Last) { download(&weights.narrow(3, rows - 1, 1)?)? } else { Vec::new() };
        for (i, (sequence, mode)) in sequences.iter().zip(modes).enumerate() {
            let state = blocks.state_mut(sequence.block)?;
            let stride = state.stride_of(layer);
            let (Some(mode), Some(received)) = (mode, state.received_mut(layer)) else { continue };
            for head in 0..kv_heads {
                let new = (i * kv_heads + head) * len..(i * kv_heads + head + 1) * len;
                let column = &mut received[head * stride..][..len];
                match mode {
                    Received::Sum => column.iter_mut().zip(&sums[new]).for_each(|(sum, x)| *sum += x),
                    Received::Last => column.copy_from_slice(&last[new]),
                }
            }
        }
        Ok(())
    }

    /// Attention of one whole sequence over itself.
    pub(super) fn attend_whole(
        &self,
        step: &ReferenceStep,
        layer: usize,
        sequence: &BatchSequence,
    ) -> Result<Tensor, Error> {
        let model = &self.config.model;
        let (start, end) = (sequence.rows.start as usize, sequence.rows.end as usize);
        let rows = end - start;
        let group =
            Group { sequence: 0, count: 1, row: start, stride: rows, rows, class: 0, block: 0, slot: 0 };
        let q = self.part(&group, 0, model.num_heads)?;
        let k = self.part(&group, model.q_dim(), model.num_kv_heads)?;
        let v = self.part(&group, model.q_dim() + model.kv_dim(), model.num_kv_heads)?;
        let positions = &step.positions[start..end];
        let mut numbers = Vec::new();
        self.mask_numbers(layer, positions, positions, &mut numbers);
        let mask = self.mask_tensor(numbers, (1, 1, rows, rows))?;
        let [out, _] = self.attention(&q, &k, &v, &mask)?;
        Ok(out.get(0)?)
    }
}

/// Where each of the first `len` slots of a head comes from after `moves`.
pub(super) fn sources(head: usize, len: usize, moves: &[SlotMove]) -> Vec<u32> {
    let mut sources: Vec<u32> = (0..len as u32).collect();
    for slot in moves.iter().filter(|slot| slot.head as usize == head) {
        sources[slot.to as usize] = slot.from;
    }
    sources
}
