//! PyramidDrop (arXiv 2410.17247) and FastV: the last prompt token's attention decides inside the decoder.
//!
//! Everything goes in, newlines too; counts at the boundaries are exact.

use locket_model::{Boundary, Keep, Rank};

use super::{DropMethod, Stage, VisualSettings};
use crate::{EncodedImage, Error, ImageLayout};

/// Drops at the decoder's quarter points, the same share each time, down to the budget at the last.
pub(super) struct Pyramid(pub(super) VisualSettings);

impl DropMethod for Pyramid {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn stages(&self, layers: usize, layout: &ImageLayout) -> Vec<Stage> {
        let tokens = layout.tokens();
        let last = self.0.effective_budget().of(tokens);
        let share = match self.0.lambda {
            Some(lambda) => lambda,
            None => (last as f64 / tokens.max(1) as f64).cbrt(),
        };
        let keep = |stage: i32| ((tokens as f64 * share.powi(stage) + 1e-9).floor() as usize).max(last);
        let counts = [keep(1), keep(2), last];
        let layer = |quarter: usize| (quarter * layers + 2) / 4;
        stages(layers, tokens, (1..).map(layer).zip(counts))
    }

    fn boundaries(&self, layers: usize, image: &EncodedImage, kept: &[u32]) -> Result<Vec<Boundary>, Error> {
        Ok(last_token(self.stages(layers, &image.layout), kept))
    }
}

/// Drops once, before the third layer, down to the budget.
pub(super) struct FastV(pub(super) VisualSettings);

impl DropMethod for FastV {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn stages(&self, layers: usize, layout: &ImageLayout) -> Vec<Stage> {
        let tokens = layout.tokens();
        let layer = 2.min(layers.saturating_sub(1));
        stages(layers, tokens, [(layer, self.0.effective_budget().of(tokens))])
    }

    fn boundaries(&self, layers: usize, image: &EncodedImage, kept: &[u32]) -> Result<Vec<Boundary>, Error> {
        Ok(last_token(self.stages(layers, &image.layout), kept))
    }
}

fn last_token(stages: Vec<Stage>, kept: &[u32]) -> Vec<Boundary> {
    let boundary = |stage: Stage| Boundary {
        layer: stage.layer,
        keep: Keep::Exactly(stage.keep.min(kept.len() as u32)),
        rank: Rank::LastToken,
    };
    stages.into_iter().map(boundary).collect()
}

/// Stages from (layer, tokens) in order, without those that drop nothing or, in a shallow decoder, fall on
/// the layer of a later one. A decoder of one layer has no boundary.
pub(super) fn stages(
    layers: usize,
    into: usize,
    planned: impl IntoIterator<Item = (usize, usize)>,
) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut here = into as u32;
    for (layer, keep) in planned {
        let (layer, keep) = (layer.min(layers.saturating_sub(1)) as u32, keep as u32);
        if layer == 0 || keep >= here {
            continue;
        }
        here = keep;
        match stages.last_mut().filter(|stage| stage.layer == layer) {
            Some(stage) => stage.keep = keep,
            None => stages.push(Stage { layer, keep }),
        }
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        drop::{Budget, Method, mean_tokens},
        geometry::testing::{llava_15_7b, llava_next_7b},
    };

    fn of(settings: VisualSettings, layers: usize, layout: &ImageLayout) -> Vec<(u32, u32)> {
        let stages = super::super::method(&settings).unwrap().stages(layers, layout);
        stages.iter().map(|stage| (stage.layer, stage.keep)).collect()
    }

    /// The specification's figures: 576 tokens, 32 layers, lambda 0.5; 46.9 % of the tokens are left.
    #[test]
    fn the_published_pyramid() {
        let layout = ImageLayout::of(&llava_15_7b(), 336, 336);
        let stages = [(8, 288), (16, 144), (24, 72)];
        assert_eq!(of(VisualSettings::of(Method::Pyramid), 32, &layout), stages);
        let lambda = VisualSettings { lambda: Some(0.5), ..VisualSettings::of(Method::Pyramid) };
        assert_eq!(of(lambda, 32, &layout), stages);
        let pyramid = super::super::method(&lambda).unwrap();
        let mean = mean_tokens(32, 576, &pyramid.stages(32, &layout));
        assert!((mean / 576.0 - 0.46875).abs() < 1e-9);
        let layers: Vec<u32> = of(lambda, 30, &layout).iter().map(|stage| stage.0).collect();
        assert_eq!(layers, [8, 15, 23]);
    }

    #[test]
    fn the_last_stage_is_the_budget_and_shallow_decoders_have_fewer() {
        let layout = ImageLayout::of(&llava_next_7b(), 672, 672);
        for count in [1, 7, 293, 2927] {
            let settings = VisualSettings::of(Method::Pyramid).with_budget(Budget::Count(count));
            for layers in [2, 3, 4, 30] {
                assert_eq!(of(settings, layers, &layout).last().unwrap().1, count, "{layers} layers");
            }
        }
        let all = VisualSettings::of(Method::Pyramid).with_budget(Budget::ALL);
        assert_eq!(of(all, 32, &layout), []);
        assert_eq!(of(VisualSettings::of(Method::Fastv), 32, &layout), [(2, 1464)]);
        assert_eq!(of(VisualSettings::of(Method::Fastv), 1, &layout), []);
    }
}
