//! LoCoCo as published (arXiv 2406.05317): half of the slots keep heavy hitters, the other half are
//! mixtures of the rest.
//!
//! A convolution over the remaining entries, in the order of their slots, gives one row of scores per
//! mixed slot; rectified and normalised by a softmax along the entries it is a row of weights, mixed by
//! a gate with the one-hot rows of the best remaining entries. Heavy hitters are those that received
//! most attention since the last fold. Mixed keys average keys that were rotated by different
//! positions; as published, nothing is rotated back.

use super::{FoldMethod, LayerView, Scores};
use crate::{Error, kv_cache::side_car::LococoLayer};

pub(super) struct Lococo;

impl FoldMethod for Lococo {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        scores.fill(view, |head, slot| view.column(0, head)[slot]);
        Ok(())
    }
}

/// New contents of a layer's slots, and buffers.
#[derive(Debug, Default)]
pub(in crate::kv_cache) struct Mixture {
    /// `[kv_heads, slots, head_dim]`.
    pub(in crate::kv_cache) keys: Vec<f32>,
    /// `[kv_heads, slots, head_dim]`.
    pub(in crate::kv_cache) values: Vec<f32>,
    /// Slots `[kv_heads, slots]` whose positions they have: a mixed slot that of its one-hot row's entry.
    pub(in crate::kv_cache) sources: Vec<u32>,
    head_keys: Vec<f32>,
    head_values: Vec<f32>,
}

/// Folds every head of a layer to `M` slots: exact ones, then mixed ones.
pub(in crate::kv_cache) fn mix(view: &LayerView<'_>, mixture: &mut Mixture) -> Result<(), Error> {
    let weights = view.context.side_car.as_deref().and_then(|side_car| side_car.lococo.as_ref());
    let Some(weights) = weights else {
        return Err(Error::InvalidBatch("method lococo has no side-car weights".into()));
    };
    let layer = &weights.layers[view.layer];
    let (len, dim, slots) = (view.len, view.head_dim, view.settings.slots as usize);
    mixture.keys.clear();
    mixture.values.clear();
    mixture.sources.clear();
    mixture.head_keys.resize(len * dim, 0.0);
    mixture.head_values.resize(len * dim, 0.0);
    for head in 0..view.num_kv_heads {
        view.slots.read(head, &mut mixture.head_keys, &mut mixture.head_values)?;
        let entries = Entries { keys: &mixture.head_keys, values: &mixture.head_values, dim };
        let mixed = slots.min(len).min(layer.bias.len());
        let choice = Choice::of(view.column(0, head), slots.min(len) - mixed, mixed);
        let half_split = |key: &[f32], out: &mut [f32]| view.context.rotation.copy_half_split(key, out);
        let rows = choice.weights(&entries, layer, weights.kernel, half_split);
        for (from, to) in [(entries.keys, &mut mixture.keys), (entries.values, &mut mixture.values)] {
            for &slot in &choice.exact {
                to.extend_from_slice(&from[slot * dim..(slot + 1) * dim]);
            }
            for row in rows.chunks_exact(choice.rest.len()) {
                let start = to.len();
                to.resize(start + dim, 0.0);
                for (&weight, &slot) in row.iter().zip(&choice.rest) {
                    let entry = &from[slot * dim..(slot + 1) * dim];
                    to[start..].iter_mut().zip(entry).for_each(|(sum, x)| *sum += weight * x);
                }
            }
        }
        let kept = choice.exact.iter().chain(choice.one_hot.iter().map(|&row| &choice.rest[row]));
        mixture.sources.extend(kept.map(|&slot| slot as u32));
    }
    Ok(())
}

/// Entries of one head `[len, dim]`.
struct Entries<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    dim: usize,
}

/// Which entries stay as they are; all in the order of slots.
struct Choice {
    exact: Vec<usize>,
    /// The others.
    rest: Vec<usize>,
    /// Of the others, the best: indices into `rest`, one per mixed slot.
    one_hot: Vec<usize>,
}

impl Choice {
    fn of(received: &[f32], exact: usize, mixed: usize) -> Self {
        let mut order: Vec<usize> = (0..received.len()).collect();
        order.sort_by(|&a, &b| received[b].total_cmp(&received[a]).then(a.cmp(&b)));
        let sorted = |mut slots: Vec<usize>| {
            slots.sort_unstable();
            slots
        };
        let best = sorted(order[exact..exact + mixed].to_vec());
        let rest = sorted(order[exact..].to_vec());
        let one_hot = best.iter().filter_map(|slot| rest.binary_search(slot).ok()).collect();
        Self { exact: sorted(order[..exact].to_vec()), rest, one_hot }
    }

    /// Weights of the mixed slots over the remaining entries `[mixed, rest]`. `half_split` brings a
    /// key's dimensions into the order that the weights were trained with.
    fn weights(
        &self,
        entries: &Entries<'_>,
        layer: &LococoLayer,
        kernel: usize,
        half_split: impl Fn(&[f32], &mut [f32]),
    ) -> Vec<f32> {
        let (dim, count) = (entries.dim, self.rest.len());
        // Channels-first `[2 dim, count + kernel - 1]`, padded so that the inner loop has no borders.
        let (padding, width) = ((kernel - 1) / 2, count + kernel - 1);
        let mut input = vec![0.0f32; 2 * dim * width];
        let mut key = vec![0.0; dim];
        for (i, &slot) in self.rest.iter().enumerate() {
            half_split(&entries.keys[slot * dim..(slot + 1) * dim], &mut key);
            let features = key.iter().chain(&entries.values[slot * dim..(slot + 1) * dim]);
            features.enumerate().for_each(|(channel, &x)| input[channel * width + padding + i] = x);
        }
        let mixed = self.one_hot.len();
        let mut rows = vec![0.0f32; mixed * count];
        for (m, row) in rows.chunks_exact_mut(count).enumerate() {
            row.fill(layer.bias[m]);
            for channel in 0..2 * dim {
                for tap in 0..kernel {
                    let weight = layer.weight[(m * 2 * dim + channel) * kernel + tap];
                    let x = &input[channel * width + tap..][..count];
                    row.iter_mut().zip(x).for_each(|(sum, x)| *sum += weight * x);
                }
            }
            row.iter_mut().for_each(|z| *z = z.max(0.0));
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|z| *z = (*z - max).exp());
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|weight| *weight *= layer.gate / sum);
            row[self.one_hot[m]] += 1.0 - layer.gate;
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Section 4 of our specification: `d = 2, M = 4`, kernel 3, gate 0.5, six entries.
    #[test]
    fn worked_example() {
        let keys = [0.5, -0.1, 0.2, 0.4, -0.3, 0.8, 0.9, 0.1, -0.6, -0.2, 0.1, 0.7];
        let values = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, -1.0, 0.2, 0.3, -0.4, 0.8, 0.9];
        let weight = |m: usize, c: usize, tap: usize| 0.1 * ((m + 1) * (c + 1)) as f32 - 0.2 * tap as f32;
        let weight = (0..24).map(|i| weight(i / 12, i / 3 % 4, i % 3)).collect();
        let layer = LococoLayer { weight, bias: vec![0.05, -0.05], gate: 0.5 };
        let choice = Choice::of(&[2.0, 0.3, 0.9, 0.1, 1.4, 0.6], 2, 2);
        assert_eq!((&choice.exact[..], &choice.rest[..]), (&[0, 4][..], &[1, 2, 3, 5][..]));
        assert_eq!(choice.one_hot, [1, 3], "entries 2 and 5");
        let entries = Entries { keys: &keys, values: &values, dim: 2 };
        let rows = choice.weights(&entries, &layer, 3, |key, out| out.copy_from_slice(key));
        let expected = [0.107741, 0.665626, 0.109918, 0.116715, 0.115695, 0.159327, 0.135770, 0.589207];
        rows.iter().zip(expected).for_each(|(w, e)| assert!((w - e).abs() < 2e-6, "{w} {e}"));
        let mixed = |x: &[f32], row: usize, d: usize| -> f32 {
            choice.rest.iter().zip(&rows[row * 4..]).map(|(&slot, w)| w * x[slot * 2 + d]).sum()
        };
        for (x, expected) in [
            (&keys, [-0.067542, 0.668290, 0.156454, 0.599762]),
            (&values, [0.316267, 0.567581, 0.415260, 0.752800]),
        ] {
            for (i, expected) in expected.into_iter().enumerate() {
                assert!((mixed(x, i / 2, i % 2) - expected).abs() < 2e-6);
            }
        }
    }
}
