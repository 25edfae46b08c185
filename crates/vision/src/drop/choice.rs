//! A choice under an exact budget in which a row's newline may cost a token.

use crate::{
    ImageLayout, Place,
    drop::{Newline, VisualSettings},
};

/// Tokens chosen so far.
pub(super) struct Choice<'a> {
    layout: &'a ImageLayout,
    newline: Newline,
    budget: usize,
    chosen: Vec<bool>,
    count: usize,
}

impl<'a> Choice<'a> {
    /// Nothing is chosen yet.
    pub(super) fn new(layout: &'a ImageLayout, settings: &VisualSettings) -> Self {
        let budget = settings.effective_budget().of(layout.tokens());
        Self { layout, newline: settings.newline, budget, chosen: vec![false; layout.tokens()], count: 0 }
    }

    /// Tokens that may still be chosen.
    pub(super) fn room(&self) -> usize {
        self.budget - self.count
    }

    /// The newline that would come with `idx` and is not there yet.
    fn newline_of(&self, idx: usize) -> Option<usize> {
        if self.newline == Newline::None {
            return None;
        }
        let Some(Place::Map { row, .. }) = self.layout.place(idx) else { return None };
        self.layout.index(Place::Newline { row }).filter(|&newline| !self.chosen[newline])
    }

    /// Chooses `idx` and what comes with it, if it is new and there is room for both.
    pub(super) fn add(&mut self, idx: usize) {
        let newline = self.newline_of(idx);
        let cost = 1 + usize::from(newline.is_some());
        if self.chosen[idx] || cost > self.room() {
            return;
        }
        self.chosen[idx] = true;
        if let Some(newline) = newline {
            self.chosen[newline] = true;
        }
        self.count += cost;
    }

    /// Chooses from `order` until nothing more fits.
    pub(super) fn add_all(&mut self, order: impl IntoIterator<Item = usize>) {
        for idx in order {
            if self.room() == 0 {
                return;
            }
            self.add(idx);
        }
    }

    /// Chooses `select(count)` for the largest count with whose newlines it fits. `select` gives `count`
    /// different patches; the larger the count, the more or the fewer newlines they may bring.
    pub(super) fn add_most(&mut self, most: usize, select: impl Fn(usize) -> Vec<usize>) {
        let room = self.room();
        let fits = |count: usize| {
            let selected = select(count);
            let mut newlines: Vec<usize> = selected.iter().filter_map(|&idx| self.newline_of(idx)).collect();
            newlines.sort_unstable();
            newlines.dedup();
            (selected.len() + newlines.len() <= room).then_some(selected)
        };
        if let Some(selected) = (0..=most.min(room)).rev().find_map(fits) {
            self.add_all(selected);
        }
    }

    /// What is chosen, ascending. Where patches cannot use up the budget, newlines do.
    pub(super) fn finish(mut self) -> Vec<u32> {
        for idx in 0..self.chosen.len() {
            if self.room() == 0 {
                break;
            }
            if !self.chosen[idx] && matches!(self.layout.place(idx), Some(Place::Newline { .. })) {
                self.chosen[idx] = true;
                self.count += 1;
            }
        }
        (0..self.chosen.len() as u32).filter(|&idx| self.chosen[idx as usize]).collect()
    }
}

/// Tokens of all patches of all tiles, the whole image first, tile by tile.
pub(super) fn patches(layout: &ImageLayout) -> impl Iterator<Item = (usize, (usize, usize))> {
    let patches = layout.base_tokens();
    (0..layout.tiles()).flat_map(move |tile| {
        (0..patches).filter_map(move |patch| Some((layout.index_of_source(tile, patch)?, (tile, patch))))
    })
}

/// Tokens of all patches, those with the largest `scores [tiles][patches]` first.
pub(super) fn by_score(layout: &ImageLayout, scores: &[&[f32]]) -> Vec<usize> {
    let score = |(tile, patch): (usize, usize)| scores[tile][patch];
    let mut scored: Vec<(usize, f32)> = patches(layout).map(|(idx, source)| (idx, score(source))).collect();
    scored.sort_by(|a, b| super::rank::compare(a.1, b.1).then(a.0.cmp(&b.0)));
    scored.into_iter().map(|(idx, _)| idx).collect()
}
