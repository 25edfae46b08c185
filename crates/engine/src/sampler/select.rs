//! The best tokens of a row without sorting it.

use std::cmp::Ordering;

use super::weights::{Weights, max, sum_from};

/// Logits whose maximum is looked at first.
const GROUP: usize = 64;
/// Halvings of the range (of logarithms of weights) in which a nucleus ends. Eight leave a band
/// of a few percent, which is sorted.
const NUCLEUS_HALVINGS: usize = 8;

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

/// The order of [`Cut`]. Not `total_cmp`: 0 and -0 are equal here as they are there.
fn better_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Buffers of selections.
#[derive(Debug, Default)]
pub(crate) struct SelectScratch {
    maxima: Vec<f32>,
    sorted_maxima: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Weights among which a nucleus may end.
    heavy: Vec<f32>,
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
        self.candidates.clear();
        for (group, (logits, &best)) in row.chunks(GROUP).zip(&self.maxima).enumerate() {
            if best < lowest {
                continue;
            }
            let ids = (group * GROUP) as u32..;
            let kept = ids.zip(logits).filter(|&(_, &logit)| logit >= lowest);
            self.candidates.extend(kept.map(|(id, &logit)| Candidate { logit, id, weight: 0.0 }));
        }
    }

    fn find_maxima(&mut self, row: &[f32]) {
        self.maxima.clear();
        self.maxima.extend(row.chunks(GROUP).map(max));
    }

    /// The cut that keeps the fewest best tokens whose weights add up to `mass`; `total` is the
    /// sum of all `weights`, which belong to `row`.
    pub(crate) fn nucleus(&mut self, row: &[f32], weights: &Weights<'_>, mass: f64, total: f64) -> Cut {
        // Tokens lighter than this add up to less than what may be left out, however many.
        let mut low = ((total - mass) / row.len() as f64 * 0.999).max(f64::from(f32::MIN_POSITIVE)) as f32;
        self.heavy.clear();
        self.heavy.extend_from_slice(weights.as_slice());
        self.retain_heavy(|weight| weight >= low);
        // No weight exceeds 1, so nothing is at or above this.
        let (mut high, mut sum) = (1.0f32.next_up(), 0.0);
        for _ in 0..NUCLEUS_HALVINGS {
            let middle = (low * high).sqrt();
            let upper = sum + sum_from(&self.heavy, middle);
            if upper >= mass {
                low = middle;
                self.retain_heavy(|weight| weight >= middle);
            } else {
                (high, sum) = (middle, upper);
                self.retain_heavy(|weight| weight < middle);
            }
        }
        self.collect_band(row, weights.as_slice(), low..high);
        self.candidates.sort_unstable_by(better_first);
        let mut cut = Cut::NONE;
        for candidate in &self.candidates {
            cut = Cut { value: candidate.logit, id: candidate.id };
            sum += f64::from(candidate.weight);
            if sum >= mass {
                break;
            }
        }
        cut
    }

    /// Drops weights in place, without a branch for each.
    fn retain_heavy(&mut self, keep: impl Fn(f32) -> bool) {
        let mut count = 0;
        for at in 0..self.heavy.len() {
            let weight = self.heavy[at];
            self.heavy[count] = weight;
            count += usize::from(keep(weight));
        }
        self.heavy.truncate(count);
    }

    /// Collects the tokens whose weight is in `band`.
    fn collect_band(&mut self, row: &[f32], weights: &[f32], band: std::ops::Range<f32>) {
        self.candidates.clear();
        for (group, (weights, logits)) in weights.chunks(GROUP).zip(row.chunks(GROUP)).enumerate() {
            if max(weights) < band.start {
                continue;
            }
            let ids = (group * GROUP) as u32..;
            for (id, (&weight, &logit)) in ids.zip(weights.iter().zip(logits)) {
                if band.contains(&weight) {
                    self.candidates.push(Candidate { logit, id, weight });
                }
            }
        }
    }
}
