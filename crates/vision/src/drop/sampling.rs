//! Everything, and the baselines that look at nothing.

use super::{
    DropMethod, VisualSettings,
    choice::{Choice, patches},
};
use crate::{EncodedImage, Error, ImageLayout, Wants};

/// Nothing is dropped.
pub(super) struct Everything(pub(super) VisualSettings);

impl DropMethod for Everything {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }
}

/// Patches in random order, by the seed and the image's shape alone.
pub(super) struct Random(pub(super) VisualSettings);

impl DropMethod for Random {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        self.0.effective_budget().of(layout.tokens())
    }

    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        let mut order: Vec<(u64, usize)> =
            patches(&image.layout).map(|(idx, _)| (mixed(self.0.seed, idx as u64), idx)).collect();
        order.sort_unstable();
        let mut choice = Choice::new(&image.layout, &self.0);
        choice.add_all(order.into_iter().map(|(_, idx)| idx));
        Ok(choice.finish())
    }
}

/// A hash of both: SplitMix64's steps. Its own arithmetic, so that no library's change moves a choice.
fn mixed(seed: u64, value: u64) -> u64 {
    let step = |state: u64| {
        let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ (state >> 31)
    };
    step(step(seed) ^ value)
}

/// Evenly spaced patches of the run.
pub(super) struct Uniform(pub(super) VisualSettings);

impl DropMethod for Uniform {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        self.0.effective_budget().of(layout.tokens())
    }

    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        let mut all: Vec<usize> = patches(&image.layout).map(|(idx, _)| idx).collect();
        all.sort_unstable();
        let mut choice = Choice::new(&image.layout, &self.0);
        choice.add_most(all.len(), |count| spaced(all.len(), count).map(|at| all[at]).collect());
        choice.add_all(all.iter().copied());
        Ok(choice.finish())
    }
}

/// `count` of `all` indices, the first and the last among them, rounded to the nearest.
fn spaced(all: usize, count: usize) -> impl Iterator<Item = usize> {
    let steps = count.saturating_sub(1).max(1);
    (0..count).map(move |at| (2 * at * all.saturating_sub(1) + steps) / (2 * steps))
}

/// The whole, shrunk image and none of its tiles, which are not even encoded: its tokens are all that a budget
/// is a share of. Evenly spaced ones of them with a budget below 1.
pub(super) struct Thumbnail(pub(super) VisualSettings);

impl DropMethod for Thumbnail {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        self.0.effective_budget().of(layout.base_tokens())
    }

    fn wants(&self) -> Wants<'static> {
        Wants { base_only: true, ..Wants::default() }
    }

    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        let base = image.layout.base_tokens();
        let budget = self.0.effective_budget().of(base);
        Ok(spaced(base, budget).map(|idx| idx as u32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drop::{
        Budget, Method,
        tests::{encoded, example_layout},
    };

    #[test]
    fn spacing_has_both_ends_and_no_repeats() {
        assert_eq!(spaced(10, 4).collect::<Vec<_>>(), [0, 3, 6, 9]);
        assert_eq!(spaced(10, 1).collect::<Vec<_>>(), [0]);
        assert_eq!(spaced(10, 10).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        assert_eq!(spaced(0, 0).count(), 0);
    }

    #[test]
    fn seeds_choose_differently_and_always_the_same() {
        let image = encoded(example_layout());
        let choose = |seed| {
            let settings = VisualSettings { seed, ..VisualSettings::of(Method::Random) };
            Random(settings.with_budget(Budget::Count(20))).before_llm(&image).unwrap()
        };
        assert_eq!(choose(1), choose(1));
        assert_ne!(choose(1), choose(2));
    }

    #[test]
    fn a_thumbnail_is_the_base() {
        let image = encoded(example_layout());
        let settings = VisualSettings::of(Method::Thumbnail);
        assert_eq!(Thumbnail(settings).before_llm(&image).unwrap(), (0..16).collect::<Vec<u32>>());
        let few = Thumbnail(settings.with_budget(Budget::Count(4)));
        assert_eq!(few.before_llm(&image).unwrap(), [0, 5, 10, 15]);
        assert_eq!(few.planned_tokens(&image.layout), 4);
    }
}
