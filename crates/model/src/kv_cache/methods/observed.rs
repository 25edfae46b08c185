//! The mean attention that a token received per query that could see it.
//!
//! H2O's sum without its bias: a key of the current block is seen by fewer queries than an old one.
//! Needs no weights; the default of models without a side-car.

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

pub(super) struct Observed;

impl FoldMethod for Observed {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        scores.fill(view, |head, slot| view.mean_received(head, slot));
        Ok(())
    }

    fn rescale(&self, received: f32, old_age: u32, new_age: u32) -> f32 {
        scale_to_age(received, old_age, new_age)
    }
}

/// A sum over `old_age` queries as a sum over `new_age` with the same mean.
pub(super) fn scale_to_age(received: f32, old_age: u32, new_age: u32) -> f32 {
    (f64::from(received) * f64::from(new_age) / f64::from(old_age.max(1))) as f32
}
