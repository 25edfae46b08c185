//! Training the `learned` scorer: it regresses attention of the frozen model's ordinary forward pass.
//!
//! Nothing is propagated through the model. Each layer's scorer is on its own, so a layer's gradients
//! are taken as soon as its maps are known, and only one layer's activations exist at a time.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::{
    decoder::Decoder,
    error::Result,
    gradients::{logistic_loss, smooth_l1},
    parameters::{Gradients, Parameters},
    recipe::{Kind, TrainingBatch},
    scorer::{self, LayerScorer, Output, ScorerShape, log_observed},
    settings::LearnedSettings,
    teacher::{Aim, LayerMaps, Teacher},
    training::{Trainer, ids_tensor, micro_batches},
};

/// Queries whose attention maps exist at once.
const CHUNK: usize = 512;

/// Tokens at the start that every method keeps, so that their scores do not matter.
const SINKS: usize = 4;

/// Steps over which the learning rate rises.
const WARM_UP: u64 = 20;

/// The learning rate never falls below this.
const LEAST_RATE: f64 = 1e-5;

/// See the [module](self).
pub(crate) struct LearnedTrainer<'a> {
    decoder: &'a Decoder,
    settings: LearnedSettings,
    micro_batch: usize,
}

impl<'a> LearnedTrainer<'a> {
    pub(crate) fn new(decoder: &'a Decoder, settings: LearnedSettings, micro_batch: usize) -> Self {
        Self { decoder, settings, micro_batch }
    }

    fn walk(
        &self,
        batch: &TrainingBatch,
        part: Range<usize>,
        visit: impl FnMut(usize, LayerMaps) -> Result<()>,
    ) -> Result<()> {
        let ids = ids_tensor(&batch.sequences[part.clone()], self.decoder.device())?;
        let aim = match batch.kind {
            Kind::Natural => Aim::Mean,
            Kind::Repeat | Kind::Questions => Aim::Answers {
                rows: batch.answering[part.clone()].to_vec(),
                before: batch.askable[part].to_vec(),
            },
        };
        Teacher::new(self.decoder, self.window(batch), CHUNK).walk(&ids, &aim, visit)
    }

    /// Queries after a token that are observed in this batch.
    fn window(&self, batch: &TrainingBatch) -> usize {
        let windows = &self.settings.windows;
        windows[batch.step as usize % windows.len()]
    }

    /// Tokens of a sequence whose scores count.
    fn scored(&self, batch: &TrainingBatch, sequence: usize) -> Range<usize> {
        let length = batch.length();
        let window = self.window(batch);
        let end = match batch.kind {
            // Of the last tokens too few later queries are known.
            Kind::Natural => length.saturating_sub(window + (length / 8).min(512)),
            // What the last ones received came from the questions, for the most part.
            Kind::Repeat | Kind::Questions => batch.askable[sequence].saturating_sub(window / 2),
        };
        SINKS.min(end)..end
    }

    /// `[b, n, kv_heads]`: 1 / (scores that count in the whole batch) where they count, else 0.
    fn loss_weights(&self, batch: &TrainingBatch, part: Range<usize>) -> Result<Tensor> {
        let kv_heads = self.decoder.config().num_kv_heads;
        let counted: usize = (0..batch.sequences.len()).map(|at| self.scored(batch, at).len()).sum();
        let weight = 1.0 / (counted * kv_heads).max(1) as f32;
        let (length, count) = (batch.length(), part.len());
        let weights = part.flat_map(|at| {
            let scored = self.scored(batch, at);
            (0..length * kv_heads).map(move |i| if scored.contains(&(i / kv_heads)) { weight } else { 0.0 })
        });
        let weights = Tensor::from_vec(weights.collect(), (count, length, kv_heads), &Device::Cpu)?;
        Ok(weights.to_device(self.decoder.device())?)
    }
}

/// The output that a kind trains.
fn output(kind: Kind) -> Output {
    match kind {
        Kind::Natural => Output::Text,
        Kind::Repeat | Kind::Questions => Output::Recall,
    }
}

/// The loss of every score `[b, n, kv_heads]`; `weights` say which count.
///
/// The text score regresses the log of the mean attention of later text. The recall score is the
/// log-odds of the largest attention that an answer pays: cross-entropy makes it the *expected* one, where
/// regression of logs would predict a typical one, which for a token that is seldom asked for, but then
/// with all attention, is next to nothing. Divided by the entropy of the sequence's mean, so that
/// layers count alike.
fn losses(kind: Kind, predicted: &Tensor, maps: &LayerMaps, weights: &Tensor) -> Result<Tensor> {
    match output(kind) {
        Output::Text => Ok(smooth_l1(&(predicted - text_target(maps)?)?)?),
        Output::Recall => {
            let mean = counted_mean(&maps.target, weights)?;
            let rest = mean.affine(-1.0, 1.0)?;
            let entropy = ((&mean * mean.log()?)? + (&rest * rest.log()?)?)?.affine(-1.0, 1e-3)?;
            Ok(logistic_loss(predicted, &maps.target)?.broadcast_div(&entropy)?)
        }
    }
}

/// Log of the mean attention of later text.
fn text_target(maps: &LayerMaps) -> Result<Tensor> {
    Ok((&maps.target + 1e-6)?.log()?)
}

/// Mean of `x [b, n, kv_heads]` over what counts in each sequence `[b, 1, 1]`, inside (0, 1) by a margin.
fn counted_mean(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let sums = |x: &Tensor| x.sum_keepdim(2)?.sum_keepdim(1);
    let mean = (sums(&(x * weights)?)? / sums(weights)?.maximum(1e-30f32)?)?;
    Ok(mean.clamp(1e-5f32, 0.9f32)?)
}

impl Trainer for LearnedTrainer<'_> {
    fn initial(&self, seed: u64) -> Result<Parameters> {
        let config = self.decoder.config();
        let shape = ScorerShape {
            layers: config.num_layers,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            hidden: self.settings.hidden,
            kernel: self.settings.kernel,
        };
        scorer::initial(shape, seed, self.settings.coefficient_rate, self.decoder.device())
    }

    fn optimizer(&self) -> ((f64, f64), Option<f64>) {
        ((0.9, 0.98), Some(1.0))
    }

    fn rate(&self, peak: f64, step: u64, steps: u64) -> f64 {
        let warm = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
        let share = step as f64 / steps as f64;
        peak * warm * (0.5 + 0.5 * (std::f64::consts::PI * share).cos()) + LEAST_RATE
    }

    fn kind(&self, step: u64) -> Kind {
        Kind::of_step(step)
    }

    /// The first batch of each output decides its bias, the very first one the features' scale.
    fn prepare(&self, parameters: &mut Parameters, step: u64, batch: &TrainingBatch) -> Result<()> {
        if step >= 2 {
            return Ok(());
        }
        let part = 0..batch.sequences.len().min(self.micro_batch);
        let kv_heads = self.decoder.config().num_kv_heads;
        // Ordinary text is judged by its first half, where later queries are plenty.
        let end = match batch.kind {
            Kind::Natural => batch.length() / 2,
            _ => part.clone().map(|at| batch.askable[at]).min().unwrap_or(0),
        };
        let start = SINKS.min(end.saturating_sub(1));
        let (mut scales, mut biases) = (Vec::new(), Vec::new());
        let (a, b2) = (parameters.get("a").cloned(), parameters.get("b2").cloned());
        let (Some(a), Some(b2)) = (a, b2) else { return Ok(()) };
        self.walk(batch, part, |layer, maps| {
            let a = a.get(layer)?.narrow(1, output(batch.kind) as usize, 1)?.squeeze(1)?;
            let mean = |x: &Tensor| -> Result<Tensor> {
                Ok(x.narrow(1, start, end - start)?.contiguous()?.flatten(0, 1)?.mean(0)?)
            };
            let known = mean(&log_observed(&maps.observed)?.broadcast_mul(&a)?)?;
            let wanted = match output(batch.kind) {
                Output::Text => mean(&text_target(&maps)?)?,
                Output::Recall => {
                    let share = mean(&maps.target)?.clamp(1e-4f32, 0.9f32)?;
                    (share.log()? - share.affine(-1.0, 1.0)?.log()?)?
                }
            };
            biases.push((wanted - known)?);
            if step == 0 {
                scales.push(inverse_deviation(&maps.features)?);
            }
            Ok(())
        })?;
        let biases = Tensor::stack(&biases, 0)?.unsqueeze(2)?;
        let b2 = b2.reshape(((), kv_heads, 2))?;
        let other = |output: Output| b2.narrow(2, output as usize, 1);
        let b2 = match batch.kind {
            Kind::Natural => Tensor::cat(&[&biases, &other(Output::Recall)?], 2)?,
            Kind::Repeat | Kind::Questions => Tensor::cat(&[&other(Output::Text)?, &biases], 2)?,
        };
        parameters.set("b2", b2.flatten_from(1)?);
        if step == 0 {
            parameters.set("scale", Tensor::stack(&scales, 0)?);
        }
        Ok(())
    }

    fn gradients(&self, parameters: &Parameters, batch: &TrainingBatch) -> Result<(Gradients, Tensor)> {
        let mut gradients = Gradients::new(parameters)?;
        let layers = self.decoder.config().num_layers as f64;
        let mut total = Tensor::zeros((), DType::F32, self.decoder.device())?;
        for part in micro_batches(batch.sequences.len(), self.micro_batch) {
            let weights = (self.loss_weights(batch, part.clone())? / layers)?;
            self.walk(batch, part, |layer, maps| {
                let leaves = parameters.leaves(layer)?;
                let scorer = LayerScorer::of(&leaves)?;
                let predicted = scorer.predict(&maps.features, &maps.observed, output(batch.kind))?;
                let loss = (losses(batch.kind, &predicted, &maps, &weights)? * &weights)?.sum_all()?;
                gradients.add(layer, &leaves, &loss.backward()?)?;
                total = (&total + loss.detach())?;
                Ok(())
            })?;
        }
        Ok((gradients, total))
    }
}

/// 1 / standard deviation of each channel of `features [b, n, C]`.
fn inverse_deviation(features: &Tensor) -> Result<Tensor> {
    let rows = features.flatten(0, 1)?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
    Ok(centred.sqr()?.mean(0)?.sqrt()?.maximum(1e-3)?.recip()?)
}

#[cfg(test)]
#[path = "learned_tests.rs"]
mod tests;
