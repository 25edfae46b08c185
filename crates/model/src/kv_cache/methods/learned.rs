//! Score-once causal convolution beside the observed attention.
//!
//! Every token got two scores when it arrived (columns 1 and 2): the log of the mean attention that
//! far-away text will pay it, and the log of the most it will get when somebody asks for it. Both are
//! corrected by what was observed; most slots go to the best of the first ranking, a share to the
//! best of the second among the others.

use super::{FoldMethod, LayerView, Scores, observed::scale_to_age};
use crate::Error;

pub(super) struct Learned;

impl FoldMethod for Learned {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        let weights = view.context.side_car.as_ref().and_then(|side_car| side_car.learned.as_ref());
        let Some(weights) = weights else {
            return Err(Error::InvalidBatch("method learned has no side-car weights".into()));
        };
        let coefficients = &weights.layers[view.layer].a;
        let score = |head: usize, slot: usize, output: usize| {
            let observed = (view.mean_received(head, slot) + 1e-5).ln();
            view.column(1 + output, head)[slot] + coefficients[2 * head + output] * observed
        };
        scores.fill(view, |head, slot| score(head, slot, 0));
        if view.settings.recall_permille > 0 {
            scores.fill_second(view, |head, slot| score(head, slot, 1));
        }
        Ok(())
    }

    fn rescale(&self, received: f32, old_age: u32, new_age: u32) -> f32 {
        scale_to_age(received, old_age, new_age)
    }
}
