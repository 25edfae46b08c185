//! LoCoCo's compression as published (arXiv 2406.05317): half of the slots keep the entries that
//! received most attention, the other half are mixtures of the rest, weighted by a convolution.

use candle_core::{D, DType, Device, Tensor, Var};

use crate::{
    decoder::{KeyOrder, half_split},
    error::Result,
    gradients::{convolve, mix, softmax},
    parameters::{Leaves, Parameter, Parameters, filled, normal, random},
    settings::LococoSettings,
};

/// Weights at the start, per layer: `w [mixed, 2 head_dim, kernel]`, `b [mixed]`, gate `g []`.
pub(crate) fn initial(
    settings: &LococoSettings,
    layers: usize,
    head_dim: usize,
    seed: u64,
    device: &Device,
) -> Result<Parameters> {
    use rand::Rng as _;
    let mixed = mixed_slots(settings.slots);
    let channels = 2 * head_dim;
    let mut random = random(seed, 0, 0);
    let w = normal(&[layers, mixed, channels, settings.kernel], settings.deviation, &mut random, device)?;
    let bound = ((channels * settings.kernel) as f32).powf(-0.5);
    let b: Vec<f32> = (0..layers * mixed).map(|_| random.random_range(-bound..=bound)).collect();
    let b = Tensor::from_vec(b, (layers, mixed), &Device::Cpu)?.to_device(device)?;
    let g = filled(&[layers], settings.gate, device)?;
    let parameter = |(name, value)| Parameter { name, value, rate: 1.0, weight_decay: 0.0 };
    Ok(Parameters([("w", w), ("b", b), ("g", g)].map(parameter).into()))
}

/// Slots of a compressed cache that are mixtures; the others are exact entries.
pub(crate) fn mixed_slots(slots: usize) -> usize {
    slots / 2
}

/// One layer's variables.
pub(crate) struct LayerMixture<'a> {
    w: &'a Var,
    b: &'a Var,
    g: &'a Var,
}

/// Entries of one layer's cache by their part in a compression: rows of `[b * kv_heads * n, ..]`.
pub(crate) struct Selection {
    /// `[b * kv_heads * exact]`, in time order per head.
    exact: Tensor,
    /// `[b * kv_heads * (n - exact)]`, in time order per head.
    rest: Tensor,
    /// `[b * kv_heads * mixed]`: of the rest those with most attention, in time order per head.
    picks: Tensor,
}

/// A [`Selection`] on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SelectedRows {
    exact: Vec<u32>,
    rest: Vec<u32>,
    picks: Vec<u32>,
}

impl SelectedRows {
    /// Chooses by `received`, one `n` per batch row and KV head: attention in the last block.
    pub(crate) fn new(received: &[f32], n: usize, slots: usize) -> Self {
        let exact_slots = slots - mixed_slots(slots);
        let mut rows = Self::default();
        for (head, received) in received.chunks_exact(n).enumerate() {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_unstable_by(|&a, &b| received[b].total_cmp(&received[a]).then(a.cmp(&b)));
            let push = |to: &mut Vec<u32>, entries: &[usize]| {
                let start = to.len();
                to.extend(entries.iter().map(|&at| (head * n + at) as u32));
                to[start..].sort_unstable();
            };
            push(&mut rows.exact, &order[..exact_slots]);
            push(&mut rows.rest, &order[exact_slots..]);
            push(&mut rows.picks, &order[exact_slots..slots]);
        }
        rows
    }
}

impl Selection {
    /// Brings the selections of all layers to the device, in one transfer.
    pub(crate) fn upload(layers: &[SelectedRows], device: &Device) -> Result<Vec<Self>> {
        let parts = layers.iter().flat_map(|layer| [&layer.exact, &layer.rest, &layer.picks]);
        let all: Vec<u32> = parts.flatten().copied().collect();
        let all = Tensor::new(all, device)?;
        let mut start = 0;
        let mut part = |rows: &[u32]| {
            start += rows.len();
            all.narrow(0, start - rows.len(), rows.len())
        };
        let selections = layers.iter().map(|layer| {
            Ok(Self { exact: part(&layer.exact)?, rest: part(&layer.rest)?, picks: part(&layer.picks)? })
        });
        selections.collect()
    }
}

impl<'a> LayerMixture<'a> {
    /// Of leaves that [`initial`]'s parameters gave.
    pub(crate) fn of(leaves: &'a Leaves) -> Result<Self> {
        let [w, b, g] = leaves.0.as_slice() else {
            return Err(candle_core::Error::Msg("a mixture has three parameters".into()).into());
        };
        Ok(Self { w, b, g })
    }

    /// Shrinks constant `keys`, `values [b, kv_heads, n, head_dim]` to the selection's slots: exact
    /// ones, then mixtures. The convolution reads keys in half-split order whatever `order` they have.
    /// Differentiable in the weights.
    pub(crate) fn compress(
        &self,
        keys: &Tensor,
        values: &Tensor,
        selection: &Selection,
        order: KeyOrder,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, kv_heads, n, head_dim) = keys.dims4()?;
        let heads = batch * kv_heads;
        let dtype = keys.dtype();
        let x = Tensor::cat(&[keys, values], D::Minus1)?.reshape((heads * n, 2 * head_dim))?;
        let rows = |of: &Tensor| -> Result<Tensor> {
            Ok(x.index_select(of, 0)?.reshape((heads, (), 2 * head_dim))?)
        };
        let (exact, rest, picks) = (rows(&selection.exact)?, rows(&selection.rest)?, rows(&selection.picks)?);
        let half = self.w.dim(2)? / 2;
        let taps = self.w.permute((2, 0, 1))?.contiguous()?.to_dtype(dtype)?;
        let read = match order {
            KeyOrder::HalfSplit => rest.clone(),
            KeyOrder::Interleaved { rotary_dim } => {
                let keys = half_split(&rest.narrow(2, 0, head_dim)?.unsqueeze(0)?, rotary_dim)?.squeeze(0)?;
                Tensor::cat(&[&keys, &rest.narrow(2, head_dim, head_dim)?.contiguous()?], 2)?
            }
        };
        let z = convolve(&read.pad_with_zeros(1, half, half)?, &taps)?;
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let z = z.to_dtype(wide)?.broadcast_add(&self.b.to_dtype(wide)?)?.relu()?;
        let shares = softmax(&z.transpose(1, 2)?.contiguous()?, None)?.to_dtype(dtype)?;
        let mixed = mix(&shares, &rest)?;
        let gate = self.g.reshape((1, 1, 1))?.to_dtype(dtype)?;
        let mixed = (&picks + (mixed - &picks)?.broadcast_mul(&gate)?)?;
        let slots = Tensor::cat(&[&exact, &mixed], 1)?.reshape((batch, kv_heads, (), 2 * head_dim))?;
        let part = |from| slots.narrow(3, from, head_dim)?.contiguous();
        Ok((part(0)?, part(head_dim)?))
    }
}

#[cfg(test)]
#[path = "mixture_tests.rs"]
mod tests;
