//! What holds for every method, over random images: exact counts, order, repeatability, completeness.

use proptest::prelude::*;

use super::*;
use crate::{
    VisionGeometry,
    geometry::testing::{demo, llava_15_7b, llava_next_7b},
    layout::{Fit, MapLayout},
    model::TileStates,
};

/// The whole image's early attention of the specification's example, section b.
pub(super) const EXAMPLE_INITIAL: [f32; 16] =
    [0.02, 0.03, 0.12, 0.10, 0.01, 0.04, 0.15, 0.08, 0.02, 0.02, 0.05, 0.06, 0.03, 0.02, 0.04, 0.21];

/// Its late attention: the whole image, then four tiles.
pub(super) const EXAMPLE_LAST: [[f32; 16]; 5] = [
    [0.01, 0.02, 0.20, 0.05, 0.02, 0.03, 0.25, 0.04, 0.01, 0.01, 0.06, 0.05, 0.02, 0.01, 0.02, 0.20],
    [0.30, 0.02, 0.03, 0.01, 0.05, 0.04, 0.02, 0.03, 0.10, 0.02, 0.08, 0.05, 0.07, 0.06, 0.04, 0.08],
    [0.01, 0.02, 0.20, 0.05, 0.02, 0.30, 0.03, 0.04, 0.11, 0.01, 0.06, 0.05, 0.02, 0.01, 0.02, 0.05],
    [0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.07, 0.07, 0.07, 0.07],
    [0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.10, 0.10, 0.10, 0.10],
];

/// The example's layout: tiles of 4x4 patches, 2x2 of them, nothing padded.
pub(super) fn example_layout() -> ImageLayout {
    let fit = Fit { resized: (112, 112), offset: (0, 0) };
    let map = MapLayout { grid: (2, 2), fit, first: (0, 0), size: (8, 8), has_newlines: true };
    ImageLayout { height: 112, width: 112, patch: 14, side: 4, base: fit, map: Some(map) }
}

/// An encoding with features, scores and patch features that differ from token to token.
pub(super) fn encoded(layout: ImageLayout) -> EncodedImage {
    let (tokens, patches) = (layout.tokens(), layout.tiles() * layout.base_tokens());
    let value = |at: usize, salt: usize| ((at * 2_654_435_761 + salt * 40_503) % 9973) as f32 / 9973.0;
    EncodedImage {
        layout,
        hidden_size: 2,
        features: (0..tokens * 2).map(|at| at as f32).collect(),
        present: None,
        cls_initial: (0..patches).map(|at| value(at, 1) / 100.0).collect(),
        cls_final: (0..patches).map(|at| value(at, 2).powi(4) / 100.0).collect(),
        patch_features: (0..patches * 6).map(|at| value(at, 3) - 0.5).collect(),
    }
}

/// Layer-0 states `[tiles, patches, width]`.
pub(super) fn random_states(layout: &ImageLayout, width: usize, seed: u64) -> Vec<f32> {
    use rand::{Rng as _, SeedableRng as _};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let numbers = layout.tiles() * layout.base_tokens() * width;
    (0..numbers).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// What the tower's part of a merge does to an encoding.
pub(super) fn merged(
    layout: &ImageLayout,
    merge: Option<&dyn PatchMerge>,
    states: &[f32],
    width: usize,
) -> EncodedImage {
    let mut image = encoded(layout.clone());
    let Some(merge) = merge else { return image };
    let states = TileStates { tiles: layout.tiles(), side: layout.side as usize, width, states };
    let mut is_there = vec![true; layout.tokens()];
    for (tile, groups) in merge.groups(states).into_iter().enumerate() {
        for group in groups {
            assert!(group.len() > 1 && group.is_sorted_by(|a, b| a < b));
            for &patch in &group[1..] {
                if let Some(idx) = layout.index_of_source(tile, patch as usize) {
                    assert!(is_there[idx], "a patch is in two groups");
                    is_there[idx] = false;
                }
                image.cls_final[tile * layout.base_tokens() + patch as usize] = 0.0;
            }
        }
    }
    image.present = Some((0..layout.tokens() as u32).filter(|&idx| is_there[idx as usize]).collect());
    image
}

/// LLaVA-NeXT's, LLaVA-1.5's and the demo model's geometry with sides of 4 to 8 patches.
fn geometries() -> impl Strategy<Value = VisionGeometry> {
    let scaled = |geometry: VisionGeometry, side: u32| {
        let (tile, old) = (side * geometry.patch, geometry.tile);
        let pinpoints = geometry.pinpoints.iter().map(|&(h, w)| (h / old * tile, w / old * tile)).collect();
        VisionGeometry { tile, pinpoints, ..geometry }
    };
    let base = prop::sample::select(vec![llava_next_7b(), llava_15_7b(), demo()]);
    (base, 4u32..9).prop_map(move |(geometry, side)| scaled(geometry, side))
}

/// Layouts of random images.
pub(super) fn layouts() -> impl Strategy<Value = ImageLayout> {
    (geometries(), 1u32..3000, 1u32..3000)
        .prop_map(|(geometry, height, width)| ImageLayout::of(&geometry, height, width))
}

const BEFORE: [Method; 4] = [Method::Hired, Method::Dpp, Method::Random, Method::Uniform];
const INSIDE: [Method; 3] = [Method::Pyramid, Method::Must, Method::Fastv];

fn ascends(kept: &[u32], run: u32) -> bool {
    kept.is_sorted_by(|a, b| a < b) && kept.last().is_none_or(|&last| last < run)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// Budgets are met exactly by what was planned from the size alone; what stays is in order, and again.
    #[test]
    fn budgets_are_exact(
        layout in layouts(),
        share in 0.001..=1.0f64,
        method_idx in 0usize..4,
        rows in any::<bool>(),
        alpha in 0.0..=1.0f64,
        seed in any::<u64>(),
    ) {
        let newline = if rows { Newline::Rows } else { Newline::None };
        let settings = VisualSettings { newline, alpha, seed, ..VisualSettings::of(BEFORE[method_idx]) };
        let method = method(&settings.with_budget(Budget::Fraction(share))).unwrap();
        let image = encoded(layout.clone());
        let plan = method.plan(30, &image).unwrap();
        prop_assert_eq!(plan.kept.len(), Budget::Fraction(share).of(layout.tokens()));
        prop_assert_eq!(plan.kept.len(), method.planned_tokens(&layout));
        prop_assert!(ascends(&plan.kept, plan.run));
        prop_assert_eq!(method.plan(30, &image).unwrap(), plan);
    }

    /// Inside the decoder, too: stages from the size alone are those of the plan, the last is the budget.
    #[test]
    fn stages_are_exact(layout in layouts(), share in 0.001..=1.0f64, method_idx in 0usize..3, layers in 1usize..40, seed in any::<u64>()) {
        let settings = VisualSettings::of(INSIDE[method_idx]).with_budget(Budget::Fraction(share));
        let method = method(&settings).unwrap();
        let states = random_states(&layout, 2, seed);
        let image = merged(&layout, method.merge(&layout).as_deref(), &states, 2);
        let plan = method.plan(layers, &image).unwrap();
        let stages = method.stages(layers, &layout);
        prop_assert_eq!(plan.kept.len(), method.planned_tokens(&layout));
        prop_assert_eq!(&plan.stages(), &stages);
        prop_assert!(stages.windows(2).all(|pair| pair[0].layer < pair[1].layer && pair[0].keep > pair[1].keep));
        prop_assert!(stages.iter().all(|stage| stage.layer > 0 && (stage.layer as usize) < layers));
        let budget = Budget::Fraction(share).of(layout.tokens()) as u32;
        let last = *tokens_by_layer(layers, plan.kept.len(), &stages).last().unwrap();
        prop_assert!(last >= budget);
        if let Some(stage) = stages.last() {
            prop_assert_eq!(stage.keep, budget);
        }
    }

    /// The whole budget is no dropping: everything, newlines too, bit for bit.
    #[test]
    fn the_whole_budget_keeps_everything(layout in layouts(), method_idx in 0usize..7, rows in any::<bool>()) {
        let chosen = [&BEFORE[..], &INSIDE[..]].concat()[method_idx];
        let newline = if rows && !chosen.drops_in_llm() { Newline::Rows } else { Newline::None };
        let settings = VisualSettings { newline, ..VisualSettings::of(chosen) }.with_budget(Budget::ALL);
        let method = method(&settings).unwrap();
        prop_assert!(method.merge(&layout).is_none());
        let image = encoded(layout.clone());
        let plan = method.plan(30, &image).unwrap();
        prop_assert!(plan.is_complete());
        prop_assert_eq!(plan.gather(&image.features, 2).unwrap(), image.features.to_vec());
        prop_assert_eq!(plan.offsets(Positions::Original), plan.offsets(Positions::Compact));
        prop_assert_eq!(method.planned_tokens(&layout), layout.tokens());
    }

    /// With a newline per row no token's row lacks its newline, and, unless patches ran out, no newline is
    /// without one.
    #[test]
    fn rows_have_their_newlines(layout in layouts(), share in 0.001..0.9f64, method_idx in 0usize..4) {
        let settings = VisualSettings { newline: Newline::Rows, ..VisualSettings::of(BEFORE[method_idx]) };
        let method = method(&settings.with_budget(Budget::Fraction(share))).unwrap();
        let plan = method.plan(30, &encoded(layout.clone())).unwrap();
        for &idx in &plan.kept {
            if let Some(crate::Place::Map { row, .. }) = layout.place(idx as usize)
                && let Some(newline) = layout.index(crate::Place::Newline { row })
            {
                prop_assert!(plan.kept.contains(&(newline as u32)), "row {}", row);
            }
        }
    }

    /// The released rule never keeps more than was planned, and always something.
    #[test]
    fn the_released_rule_is_bounded(layout in layouts(), share in 0.001..=1.0f64) {
        let settings = VisualSettings { compat: true, ..VisualSettings::of(Method::Hired) };
        let method = method(&settings.with_budget(Budget::Fraction(share))).unwrap();
        let plan = method.plan(30, &encoded(layout.clone())).unwrap();
        prop_assert!((1..=method.planned_tokens(&layout)).contains(&plan.kept.len()));
        prop_assert!(ascends(&plan.kept, plan.run));
    }
}

#[test]
fn gathered_rows_are_the_kept_ones() {
    let image = encoded(example_layout());
    let plan = VisualPlan { kept: vec![1, 3], run: image.layout.tokens() as u32, ..VisualPlan::default() };
    assert_eq!(plan.gather(&image.features, 2).unwrap(), [2.0, 3.0, 6.0, 7.0]);
    assert_eq!(plan.offsets(Positions::Compact), [0, 1]);
    assert_eq!((plan.span(Positions::Original), plan.span(Positions::Compact)), (88, 2));
    assert!(plan.gather(&image.features, 3).is_err());
}

/// 1,008 tokens over 30 layers: with all in for 8 layers, 46.9 % is a mean of 483 by the specification.
#[test]
fn budgets_for_a_mean_are_the_largest() {
    let layout = ImageLayout::of(&demo(), 448, 448);
    assert_eq!(layout.tokens(), 1008);
    let pyramid = method(&VisualSettings::of(Method::Pyramid)).unwrap();
    let mean = mean_tokens(30, 1008, &pyramid.stages(30, &layout));
    assert!((mean - 483.0).abs() < 1.0, "{mean}");
    let budget = budget_for_mean(&VisualSettings::of(Method::Hired), 30, &layout, 201.6);
    assert_eq!(budget, Some(Budget::Count(201)));
    let must = VisualSettings::of(Method::Must);
    let Some(Budget::Count(count)) = budget_for_mean(&must, 30, &layout, 336.0) else { panic!() };
    let mean = |count| {
        let must = method(&must.with_budget(Budget::Count(count))).unwrap();
        mean_tokens(30, must.planned_tokens(&layout), &must.stages(30, &layout))
    };
    assert!(mean(count) <= 336.0 && mean(count + 1) > 336.0);
    assert_eq!(budget_for_mean(&VisualSettings::of(Method::Fastv), 30, &layout, 20.0), None);
}

#[test]
fn an_encoding_that_contradicts_its_layout_is_refused() {
    let method = method(&VisualSettings::of(Method::Random)).unwrap();
    let mut image = encoded(example_layout());
    image.present = Some(vec![3, 3]);
    assert!(method.plan(30, &image).is_err());
    image.present = None;
    image.hidden_size = 3;
    assert!(method.plan(30, &image).is_err());
}
