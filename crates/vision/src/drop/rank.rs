//! Rankings: pure functions from scores to indices. Ties go to the lower index.

use std::cmp::Ordering;

/// Indices of `scores`, best first. What is not a number comes last.
pub fn descending(scores: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| compare(scores[a as usize], scores[b as usize]).then(a.cmp(&b)));
    order
}

/// The better score first; what is not a number is worst.
pub(crate) fn compare(a: f32, b: f32) -> Ordering {
    let key = |score: f32| if score.is_nan() { f32::NEG_INFINITY } else { score };
    key(b).total_cmp(&key(a))
}

/// Indices of the `keep` best of `scores`, ascending.
pub fn best(scores: &[f32], keep: usize) -> Vec<u32> {
    let mut kept = descending(scores);
    kept.truncate(keep);
    kept.sort_unstable();
    kept
}

/// Shares `total` by `weights`, at most `room` each: every share is rounded down, then those that lost most
/// get one more each until nothing is left or all are full. Less than `total` is given only where rounding up
/// each once does not use it up: caps were met.
pub fn apportion(total: usize, weights: &[f64], room: &[usize]) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    let is_usable = sum.is_finite() && sum > 0.0;
    let quota = |weight: f64| {
        let share = if is_usable { weight / sum } else { 1.0 / weights.len() as f64 };
        share * total as f64
    };
    // A quota that is whole but for the last bit of its arithmetic is whole.
    let floor = |quota: f64| (quota + 1e-9).floor();
    let mut shares: Vec<usize> =
        weights.iter().zip(room).map(|(&weight, &room)| (floor(quota(weight)) as usize).min(room)).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let lost = |idx: usize| quota(weights[idx]) - floor(quota(weights[idx]));
    order.sort_by(|&a, &b| lost(b).total_cmp(&lost(a)).then(a.cmp(&b)));
    let mut left = total.saturating_sub(shares.iter().sum());
    for idx in order {
        if left > 0 && shares[idx] < room[idx] {
            shares[idx] += 1;
            left -= 1;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The specification's example, section b: rounding down loses one, which goes to the second tile.
    #[test]
    fn remainders_go_to_the_largest() {
        assert_eq!(apportion(12, &[0.10, 0.45, 0.09, 0.36], &[16; 4]), [1, 6, 1, 4]);
        assert_eq!(apportion(12, &[0.10, 0.45, 0.09, 0.36], &[16, 5, 16, 16]), [1, 5, 1, 5]);
        assert_eq!(apportion(5, &[0.0; 2], &[16; 2]), [3, 2]);
    }

    #[test]
    fn what_is_no_number_is_never_better() {
        assert_eq!(descending(&[f32::NAN, 0.5, 0.5, 1.0]), [3, 1, 2, 0]);
    }

    proptest! {
        #[test]
        fn shares_are_exact_where_there_is_room(
            total in 0usize..500,
            weights in prop::collection::vec(0.0..1.0f64, 1..9),
        ) {
            let shares = apportion(total, &weights, &vec![500; weights.len()]);
            prop_assert_eq!(shares.iter().sum::<usize>(), total);
        }
    }
}
