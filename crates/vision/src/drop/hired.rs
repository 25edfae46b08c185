//! HiRED (arXiv 2408.10945): the class token's attention of an early layer shares a budget over the tiles,
//! that of a late layer chooses within them.
//!
//! Ours differs from the released code on purpose: tiles get their share by the rectangle that they show, not
//! by a strip of the flattened whole image; padded patches are never chosen; and what rounding down loses is
//! handed out, so that counts are exact. The budget is a share of the tokens that the image really has.
//! `compat` is the released rule: a share of all patches, padded ones included, of which unpadding then
//! removes some.

use super::{
    DropMethod, Method, VisualSettings, attention,
    choice::{Choice, by_score},
    everything,
    rank::{self, apportion},
};
use crate::{EncodedImage, Error, ImageLayout, Wants, drop::Budget};

pub(super) struct Hired(pub(super) VisualSettings);

impl DropMethod for Hired {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        if self.0.compat && self.0.effective_budget() != Budget::ALL {
            return compat_total(&self.0, layout).clamp(1, layout.tokens());
        }
        self.0.effective_budget().of(layout.tokens())
    }

    fn wants(&self) -> Wants<'static> {
        Wants { cls_attention: true, ..Wants::default() }
    }

    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        debug_assert_eq!(self.0.method, Method::Hired);
        let layout = &image.layout;
        let budget = self.0.effective_budget();
        let is_complete =
            if self.0.compat { budget == Budget::ALL } else { budget.of(layout.tokens()) == layout.tokens() };
        if is_complete {
            return Ok(everything(image));
        }
        let initial = attention(image, &image.cls_initial)?;
        let last = attention(image, &image.cls_final)?;
        Ok(if self.0.compat {
            compat(&self.0, layout, initial[0], &last)
        } else {
            exact(&self.0, layout, initial[0], &last)
        })
    }
}

/// Our rule: exactly the budget.
fn exact(settings: &VisualSettings, layout: &ImageLayout, initial: &[f32], last: &[&[f32]]) -> Vec<u32> {
    let mut choice = Choice::new(layout, settings);
    let base = layout.base_tokens();
    let total = choice.room();
    let tiles = layout.tiles() - 1;
    let whole = match tiles {
        0 => total.min(base),
        _ => share_of_whole(total, settings.alpha).min(base),
    };
    choice.add_all(rank::descending(last[0]).into_iter().map(|patch| patch as usize).take(whole));
    // Each tile's tokens, best first; padded patches are not among them.
    let ranked: Vec<Vec<usize>> = (1..=tiles)
        .map(|tile| {
            let order = rank::descending(last[tile]).into_iter();
            order.filter_map(|patch| layout.index_of_source(tile, patch as usize)).collect()
        })
        .collect();
    let room: Vec<usize> = ranked.iter().map(Vec::len).collect();
    let scores = rectangle_scores(layout, initial);
    let most = room.iter().sum();
    if tiles > 0 {
        choice.add_most(most, |count| {
            let shares = apportion(count, &scores, &room);
            ranked.iter().zip(shares).flat_map(|(ranked, share)| ranked[..share].iter().copied()).collect()
        });
    }
    // Caps and newlines leave a rest; it goes to the best that are left, wherever they are.
    choice.add_all(by_score(layout, last));
    choice.finish()
}

fn share_of_whole(total: usize, alpha: f64) -> usize {
    (total as f64 * alpha + 1e-9).floor() as usize
}

/// Sum of the whole image's early attention over what each tile shows.
fn rectangle_scores(layout: &ImageLayout, initial: &[f32]) -> Vec<f64> {
    let mut scores = vec![0.0; layout.tiles() - 1];
    for (patch, &weight) in initial.iter().enumerate() {
        if let Some(tile) = tile_of_base(layout, patch) {
            scores[tile] += f64::from(weight);
        }
    }
    scores
}

/// The tile, from 0, that shows what the whole image's `patch` shows. The whole image has no padding, so it
/// lies over the unpadded map.
fn tile_of_base(layout: &ImageLayout, patch: usize) -> Option<usize> {
    let map = layout.map?;
    let side = layout.side as usize;
    let tile = |at: usize, extent: u32, first: u32, tiles: u32| {
        let middle = (at as f64 + 0.5) / side as f64 * f64::from(extent) + f64::from(first);
        ((middle / side as f64) as u32).min(tiles.saturating_sub(1))
    };
    let row = tile(patch / side, map.size.0, map.first.0, map.grid.0);
    let col = tile(patch % side, map.size.1, map.first.1, map.grid.1);
    Some((row * map.grid.1 + col) as usize)
}

/// The released code's total: a share of all patches, padded ones too.
fn compat_total(settings: &VisualSettings, layout: &ImageLayout) -> usize {
    settings.effective_budget().of(layout.tiles() * layout.base_tokens())
}

/// The released rule.
fn compat(settings: &VisualSettings, layout: &ImageLayout, initial: &[f32], last: &[&[f32]]) -> Vec<u32> {
    let patches = layout.base_tokens();
    let tiles = layout.tiles() - 1;
    let total = compat_total(settings, layout);
    let whole = if tiles == 0 { total } else { share_of_whole(total, settings.alpha) }.min(patches);
    let rest = (total - whole).min(tiles * patches);
    let mut kept = rank::best(last[0], whole);
    let shares = strip_shares(initial, settings.alpha, tiles, rest);
    for (tile, share) in (1..).zip(shares) {
        let chosen = rank::best(last[tile], share).into_iter();
        kept.extend(
            chosen.filter_map(|patch| layout.index_of_source(tile, patch as usize)).map(|idx| idx as u32),
        );
    }
    kept.sort_unstable();
    if kept.is_empty() {
        // Where everything that was chosen is padding; an image without a token cannot be asked about.
        kept.extend(rank::best(last[0], 1));
    }
    kept
}

/// Tokens of each tile by the released code: the `patches * (1 - alpha)` most attended patches of the whole
/// image are counted in strips of the flattened image, one strip per tile.
fn strip_shares(initial: &[f32], alpha: f64, tiles: usize, total: usize) -> Vec<usize> {
    let patches = initial.len();
    let mut marks = vec![0usize; tiles];
    for patch in rank::best(initial, share_of_whole(patches, 1.0 - alpha)) {
        if let Some(marks) = marks.get_mut(patch as usize * tiles / patches) {
            *marks += 1;
        }
    }
    let sum: usize = marks.iter().sum();
    marks.into_iter().map(|marks| (marks * total).checked_div(sum).unwrap_or(0).min(patches)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Place,
        drop::{
            Newline, method,
            tests::{EXAMPLE_INITIAL, EXAMPLE_LAST, encoded, example_layout},
        },
    };

    fn example(change: impl FnOnce(&mut VisualSettings)) -> Vec<u32> {
        let mut settings = VisualSettings::of(Method::Hired).with_budget(Budget::Count(24));
        change(&mut settings);
        let mut image = encoded(example_layout());
        image.cls_initial[..16].copy_from_slice(&EXAMPLE_INITIAL);
        image.cls_final = EXAMPLE_LAST.concat();
        let method = method(&settings).unwrap();
        let kept = method.before_llm(&image).unwrap();
        assert!(kept.len() <= method.planned_tokens(&image.layout));
        kept
    }

    fn map_places(kept: &[u32]) -> Vec<(u32, u32)> {
        let places = kept.iter().map(|&idx| example_layout().place(idx as usize).unwrap());
        places
            .filter_map(|place| if let Place::Map { row, col } = place { Some((row, col)) } else { None })
            .collect()
    }

    /// The specification's example, section b.
    #[test]
    fn the_papers_rule_by_hand() {
        let kept = example(|_| ());
        assert_eq!(kept[..12], [1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 14, 15]);
        let map =
            [(0, 0), (0, 6), (0, 7), (1, 5), (2, 4), (2, 6), (2, 7), (7, 0), (7, 4), (7, 5), (7, 6), (7, 7)];
        assert_eq!(map_places(&kept), map);
        assert_eq!(kept.len(), 24);
    }

    #[test]
    fn rectangles_are_what_tiles_show() {
        let scores = rectangle_scores(&example_layout(), &EXAMPLE_INITIAL);
        for (score, expected) in scores.iter().zip([0.10, 0.45, 0.09, 0.36]) {
            assert!((score - expected).abs() < 1e-6, "{scores:?}");
        }
        let tiles: Vec<_> = (0..16).map(|patch| tile_of_base(&example_layout(), patch).unwrap()).collect();
        assert_eq!(tiles, [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]);
    }

    /// The specification's example: marks 2 3 5 6 7 10 11 15 are 2 3 2 1 by strip.
    #[test]
    fn the_released_rule_by_hand() {
        assert_eq!(strip_shares(&EXAMPLE_INITIAL, 0.5, 4, 12), [3, 4, 3, 1]);
        let kept = example(|settings| {
            settings.compat = true;
            settings.budget = Some(Budget::Fraction(0.3));
        });
        assert_eq!(kept.len(), 23);
        assert_eq!(kept[..12], [1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 14, 15]);
    }

    /// Rows with a token have their newline, no others do, and the count is the same.
    #[test]
    fn newlines_are_inside_the_budget() {
        let kept = example(|settings| settings.newline = Newline::Rows);
        assert_eq!(kept.len(), 24);
        let layout = example_layout();
        for row in 0..8 {
            let has_token = map_places(&kept).iter().any(|place| place.0 == row);
            let newline = layout.index(Place::Newline { row }).unwrap() as u32;
            assert_eq!(kept.contains(&newline), has_token, "row {row}");
        }
    }

    #[test]
    fn without_tiles_the_whole_image_has_all() {
        let layout = crate::ImageLayout { map: None, ..example_layout() };
        let mut image = encoded(layout);
        image.cls_final = EXAMPLE_LAST[0].to_vec();
        let settings = VisualSettings::of(Method::Hired).with_budget(Budget::Fraction(0.25));
        assert_eq!(method(&settings).unwrap().before_llm(&image).unwrap(), [2, 6, 10, 15]);
    }

    #[test]
    fn missing_scores_are_an_error() {
        let image = EncodedImage { cls_final: Vec::new(), ..encoded(example_layout()) };
        let error = Hired(VisualSettings::of(Method::Hired)).before_llm(&image).unwrap_err();
        assert!(error.to_string().contains("class-token scores"), "{error}");
    }
}
