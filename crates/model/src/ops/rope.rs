//! The frequencies of rotary position embedding (RoFormer, arXiv 2104.09864) and their scalings for
//! long contexts; the same numbers for every backend.

use std::f64::consts::TAU;

use crate::config::{RopeConfig, RopeScaling};

/// Angle per position of each rotated pair, `inv_freq [rotary_dim / 2]`, and the factor on cos and
/// sin (1 but for YaRN's attention temperature).
///
/// The angle of pair `i` at position `p` is `p * inv_freq[i]`; its cos and sin are to be taken of
/// the product in f64, because f32 loses whole turns at long positions. Computed in f64, rounded once.
///
/// # Panics
/// If [`RopeScaling::Factors`] has fewer than `rotary_dim / 2` entries (checked when the
/// configuration is read).
pub fn frequencies(rope: &RopeConfig) -> (Vec<f32>, f32) {
    let dim = rope.rotary_dim as f64;
    let theta = f64::from(rope.theta);
    let base = (0..rope.rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim));
    match &rope.scaling {
        RopeScaling::None => (base.map(|f| f as f32).collect(), 1.0),
        RopeScaling::Linear { factor } => (base.map(|f| (f / f64::from(*factor)) as f32).collect(), 1.0),
        RopeScaling::Factors(factors) => {
            assert!(factors.len() >= rope.rotary_dim / 2, "one divisor per rotary frequency");
            (base.zip(factors).map(|(f, &by)| (f / f64::from(by)) as f32).collect(), 1.0)
        }
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let scaling = Llama3 {
                factor: factor.into(),
                low: low_freq_factor.into(),
                high: high_freq_factor.into(),
                original: original_max_position as f64,
            };
            (base.map(|f| scaling.apply(f) as f32).collect(), 1.0)
        }
        &RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
            let factor = f64::from(factor);
            // The pair that makes `rotations` full turns within the pre-trained length.
            let pair = |rotations: f32| {
                dim * (original_max_position as f64 / (f64::from(rotations) * TAU)).ln() / (2.0 * theta.ln())
            };
            let low = pair(beta_fast).floor().max(0.0);
            let high = pair(beta_slow).ceil().min(dim - 1.0);
            let width = if high == low { 0.001 } else { high - low };
            let inv_freq = base
                .enumerate()
                .map(|(i, f)| {
                    let interpolated = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    (f / factor * interpolated + f * (1.0 - interpolated)) as f32
                })
                .collect();
            let temperature = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            (inv_freq, attention_factor.unwrap_or(temperature as f32))
        }
    }
}

struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn apply(&self, f: f64) -> f64 {
        let wavelength = TAU / f;
        if wavelength < self.original / self.high {
            f
        } else if wavelength > self.original / self.low {
            f / self.factor
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * f / self.factor + smooth * f
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeStyle;

    fn rope(rotary_dim: usize, theta: f32, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta, rotary_dim, style: RopeStyle::HalfSplit, scaling }
    }

    fn close(a: f32, b: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-6 * b.abs()
    }

    #[test]
    fn plain_linear_and_factors() {
        let (plain, factor) = frequencies(&rope(8, 10_000.0, RopeScaling::None));
        assert_eq!(factor, 1.0);
        for (got, want) in plain.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!(close(*got, want), "{got} {want}");
        }
        let (linear, _) = frequencies(&rope(8, 10_000.0, RopeScaling::Linear { factor: 4.0 }));
        assert!(close(linear[1], 0.025));
        let divisors = RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0]);
        let (divided, _) = frequencies(&rope(8, 10_000.0, divisors));
        assert!(close(divided[3], 0.000125));
    }

    #[test]
    fn llama3_keeps_short_and_divides_long_wavelengths() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let (plain, _) = frequencies(&rope(128, 500_000.0, RopeScaling::None));
        let (scaled, _) = frequencies(&rope(128, 500_000.0, scaling));
        assert_eq!(scaled[0], plain[0]);
        assert!(close(scaled[63], f64::from(plain[63]) / 8.0));
        for i in 1..64 {
            assert!(scaled[i] < scaled[i - 1] && scaled[i] <= plain[i]);
        }
    }

    #[test]
    fn yarn_ramps_between_extrapolation_and_interpolation() {
        let yarn = |attention_factor| RopeScaling::Yarn {
            factor: 4.0,
            original_max_position: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
        };
        let (plain, _) = frequencies(&rope(128, 1_000_000.0, RopeScaling::None));
        let (scaled, factor) = frequencies(&rope(128, 1_000_000.0, yarn(None)));
        assert!(close(factor, 0.1 * 4f64.ln() + 1.0));
        // 64 ln(32768 / (32 τ)) / ln 1e6 = 23.59 and 64 ln(32768 / τ) / ln 1e6 = 39.65.
        assert_eq!(scaled[23], plain[23]);
        assert!(close(scaled[31], f64::from(plain[31]) * (0.25 * 8.0 / 17.0 + 9.0 / 17.0)));
        assert!(close(scaled[40], f64::from(plain[40]) / 4.0));
        assert_eq!(frequencies(&rope(128, 1_000_000.0, yarn(Some(1.5)))).1, 1.5);
    }
}
