//! Heavy hitters: the sum of all attention that a token received (H2O, arXiv 2306.14048).
//!
//! Published with half of the slots for recent tokens, which the driver keeps; the sum favours old
//! tokens, which more queries could see.

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

pub(super) struct H2o;

impl FoldMethod for H2o {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        scores.fill(view, |head, slot| view.column(0, head)[slot]);
        Ok(())
    }
}
