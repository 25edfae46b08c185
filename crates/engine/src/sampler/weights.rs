//! `exp((logit - max) / temperature)`, its sums and draws from it, in loops that vectorise.

use super::Cut;

/// Logits summed together; draws find the group first and then the token in it.
const GROUP: usize = 256;
/// Independent accumulators of a loop.
const LANES: usize = 8;

/// Sums of the latest row, one per group of 256.
#[derive(Debug, Default)]
pub(crate) struct WeightScratch {
    sums: Vec<f64>,
}

/// Unnormalised probabilities of a row.
#[derive(Debug)]
pub(crate) struct Weights<'s> {
    max: f32,
    inverse_temperature: f32,
    scratch: &'s mut WeightScratch,
}

/// `e^x` for `x ≤ 0`, relative error below 3e-7; zero below -87, where f32 would become
/// subnormal. Range reduction to ±ln(2)/2 and a Taylor polynomial of degree 7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    // The integer sits in the low bits of `shifted`; its upper bits fall out of the shift.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// The largest value; -inf for none.
pub(crate) fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &x| if x > best { x } else { best })
}

/// Whether there is neither NaN nor infinity.
pub(crate) fn all_finite(row: &[f32]) -> bool {
    // x * 0 is 0 for finite x and NaN otherwise.
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += x * 0.0;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| x * 0.0).sum::<f32>() == 0.0
}

impl<'s> Weights<'s> {
    /// Weights of a row whose largest logit is `max`.
    pub(crate) fn new(max: f32, temperature: f32, scratch: &'s mut WeightScratch) -> Self {
        Self { max, inverse_temperature: 1.0 / temperature.max(1e-6), scratch }
    }

    /// The weight of a logit, 1 for the largest.
    #[inline(always)]
    pub(crate) fn of(&self, logit: f32) -> f32 {
        exp((logit - self.max) * self.inverse_temperature)
    }

    /// The logit whose weight is `weight`.
    pub(crate) fn logit_of(&self, weight: f64) -> f32 {
        self.max + (weight.ln() / f64::from(self.inverse_temperature)) as f32
    }

    /// Sum of the weights that `cut` keeps; remembers the sums of groups for [`Self::draw`].
    pub(crate) fn total(&mut self, row: &[f32], cut: Cut) -> f64 {
        let mut sums = std::mem::take(&mut self.scratch.sums);
        sums.clear();
        sums.extend(row.chunks(GROUP).enumerate().map(|(group, logits)| {
            if cut.is_none() { self.group_sum(logits) } else { self.group_sum_kept(group, logits, cut) }
        }));
        self.scratch.sums = sums;
        self.scratch.sums.iter().sum()
    }

    fn group_sum(&self, logits: &[f32]) -> f64 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = logits.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += self.of(x);
            }
        }
        lanes.iter().map(|&sum| f64::from(sum)).sum::<f64>()
            + rest.iter().map(|&x| f64::from(self.of(x))).sum::<f64>()
    }

    fn group_sum_kept(&self, group: usize, logits: &[f32], cut: Cut) -> f64 {
        if max(logits) < cut.value {
            return 0.0;
        }
        let first = (group * GROUP) as u32;
        let kept = (first..).zip(logits).filter(|&(id, &x)| cut.keeps(x, id));
        kept.map(|(_, &x)| f64::from(self.of(x))).sum()
    }

    /// The token at share `at` (0 to 1) of the weights that `cut` keeps, in order of ids.
    pub(crate) fn draw(mut self, row: &[f32], cut: Cut, at: f64) -> u32 {
        let mut left = at * self.total(row, cut);
        let mut group = 0;
        let mut last_group = 0;
        for (index, &sum) in self.scratch.sums.iter().enumerate() {
            if sum > 0.0 {
                last_group = index;
            }
        }
        // Rounding may carry `left` past the end: stay in the last group that has weight.
        while group < last_group && left >= self.scratch.sums[group] {
            left -= self.scratch.sums[group];
            group += 1;
        }
        let first = group * GROUP;
        let mut chosen = None;
        for (id, &logit) in (first as u32..).zip(row[first..].iter().take(GROUP)) {
            let weight = if cut.keeps(logit, id) { f64::from(self.of(logit)) } else { 0.0 };
            if weight > 0.0 {
                chosen = Some(id);
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        // A group without weight is only reached if the whole row has none.
        chosen.unwrap_or_else(|| super::select::argmax(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_3e_7() {
        let mut x = -87.0f32;
        while x <= 0.0 {
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 3e-7 * exact, "exp({x})");
            x += 0.000_731;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
    }

    #[test]
    fn finds_nan_and_infinity_anywhere() {
        for len in [1, 7, 8, 9, 300] {
            for at in 0..len {
                let mut row = vec![1.0e30f32; len];
                assert!(all_finite(&row));
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    row[at] = bad;
                    assert!(!all_finite(&row), "{bad} at {at} of {len}");
                }
            }
        }
    }
}
