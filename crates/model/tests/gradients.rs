//! Gradients of the reference backend equal finite differences, in f64, for every weight and both
//! rotary styles: candle's fused operations would give none, silently.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{DType, Device, Tensor, Var};
use locket_model::{
    Batch, BlockId, Model, ModelConfig,
    config::{RopeConfig, RopeScaling, RopeStyle},
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    llama::{Layer, Llama, LlamaWeights},
    ops::{Ops, OpsConfig, RawTensor, WeightRole, WeightSpec, reference::ReferenceOps},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn config(style: RopeStyle) -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab_size: 11,
        hidden_size: 8,
        intermediate_size: 10,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 4,
        max_position: 32,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 100.0, rotary_dim: 4, style, scaling: RopeScaling::None },
        tie_embeddings: false,
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        qk_norm: true,
        sliding_window: vec![None, Some(3)],
        eos_token_ids: vec![],
        bos_token_id: None,
    }
}

/// A model of random variables, which are returned with their names.
struct Variables {
    random: StdRng,
    all: Vec<(String, Var)>,
}

impl Variables {
    fn make(&mut self, name: &str, shape: &[usize]) -> Tensor {
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| self.random.random_range(-0.8..0.8)).collect();
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap();
        self.all.push((name.into(), var.clone()));
        var.as_tensor().clone()
    }

    fn weight(
        &mut self,
        ops: &mut ReferenceOps,
        name: &str,
        parts: &[&[usize]],
        role: WeightRole,
    ) -> <ReferenceOps as Ops>::Weight {
        let bias = (role == WeightRole::Linear).then(|| {
            let rows: usize = parts.iter().map(|shape| shape[0]).sum();
            self.make(&format!("{name}.bias"), &[rows])
        });
        let parts = parts.iter().enumerate();
        let parts = parts.map(|(idx, shape)| RawTensor::Dense(self.make(&format!("{name}.{idx}"), shape)));
        let parts = parts.collect();
        ops.prepare(WeightSpec { parts, bias, role }).unwrap()
    }
}

/// The same weights in every call; with one block of 16 slots, or without a cache.
fn tiny(style: RopeStyle, cached: bool) -> (Llama<ReferenceOps>, Vec<(String, Var)>) {
    let model = config(style);
    let (hidden, inner, head) = (model.hidden_size, model.intermediate_size, model.head_dim);
    let (q, kv, vocab) = (model.q_dim(), model.kv_dim(), model.vocab_size);
    let classes = vec![BlockClass { capacity: 16, blocks: 1 }];
    let cache = CachePlan {
        geometry: CacheGeometry::of(&model),
        slot_type: SlotType::F32,
        side: SideArrays::default(),
        classes,
    };
    let num_layers = model.num_layers;
    let config = OpsConfig { model, cache, max_batch_rows: 64, threads: 1, side_car: None };
    let mut ops = if cached {
        ReferenceOps::with_dtype(config, Device::Cpu, DType::F64).unwrap()
    } else {
        ReferenceOps::without_cache(config, Device::Cpu, DType::F64)
    };
    let mut vars = Variables { random: StdRng::seed_from_u64(5), all: Vec::new() };
    let mut weight = |name: String, parts: &[&[usize]], role| vars.weight(&mut ops, &name, parts, role);
    let layers = (0..num_layers)
        .map(|l| Layer {
            attn_norm: weight(format!("{l}.attn_norm"), &[&[hidden]], WeightRole::Norm),
            qkv: weight(
                format!("{l}.qkv"),
                &[&[q, hidden], &[kv, hidden], &[kv, hidden]],
                WeightRole::Linear,
            ),
            qk_norm: Some((
                weight(format!("{l}.q_norm"), &[&[head]], WeightRole::Norm),
                weight(format!("{l}.k_norm"), &[&[head]], WeightRole::Norm),
            )),
            output: weight(format!("{l}.output"), &[&[hidden, q]], WeightRole::Linear),
            mlp_norm: weight(format!("{l}.mlp_norm"), &[&[hidden]], WeightRole::Norm),
            gate_up: weight(
                format!("{l}.gate_up"),
                &[&[inner, hidden], &[inner, hidden]],
                WeightRole::Linear,
            ),
            down: weight(format!("{l}.down"), &[&[hidden, inner]], WeightRole::Linear),
        })
        .collect();
    let weights = LlamaWeights {
        embedding: weight("embedding".into(), &[&[vocab, hidden]], WeightRole::Embedding),
        layers,
        norm: weight("norm".into(), &[&[hidden]], WeightRole::Norm),
        head: Some(weight("head".into(), &[&[vocab, hidden]], WeightRole::Head)),
    };
    (Llama::new(ops, weights), vars.all)
}

/// Two whole sequences; a fixed weighted sum of all logits' squares.
fn loss(model: &mut Llama<ReferenceOps>) -> Tensor {
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &[3, 1, 4, 1, 5, 9], true);
    batch.push(BlockId(0), 0, &[2, 7, 10], true);
    batch.sample_rows = (0..9).collect();
    let logits = model.forward_train(&batch).unwrap();
    let count = logits.elem_count();
    let weights: Vec<f64> = (0..count).map(|idx| ((idx * 37 + 11) % 17) as f64 / 17.0).collect();
    let weights = Tensor::from_vec(weights, logits.shape(), &Device::Cpu).unwrap();
    (logits.sqr().unwrap() * weights).unwrap().sum_all().unwrap()
}

fn value(loss: &Tensor) -> f64 {
    loss.to_scalar::<f64>().unwrap()
}

#[test]
fn gradients_equal_finite_differences() {
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let (mut model, vars) = tiny(style, false);
        let gradients = loss(&mut model).backward().unwrap();
        for (name, var) in &vars {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let original = var.as_tensor().copy().unwrap();
            let values = original.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let scale = gradient.iter().fold(1.0, |most: f64, g| most.max(g.abs()));
            for at in (0..values.len()).step_by(1 + values.len() / 7) {
                let step = 1e-5;
                let mut shifted = |by: f64| {
                    let mut values = values.clone();
                    values[at] += by;
                    var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                    value(&loss(&mut model))
                };
                let numeric = (shifted(step) - shifted(-step)) / (2.0 * step);
                let error = (numeric - gradient[at]).abs() / scale;
                assert!(error < 1e-7, "{style:?} {name}[{at}]: {} but numerically {numeric}", gradient[at]);
            }
            var.set(&original).unwrap();
        }
    }
}

/// Without a cache, sequences of a batch do not see each other.
#[test]
fn whole_sequences_do_not_see_each_other() {
    let (mut model, _) = tiny(RopeStyle::HalfSplit, false);
    let mut alone = Batch::default();
    alone.push(BlockId(0), 0, &[2, 7, 10], true);
    let mut together = Batch::default();
    together.push(BlockId(0), 0, &[3, 1, 4], false);
    together.push(BlockId(0), 0, &[2, 7, 10], true);
    let alone = model.forward_train(&alone).unwrap().to_vec2::<f64>().unwrap();
    let together = model.forward_train(&together).unwrap().to_vec2::<f64>().unwrap();
    assert_eq!(alone[0].len(), 11);
    for (a, b) in alone[0].iter().zip(&together[0]) {
        assert!(a.is_finite() && (a - b).abs() < 1e-12);
    }
}

/// Training and serving compute the same; f32 slots and logits are all that differs.
#[test]
fn whole_sequences_equal_cached_ones() {
    let ids = [3, 1, 4, 1, 5, 9, 2, 6];
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let mut batch = Batch::default();
        batch.push(BlockId(0), 0, &ids, false);
        batch.sample_rows = (0..8).collect();
        let whole = tiny(style, false).0.forward_train(&batch).unwrap();
        let whole = whole.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mut model = tiny(style, true).0;
        model.open_block(BlockId(0), CacheSettings::full(16)).unwrap();
        let (mut cached, mut logits) = (Vec::new(), Vec::new());
        for (position, id) in ids.iter().enumerate() {
            batch.clear();
            batch.push(BlockId(0), position as u32, &[*id], true);
            model.forward(&batch, &mut logits).unwrap();
            cached.extend_from_slice(&logits);
        }
        for (a, b) in whole.iter().zip(&cached) {
            assert!((a - f64::from(*b)).abs() < 1e-5, "{style:?}: {a} {b}");
        }
    }
}
