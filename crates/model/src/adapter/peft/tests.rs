//! Files as PEFT writes them, and such as it does not.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::*;
use crate::{
    Batch, BlockId, Extras, Model,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::{
        TinyLlama,
        gguf::{GgufFile, tiny_geometry},
    },
};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A pair of each of `linears` in every layer.
fn tensors(config: &ModelConfig, linears: &[Linear], rank: usize, seed: u64) -> Tensors {
    let mut random = StdRng::seed_from_u64(seed);
    let mut tensors = BTreeMap::new();
    for layer in 0..config.num_layers {
        for &linear in linears {
            let (outputs, inputs) = linear.shape(config);
            for (side, shape) in [("A", vec![rank, inputs]), ("B", vec![outputs, rank])] {
                let module = linear.module();
                let name = format!("base_model.model.model.layers.{layer}.{module}.lora_{side}.weight");
                let numbers = (0..shape[0] * shape[1]).map(|_| random.random_range(-0.3..0.3)).collect();
                tensors.insert(name, (shape, numbers));
            }
        }
    }
    tensors
}

fn bytes(tensors: &Tensors) -> Vec<u8> {
    let data: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, numbers))| {
            (name, shape, numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        ((*name).clone(), TensorView::new(Dtype::F32, (*shape).clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn settings() -> Value {
    json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
        "use_dora": false, "modules_to_save": null, "rank_pattern": {}, "init_lora_weights": true })
}

fn read(settings: &Value, tensors: &Tensors) -> Result<Adapter, Error> {
    Adapter::from_bytes(settings, &bytes(tensors), &tiny_geometry())
}

#[test]
fn scales_and_ranks_are_those_of_peft() {
    let config = tiny_geometry();
    let mut tensors = tensors(&config, &[Linear::Q, Linear::Down], 4, 1);
    let scale = |adapter: &Adapter, layer: usize, linear| {
        adapter.pairs().find(|pair| (pair.0, pair.1) == (layer, linear)).unwrap().2.scale
    };
    let adapter = read(&settings(), &tensors).unwrap();
    assert_eq!((adapter.pairs().count(), adapter.max_rank(), scale(&adapter, 1, Linear::Down)), (4, 4, 2.0));
    let mut by_root = settings();
    by_root["use_rslora"] = true.into();
    assert_eq!(scale(&read(&by_root, &tensors).unwrap(), 0, Linear::Q), 4.0);
    // One module of another rank and factor.
    let mut patterns = settings();
    patterns["rank_pattern"] = json!({ "layers.1.mlp.down_proj": 2 });
    patterns["alpha_pattern"] = json!({ "down_proj": 3 });
    let (outputs, inputs) = Linear::Down.shape(&config);
    let name = |side| format!("base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight");
    tensors.insert(name("A"), (vec![2, inputs], vec![0.1; 2 * inputs]));
    tensors.insert(name("B"), (vec![outputs, 2], vec![0.1; 2 * outputs]));
    let adapter = read(&patterns, &tensors).unwrap();
    assert_eq!(scale(&adapter, 1, Linear::Down), 1.5);
    assert_eq!((scale(&adapter, 0, Linear::Down), scale(&adapter, 0, Linear::Q)), (0.75, 2.0));
    assert!(read(&settings(), &tensors).unwrap_err().to_string().contains("says 4"), "no pattern, rank 2");
}

#[test]
fn names_of_llava_models_are_known() {
    let config = tiny_geometry();
    let plain = tensors(&config, &[Linear::K, Linear::Up], 4, 2);
    let expected = read(&settings(), &plain).unwrap();
    for prefix in ["language_model.model.layers", "model.language_model.layers"] {
        let renamed =
            plain.iter().map(|(name, tensor)| (name.replace("model.layers", prefix), tensor.clone()));
        assert_eq!(read(&settings(), &renamed.collect()).unwrap(), expected);
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let config = tiny_geometry();
    let good = tensors(&config, &[Linear::Q], 4, 3);
    let refused = |key: &str, value: Value| {
        let mut settings = settings();
        settings[key] = value;
        let error = read(&settings, &good).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    };
    refused("peft_type", "IA3".into());
    refused("use_dora", true.into());
    refused("bias", "lora_only".into());
    refused("modules_to_save", json!(["lm_head"]));
    refused("init_lora_weights", "pissa_niter_4".into());
    refused("layer_replication", json!([[0, 1]]));
    refused("rank_pattern", json!({ "^model.*": 3 }));
    refused("alpha_pattern", json!({ "q_proj": "x" }));
    refused("r", 0.into());
    refused("lora_alpha", Value::Null);
    let first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        read(&settings(), &tensors).unwrap_err().to_string()
    };
    let head = "base_model.model.lm_head.lora_A.weight";
    assert!(
        with(&|tensors| drop(tensors.insert(head.into(), (vec![4, 64], vec![0.0; 256])))).contains("lm_head")
    );
    assert!(with(&|tensors| drop(tensors.remove(first))).contains("missing"));
    assert!(
        with(&|tensors| drop(tensors.insert(first.into(), (vec![4, 8], vec![0.0; 32])))).contains("[4, 64]")
    );
    assert!(with(&|tensors| tensors.get_mut(first).unwrap().1[3] = f32::NAN).contains("finite"));
    let far = first.replace("layers.0", "layers.7");
    assert!(
        with(&|tensors| drop(tensors.insert(far.clone(), (vec![4, 64], vec![0.0; 256]))))
            .contains("2 layers")
    );
    assert!(with(&|tensors| tensors.clear()).contains("no tensors"));
    let broken = Adapter::from_bytes(&settings(), &[1, 2, 3], &config).unwrap_err();
    assert_eq!(broken.kind(), "broken_file");
    assert_eq!(Adapter::open(Path::new("/nowhere"), &config).unwrap_err().kind(), "io");
}

fn logits(model: &mut dyn Model, adapter: Option<crate::AdapterId>) -> Vec<f32> {
    let mut logits = Vec::new();
    model.open_block(BlockId(0), CacheSettings::full(32)).unwrap();
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &[3, 7, 1, 22, 8, 8, 39, 2], false);
    batch.set_adapter(adapter);
    batch.sample_rows = (0..8).collect();
    model.forward(&batch, &mut logits).unwrap();
    model.close_block(BlockId(0));
    logits
}

/// The rows of queries and keys are stored in another order in GGUF files: the same model, the same adapter,
/// the same logits. Tolerance: rounding in another order, 1e-4 of logits of about 3.
#[test]
fn a_gguf_models_row_order_is_followed() {
    let config = tiny_geometry();
    let folder = tempfile::tempdir().unwrap();
    let sizes = [("vocab_size", 40), ("hidden_size", 64), ("max_position_embeddings", 128)];
    let tiny = sizes
        .into_iter()
        .fold(TinyLlama { seed: 7, ..TinyLlama::default() }, |tiny, (key, size)| tiny.with(key, size));
    let tiny = tiny.with("eos_token_id", 2).with("bos_token_id", 0);
    tiny.write(folder.path()).unwrap();
    let mut file = GgufFile::tiny(candle_core::quantized::GgmlDType::F32);
    for layer in 0..2 {
        for name in ["attn_q", "attn_k"] {
            let entry = file.tensor(&format!("blk.{layer}.{name}.weight"));
            let numbers: Vec<f32> =
                entry.data.as_chunks().0.iter().map(|&single| f32::from_le_bytes(single)).collect();
            entry.data =
                interleave(&numbers, 16, 64).iter().flat_map(|number| number.to_le_bytes()).collect();
        }
    }
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let tensors = bytes(&tensors(&config, &Linear::ALL, 4, 4));
    let both: Vec<[Vec<f32>; 2]> = [folder.path(), &path]
        .map(|path| {
            let checkpoint = Checkpoint::open(path).unwrap();
            let cache = CachePlan {
                geometry: CacheGeometry::of(&checkpoint.config),
                slot_type: SlotType::F32,
                side: SideArrays::default(),
                classes: vec![BlockClass { capacity: 32, blocks: 1 }],
            };
            let options =
                BuildOptions { backend: Backend::Cpu, cache, max_batch_rows: 8, threads: 1, side_car: None };
            let mut model = checkpoint.build(&options).unwrap();
            model.reserve(&Extras { adapters: 1, max_rank: 4, held_rows: 0 }).unwrap();
            let adapter = Adapter::from_bytes(&settings(), &tensors, &checkpoint.config).unwrap();
            let id = model.load_adapter(&adapter).unwrap();
            [logits(model.as_mut(), None), logits(model.as_mut(), Some(id))]
        })
        .into();
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart(&both[0][0], &both[1][0]) < 1e-4, "{}", apart(&both[0][0], &both[1][0]));
    assert!(apart(&both[0][1], &both[1][1]) < 1e-4, "{}", apart(&both[0][1], &both[1][1]));
    assert!(apart(&both[0][0], &both[0][1]) > 0.1, "the adapter does something");
}
