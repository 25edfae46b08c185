//! What the latest query attends to, averaged over all heads of the layer (TOVA, arXiv 2401.06104).

use super::{FoldMethod, LayerView, Scores};
use crate::Error;

pub(super) struct Tova;

impl FoldMethod for Tova {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        // Every KV head has the same tokens in the same slots: all keep by the same scores.
        scores.fill(view, |_, slot| (0..view.num_kv_heads).map(|head| view.column(0, head)[slot]).sum());
        Ok(())
    }
}
