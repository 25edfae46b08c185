//! Sinks and a sliding window: the cheap baseline (StreamingLLM, arXiv 2309.17453).

use super::{FoldMethod, LayerView};

pub(super) struct Window;

impl FoldMethod for Window {
    fn rank(&self, view: LayerView<'_>, scores: &mut [f32]) {
        // The driver puts the sinks on top; here newer is better. Ages rather than positions, because
        // f32 cannot tell neighbours apart beyond position 2^24, and ages of what is kept are small.
        for head in 0..view.num_kv_heads {
            let positions = &view.positions[head * view.stride..][..view.len];
            let newest = positions.iter().copied().max().unwrap_or(0);
            for (score, &position) in scores[head * view.len..].iter_mut().zip(positions) {
                *score = -((newest - position) as f32);
            }
        }
    }
}
