//! Sinks and a sliding window: the cheap baseline (StreamingLLM, arXiv 2309.17453).

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

pub(super) struct Window;

impl FoldMethod for Window {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        // The driver puts the sinks on top; here newer is better. Ages rather than positions, because
        // f32 cannot tell neighbours apart beyond position 2^24, and ages of what is kept are small.
        scores.fill(view, |head, slot| -(view.age(head, slot) as f32));
        Ok(())
    }
}
