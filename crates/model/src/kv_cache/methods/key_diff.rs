//! Keys that are least like the mean key (KeyDiff, arXiv 2504.15364).
//!
//! Compared before rotation, so that a token's position does not count.

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

/// Steps of a likeness that are told apart.
const STEPS: f32 = 65_536.0;

pub(super) struct KeyDiff;

impl FoldMethod for KeyDiff {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        let (len, dim) = (view.len, view.head_dim);
        scores.first.clear();
        let mut keys = vec![0.0; len * dim];
        let mut values = vec![0.0; len * dim];
        for head in 0..view.num_kv_heads {
            view.slots.read(head, &mut keys, &mut values)?;
            let mut mean = vec![0.0f32; dim];
            for (slot, key) in keys.chunks_exact_mut(dim).enumerate() {
                view.context.rotation.undo(key, view.position(head, slot));
                normalise(key);
                mean.iter_mut().zip(&*key).for_each(|(mean, x)| *mean += x / len as f32);
            }
            normalise(&mut mean);
            let likeness = |key: &[f32]| key.iter().zip(&mean).map(|(a, b)| a * b).sum::<f32>();
            // Keys of one token are equal before rotation but for rounding: such ties keep the older one.
            scores.first.extend(keys.chunks_exact(dim).map(|key| (-likeness(key) * STEPS).round()));
        }
        Ok(())
    }
}

fn normalise(x: &mut [f32]) {
    let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    x.iter_mut().for_each(|x| *x /= norm);
}
