//! Rows whose embedding is given, and positions with gaps: what visual tokens are to the decoder. The same
//! bits for any chunking and any company, the same answers from both backends, images that resume.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod variants;

use std::{path::Path, sync::Arc};

use locket_model::{
    Batch, BlockId, Model,
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::{self, TinyLlama},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use variants::SLOTS;

/// Slots of `full`.
const CONTEXT: u32 = 300;
const VOCAB: usize = 1024;
const HIDDEN: usize = 64;

fn settings(method: CacheMethod) -> CacheSettings {
    variants::settings(method, CONTEXT)
}

fn variants() -> Vec<CacheSettings> {
    variants::all(CONTEXT)
}

fn build(folder: &Path, backend: Backend, slot_type: SlotType, classes: &[(u32, u32)]) -> Box<dyn Model> {
    build_with(folder, backend, slot_type, classes, true)
}

fn build_with(
    folder: &Path,
    backend: Backend,
    slot_type: SlotType,
    classes: &[(u32, u32)],
    gaps: bool,
) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let side_car = testing::side_car(geometry, SLOTS, 3);
    let side = SideArrays { gaps, ..SideArrays::of(&CacheMethod::ALL, geometry, Some(&side_car)) };
    let classes = classes.iter().map(|&(capacity, blocks)| BlockClass { capacity, blocks }).collect();
    let cache = CachePlan { geometry, slot_type, side, classes };
    let side_car = Some(Arc::new(side_car));
    checkpoint.build(&BuildOptions { backend, cache, max_batch_rows: 256, threads: 2, side_car }).unwrap()
}

fn tiny(max_position: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default()
        .with("num_hidden_layers", 3)
        .with("vocab_size", VOCAB)
        .with("max_position_embeddings", max_position)
        .write(folder.path())
        .unwrap();
    folder
}

/// Tokens of a sequence, some with an embedding of their own, and where they are.
#[derive(Clone)]
struct Rows {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// Of every row, whose embedding it has: the table's or that row's of `embeddings`.
    given: Vec<Option<u32>>,
    embeddings: Arc<[f32]>,
}

/// Text, runs of visual tokens, and with `gaps` positions left out among these.
fn rows(seed: u64, count: usize, gaps: bool) -> Rows {
    let mut random = StdRng::seed_from_u64(seed);
    let embeddings: Vec<f32> = (0..40 * HIDDEN).map(|_| random.random_range(-1.7..1.7)).collect();
    let (mut position, mut visual) = (0, 0);
    let (mut rows, mut next_visual) = (
        Rows { ids: Vec::new(), positions: Vec::new(), given: Vec::new(), embeddings: embeddings.into() },
        0u32,
    );
    for at in 0..count {
        if visual == 0 && at % 37 == 9 {
            visual = random.random_range(1..30);
        }
        let is_visual = visual > 0;
        visual -= usize::from(is_visual);
        position += if gaps && is_visual { random.random_range(0..7) } else { 0 };
        // All different: equal tokens have equal keys before rotation in the first layer.
        rows.ids.push(((at as u32 * 331) + seed as u32 * 77) % VOCAB as u32);
        rows.positions.push(position);
        rows.given.push(is_visual.then_some(next_visual % 40));
        next_visual += u32::from(is_visual);
        position += 1;
    }
    rows
}

impl Rows {
    fn len(&self) -> usize {
        self.ids.len()
    }

    /// Appends a part of the rows to a batch.
    fn push(&self, batch: &mut Batch, block: BlockId, part: std::ops::Range<usize>) {
        let first = batch.num_rows();
        let positions = self.positions[part.clone()].iter().copied();
        batch.push_at(block, positions, &self.ids[part.clone()], false);
        for (i, given) in self.given[part].iter().enumerate() {
            if let Some(given) = *given {
                let row = (first + i) as u32;
                batch.embed(row..row + 1, &self.embeddings, given);
            }
        }
    }
}

/// Adds `rows` from `from` on to the sequence in `block`, `chunks` (repeated) rows a step; all logits.
fn extend(
    model: &mut dyn Model,
    (block, settings): (BlockId, CacheSettings),
    rows: &Rows,
    from: usize,
    chunks: &[usize],
) -> Vec<f32> {
    let (mut all, mut logits, mut done) = (Vec::new(), Vec::new(), from);
    for &chunk in chunks.iter().cycle() {
        if done == rows.len() {
            return all;
        }
        let count = chunk.min(rows.len() - done).min(settings.rows_to_border(done as u32) as usize);
        let mut batch = Batch::default();
        rows.push(&mut batch, block, done..done + count);
        batch.sample_rows = (0..count as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
        done += count;
    }
    all
}

fn run(model: &mut dyn Model, settings: CacheSettings, rows: &Rows, chunks: &[usize]) -> Vec<f32> {
    model.open_block(BlockId(0), settings).unwrap();
    let logits = extend(model, (BlockId(0), settings), rows, 0, chunks);
    model.close_block(BlockId(0));
    logits
}

fn slot_types(method: CacheMethod) -> Vec<SlotType> {
    let all = [SlotType::F32, SlotType::F16, SlotType::Bf16, SlotType::I8];
    all.into_iter().filter(|slot_type| slot_type.is_float() || !method.mixes()).collect()
}

fn most_apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What the table says, given as an embedding, is the table's row, bit for bit; another embedding is not.
#[test]
fn given_embeddings_stand_for_the_tables() {
    let folder = tiny(512);
    let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let table = tensors.tensor("model.embed_tokens.weight").unwrap();
    let table: Vec<f32> = table.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let text = Rows { given: vec![None; 60], ..rows(1, 60, false) };
    let own: Vec<f32> =
        text.ids.iter().flat_map(|&id| table[id as usize * HIDDEN..][..HIDDEN].to_vec()).collect();
    let mut given = text.clone();
    given.embeddings = own.into();
    given.ids = vec![0; 60];
    for at in (0..60).filter(|at| at % 3 != 0) {
        given.given[at] = Some(at as u32);
    }
    (0..60).step_by(3).for_each(|at| given.ids[at] = text.ids[at]);
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(folder.path(), backend, SlotType::F16, &[(300, 1)]);
        let expected = run(model.as_mut(), settings(CacheMethod::Full), &text, &[60]);
        assert!(run(model.as_mut(), settings(CacheMethod::Full), &given, &[60]) == expected, "{backend:?}");
        let other = Rows { embeddings: vec![0.5; 60 * HIDDEN].into(), ..given.clone() };
        assert!(run(model.as_mut(), settings(CacheMethod::Full), &other, &[60]) != expected);
    }
}

/// A whole sequence moved by 100 positions differs by rounding only; one with gaps differs.
#[test]
fn only_distances_matter() {
    let folder = tiny(512);
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F32, &[(300, 1)]);
    let dense = rows(2, 80, false);
    let moved =
        Rows { positions: dense.positions.iter().map(|position| position + 100).collect(), ..dense.clone() };
    let expected = run(model.as_mut(), settings(CacheMethod::Full), &dense, &[80]);
    assert!(most_apart(&expected, &run(model.as_mut(), settings(CacheMethod::Full), &moved, &[80])) < 1e-3);
    let torn = Rows { positions: rows(2, 80, true).positions, ..dense };
    assert!(most_apart(&expected, &run(model.as_mut(), settings(CacheMethod::Full), &torn, &[80])) > 1e-2);
}

#[test]
fn chunks_do_not_matter() {
    let folder = tiny(2048);
    let rows = rows(3, 230, true);
    for settings in variants() {
        for slot_type in slot_types(settings.method) {
            let mut model = build(folder.path(), Backend::Cpu, slot_type, &[(300, 1)]);
            let whole = run(model.as_mut(), settings, &rows, &[230]);
            for chunks in [&[16][..], &[112], &[1], &[7, 50]] {
                let chunked = run(model.as_mut(), settings, &rows, chunks);
                assert!(chunked == whole, "{settings:?} {slot_type:?} in chunks {chunks:?}");
            }
        }
    }
}

/// Where positions have no gaps, planning for them changes nothing, compactions included.
#[test]
fn planned_gaps_cost_no_bit() {
    let folder = tiny(160);
    let rows = rows(4, 400, false);
    for settings in variants().into_iter().filter(CacheSettings::folds) {
        let logits = [true, false].map(|gaps| {
            let mut model = build_with(folder.path(), Backend::Cpu, SlotType::F16, &[(80, 1)], gaps);
            run(model.as_mut(), settings, &rows, &[64])
        });
        assert!(logits[0] == logits[1], "{settings:?}");
    }
}

/// All methods in one batch, ragged, with text, visual tokens and gaps; each as alone.
#[test]
fn company_does_not_matter() {
    let folder = tiny(2048);
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16, &[(80, 10), (300, 1)]);
    let block = |i: usize| if i == 0 { BlockId(10) } else { BlockId(i as u32 - 1) };
    let variants = variants();
    let all: Vec<Rows> = (0..variants.len()).map(|i| rows(20 + i as u64, 90 + 11 * i, i % 3 != 1)).collect();
    let mut got: Vec<Vec<f32>> = vec![Vec::new(); all.len()];
    let mut done = vec![0; all.len()];
    for (i, &settings) in variants.iter().enumerate() {
        model.open_block(block(i), settings).unwrap();
    }
    let mut logits = Vec::new();
    let mut step = 0;
    while done.iter().zip(&all).any(|(&done, rows)| done < rows.len()) {
        let mut batch = Batch::default();
        let mut owners = Vec::new();
        for turn in 0..all.len() {
            let i = (turn + step) % all.len();
            let to_border = variants[i].rows_to_border(done[i] as u32) as usize;
            let count = [1, 17, 5][(i + step) % 3].min(all[i].len() - done[i]).min(to_border);
            if count > 0 {
                all[i].push(&mut batch, block(i), done[i]..done[i] + count);
                owners.extend(std::iter::repeat_n(i, count));
                done[i] += count;
            }
        }
        step += 1;
        batch.sample_rows = (0..owners.len() as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        for (row, &i) in logits.chunks(VOCAB).zip(&owners) {
            got[i].extend_from_slice(row);
        }
    }
    for (i, &settings) in variants.iter().enumerate() {
        model.close_block(block(i));
        model.open_block(block(i), settings).unwrap();
        let alone = extend(model.as_mut(), (block(i), settings), &all[i], 0, &[64]);
        assert!(alone == got[i], "{settings:?} differs in company");
    }
}

/// Positions reach several times beyond what the model was trained on, gaps across borders included.
#[test]
fn backends_agree_and_stay_in_range() {
    for (max_position, tolerance) in [(2048, 2e-4), (160, 1e-3)] {
        let folder = tiny(max_position);
        let rows = rows(5, 170, true);
        for settings in variants() {
            if max_position < 2048 && !settings.folds() {
                continue;
            }
            let mut ours = build(folder.path(), Backend::Cpu, SlotType::F32, &[(300, 1)]);
            let mut oracle = build(folder.path(), Backend::Reference, SlotType::F32, &[(300, 1)]);
            let a = run(ours.as_mut(), settings, &rows, &[48]);
            let b = run(oracle.as_mut(), settings, &rows, &[19]);
            let apart = most_apart(&a, &b);
            assert!(apart < tolerance, "{settings:?} {max_position}: {apart}");
            let again = run(ours.as_mut(), settings, &rows, &[33, 2, 1]);
            assert!(again == a, "{settings:?} {max_position}");
        }
    }
}

#[test]
fn images_resume_in_other_blocks() {
    let folder = tiny(2048);
    let text = rows(6, 150, true);
    for backend in [Backend::Cpu, Backend::Reference] {
        for settings in variants() {
            for slot_type in [SlotType::F16, SlotType::I8] {
                if settings.method.mixes() && !slot_type.is_float() {
                    continue;
                }
                let mut model = build(folder.path(), backend, slot_type, &[(70, 1), (300, 2)]);
                model.open_block(BlockId(1), settings).unwrap();
                let head = Rows {
                    ids: text.ids[..110].to_vec(),
                    positions: text.positions[..110].to_vec(),
                    given: text.given[..110].to_vec(),
                    ..text.clone()
                };
                extend(model.as_mut(), (BlockId(1), settings), &head, 0, &[40]);
                let image = model.export_block(BlockId(1)).unwrap();
                let block = if settings.folds() { BlockId(0) } else { BlockId(2) };
                model.import_block(block, &image).unwrap();
                assert_eq!(model.folded_tokens(block), model.folded_tokens(BlockId(1)));
                let again = model.export_block(block).unwrap();
                assert!(again == image, "{settings:?}");
                if backend == Backend::Cpu {
                    assert_eq!(again.capacity(), image.len(), "allocated exactly");
                }
                let rest = extend(model.as_mut(), (BlockId(1), settings), &text, 110, &[9]);
                let resumed = extend(model.as_mut(), (block, settings), &text, 110, &[40]);
                match backend {
                    Backend::Cpu => assert!(resumed == rest, "{settings:?} {slot_type:?}"),
                    _ => assert!(most_apart(&resumed, &rest) < 1e-2, "{settings:?} {slot_type:?}"),
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let folder = tiny(512);
    let observed = settings(CacheMethod::Observed);
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build_with(folder.path(), backend, SlotType::F16, &[(300, 2)], false);
        model.open_block(BlockId(0), observed).unwrap();
        let rows = rows(7, 40, true);
        let mut refused = |change: &dyn Fn(&mut Batch)| {
            let mut batch = Batch::default();
            rows.push(&mut batch, BlockId(0), 0..40);
            change(&mut batch);
            model.forward(&batch, &mut Vec::new()).unwrap_err().to_string()
        };
        assert!(refused(&|_| {}).contains("gaps"));
        assert!(refused(&|batch| batch.positions[5] = batch.positions[4]).contains("ascend"));
        assert!(refused(&|batch| batch.embedded[0].first = 40).contains("embeddings"));
        assert!(refused(&|batch| batch.embedded.swap(0, 1)).contains("embeddings"));
        assert!(refused(&|batch| batch.embedded[0].rows = 39..41).contains("embeddings"));
        assert!(refused(&|batch| batch.embedded[0].embeddings = vec![0.0; 65].into()).contains("embeddings"));
        // A sequence that never folds has no ages, so gaps need no plan.
        let mut batch = Batch::default();
        rows.push(&mut batch, BlockId(1), 0..40);
        model.open_block(BlockId(1), settings(CacheMethod::Full)).unwrap();
        model.forward(&batch, &mut Vec::new()).unwrap();
        let mut batch = Batch::default();
        batch.push(BlockId(1), 512, &[1], true);
        assert!(model.forward(&batch, &mut Vec::new()).unwrap_err().to_string().contains("512"));
    }
}
