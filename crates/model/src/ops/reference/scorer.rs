//! The learned method's scores and the latest queries, in plain candle operations.

use candle_core::{DType, Tensor};

use super::{ReferenceOps, ReferenceStep};
use crate::{
    Error,
    batch::BatchSequence,
    kv_cache::{CacheMethod, SideCar},
    ops::Reg,
};

/// One layer's scorer on the device, in f32.
pub(super) struct LayerScorer {
    scale: Tensor,
    /// `[1, 1, features]` per tap.
    taps: Vec<Tensor>,
    p1: Tensor,
    b1: Tensor,
    p2: Tensor,
    b2: Tensor,
}

/// The scorers of all layers; none without weights.
pub(super) fn scorers(
    side_car: Option<&SideCar>,
    device: &candle_core::Device,
) -> Result<Vec<LayerScorer>, Error> {
    let Some(weights) = side_car.and_then(|side_car| side_car.learned.as_ref()) else {
        return Ok(Vec::new());
    };
    let (features, hidden) = (weights.features, weights.hidden);
    let load = |numbers: &[f32], rows: usize, columns: usize| -> Result<Tensor, Error> {
        Ok(Tensor::from_slice(numbers, (rows, columns), device)?)
    };
    let of_layer = |layer: &crate::kv_cache::side_car::LearnedLayer| -> Result<LayerScorer, Error> {
        let tap = |tap: usize| -> Result<Tensor, Error> {
            let column: Vec<f32> = layer.dw.iter().skip(tap).step_by(weights.taps).copied().collect();
            Ok(Tensor::from_vec(column, (1, 1, features), device)?)
        };
        let outputs = layer.b2.len();
        Ok(LayerScorer {
            scale: Tensor::from_slice(&layer.scale, (1, 1, features), device)?,
            taps: (0..weights.taps).map(tap).collect::<Result<_, _>>()?,
            p1: load(&layer.p1, hidden, 2 * features)?.t()?.contiguous()?,
            b1: load(&layer.b1, 1, hidden)?,
            p2: load(&layer.p2, outputs, hidden)?.t()?.contiguous()?,
            b2: load(&layer.b2, 1, outputs)?,
        })
    };
    weights.layers.iter().map(of_layer).collect()
}

impl LayerScorer {
    /// Scores `[count * rows, outputs]` of rows `features [count, rows, features]` after `tail [count, taps - 1,
    /// features]`.
    fn score(&self, tail: &Tensor, features: &Tensor) -> Result<Tensor, Error> {
        let rows = features.dim(1)?;
        let x = Tensor::cat(&[tail, features], 1)?.broadcast_mul(&self.scale)?;
        let mut convolved = x.narrow(1, 0, rows)?.broadcast_mul(&self.taps[0])?;
        for (i, tap) in self.taps.iter().enumerate().skip(1) {
            convolved = (convolved + x.narrow(1, i, rows)?.broadcast_mul(tap)?)?;
        }
        let own = x.narrow(1, self.taps.len() - 1, rows)?;
        let input = Tensor::cat(&[&own, &convolved], 2)?.flatten_to(1)?;
        let hidden = input.matmul(&self.p1)?.broadcast_add(&self.b1)?.gelu_erf()?;
        Ok(hidden.matmul(&self.p2)?.broadcast_add(&self.b2)?)
    }
}

impl ReferenceOps {
    /// Does [`Ops::observe`](crate::ops::Ops::observe) for all sequences of a step.
    pub(super) fn observe_rows(&mut self, step: &ReferenceStep, layer: usize) -> Result<(), Error> {
        if self.blocks.is_none() {
            return Ok(());
        }
        self.row_scores.clear();
        self.row_scores.resize(step.positions.len() * 2 * self.config.model.num_kv_heads, 0.0);
        let mut first = 0;
        while first < step.sequences.len() {
            let method = self.method_of(&step.sequences[first])?;
            let rows = step.sequences[first].rows.len();
            let mut end = first + 1;
            while end < step.sequences.len()
                && step.sequences[end].rows.len() == rows
                && self.method_of(&step.sequences[end])? == method
            {
                end += 1;
            }
            let alike = &step.sequences[first..end];
            if method.is_some_and(CacheMethod::scores_rows) {
                self.score_rows(alike, layer)?;
            }
            first = end;
        }
        Ok(())
    }

    fn method_of(&self, sequence: &BatchSequence) -> Result<Option<CacheMethod>, Error> {
        Ok(self.blocks()?.state(sequence.block)?.settings().map(|settings| settings.method))
    }

    /// Scores the rows of sequences that follow one another with as many rows each.
    fn score_rows(&mut self, sequences: &[BatchSequence], layer: usize) -> Result<(), Error> {
        let Some(weights) =
            self.fold_context.side_car.as_ref().and_then(|side_car| side_car.learned.as_ref())
        else {
            return Ok(());
        };
        let (width, tail_rows, tail_len) = (weights.features, weights.taps - 1, weights.tail_len());
        let (count, rows) = (sequences.len(), sequences[0].rows.len());
        let start = sequences[0].rows.start as usize;
        let features = self.features(start, count * rows)?.reshape((count, rows, width))?;
        let mut tails = Vec::with_capacity(count * tail_len);
        let blocks = self.blocks_mut()?;
        for sequence in sequences {
            tails.extend_from_slice(&blocks.state_mut(sequence.block)?.kept_mut(layer)[..tail_len]);
        }
        let tail = Tensor::from_vec(tails, (count, tail_rows, width), features.device())?;
        let scores = self.scorers[layer].score(&tail, &features)?.flatten_all()?.to_vec1::<f32>()?;
        let at = start * 2 * self.config.model.num_kv_heads;
        self.row_scores[at..at + scores.len()].copy_from_slice(&scores);
        let all = Tensor::cat(&[&tail, &features], 1)?.narrow(1, rows, tail_rows)?;
        let all = all.flatten_all()?.to_vec1::<f32>()?;
        let blocks = self.blocks_mut()?;
        for (sequence, new) in sequences.iter().zip(all.chunks_exact(tail_len.max(1))) {
            blocks.state_mut(sequence.block)?.kept_mut(layer)[..tail_len].copy_from_slice(new);
        }
        Ok(())
    }

    /// `[rows, features]` in f32: of every KV head the key in half-split order, then the value.
    fn features(&self, start: usize, rows: usize) -> Result<Tensor, Error> {
        let model = &self.config.model;
        let (heads, dim) = (model.num_kv_heads, model.head_dim);
        let qkv = self.get(Reg::Qkv)?.narrow(0, start, rows)?;
        let part = |from: usize| -> Result<Tensor, Error> {
            let part = qkv.narrow(1, from, heads * dim)?.contiguous()?.to_dtype(DType::F32)?;
            Ok(part.reshape((rows, heads, dim))?)
        };
        let order: Vec<u32> = {
            let identity: Vec<f32> = (0..dim).map(|i| i as f32).collect();
            let mut half_split = vec![0.0; dim];
            self.fold_context.rotation.copy_half_split(&identity, &mut half_split);
            half_split.into_iter().map(|i| i as u32).collect()
        };
        let order = Tensor::new(order.as_slice(), qkv.device())?;
        let keys = part(model.q_dim())?.index_select(&order, 2)?;
        Ok(Tensor::cat(&[&keys, &part(model.q_dim() + model.kv_dim())?], 2)?.flatten_from(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::scorer_fixture::Fixture;

    #[test]
    fn scores_are_those_of_the_fixture() {
        let fixture = Fixture::read();
        let device = candle_core::Device::Cpu;
        let scorers = scorers(Some(&fixture.side_car), &device).unwrap();
        let features = Tensor::from_slice(&fixture.features, (1, 20, 384), &device).unwrap();
        let tail = Tensor::zeros((1, 8, 384), DType::F32, &device).unwrap();
        for (layer, scorer) in scorers.iter().enumerate() {
            let scores = scorer.score(&tail, &features).unwrap().flatten_all().unwrap();
            for (i, score) in scores.to_vec1::<f32>().unwrap().into_iter().enumerate() {
                let expected = fixture.expected(layer, i / 6, i % 6 / 2, i % 2);
                assert!((score - expected).abs() < 1e-4, "layer {layer}: {score} {expected}");
            }
        }
    }
}
