//! The blocks' keys and values, all in one allocation.

use locket_kernels::cpu::{
    AlignedBuf, Isa,
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};

use crate::{
    BlockId, Error,
    kv_cache::{BlockState, CachePlan, CacheSettings, FoldScratch, SlotType},
};

/// One block: what is in its slots, and where they lie.
struct Block {
    state: BlockState,
    layout: KvLayout,
    /// First number of layer 0; the others follow.
    base: usize,
    /// Most slots that each layer has had filled since it was scrubbed `[layers]`.
    touched: Vec<usize>,
}

impl Block {
    fn place(&self, layer: usize) -> KvPlace {
        KvPlace { layout: self.layout, base: self.base + layer * self.layout.layer_len() }
    }
}

/// All blocks `[blocks][layers][K | V][kv_heads]…`, smallest class first.
pub(super) struct Cache {
    pub(super) memory: AlignedBuf,
    pub(super) number: SlotNumber,
    blocks: Vec<Block>,
    scratch: FoldScratch,
    num_layers: usize,
}

/// Rows that were appended and wait for attention.
pub(super) struct Appended {
    pub(super) place: KvPlace,
    pub(super) slots_before: usize,
    pub(super) rows: usize,
}

impl Cache {
    /// Allocates the blocks of `plan`; see [`Self::touch_pages`].
    pub(super) fn new(plan: &CachePlan) -> Self {
        let geometry = plan.geometry;
        let number = match plan.slot_type {
            SlotType::F32 => SlotNumber::F32,
            SlotType::F16 => SlotNumber::F16,
            SlotType::Bf16 => SlotNumber::Bf16,
        };
        let mut blocks = Vec::with_capacity(plan.num_blocks() as usize);
        let mut base = 0;
        for class in &plan.classes {
            let capacity = class.capacity as usize;
            let layout = KvLayout::new(geometry.num_kv_heads, geometry.head_dim, capacity);
            for _ in 0..class.blocks {
                let state = BlockState::new(geometry, capacity);
                blocks.push(Block { state, layout, base, touched: vec![0; geometry.num_layers] });
                base += geometry.num_layers * layout.layer_len();
            }
        }
        let memory = AlignedBuf::zeroed(base * number.bytes());
        Self { memory, number, blocks, scratch: FoldScratch::default(), num_layers: geometry.num_layers }
    }

    /// Writes to every page of the slots; until then the system hands them out as they are filled.
    pub(super) fn touch_pages(&mut self) {
        self.memory.touch_pages();
    }

    /// Bytes of slots and their positions.
    pub(super) fn num_bytes(&self) -> usize {
        let positions = |block: &Block| self.num_layers * size_of_val(block.state.positions(0));
        self.memory.num_bytes() + self.blocks.iter().map(positions).sum::<usize>()
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn state(&self, block: BlockId) -> Result<&BlockState, Error> {
        Ok(&self.blocks[self.index(block)?].state)
    }

    /// Positions `[kv_heads, stride]` of a layer's slots and their stride.
    pub(super) fn positions(&self, block: usize, layer: usize) -> (&[u32], usize) {
        let state = &self.blocks[block].state;
        (state.positions(layer), state.stride())
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
        settings.check(self.blocks[idx].state.stride())?;
        self.scrub(idx);
        self.blocks[idx].state.open(settings);
        Ok(())
    }

    pub(super) fn close(&mut self, block: BlockId) {
        if let Ok(idx) = self.index(block) {
            self.scrub(idx);
        }
    }

    fn scrub(&mut self, idx: usize) {
        let block = &mut self.blocks[idx];
        block.state.close();
        for layer in 0..self.num_layers {
            let slots = std::mem::take(&mut block.touched[layer]);
            kv::clear_slots(self.number, &mut self.memory, block.place(layer), slots);
        }
    }

    pub(super) fn copy(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let (from, to) = (self.index(from)?, self.index(to)?);
        if from == to {
            return Ok(());
        }
        let Some(settings) = self.blocks[from].state.settings() else {
            return Err(Error::InvalidBatch(format!("block {from} is to be copied but not open")));
        };
        settings.check(self.blocks[to].state.stride())?;
        self.scrub(to);
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

    /// Folds `layer` of `block` if it is due, then stores the next rows of `rows`, as many as fit
    /// before the next fold. `positions` has all positions of the batch.
    pub(super) fn append(
        &mut self,
        isa: Isa,
        block: BlockId,
        layer: usize,
        rows: std::ops::Range<usize>,
        positions: &[u32],
        new: KvRows<'_>,
    ) -> Appended {
        let block = &mut self.blocks[block.0 as usize];
        let place = block.place(layer);
        let segment = block.state.next_segment(layer, rows.len());
        if segment.fold {
            for to_do in block.state.fold(layer, &mut self.scratch) {
                let (from, to) = (to_do.from as usize, to_do.to as usize);
                kv::move_slot(self.number, &mut self.memory, place, to_do.head as usize, from, to);
            }
        }
        let rows = rows.start..rows.start + segment.rows;
        let slots_before = block.state.append(layer, &positions[rows.clone()]);
        kv::append(isa, self.number, &mut self.memory, place, slots_before, rows, new);
        block.touched[layer] = block.touched[layer].max(slots_before + segment.rows);
        Appended { place, slots_before, rows: segment.rows }
    }
}
