//! Quantiles of what was measured.

use serde::Serialize;

/// The usual figures of one measured quantity, in the unit of its values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    /// Number of values.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Half of the values lie below.
    pub median: f64,
    /// Nine tenths of the values lie below.
    pub p90: f64,
    /// 99 of 100 values lie below.
    pub p99: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
}

impl Summary {
    /// Summarises `values`; `None` if there are none.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            median: quantile(&values, 0.5)?,
            p90: quantile(&values, 0.9)?,
            p99: quantile(&values, 0.99)?,
            min: *values.first()?,
            max: *values.last()?,
        })
    }
}

/// The `share` quantile (0 to 1) of ascending values by linear interpolation between the two closest
/// ranks, as NumPy's default; `None` without values.
pub(super) fn quantile(ascending: &[f64], share: f64) -> Option<f64> {
    let rank = share.clamp(0.0, 1.0) * ascending.len().checked_sub(1)? as f64;
    let (below, above) = (rank.floor() as usize, rank.ceil() as usize);
    Some(ascending[below] + (ascending[above] - ascending[below]) * (rank - rank.floor()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values are those of `numpy.quantile`.
    #[test]
    fn quantiles_interpolate_between_ranks() {
        let values = [1.0, 2.0, 3.0, 10.0];
        assert_eq!(quantile(&values, 0.0), Some(1.0));
        assert_eq!(quantile(&values, 0.5), Some(2.5));
        assert!((quantile(&values, 0.9).unwrap() - 7.9).abs() < 1e-12);
        assert_eq!(quantile(&values, 1.0), Some(10.0));
        assert_eq!(quantile(&[5.0], 0.99), Some(5.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn summary_sorts_and_survives_nothing() {
        let summary = Summary::of(vec![10.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((summary.count, summary.mean, summary.median), (4, 4.0, 2.5));
        assert_eq!((summary.min, summary.max), (1.0, 10.0));
        assert_eq!(Summary::of(Vec::new()), None);
    }
}
