//! Unit and property tests of a block's bookkeeping.

use proptest::prelude::*;

use super::*;
use crate::kv_cache::{CacheMethod, Fold, Rotation, SlotType};

fn geometry(num_layers: usize, num_kv_heads: usize) -> CacheGeometry {
    CacheGeometry { num_layers, num_heads: num_kv_heads, num_kv_heads, head_dim: 1, max_position: 1 << 20 }
}

fn window(slots: u32, ring: u32, sinks: u32) -> CacheSettings {
    CacheSettings { sinks, recent: 0, ..CacheSettings::of(CacheMethod::Window, slots, ring) }
}

fn context() -> FoldContext {
    FoldContext { rotation: Rotation::none(), side_car: None, slot_type: SlotType::F32 }
}

/// Keys and values that no method under test reads.
struct NoSlots;

impl SlotReader for NoSlots {
    fn read(&self, _: usize, _: &mut [f32], _: &mut [f32]) -> Result<(), Error> {
        Err(Error::Device("keys are not there".into()))
    }
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
        let mut state =
            BlockState::new(geometry, stride, SideArrays { columns: 1, per_layer: 0, gaps: true });
        // Not `open`: some tests have settings that it refuses.
        state.begin(settings, None);
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
        self.run_at(&(first..first + rows).collect::<Vec<u32>>());
    }

    /// As [`Self::run`], with rows at these positions.
    fn run_at(&mut self, positions: &[u32]) {
        self.state.check_append(0, positions).unwrap();
        for layer in 0..self.memory.len() {
            let mut left = positions;
            while !left.is_empty() {
                let segment = self.state.next_segment(layer, left);
                assert!(segment.rows > 0);
                if segment.fold {
                    self.folds[layer].push(self.state.seen(layer));
                    self.fold(layer);
                }
                let (now, later) = left.split_at(segment.rows);
                let at = self.state.append(layer, now);
                for head in &mut self.memory[layer] {
                    head[at..at + now.len()].copy_from_slice(now);
                }
                left = later;
            }
            self.check(layer);
        }
    }

    fn fold(&mut self, layer: usize) {
        let before = self.state.len(layer);
        let fold = self.state.fold(layer, &NoSlots, &context(), &mut self.scratch).unwrap();
        let Fold::Moves(moves) = fold else { panic!("no mixtures here") };
        let moves = moves.to_vec();
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
    assert!(block.state.check_append(0, &[10]).is_err(), "ten slots are filled");
    assert!(block.state.check_append(0, &[9]).is_err(), "position 9 was seen");
    block.state.close();
    assert!(block.state.check_append(0, &[0]).is_err(), "not open");
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
    let none = SideArrays::default();
    assert!(window(8, 4, 2).check(12, none, none).is_ok());
    assert!(window(8, 4, 2).check(11, none, none).is_ok(), "as long as it fits");
    assert!(CacheSettings::full(12).check(11, none, none).is_err());
    assert!(window(8, 0, 2).check(64, none, none).is_err());
    assert!(window(8, 4, 8).check(64, none, none).is_err());
    assert!(window(u32::MAX, u32::MAX, 0).check(64, none, none).is_err());
    assert!(CacheSettings::full(0).check(64, none, none).is_err());
    assert!(CacheSettings { ring: 1, ..CacheSettings::full(8) }.check(64, none, none).is_err());
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

    /// Tokens at positions with gaps are folded like tokens without, sinks and the newest by their number.
    #[test]
    fn gaps_do_not_change_folds(
        (geometry, stride, settings, chunks) in cases(),
        gaps in prop::collection::vec(0u32..9, 700),
    ) {
        let mut with_gaps = Simulated::new(geometry, stride, settings);
        let mut without = Simulated::new(geometry, stride, settings);
        let mut next = 0;
        let places: Vec<u32> = gaps.iter().map(|gap| { next += gap + 1; next - 1 }).collect();
        for &rows in &chunks {
            let first = without.state.seen(0) as usize;
            with_gaps.run_at(&places[first..first + rows as usize]);
            without.run(rows);
        }
        prop_assert_eq!(&with_gaps.folds, &without.folds);
        for layer in 0..geometry.num_layers {
            let expected: Vec<u32> = without.kept(layer, 0).iter().map(|&token| places[token as usize]).collect();
            prop_assert_eq!(with_gaps.kept(layer, 0), expected);
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
        copy.state.begin(CacheSettings::full(1), None);
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
