//! Chunked equals whole and alone equals together, bit for bit on the `cpu` backend, folds
//! included; backends agree with each other.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixtures;

use fixtures::{CPU_TOLERANCE, TEXT, assert_close, build, default_model, extend, teacher_force};
use locket_model::{
    Batch, BlockId, Model,
    kv_cache::{CacheMethod, CacheSettings, SlotType},
    load::Backend,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Folds several times within [`TEXT`], in different steps in different layers.
const WINDOW: CacheSettings = CacheSettings {
    method: CacheMethod::Window,
    slots: 48,
    ring: 20,
    sinks: 4,
    recent: 0,
    recall_permille: 0,
    layer_budgets: false,
};

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn chunked_equals_whole() {
    let mut model = build(&default_model(), Backend::Cpu, SlotType::F16, &[(256, 1)]);
    for settings in [CacheSettings::full(256), WINDOW] {
        let whole = teacher_force(model.as_mut(), settings, TEXT, &[TEXT.len()]);
        for chunks in [&[1][..], &[16], &[112], &[5, 1, 33, 2]] {
            let chunked = teacher_force(model.as_mut(), settings, TEXT, chunks);
            assert!(bits(&whole) == bits(&chunked), "{settings:?} in chunks of {chunks:?}");
        }
    }
}

/// 32 sequences of 1 to 90 tokens in chunks of random size, some folding: many shapes of batches.
#[test]
fn alone_equals_together() {
    let mut random = StdRng::seed_from_u64(0x10c4e7);
    let mut model = build(&default_model(), Backend::Cpu, SlotType::F16, &[(96, 33)]);
    let alone_block = BlockId(32);
    let sequences: Vec<(CacheSettings, &[u32])> = (0..32)
        .map(|idx| {
            let start = random.random_range(0..TEXT.len() - 90);
            let len = random.random_range(1..=90);
            let settings = if idx % 3 == 0 {
                CacheSettings { slots: 24, ring: 10, ..WINDOW }
            } else {
                CacheSettings::full(96)
            };
            (settings, &TEXT[start..start + len])
        })
        .collect();
    let mut together: Vec<Vec<f32>> = vec![Vec::new(); 32];
    let mut done = [0; 32];
    let vocab = model.config().vocab_size;
    for (idx, (settings, _)) in sequences.iter().enumerate() {
        model.open_block(BlockId(idx as u32), *settings).unwrap();
    }
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    loop {
        batch.clear();
        let mut rows_of = Vec::new();
        for (idx, (_, ids)) in sequences.iter().enumerate() {
            let most = if random.random_bool(0.5) { 1 } else { 17 };
            let room = model.max_batch_rows() - batch.num_rows();
            let rows = random.random_range(1..=most).min(ids.len() - done[idx]).min(room);
            if rows > 0 {
                batch.push(BlockId(idx as u32), done[idx] as u32, &ids[done[idx]..done[idx] + rows], false);
                rows_of.push((idx, rows));
                done[idx] += rows;
            }
        }
        if rows_of.is_empty() {
            break;
        }
        batch.sample_rows = (0..batch.num_rows() as u32).collect();
        model.forward(&batch, &mut logits).unwrap();
        let mut at = 0;
        for (idx, rows) in rows_of {
            together[idx].extend_from_slice(&logits[at * vocab..(at + rows) * vocab]);
            at += rows;
        }
    }
    for (idx, (settings, ids)) in sequences.iter().enumerate() {
        model.open_block(alone_block, *settings).unwrap();
        let alone = extend(model.as_mut(), alone_block, 0, ids, &[ids.len()]);
        assert!(bits(&alone) == bits(&together[idx]), "sequence {idx}: {settings:?}, {} tokens", ids.len());
    }
}

#[test]
fn a_copied_block_goes_on_like_its_original() {
    let (head, tail) = TEXT.split_at(100);
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(&default_model(), backend, SlotType::F16, &[(68, 1), (256, 1)]);
        model.open_block(BlockId(0), WINDOW).unwrap();
        extend(model.as_mut(), BlockId(0), 0, head, &[64]);
        model.copy_block(BlockId(0), BlockId(1)).unwrap();
        let original = extend(model.as_mut(), BlockId(0), 100, &tail[..30], &[30]);
        let copy = extend(model.as_mut(), BlockId(1), 100, &tail[..30], &[30]);
        assert!(bits(&original) == bits(&copy), "{backend:?}");
        model.open_block(BlockId(1), CacheSettings::full(256)).unwrap();
        assert!(model.copy_block(BlockId(1), BlockId(0)).is_err(), "{backend:?}: the block is too small");
    }
}

/// What 16-bit activations cost, with and without folds, in each slot type. Where slots round, a
/// last-bit difference before the rounding becomes a whole step of the slot type after it.
#[test]
fn backends_agree() {
    for (slot_type, tolerance) in [
        (SlotType::F32, CPU_TOLERANCE),
        (SlotType::F16, 4.0 * CPU_TOLERANCE),
        (SlotType::Bf16, 20.0 * CPU_TOLERANCE),
    ] {
        let mut cpu = build(&default_model(), Backend::Cpu, slot_type, &[(256, 1)]);
        let mut reference = build(&default_model(), Backend::Reference, slot_type, &[(256, 1)]);
        for settings in [CacheSettings::full(256), WINDOW] {
            let expected = teacher_force(reference.as_mut(), settings, TEXT, &[112]);
            let got = teacher_force(cpu.as_mut(), settings, TEXT, &[112]);
            let what = format!("reference : cpu, {} slots, {}", slot_type.name(), settings.method.name());
            assert_close(&what, &expected, &got, cpu.config().vocab_size, tolerance);
        }
    }
}

/// The window method is exact until the first fold.
#[test]
fn window_equals_full_until_it_folds() {
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(&default_model(), backend, SlotType::F16, &[(256, 1)]);
        let ids = &TEXT[..WINDOW.slots as usize];
        let full = teacher_force(model.as_mut(), CacheSettings::full(256), ids, &[ids.len()]);
        let window = teacher_force(model.as_mut(), WINDOW, ids, &[ids.len()]);
        assert!(bits(&full) == bits(&window), "{backend:?}");
    }
}

/// Broken batches are refused and change nothing.
#[test]
fn batches_that_contradict_the_cache_are_refused() {
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(&default_model(), backend, SlotType::F16, &[(8, 2)]);
        let expected = teacher_force(model.as_mut(), CacheSettings::full(8), &TEXT[..4], &[4]);
        model.open_block(BlockId(0), CacheSettings::full(8)).unwrap();
        let refused = |model: &mut dyn Model, what: &str, change: &dyn Fn(&mut Batch)| {
            let mut batch = Batch::default();
            batch.push(BlockId(0), 0, &TEXT[..4], true);
            change(&mut batch);
            let error = model.forward(&batch, &mut Vec::new());
            assert!(matches!(error, Err(locket_model::Error::InvalidBatch(_))), "{backend:?}: {what}");
        };
        refused(model.as_mut(), "empty", &|batch| batch.clear());
        refused(model.as_mut(), "unknown block", &|batch| batch.sequences[0].block = BlockId(2));
        refused(model.as_mut(), "block not open", &|batch| batch.sequences[0].block = BlockId(1));
        refused(model.as_mut(), "id out of range", &|batch| batch.ids[1] = 49_152);
        refused(model.as_mut(), "a position twice", &|batch| batch.positions[3] = 2);
        refused(model.as_mut(), "a position too far", &|batch| batch.positions[3] = 8192);
        refused(model.as_mut(), "rows left over", &|batch| batch.sequences[0].rows = 0..3);
        refused(model.as_mut(), "rows beyond", &|batch| batch.sequences[0].rows = 0..5);
        refused(model.as_mut(), "sample row out of range", &|batch| batch.sample_rows = vec![4]);
        refused(model.as_mut(), "too many for the block", &|batch| {
            batch.clear();
            batch.push(BlockId(0), 0, &TEXT[..9], true);
        });
        refused(model.as_mut(), "a block twice", &|batch| batch.push(BlockId(0), 4, &TEXT[..1], true));
        let after = extend(model.as_mut(), BlockId(0), 0, &TEXT[..4], &[4]);
        assert!(bits(&after) == bits(&expected), "{backend:?}");
    }
}
