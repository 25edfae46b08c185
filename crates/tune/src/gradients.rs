//! Operations with gradient rules of their own.
//!
//! candle's fused norms, softmax and rotary embedding have no gradient and do not say so, and its
//! matrix product always computes the gradients of both factors, frozen weights included. Here the
//! forward pass uses the fused forms and the gradient goes to the one argument that needs it. An
//! argument that leads to no variable costs nothing extra.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage as _,
};
use locket_model::config::RopeStyle;

/// A value that was computed already, and the rule for its gradient.
struct Rule<F> {
    /// Taken by the forward pass, so that the graph does not hold it twice.
    value: Mutex<Option<Tensor>>,
    backward: F,
}

impl<F> Rule<F> {
    fn take(&self) -> Result<Tensor> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.ok_or_else(|| candle_core::Error::Msg("a gradient rule was applied twice".into()))
    }
}

impl<F> CustomOp1 for Rule<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
{
    fn name(&self) -> &'static str {
        "rule"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            _ => candle_core::bail!("value and argument are on different devices"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            _ => candle_core::bail!("value and argument are on different devices"),
        }
    }

    fn bwd(&self, arg: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(arg, result, &grad.contiguous()?).map(Some)
    }
}

/// `value` as a function of `arg`; `backward(arg, value, gradient of value)` is the gradient of `arg`.
pub(crate) fn with_rule<F>(value: Tensor, arg: &Tensor, backward: F) -> Result<Tensor>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    if !arg.track_op() {
        return Ok(value);
    }
    // The copy is of whole storages, so the value must be alone in its own.
    let value = match value.layout().contiguous_offsets() {
        Some((0, _)) => value,
        _ => value.force_contiguous()?,
    };
    arg.apply_op1(Rule { value: Mutex::new(Some(value)), backward })
}

/// The last dimension kept, all others joined.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.reshape(((), x.dim(D::Minus1)?))
}

fn with_width(x: &Tensor, like: &Tensor, width: usize) -> Result<Tensor> {
    let mut dims = like.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    x.reshape(dims)
}

/// `x * weightᵀ + bias` with frozen `weight [out, in]`, `bias [out]`; `x [.., in]` contiguous.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut y = rows(&x.detach())?.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    let y = with_width(&y, x, weight.dim(0)?)?;
    let weight = weight.clone();
    with_rule(y, x, move |arg, _, grad| rows(grad)?.matmul(&weight)?.reshape(arg.shape()))
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, `weight` frozen.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let detached = x.detach();
    let y = match x.dtype() {
        DType::F64 => candle_nn::ops::rms_norm_slow(&detached, weight, eps)?,
        _ => candle_nn::ops::rms_norm(&detached, weight, eps)?,
    };
    let weight = weight.clone();
    with_rule(y, x, move |arg, _, grad| {
        let wide = if arg.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (x, grad) = (arg.detach().to_dtype(wide)?, grad.to_dtype(wide)?);
        let grad = grad.broadcast_mul(&weight.to_dtype(wide)?)?;
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?.recip()?;
        let along = ((&grad * &x)?.mean_keepdim(D::Minus1)? * scale.powf(3.0)?)?;
        (grad.broadcast_mul(&scale)? - x.broadcast_mul(&along)?)?.to_dtype(arg.dtype())
    })
}

/// Cosine and sine of consecutive positions.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// `[positions, rotary_dim / 2]`.
    pub cos: Tensor,
    /// `[positions, rotary_dim / 2]`.
    pub sin: Tensor,
    pub style: RopeStyle,
}

impl Rotation {
    fn apply(&self, x: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let rotary_dim = 2 * self.cos.dim(1)?;
        let rest = x.dim(D::Minus1)? - rotary_dim;
        let rotated = if rest == 0 { x.clone() } else { x.narrow(D::Minus1, 0, rotary_dim)?.contiguous()? };
        let rotated = match self.style {
            RopeStyle::HalfSplit => candle_nn::rotary_emb::rope(&rotated, &self.cos, sin)?,
            RopeStyle::Interleaved => candle_nn::rotary_emb::rope_i(&rotated, &self.cos, sin)?,
        };
        match rest {
            0 => Ok(rotated),
            rest => {
                Tensor::cat(&[&rotated, &x.narrow(D::Minus1, rotary_dim, rest)?.contiguous()?], D::Minus1)
            }
        }
    }
}

/// `x [b, heads, n, head_dim]` rotated.
pub(crate) fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let y = rotation.apply(&x.detach(), &rotation.sin)?;
    let rotation = rotation.clone();
    // The transposed rotation turns the other way; a factor on both is the same in both.
    with_rule(y, x, move |_, _, grad| rotation.apply(grad, &rotation.sin.neg()?))
}

/// Softmax of `scores + mask` over the last dimension; `mask` has the shape of `scores`.
pub(crate) fn softmax(scores: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let masked = match mask {
        Some(mask) => (scores.detach() + mask)?,
        None => scores.detach(),
    };
    let y = candle_nn::ops::softmax_last_dim(&masked)?;
    with_rule(y, scores, |_, result, grad| {
        let result = result.detach();
        let product = (&result * grad)?;
        let sum = product.sum_keepdim(D::Minus1)?;
        product - result.broadcast_mul(&sum)?
    })
}

/// `silu(gate) * up` of `gate_up [.., 2 width]`.
pub(crate) fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    fn halves(x: &Tensor) -> Result<[Tensor; 2]> {
        let width = x.dim(D::Minus1)? / 2;
        let half = |from| x.narrow(D::Minus1, from, width)?.contiguous();
        Ok([half(0)?, half(width)?])
    }
    let [gate, up] = halves(&gate_up.detach())?;
    let y = (gate.silu()? * up)?;
    with_rule(y, gate_up, |arg, _, grad| {
        let [gate, up] = halves(&arg.detach())?;
        let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let silu = (&gate * &sigmoid)?;
        // silu' = s + silu (1 - s)
        let slope = (&sigmoid + (&silu * sigmoid.affine(-1.0, 1.0)?)?)?;
        Tensor::cat(&[((grad * up)? * slope)?, (grad * silu)?], D::Minus1)
    })
}

/// Smooth L1 (Huber with threshold 1) of every element.
pub(crate) fn smooth_l1(x: &Tensor) -> Result<Tensor> {
    let size = x.detach().abs()?;
    let near = size.minimum(1.0)?;
    let y = (&near * (&size - near.affine(0.5, 0.0)?)?)?;
    with_rule(y, x, |arg, _, grad| grad * arg.detach().clamp(-1.0, 1.0)?)
}

/// Cross-entropy between a Bernoulli variable with constant mean `y` and the one with log-odds `x`, element
/// by element.
pub(crate) fn logistic_loss(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (size, y) = (x.detach().abs()?, y.detach());
    let tail = (size.neg()?.exp()? + 1.0)?.log()?;
    let loss = ((x.detach().maximum(0f32)? - (x.detach() * &y)?)? + tail)?;
    with_rule(loss, x, move |arg, _, grad| {
        // A sigmoid that cannot overflow: half of 1 + tanh of half.
        let mean = ((arg.detach() / 2.0)?.tanh()?.affine(0.5, 0.5))?;
        grad * (mean - &y)?
    })
}

/// A convolution along time as one matrix product: `y[g, t] = Σ_tau x[g, t + tau] * weight[tau]ᵀ`
/// with constant `x [g, n + taps - 1, c]` and `weight [taps, out, c]`; `y [g, n, out]`. The gradient
/// is the weight's.
pub(crate) fn convolve(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (groups, padded, channels) = x.dims3()?;
    let (taps, out, _) = weight.dims3()?;
    let n = padded + 1 - taps;
    let x = x.detach();
    let flat = weight.detach().reshape((taps * out, channels))?;
    let all = rows(&x)?.matmul(&flat.t()?)?.reshape((groups, padded, taps, out))?;
    let shifted = |tau: usize| all.narrow(1, tau, n)?.narrow(2, tau, 1)?.squeeze(2);
    let mut y = shifted(0)?.contiguous()?;
    for tau in 1..taps {
        y = (y + shifted(tau)?)?;
    }
    with_rule(y, weight, move |arg, _, grad| {
        let (taps, out, channels) = arg.dims3()?;
        let spread = (0..taps).map(|tau| {
            let tap = grad.pad_with_zeros(1, tau, taps - 1 - tau)?;
            tap.contiguous()?.unsqueeze(2)
        });
        let spread = Tensor::cat(&spread.collect::<Result<Vec<_>>>()?, 2)?;
        let spread = spread.reshape(((), taps * out))?;
        spread.t()?.matmul(&rows(&x)?)?.reshape((taps, out, channels))
    })
}

/// `weights [g, m, n] * x [g, n, c]` with constant `x`.
pub(crate) fn mix(weights: &Tensor, x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    let y = weights.detach().matmul(&x)?;
    with_rule(y, weights, move |_, _, grad| grad.matmul(&x.transpose(1, 2)?))
}

/// Mean cross entropy in nats of `hidden [rows, width]` under a frozen `head [vocab, width]`;
/// `targets [rows]`. Never holds the logits of more than `chunk` rows.
pub(crate) fn cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    chunk: usize,
) -> Result<Tensor> {
    let (rows, _) = hidden.dims2()?;
    let wide = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let constant = hidden.detach();
    let (mut losses, mut slopes) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(chunk.max(1)) {
        let count = chunk.min(rows - start);
        let (x, target) = (constant.narrow(0, start, count)?, targets.narrow(0, start, count)?);
        let logits = x.matmul(&head.t()?)?.to_dtype(wide)?;
        let p = candle_nn::ops::softmax_last_dim(&logits)?;
        // A probability that rounds to nothing is worth 69 nats, not infinitely many.
        let hit = p.gather(&target.unsqueeze(1)?, 1)?.maximum(1e-30)?;
        losses.push(hit.log()?.neg()?.sum_all()?);
        if hidden.track_op() {
            let pull = p.to_dtype(hidden.dtype())?.matmul(head)?;
            slopes.push((pull - head.index_select(&target, 0)?)?);
        }
    }
    let loss = (Tensor::stack(&losses, 0)?.sum_all()? / rows as f64)?;
    if slopes.is_empty() {
        return Ok(loss);
    }
    let slope = (Tensor::cat(&slopes, 0)? / rows as f64)?;
    with_rule(loss, hidden, move |_, _, grad| slope.broadcast_mul(&grad.to_dtype(slope.dtype())?))
}

#[cfg(test)]
#[path = "gradients_tests.rs"]
mod tests;
