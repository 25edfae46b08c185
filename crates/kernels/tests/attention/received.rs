//! The attention that slots receive, against sums of f64 softmax weights.

use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{
        Attention, AttentionJob, AttentionRows, AttentionShape, Received, ReceivedMode, ReceivedRows, Window,
    },
    kv::{self, KvLayout, KvPlace, SlotNumber},
};
use proptest::prelude::*;

use crate::sequence::{Case, Positions, bits, shape};

fn mode() -> impl Strategy<Value = ReceivedMode> {
    prop::sample::select(vec![ReceivedMode::Sum, ReceivedMode::Last])
}

/// `[kv_heads, slots]`.
fn exact(case: &Case, mode: ReceivedMode) -> Vec<f64> {
    let group = case.shape.heads / case.shape.kv_heads;
    let mut sums = vec![0.0; case.shape.kv_heads * case.count];
    let first = if mode == ReceivedMode::Sum { 0 } else { case.count - 1 };
    for row in first..case.count {
        for head in 0..case.shape.heads {
            let sums = &mut sums[head / group * case.count..];
            for (sum, weight) in sums.iter_mut().zip(case.exact_weights(row, head)) {
                *sum += weight;
            }
        }
    }
    sums
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Error bound: 1e-5, relative to sums above 1.
    #[test]
    fn received_is_close_to_f64(
        seed: u64, shape in shape(), count in 1usize..330, window in prop::option::of(1u32..200),
        mode in mode(),
    ) {
        let case = Case::new(seed, shape, count, window);
        let got = case.run_received(&mut Team::new(2).unwrap(), Isa::best(), 100, Some(mode)).received;
        for (got, want) in got.iter().zip(exact(&case, mode)) {
            prop_assert!((f64::from(*got) - want).abs() < 1e-5 * want.max(1.0), "{got} {want}");
        }
    }

    /// Chunks, threads and instruction sets do not show in the bits.
    #[test]
    fn chunked_received_is_whole(
        seed: u64, shape in shape(), count in 1usize..300, chunk in 1usize..80,
        window in prop::option::of(1u32..200), mode in mode(),
    ) {
        let case = Case::new(seed, shape, count, window);
        let whole = case.run_received(&mut Team::new(1).unwrap(), Isa::best(), count, Some(mode));
        let plain = case.run(&mut Team::new(1).unwrap(), Isa::best(), count);
        prop_assert_eq!(bits(&plain.out), bits(&whole.out));
        let mut team = Team::new(3).unwrap();
        let chunked = case.run_received(&mut team, Isa::best(), chunk, Some(mode));
        prop_assert_eq!(whole.bits(), chunked.bits());
        for isa in Isa::available() {
            let other = case.run_received(&mut team, isa, count, Some(mode));
            prop_assert_eq!(whole.bits(), other.bits(), "{}", isa.name());
        }
    }
}

/// Long enough for several ranges and splits, one row at a time.
#[test]
fn decoded_received_is_whole() {
    let shape = AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, number: SlotNumber::F16 };
    let case = Case::new(6, shape, 700, None);
    for mode in [ReceivedMode::Sum, ReceivedMode::Last] {
        let whole = case.run_received(&mut Team::new(1).unwrap(), Isa::best(), 700, Some(mode));
        let decoded = case.run_received(&mut Team::new(2).unwrap(), Isa::best(), 1, Some(mode));
        assert_eq!(whole.bits(), decoded.bits());
    }
}

/// Too many scores to keep are computed once more, to the same bits.
#[test]
fn scores_computed_again_are_those_kept() {
    for (number, window) in [(SlotNumber::F32, None), (SlotNumber::I8, Some(90))] {
        let shape = AttentionShape { heads: 14, kv_heads: 2, head_dim: 8, scale: 0.4, number };
        let case = Case::new(8, shape, 600, window);
        let mut team = Team::new(2).unwrap();
        // 600 * 14 * 608 scores are more than there is room for.
        let again = case.run_received(&mut team, Isa::best(), 600, Some(ReceivedMode::Sum));
        let kept = case.run_received(&mut team, Isa::best(), 77, Some(ReceivedMode::Sum));
        assert_eq!(again.bits(), kept.bits());
    }
}

/// Jobs of several sequences and modes in one call give what each gives alone, and continue from
/// the sums that they find.
#[test]
fn jobs_together_are_jobs_alone() {
    let shape = AttentionShape { heads: 10, kv_heads: 2, head_dim: 24, scale: 0.2, number: SlotNumber::Bf16 };
    let case = Case::new(7, shape, 400, None);
    let layout = KvLayout::new(2, 24, 320);
    let mut memory = AlignedBuf::zeroed(4 * layout.layer_len() * shape.number.bytes());
    // Rows of the case, slots before them, what is gathered.
    let sequences = [
        (0..1, 300, Some(ReceivedMode::Sum)),
        (1..60, 0, None),
        (60..100, 40, Some(ReceivedMode::Last)),
        (100..400, 0, Some(ReceivedMode::Sum)),
    ];
    let mut jobs = Vec::new();
    let mut requests = Vec::new();
    let mut len = 0;
    for (i, (rows, slots_before, mode)) in sequences.iter().enumerate() {
        let place = KvPlace { layout, base: i * layout.layer_len() };
        kv::append(Isa::best(), shape.number, &mut memory, place, 0, 0..*slots_before, case.new_rows());
        kv::append(
            Isa::best(),
            shape.number,
            &mut memory,
            place,
            *slots_before,
            rows.clone(),
            case.new_rows(),
        );
        jobs.push(AttentionJob {
            place,
            first_row: rows.start,
            rows: rows.len(),
            slots_before: *slots_before,
            id: 0,
        });
        requests.push(mode.map(|mode| Received { mode, at: len, stride: 310 }));
        len += if mode.is_some() { 2 * 310 } else { 0 };
    }
    let run = |jobs: &[AttentionJob], requests: &[Option<Received>], threads: usize| {
        let mut sums = vec![0.5; len];
        let mut out = vec![0.0; 400 * 240];
        let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
        let rows = ReceivedRows { rows, jobs: requests, sums: &mut sums };
        let positions = Positions { numbers: (0..640).map(|slot| slot % 320).collect(), stride: 320 };
        let row_positions: Vec<u32> = (0..400).map(|row| 60 + row / 2).collect();
        let window = Window { size: 200, row_positions: &row_positions, slots: &positions };
        let mut attention = Attention::new(shape, threads);
        attention.run_received(
            &mut Team::new(threads).unwrap(),
            Isa::best(),
            &memory,
            jobs,
            rows,
            Some(window),
        );
        sums
    };
    let together = run(&jobs, &requests, 2);
    let mut alone = vec![0.5; len];
    for (job, request) in jobs.iter().zip(&requests) {
        let Some(Received { at, stride, .. }) = *request else { continue };
        let sums = run(&[*job], &[*request], 1);
        alone[at..at + 2 * stride].copy_from_slice(&sums[at..at + 2 * stride]);
    }
    assert_eq!(bits(&together), bits(&alone));
    assert!(together[..300].iter().any(|&sum| sum > 0.5), "added to what was there");
    assert_eq!(together[301..310], [0.5; 9], "slots that are not filled are left alone");
}

#[test]
fn arrays_that_overlap_or_do_not_exist_are_refused() {
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 16, scale: 0.25, number: SlotNumber::F32 };
    let case = Case::new(3, shape, 6, None);
    let layout = KvLayout::new(2, 16, 6);
    let memory = AlignedBuf::zeroed(layout.layer_len() * shape.number.bytes());
    let job = |first_row: usize| AttentionJob {
        place: KvPlace { layout, base: 0 },
        first_row,
        rows: 3,
        slots_before: 0,
        id: 0,
    };
    let runs = |requests: &[Option<(usize, usize)>]| {
        let requests: Vec<Option<Received>> = requests
            .iter()
            .map(|request| request.map(|(at, stride)| Received { mode: ReceivedMode::Sum, at, stride }))
            .collect();
        let run = || {
            let (mut out, mut sums) = (vec![0.0; 6 * 32], vec![0.0; 12]);
            let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
            let rows = ReceivedRows { rows, jobs: &requests, sums: &mut sums };
            let team = &mut Team::new(1).unwrap();
            Attention::new(shape, 1).run_received(team, Isa::best(), &memory, &[job(0), job(3)], rows, None);
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok()
    };
    assert!(runs(&[Some((0, 3)), Some((6, 3))]));
    assert!(runs(&[None, Some((2, 5))]));
    assert!(!runs(&[Some((0, 3))]), "a job without a request or none");
    assert!(!runs(&[Some((6, 3)), Some((0, 3))]), "descending");
    assert!(!runs(&[Some((0, 3)), Some((5, 3))]), "overlapping");
    assert!(!runs(&[Some((0, 2)), None]), "fewer sums than slots");
    assert!(!runs(&[None, Some((7, 3))]), "beyond the end");
    assert!(!runs(&[None, Some((usize::MAX, 3))]), "a sum that wraps");
    assert!(!runs(&[None, Some((0, usize::MAX))]), "a product that wraps");
}
