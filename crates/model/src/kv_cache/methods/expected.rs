//! Expected Attention (arXiv 2510.00636): the attention that coming queries are expected to pay.
//!
//! Coming queries are taken for a Gaussian with the moments of the latest ones, rotated as on average
//! over the next 512 positions. The expectation of `exp(q·k / sqrt(d))` is then
//! `exp(mean + variance / 2)` of the scores, which samples of the queries give without their
//! covariance matrix. The result is normalised over the slots and multiplied by the value's norm.

use super::{CacheGeometry, FoldMethod, LayerView, Scores};
use crate::Error;

/// Queries kept per layer, every second row's.
const QUERIES: usize = 64;
/// Rows from one kept query to the next.
const STRIDE: u32 = 2;
/// Coming positions that the rotation is averaged over.
const HORIZON: u32 = 512;
/// Added to the normalised attention, in units of the uniform one.
const EPSILON: f32 = 0.02;

pub(super) struct Expected;

/// Numbers kept per layer.
pub(super) fn num_numbers(geometry: CacheGeometry) -> usize {
    QUERIES * geometry.num_heads * geometry.head_dim
}

impl FoldMethod for Expected {
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error> {
        let (len, dim, heads) = (view.len, view.head_dim, view.num_heads);
        let group = heads / view.num_kv_heads;
        let q_dim = heads * dim;
        let kept = QUERIES.min(view.seen.div_ceil(STRIDE) as usize);
        // Averaging over rotations is linear, so the queries can be averaged one by one.
        let mut queries = view.kept[..kept * q_dim].to_vec();
        for query in queries.chunks_exact_mut(dim) {
            view.context.rotation.apply_mean(query, view.next_position, HORIZON);
        }
        scores.first.clear();
        let (mut keys, mut values) = (vec![0.0; len * dim], vec![0.0; len * dim]);
        let scale = 1.0 / (dim as f32).sqrt();
        for head in 0..view.num_kv_heads {
            view.slots.read(head, &mut keys, &mut values)?;
            let at = scores.first.len();
            for key in keys.chunks_exact(dim) {
                let per_query_head = (0..group).map(|member| {
                    let offset = (head * group + member) * dim;
                    let (mut sum, mut squares) = (0.0f32, 0.0f32);
                    for query in queries.chunks_exact(q_dim) {
                        let products = query[offset..offset + dim].iter().zip(key);
                        let score = products.map(|(q, k)| q * k).sum::<f32>() * scale;
                        sum += score;
                        squares += score * score;
                    }
                    let mean = sum / kept as f32;
                    let variance = (squares / kept as f32 - mean * mean).max(0.0);
                    mean + 0.5 * variance
                });
                scores.first.push(log_sum_exp(per_query_head));
            }
            let new = &mut scores.first[at..];
            let total = log_sum_exp(new.iter().copied());
            for (score, value) in new.iter_mut().zip(values.chunks_exact(dim)) {
                let norm = value.iter().map(|v| v * v).sum::<f32>().sqrt();
                *score = ((*score - total).exp() + EPSILON / len as f32).ln() + (norm + 1e-6).ln();
            }
        }
        Ok(())
    }

    fn query_place(&self, geometry: CacheGeometry, token: u32) -> Option<std::ops::Range<usize>> {
        let width = geometry.num_heads * geometry.head_dim;
        let at = (token / STRIDE) as usize % QUERIES * width;
        token.is_multiple_of(STRIDE).then_some(at..at + width)
    }
}

fn log_sum_exp(x: impl Iterator<Item = f32> + Clone) -> f32 {
    let max = x.clone().fold(f32::NEG_INFINITY, f32::max);
    max + x.map(|x| (x - max).exp()).sum::<f32>().ln()
}
