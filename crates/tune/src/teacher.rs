//! What the scorer is to predict: attention of an ordinary full-cache pass.
//!
//! For token `i` of a sequence, over the query heads of a KV head's group:
//! * *observed*: mean attention that queries `i .. i + window` give it, what a running mean would know;
//! * *target*: either the mean attention of all later queries ([`Aim::Mean`]), or the largest of any
//!   query at or after the place where it is asked for ([`Aim::Max`]).
//!
//! Attention maps exist for one layer and `chunk` queries at a time.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};

use crate::{decoder::Decoder, error::Result};

/// What the target is.
#[derive(Debug, Clone)]
pub(crate) enum Aim {
    /// Mean attention of queries `j >= i + window`.
    Mean,
    /// Largest attention of queries `j >= max(i + window, from[sequence])`, known for the first
    /// `columns` tokens (0 elsewhere).
    Max {
        /// Per sequence of the batch.
        from: Vec<usize>,
        /// How many tokens from the start are wanted.
        columns: usize,
    },
}

/// One layer's inputs and targets.
pub(crate) struct LayerMaps {
    /// `[b, n, 2 kv_heads head_dim]` f32; see [`Decoder::features`].
    pub features: Tensor,
    /// Mean attention observed early `[b, n, kv_heads]` f32.
    pub observed: Tensor,
    /// `[b, n, kv_heads]` f32.
    pub target: Tensor,
}

/// The pass over one batch.
pub(crate) struct Teacher<'a> {
    decoder: &'a Decoder,
    /// Queries that count as early.
    window: usize,
    /// Queries whose maps exist at once.
    chunk: usize,
}

/// A run of queries `start .. end` and the columns from `band` on for which some of them are early.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    start: usize,
    end: usize,
    band: usize,
}

/// Constant tensors that layers and chunks share.
#[derive(Default)]
struct Masks {
    /// 0 or a very negative number, by chunk length.
    causal: HashMap<usize, Tensor>,
    /// Early and late pairs of the band, by (queries before the band's end, chunk length).
    bands: HashMap<(usize, usize), [Tensor; 2]>,
}

/// Batch, KV heads, group size.
#[derive(Debug, Clone, Copy)]
struct Shape {
    batch: usize,
    kv_heads: usize,
    group: usize,
}

impl<'a> Teacher<'a> {
    pub(crate) fn new(decoder: &'a Decoder, window: usize, chunk: usize) -> Self {
        Self { decoder, window, chunk }
    }

    /// Runs the model over `ids [b, n]` and gives each layer's maps to `visit`.
    pub(crate) fn walk(
        &self,
        ids: &Tensor,
        aim: &Aim,
        mut visit: impl FnMut(usize, LayerMaps) -> Result<()>,
    ) -> Result<()> {
        let decoder = self.decoder;
        let config = decoder.config();
        let rotation = decoder.rotation(0, ids.dim(1)?)?;
        let mut masks = Masks::default();
        let mut x = decoder.embed(ids)?;
        for layer in 0..config.num_layers {
            let heads = decoder.project(layer, &x)?;
            let queries = decoder.rotate(&heads.queries, &rotation)?;
            let queries = (queries * (config.head_dim as f64).powf(-0.5))?;
            let keys = decoder.rotate(&heads.keys, &rotation)?;
            let window = config.sliding_window.get(layer).copied().flatten();
            let (attended, observed, target) =
                self.attend(&queries, &keys, &heads.values, window, aim, &mut masks)?;
            let features = decoder.features(&heads.keys, &heads.values)?;
            let last = layer + 1 == config.num_layers;
            if !last {
                x = decoder.finish(layer, &x, &attended)?;
            }
            visit(layer, LayerMaps { features, observed, target })?;
        }
        Ok(())
    }

    fn chunks(&self, n: usize) -> impl Iterator<Item = Chunk> + use<'_> {
        (0..n).step_by(self.chunk).map(move |start| Chunk {
            start,
            end: (start + self.chunk).min(n),
            band: (start + 1).saturating_sub(self.window),
        })
    }

    /// Attention's output, observed means and targets of one layer.
    fn attend(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        sliding: Option<usize>,
        aim: &Aim,
        masks: &mut Masks,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (batch, heads, n, head_dim) = queries.dims4()?;
        let kv_heads = keys.dim(1)?;
        let shape = Shape { batch, kv_heads, group: heads / kv_heads };
        let queries = queries.reshape((batch, kv_heads, shape.group, n, head_dim))?;
        let mut observed = Tensor::zeros((batch, kv_heads, n), DType::F32, queries.device())?;
        let mut target = observed.clone();
        let mut outputs = Vec::new();
        for chunk in self.chunks(n) {
            let count = chunk.end - chunk.start;
            let q = queries.narrow(3, chunk.start, count)?.contiguous()?;
            let q = q.reshape((batch, kv_heads, shape.group * count, head_dim))?;
            let p = probabilities(&q, keys, chunk, sliding, masks)?;
            let output = p.matmul(&values.narrow(2, 0, chunk.end)?)?;
            outputs.push(output.reshape((batch, heads, count, head_dim))?);
            let [early, late] = self.band(&p, chunk, shape, masks)?;
            observed = (observed + place(&early, chunk.band, n)?)?;
            match aim {
                Aim::Mean => {
                    target = (target + place(&late, chunk.band, n)?)?;
                    if chunk.band > 0 {
                        let older = column_sums(&p, shape)?.narrow(2, 0, chunk.band)?;
                        target = (target + place(&older, 0, n)?)?;
                    }
                }
                Aim::Max { from, columns } => {
                    if let Some(most) = self.column_max(&p, chunk, shape, from, *columns)? {
                        target = target.maximum(&place(&most, 0, n)?)?;
                    }
                }
            }
        }
        let observed = (observed / (shape.group * self.window) as f64)?;
        if matches!(aim, Aim::Mean) {
            target = target.broadcast_mul(&self.shares(n, shape.group, queries.device())?)?;
        }
        let by_row = |x: Tensor| -> Result<Tensor> { Ok(x.transpose(1, 2)?.contiguous()?) };
        Ok((Tensor::cat(&outputs, 2)?, by_row(observed)?, by_row(target)?))
    }

    /// 1 / (number of late queries and heads) of every token.
    fn shares(&self, n: usize, group: usize, device: &Device) -> Result<Tensor> {
        let late = |i: usize| n.saturating_sub(i + self.window).max(1) * group;
        let shares: Vec<f32> = (0..n).map(|i| 1.0 / late(i) as f32).collect();
        Ok(Tensor::from_vec(shares, n, device)?)
    }

    /// Sums of the band's columns over early and over late queries `[b, kv_heads, end - band]` f32.
    fn band(&self, p: &Tensor, chunk: Chunk, shape: Shape, masks: &mut Masks) -> Result<[Tensor; 2]> {
        let Chunk { start, end, band } = chunk;
        let (count, width) = (end - start, end - band);
        let rows = shape.batch * shape.kv_heads * shape.group * count;
        let p = p.reshape((rows, end))?.narrow(1, band, width)?.contiguous()?;
        let pair = masks.bands.entry((start - band, count));
        let pair = match pair {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mask = |keep: &dyn Fn(usize, usize) -> bool| -> Result<Tensor> {
                    let pairs = (start..end).flat_map(|j| (band..end).map(move |i| (i, j)));
                    let values = pairs.map(|(i, j)| f32::from(u8::from(keep(i, j))));
                    let mask = Tensor::from_vec(values.collect::<Vec<_>>(), (count, width), &Device::Cpu)?;
                    let mask = mask.to_dtype(p.dtype())?.to_device(p.device())?;
                    Ok(mask.repeat((rows / count, 1))?)
                };
                let window = self.window;
                entry.insert([
                    mask(&|i, j| j >= i && j - i < window)?,
                    mask(&|i, j| j >= i && j - i >= window)?,
                ])
            }
        };
        let sums = |mask: &Tensor| -> Result<Tensor> {
            let masked = (&p * mask)?;
            let all = (shape.batch, shape.kv_heads, shape.group * count, width);
            column_sums(&masked.reshape(all)?, shape)
        };
        Ok([sums(&pair[0])?, sums(&pair[1])?])
    }

    /// Largest late attention on the first `columns` tokens from each sequence's own start on:
    /// `[b, kv_heads, columns up to the chunk's end]` f32, or `None` if no query counts.
    fn column_max(
        &self,
        p: &Tensor,
        chunk: Chunk,
        shape: Shape,
        from: &[usize],
        columns: usize,
    ) -> Result<Option<Tensor>> {
        let columns = columns.min(chunk.end);
        if columns == 0 || from.iter().all(|&from| from >= chunk.end) {
            return Ok(None);
        }
        let Shape { batch, kv_heads, group } = shape;
        let count = chunk.end - chunk.start;
        let p = p.reshape((batch, kv_heads, group, count, chunk.end))?;
        let of = |first: usize, sequences: usize, from: usize| -> Result<Tensor> {
            let from = from.max(chunk.start);
            if from >= chunk.end {
                return Ok(Tensor::zeros((sequences, kv_heads, columns), p.dtype(), p.device())?);
            }
            let mut late = p.narrow(0, first, sequences)?.narrow(4, 0, columns)?;
            late = late.narrow(3, from - chunk.start, chunk.end - from)?;
            if from < columns - 1 + self.window {
                let pairs = (from..chunk.end).flat_map(|j| (0..columns).map(move |i| (i, j)));
                let keep = pairs.map(|(i, j)| f32::from(u8::from(j >= i + self.window)));
                let keep = Tensor::from_vec(keep.collect(), (chunk.end - from, columns), &Device::Cpu)?;
                late = late.broadcast_mul(&keep.to_dtype(p.dtype())?.to_device(p.device())?)?;
            }
            Ok(late.max(3)?.max(2)?)
        };
        let most = if from.windows(2).all(|pair| pair[0] == pair[1]) {
            of(0, batch, from.first().copied().unwrap_or(0))?
        } else {
            let each = from.iter().enumerate().map(|(sequence, &from)| of(sequence, 1, from));
            Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?
        };
        Ok(Some(most.to_dtype(DType::F32)?))
    }
}

/// Attention of one chunk `[b, kv_heads, group * queries, end]`; `q` scaled.
fn probabilities(
    q: &Tensor,
    keys: &Tensor,
    chunk: Chunk,
    sliding: Option<usize>,
    masks: &mut Masks,
) -> Result<Tensor> {
    let Chunk { start, end, .. } = chunk;
    let (batch, kv_heads, rows, _) = q.dims4()?;
    let count = end - start;
    let product = |from: usize, len: usize| -> Result<Tensor> {
        Ok(q.matmul(&keys.narrow(2, from, len)?.transpose(2, 3)?)?)
    };
    if sliding.is_some_and(|window| window < end) {
        let window = sliding.unwrap_or(end);
        let mask = hidden_pairs(chunk, 0, |i, j| i > j || j - i >= window, q)?;
        let scores = product(0, end)?.reshape((batch, kv_heads, rows / count, count, end))?;
        let scores = scores.broadcast_add(&mask)?.reshape((batch, kv_heads, rows, end))?;
        return Ok(candle_nn::ops::softmax_last_dim(&scores)?);
    }
    let mask = match masks.causal.get(&count) {
        Some(mask) => mask.clone(),
        None => {
            let mask = hidden_pairs(chunk, start, |i, j| i > j, q)?;
            let mask = mask.repeat((batch * kv_heads * rows / count, 1))?;
            let mask = mask.reshape((batch, kv_heads, rows, count))?;
            masks.causal.insert(count, mask.clone());
            mask
        }
    };
    let own = (product(start, count)? + mask)?;
    let scores = if start == 0 { own } else { Tensor::cat(&[product(0, start)?, own], D::Minus1)? };
    Ok(candle_nn::ops::softmax_last_dim(&scores)?)
}

/// `[queries, end - first]`: a very negative number where `hidden(token, query)`, else 0.
fn hidden_pairs(
    chunk: Chunk,
    first: usize,
    hidden: impl Fn(usize, usize) -> bool,
    like: &Tensor,
) -> Result<Tensor> {
    let Chunk { start, end, .. } = chunk;
    let pairs = (start..end).flat_map(|j| (first..end).map(move |i| (i, j)));
    let values: Vec<f32> = pairs.map(|(i, j)| if hidden(i, j) { -1e9 } else { 0.0 }).collect();
    let mask = Tensor::from_vec(values, (end - start, end - first), &Device::Cpu)?;
    Ok(mask.to_dtype(like.dtype())?.to_device(like.device())?)
}

/// Sums over the rows of `p [b, kv_heads, rows, columns]`, as a product: `[b, kv_heads, columns]` f32.
fn column_sums(p: &Tensor, shape: Shape) -> Result<Tensor> {
    let rows = p.dim(2)?;
    let ones = Tensor::ones((shape.batch, shape.kv_heads, 1, rows), p.dtype(), p.device())?;
    Ok(ones.matmul(p)?.squeeze(2)?.to_dtype(DType::F32)?)
}

/// `x [b, kv_heads, len]` at columns `first ..` of `n`, zeros elsewhere.
fn place(x: &Tensor, first: usize, n: usize) -> Result<Tensor> {
    let len = x.dim(2)?;
    Ok(x.pad_with_zeros(2, first, n - first - len)?)
}

#[cfg(test)]
#[path = "teacher_tests.rs"]
mod tests;
