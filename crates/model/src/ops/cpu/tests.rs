//! The CPU backend against the reference backend, and against itself in other batches.

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use locket_kernels::cpu::Isa;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    Model, ModelConfig,
    config::{RopeConfig, RopeScaling},
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, SideArrays, SlotType},
    llama::{Layer, Llama, LlamaWeights},
    ops::{RawTensor, WeightRole, reference::ReferenceOps},
};

const VOCAB: usize = 75;
const MAX_ROWS: usize = 96;

/// How matrices are stored.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Dense(DType),
    Blocks(GgmlDType),
    /// Of both kinds, with and without a kernel.
    Mixed,
}

fn config(slot_type: SlotType) -> OpsConfig {
    let model = ModelConfig {
        architecture: "qwen3".into(),
        vocab_size: VOCAB,
        hidden_size: 256,
        intermediate_size: 512,
        num_layers: 3,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 128,
        max_position: 400,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            rotary_dim: 128,
            style: RopeStyle::HalfSplit,
            scaling: RopeScaling::Linear { factor: 2.0 },
        },
        tie_embeddings: true,
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        qk_norm: true,
        sliding_window: vec![None, Some(20), None],
        eos_token_ids: vec![],
        bos_token_id: None,
    };
    let classes = vec![BlockClass { capacity: 40, blocks: 3 }, BlockClass { capacity: 300, blocks: 3 }];
    let cache = CachePlan {
        geometry: CacheGeometry::of(&model),
        slot_type,
        side: SideArrays { columns: 3, per_layer: 8192, gaps: true },
        classes,
    };
    OpsConfig { model, cache, max_batch_rows: MAX_ROWS, threads: 3, side_car: None }
}

/// The same random weights for every backend.
struct Weights {
    rng: StdRng,
    stored: Stored,
}

impl Weights {
    fn tensor(&mut self, shape: &[usize], scale: f32) -> Tensor {
        let numbers: Vec<f32> =
            (0..shape.iter().product()).map(|_| self.rng.random_range(-1.0..1.0) * scale).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    fn matrix<O: Ops>(
        &mut self,
        ops: &mut O,
        rows: &[usize],
        cols: usize,
        bias: bool,
        role: WeightRole,
    ) -> O::Weight {
        let mixed = [GgmlDType::Q4K, GgmlDType::Q4_1, GgmlDType::Q8_0];
        let parts = rows
            .iter()
            .zip(mixed)
            .map(|(&rows, mixed)| {
                let dense = self.tensor(&[rows, cols], 2.0 / (cols as f32).sqrt());
                let quantized =
                    |dtype| RawTensor::Quantized(QTensor::quantize(&dense, dtype).unwrap().into());
                match self.stored {
                    Stored::Dense(dtype) => RawTensor::Dense(dense.to_dtype(dtype).unwrap()),
                    Stored::Blocks(dtype) => quantized(dtype),
                    Stored::Mixed => quantized(mixed),
                }
            })
            .collect();
        let bias = bias.then(|| self.tensor(&[rows.iter().sum()], 0.1));
        ops.prepare(WeightSpec { parts, bias, role }).unwrap()
    }

    fn norm<O: Ops>(&mut self, ops: &mut O, width: usize) -> O::Weight {
        let weight = (self.tensor(&[width], 0.3) + 1.0).unwrap();
        let parts = vec![RawTensor::Dense(weight)];
        ops.prepare(WeightSpec { parts, bias: None, role: WeightRole::Norm }).unwrap()
    }
}

fn build<O: Ops>(mut ops: O, stored: Stored) -> Llama<O> {
    let mut from = Weights { rng: StdRng::seed_from_u64(7), stored };
    let model = ops.config().model.clone();
    let (hidden, q, kv, mlp) = (model.hidden_size, model.q_dim(), model.kv_dim(), model.intermediate_size);
    let linear = WeightRole::Linear;
    let layers = (0..model.num_layers)
        .map(|_| Layer {
            attn_norm: from.norm(&mut ops, hidden),
            qkv: from.matrix(&mut ops, &[q, kv, kv], hidden, true, linear),
            qk_norm: Some((from.norm(&mut ops, model.head_dim), from.norm(&mut ops, model.head_dim))),
            output: from.matrix(&mut ops, &[hidden], q, false, linear),
            mlp_norm: from.norm(&mut ops, hidden),
            gate_up: from.matrix(&mut ops, &[mlp, mlp], hidden, false, linear),
            down: from.matrix(&mut ops, &[hidden], mlp, false, linear),
        })
        .collect();
    let embedding = from.matrix(&mut ops, &[VOCAB], hidden, false, WeightRole::TiedEmbedding);
    let norm = from.norm(&mut ops, hidden);
    Llama::new(ops, LlamaWeights { embedding, layers, norm, head: None })
}

fn cpu(stored: Stored, slot_type: SlotType) -> Llama<CpuOps> {
    build(CpuOps::new(config(slot_type)).unwrap(), stored)
}

fn tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..VOCAB as u32)).collect()
}

/// Logits of every row of a sequence that is run alone in chunks of `chunk`.
fn run(model: &mut impl Model, settings: CacheSettings, ids: &[u32], chunk: usize) -> Vec<f32> {
    let block = BlockId(if settings.capacity() > 40 { 4 } else { 1 });
    model.open_block(block, settings).unwrap();
    let (mut all, mut logits, mut batch) = (Vec::new(), Vec::new(), Batch::default());
    for (i, ids) in ids.chunks(chunk).enumerate() {
        batch.clear();
        batch.push(block, (i * chunk) as u32, ids, false);
        batch.sample_rows.extend(0..ids.len() as u32);
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    }
    model.close_block(block);
    all
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn window() -> CacheSettings {
    CacheSettings { sinks: 3, recent: 0, ..CacheSettings::of(CacheMethod::Window, 24, 12) }
}

/// Largest difference as a share of the largest logit.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

const ALL: [(Stored, f32); 8] = [
    (Stored::Dense(DType::F32), 1e-4),
    (Stored::Dense(DType::F16), 1e-4),
    (Stored::Dense(DType::BF16), 1e-4),
    // What 16-bit activations cost.
    (Stored::Blocks(GgmlDType::Q4_0), 5e-4),
    (Stored::Blocks(GgmlDType::Q4_1), 5e-4),
    (Stored::Blocks(GgmlDType::Q8_0), 5e-4),
    // The tensor library's own products round activations to eight bits.
    (Stored::Blocks(GgmlDType::Q6K), 0.05),
    (Stored::Mixed, 0.05),
];

/// With f32 slots dense weights differ by rounding alone, also across folds.
#[test]
fn agrees_with_the_reference_backend() {
    let ids = tokens(1, 90);
    for (stored, tolerance) in ALL {
        let mut ours = cpu(stored, SlotType::F32);
        let mut oracle = build(ReferenceOps::new(config(SlotType::F32), Device::Cpu).unwrap(), stored);
        for settings in [CacheSettings::full(100), window()] {
            let (a, b) = (run(&mut ours, settings, &ids, 90), run(&mut oracle, settings, &ids, 90));
            let difference = difference(&b, &a);
            assert!(difference <= tolerance, "{stored:?}, {:?}: {difference}", settings.method);
        }
    }
}

#[test]
fn chunked_is_whole_on_every_isa_and_thread_count() {
    let ids = tokens(2, 90);
    for slot_type in [SlotType::F16, SlotType::Bf16] {
        for stored in [Stored::Blocks(GgmlDType::Q4_1), Stored::Dense(DType::BF16), Stored::Mixed] {
            let mut model = cpu(stored, slot_type);
            for settings in [CacheSettings::full(90), window()] {
                let whole = bits(&run(&mut model, settings, &ids, 90));
                for chunk in [1, 16, 33] {
                    assert_eq!(whole, bits(&run(&mut model, settings, &ids, chunk)), "{stored:?} {chunk}");
                }
                for isa in Isa::available() {
                    let ops = CpuOps::with_isa(OpsConfig { threads: 1, ..config(slot_type) }, isa).unwrap();
                    let mut other = build(ops, stored);
                    assert_eq!(
                        whole,
                        bits(&run(&mut other, settings, &ids, 90)),
                        "{stored:?} {}",
                        isa.name()
                    );
                }
            }
        }
    }
}

/// Three sequences of different methods and lengths share every step.
#[test]
fn alone_is_batched() {
    let sequences = [
        (BlockId(4), CacheSettings::full(200), tokens(3, 70), 7),
        (BlockId(0), window(), tokens(4, 95), 20),
        (BlockId(2), CacheSettings::full(40), tokens(5, 40), 1),
    ];
    for stored in [Stored::Blocks(GgmlDType::Q4_1), Stored::Mixed] {
        let mut model = cpu(stored, SlotType::F16);
        let mut together = [const { Vec::new() }; 3];
        for (block, settings, ..) in &sequences {
            model.open_block(*block, *settings).unwrap();
        }
        let (mut done, mut logits) = ([0; 3], Vec::new());
        while (0..3).any(|i| done[i] < sequences[i].2.len()) {
            let (mut batch, mut owners) = (Batch::default(), Vec::new());
            for (i, (block, _, ids, chunk)) in sequences.iter().enumerate() {
                let end = ids.len().min(done[i] + chunk);
                if end > done[i] {
                    batch.push(*block, done[i] as u32, &ids[done[i]..end], false);
                    owners.extend(std::iter::repeat_n(i, end - done[i]));
                    done[i] = end;
                }
            }
            batch.sample_rows.extend(0..owners.len() as u32);
            model.forward(&batch, &mut logits).unwrap();
            for (owner, logits) in owners.iter().zip(logits.chunks_exact(VOCAB)) {
                together[*owner].extend_from_slice(logits);
            }
        }
        let mut alone = cpu(stored, SlotType::F16);
        for ((_, settings, ids, _), together) in sequences.iter().zip(together) {
            assert_eq!(bits(&run(&mut alone, *settings, ids, 96)), bits(&together));
        }
    }
}

#[test]
fn a_copied_block_goes_on_like_the_first() {
    let ids = tokens(6, 60);
    let mut model = cpu(Stored::Blocks(GgmlDType::Q8_0), SlotType::F16);
    let whole = run(&mut model, window(), &ids, 60);
    let (a, b) = (BlockId(0), BlockId(5));
    model.open_block(a, window()).unwrap();
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    batch.push(a, 0, &ids[..50], false);
    model.forward(&batch, &mut logits).unwrap();
    assert!(logits.is_empty(), "no sample rows, no logits");
    // Into a block of another stride that held something else.
    model.open_block(b, CacheSettings::full(100)).unwrap();
    batch.clear();
    batch.push(b, 0, &tokens(7, 80), true);
    model.forward(&batch, &mut logits).unwrap();
    model.copy_block(a, b).unwrap();
    model.close_block(a);
    batch.clear();
    batch.push(b, 50, &ids[50..], true);
    model.forward(&batch, &mut logits).unwrap();
    assert_eq!(bits(&logits), bits(&whole[59 * VOCAB..]));

    model.close_block(b);
    let memory = &model.ops_mut().cache.memory;
    assert!(memory.as_slice::<u16>().iter().all(|&x| x == 0), "closed blocks hold nothing");
}

#[test]
fn batches_that_contradict_the_cache_are_refused() {
    let mut model = cpu(Stored::Dense(DType::F32), SlotType::F16);
    let block = BlockId(0);
    let mut logits = Vec::new();
    let mut refused = |model: &mut Llama<CpuOps>, block: BlockId, position: u32, ids: &[u32]| {
        let mut batch = Batch::default();
        batch.push(block, position, ids, true);
        matches!(model.forward(&batch, &mut logits), Err(Error::InvalidBatch(_)))
    };
    assert!(refused(&mut model, block, 0, &[1]), "not open");
    assert!(refused(&mut model, BlockId(9), 0, &[1]), "no such block");
    assert!(model.open_block(block, CacheSettings::full(41)).is_err(), "smaller than the settings");
    model.open_block(block, CacheSettings::full(40)).unwrap();
    assert!(refused(&mut model, block, 0, &[]), "no rows");
    assert!(refused(&mut model, block, 0, &[VOCAB as u32]), "no such token");
    assert!(refused(&mut model, block, 0, &[1; 41]), "no room");
    assert!(refused(&mut model, block, 0, &[1; MAX_ROWS + 1]), "too many rows");
    let mut twice = Batch::default();
    twice.push(block, 0, &[1], true);
    twice.push(block, 1, &[1], true);
    assert!(model.forward(&twice, &mut Vec::new()).is_err());
    assert!(!refused(&mut model, block, 0, &[1; 40]), "a full block is fine");
    assert!(refused(&mut model, block, 40, &[1]), "and then no room");
}

#[test]
fn memory_is_what_was_planned() {
    let model = cpu(Stored::Blocks(GgmlDType::Q4_1), SlotType::F16);
    let planned = model.cache_plan().total_bytes();
    let held = model.memory();
    // Positions are not padded to 16 slots, keys and values are.
    assert!(held.cache <= planned && planned - held.cache < planned / 100, "{} {planned}", held.cache);
    let OpsConfig { model: geometry, .. } = config(SlotType::F16);
    assert_eq!(Some(held.workspace as usize), workspace_bytes(&geometry, MAX_ROWS, 3, 0));
    assert!(held.weights > 0);
}

#[test]
fn registers_lost_in_a_panic_come_back() {
    let ids = tokens(8, 30);
    let expected = run(&mut cpu(Stored::Mixed, SlotType::F16), window(), &ids, 7);
    let mut model = cpu(Stored::Mixed, SlotType::F16);
    let ops = model.ops_mut();
    let parts = vec![RawTensor::Dense(Tensor::ones(256, DType::F32, &Device::Cpu).unwrap())];
    let norm = ops.prepare(WeightSpec { parts, bias: None, role: WeightRole::Norm }).unwrap();
    let too_many = CpuStep { rows: MAX_ROWS + 1, samples: 0 };
    let step = std::panic::AssertUnwindSafe(|| ops.add_rms_norm(&too_many, &norm, Reg::H, Reg::X, Reg::X));
    assert!(std::panic::catch_unwind(step).is_err());
    assert!(model.ops_mut().registers[Reg::X as usize].data.is_empty(), "the panic came in between");
    assert_eq!(bits(&run(&mut model, window(), &ids, 7)), bits(&expected));
}
