//! Attention against a slow f64 softmax, on every instruction set of this machine.

use half::{bf16, f16};
use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{Attention, AttentionJob, AttentionRows, AttentionShape, SlotPositions, Window},
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

struct Positions {
    numbers: Vec<u32>,
    stride: usize,
}

impl SlotPositions for Positions {
    fn slot_positions(&self, _: usize) -> (&[u32], usize) {
        (&self.numbers, self.stride)
    }
}

/// One sequence: rows `[queries | keys | values]`.
struct Case {
    shape: AttentionShape,
    rows: Vec<f32>,
    stride: usize,
    count: usize,
    window: Option<u32>,
}

impl Case {
    fn new(seed: u64, shape: AttentionShape, count: usize, window: Option<u32>) -> Self {
        let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let mut rng = StdRng::seed_from_u64(seed);
        let rows = (0..count * stride).map(|_| rng.random_range(-2.0..2.0)).collect();
        Self { shape, rows, stride, count, window }
    }

    fn q_dim(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn kv_dim(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    fn stored(&self, x: f32) -> f64 {
        match self.shape.number {
            SlotNumber::F32 => x.into(),
            SlotNumber::F16 => f16::from_f32(x).to_f64(),
            SlotNumber::Bf16 => bf16::from_f32(x).to_f64(),
        }
    }

    /// Appends and attends the rows in chunks of `chunk`.
    fn run(&self, team: &mut Team, isa: Isa, chunk: usize) -> Vec<f32> {
        let layout = KvLayout::new(self.shape.kv_heads, self.shape.head_dim, self.count);
        // Not at the start of the memory, and not the only layer.
        let place = KvPlace { layout, base: layout.layer_len() };
        let mut memory = AlignedBuf::zeroed(3 * layout.layer_len() * self.shape.number.bytes());
        let mut attention = Attention::new(self.shape, team.num_threads());
        let mut out = vec![0.0; self.count * self.q_dim()];
        let positions: Vec<u32> = (100..).take(self.count).collect();
        let slot_positions: Vec<u32> = (0..self.shape.kv_heads).flat_map(|_| positions.clone()).collect();
        let slots = Positions { numbers: slot_positions, stride: self.count };
        let new = KvRows {
            data: &self.rows,
            stride: self.stride,
            keys: self.q_dim(),
            values: self.q_dim() + self.kv_dim(),
        };
        for start in (0..self.count).step_by(chunk) {
            let rows = chunk.min(self.count - start);
            kv::append(isa, self.shape.number, &mut memory, place, start, start..start + rows, new);
            let job = AttentionJob { place, first_row: start, rows, slots_before: start, id: 0 };
            let rows = AttentionRows { queries: &self.rows, query_stride: self.stride, out: &mut out };
            let window = self.window.map(|size| Window { size, row_positions: &positions, slots: &slots });
            attention.run(team, isa, &memory, &[job], rows, window);
        }
        out
    }

    /// Softmax attention of one row and head in f64, and the largest value's magnitude.
    fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let kv_head = head / (self.shape.heads / self.shape.kv_heads);
        let first = self.window.map_or(0, |size| (row + 1).saturating_sub(size as usize));
        let query = &self.rows[row * self.stride + head * dim..][..dim];
        let key_at = self.q_dim() + kv_head * dim;
        let scores: Vec<f64> = (first..=row)
            .map(|slot| {
                let key = &self.rows[slot * self.stride + key_at..][..dim];
                let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * self.stored(*k)).sum();
                dot * f64::from(self.shape.scale)
            })
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        let mut out = vec![0.0; dim];
        for (slot, score) in (first..=row).zip(scores) {
            let value = &self.rows[slot * self.stride + key_at + self.kv_dim()..][..dim];
            for (out, value) in out.iter_mut().zip(value) {
                *out += (score - top).exp() / sum * self.stored(*value);
            }
        }
        out
    }
}

fn shape() -> impl Strategy<Value = AttentionShape> {
    let numbers = vec![SlotNumber::F32, SlotNumber::F16, SlotNumber::Bf16];
    (1usize..4, 1usize..8, prop::sample::select(vec![8, 16, 24, 64, 96, 128]), prop::sample::select(numbers))
        .prop_map(|(kv_heads, group, head_dim, number)| AttentionShape {
            heads: kv_heads * group,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            number,
        })
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Error bound: 1e-5 (values are within ±2).
    #[test]
    fn attention_is_close_to_f64(
        seed: u64, shape in shape(), count in 1usize..330, window in prop::option::of(1u32..200),
    ) {
        let case = Case::new(seed, shape, count, window);
        let out = case.run(&mut Team::new(2).unwrap(), Isa::best(), 64);
        for row in [0, count / 3, count / 2, count - 1] {
            for head in 0..shape.heads {
                let at = row * case.q_dim() + head * shape.head_dim;
                for (got, want) in out[at..at + shape.head_dim].iter().zip(case.exact(row, head)) {
                    prop_assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
                }
            }
        }
    }

    /// Chunks, threads and instruction sets do not show in the bits.
    #[test]
    fn chunked_is_whole(
        seed: u64, shape in shape(), count in 1usize..300, chunk in 1usize..80,
        window in prop::option::of(1u32..200),
    ) {
        let case = Case::new(seed, shape, count, window);
        let whole = case.run(&mut Team::new(1).unwrap(), Isa::best(), count);
        let mut team = Team::new(3).unwrap();
        prop_assert_eq!(bits(&whole), bits(&case.run(&mut team, Isa::best(), chunk)));
        for isa in Isa::available() {
            prop_assert_eq!(bits(&whole), bits(&case.run(&mut team, isa, count)), "{}", isa.name());
        }
    }
}

/// Long enough for several splits of a decode row, one row at a time from a filled cache.
#[test]
fn split_decode_is_whole() {
    for heads in [9, 3] {
        let shape =
            AttentionShape { heads, kv_heads: 3, head_dim: 64, scale: 0.125, number: SlotNumber::F16 };
        let case = Case::new(5, shape, 900, None);
        let whole = case.run(&mut Team::new(1).unwrap(), Isa::best(), 900);
        for threads in [2, 4] {
            let decoded = case.run(&mut Team::new(threads).unwrap(), Isa::best(), 1);
            assert_eq!(bits(&whole), bits(&decoded));
        }
    }
}

#[test]
fn slots_can_be_moved_copied_and_cleared() {
    let number = SlotNumber::F16;
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 24, scale: 0.2, number };
    let case = Case::new(9, shape, 70, None);
    let small = KvLayout::new(2, 24, 70);
    let large = KvLayout::new(2, 24, 200);
    let (a, b) = (KvPlace { layout: small, base: 0 }, KvPlace { layout: large, base: small.layer_len() });
    let mut memory = AlignedBuf::zeroed((small.layer_len() + large.layer_len()) * number.bytes());
    let new = KvRows { data: &case.rows, stride: case.stride, keys: 48, values: 96 };
    kv::append(Isa::best(), number, &mut memory, a, 0, 0..70, new);
    kv::copy_layer(number, &mut memory, a, b, 70);
    let attend = |memory: &AlignedBuf, place: KvPlace, slots: usize| {
        let mut out = vec![0.0; 70 * 48];
        let job = AttentionJob { place, first_row: 0, rows: 1, slots_before: slots - 1, id: 0 };
        let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
        Attention::new(shape, 1).run(&mut Team::new(1).unwrap(), Isa::best(), memory, &[job], rows, None);
        out[..48].to_vec()
    };
    assert_eq!(attend(&memory, a, 70), attend(&memory, b, 70));

    // Slots 0..69 without 17, the last one in its place, are rows 0..69 in that order.
    for head in 0..2 {
        kv::move_slot(number, &mut memory, a, head, 69, 17);
    }
    for (slot, row) in (0..69).map(|slot| (slot, if slot == 17 { 69 } else { slot })) {
        kv::append(Isa::best(), number, &mut memory, b, slot, row..row + 1, new);
    }
    assert_eq!(attend(&memory, a, 69), attend(&memory, b, 69));

    kv::clear_slots(number, &mut memory, a, 70);
    kv::clear_slots(number, &mut memory, b, 70);
    assert!(memory.as_slice::<u8>().iter().all(|&byte| byte == 0));
}

#[test]
fn large_values_saturate_as_halves() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 8, scale: 1.0, number: SlotNumber::F16 };
    let mut case = Case::new(1, shape, 2, None);
    case.rows[24 + 16..].fill(1e9);
    let out = case.run(&mut Team::new(1).unwrap(), Isa::best(), 2);
    assert!(out[..8].iter().all(|x| x.is_finite()), "row 0 does not see row 1");
    assert!(out[8..].iter().all(|x| x.is_finite()));
}

#[test]
fn jobs_that_could_touch_others_memory_are_refused() {
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 16, scale: 0.25, number: SlotNumber::F32 };
    let case = Case::new(3, shape, 6, None);
    let layout = KvLayout::new(2, 16, 6);
    let memory = AlignedBuf::zeroed(layout.layer_len() * shape.number.bytes());
    let job = |first_row: usize, rows: usize| {
        let place = KvPlace { layout, base: 0 };
        AttentionJob { place, first_row, rows, slots_before: 0, id: 0 }
    };
    let runs = |jobs: &[AttentionJob]| {
        let run = || {
            let mut out = vec![0.0; 6 * 32];
            let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
            let team = &mut Team::new(1).unwrap();
            Attention::new(shape, 1).run(team, Isa::best(), &memory, jobs, rows, None);
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok()
    };
    assert!(runs(&[job(0, 2), job(2, 4)]));
    assert!(!runs(&[job(0, 3), job(2, 4)]), "overlapping rows");
    assert!(!runs(&[job(2, 4), job(0, 2)]), "descending rows");
    assert!(!runs(&[job(0, 0)]), "no rows");
    assert!(!runs(&[job(0, 7)]), "more rows than there are");
    assert!(!runs(&[job(usize::MAX, 2)]), "a sum that wraps");
    for layout in [KvLayout::new(1, 16, 6), KvLayout::new(2, 8, 6)] {
        let place = KvPlace { layout, base: 0 };
        assert!(!runs(&[AttentionJob { place, ..job(0, 2) }]), "a layer of another shape");
    }
    let place = KvPlace { layout, base: usize::MAX };
    assert!(!runs(&[AttentionJob { place, ..job(0, 2) }]), "a layer beyond the memory");
    assert!(!runs(&[AttentionJob { slots_before: usize::MAX, ..job(0, 2) }]), "slots beyond the layer");
}
