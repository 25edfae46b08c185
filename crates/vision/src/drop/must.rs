//! MustDrop (arXiv 2411.10803): windows of like patches are merged behind the tower's first layer, then the
//! question's attention drops tokens at four depths of the decoder; a key set that the class token attends
//! to always stays.
//!
//! The release goes by thresholds, which make counts depend on the data; that is `compat`. Ours has a budget:
//! a fixed share of the windows is merged, the most uniform first, and each boundary keeps the same share,
//! down to exactly the budget at the last.

use std::sync::Arc;

use locket_model::{Boundary, Keep, Rank};

use super::{
    Budget, DropMethod, Method, Stage, VisualSettings, attention,
    in_llm::stages,
    rank::{compare, descending},
};
use crate::{
    EncodedImage, Error, ImageLayout, Wants,
    model::{PatchMerge, TileStates},
};

/// Layers of a decoder of 32 behind which tokens are dropped: the boundaries lie before the next ones.
const BOUNDARIES: [usize; 4] = [3, 7, 11, 15];

/// Share of the patches that are key, in hundredths.
const KEY_PERCENT: usize = 8;

/// Least mean cosine of a merged window with `compat`.
const COSINE: f64 = 0.8;

/// Share of the windows that are merged with a budget.
const MERGED: f64 = 0.5;

pub(super) struct Must(pub(super) VisualSettings);

impl Must {
    fn merge_plan(&self, layout: &ImageLayout) -> Option<MergePlan> {
        let windows = Windows::of(layout)?;
        if self.0.compat {
            let least = self.0.merge.unwrap_or(COSINE);
            return Some(MergePlan { windows, rule: Rule::Cosine(least) });
        }
        let least = self.0.effective_budget().of(layout.tokens());
        let most = (windows.count() as f64 * self.0.merge.unwrap_or(MERGED) + 1e-9).floor() as usize;
        let tiles = TileWindows::of(layout, windows);
        let enough = |merged: &usize| layout.tokens() - loss(&tiles, *merged) >= least;
        let merged = (1..=most).rev().find(enough)?;
        Some(MergePlan { windows, rule: Rule::Most { tiles, merged } })
    }

    fn budget(&self, layout: &ImageLayout) -> usize {
        self.0.effective_budget().of(layout.tokens())
    }

    /// Boundaries of a decoder of `layers` and how many of `into` tokens pass, by the budget.
    fn planned(&self, layers: usize, layout: &ImageLayout, into: usize) -> Vec<Stage> {
        let last = self.budget(layout).min(into);
        let share = last as f64 / into.max(1) as f64;
        let planned = BOUNDARIES.iter().zip(1..).map(|(&boundary, stage)| {
            let keep = (into as f64 * share.powf(f64::from(stage) / 4.0)).round() as usize;
            let keep = if stage == 4 { last } else { keep.max(last) };
            ((boundary * layers + 16) / 32, keep)
        });
        stages(layers, into, planned)
    }

    /// Tokens that always stay, the most attended first.
    fn key_set(&self, image: &EncodedImage, kept: &[u32]) -> Result<Vec<u32>, Error> {
        let last = attention(image, &image.cls_final)?;
        let source = |idx: u32| {
            let (tile, patch) = image.layout.source(image.layout.place(idx as usize)?)?;
            Some((idx, last[tile][patch]))
        };
        let (patches, scores): (Vec<u32>, Vec<f32>) = kept.iter().filter_map(|&idx| source(idx)).unzip();
        let key = (patches.len() * KEY_PERCENT).div_ceil(100);
        Ok(descending(&scores).into_iter().take(key).map(|at| patches[at as usize]).collect())
    }
}

impl DropMethod for Must {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        debug_assert_eq!(self.0.method, Method::Must);
        match self.merge_plan(layout) {
            Some(MergePlan { rule: Rule::Most { tiles, merged }, .. }) => {
                layout.tokens() - loss(&tiles, merged)
            }
            _ => layout.tokens(),
        }
    }

    fn wants(&self) -> Wants<'static> {
        Wants { cls_attention: true, ..Wants::default() }
    }

    fn merge(&self, layout: &ImageLayout) -> Option<Box<dyn PatchMerge>> {
        self.merge_plan(layout).map(|plan| Box::new(plan) as Box<dyn PatchMerge>)
    }

    fn stages(&self, layers: usize, layout: &ImageLayout) -> Vec<Stage> {
        if self.0.compat {
            return Vec::new();
        }
        self.planned(layers, layout, self.planned_tokens(layout))
    }

    fn boundaries(&self, layers: usize, image: &EncodedImage, kept: &[u32]) -> Result<Vec<Boundary>, Error> {
        let is_complete = self.0.budget == Some(Budget::ALL);
        if is_complete && !self.0.compat {
            return Ok(Vec::new());
        }
        let key = self.key_set(image, kept)?;
        let rank = |most: usize| {
            let mut rows: Vec<u32> = key.iter().take(most).filter_map(|idx| row(kept, *idx)).collect();
            rows.sort_unstable();
            Rank::TextRows { key_set: Arc::from(rows) }
        };
        if !self.0.compat {
            let planned = self.planned(layers, &image.layout, kept.len());
            let boundary = |Stage { layer, keep }| Boundary {
                layer,
                keep: Keep::Exactly(keep),
                rank: rank(keep as usize),
            };
            return Ok(planned.into_iter().map(boundary).collect());
        }
        let keep = Keep::Above {
            global: self.0.global_threshold as f32,
            individual: self.0.individual_threshold as f32,
        };
        let mut boundaries: Vec<Boundary> = Vec::new();
        for at in BOUNDARIES {
            let layer = ((at * layers + 16) / 32) as u32;
            let is_new = boundaries.last().is_none_or(|last| last.layer < layer);
            if is_new && layer > 0 && (layer as usize) < layers {
                boundaries.push(Boundary { layer, keep, rank: rank(key.len()) });
            }
        }
        Ok(boundaries)
    }

    fn cuts(&self) -> bool {
        true
    }

    fn counts(&self, image: &EncodedImage, kept: &[u32]) -> Vec<u32> {
        let (Some(windows), Some(present)) = (Windows::of(&image.layout), &image.present) else {
            return Vec::new();
        };
        let layout = &image.layout;
        let is_there = |idx: usize| present.binary_search(&(idx as u32)).is_ok();
        let mut counts = vec![1; kept.len()];
        for tile in 0..layout.tiles() {
            for window in 0..windows.count() {
                let mut patches = windows.patches(window).into_iter();
                let first = patches.next().and_then(|patch| layout.index_of_source(tile, patch));
                let mut others = patches.filter_map(|patch| layout.index_of_source(tile, patch)).peekable();
                // Of a window that shows one patch only, nothing tells whether padding was merged into it.
                let is_merged = others.peek().is_some() && others.all(|idx| !is_there(idx));
                let merged = first.filter(|_| is_merged).and_then(|idx| row(kept, idx as u32));
                if let Some(row) = merged {
                    counts[row as usize] = (windows.size * windows.size) as u32;
                }
            }
        }
        counts
    }
}

fn row(kept: &[u32], idx: u32) -> Option<u32> {
    kept.binary_search(&idx).ok().map(|row| row as u32)
}

/// Square windows that cover a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Windows {
    /// Patches along a tile's side.
    side: usize,
    /// Patches along a window's side.
    size: usize,
}

impl Windows {
    /// Windows of 3 or, where that does not fit, 2 patches; `None` where neither does.
    fn of(layout: &ImageLayout) -> Option<Self> {
        let side = layout.side as usize;
        let size = [3, 2].into_iter().find(|size| side.is_multiple_of(*size))?;
        Some(Self { side, size })
    }

    fn count(self) -> usize {
        (self.side / self.size).pow(2)
    }

    /// Patches of a window, ascending.
    fn patches(self, window: usize) -> Vec<usize> {
        let across = self.side / self.size;
        let first = window / across * self.size * self.side + window % across * self.size;
        let cell = |at: usize| first + at / self.size * self.side + at % self.size;
        (0..self.size * self.size).map(cell).collect()
    }
}

/// The windows of one tile, by how much of them is in the run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TileWindows {
    /// Wholly in the run.
    inside: Vec<usize>,
    /// The others, those wholly outside first, and how many tokens are lost if they are merged.
    others: Vec<(usize, usize)>,
    /// Tokens that are lost if a window inside is merged.
    loss: usize,
}

impl TileWindows {
    fn of(layout: &ImageLayout, windows: Windows) -> Vec<Self> {
        let one = |tile: usize| {
            let (mut inside, mut others) = (Vec::new(), Vec::new());
            for window in 0..windows.count() {
                let patches = windows.patches(window);
                let is_shown = |patch: &&usize| layout.index_of_source(tile, **patch).is_some();
                let shown = patches.iter().filter(is_shown).count();
                if shown == patches.len() {
                    inside.push(window);
                } else {
                    others.push((window, shown - patches.iter().take(1).filter(is_shown).count()));
                }
            }
            others.sort_by_key(|&(window, loss)| (loss, window));
            Self { inside, others, loss: windows.size * windows.size - 1 }
        };
        (0..layout.tiles()).map(one).collect()
    }

    /// How many windows inside and how many others are merged if `merged` are in each tile: as many of
    /// each as their share.
    fn split(&self, merged: usize) -> (usize, usize) {
        let all = self.inside.len() + self.others.len();
        let inside = (merged * self.inside.len()).checked_div(all).unwrap_or(0);
        let others = (merged - inside).min(self.others.len());
        (merged - others, others)
    }
}

/// Tokens of the run that are lost if each tile merges `merged` windows.
fn loss(tiles: &[TileWindows], merged: usize) -> usize {
    let one = |tile: &TileWindows| {
        let (inside, others) = tile.split(merged);
        inside * tile.loss + tile.others[..others].iter().map(|other| other.1).sum::<usize>()
    };
    tiles.iter().map(one).sum()
}

/// Which windows of an image are merged.
struct MergePlan {
    windows: Windows,
    rule: Rule,
}

enum Rule {
    /// In each tile those with at least this mean cosine; of these so many as the tile with fewest has.
    Cosine(f64),
    /// In each tile `merged`, the most uniform.
    Most { tiles: Vec<TileWindows>, merged: usize },
}

impl PatchMerge for MergePlan {
    fn groups(&self, states: TileStates<'_>) -> Vec<Vec<Vec<u32>>> {
        let cosines: Vec<Vec<f32>> = (0..states.tiles)
            .map(|tile| (0..self.windows.count()).map(|window| self.cosine(states, tile, window)).collect())
            .collect();
        let best = |tile: usize, among: &[usize], count: usize| {
            let mut order = among.to_vec();
            order.sort_by(|&a, &b| compare(cosines[tile][a], cosines[tile][b]).then(a.cmp(&b)));
            order.truncate(count);
            order
        };
        let chosen: Vec<Vec<usize>> = match &self.rule {
            Rule::Cosine(least) => {
                let above = |cosines: &Vec<f32>| {
                    (0..cosines.len()).filter(|&window| f64::from(cosines[window]) >= *least).collect()
                };
                let above: Vec<Vec<usize>> = cosines.iter().map(above).collect();
                let fewest = above.iter().map(Vec::len).min().unwrap_or(0);
                above.iter().enumerate().map(|(tile, windows)| best(tile, windows, fewest)).collect()
            }
            Rule::Most { tiles, merged } => {
                let of_tile = |(tile, windows): (usize, &TileWindows)| {
                    let (inside, others) = windows.split(*merged);
                    let mut chosen = best(tile, &windows.inside, inside);
                    chosen.extend(windows.others[..others].iter().map(|other| other.0));
                    chosen
                };
                tiles.iter().enumerate().map(of_tile).collect()
            }
        };
        let group =
            |window: usize| self.windows.patches(window).into_iter().map(|patch| patch as u32).collect();
        let groups = |mut windows: Vec<usize>| {
            windows.sort_unstable();
            windows.into_iter().map(group).collect()
        };
        chosen.into_iter().map(groups).collect()
    }
}

impl MergePlan {
    fn cosine(&self, states: TileStates<'_>, tile: usize, window: usize) -> f32 {
        let patches = self.windows.side * self.windows.side;
        let state = |patch: usize| {
            let from = (tile * patches + patch) * states.width;
            &states.states[from..from + states.width]
        };
        let patches = self.windows.patches(window);
        mean_cosine(patches.into_iter().map(state), states.width)
    }
}

/// Mean cosine of all ordered pairs of different vectors: of unit vectors the square of their sum is the sum
/// over all pairs.
fn mean_cosine<'a>(vectors: impl Iterator<Item = &'a [f32]>, width: usize) -> f32 {
    let mut sum = vec![0.0f32; width];
    let (mut count, mut squares) = (0u32, 0.0f32);
    for vector in vectors {
        count += 1;
        let square: f32 = vector.iter().map(|x| x * x).sum();
        if square > 0.0 {
            let scale = square.sqrt().recip();
            squares += 1.0;
            sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += scale * x);
        }
    }
    let pairs = count * count.saturating_sub(1);
    (sum.iter().map(|x| x * x).sum::<f32>() - squares) / pairs.max(1) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        drop::{
            method,
            tests::{encoded, layouts, merged, random_states},
        },
        geometry::testing::{demo, llava_15_7b},
    };

    /// The specification's example, section d.
    #[test]
    fn cosines_by_hand() {
        let of = |vectors: [[f32; 2]; 4]| mean_cosine(vectors.iter().map(|vector| &vector[..]), 2);
        assert!((of([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [1.0, -0.1]]) - 0.99339).abs() < 1e-5);
        assert!((of([[1.0, 0.0], [0.0, 1.0], [0.9, 0.0], [1.0, -0.1]]) - 0.48176).abs() < 1e-5);
    }

    /// With the cosines above, the released threshold merges the first window only.
    #[test]
    fn the_released_threshold_by_hand() {
        let plan = MergePlan { windows: Windows { side: 4, size: 2 }, rule: Rule::Cosine(0.8) };
        let mut states = vec![0.0f32; 32];
        for (at, window) in [
            [[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [1.0, -0.1]],
            [[1.0, 0.0], [0.0, 1.0], [0.9, 0.0], [1.0, -0.1]],
        ]
        .into_iter()
        .enumerate()
        {
            for (patch, vector) in plan.windows.patches(at).into_iter().zip(window) {
                states[patch * 2..patch * 2 + 2].copy_from_slice(&vector);
            }
        }
        // Two windows of zeros have no direction, and none in common.
        let groups = plan.groups(TileStates { tiles: 1, side: 4, width: 2, states: &states });
        assert_eq!(groups, [[[0, 1, 4, 5]]]);
        // A second tile without like windows: the batch merges the fewest.
        let two = [&states[..], &[0.0; 32]].concat();
        let groups = plan.groups(TileStates { tiles: 2, side: 4, width: 2, states: &two });
        assert_eq!(groups, [Vec::<Vec<u32>>::new(), Vec::new()]);
    }

    #[test]
    fn boundaries_go_by_depth() {
        let layout = ImageLayout::of(&llava_15_7b(), 336, 336);
        let must = method(&VisualSettings::of(Method::Must).with_budget(Budget::Count(64))).unwrap();
        // 64 windows of 9 patches, half of them merged: 576 - 32 * 8.
        assert_eq!(must.planned_tokens(&layout), 320);
        let stages: Vec<_> = must.stages(32, &layout).iter().map(|stage| (stage.layer, stage.keep)).collect();
        assert_eq!(stages, [(3, 214), (7, 143), (11, 96), (15, 64)]);
        let layers: Vec<_> = must.stages(30, &layout).iter().map(|stage| stage.layer).collect();
        assert_eq!(layers, [3, 7, 10, 14]);
    }

    #[test]
    fn the_key_set_is_eight_hundredths_of_the_patches() {
        let mut image = encoded(ImageLayout::of(&demo(), 448, 448));
        image.cls_final = (0..5 * 196).map(|at| if at % 100 == 0 { 1.0 } else { 0.0 }).collect();
        let must = Must(VisualSettings::of(Method::Must).with_budget(Budget::Count(50)));
        let kept = must.before_llm(&image).unwrap();
        let key = must.key_set(&image, &kept).unwrap();
        assert_eq!(key.len(), 79);
        let boundaries = must.boundaries(30, &image, &kept).unwrap();
        let keys: Vec<usize> = boundaries
            .iter()
            .map(|boundary| match &boundary.rank {
                Rank::TextRows { key_set } => key_set.len(),
                Rank::LastToken => 0,
            })
            .collect();
        // At the last boundary the budget is smaller than the key set.
        assert_eq!(*keys.last().unwrap(), 50);
        assert_eq!(keys[0], 79);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// What is planned from the layout alone is what the tower is made to leave, whatever it computed,
        /// and every patch is counted once.
        #[test]
        fn merged_tokens_are_as_planned(layout in layouts(), share in 0.02..1.0f64, merge in 0.0..=1.0f64, seed in any::<u64>()) {
            let settings = VisualSettings { merge: Some(merge), ..VisualSettings::of(Method::Must) };
            let must = Must(settings.with_budget(Budget::Fraction(share)));
            let states = random_states(&layout, 3, seed);
            let merge = must.merge(&layout);
            let image = merged(&layout, merge.as_deref(), &states, 3);
            let plan = must.plan(30, &image).unwrap();
            prop_assert_eq!(plan.kept.len(), must.planned_tokens(&layout));
            prop_assert!(plan.kept.len() >= must.budget(&layout));
            let lengths: Vec<usize> = merge.iter().flat_map(|merge| {
                let states = TileStates { tiles: layout.tiles(), side: layout.side as usize, width: 3, states: &states };
                merge.groups(states).into_iter().map(|groups| groups.len())
            }).collect();
            prop_assert!(lengths.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", lengths);
            if layout.map.is_none() && !plan.counts.is_empty() {
                prop_assert_eq!(plan.counts.iter().sum::<u32>() as usize, layout.tokens());
            }
        }
    }
}
