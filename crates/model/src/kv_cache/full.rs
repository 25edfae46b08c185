//! Keeps everything: the reference to compare with.

use super::{FoldMethod, LayerView};

pub(super) struct Full;

impl FoldMethod for Full {
    fn rank(&self, view: LayerView<'_>, scores: &mut [f32]) {
        // A full block is as large as its sequence; it is never asked to fold. Should it be,
        // older tokens count as more valuable so that nothing already promised is dropped first.
        for head in 0..view.num_kv_heads {
            for slot in 0..view.len {
                scores[head * view.len + slot] = -(view.positions[head * view.stride + slot] as f32);
            }
        }
    }
}
