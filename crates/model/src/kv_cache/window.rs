//! Sinks and a sliding window: the cheap baseline (StreamingLLM, arXiv 2309.17453).

use super::{FoldMethod, LayerView};

pub(super) struct Window;

impl FoldMethod for Window {
    fn rank(&self, view: LayerView<'_>, scores: &mut [f32]) {
        // The driver puts the sinks on top; here newer is better.
        for head in 0..view.num_kv_heads {
            for slot in 0..view.len {
                scores[head * view.len + slot] = view.positions[head * view.stride + slot] as f32;
            }
        }
    }
}
