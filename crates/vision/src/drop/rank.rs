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

/// Softmax of each head's `logits [heads, tokens]`, averaged over heads: `[tokens]`. PyramidDrop's scores of
/// all tokens that the last one sees; those of the image are ranked with [`best`].
pub fn mean_attention(logits: &[f32], tokens: usize) -> Vec<f32> {
    let mut mean = vec![0.0f32; tokens];
    if tokens == 0 {
        return mean;
    }
    let heads = logits.chunks_exact(tokens);
    let share = 1.0 / heads.len().max(1) as f32;
    for head in heads {
        let most = head.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = head.iter().map(|logit| (logit - most).exp()).sum();
        for (mean, logit) in mean.iter_mut().zip(head) {
            *mean += share * (logit - most).exp() / sum;
        }
    }
    mean
}

/// Sum and largest of each column of `attention [rows, columns]`: text rows, image columns.
fn columns(attention: &[f32], columns: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut sums, mut largest) = (vec![0.0f32; columns], vec![0.0f32; columns]);
    for row in attention.chunks_exact(columns.max(1)) {
        for ((sum, largest), &weight) in sums.iter_mut().zip(&mut largest).zip(row) {
            *sum += weight;
            *largest = largest.max(weight);
        }
    }
    (sums, largest)
}

/// MustDrop with a budget: columns of `attention [text rows, columns]` that stay, ascending: `key_set`
/// (ascending columns; if it is larger than `keep`, its first ones), then those with the largest sums, of
/// equal ones those with the largest single weight.
pub fn best_columns(attention: &[f32], columns: usize, key_set: &[u32], keep: usize) -> Vec<u32> {
    let (sums, largest) = self::columns(attention, columns);
    let mut kept: Vec<u32> = key_set.iter().copied().filter(|&key| (key as usize) < columns).collect();
    kept.truncate(keep);
    let mut rest: Vec<u32> = (0..columns as u32).filter(|idx| kept.binary_search(idx).is_err()).collect();
    rest.sort_by(|&a, &b| {
        let (left, right) = (a as usize, b as usize);
        let by_sum = compare(sums[left], sums[right]);
        by_sum.then(compare(largest[left], largest[right])).then(a.cmp(&b))
    });
    kept.extend(rest.into_iter().take(keep - kept.len()));
    kept.sort_unstable();
    kept
}

/// MustDrop's release: columns that stay, ascending: all but those outside `key_set` (ascending) whose sum is
/// below `global` of all sums and whose largest weight is below `individual`.
pub fn columns_above(
    attention: &[f32],
    columns: usize,
    key_set: &[u32],
    (global, individual): (f32, f32),
) -> Vec<u32> {
    let (sums, largest) = self::columns(attention, columns);
    let least = global * sums.iter().sum::<f32>();
    let stays = |&idx: &u32| {
        let column = idx as usize;
        sums[column] >= least || largest[column] >= individual || key_set.binary_search(&idx).is_ok()
    };
    (0..columns as u32).filter(stays).collect()
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

    /// The specification's example, section c: image at positions 2..9 of 12, lambda 0.5.
    #[test]
    fn pyramid_by_hand() {
        let logits = [
            0.0, 0.5, 2.0, 0.1, 1.0, -1.0, 0.3, 1.5, 0.2, 0.0, 0.4, 0.7, // head 1
            0.2, 0.1, 0.5, 1.8, -0.5, 0.2, 2.2, 0.0, 0.1, 0.3, 0.6, 0.2, // head 2
        ];
        let mean = mean_attention(&logits, 12);
        let expected = [0.1734, 0.1319, 0.0638, 0.0294, 0.1910, 0.1052, 0.0439, 0.0440];
        for (mean, expected) in mean[2..10].iter().zip(expected) {
            assert!((mean - expected).abs() < 5e-5, "{mean} is not {expected}");
        }
        assert_eq!(best(&mean[2..10], 4), [0, 1, 4, 5]);
        let second = best(&[0.1, 0.9, 1.2, -0.3], 2);
        assert_eq!(second.iter().map(|&idx| [0, 1, 4, 5][idx as usize]).collect::<Vec<_>>(), [1, 4]);
    }

    const MUST: [f32; 18] = [
        0.10, 0.02, 0.05, 0.01, 0.03, 0.01, 0.06, 0.01, 0.05, 0.02, 0.20, 0.01, 0.08, 0.03, 0.05, 0.01, 0.02,
        0.01,
    ];

    /// The specification's example, section d: three text rows, six image columns.
    #[test]
    fn must_by_hand() {
        assert_eq!(columns_above(&MUST, 6, &[3], (0.12, 0.04)), [0, 2, 3, 4]);
        assert_eq!(columns_above(&MUST, 6, &[], (0.12, 0.04)), [0, 2, 4]);
    }

    /// Sums are .24 .06 .15 .04 .25 .03.
    #[test]
    fn the_key_set_stays_within_the_budget() {
        assert_eq!(best_columns(&MUST, 6, &[3], 3), [0, 3, 4]);
        assert_eq!(best_columns(&MUST, 6, &[], 3), [0, 2, 4]);
        assert_eq!(best_columns(&MUST, 6, &[1, 3, 5], 2), [1, 3]);
        assert_eq!(best_columns(&MUST, 6, &[3], 6), [0, 1, 2, 3, 4, 5]);
    }

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

        #[test]
        fn columns_are_exact(
            attention in prop::collection::vec(0.0..1.0f32, 40),
            keep in 0usize..9,
            key in prop::collection::btree_set(0u32..8, 0..8),
        ) {
            let key: Vec<u32> = key.into_iter().collect();
            let kept = best_columns(&attention, 8, &key, keep);
            prop_assert_eq!(kept.len(), keep.min(8));
            prop_assert!(kept.is_sorted_by(|a, b| a < b));
            if key.len() <= keep {
                prop_assert!(key.iter().all(|idx| kept.contains(idx)));
            }
        }
    }
}
