//! A determinantal choice: tokens that the class token attends to and that are unlike one another.
//!
//! This is CDPruner's (arXiv 2506.10967) greedy maximisation of a determinant, of the kernel
//! `q_i q_j cos(i, j)`, with the class token's attention in the question's place as the quality `q`. We take
//! it as the diversity-based rival because it has the strongest published figures of the strictly
//! training-free methods that need no second forward pass. Without the question nothing here depends on the
//! prompt, so that the choice is cached with the image; a LLaVA checkpoint has no text tower that could say
//! what a question has to do with a patch anyway.
//!
//! The greedy steps are Chen et al.'s (arXiv 1709.05135): each keeps, per token, what is left of its
//! squared quality outside the span of those chosen.

use rayon::prelude::*;

use super::{
    DropMethod, Method, VisualSettings, attention,
    choice::{Choice, patches},
    everything,
};
use crate::{EncodedImage, Error, ImageLayout, Wants};

/// Quality of the least attended token, where the most attended has 1.
const LEAST_QUALITY: f32 = 0.1;

/// Below this share of a squared quality, nothing new is left of a token but rounding errors.
const LEAST_GAIN: f32 = 1e-5;

pub(super) struct Dpp(pub(super) VisualSettings);

impl DropMethod for Dpp {
    fn settings(&self) -> &VisualSettings {
        &self.0
    }

    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        self.0.effective_budget().of(layout.tokens())
    }

    fn wants(&self) -> Wants<'static> {
        Wants { cls_attention: true, patch_features: true, ..Wants::default() }
    }

    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        debug_assert_eq!(self.0.method, Method::Dpp);
        let layout = &image.layout;
        let tokens = layout.tokens();
        if self.planned_tokens(layout) == tokens {
            return Ok(everything(image));
        }
        let last = attention(image, &image.cls_final)?;
        let sources: Vec<(usize, (usize, usize))> = patches(layout).collect();
        let scores: Vec<f32> = sources.iter().map(|&(_, (tile, patch))| last[tile][patch]).collect();
        let all = layout.tiles() * layout.base_tokens();
        if image.patch_features.is_empty() || !image.patch_features.len().is_multiple_of(all) {
            let reason = format!("{} features are not those of {all} patches", image.patch_features.len());
            return Err(Error::InvalidPlan(reason));
        }
        let width = image.patch_features.len() / all;
        let features: Vec<Vec<f32>> = sources
            .iter()
            .map(|&(_, (tile, patch))| {
                let from = (tile * layout.base_tokens() + patch) * width;
                unit(&image.patch_features[from..from + width])
            })
            .collect();
        let mut choice = Choice::new(layout, &self.0);
        let order = greedy(&features, &qualities(&scores), choice.room());
        choice.add_all(order.into_iter().map(|at| sources[at].0));
        choice.add_all(super::choice::by_score(layout, &last));
        Ok(choice.finish())
    }
}

fn unit(vector: &[f32]) -> Vec<f32> {
    let square = dot(vector, vector);
    let scale = if square > 0.0 { square.sqrt().recip() } else { 0.0 };
    vector.iter().map(|x| x * scale).collect()
}

/// Attention spans orders of magnitude, so its logarithm is scaled to between [`LEAST_QUALITY`] and 1.
fn qualities(scores: &[f32]) -> Vec<f32> {
    let logs: Vec<f32> =
        scores.iter().map(|&score| if score > 0.0 { score.max(1e-12).ln() } else { 1e-12f32.ln() }).collect();
    let least = logs.iter().copied().fold(f32::INFINITY, f32::min);
    let most = logs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scaled = |log: &f32| if most > least { (log - least) / (most - least) } else { 1.0 };
    logs.iter().map(|log| LEAST_QUALITY + (1.0 - LEAST_QUALITY) * scaled(log)).collect()
}

/// At most `count` indices, in the order in which each adds most to the determinant; fewer where the features
/// span no more.
fn greedy(features: &[Vec<f32>], qualities: &[f32], count: usize) -> Vec<usize> {
    /// A token's squared rest, and its coordinates along those chosen.
    struct Rest {
        gain: f32,
        along: Vec<f32>,
    }
    let rest = |&quality: &f32| Rest { gain: quality * quality, along: Vec::with_capacity(count) };
    let mut rests: Vec<Rest> = qualities.iter().map(rest).collect();
    let mut order = Vec::with_capacity(count);
    while order.len() < count {
        let share = |at: usize| rests[at].gain / (qualities[at] * qualities[at]);
        let candidates = (0..rests.len()).filter(|&at| share(at) > LEAST_GAIN);
        let better = |best: usize, at: usize| if rests[at].gain > rests[best].gain { at } else { best };
        let Some(next) = candidates.reduce(better) else { break };
        let (root, along) = (rests[next].gain.sqrt(), rests[next].along.clone());
        rests.par_iter_mut().enumerate().with_min_len(64).for_each(|(at, rest)| {
            let kernel = qualities[at] * qualities[next] * dot(&features[at], &features[next]);
            let coordinate = (kernel - dot(&rest.along, &along)) / root;
            rest.along.push(coordinate);
            rest.gain -= coordinate * coordinate;
        });
        rests[next].gain = 0.0;
        order.push(next);
    }
    order
}

/// In eight sums, which a compiler keeps in one register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a.zip(b) {
        for (sum, (x, y)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drop::{
        Budget, method,
        tests::{encoded, example_layout},
    };

    /// Two pairs of equal vectors and one between: the second choice is never the first one's double, and
    /// the third spans nothing new.
    #[test]
    fn doubles_are_left_out() {
        let features = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8]].map(|of| of.to_vec());
        assert_eq!(greedy(&features, &[1.0, 0.9, 0.8, 0.7, 0.6], 5), [0, 2]);
        assert_eq!(greedy(&features, &[0.9, 1.0, 0.7, 0.8, 0.6], 5), [1, 3]);
    }

    /// The greedy choice by the definition: the largest determinant of the kernel's part, by Laplace.
    #[test]
    fn each_step_has_the_largest_determinant() {
        fn determinant(matrix: &[Vec<f64>]) -> f64 {
            let Some(first) = matrix.first() else { return 1.0 };
            let minor = |col: usize| -> Vec<Vec<f64>> {
                let row = |row: &Vec<f64>| {
                    row.iter().enumerate().filter(|&(at, _)| at != col).map(|(_, &x)| x).collect()
                };
                matrix[1..].iter().map(row).collect()
            };
            let sign = |col: usize| if col.is_multiple_of(2) { 1.0 } else { -1.0 };
            first.iter().enumerate().map(|(col, x)| sign(col) * x * determinant(&minor(col))).sum()
        }
        let value = |at: usize| ((at * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let features: Vec<Vec<f32>> =
            (0..7).map(|row| unit(&(0..5).map(|col| value(row * 5 + col + 1)).collect::<Vec<_>>())).collect();
        let qualities: Vec<f32> = (0..7).map(|at| 0.6 + 0.05 * ((at * 3) % 7) as f32).collect();
        let kernel =
            |a: usize, b: usize| f64::from(qualities[a] * qualities[b] * dot(&features[a], &features[b]));
        let order = greedy(&features, &qualities, 4);
        for step in 0..order.len() {
            let of = |last: usize| {
                let chosen: Vec<usize> = order[..step].iter().copied().chain([last]).collect();
                let rows: Vec<Vec<f64>> =
                    chosen.iter().map(|&a| chosen.iter().map(|&b| kernel(a, b)).collect()).collect();
                determinant(&rows)
            };
            for other in (0..7).filter(|other| !order[..step].contains(other)) {
                assert!(of(order[step]) >= of(other) - 1e-9, "step {step}");
            }
        }
    }

    #[test]
    fn equal_patches_are_chosen_once_before_any_is_doubled() {
        let mut image = encoded(example_layout());
        // Four kinds of patches, in turn.
        image.patch_features = (0..80 * 4).map(|at| if at / 4 % 4 == at % 4 { 1.0 } else { 0.0 }).collect();
        image.cls_final = vec![0.1; 80];
        let settings = VisualSettings::of(Method::Dpp).with_budget(Budget::Count(4));
        assert_eq!(method(&settings).unwrap().before_llm(&image).unwrap(), [0, 1, 2, 3]);
        image.patch_features.clear();
        let error = method(&settings).unwrap().before_llm(&image).unwrap_err();
        assert!(error.to_string().contains("features are not those"), "{error}");
    }
}
