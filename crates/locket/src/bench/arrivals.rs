//! When requests of an open loop are sent.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Arrival times of a Poisson process of `rate_per_s` (above 0), counted from the start of the run,
/// ascending. The same seed gives the same times.
pub(super) fn poisson(rate_per_s: f64, num_requests: usize, seed: u64) -> Vec<Duration> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at_s = 0.0;
    (0..num_requests)
        .map(|_| {
            // 1 - u lies in (0, 1], so the logarithm is finite.
            at_s -= (1.0 - rng.random::<f64>()).ln() / rate_per_s;
            Duration::from_secs_f64(at_s)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::poisson;

    #[test]
    fn the_seed_decides_the_arrivals() {
        assert_eq!(poisson(3.0, 100, 7), poisson(3.0, 100, 7));
        assert_ne!(poisson(3.0, 100, 7), poisson(3.0, 100, 8));
        assert!(poisson(3.0, 100, 7).is_sorted());
    }

    /// Mean and variance of the gaps of an exponential distribution are 1/rate and 1/rate²; with
    /// 20,000 gaps the standard error is 0.7 % and 2 %.
    #[test]
    fn gaps_are_exponential() {
        let rate = 5.0;
        let times = poisson(rate, 20_000, 1);
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * rate - 1.0).abs() < 0.03, "mean gap {mean}");
        assert!((variance * rate * rate - 1.0).abs() < 0.1, "variance {variance}");
    }
}
