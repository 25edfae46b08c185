//! Attention against a slow f64 softmax, on every instruction set of this machine.

mod received;
mod sequence;
mod slots;

use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{Attention, AttentionJob, AttentionRows, AttentionShape},
    kv::{KvLayout, KvPlace, SlotNumber},
};
use proptest::prelude::*;

use crate::sequence::{Case, bits, shape};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Error bound: 1e-5 (values are within ±2).
    #[test]
    fn attention_is_close_to_f64(
        seed: u64, shape in shape(), count in 1usize..330, window in prop::option::of(1u32..200),
    ) {
        let case = Case::new(seed, shape, count, window);
        let out = case.run(&mut Team::new(2).unwrap(), Isa::best(), 64).out;
        for row in [0, count / 3, count / 2, count - 1] {
            for head in 0..shape.heads {
                let at = row * case.q_dim() + head * shape.head_dim;
                for (got, want) in out[at..at + shape.head_dim].iter().zip(case.exact(row, head)) {
                    prop_assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
                }
            }
        }
    }

    /// Chunks, threads and instruction sets do not show in the bits.
    #[test]
    fn chunked_is_whole(
        seed: u64, shape in shape(), count in 1usize..300, chunk in 1usize..80,
        window in prop::option::of(1u32..200),
    ) {
        let case = Case::new(seed, shape, count, window);
        let whole = case.run(&mut Team::new(1).unwrap(), Isa::best(), count);
        let mut team = Team::new(3).unwrap();
        prop_assert_eq!(bits(&whole.out), bits(&case.run(&mut team, Isa::best(), chunk).out));
        for isa in Isa::available() {
            prop_assert_eq!(bits(&whole.out), bits(&case.run(&mut team, isa, count).out), "{}", isa.name());
        }
    }
}

/// Long enough for several splits of a decode row, one row at a time from a filled cache.
#[test]
fn split_decode_is_whole() {
    for (heads, number) in [(9, SlotNumber::F16), (3, SlotNumber::F16), (9, SlotNumber::I8)] {
        let shape = AttentionShape { heads, kv_heads: 3, head_dim: 64, scale: 0.125, number };
        let case = Case::new(5, shape, 900, None);
        let whole = case.run(&mut Team::new(1).unwrap(), Isa::best(), 900);
        for threads in [2, 4] {
            let decoded = case.run(&mut Team::new(threads).unwrap(), Isa::best(), 1);
            assert_eq!(bits(&whole.out), bits(&decoded.out));
        }
    }
}

#[test]
fn large_values_saturate_as_halves() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 8, scale: 1.0, number: SlotNumber::F16 };
    let mut case = Case::new(1, shape, 2, None);
    case.rows[24 + 16..].fill(1e9);
    let out = case.run(&mut Team::new(1).unwrap(), Isa::best(), 2).out;
    assert!(out[..8].iter().all(|x| x.is_finite()), "row 0 does not see row 1");
    assert!(out[8..].iter().all(|x| x.is_finite()));
}

/// Infinities become finite; a NaN is seen by every row that sees its slot's value.
#[test]
fn special_values_in_bytes() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 8, scale: 1.0, number: SlotNumber::I8 };
    let mut case = Case::new(1, shape, 3, None);
    case.rows[24 + 8] = f32::NEG_INFINITY;
    case.rows[24 + 16] = f32::INFINITY;
    let out = case.run(&mut Team::new(1).unwrap(), Isa::best(), 3).out;
    assert!(out.iter().all(|x| x.is_finite()), "{out:?}");
    case.rows[24 + 16] = f32::NAN;
    for isa in Isa::available() {
        let out = case.run(&mut Team::new(1).unwrap(), isa, 1).out;
        assert!(out[..8].iter().all(|x| x.is_finite()), "row 0 comes before");
        assert!(out[8..].iter().all(|x| x.is_nan()), "{}", isa.name());
    }
}

#[test]
fn jobs_that_could_touch_others_memory_are_refused() {
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 16, scale: 0.25, number: SlotNumber::F32 };
    let case = Case::new(3, shape, 6, None);
    let layout = KvLayout::new(2, 16, 6);
    let memory = AlignedBuf::zeroed(layout.layer_len() * shape.number.bytes());
    let job = |first_row: usize, rows: usize| {
        let place = KvPlace { layout, base: 0 };
        AttentionJob { place, first_row, rows, slots_before: 0, id: 0 }
    };
    let runs = |jobs: &[AttentionJob]| {
        let run = || {
            let mut out = vec![0.0; 6 * 32];
            let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
            let team = &mut Team::new(1).unwrap();
            Attention::new(shape, 1).run(team, Isa::best(), &memory, jobs, rows, None);
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok()
    };
    assert!(runs(&[job(0, 2), job(2, 4)]));
    assert!(!runs(&[job(0, 3), job(2, 4)]), "overlapping rows");
    assert!(!runs(&[job(2, 4), job(0, 2)]), "descending rows");
    assert!(!runs(&[job(0, 0)]), "no rows");
    assert!(!runs(&[job(0, 7)]), "more rows than there are");
    assert!(!runs(&[job(usize::MAX, 2)]), "a sum that wraps");
    for layout in [KvLayout::new(1, 16, 6), KvLayout::new(2, 8, 6)] {
        let place = KvPlace { layout, base: 0 };
        assert!(!runs(&[AttentionJob { place, ..job(0, 2) }]), "a layer of another shape");
    }
    let place = KvPlace { layout: KvLayout::of(SlotNumber::I8, 2, 16, 6), base: 0 };
    assert!(!runs(&[AttentionJob { place, ..job(0, 2) }]), "a layer of another number type");
    let place = KvPlace { layout, base: usize::MAX };
    assert!(!runs(&[AttentionJob { place, ..job(0, 2) }]), "a layer beyond the memory");
    assert!(!runs(&[AttentionJob { slots_before: usize::MAX, ..job(0, 2) }]), "slots beyond the layer");
}
