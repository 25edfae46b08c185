//! The `learned` method's scorer: a small causal convolution over each token's keys (before rotation)
//! and values, read once when the token arrives.
//!
//! Per layer, `f_t [C]` with `C = 2 kv_heads head_dim`: for every KV head its key, then its value.
//! ```text
//! x_t = f_t * scale
//! c_t = Σ_tau dw[:, tau] * x_{t - (ks-1) + tau}       depthwise, zeros before the text
//! h_t = gelu(p1 [x_t ; c_t] + b1)                     exact gelu
//! o_t = p2 h_t + b2                                   [kv_heads, 2]: text score, recall score
//! ```
//! `c_t` is linear in `f`, so `p1 [x ; c]` is one convolution whose weights are products of
//! parameters; that is how it is computed here.

use candle_core::{Device, Tensor, Var};

use crate::{
    error::Result,
    gradients::convolve,
    parameters::{Leaves, Parameter, Parameters, filled, normal, random},
};

/// Which of the two scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Attention from ordinary text.
    Text,
    /// Attention when the token is asked for.
    Recall,
}

/// Sizes of a scorer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScorerShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Taps of the convolution.
    pub kernel: usize,
}

/// Names in the order of [`initial`].
const NAMES: [&str; 7] = ["scale", "dw", "p1", "b1", "p2", "b2", "a"];

/// Weights at the start: the convolution averages the last four tokens, `scale` and `b2` await the
/// first batches, the coefficient of observed attention is 1.
pub(crate) fn initial(
    shape: ScorerShape,
    seed: u64,
    coefficient_rate: f64,
    device: &Device,
) -> Result<Parameters> {
    let ScorerShape { layers, kv_heads, head_dim, hidden, kernel } = shape;
    let channels = 2 * kv_heads * head_dim;
    let mut random = random(seed, 0, 0);
    let taps: Vec<f32> = (0..kernel).map(|tap| if tap + 4 >= kernel { 0.25 } else { 0.0 }).collect();
    let dw =
        Tensor::from_vec(taps, kernel, device)?.broadcast_as((layers, channels, kernel))?.contiguous()?;
    let p1_deviation = (2.0 * channels as f64).powf(-0.5);
    let p2_deviation = 0.5 * (hidden as f64).powf(-0.5);
    let values = [
        filled(&[layers, channels], 1.0, device)?,
        dw,
        normal(&[layers, hidden, 2 * channels], p1_deviation, &mut random, device)?,
        filled(&[layers, hidden], 0.0, device)?,
        normal(&[layers, kv_heads * 2, hidden], p2_deviation, &mut random, device)?,
        filled(&[layers, kv_heads * 2], 0.0, device)?,
        filled(&[layers, kv_heads, 2], 1.0, device)?,
    ];
    let parameters = NAMES.into_iter().zip(values).map(|(name, value)| match name {
        "a" => Parameter { name, value, rate: coefficient_rate, weight_decay: 0.0 },
        _ => Parameter { name, value, rate: 1.0, weight_decay: 1e-4 },
    });
    Ok(Parameters(parameters.collect()))
}

/// One layer's variables by name.
pub(crate) struct LayerScorer<'a> {
    scale: &'a Var,
    dw: &'a Var,
    p1: &'a Var,
    b1: &'a Var,
    p2: &'a Var,
    b2: &'a Var,
    a: &'a Var,
}

impl<'a> LayerScorer<'a> {
    /// Of leaves that [`initial`]'s parameters gave.
    pub(crate) fn of(leaves: &'a Leaves) -> Result<Self> {
        let [scale, dw, p1, b1, p2, b2, a] = leaves.0.as_slice() else {
            return Err(candle_core::Error::Msg("a scorer has seven parameters".into()).into());
        };
        Ok(Self { scale, dw, p1, b1, p2, b2, a })
    }

    /// One of the two scores of `features [b, n, C]`: `[b, n, kv_heads]`.
    pub(crate) fn score(&self, features: &Tensor, output: Output) -> Result<Tensor> {
        let (channels, kernel) = self.dw.dims2()?;
        let direct = self.p1.narrow(1, 0, channels)?.unsqueeze(0)?;
        let through = self.p1.narrow(1, channels, channels)?.unsqueeze(0)?;
        let taps = through.broadcast_mul(&self.dw.t()?.unsqueeze(1)?)?;
        let current = (taps.narrow(0, kernel - 1, 1)? + direct)?;
        let taps = Tensor::cat(&[&taps.narrow(0, 0, kernel - 1)?, &current], 0)?;
        let taps = taps.broadcast_mul(self.scale)?;
        let hidden = convolve(&features.pad_with_zeros(1, kernel - 1, 0)?, &taps)?;
        let hidden = hidden.broadcast_add(self.b1)?.gelu_erf()?;
        let (batch, rows, width) = hidden.dims3()?;
        let kv_heads = self.a.dim(0)?;
        // Contiguous: CUDA's products take no gaps between rows.
        let p2 = self.p2.reshape((kv_heads, 2, width))?.narrow(1, output as usize, 1)?.squeeze(1)?;
        let p2 = p2.contiguous()?;
        let b2 = self.b2.reshape((kv_heads, 2))?.narrow(1, output as usize, 1)?.squeeze(1)?;
        let scores = hidden.reshape(((), width))?.matmul(&p2.t()?)?.broadcast_add(&b2)?;
        Ok(scores.reshape((batch, rows, kv_heads))?)
    }

    /// [`Self::score`] plus the coefficient times the log of the observed attention `[b, n, kv_heads]`.
    pub(crate) fn predict(&self, features: &Tensor, observed: &Tensor, output: Output) -> Result<Tensor> {
        let a = self.a.narrow(1, output as usize, 1)?.squeeze(1)?;
        let observed = log_observed(observed)?.broadcast_mul(&a)?;
        Ok((self.score(features, output)? + observed)?)
    }
}

/// What the coefficient `a` multiplies, in training as in serving.
pub(crate) fn log_observed(observed: &Tensor) -> Result<Tensor> {
    Ok((observed + 1e-5)?.log()?)
}

#[cfg(test)]
#[path = "scorer_tests.rs"]
mod tests;
