//! Keeps everything: the reference to compare with.

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

pub(super) struct Full;

impl FoldMethod for Full {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        // A full block is as large as its sequence; it is never asked to fold. Should it be,
        // older tokens count as more valuable so that nothing already promised is dropped first.
        scores.fill(view, |head, slot| -(view.position(head, slot) as f32));
        Ok(())
    }
}
