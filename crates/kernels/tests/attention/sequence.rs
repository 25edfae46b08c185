//! One sequence of random rows, its attention by the kernels and in f64.

use half::{bf16, f16};
use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{
        Attention, AttentionJob, AttentionRows, AttentionShape, Received, ReceivedMode, ReceivedRows,
        SlotPositions, Window,
    },
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

pub struct Positions {
    pub numbers: Vec<u32>,
    pub stride: usize,
}

impl SlotPositions for Positions {
    fn slot_positions(&self, _: usize) -> (&[u32], usize) {
        (&self.numbers, self.stride)
    }
}

/// One sequence: rows `[queries | keys | values]`.
pub struct Case {
    pub shape: AttentionShape,
    pub rows: Vec<f32>,
    pub stride: usize,
    pub count: usize,
    pub window: Option<u32>,
}

impl Case {
    pub fn new(seed: u64, shape: AttentionShape, count: usize, window: Option<u32>) -> Self {
        let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let mut rng = StdRng::seed_from_u64(seed);
        let rows = (0..count * stride).map(|_| rng.random_range(-2.0..2.0)).collect();
        Self { shape, rows, stride, count, window }
    }

    pub fn q_dim(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    pub fn kv_dim(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Appends and attends the rows in chunks of `chunk`.
    pub fn run(&self, team: &mut Team, isa: Isa, chunk: usize) -> Outcome {
        self.run_received(team, isa, chunk, None)
    }

    /// [`Self::run`], gathering the attention that slots receive.
    pub fn run_received(
        &self,
        team: &mut Team,
        isa: Isa,
        chunk: usize,
        mode: Option<ReceivedMode>,
    ) -> Outcome {
        let kv_heads = self.shape.kv_heads;
        let layout = KvLayout::of(self.shape.number, kv_heads, self.shape.head_dim, self.count);
        // Not at the start of the memory, and not the only layer.
        let place = KvPlace { layout, base: layout.layer_len() };
        let mut memory = AlignedBuf::zeroed(3 * layout.layer_len() * self.shape.number.bytes());
        let mut attention = Attention::new(self.shape, team.num_threads());
        let mut out = vec![0.0; self.count * self.q_dim()];
        let mut sums = vec![0.0; 5 + kv_heads * (self.count + 3)];
        let positions: Vec<u32> = (100..).take(self.count).collect();
        let slot_positions: Vec<u32> = (0..kv_heads).flat_map(|_| positions.clone()).collect();
        let slots = Positions { numbers: slot_positions, stride: self.count };
        let request = mode.map(|mode| Received { mode, at: 5, stride: self.count + 3 });
        for start in (0..self.count).step_by(chunk) {
            let rows = chunk.min(self.count - start);
            let new = self.new_rows();
            kv::append(isa, self.shape.number, &mut memory, place, start, start..start + rows, new);
            let job = AttentionJob { place, first_row: start, rows, slots_before: start, id: 0 };
            let rows = AttentionRows { queries: &self.rows, query_stride: self.stride, out: &mut out };
            let window = self.window.map(|size| Window { size, row_positions: &positions, slots: &slots });
            if request.is_some() {
                let rows = ReceivedRows { rows, jobs: &[request], sums: &mut sums };
                attention.run_received(team, isa, &memory, &[job], rows, window);
            } else {
                attention.run(team, isa, &memory, &[job], rows, window);
            }
        }
        assert!(sums[..5].iter().all(|&sum| sum == 0.0), "outside of the array");
        let sums = sums[5..].chunks(self.count + 3).flat_map(|head| {
            assert!(head[self.count..].iter().all(|&sum| sum == 0.0), "slots that are not filled");
            head[..self.count].iter().copied()
        });
        Outcome { out, received: sums.collect() }
    }

    pub fn new_rows(&self) -> KvRows<'_> {
        let keys = self.q_dim();
        KvRows { data: &self.rows, stride: self.stride, keys, values: keys + self.kv_dim() }
    }

    /// Softmax weights of one row and head over the slots `0..=row` in f64.
    pub fn exact_weights(&self, row: usize, head: usize) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let kv_head = head / (self.shape.heads / self.shape.kv_heads);
        let first = self.window.map_or(0, |size| (row + 1).saturating_sub(size as usize));
        let query = &self.rows[row * self.stride + head * dim..][..dim];
        let scores: Vec<f64> = (0..=row)
            .map(|slot| {
                let key = self.stored(slot, self.q_dim() + kv_head * dim);
                let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
                if slot < first { f64::NEG_INFINITY } else { dot * f64::from(self.shape.scale) }
            })
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        scores.iter().map(|score| (score - top).exp() / sum).collect()
    }

    /// Softmax attention of one row and head in f64.
    pub fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let kv_head = head / (self.shape.heads / self.shape.kv_heads);
        let mut out = vec![0.0; dim];
        for (slot, weight) in self.exact_weights(row, head).into_iter().enumerate() {
            let value = self.stored(slot, self.q_dim() + self.kv_dim() + kv_head * dim);
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
        out
    }

    /// The key or value at `column` of a row as its slot has it.
    pub fn stored(&self, row: usize, column: usize) -> Vec<f64> {
        let numbers = self.rows[row * self.stride + column..][..self.shape.head_dim].iter();
        match self.shape.number {
            SlotNumber::F32 => numbers.map(|&x| x.into()).collect(),
            SlotNumber::F16 => numbers.map(|&x| f16::from_f32(x).to_f64()).collect(),
            SlotNumber::Bf16 => numbers.map(|&x| bf16::from_f32(x).to_f64()).collect(),
            SlotNumber::I8 => {
                let scale = numbers.clone().fold(0.0, |top: f32, x| top.max(x.abs())) / 127.0;
                numbers.map(|x| f64::from((x / scale).round_ties_even()) * f64::from(scale)).collect()
            }
        }
    }
}

/// What the kernels computed.
#[derive(Debug)]
pub struct Outcome {
    /// `[rows, heads * head_dim]`.
    pub out: Vec<f32>,
    /// `[kv_heads, slots]`.
    pub received: Vec<f32>,
}

impl Outcome {
    /// For comparisons that tell zeros apart.
    pub fn bits(&self) -> Vec<u32> {
        bits(&[&self.out[..], &self.received].concat())
    }
}

pub const NUMBERS: [SlotNumber; 4] = [SlotNumber::F32, SlotNumber::F16, SlotNumber::Bf16, SlotNumber::I8];

pub fn shape() -> impl Strategy<Value = AttentionShape> {
    (
        1usize..4,
        1usize..8,
        prop::sample::select(vec![8, 16, 24, 64, 96, 128]),
        prop::sample::select(NUMBERS.to_vec()),
    )
        .prop_map(|(kv_heads, group, head_dim, number)| AttentionShape {
            heads: kv_heads * group,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            number,
        })
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
