//! Means with their errors, and paired comparisons.
//!
//! Every method sees the same documents and probes, so two methods are compared sample by sample:
//! the differences scatter far less than the values themselves.

use serde::Serialize;
use statrs::distribution::{Binomial, ContinuousCDF, DiscreteCDF, StudentsT};

/// A mean and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// Arithmetic mean; NaN without values.
    pub mean: f64,
    /// Standard error of the mean (`n - 1` in the variance); 0 below two values.
    pub standard_error: f64,
}

impl Mean {
    /// Mean of `values`.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        if values.len() < 2 {
            return Self { mean, standard_error: 0.0 };
        }
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self { mean, standard_error: (squares / (count - 1.0) / count).sqrt() }
    }
}

/// Whether a smaller or a larger value is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Negative log likelihoods.
    Lower,
    /// Shares of right tokens.
    Higher,
}

/// One method against another, sample by sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Paired {
    /// Samples.
    pub count: usize,
    /// Mean of (this - other).
    pub mean_difference: f64,
    /// Standard error of that mean.
    pub standard_error: f64,
    /// Samples in which this is better.
    pub wins: usize,
    /// Samples in which the other is better.
    pub losses: usize,
    /// Two-sided p-value of Student's paired t-test; `None` below two samples or without scatter.
    pub p_t: Option<f64>,
    /// Two-sided p-value of the sign test, ties left out; 1 if all are ties.
    pub p_sign: f64,
}

impl Paired {
    /// Wins, losses and samples, for tables.
    pub(crate) fn tally(&self) -> String {
        format!("{}:{}/{}", self.wins, self.losses, self.count)
    }

    /// [`Self::p_t`] for tables.
    pub(crate) fn p_t_shown(&self) -> String {
        self.p_t.map_or_else(|| "-".to_owned(), |p| format!("{p:.1e}"))
    }

    /// Compares `these` with `others`, sample by sample; `None` if there are none or not equally many.
    pub fn of(these: &[f64], others: &[f64], better: Better) -> Option<Self> {
        if these.is_empty() || these.len() != others.len() {
            return None;
        }
        let differences: Vec<f64> = these.iter().zip(others).map(|(this, other)| this - other).collect();
        let Mean { mean, standard_error } = Mean::of(differences.iter().copied());
        let below = differences.iter().filter(|&&difference| difference < 0.0).count();
        let above = differences.iter().filter(|&&difference| difference > 0.0).count();
        let (wins, losses) = match better {
            Better::Lower => (below, above),
            Better::Higher => (above, below),
        };
        Some(Self {
            count: differences.len(),
            mean_difference: mean,
            standard_error,
            wins,
            losses,
            p_t: t_test(mean, standard_error, differences.len()),
            p_sign: sign_test(wins, losses),
        })
    }
}

fn t_test(mean: f64, standard_error: f64, count: usize) -> Option<f64> {
    if count < 2 || standard_error == 0.0 {
        return None;
    }
    let students = StudentsT::new(0.0, 1.0, (count - 1) as f64).ok()?;
    Some(2.0 * students.cdf(-(mean / standard_error).abs()))
}

fn sign_test(wins: usize, losses: usize) -> f64 {
    let fair = Binomial::new(0.5, (wins + losses) as u64);
    fair.map_or(1.0, |fair| (2.0 * fair.cdf(wins.min(losses) as u64)).min(1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{a} is not {b}");
    }

    /// By hand: values 1, 2, 3, 6 have mean 3 and variance (4 + 1 + 0 + 9) / 3.
    #[test]
    fn means_have_their_errors() {
        let Mean { mean, standard_error } = Mean::of([1.0, 2.0, 3.0, 6.0]);
        close(mean, 3.0);
        close(standard_error, (14.0_f64 / 3.0 / 4.0).sqrt());
        assert_eq!(Mean::of([5.0]), Mean { mean: 5.0, standard_error: 0.0 });
        assert!(Mean::of([]).mean.is_nan());
    }

    /// By hand: differences -1, -2, -3, 0 have mean -1.5 and variance 5/3, so t = -1.5 / sqrt(5/12) =
    /// -2.3238 with 3 degrees of freedom. Its p-value from the closed form for 3 degrees:
    /// P(T < t) = 1/2 + (x / (1 + x^2) + atan x) / pi with x = t / sqrt 3. Three signs agree:
    /// p = 2 / 8.
    #[test]
    fn paired_comparison_by_hand() {
        let paired = Paired::of(&[1.0, 2.0, 3.0, 4.0], &[2.0, 4.0, 6.0, 4.0], Better::Lower).unwrap();
        close(paired.mean_difference, -1.5);
        close(paired.standard_error, (5.0_f64 / 12.0).sqrt());
        assert_eq!((paired.count, paired.wins, paired.losses), (4, 3, 0));
        close(paired.p_sign, 0.25);
        let x = -1.5 / (5.0_f64 / 12.0).sqrt() / 3.0_f64.sqrt();
        let p = 2.0 * (0.5 + (x / (1.0 + x * x) + x.atan()) / std::f64::consts::PI);
        close(paired.p_t.unwrap(), p);
        let higher = Paired::of(&[1.0, 2.0, 3.0, 4.0], &[2.0, 4.0, 6.0, 4.0], Better::Higher).unwrap();
        assert_eq!((higher.wins, higher.losses), (0, 3));
    }

    #[test]
    fn degenerate_comparisons_say_so() {
        let same = Paired::of(&[1.0, 2.0], &[1.0, 2.0], Better::Lower).unwrap();
        assert_eq!((same.wins, same.losses, same.p_t, same.p_sign), (0, 0, None, 1.0));
        assert_eq!(Paired::of(&[], &[], Better::Lower), None);
        assert_eq!(Paired::of(&[1.0], &[1.0, 2.0], Better::Lower), None);
        assert_eq!(Paired::of(&[1.0], &[2.0], Better::Lower).unwrap().p_t, None);
    }

    /// 20 of 24 documents, by hand: 2 (C(24,0) + C(24,1) + C(24,2) + C(24,3) + C(24,4)) / 2^24.
    #[test]
    fn the_sign_test_counts_binomially() {
        let tail = 1.0 + 24.0 + 276.0 + 2024.0 + 10626.0;
        close(sign_test(20, 4), 2.0 * tail / f64::from(1 << 24));
        close(sign_test(4, 20), sign_test(20, 4));
        close(sign_test(5, 5), 1.0);
    }

    proptest! {
        /// Swapping the sides negates the difference and swaps wins and losses.
        #[test]
        fn comparison_is_antisymmetric(pairs in prop::collection::vec((-5.0..5.0_f64, -5.0..5.0_f64), 2..20)) {
            let (these, others): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let there = Paired::of(&these, &others, Better::Lower).unwrap();
            let back = Paired::of(&others, &these, Better::Lower).unwrap();
            prop_assert!((there.mean_difference + back.mean_difference).abs() < 1e-12);
            prop_assert_eq!((there.wins, there.losses), (back.losses, back.wins));
            prop_assert!((0.0..=1.0).contains(&there.p_sign));
            if let (Some(p), Some(q)) = (there.p_t, back.p_t) {
                prop_assert!((p - q).abs() < 1e-12 && (0.0..=1.0).contains(&p));
            }
        }
    }
}
