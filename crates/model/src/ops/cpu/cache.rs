//! The blocks' keys and values, all in one allocation.

use locket_kernels::cpu::{
    AlignedBuf, Isa,
    attention::ReceivedMode,
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};

use crate::{
    BlockId, Error, ModelConfig,
    kv_cache::{
        self, BlockState, CachePlan, CacheSettings, Fold, FoldContext, FoldScratch, Rotation, SideCar,
        SlotReader, SlotType,
    },
};
use std::sync::Arc;

/// One block: what is in its slots, and where they lie.
struct Block {
    state: BlockState,
    /// Number type of the slots.
    number: SlotNumber,
    /// First number of layer 0; the others follow.
    base: usize,
    /// Most slots that each layer has had filled since it was scrubbed `[layers]`.
    touched: Vec<usize>,
}

impl Block {
    fn layout(&self, slots: usize) -> KvLayout {
        let geometry = self.state.geometry();
        KvLayout::of(self.number, geometry.num_kv_heads, geometry.head_dim, slots)
    }

    fn place(&self, layer: usize) -> KvPlace {
        let layout = self.layout(self.state.stride_of(layer));
        // Numbers of a layer grow with its slots, whole groups of them.
        let before = match self.state.start_of(layer) {
            _ if !self.state.is_spread() => layer * layout.layer_len(),
            0 => 0,
            slots => self.layout(slots).layer_len(),
        };
        KvPlace { layout, base: self.base + before }
    }
}

/// All blocks `[blocks][layers][K | V][kv_heads]…`, smallest class first.
pub(super) struct Cache {
    pub(super) memory: AlignedBuf,
    pub(super) number: SlotNumber,
    blocks: Vec<Block>,
    context: FoldContext,
    scratch: FoldScratch,
    /// A head's keys on their way through a compaction.
    keys: Vec<f32>,
    /// A block's keys and values on their way to the layers' own regions.
    moving: Vec<u8>,
    num_layers: usize,
}

/// Rows of a sequence that wait for a layer.
#[derive(Clone, Copy)]
pub(super) struct NewRows<'a> {
    /// First row in the batch.
    pub(super) first_row: usize,
    /// Positions in the sequence, one per row.
    pub(super) positions: &'a [u32],
    /// Scores `[rows of the batch, kv_heads, 2]` of the learned method.
    pub(super) scores: &'a [f32],
    /// Keys and values of the batch.
    pub(super) numbers: KvRows<'a>,
}

/// Rows that were appended and wait for attention.
pub(super) struct Appended {
    pub(super) place: KvPlace,
    pub(super) slots_before: usize,
    pub(super) rows: usize,
}

impl Cache {
    /// Allocates the blocks of `plan`; see [`Self::touch_pages`].
    ///
    /// # Errors
    /// [`Error::Plan`] for a slot type without kernels.
    pub(super) fn new(
        plan: &CachePlan,
        model: &ModelConfig,
        side_car: Option<Arc<SideCar>>,
    ) -> Result<Self, Error> {
        let geometry = plan.geometry;
        let number = match plan.slot_type {
            SlotType::F32 => SlotNumber::F32,
            SlotType::F16 => SlotNumber::F16,
            SlotType::Bf16 => SlotNumber::Bf16,
            SlotType::I8 => SlotNumber::I8,
            SlotType::I4 => {
                let reason = "int4 slots are an experiment of the reference backend; the cpu backend has \
                    f32, f16, bf16 and int8";
                return Err(Error::Plan(reason.into()));
            }
        };
        let mut blocks = Vec::with_capacity(plan.num_blocks() as usize);
        let mut base = 0;
        for class in &plan.classes {
            let capacity = class.capacity as usize;
            let layout = KvLayout::of(number, geometry.num_kv_heads, geometry.head_dim, capacity);
            for _ in 0..class.blocks {
                let state = BlockState::new(geometry, capacity, plan.side);
                blocks.push(Block { state, number, base, touched: vec![0; geometry.num_layers] });
                base += geometry.num_layers * layout.layer_len();
            }
        }
        let memory = AlignedBuf::zeroed(base * number.bytes());
        Ok(Self {
            memory,
            number,
            blocks,
            context: FoldContext { rotation: Rotation::of(model), side_car, slot_type: plan.slot_type },
            scratch: FoldScratch::default(),
            keys: Vec::new(),
            moving: Vec::new(),
            num_layers: geometry.num_layers,
        })
    }

    /// Writes to every page of the slots; until then the system hands them out as they are filled.
    pub(super) fn touch_pages(&mut self) {
        self.memory.touch_pages();
    }

    /// Bytes of slots, their positions and side arrays.
    pub(super) fn num_bytes(&self) -> usize {
        self.memory.num_bytes() + self.blocks.iter().map(|block| block.state.num_bytes()).sum::<usize>()
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn state(&self, block: BlockId) -> Result<&BlockState, Error> {
        Ok(&self.blocks[self.index(block)?].state)
    }

    pub(super) fn state_mut(&mut self, block: BlockId) -> &mut BlockState {
        &mut self.blocks[block.0 as usize].state
    }

    /// A block's bookkeeping, and the model's rotary embedding.
    pub(super) fn state_and_rotation(&mut self, block: BlockId) -> (&mut BlockState, &Rotation) {
        (&mut self.blocks[block.0 as usize].state, &self.context.rotation)
    }

    /// Positions `[kv_heads, stride]` of a layer's slots and their stride.
    pub(super) fn positions(&self, block: usize, layer: usize) -> (&[u32], usize) {
        let state = &self.blocks[block].state;
        (state.positions(layer), state.stride_of(layer))
    }

    fn index(&self, block: BlockId) -> Result<usize, Error> {
        let idx = block.0 as usize;
        if idx >= self.blocks.len() {
            return Err(Error::InvalidBatch(format!("block {idx} of {} does not exist", self.blocks.len())));
        }
        Ok(idx)
    }

    pub(super) fn open(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        let idx = self.index(block)?;
        self.scrub(idx);
        self.blocks[idx].state.open(settings, &self.context)
    }

    pub(super) fn close(&mut self, block: BlockId) {
        if let Ok(idx) = self.index(block) {
            self.scrub(idx);
        }
    }

    fn scrub(&mut self, idx: usize) {
        let block = &mut self.blocks[idx];
        // Before the layers' regions become those of an empty block.
        for layer in 0..self.num_layers {
            let slots = std::mem::take(&mut block.touched[layer]);
            kv::clear_slots(self.number, &mut self.memory, block.place(layer), slots);
        }
        block.state.close();
    }

    pub(super) fn copy(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let (from, to) = (self.index(from)?, self.index(to)?);
        if from == to {
            return Ok(());
        }
        let Some(settings) = self.blocks[from].state.settings() else {
            return Err(Error::InvalidBatch(format!("block {from} is to be copied but not open")));
        };
        self.scrub(to);
        self.blocks[to].state.open(settings, &self.context)?;
        let [source, target] = self
            .blocks
            .get_disjoint_mut([from, to])
            .map_err(|error| Error::InvalidBatch(error.to_string()))?;
        target.state.copy_from(&source.state);
        for layer in 0..self.num_layers {
            let slots = source.state.len(layer);
            kv::copy_layer(self.number, &mut self.memory, source.place(layer), target.place(layer), slots);
            target.touched[layer] = slots;
        }
        Ok(())
    }

    /// The block's state as bytes; see [`crate::Model::export_block`].
    pub(super) fn export(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        let block = &self.blocks[self.index(block)?];
        let layers = (0..self.num_layers)
            .map(|layer| block.place(layer).layout.exported_bytes(self.number, block.state.len(layer)));
        // Exactly, or growing would copy megabytes several times and keep half as much again.
        let mut image = Vec::with_capacity(block.state.image_bytes(&self.context) + layers.sum::<usize>());
        block.state.export(&self.context, &mut image)?;
        for layer in 0..self.num_layers {
            kv::export_layer(
                self.number,
                &self.memory,
                block.place(layer),
                block.state.len(layer),
                &mut image,
            );
        }
        Ok(image)
    }

    /// Opens the block with what [`Self::export`] returned.
    pub(super) fn import(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        let idx = self.index(block)?;
        self.scrub(idx);
        let Block { state, .. } = &mut self.blocks[idx];
        let mut rest = state.import(image, &self.context)?;
        for layer in 0..self.num_layers {
            let block = &mut self.blocks[idx];
            let slots = block.state.len(layer);
            let place = block.place(layer);
            block.touched[layer] = slots;
            let split = rest.split_at_checked(place.layout.exported_bytes(self.number, slots));
            let read = split
                .filter(|(layer, _)| kv::import_layer(self.number, &mut self.memory, place, slots, layer));
            let Some((_, after)) = read else {
                self.scrub(idx);
                return Err(Error::InvalidBatch("a block's image ends too early".into()));
            };
            rest = after;
        }
        if !rest.is_empty() {
            self.scrub(idx);
            return Err(Error::InvalidBatch("a block's image goes on after its end".into()));
        }
        Ok(())
    }

    /// Folds and compacts `layer` of `block` if it is due, then stores the next of the rows, as many as
    /// fit before the next fold.
    pub(super) fn append(
        &mut self,
        isa: Isa,
        block: BlockId,
        layer: usize,
        new: NewRows<'_>,
    ) -> Result<Appended, Error> {
        let NewRows { first_row, positions, scores, numbers } = new;
        let idx = block.0 as usize;
        let place = self.blocks[idx].place(layer);
        let segment = self.blocks[idx].state.next_segment(layer, positions);
        if segment.fold {
            self.fold(idx, layer)?;
        }
        if segment.compact > 0 {
            self.compact(idx, layer, segment.compact);
        }
        let block = &mut self.blocks[idx];
        let rows = first_row..first_row + segment.rows;
        let slots_before = block.state.append(layer, &positions[..segment.rows]);
        let method = block.state.settings().map(|settings| settings.method);
        if method.is_some_and(kv_cache::CacheMethod::scores_rows) {
            let width = 2 * block.state.geometry().num_kv_heads;
            block.state.set_scores(layer, slots_before, &scores[rows.start * width..rows.end * width]);
        }
        kv::append(isa, self.number, &mut self.memory, place, slots_before, rows, numbers);
        block.touched[layer] = block.touched[layer].max(slots_before + segment.rows);
        Ok(Appended { place, slots_before, rows: segment.rows })
    }

    /// Takes tokens out of a layer; see [`BlockState::remove`].
    pub(super) fn remove_slots(&mut self, block: BlockId, layer: usize, slots: &[u32]) -> Result<(), Error> {
        let idx = self.index(block)?;
        let Self { memory, number, blocks, scratch, .. } = self;
        let block = &mut blocks[idx];
        let place = block.place(layer);
        for to_do in block.state.remove(layer, slots, scratch) {
            let (from, to) = (to_do.from as usize, to_do.to as usize);
            kv::move_slot(*number, memory, place, to_do.head as usize, from, to);
        }
        Ok(())
    }

    /// Spreads a block whose layers have budgets if it is full for the first time; see
    /// [`BlockState::is_to_be_spread`].
    pub(super) fn spread_if_due(&mut self, block: BlockId) -> Result<(), Error> {
        let idx = self.index(block)?;
        if !self.blocks[idx].state.is_to_be_spread() {
            return Ok(());
        }
        (0..self.num_layers).try_for_each(|layer| self.fold(idx, layer))?;
        let Self { memory, number, blocks, moving, .. } = self;
        let block = &mut blocks[idx];
        moving.clear();
        for layer in 0..self.num_layers {
            let (place, slots) = (block.place(layer), block.state.len(layer));
            kv::export_layer(*number, memory, place, slots, moving);
            // Nothing of the old layout stays behind.
            kv::clear_slots(*number, memory, place, std::mem::take(&mut block.touched[layer]));
        }
        block.state.spread();
        let mut rest = moving.as_slice();
        for layer in 0..self.num_layers {
            let (place, slots) = (block.place(layer), block.state.len(layer));
            let (bytes, after) = rest.split_at(place.layout.exported_bytes(*number, slots));
            let is_written = kv::import_layer(*number, memory, place, slots, bytes);
            debug_assert!(is_written, "a layer's region holds its slots");
            block.touched[layer] = slots;
            rest = after;
        }
        Ok(())
    }

    fn fold(&mut self, idx: usize, layer: usize) -> Result<(), Error> {
        let Self { memory, number, blocks, context, scratch, .. } = self;
        let block = &mut blocks[idx];
        let (place, len) = (block.place(layer), block.state.len(layer));
        let reader = Reader { memory, number: *number, place, len };
        match block.state.fold(layer, &reader, context, scratch)? {
            Fold::Moves(moves) => {
                for to_do in moves {
                    let (from, to) = (to_do.from as usize, to_do.to as usize);
                    kv::move_slot(*number, memory, place, to_do.head as usize, from, to);
                }
            }
            Fold::Rewrite { slots, keys, values } => {
                let size = keys.len() / block.state.geometry().num_kv_heads;
                let heads = keys.chunks_exact(size).zip(values.chunks_exact(size));
                for (head, (keys, values)) in heads.enumerate() {
                    kv::write_slots(*number, memory, place, head, 0..slots, keys, values);
                }
            }
        }
        Ok(())
    }

    fn compact(&mut self, idx: usize, layer: usize, borders: u32) {
        let Self { memory, number, blocks, context, scratch, keys, .. } = self;
        let block = &mut blocks[idx];
        let (place, len) = (block.place(layer), block.state.len(layer));
        let dim = block.state.geometry().head_dim;
        let turns = block.state.compact(layer, borders, scratch);
        keys.resize(len * dim, 0.0);
        for turns in turns.chunk_by(|a, b| a.head == b.head) {
            let head = turns[0].head as usize;
            kv::read_slots(*number, memory, place, head, 0..len, keys, &mut []);
            for turn in turns {
                let at = turn.slot as usize * dim;
                context.rotation.shift(&mut keys[at..at + dim], turn.by);
            }
            kv::write_slots(*number, memory, place, head, 0..len, keys, &[]);
        }
    }

    /// Keeps queries of rows that were just appended, if the block's method does.
    pub(super) fn keep_queries(
        &mut self,
        block: BlockId,
        layer: usize,
        positions: &[u32],
        queries: &[f32],
        stride: usize,
    ) {
        let (state, rotation) = self.state_and_rotation(block);
        state.keep_queries(layer, positions, queries, stride, rotation);
    }

    /// What attention reports of a block's rows, if its method asks.
    pub(super) fn received_mode(&self, block: usize) -> Option<ReceivedMode> {
        match self.blocks[block].state.settings()?.method.received()? {
            kv_cache::Received::Sum => Some(ReceivedMode::Sum),
            kv_cache::Received::Last => Some(ReceivedMode::Last),
        }
    }

    /// The layer's numbers that attention adds to, one array per block that asks.
    pub(super) fn received_mut(&mut self, block: usize, layer: usize) -> Option<(&mut [f32], usize)> {
        let state = &mut self.blocks[block].state;
        let stride = state.stride_of(layer);
        state.received_mut(layer).map(|received| (received, stride))
    }
}

/// Reads one layer's slots for a fold.
struct Reader<'a> {
    memory: &'a AlignedBuf,
    number: SlotNumber,
    place: KvPlace,
    len: usize,
}

impl SlotReader for Reader<'_> {
    fn read(&self, head: usize, keys: &mut [f32], values: &mut [f32]) -> Result<(), Error> {
        kv::read_slots(self.number, self.memory, self.place, head, 0..self.len, keys, values);
        Ok(())
    }
}
