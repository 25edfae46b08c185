//! The driver with methods that rank by side arrays.

use std::sync::Arc;

use super::*;
use crate::kv_cache::{
    CacheGeometry, Segment, SideArrays,
    progress::Progress,
    side_car::{LearnedLayer, LearnedWeights},
};

const GEOMETRY: CacheGeometry =
    CacheGeometry { num_layers: 1, num_heads: 1, num_kv_heads: 1, head_dim: 2, max_position: 1024 };

/// Coefficients `beta * a` of both rankings; the rest of the scorer is not used here.
fn context(a: [f32; 2]) -> FoldContext {
    let layer = LearnedLayer {
        scale: Vec::new(),
        dw: Vec::new(),
        p1: Vec::new(),
        b1: Vec::new(),
        p2: Vec::new(),
        b2: Vec::new(),
        a: a.to_vec(),
    };
    let learned = Some(LearnedWeights { features: 4, taps: 1, hidden: 1, layers: vec![layer] });
    let side_car = SideCar { learned, ..SideCar::default() };
    FoldContext { rotation: Rotation::none(), side_car: Some(Arc::new(side_car)), slot_type: SlotType::F32 }
}

struct NoSlots;

impl SlotReader for NoSlots {
    fn read(&self, _: usize, _: &mut [f32], _: &mut [f32]) -> Result<(), Error> {
        Err(Error::Device("keys are not there".into()))
    }
}

const O0: [f32; 10] = [-5., -9., -8.5, -7., -9.5, -8., -7.5, -9., -6., -8.];
const O1: [f32; 10] = [-6., -8., -1., -7., -2.5, -8., -7., -3., -6., -7.];
const RECEIVED: [f32; 10] = [9., 0.2, 0.4, 1.2, 0.1, 0.9, 0.3, 0.2, 0.5, 0.3];
const COUNT: [f32; 10] = [30., 30., 30., 30., 24., 24., 18., 18., 12., 6.];

/// Ten tokens whose mean received attention is `RECEIVED / COUNT`.
fn block(settings: CacheSettings, context: &FoldContext) -> BlockState {
    let mut state = BlockState::new(GEOMETRY, 16, SideArrays { columns: 3, per_layer: 0, gaps: false });
    state.open(settings, context).unwrap();
    state.append(0, &(0..10).collect::<Vec<_>>());
    for slot in 0..10 {
        // Ten queries could see the first token, one the last.
        let age = 10.0 - slot as f32;
        state.column_mut(0, 0, 0)[slot] = RECEIVED[slot] / COUNT[slot] * age;
        state.column_mut(0, 1, 0)[slot] = O0[slot];
        state.column_mut(0, 2, 0)[slot] = O1[slot];
    }
    state
}

fn kept(state: &BlockState) -> Vec<u32> {
    let mut kept = state.positions_of(0, 0)[..state.len(0)].to_vec();
    kept.sort_unstable();
    kept
}

fn learned() -> CacheSettings {
    CacheSettings {
        sinks: 1,
        recent: 2,
        recall_permille: 500,
        ..CacheSettings::of(CacheMethod::Learned, 6, 4)
    }
}

/// Section 7.3 of our specification: `n = 10, M = 6, rec = 2`, one sink, `rho = 0.5`, `beta a = 1`.
#[test]
fn worked_example() {
    let context = context([1.0, 1.0]);
    let mut state = block(learned(), &context);
    let r0 =
        [-6.2039, -14.0091, -12.8167, -10.2186, -14.9782, -11.2831, -11.5937, -13.4989, -9.1778, -10.9955];
    let r1 = [-7.2039, -13.0091, -5.3167, -10.2186, -7.9782, -11.2831, -11.0937, -7.4989, -9.1778, -9.9955];
    let view = state.view(0, learned(), &NoSlots, &context);
    let mut scores = Scores::default();
    CacheMethod::Learned.fold_method().rank(&view, &mut scores).unwrap();
    for (got, expected) in scores.first.iter().zip(r0).chain(scores.second.iter().zip(r1)) {
        assert!((got - expected).abs() < 1e-4, "{got} {expected}");
    }
    let mut scratch = FoldScratch::default();
    let fold = state.fold(0, &NoSlots, &context, &mut scratch).unwrap();
    assert!(matches!(fold, Fold::Moves(moves) if moves.len() == 3), "{fold:?}");
    assert_eq!(kept(&state), [0, 2, 3, 7, 8, 9]);
    // Side arrays went with their tokens.
    for slot in 0..6 {
        let position = state.positions_of(0, 0)[slot] as usize;
        assert_eq!(state.column_of(0, 1, 0)[slot], O0[position]);
        assert_eq!(state.column_of(0, 2, 0)[slot], O1[position]);
    }
}

#[test]
fn a_full_share_for_recall_leaves_sinks_and_recent_tokens_alone() {
    let context = context([1.0, 1.0]);
    let settings = CacheSettings { recall_permille: 1000, ..learned() };
    let mut state = block(settings, &context);
    state.fold(0, &NoSlots, &context, &mut FoldScratch::default()).unwrap();
    assert_eq!(kept(&state), [0, 2, 4, 7, 8, 9]);
}

#[test]
fn methods_rank_as_their_papers_say() {
    let context = context([0.0, 0.0]);
    let run = |settings| {
        let mut state = block(settings, &context);
        state.fold(0, &NoSlots, &context, &mut FoldScratch::default()).unwrap();
        kept(&state)
    };
    let of = |method| CacheSettings { sinks: 0, recent: 2, ..CacheSettings::of(method, 5, 5) };
    // Means: .3 .0067 .0133 .04 .0042 .0375 .0167 .0111 .0417 .05
    assert_eq!(run(of(CacheMethod::Observed)), [0, 3, 5, 8, 9]);
    // Sums, here of ages 10 to 1: 3 .06 .107 .28 .025 .1875 .067 .033 .083 .05
    assert_eq!(run(of(CacheMethod::H2o)), [0, 3, 5, 8, 9]);
    let tova = CacheSettings { recent: 0, ..of(CacheMethod::Tova) };
    assert_eq!(run(tova), [0, 2, 3, 5, 8], "only what the column says");
    assert_eq!(run(of(CacheMethod::Window)), [5, 6, 7, 8, 9]);
}

#[test]
fn scores_that_are_no_numbers_come_last() {
    let context = context([0.0, 0.0]);
    let settings = CacheSettings { sinks: 0, recent: 0, ..CacheSettings::of(CacheMethod::Tova, 5, 5) };
    let mut state = block(settings, &context);
    state.column_mut(0, 0, 0)[0] = f32::NAN;
    state.fold(0, &NoSlots, &context, &mut FoldScratch::default()).unwrap();
    assert_eq!(kept(&state), [2, 3, 5, 6, 8]);
}

/// `T = 1024`, capacity 10: the step is 512. Old tokens crowd behind the sinks, recent ones keep their
/// distances, and means of received attention stay.
#[test]
fn compaction_moves_slots_closer() {
    let context = context([1.0, 1.0]);
    let mut state = block(learned(), &context);
    let positions = [0, 3, 7, 200, 511, 514, 900, 1021, 1022, 1023];
    state.positions_of_mut(0, 0)[..10].copy_from_slice(&positions);
    state.progress[0] = Progress { seen: 1024, next: 1024, shift: 0, sink_end: 1 };
    let means: Vec<f32> = {
        let view = state.view(0, learned(), &NoSlots, &context);
        (0..10).map(|slot| view.mean_received(0, slot)).collect()
    };
    assert_eq!(state.next_segment(0, &[1024, 1025]).compact, 1);
    let mut scratch = FoldScratch::default();
    let turns = state.compact(0, 1, &mut scratch).to_vec();
    assert_eq!(state.positions_of(0, 0)[..10], [0, 1, 2, 3, 4, 5, 388, 509, 510, 511]);
    assert_eq!(turns[0], Turn { head: 0, slot: 1, by: -2 }, "the sink does not turn");
    assert_eq!(turns.len(), 9);
    state.len[0] = 6;
    state.append(0, &[1024]);
    assert_eq!(state.positions_of(0, 0)[6], 512);
    for (slot, mean) in means.into_iter().enumerate().filter(|&(slot, _)| slot != 6) {
        let age = 512 - state.positions_of(0, 0)[slot];
        let now = state.column_of(0, 0, 0)[slot] / age as f32;
        assert!((now - mean).abs() < 1e-6 * mean.max(1.0), "{slot}: {now} {mean}");
    }
}

/// Ages go by tokens: 1,015 positions without a token do not make tokens before them old, nor sinks of
/// others, before and after compactions that cross several borders at once.
#[test]
fn gaps_age_nobody() {
    let context = context([1.0, 1.0]);
    let settings = CacheSettings { sinks: 2, slots: 10, ..learned() };
    let mut state = BlockState::new(GEOMETRY, 16, SideArrays { columns: 3, per_layer: 0, gaps: true });
    state.open(settings, &context).unwrap();
    state.append(0, &[0, 4, 5, 6, 7, 1000, 1001, 1002, 1003, 1020]);
    let ages = |state: &BlockState| -> Vec<u32> {
        let view = state.view(0, settings, &NoSlots, &context);
        (0..state.len(0)).map(|slot| view.age(0, slot)).collect()
    };
    assert_eq!(ages(&state), [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(state.progress[0].sink_end, 5);
    // Borders lie at 1024, 1536, 2048.
    let next = [2050, 2051];
    assert_eq!(state.next_segment(0, &next), Segment { fold: false, compact: 3, rows: 2 });
    let mut scratch = FoldScratch::default();
    state.compact(0, 3, &mut scratch);
    assert_eq!(state.positions_of(0, 0)[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    state.append(0, &next);
    assert_eq!(state.positions_of(0, 0)[10..12], [514, 515]);
    assert_eq!(ages(&state), [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(state.progress[0].sink_end, 2);
    state.fold(0, &NoSlots, &context, &mut scratch).unwrap();
    let kept = kept(&state);
    assert_eq!(([kept[0], kept[1]], [kept[8], kept[9]]), ([0, 1], [514, 515]), "sinks and recent tokens");
}

/// Whatever slots receive: a fold leaves `M` different tokens, sinks and the latest among them, and
/// side arrays stay with their tokens; never are more than `M + B` slots filled.
mod invariants {
    use proptest::prelude::*;

    use super::*;

    fn settings() -> impl Strategy<Value = CacheSettings> {
        let method = prop::sample::select(vec![
            CacheMethod::H2o,
            CacheMethod::Tova,
            CacheMethod::Observed,
            CacheMethod::Learned,
        ]);
        (method, 4u32..40, 1u32..20, 0u32..1000, 0u32..1000, 0u16..=1000).prop_map(
            |(method, slots, ring, sinks, recent, recall_permille)| {
                let sinks = sinks % (slots / 2 + 1);
                let recent = recent % (slots - sinks);
                CacheSettings { sinks, recent, recall_permille, ..CacheSettings::of(method, slots, ring) }
            },
        )
    }

    proptest! {
        #[test]
        fn hold(settings in settings(), noise in prop::collection::vec(0f32..1.0, 64), total in 50u32..300) {
            let context = context([1.0, 1.0]);
            let capacity = settings.capacity() as usize;
            let mut state = BlockState::new(GEOMETRY, capacity, SideArrays { columns: 3, per_layer: 0, gaps: false });
            state.open(settings, &context).unwrap();
            let mut scratch = FoldScratch::default();
            let random = |i: u32| noise[(i as usize * 7 + 3) % noise.len()];
            while state.seen(0) < total {
                let positions: Vec<u32> = (state.seen(0)..).take(7).collect();
                let segment = state.next_segment(0, &positions);
                if segment.fold {
                    state.fold(0, &NoSlots, &context, &mut scratch).unwrap();
                    let kept = kept(&state);
                    prop_assert_eq!(kept.len() as u32, settings.slots);
                    prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "a token is kept twice");
                    let seen = state.seen(0);
                    for position in (0..settings.sinks).chain(seen - settings.recent..seen) {
                        prop_assert!(kept.binary_search(&position).is_ok(), "{} is gone", position);
                    }
                }
                let first = state.append(0, &positions[..segment.rows]);
                prop_assert!(state.len(0) <= capacity);
                for slot in first..first + segment.rows {
                    let position = state.positions_of(0, 0)[slot];
                    state.column_mut(0, 1, 0)[slot] = position as f32;
                    state.column_mut(0, 2, 0)[slot] = 10.0 * random(position);
                }
                for slot in 0..state.len(0) {
                    let position = state.positions_of(0, 0)[slot];
                    prop_assert_eq!(state.column_of(0, 1, 0)[slot], position as f32);
                    let more = random(position + state.seen(0));
                    state.column_mut(0, 0, 0)[slot] += more;
                }
            }
        }
    }
}
