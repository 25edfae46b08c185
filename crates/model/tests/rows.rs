//! Logits and hidden states of any row of the latest step: what scoring and embeddings are made of.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixtures;

use fixtures::{CPU_TOLERANCE, TEXT, assert_close, build, default_model, teacher_force};
use locket_model::{
    Batch, BlockId, Model,
    kv_cache::{CacheSettings, SlotType},
    load::Backend,
};

/// Rows of `ids` in one step, of which only the last is sampled.
fn one_step(model: &mut dyn Model, ids: &[u32]) -> Vec<f32> {
    model.open_block(BlockId(0), CacheSettings::full(128)).unwrap();
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    batch.push(BlockId(0), 0, ids, true);
    model.forward(&batch, &mut logits).unwrap();
    logits
}

fn states(model: &mut dyn Model, rows: &[u32]) -> Vec<f32> {
    let mut states = Vec::new();
    model.row_states(rows, &mut states).unwrap();
    states
}

#[test]
fn rows_asked_for_later_have_the_logits_of_sample_rows() {
    let ids = &TEXT[..60];
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut model = build(&default_model(), backend, SlotType::F32, &[(128, 1)]);
        let vocab = model.config().vocab_size;
        let all = teacher_force(model.as_mut(), CacheSettings::full(128), ids, &[ids.len()]);
        let last = one_step(model.as_mut(), ids);
        let rows: Vec<u32> = (0..60).collect();
        let (mut got, mut slice) = (Vec::new(), Vec::new());
        for rows in rows.chunks(7) {
            model.row_logits(rows, &mut slice).unwrap();
            assert_eq!(slice.len(), rows.len() * vocab);
            got.extend_from_slice(&slice);
        }
        match backend {
            Backend::Cpu => {
                assert!(all.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()), "the same bits");
                assert!(got.ends_with(&last));
            }
            _ => drop(assert_close("reference", &all, &got, vocab, 1e-3)),
        }
        for rows in [&[60][..], &[3, 2], &[1, 1]] {
            assert!(model.row_logits(rows, &mut slice).is_err(), "{rows:?}");
        }
    }
}

/// Tolerance: 0.01 of the largest state, the same as for logits; cosines differ by less than 1e-5.
#[test]
fn states_are_those_of_the_reference_and_the_heads_input() {
    let ids = &TEXT[..60];
    let mut cpu = build(&default_model(), Backend::Cpu, SlotType::F32, &[(128, 1)]);
    let mut reference = build(&default_model(), Backend::Reference, SlotType::F32, &[(128, 1)]);
    let rows: Vec<u32> = (0..60).collect();
    one_step(cpu.as_mut(), ids);
    one_step(reference.as_mut(), ids);
    let (got, expected) = (states(cpu.as_mut(), &rows), states(reference.as_mut(), &rows));
    let width = cpu.config().hidden_size;
    assert_eq!((got.len(), expected.len()), (60 * width, 60 * width));
    let largest = expected.iter().fold(0.0f32, |largest, state| largest.max(state.abs()));
    let apart = got.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
    println!("states: largest {largest}, at most {apart} apart");
    assert!(apart <= CPU_TOLERANCE * largest, "{apart} of {largest}");
    for (a, b) in got.chunks(width).zip(expected.chunks(width)) {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        assert!(cosine > 1.0 - 1e-5, "{cosine}");
    }
}

#[test]
fn states_do_not_depend_on_chunks_or_neighbours() {
    let ids = &TEXT[..60];
    let mut model = build(&default_model(), Backend::Cpu, SlotType::F16, &[(128, 2)]);
    one_step(model.as_mut(), ids);
    let whole = states(model.as_mut(), &(0..60).collect::<Vec<_>>());
    model.open_block(BlockId(0), CacheSettings::full(128)).unwrap();
    model.open_block(BlockId(1), CacheSettings::full(128)).unwrap();
    let (mut batch, mut logits, mut chunked) = (Batch::default(), Vec::new(), Vec::new());
    for (from, to) in [(0, 16), (16, 48), (48, 60)] {
        batch.clear();
        batch.push(BlockId(1), from, &TEXT[100 + from as usize..100 + to as usize], true);
        batch.push(BlockId(0), from, &ids[from as usize..to as usize], false);
        model.forward(&batch, &mut logits).unwrap();
        let rows: Vec<u32> = (to - from..2 * (to - from)).collect();
        chunked.extend(states(model.as_mut(), &rows));
    }
    assert!(whole.iter().zip(&chunked).all(|(a, b)| a.to_bits() == b.to_bits()), "the same bits");
}

/// There is nothing to ask for before the first step, and after one that was scored only.
#[test]
fn rows_need_a_step() {
    let mut model = build(&default_model(), Backend::Cpu, SlotType::F16, &[(128, 1)]);
    let mut out = Vec::new();
    assert!(model.row_states(&[0], &mut out).is_err());
    one_step(model.as_mut(), &TEXT[..4]);
    assert!(model.row_states(&[0], &mut out).is_ok());
    let mut batch = Batch::default();
    batch.push(BlockId(0), 4, &TEXT[4..6], true);
    model.score_tokens(&batch, &[1], &mut Vec::new()).unwrap();
    assert!(model.row_logits(&[0], &mut out).is_err());
}
