//! What every cache method promises: exact until the budget is reached, the same bits for any
//! chunking and any batch, the same answers from both backends, images that resume, positions in range.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod variants;

use std::{path::Path, sync::Arc};

use locket_model::{
    Batch, BlockId, Model,
    kv_cache::{
        BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SideCar, SlotType,
    },
    load::{Backend, BuildOptions, Checkpoint},
    testing::{self, TinyLlama},
};
use variants::{RING, SLOTS};

/// Slots of `full`.
const CONTEXT: u32 = 400;
const VOCAB: usize = 1024;

fn settings(method: CacheMethod) -> CacheSettings {
    variants::settings(method, CONTEXT)
}

fn variants() -> Vec<CacheSettings> {
    variants::all(CONTEXT)
}

/// A tiny model, grouped queries, with random weights for the trained methods.
fn build(folder: &Path, backend: Backend, slot_type: SlotType, classes: &[(u32, u32)]) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let side_car = testing::side_car(geometry, SLOTS, 3);
    build_with(&checkpoint, backend, slot_type, classes, side_car)
}

fn build_with(
    checkpoint: &Checkpoint,
    backend: Backend,
    slot_type: SlotType,
    classes: &[(u32, u32)],
    side_car: SideCar,
) -> Box<dyn Model> {
    let geometry = CacheGeometry::of(&checkpoint.config);
    let cache = CachePlan {
        geometry,
        slot_type,
        side: SideArrays::of(&CacheMethod::ALL, geometry, Some(&side_car)),
        classes: classes.iter().map(|&(capacity, blocks)| BlockClass { capacity, blocks }).collect(),
    };
    let options =
        BuildOptions { backend, cache, max_batch_rows: 256, threads: 2, side_car: Some(Arc::new(side_car)) };
    checkpoint.build(&options).unwrap()
}

fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().with("num_hidden_layers", 3).with("vocab_size", VOCAB).write(folder.path()).unwrap();
    folder
}

/// All different: equal tokens have equal keys before rotation in the first layer, and backends may break
/// such ties differently.
fn ids(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 331 + seed * 77) % VOCAB as u32).collect()
}

/// Adds `ids` to the sequence in `block`, `chunks` (repeated) rows a step; logits of every row.
fn extend(
    model: &mut dyn Model,
    (block, settings): (BlockId, CacheSettings),
    from: u32,
    ids: &[u32],
    chunks: &[usize],
) -> Vec<f32> {
    let (mut all, mut logits, mut done) = (Vec::new(), Vec::new(), 0);
    for &rows in chunks.iter().cycle() {
        if done == ids.len() {
            return all;
        }
        let to_border = settings.rows_to_border(from + done as u32) as usize;
        let rows = rows.min(ids.len() - done).min(to_border);
        let mut batch = Batch::default();
        batch.push(block, from + done as u32, &ids[done..done + rows], false);
        batch.sample_rows = (0..rows as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
        done += rows;
    }
    all
}

fn run(model: &mut dyn Model, settings: CacheSettings, ids: &[u32], chunks: &[usize]) -> Vec<f32> {
    model.open_block(BlockId(0), settings).unwrap();
    let logits = extend(model, (BlockId(0), settings), 0, ids, chunks);
    model.close_block(BlockId(0));
    logits
}

fn slot_types(method: CacheMethod) -> Vec<SlotType> {
    let all = [SlotType::F32, SlotType::F16, SlotType::Bf16, SlotType::I8];
    all.into_iter().filter(|slot_type| slot_type.is_float() || !method.mixes()).collect()
}

#[test]
fn exact_until_the_budget_is_reached() {
    let folder = tiny();
    let ids = ids(1, 200);
    for slot_type in [SlotType::F16, SlotType::I8] {
        let mut model = build(folder.path(), Backend::Cpu, slot_type, &[(400, 1)]);
        let full = run(model.as_mut(), settings(CacheMethod::Full), &ids, &[64]);
        for settings in variants() {
            let method = settings.method;
            if method.mixes() && !slot_type.is_float() {
                continue;
            }
            let got = run(model.as_mut(), settings, &ids, &[37, 5]);
            // Layers with budgets fold together, when all are full.
            let exact = if settings.layer_budgets { settings.capacity() } else { settings.slots };
            let exact = exact.min(ids.len() as u32) as usize * VOCAB;
            assert_eq!(got[..exact], full[..exact], "{settings:?} {slot_type:?}");
            assert_eq!(got == full, method == CacheMethod::Full, "{method:?} folds and forgets");
        }
    }
}

#[test]
fn chunks_and_neighbours_do_not_matter() {
    let folder = tiny();
    let ids = ids(2, 230);
    for settings in variants() {
        let method = settings.method;
        for slot_type in slot_types(method) {
            let mut model = build(folder.path(), Backend::Cpu, slot_type, &[(80, 8), (400, 2)]);
            if method == CacheMethod::Full {
                continue;
            }
            let whole = run(model.as_mut(), settings, &ids, &[230]);
            for chunks in [&[16][..], &[112], &[1], &[7, 50]] {
                let chunked = run(model.as_mut(), settings, &ids, chunks);
                assert!(chunked == whole, "{settings:?} {slot_type:?} in chunks {chunks:?}");
            }
        }
    }
}

/// All methods in one batch, ragged, decoding and prefilling; each as alone.
#[test]
fn methods_mix_in_one_batch() {
    let folder = tiny();
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(80, 10), (400, 1)]);
    let block = |i: usize| if i == 0 { BlockId(10) } else { BlockId(i as u32 - 1) };
    let variants = variants();
    let texts: Vec<Vec<u32>> = (0..variants.len()).map(|i| ids(10 + i as u32, 90 + 11 * i)).collect();
    let mut got: Vec<Vec<f32>> = vec![Vec::new(); texts.len()];
    for (i, &settings) in variants.iter().enumerate() {
        model.open_block(block(i), settings).unwrap();
    }
    let mut done = vec![0; texts.len()];
    let mut logits = Vec::new();
    for step in 0.. {
        let mut batch = Batch::default();
        let mut owners = Vec::new();
        for turn in 0..texts.len() {
            // Some decode, some take chunks; the order turns.
            let i = (turn + step) % texts.len();
            let to_border = variants[i].rows_to_border(done[i] as u32) as usize;
            let rows = [1, 17, 5][(i + step) % 3].min(texts[i].len() - done[i]).min(to_border);
            if rows > 0 {
                batch.push(block(i), done[i] as u32, &texts[i][done[i]..done[i] + rows], false);
                owners.extend(std::iter::repeat_n(i, rows));
                done[i] += rows;
            }
        }
        if owners.is_empty() {
            if done.iter().zip(&texts).all(|(&done, text)| done == text.len()) {
                break;
            }
            continue;
        }
        batch.sample_rows = (0..owners.len() as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        for (row, &i) in logits.chunks(VOCAB).zip(&owners) {
            got[i].extend_from_slice(row);
        }
    }
    for (i, &settings) in variants.iter().enumerate() {
        model.close_block(block(i));
        model.open_block(block(i), settings).unwrap();
        let alone = extend(model.as_mut(), (block(i), settings), 0, &texts[i], &[64]);
        assert!(alone == got[i], "{settings:?} differs in company");
    }
}

#[test]
fn backends_agree() {
    let folder = tiny();
    let ids = ids(3, 150);
    for settings in variants() {
        let mut ours = build(folder.path(), Backend::Cpu, SlotType::F32, &[(400, 1)]);
        let mut oracle = build(folder.path(), Backend::Reference, SlotType::F32, &[(400, 1)]);
        let a = run(ours.as_mut(), settings, &ids, &[48]);
        let b = run(oracle.as_mut(), settings, &ids, &[19]);
        let difference = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Logits are about 4; weights are f32, so only the order of sums differs.
        assert!(difference < 2e-4, "{settings:?}: {difference}");
    }
}

#[test]
fn bytes_are_close_to_numbers() {
    let folder = tiny();
    let ids = ids(4, 150);
    for backend in [Backend::Cpu, Backend::Reference] {
        let run = |slot_type| {
            let mut model = build(folder.path(), backend, slot_type, &[(400, 1)]);
            run(model.as_mut(), settings(CacheMethod::Full), &ids, &[48])
        };
        let exact = run(SlotType::F32);
        let rms = |x: &[f32]| {
            let squares = x.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2));
            (squares.sum::<f64>() / x.len() as f64).sqrt()
        };
        assert!(rms(&run(SlotType::I8)) < 0.02, "{backend:?}: {}", rms(&run(SlotType::I8)));
        if backend == Backend::Reference {
            let four_bits = rms(&run(SlotType::I4));
            assert!(four_bits > 0.005 && four_bits < 0.3, "{four_bits}");
        }
    }
}

/// The sequence outgrows the trained context several times over.
#[test]
fn an_endless_sequence_stays_in_range() {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default()
        .with("max_position_embeddings", 160)
        .with("vocab_size", VOCAB)
        .write(folder.path())
        .unwrap();
    let ids = ids(5, 700);
    for settings in variants() {
        let method = settings.method;
        if method == CacheMethod::Full {
            let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(400, 1)]);
            model.open_block(BlockId(0), CacheSettings::full(400)).unwrap();
            let mut batch = Batch::default();
            batch.push(BlockId(0), 0, &ids[..161], true);
            let error = model.forward(&batch, &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains("160"), "{error}");
            continue;
        }
        for slot_type in slot_types(method) {
            let mut model = build(folder.path(), Backend::Cpu, slot_type, &[(80, 1)]);
            let whole = run(model.as_mut(), settings, &ids, &[250]);
            assert!(whole.iter().all(|logit| logit.is_finite()));
            let chunked = run(model.as_mut(), settings, &ids, &[33, 2, 1]);
            assert!(chunked == whole, "{settings:?} {slot_type:?}");
        }
        let mut ours = build(folder.path(), Backend::Cpu, SlotType::F32, &[(80, 1)]);
        let mut oracle = build(folder.path(), Backend::Reference, SlotType::F32, &[(80, 1)]);
        let a = run(ours.as_mut(), settings, &ids[..400], &[64]);
        let b = run(oracle.as_mut(), settings, &ids[..400], &[64]);
        let difference = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-3, "{settings:?}: {difference}");
    }
}

#[test]
fn images_resume_in_other_blocks_and_processes() {
    let folder = tiny();
    let text = ids(6, 150);
    for backend in [Backend::Cpu, Backend::Reference] {
        for settings in variants() {
            let method = settings.method;
            for slot_type in [SlotType::F16, SlotType::I8] {
                if method.mixes() && !slot_type.is_float() {
                    continue;
                }
                let classes = [(70, 1), (400, 2)];
                let mut model = build(folder.path(), backend, slot_type, &classes);
                let large = BlockId(1);
                model.open_block(large, settings).unwrap();
                extend(model.as_mut(), (large, settings), 0, &text[..110], &[40]);
                let image = model.export_block(large).unwrap();
                let folded = model.folded_tokens(large);
                assert_eq!(folded > 0, method != CacheMethod::Full);
                let rest = extend(model.as_mut(), (large, settings), 110, &text[110..], &[9]);
                let mut other = build(folder.path(), backend, slot_type, &classes);
                let block = if method == CacheMethod::Full { BlockId(2) } else { BlockId(0) };
                other.import_block(block, &image).unwrap();
                assert_eq!(other.folded_tokens(block), folded);
                let again = other.export_block(block).unwrap();
                if backend == Backend::Cpu {
                    assert_eq!(again.capacity(), image.len(), "allocated exactly");
                }
                assert_eq!(again, image, "{settings:?}");
                let resumed = extend(other.as_mut(), (block, settings), 110, &text[110..], &[40]);
                if backend == Backend::Cpu {
                    assert!(resumed == rest, "{settings:?} {slot_type:?}");
                } else {
                    let difference =
                        resumed.iter().zip(&rest).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(difference < 1e-2, "{settings:?} {slot_type:?}: {difference}");
                }
            }
        }
    }
}

#[test]
fn broken_images_are_refused_and_leave_the_block_closed() {
    let folder = tiny();
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(70, 2)]);
    let learned = CacheSettings { layer_budgets: true, ..settings(CacheMethod::Learned) };
    model.open_block(BlockId(0), learned).unwrap();
    extend(model.as_mut(), (BlockId(0), learned), 0, &ids(7, 100), &[50]);
    let image = model.export_block(BlockId(0)).unwrap();
    for length in [0, 3, 4, 50, 200, image.len() / 2, image.len() - 1] {
        assert!(model.import_block(BlockId(1), &image[..length]).is_err(), "{length} bytes");
        assert!(model.export_block(BlockId(1)).is_err(), "the block is closed");
    }
    let longer = [&image[..], &[0]].concat();
    assert!(model.import_block(BlockId(1), &longer).is_err());
    for at in 0..32 {
        let mut other = image.clone();
        other[at] ^= 0x55;
        // Header words: version, geometry, side arrays.
        assert!(model.import_block(BlockId(1), &other).is_err(), "byte {at}");
    }
    let mut other = build(folder.path(), Backend::Cpu, SlotType::I8, &[(70, 1)]);
    assert!(other.import_block(BlockId(0), &image).is_err(), "another slot type");
    model.import_block(BlockId(1), &image).unwrap();
}

/// A copied block goes on like its original, for every method.
#[test]
fn copies_go_on_like_their_original() {
    let folder = tiny();
    let text = ids(8, 160);
    let mut model = build(folder.path(), Backend::Cpu, SlotType::I8, &[(70, 1), (400, 2)]);
    for settings in variants().into_iter().filter(|settings| !settings.method.mixes()) {
        let method = settings.method;
        let to = if method == CacheMethod::Full { BlockId(2) } else { BlockId(0) };
        model.open_block(BlockId(1), settings).unwrap();
        extend(model.as_mut(), (BlockId(1), settings), 0, &text[..100], &[30]);
        model.copy_block(BlockId(1), to).unwrap();
        let original = extend(model.as_mut(), (BlockId(1), settings), 100, &text[100..], &[10]);
        let copy = extend(model.as_mut(), (to, settings), 100, &text[100..], &[60]);
        assert!(copy == original, "{settings:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let folder = tiny();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut model = build(folder.path(), Backend::Cpu, SlotType::I8, &[(70, 1)]);
    let refused = |model: &mut dyn Model, settings| match model.open_block(BlockId(0), settings) {
        Err(error) => error.to_string(),
        Ok(()) => panic!("{settings:?} was taken"),
    };
    let lococo = settings(CacheMethod::Lococo);
    assert!(refused(model.as_mut(), lococo).contains("int8"));
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(70, 1)]);
    assert!(refused(model.as_mut(), CacheSettings { slots: 40, ..lococo }).contains("trained for 48"));
    let mut model = build_with(&checkpoint, Backend::Cpu, SlotType::F16, &[(70, 1)], SideCar::default());
    assert!(refused(model.as_mut(), settings(CacheMethod::Learned)).contains("side-car"));
    let budgets = CacheSettings { layer_budgets: true, ..settings(CacheMethod::Observed) };
    assert!(refused(model.as_mut(), budgets).contains("layer_budgets"));
    let budgets = CacheSettings { layer_budgets: true, ..settings(CacheMethod::Tova) };
    assert!(refused(model.as_mut(), budgets).contains("layer_budgets"));
    let crowded = CacheSettings { sinks: 30, recent: 30, ..settings(CacheMethod::Observed) };
    assert!(refused(model.as_mut(), crowded).contains("recent"));
}

#[test]
fn scores_are_those_of_the_logits() {
    let folder = tiny();
    let text = ids(9, 60);
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(folder.path(), backend, SlotType::F32, &[(400, 1)]);
        let logits = run(model.as_mut(), settings(CacheMethod::Full), &text, &[60]);
        model.open_block(BlockId(0), settings(CacheMethod::Full)).unwrap();
        let mut batch = Batch::default();
        batch.push(BlockId(0), 0, &text, false);
        batch.sample_rows = (0..59).collect();
        let mut scores = Vec::new();
        model.score_tokens(&batch, &text[1..], &mut scores).unwrap();
        assert_eq!(scores.len(), 59);
        for ((row, score), &target) in logits.chunks(VOCAB).zip(&scores).zip(&text[1..]) {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            let nll = sum.ln() - f64::from(row[target as usize]);
            assert!((f64::from(score.nll) - nll).abs() < 1e-4, "{} {nll}", score.nll);
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(row[score.best as usize], best);
        }
        assert!(model.score_tokens(&batch, &text[2..], &mut scores).is_err(), "too few targets");
    }
}

/// Layers with budgets hold as many slots as they were given, in the same memory, and a step must not
/// cross the place where the block is laid out anew.
#[test]
fn budgets_share_out_the_same_memory() {
    let folder = tiny();
    let text = ids(11, 300);
    let settings = CacheSettings { layer_budgets: true, ..settings(CacheMethod::Observed) };
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(70, 1)]);
    let planned = model.memory().cache;
    model.open_block(BlockId(0), settings).unwrap();
    extend(model.as_mut(), (BlockId(0), settings), 0, &text[..60], &[60]);
    let mut batch = Batch::default();
    batch.push(BlockId(0), 60, &text[60..69], true);
    let error = model.forward(&batch, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("may append 8"), "{error}");
    extend(model.as_mut(), (BlockId(0), settings), 60, &text[60..], &[100]);
    // `M_l` are 28, 76 and 28 of 48 on average (two groups of 16 per layer are shared out).
    assert_eq!(model.folded_tokens(BlockId(0)), 300 - (28 + (300 - 68) % RING));
    assert_eq!(model.memory().cache, planned);
}

/// A sequence that ends before it would fold is at home in a smaller block.
#[test]
fn short_sequences_live_in_small_blocks() {
    let folder = tiny();
    let text = ids(12, 40);
    for settings in variants() {
        if !settings.folds() {
            continue;
        }
        let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(40, 1), (80, 1)]);
        model.open_block(BlockId(1), settings).unwrap();
        let large = extend(model.as_mut(), (BlockId(1), settings), 0, &text, &[16]);
        let image = model.export_block(BlockId(1)).unwrap();
        model.open_block(BlockId(0), settings).unwrap();
        let small = extend(model.as_mut(), (BlockId(0), settings), 0, &text, &[40]);
        assert!(small == large, "{settings:?}");
        assert_eq!(model.export_block(BlockId(0)).unwrap(), image);
        let mut batch = Batch::default();
        batch.push(BlockId(0), 40, &text[..1], true);
        assert!(model.forward(&batch, &mut Vec::new()).is_err(), "the block is full");
        model.import_block(BlockId(0), &image).unwrap();
    }
}
