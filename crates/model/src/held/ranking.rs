//! Which of an image's tokens pass a boundary: from queries and keys to the rows that stay.

use crate::layer_drops::{Boundary, Keep, Rank};

/// Geometry of the attention that ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) dim: usize,
}

/// Attention that each of an image's tokens receives from the ranking rows, averaged over query heads.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Attention {
    /// Summed over the rows.
    pub(super) sums: Vec<f64>,
    /// Of the row that pays most.
    pub(super) most: Vec<f64>,
}

impl Attention {
    /// Nothing received yet by `tokens` tokens.
    pub(super) fn new(tokens: usize) -> Self {
        Self { sums: vec![0.0; tokens], most: vec![0.0; tokens] }
    }

    /// Adds what a row pays to tokens at places `image` among all, by its attention to all.
    pub(super) fn add(&mut self, weights: &[f64], image: &[usize]) {
        for ((sum, most), &at) in self.sums.iter_mut().zip(&mut self.most).zip(image) {
            // A token behind the row is not seen by it.
            let weight = weights.get(at).copied().unwrap_or(0.0);
            *sum += weight;
            *most = most.max(weight);
        }
    }
}

/// Attention of one query `[queries, dim]` to the tokens of `keys [tokens, keys, dim]`, softmax over these,
/// averaged over query heads.
pub(super) fn weights(query: &[f32], keys: &[f32], heads: Heads) -> Vec<f64> {
    let Heads { queries, keys: kv_heads, dim } = heads;
    let tokens = keys.len() / (kv_heads * dim);
    let scale = 1.0 / (dim as f64).sqrt();
    let mut mean = vec![0.0; tokens];
    let mut scores = vec![0.0; tokens];
    for (head, query) in query.chunks_exact(dim).take(queries).enumerate() {
        let of_head = head * kv_heads / queries * dim;
        for (score, keys) in scores.iter_mut().zip(keys.chunks_exact(kv_heads * dim)) {
            *score = f64::from(dot(query, &keys[of_head..of_head + dim])) * scale;
        }
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        scores.iter_mut().for_each(|score| *score = (*score - max).exp());
        let sum: f64 = scores.iter().sum();
        mean.iter_mut().zip(&scores).for_each(|(mean, score)| *mean += score / sum / queries as f64);
    }
    mean
}

/// Eight sums side by side, so that they take a vector register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// Which of an image's tokens stay, given their original places in the image, ascending: one claim each.
pub(super) fn survivors(boundary: &Boundary, places: &[u32], attention: &Attention) -> Vec<bool> {
    let key_set = match &boundary.rank {
        Rank::TextRows { key_set } => &key_set[..],
        Rank::LastToken => &[],
    };
    let is_key: Vec<bool> = places.iter().map(|place| key_set.binary_search(place).is_ok()).collect();
    match boundary.keep {
        Keep::Above { global, individual } => {
            let cut = f64::from(global) * attention.sums.iter().sum::<f64>();
            let received = attention.sums.iter().zip(&attention.most).zip(is_key);
            received
                .map(|((&sum, &most), is_key)| is_key || !(sum < cut && most < f64::from(individual)))
                .collect()
        }
        Keep::Exactly(keep) => {
            let number = |value: f64| if value.is_nan() { f64::NEG_INFINITY } else { value };
            let mut order: Vec<usize> = (0..places.len()).collect();
            order.sort_by(|&a, &b| {
                let by_sum = number(attention.sums[b]).total_cmp(&number(attention.sums[a]));
                let by_most = number(attention.most[b]).total_cmp(&number(attention.most[a]));
                is_key[b].cmp(&is_key[a]).then(by_sum).then(by_most).then(a.cmp(&b))
            });
            let mut stays = vec![false; places.len()];
            order.iter().take(keep as usize).for_each(|&at| stays[at] = true);
            stays
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn softmax(logits: &[f64]) -> Vec<f64> {
        let exp: Vec<f64> = logits.iter().map(|logit| logit.exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter().map(|exp| exp / sum).collect()
    }

    fn boundary(keep: Keep, rank: Rank) -> Boundary {
        Boundary { layer: 2, keep, rank }
    }

    fn kept(stays: &[bool]) -> Vec<usize> {
        (0..stays.len()).filter(|&at| stays[at]).collect()
    }

    /// The specification's example of PyramidDrop: two heads, an image at places 2 to 9 of 12 tokens.
    /// Queries are one-hot and keys hold the logits, so the dot product is the logit times sqrt(dim).
    #[test]
    fn pyramid_drops_worked_example() {
        let logits = [
            [0.0, 0.5, 2.0, 0.1, 1.0, -1.0, 0.3, 1.5, 0.2, 0.0, 0.4, 0.7],
            [0.2, 0.1, 0.5, 1.8, -0.5, 0.2, 2.2, 0.0, 0.1, 0.3, 0.6, 0.2],
        ];
        let heads = Heads { queries: 2, keys: 2, dim: 4 };
        let query = [2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0];
        let mut keys = vec![0.0f32; 12 * 8];
        for token in 0..12 {
            keys[token * 8] = logits[0][token] as f32;
            keys[token * 8 + 5] = logits[1][token] as f32;
        }
        let weights = weights(&query, &keys, heads);
        let slow: Vec<f64> =
            softmax(&logits[0]).iter().zip(softmax(&logits[1])).map(|(a, b)| (a + b) / 2.0).collect();
        assert!(weights.iter().zip(&slow).all(|(a, b)| (a - b).abs() < 1e-6));
        let image: Vec<usize> = (2..10).collect();
        let mut attention = Attention::new(8);
        attention.add(&weights, &image);
        let expected = [0.1734, 0.1319, 0.0638, 0.0294, 0.1910, 0.1052, 0.0439, 0.0440];
        assert!(attention.sums.iter().zip(expected).all(|(got, want)| (got - want).abs() < 5e-5));
        let places: Vec<u32> = (0..8).collect();
        let stays = survivors(&boundary(Keep::Exactly(4), Rank::LastToken), &places, &attention);
        assert_eq!(kept(&stays), [0, 1, 4, 5]);
        let second = Attention { sums: vec![0.1, 0.9, 1.2, -0.3], most: vec![0.0; 4] };
        let stays = survivors(&boundary(Keep::Exactly(2), Rank::LastToken), &[0, 1, 4, 5], &second);
        assert_eq!(kept(&stays), [1, 2], "tokens 1 and 4");
    }

    /// The specification's example of MustDrop, by thresholds and by budget.
    #[test]
    fn must_drops_worked_example() {
        let rows = [
            [0.10, 0.02, 0.05, 0.01, 0.03, 0.01],
            [0.06, 0.01, 0.05, 0.02, 0.20, 0.01],
            [0.08, 0.03, 0.05, 0.01, 0.02, 0.01],
        ];
        let image: Vec<usize> = (0..6).collect();
        let mut attention = Attention::new(6);
        rows.iter().for_each(|row| attention.add(row, &image));
        let expected = [0.24, 0.06, 0.15, 0.04, 0.25, 0.03];
        assert!(attention.sums.iter().zip(expected).all(|(got, want)| (got - want).abs() < 1e-12));
        let places: Vec<u32> = (0..6).collect();
        let rank = || Rank::TextRows { key_set: [3].into() };
        let by_threshold = Keep::Above { global: 0.12, individual: 0.04 };
        let stays = survivors(&boundary(by_threshold, rank()), &places, &attention);
        assert_eq!(kept(&stays), [0, 2, 3, 4]);
        let of = |keep: Keep, key_set: &[u32]| {
            let rank = Rank::TextRows { key_set: key_set.into() };
            kept(&survivors(&boundary(keep, rank), &places, &attention))
        };
        assert_eq!(of(by_threshold, &[]), [0, 2, 4]);
        let stays = survivors(&boundary(Keep::Exactly(3), rank()), &places, &attention);
        assert_eq!(kept(&stays), [0, 3, 4], "the key set and the best others");
        assert_eq!(of(Keep::Exactly(3), &[]), [0, 2, 4]);
        assert_eq!(of(Keep::Exactly(2), &[1, 3, 5]), [1, 3], "the key set stays within the budget");
        assert_eq!(of(Keep::Exactly(6), &[3]), [0, 1, 2, 3, 4, 5]);
        // Places are those of the image, whatever has left before.
        let stays = survivors(&boundary(Keep::Exactly(1), rank()), &[1, 2, 3], &Attention::new(3));
        assert_eq!(kept(&stays), [2]);
        let ties = survivors(&boundary(Keep::Exactly(2), Rank::LastToken), &places, &Attention::new(6));
        assert_eq!(kept(&ties), [0, 1], "ties go to the earlier token");
    }

    #[test]
    fn grouped_heads_share_keys_and_rows_do_not_see_what_is_behind() {
        let heads = Heads { queries: 4, keys: 2, dim: 8 };
        let query: Vec<f32> = (0..32).map(|i| (i as f32 * 0.7).sin()).collect();
        let keys: Vec<f32> = (0..5 * 16).map(|i| (i as f32 * 0.3).cos()).collect();
        let weights = weights(&query, &keys, heads);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let logit = |head: usize, token: usize| -> f64 {
            let key = &keys[token * 16 + head / 2 * 8..][..8];
            let products = query[head * 8..][..8].iter().zip(key);
            products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / 8f64.sqrt()
        };
        for (token, weight) in weights.iter().enumerate() {
            let slow: f64 = (0..4)
                .map(|head| softmax(&(0..5).map(|token| logit(head, token)).collect::<Vec<_>>())[token] / 4.0)
                .sum();
            assert!((weight - slow).abs() < 1e-6);
        }
        let mut attention = Attention::new(2);
        attention.add(&weights, &[4, 9]);
        assert_eq!((attention.sums[1], attention.most[0]), (0.0, weights[4]));
    }

    proptest! {
        #[test]
        fn budgets_are_exact(
            received in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 8), 5),
            keep in 0usize..9,
            key in prop::collection::btree_set(0u32..8, 0..8),
        ) {
            let image: Vec<usize> = (0..8).collect();
            let mut attention = Attention::new(8);
            received.iter().for_each(|row| attention.add(row, &image));
            let key: Vec<u32> = key.into_iter().collect();
            let rank = Rank::TextRows { key_set: key.as_slice().into() };
            let places: Vec<u32> = (0..8).collect();
            let stays = survivors(&boundary(Keep::Exactly(keep as u32), rank), &places, &attention);
            let kept = kept(&stays);
            prop_assert_eq!(kept.len(), keep.min(8));
            if key.len() <= keep {
                prop_assert!(key.iter().all(|&place| kept.contains(&(place as usize))));
            }
        }
    }
}
