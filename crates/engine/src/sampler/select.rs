//! The best tokens of a row without sorting it.

use super::weights::{Weights, max};

/// Logits whose maximum is looked at first.
const GROUP: usize = 64;
/// Ranges this short are sorted.
const SORTED: usize = 32;

/// Keeps the tokens up to and including one, in the order: larger logit first, then lower id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cut {
    /// Logit of the last token kept.
    pub value: f32,
    /// Its id.
    pub id: u32,
}

impl Cut {
    /// Keeps all.
    pub(crate) const NONE: Self = Self { value: f32::NEG_INFINITY, id: u32::MAX };

    /// Keeps logits of at least `value`.
    pub(crate) fn at_least(value: f32) -> Self {
        Self { value, id: u32::MAX }
    }

    pub(crate) fn is_none(self) -> bool {
        self == Self::NONE
    }

    #[inline(always)]
    pub(crate) fn keeps(self, logit: f32, id: u32) -> bool {
        logit > self.value || (logit == self.value && id <= self.id)
    }

    /// The cut that keeps what both keep.
    pub(crate) fn tighter(self, other: Self) -> Self {
        if self.keeps(other.value, other.id) { other } else { self }
    }
}

/// A token in a selection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub logit: f32,
    pub id: u32,
    weight: f32,
}

fn better_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Buffers of selections.
#[derive(Debug, Default)]
pub(crate) struct SelectScratch {
    maxima: Vec<f32>,
    sorted_maxima: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// The first of the largest logits.
pub(crate) fn argmax(row: &[f32]) -> u32 {
    let best = max(row);
    row.iter().position(|&x| x == best).unwrap_or(0) as u32
}

impl SelectScratch {
    /// The cut that keeps the `count` best tokens; masked ones (-inf) are never kept for their
    /// number.
    pub(crate) fn best(&mut self, row: &[f32], count: usize) -> Cut {
        self.collect_best(row, count);
        if count == 0 || self.candidates.len() < count {
            // There are not that many: everything that is not masked.
            return Cut::at_least(f32::MIN);
        }
        let (_, last, _) = self.candidates.select_nth_unstable_by(count - 1, better_first);
        Cut { value: last.logit, id: last.id }
    }

    /// The `count` best tokens, best first, equal ones by lower id.
    pub(crate) fn best_sorted(&mut self, row: &[f32], count: usize) -> &[Candidate] {
        self.collect_best(row, count);
        if self.candidates.len() > count && count > 0 {
            self.candidates.select_nth_unstable_by(count - 1, better_first);
        }
        self.candidates.truncate(count);
        self.candidates.sort_unstable_by(better_first);
        &self.candidates
    }

    /// Collects the `count` best tokens and few others: those at or above the `count`-th largest
    /// of the maxima of groups, since that many groups have at least one token there.
    fn collect_best(&mut self, row: &[f32], count: usize) {
        self.find_maxima(row);
        let mut lowest = f32::MIN;
        if count > 0 && count <= self.maxima.len() {
            self.sorted_maxima.clear();
            self.sorted_maxima.extend_from_slice(&self.maxima);
            let (_, nth, _) = self.sorted_maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
            lowest = nth.max(f32::MIN);
        }
        self.collect(row, Cut::at_least(lowest), |_| 0.0);
    }

    fn find_maxima(&mut self, row: &[f32]) {
        self.maxima.clear();
        self.maxima.extend(row.chunks(GROUP).map(max));
    }

    /// Collects what `cut` keeps. Needs the maxima.
    fn collect(&mut self, row: &[f32], cut: Cut, weight: impl Fn(f32) -> f32) {
        self.candidates.clear();
        for (group, (logits, &best)) in row.chunks(GROUP).zip(&self.maxima).enumerate() {
            if best < cut.value {
                continue;
            }
            let first = (group * GROUP) as u32;
            for (id, &logit) in (first..).zip(logits) {
                if cut.keeps(logit, id) {
                    self.candidates.push(Candidate { logit, id, weight: weight(logit) });
                }
            }
        }
    }

    /// The cut that keeps the fewest best tokens whose weights add up to `mass`, among those that
    /// `cut` keeps, whose sum is `total`.
    pub(crate) fn nucleus(
        &mut self,
        row: &[f32],
        cut: Cut,
        mass: f64,
        weights: &Weights<'_>,
        total: f64,
    ) -> Cut {
        // Tokens lighter than this add up to less than what may be left out, however many.
        let lightest = (total - mass) / row.len() as f64 * 0.999;
        let cut = if lightest > 0.0 { cut.tighter(Cut::at_least(weights.logit_of(lightest))) } else { cut };
        self.find_maxima(row);
        self.collect(row, cut, |logit| weights.of(logit));
        // Quickselect by weight: halve the range that holds the last token kept.
        let (mut low, mut high, mut sum) = (0, self.candidates.len(), 0.0);
        while high - low > SORTED {
            let middle = (high - low) / 2;
            let range = &mut self.candidates[low..high];
            range.select_nth_unstable_by(middle, better_first);
            let upper: f64 = range[..middle].iter().map(|candidate| f64::from(candidate.weight)).sum();
            if sum + upper >= mass {
                high = low + middle;
            } else {
                sum += upper;
                low += middle;
            }
        }
        self.candidates[low..high].sort_unstable_by(better_first);
        for candidate in &self.candidates[low..high] {
            sum += f64::from(candidate.weight);
            if sum >= mass {
                return Cut { value: candidate.logit, id: candidate.id };
            }
        }
        cut
    }
}
