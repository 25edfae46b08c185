//! Adapters: equal to merged weights, the same bits in any company, and nothing to those who have none.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{collections::BTreeMap, path::Path};

use locket_model::{
    Adapter, AdapterId, Batch, BlockId, Extras, Model, ModelConfig,
    adapter::{Linear, LoraPair, LoraType},
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::TinyLlama,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const VOCAB: usize = 320;
const EXTRAS: Extras = Extras { adapters: 2, max_rank: 8, held_rows: 0 };

fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().with("num_hidden_layers", 3).write(folder.path()).unwrap();
    folder
}

fn build(folder: &Path, backend: Backend) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let cache = CachePlan {
        geometry,
        slot_type: SlotType::F16,
        side: SideArrays::of(&[CacheMethod::Observed], geometry, None),
        classes: vec![BlockClass { capacity: 160, blocks: 8 }],
    };
    let options = BuildOptions { backend, cache, max_batch_rows: 256, threads: 2, side_car: None };
    let mut model = checkpoint.build(&options).unwrap();
    model.reserve(&EXTRAS).unwrap();
    model
}

/// Pairs of some linears, of different ranks and factors.
fn pairs(config: &ModelConfig, seed: u64) -> Vec<(usize, Linear, LoraPair)> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut pairs = Vec::new();
    for layer in 0..config.num_layers {
        for linear in Linear::ALL {
            if random.random_bool(0.25) {
                continue;
            }
            let ((outputs, inputs), rank) = (linear.shape(config), random.random_range(1..=8));
            let mut numbers = |count: usize| (0..count).map(|_| random.random_range(-0.2f32..0.2)).collect();
            let (a, b) = (numbers(rank * inputs), numbers(outputs * rank));
            pairs.push((layer, linear, LoraPair { a, b, rank, scale: 1.3, stored: LoraType::F32 }));
        }
    }
    pairs
}

/// The same model with `W + scale * B A` for weights, computed in f64.
fn merged(folder: &Path, pairs: &[(usize, Linear, LoraPair)]) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), out.path().join(entry.file_name())).unwrap();
    }
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let modules =
        ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"];
    let mut changed = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let mut numbers: Vec<f32> =
            view.data().as_chunks().0.iter().map(|&single| f32::from_le_bytes(single)).collect();
        for (layer, linear, pair) in pairs {
            if name == format!("model.layers.{layer}.{}_proj.weight", modules[*linear as usize]) {
                let inputs = view.shape()[1];
                for (at, number) in numbers.iter_mut().enumerate() {
                    let (row, column) = (at / inputs, at % inputs);
                    let products = (0..pair.rank).map(|r| {
                        f64::from(pair.b[row * pair.rank + r]) * f64::from(pair.a[r * inputs + column])
                    });
                    *number = (f64::from(*number) + f64::from(pair.scale) * products.sum::<f64>()) as f32;
                }
            }
        }
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        changed.insert(name.to_owned(), (view.shape().to_vec(), bytes));
    }
    let views = changed.iter().map(|(name, (shape, bytes))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &out.path().join("model.safetensors")).unwrap();
    out
}

fn ids(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 31 + seed * 77) % VOCAB as u32).collect()
}

fn run(
    model: &mut dyn Model,
    block: BlockId,
    adapter: Option<AdapterId>,
    ids: &[u32],
    chunks: &[usize],
) -> Vec<f32> {
    let settings = CacheSettings { sinks: 4, recent: 12, ..CacheSettings::of(CacheMethod::Observed, 48, 20) };
    model.open_block(block, settings).unwrap();
    let (mut all, mut logits, mut done) = (Vec::new(), Vec::new(), 0);
    for &chunk in chunks.iter().cycle() {
        if done == ids.len() {
            break;
        }
        let rows = chunk.min(ids.len() - done);
        let mut batch = Batch::default();
        batch.push(block, done as u32, &ids[done..done + rows], false);
        batch.set_adapter(adapter);
        batch.sample_rows = (0..rows as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
        done += rows;
    }
    model.close_block(block);
    all
}

fn most_apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits are about 4; slots are halves, so a difference in the last bit may become a step of these.
#[test]
fn an_adapter_is_the_merged_weights() {
    let folder = tiny();
    let ids = ids(1, 120);
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(folder.path(), backend);
        let pairs = pairs(model.config(), 3);
        let mut other = build(merged(folder.path(), &pairs).path(), backend);
        let id = model.load_adapter(&Adapter::new(&model.config().clone(), pairs).unwrap()).unwrap();
        let base = run(model.as_mut(), BlockId(0), None, &ids, &[64]);
        let got = run(model.as_mut(), BlockId(0), Some(id), &ids, &[64]);
        let expected = run(other.as_mut(), BlockId(0), None, &ids, &[64]);
        assert!(most_apart(&got, &expected) < 5e-3, "{backend:?}: {}", most_apart(&got, &expected));
        assert!(most_apart(&got, &base) > 0.5, "it does something");
    }
}

#[test]
fn chunks_do_not_matter() {
    let folder = tiny();
    let ids = ids(2, 130);
    let mut model = build(folder.path(), Backend::Cpu);
    let adapter = Adapter::new(&model.config().clone(), pairs(model.config(), 4)).unwrap();
    let id = model.load_adapter(&adapter).unwrap();
    let whole = run(model.as_mut(), BlockId(0), Some(id), &ids, &[130]);
    for chunks in [&[1][..], &[16], &[7, 50]] {
        assert!(run(model.as_mut(), BlockId(0), Some(id), &ids, chunks) == whole, "{chunks:?}");
    }
}

/// Two adapters and none in every step, interleaved; each sequence as alone, those without as in a model that
/// has never heard of adapters.
#[test]
fn adapters_mix_in_one_batch_and_leave_others_alone() {
    let folder = tiny();
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut plain = build(folder.path(), backend);
        let mut model = build(folder.path(), backend);
        let config = model.config().clone();
        let loaded: Vec<AdapterId> = (0..2)
            .map(|seed| {
                model.load_adapter(&Adapter::new(&config, pairs(&config, 10 + seed)).unwrap()).unwrap()
            })
            .collect();
        let adapter = |i: usize| [None, Some(loaded[0]), Some(loaded[1])][i % 3];
        let texts: Vec<Vec<u32>> = (0..6).map(|i| ids(i, 40 + 13 * i as usize)).collect();
        let settings =
            CacheSettings { sinks: 4, recent: 12, ..CacheSettings::of(CacheMethod::Observed, 48, 20) };
        (0..6).for_each(|i| model.open_block(BlockId(i), settings).unwrap());
        let mut got = vec![Vec::new(); 6];
        let (mut done, mut logits, mut step) = ([0; 6], Vec::new(), 0);
        while done.iter().zip(&texts).any(|(done, text)| *done < text.len()) {
            let (mut batch, mut owners) = (Batch::default(), Vec::new());
            for i in 0..6 {
                let rows = [1, 9, 4][(i + step) % 3].min(texts[i].len() - done[i]);
                if rows > 0 {
                    batch.push(BlockId(i as u32), done[i] as u32, &texts[i][done[i]..done[i] + rows], false);
                    batch.set_adapter(adapter(i));
                    owners.extend(std::iter::repeat_n(i, rows));
                    done[i] += rows;
                }
            }
            step += 1;
            batch.sample_rows = (0..owners.len() as u32).collect();
            model.forward(&batch, &mut logits).unwrap();
            logits.chunks(VOCAB).zip(&owners).for_each(|(row, &i)| got[i].extend_from_slice(row));
        }
        for i in 0..6 {
            let alone = |model: &mut dyn Model| run(model, BlockId(i as u32), adapter(i), &texts[i], &[64]);
            let expected = if i % 3 == 0 { alone(plain.as_mut()) } else { alone(model.as_mut()) };
            match backend {
                Backend::Cpu => assert!(got[i] == expected, "sequence {i}"),
                _ => assert!(most_apart(&got[i], &expected) < 5e-3, "sequence {i}"),
            }
        }
    }
}

#[test]
fn adapters_come_and_go_within_bounds() {
    let folder = tiny();
    let mut model = build(folder.path(), Backend::Cpu);
    let config = model.config().clone();
    let adapter = Adapter::new(&config, pairs(&config, 20)).unwrap();
    let (before, text) = (model.memory(), ids(3, 30));
    let first = model.load_adapter(&adapter).unwrap();
    let expected = run(model.as_mut(), BlockId(0), Some(first), &text, &[30]);
    let second = model.load_adapter(&adapter).unwrap();
    assert!(model.load_adapter(&adapter).unwrap_err().to_string().contains("as many as there is room for"));
    let held = model.memory().weights - before.weights;
    let planned = EXTRAS.planned_bytes(&config, 256);
    assert!(held > 0 && held + 4 * 256 * (96 + 8 + 128) <= planned, "{held} {planned}");
    model.unload_adapter(first).unwrap();
    assert!(model.unload_adapter(first).is_err());
    let third = model.load_adapter(&adapter).unwrap();
    assert!(third > second, "numbers are not given twice");
    assert!(run(model.as_mut(), BlockId(0), Some(third), &text, &[30]) == expected);
    model.unload_adapter(second).unwrap();
    model.unload_adapter(third).unwrap();
    assert_eq!(model.memory().weights, before.weights);
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &[1], true);
    batch.set_adapter(Some(third));
    model.open_block(BlockId(0), CacheSettings::full(8)).unwrap();
    assert!(model.forward(&batch, &mut Vec::new()).unwrap_err().to_string().contains("not loaded"));
    let wide = pairs(&config, 1).into_iter().take(1).map(|(layer, linear, pair)| {
        let (outputs, inputs) = linear.shape(&config);
        (layer, linear, LoraPair { a: vec![0.0; 9 * inputs], b: vec![0.0; 9 * outputs], rank: 9, ..pair })
    });
    let wide = Adapter::new(&config, wide).unwrap();
    assert!(model.load_adapter(&wide).unwrap_err().to_string().contains("rank 9"));
}
