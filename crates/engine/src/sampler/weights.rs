//! `exp((logit - max) / temperature)`, its sums and draws from it, in loops that vectorise.

use super::Cut;

/// Logits summed together; draws find the group first and then the token in it.
const GROUP: usize = 256;
/// Independent accumulators of a loop.
const LANES: usize = 8;

/// Buffers of [`Weights`].
#[derive(Debug, Default)]
pub(crate) struct WeightScratch {
    /// A weight per token `[vocab_size]`.
    weights: Vec<f32>,
    /// Their sums, one per group of 256.
    sums: Vec<f64>,
}

/// Unnormalised probabilities of a row: 1 for the best token, 0 for those that were cut off.
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
    let clamped = if x > -87.0 { x } else { -87.0 };
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

fn sum(values: impl Iterator<Item = f32>) -> f64 {
    values.map(f64::from).sum()
}

/// Sum of up to 256 weights: eight f32 lanes, then f64.
fn group_sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += weight;
        }
    }
    sum(lanes.iter().copied()) + sum(rest.iter().copied())
}

/// Sum of the weights of at least `lowest`.
pub(crate) fn sum_from(weights: &[f32], lowest: f32) -> f64 {
    let mut total = 0.0;
    for weights in weights.chunks(GROUP) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = weights.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &weight) in lanes.iter_mut().zip(chunk) {
                *lane += if weight >= lowest { weight } else { 0.0 };
            }
        }
        total += sum(lanes.iter().copied());
        total += sum(rest.iter().copied().filter(|&weight| weight >= lowest));
    }
    total
}

impl<'s> Weights<'s> {
    /// Weights of a row whose largest logit is `max`. Call [`Self::fill`] before anything else.
    pub(crate) fn new(max: f32, temperature: f32, scratch: &'s mut WeightScratch) -> Self {
        Self { max, inverse_temperature: 1.0 / temperature.max(1e-6), scratch }
    }

    /// Computes the weights of the tokens that `cut` keeps, and returns their sum.
    pub(crate) fn fill(&mut self, row: &[f32], cut: Cut) -> f64 {
        let WeightScratch { weights, sums } = &mut *self.scratch;
        weights.resize(row.len(), 0.0);
        sums.clear();
        for (group, (weights, logits)) in weights.chunks_mut(GROUP).zip(row.chunks(GROUP)).enumerate() {
            if max(logits) < cut.value {
                weights.fill(0.0);
                sums.push(0.0);
                continue;
            }
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                *weight = exp((logit - self.max) * self.inverse_temperature);
            }
            if !cut.is_none() {
                let first = (group * GROUP) as u32;
                for (id, (weight, &logit)) in (first..).zip(weights.iter_mut().zip(logits)) {
                    *weight = if cut.keeps(logit, id) { *weight } else { 0.0 };
                }
            }
            sums.push(group_sum(weights));
        }
        sums.iter().sum()
    }

    /// The weights `[vocab_size]`.
    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.scratch.weights
    }

    /// The token at share `at` (0 to 1) of all weights, in order of ids; `None` if there is no
    /// weight at all.
    pub(crate) fn draw(&self, at: f64) -> Option<u32> {
        let WeightScratch { weights, sums } = &*self.scratch;
        let mut left = at * sums.iter().sum::<f64>();
        // Rounding may carry `left` past the end: stay in the last group that has weight.
        let last = sums.iter().rposition(|&sum| sum > 0.0)?;
        let mut group = 0;
        while group < last && left >= sums[group] {
            left -= sums[group];
            group += 1;
        }
        let mut chosen = None;
        let first = group * GROUP;
        for (id, &weight) in (first as u32..).zip(weights[first..].iter().take(GROUP)) {
            if weight > 0.0 {
                chosen = Some(id);
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        chosen
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
