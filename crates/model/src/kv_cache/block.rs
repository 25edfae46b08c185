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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kv_cache::CacheMethod;

    fn geometry(num_layers: usize, num_kv_heads: usize) -> CacheGeometry {
        CacheGeometry { num_layers, num_kv_heads, head_dim: 1 }
    }

    fn window(slots: u32, ring: u32, sinks: u32) -> CacheSettings {
        CacheSettings { method: CacheMethod::Window, slots, ring, sinks }
    }

    /// A block and a backend's memory `[layers][heads][slots]` whose "keys" are token positions.
    struct Simulated {
        state: BlockState,
        memory: Vec<Vec<Vec<u32>>>,
        scratch: FoldScratch,
        /// Tokens seen when each layer folded.
        folds: Vec<Vec<u32>>,
    }

    impl Simulated {
        fn new(geometry: CacheGeometry, stride: usize, settings: CacheSettings) -> Self {
            let mut state = BlockState::new(geometry, stride);
            state.open(settings);
            Self {
                state,
                memory: vec![vec![vec![u32::MAX; stride]; geometry.num_kv_heads]; geometry.num_layers],
                scratch: FoldScratch::default(),
                folds: vec![Vec::new(); geometry.num_layers],
            }
        }

        /// What a backend does with one chunk; checks every fold.
        fn run(&mut self, rows: u32) {
            let first = self.state.next_position();
            self.state.check_append(first, rows as usize).unwrap();
            for layer in 0..self.memory.len() {
                let mut done = 0;
                while done < rows {
                    let segment = self.state.next_segment(layer, (rows - done) as usize);
                    assert!(segment.rows > 0);
                    if segment.fold {
                        self.fold(layer);
                        self.folds[layer].push(first + done);
                    }
                    let positions: Vec<u32> = (first + done..).take(segment.rows).collect();
                    let at = self.state.append(layer, &positions);
                    for head in &mut self.memory[layer] {
                        head[at..at + positions.len()].copy_from_slice(&positions);
                    }
                    done += segment.rows as u32;
                }
                self.check(layer);
            }
        }

        fn fold(&mut self, layer: usize) {
            let before = self.state.len(layer);
            let moves = self.state.fold(layer, &mut self.scratch).to_vec();
            let after = self.state.len(layer);
            assert!(after <= before);
            let mut touched = std::collections::HashSet::new();
            for slot in moves {
                assert!((after..before).contains(&(slot.from as usize)), "{slot:?}: not from the tail");
                assert!((slot.to as usize) < after, "{slot:?}: not into what stays");
                assert!(touched.insert((slot.head, slot.from)) && touched.insert((slot.head, slot.to)));
                let head = &mut self.memory[layer][slot.head as usize];
                head[slot.to as usize] = head[slot.from as usize];
            }
        }

        /// Memory and bookkeeping agree, and nothing is kept twice.
        fn check(&self, layer: usize) {
            let len = self.state.len(layer);
            let settings = self.state.settings().unwrap();
            assert!(len <= settings.capacity() as usize);
            for (head, memory) in self.memory[layer].iter().enumerate() {
                let positions = &self.state.positions(layer)[head * self.state.stride()..][..len];
                assert_eq!(positions, &memory[..len], "layer {layer} head {head}");
                let mut sorted = positions.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), len, "a token is kept twice");
            }
        }

        fn kept(&self, layer: usize, head: usize) -> Vec<u32> {
            let mut kept = self.memory[layer][head][..self.state.len(layer)].to_vec();
            kept.sort_unstable();
            kept
        }
    }

    #[test]
    fn layers_fold_staggered_and_then_every_ring() {
        // M = 8, B = 4, 4 layers: layer l folds first with 12 - l tokens, then at 12 slots.
        let mut block = Simulated::new(geometry(4, 2), 16, window(8, 4, 2));
        block.run(24);
        assert_eq!(block.folds[0], [12, 16, 20]);
        assert_eq!(block.folds[1], [11, 15, 19, 23]);
        assert_eq!(block.folds[2], [10, 14, 18, 22]);
        assert_eq!(block.folds[3], [9, 13, 17, 21]);
        assert_eq!(block.kept(3, 1), [0, 1, 15, 16, 17, 18, 19, 20, 21, 22, 23]);
    }

    #[test]
    fn a_full_block_refuses_the_row_too_many() {
        let mut block = Simulated::new(geometry(2, 1), 16, CacheSettings::full(10));
        block.run(10);
        assert_eq!(block.kept(1, 0), (0..10).collect::<Vec<_>>());
        assert_eq!(block.state.used_slots(), 20);
        assert!(block.state.check_append(10, 1).is_err(), "ten slots are filled");
        assert!(block.state.check_append(9, 1).is_err(), "position 9 was seen");
        block.state.close();
        assert!(block.state.check_append(0, 1).is_err(), "not open");
        assert!(block.state.positions(0).iter().all(|&position| position == 0));
    }

    #[test]
    fn ties_keep_the_older_token() {
        // All tokens are sinks, so all scores are equal.
        let mut block = Simulated::new(geometry(1, 1), 8, window(4, 4, 100));
        block.run(9);
        assert_eq!(block.kept(0, 0), [0, 1, 2, 3, 8]);
    }

    #[test]
    fn settings_that_contradict_the_block_are_refused() {
        assert!(window(8, 4, 2).check(12).is_ok());
        assert!(window(8, 4, 2).check(11).is_err());
        assert!(window(8, 0, 2).check(64).is_err());
        assert!(window(8, 4, 8).check(64).is_err());
        assert!(window(u32::MAX, u32::MAX, 0).check(64).is_err());
        assert!(CacheSettings::full(0).check(64).is_err());
        assert!(CacheSettings { ring: 1, ..CacheSettings::full(8) }.check(64).is_err());
    }

    fn cases() -> impl Strategy<Value = (CacheGeometry, usize, CacheSettings, Vec<u32>)> {
        let shape = (1usize..7, 1usize..4, 0usize..5);
        let settings = (2u32..40, 1u32..20, any::<prop::sample::Index>());
        (shape, settings, prop::collection::vec(1u32..60, 1..12)).prop_map(
            |((layers, heads, spare), (slots, ring, sinks), chunks)| {
                let settings = window(slots, ring, sinks.index(slots as usize) as u32);
                (geometry(layers, heads), settings.capacity() as usize + spare, settings, chunks)
            },
        )
    }

    proptest! {
        #[test]
        fn folds_keep_sinks_and_the_newest((geometry, stride, settings, chunks) in cases()) {
            let mut block = Simulated::new(geometry, stride, settings);
            chunks.iter().for_each(|&rows| block.run(rows));
            let seen: u32 = chunks.iter().sum();
            for layer in 0..geometry.num_layers {
                let kept = block.kept(layer, 0);
                // At least M tokens are kept once M were seen: the sinks and the newest of the rest.
                prop_assert!(kept.len() as u32 >= seen.min(settings.slots));
                let sinks = seen.min(settings.sinks);
                let newest = kept.len() as u32 - sinks;
                let expected: Vec<u32> = (0..sinks).chain(seen - newest..seen).collect();
                prop_assert_eq!(&kept, &expected);
                for head in 1..geometry.num_kv_heads {
                    prop_assert_eq!(&block.kept(layer, head), &expected);
                }
                let first = settings.capacity() - (layer as u32 * settings.ring) / geometry.num_layers as u32;
                for (idx, &at) in block.folds[layer].iter().enumerate() {
                    prop_assert_eq!(at, first + idx as u32 * settings.ring);
                }
            }
        }

        #[test]
        fn chunks_do_not_matter((geometry, stride, settings, chunks) in cases()) {
            let mut chunked = Simulated::new(geometry, stride, settings);
            chunks.iter().for_each(|&rows| chunked.run(rows));
            let mut whole = Simulated::new(geometry, stride, settings);
            whole.run(chunks.iter().sum());
            // Slot by slot, not only as a set: attention's order of sums must not change.
            for layer in 0..geometry.num_layers {
                let len = whole.state.len(layer);
                prop_assert_eq!(chunked.state.len(layer), len);
                for head in 0..geometry.num_kv_heads {
                    prop_assert_eq!(&chunked.memory[layer][head][..len], &whole.memory[layer][head][..len]);
                }
            }
            prop_assert_eq!(&chunked.folds, &whole.folds);
        }

        #[test]
        fn a_copy_goes_on_like_its_original((geometry, stride, settings, chunks) in cases(), spare in 0usize..5) {
            let mut original = Simulated::new(geometry, stride, settings);
            chunks.iter().for_each(|&rows| original.run(rows));
            let mut copy = Simulated::new(geometry, settings.capacity() as usize + spare, settings);
            copy.state.open(CacheSettings::full(1));
            copy.state.copy_from(&original.state);
            for (to, from) in copy.memory.iter_mut().flatten().zip(original.memory.iter().flatten()) {
                to[..settings.capacity() as usize].copy_from_slice(&from[..settings.capacity() as usize]);
            }
            original.run(settings.ring + 1);
            copy.run(settings.ring + 1);
            for layer in 0..geometry.num_layers {
                prop_assert_eq!(copy.kept(layer, 0), original.kept(layer, 0));
            }
        }
    }
}
