//! What is in which slot of one block: fill counts per layer, positions per slot, and the driver
//! that folds.

use super::{CacheGeometry, CacheSettings, LayerView};
use crate::Error;

/// A survivor's new place: copy key, value and side arrays of `head` from slot `from` to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotMove {
    /// Key/value head.
    pub head: u32,
    /// Source slot, at or above the number of surviving slots.
    pub from: u32,
    /// Destination slot, below it.
    pub to: u32,
}

/// What to do next with the rows of one sequence in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Call [`BlockState::fold`] first.
    pub fold: bool,
    /// Then append and attend this many rows.
    pub rows: usize,
}

/// Buffers of the fold driver, shared by all blocks.
#[derive(Debug, Default)]
pub struct FoldScratch {
    scores: Vec<f32>,
    order: Vec<u32>,
    keep: Vec<bool>,
    moves: Vec<SlotMove>,
}

/// Bookkeeping of one block. Keys and values lie with the backend.
#[derive(Debug, Clone)]
pub struct BlockState {
    geometry: CacheGeometry,
    /// Slots per layer and head that the block's memory has.
    stride: usize,
    settings: Option<CacheSettings>,
    /// Filled slots `[layers]`; the same for every head of a layer.
    len: Vec<u32>,
    /// Whether a layer has folded before `[layers]`.
    folded: Vec<bool>,
    /// One past the position of the last token appended.
    next_position: u32,
    /// Position of the token in each slot `[layers, kv_heads, stride]`.
    positions: Vec<u32>,
}

impl BlockState {
    /// An empty block whose memory has `stride` slots per layer and head.
    pub fn new(geometry: CacheGeometry, stride: usize) -> Self {
        Self {
            geometry,
            stride,
            settings: None,
            len: vec![0; geometry.num_layers],
            folded: vec![false; geometry.num_layers],
            next_position: 0,
            positions: vec![0; geometry.num_layers * geometry.num_kv_heads * stride],
        }
    }

    /// Slots per layer and head that the block's memory has.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The settings of the sequence that owns the block, if one does.
    pub fn settings(&self) -> Option<CacheSettings> {
        self.settings
    }

    /// Empties the block for a new sequence.
    pub fn open(&mut self, settings: CacheSettings) {
        self.close();
        self.settings = Some(settings);
    }

    /// Empties the block.
    pub fn close(&mut self) {
        self.settings = None;
        self.len.fill(0);
        self.folded.fill(false);
        self.next_position = 0;
        self.positions.fill(0);
    }

    /// Position that the sequence's next token must have.
    pub fn next_position(&self) -> u32 {
        self.next_position
    }

    /// Checks that `rows` tokens, the first at `position`, may be appended next.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the block is not open, the tokens do not continue its sequence,
    /// or they would overflow a block that never folds.
    pub fn check_append(&self, position: u32, rows: usize) -> Result<(), Error> {
        let Some(settings) = self.settings else {
            return Err(Error::InvalidBatch("a sequence's block was not opened".into()));
        };
        if position != self.next_position {
            return Err(Error::InvalidBatch(format!(
                "a sequence's rows start at position {position}, but its block goes on at {}",
                self.next_position
            )));
        }
        let capacity = settings.capacity() as usize;
        // The first layer folds last, so it is the fullest before any fold.
        if settings.ring == 0 && self.len(0) + rows > capacity {
            return Err(Error::InvalidBatch(format!(
                "{rows} rows do not fit: {} of {capacity} slots are filled and the block never folds",
                self.len(0)
            )));
        }
        Ok(())
    }

    /// Filled slots of `layer`.
    pub fn len(&self, layer: usize) -> usize {
        self.len[layer] as usize
    }

    /// Whether `layer` holds nothing.
    pub fn is_empty(&self, layer: usize) -> bool {
        self.len[layer] == 0
    }

    /// Filled slots in all layers and heads.
    pub fn used_slots(&self) -> usize {
        self.len.iter().map(|&len| len as usize).sum::<usize>() * self.geometry.num_kv_heads
    }

    /// Positions `[kv_heads, stride]` of `layer`; of each head the first [`Self::len`] count.
    pub fn positions(&self, layer: usize) -> &[u32] {
        let size = self.geometry.num_kv_heads * self.stride;
        &self.positions[layer * size..(layer + 1) * size]
    }

    /// Fill count at which `layer` folds. So that one sequence's folds do not all fall into one
    /// step, layer `l` folds first at `M + B - floor(l * B / L)` and then at `M + B`.
    fn fold_at(&self, layer: usize, settings: CacheSettings) -> usize {
        let capacity = settings.capacity() as usize;
        if self.folded[layer] {
            capacity
        } else {
            capacity - layer * settings.ring as usize / self.geometry.num_layers
        }
    }

    /// The next part of `rows` rows that wait for `layer`: fold or not, and how many rows fit
    /// before the next fold. Loop until all rows are done.
    ///
    /// # Panics
    /// If the block was not opened, or a block that never folds is full (both are caller's bugs
    /// that `upload` refuses).
    pub fn next_segment(&self, layer: usize, rows: usize) -> Segment {
        let settings = self.settings.expect("the block is open");
        let room = self.fold_at(layer, settings).saturating_sub(self.len(layer));
        if room > 0 {
            return Segment { fold: false, rows: rows.min(room) };
        }
        assert!(settings.ring > 0, "a block without ring is full");
        Segment { fold: true, rows: rows.min(settings.ring as usize) }
    }

    /// Records rows at `positions` appended to `layer`; their keys and values go to slots
    /// `len..len + positions.len()` of every head. Returns the first slot.
    pub fn append(&mut self, layer: usize, positions: &[u32]) -> usize {
        let start = self.len(layer);
        let size = self.geometry.num_kv_heads * self.stride;
        for head in 0..self.geometry.num_kv_heads {
            let at = layer * size + head * self.stride + start;
            self.positions[at..at + positions.len()].copy_from_slice(positions);
        }
        self.len[layer] += positions.len() as u32;
        if let Some(&last) = positions.last() {
            self.next_position = last + 1;
        }
        start
    }

    /// Shrinks `layer` to `M` slots and returns the moves that the backend must apply to keys and
    /// values, at most `B` per head. Ties keep the older token.
    pub fn fold<'s>(&mut self, layer: usize, scratch: &'s mut FoldScratch) -> &'s [SlotMove] {
        let settings = self.settings.expect("the block is open");
        let len = self.len(layer);
        let target = (settings.slots as usize).min(len);
        let heads = self.geometry.num_kv_heads;
        scratch.moves.clear();
        scratch.scores.clear();
        scratch.scores.resize(heads * len, 0.0);
        let view = LayerView {
            layer,
            len,
            num_kv_heads: heads,
            positions: self.positions(layer),
            stride: self.stride,
        };
        settings.method.fold_method().rank(view, &mut scratch.scores);
        let size = heads * self.stride;
        for head in 0..heads {
            let at = layer * size + head * self.stride;
            let positions = &mut self.positions[at..at + len];
            let scores = &mut scratch.scores[head * len..(head + 1) * len];
            for (score, &position) in scores.iter_mut().zip(positions.iter()) {
                if position < settings.sinks {
                    *score = f32::INFINITY;
                }
            }
            scratch.order.clear();
            scratch.order.extend(0..len as u32);
            scratch.order.sort_unstable_by(|&a, &b| {
                let (a, b) = (a as usize, b as usize);
                scores[b].total_cmp(&scores[a]).then(positions[a].cmp(&positions[b]))
            });
            scratch.keep.clear();
            scratch.keep.resize(len, false);
            for &slot in &scratch.order[..target] {
                scratch.keep[slot as usize] = true;
            }
            // Survivors beyond the first `target` slots move into the evicted ones, in order.
            let mut hole = 0;
            for from in target..len {
                if !scratch.keep[from] {
                    continue;
                }
                while scratch.keep[hole] {
                    hole += 1;
                }
                positions[hole] = positions[from];
                scratch.keep[hole] = true;
                scratch.moves.push(SlotMove { head: head as u32, from: from as u32, to: hole as u32 });
            }
        }
        self.len[layer] = target as u32;
        self.folded[layer] = true;
        &scratch.moves
    }

    /// Takes over the whole state of `other`, whose memory may have another stride. The caller
    /// copies keys and values.
    pub fn copy_from(&mut self, other: &Self) {
        self.close();
        self.settings = other.settings;
        self.len.copy_from_slice(&other.len);
        self.folded.copy_from_slice(&other.folded);
        self.next_position = other.next_position;
        for layer in 0..self.geometry.num_layers {
            for head in 0..self.geometry.num_kv_heads {
                let len = self.len(layer);
                let to = (layer * self.geometry.num_kv_heads + head) * self.stride;
                let from = (layer * self.geometry.num_kv_heads + head) * other.stride;
                self.positions[to..to + len].copy_from_slice(&other.positions[from..from + len]);
            }
        }
    }
}
