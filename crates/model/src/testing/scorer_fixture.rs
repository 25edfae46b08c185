//! Three layers of a trained scorer, features and what PyTorch made of them.

use std::path::Path;

use locket_kernels::cpu::kv::KvRows;
use safetensors::SafeTensors;

use crate::kv_cache::{CacheGeometry, SideCar};

const BYTES: &[u8] = include_bytes!("../../tests/fixtures/scorer.safetensors");
const ROWS: usize = 20;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;

/// Weights, input and output.
pub(crate) struct Fixture {
    pub(crate) side_car: SideCar,
    /// `[rows, kv_heads, key | value, head_dim]`.
    pub(crate) features: Vec<f32>,
    /// `[layers, kv_heads, rows, 2]`.
    outputs: Vec<f32>,
    /// The features as rows of `[keys, values]`.
    qkv: Vec<f32>,
}

impl Fixture {
    pub(crate) fn read() -> Self {
        let geometry = CacheGeometry {
            num_layers: 3,
            num_heads: 9,
            num_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            max_position: 8192,
        };
        let side_car = SideCar::read(Path::new("scorer.safetensors"), BYTES, geometry).unwrap();
        let tensors = SafeTensors::deserialize(BYTES).unwrap();
        let numbers = |name: &str| -> Vec<f32> {
            let data = tensors.tensor(name).unwrap().data();
            data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        };
        let features = numbers("feats");
        let width = KV_HEADS * HEAD_DIM;
        let mut qkv = vec![0.0; ROWS * 2 * width];
        for (i, pair) in features.chunks(2 * HEAD_DIM).enumerate() {
            let (row, head) = (i / KV_HEADS, i % KV_HEADS);
            let at = row * 2 * width + head * HEAD_DIM;
            qkv[at..at + HEAD_DIM].copy_from_slice(&pair[..HEAD_DIM]);
            qkv[at + width..at + width + HEAD_DIM].copy_from_slice(&pair[HEAD_DIM..]);
        }
        Self { side_car, features, outputs: numbers("outputs"), qkv }
    }

    pub(crate) fn rows(&self) -> KvRows<'_> {
        let width = KV_HEADS * HEAD_DIM;
        KvRows { data: &self.qkv, stride: 2 * width, keys: 0, values: width }
    }

    pub(crate) fn expected(&self, layer: usize, row: usize, head: usize, output: usize) -> f32 {
        self.outputs[((layer * KV_HEADS + head) * ROWS + row) * 2 + output]
    }
}
