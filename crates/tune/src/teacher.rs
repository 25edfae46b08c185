//! What the scorer is to predict: attention of an ordinary full-cache pass.
//!
//! For token `i` of a sequence, over the query heads of a KV head's group:
//! * *observed*: mean attention that queries `i .. i + window` give it, what a running mean would know;
//! * *target*: either the mean attention of all later queries ([`Aim::Mean`]), or the largest of any
//!   query that predicts a token of an answer ([`Aim::Answers`]).
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
    /// Largest attention of the given queries on the tokens before the questions, 0 on others.
    Answers {
        /// Per sequence the rows that predict answers; at least one.
        rows: Vec<Vec<u32>>,
        /// Per sequence how many tokens come before the questions.
        before: Vec<usize>,
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
        let answers = match aim {
            Aim::Mean => None,
            Aim::Answers { rows, before } => Some(Answers::new(rows, before, ids.dim(1)?, self.chunk, &x)?),
        };
        for layer in 0..config.num_layers {
            let heads = decoder.project(layer, &x)?;
            let queries = decoder.rotate(&heads.queries, &rotation)?;
            let queries = (queries * (config.head_dim as f64).powf(-0.5))?;
            let keys = decoder.rotate(&heads.keys, &rotation)?;
            let window = config.sliding_window.get(layer).copied().flatten();
            let (attended, observed, target) =
                self.attend(&queries, &keys, &heads.values, window, answers.as_ref(), &mut masks)?;
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
        answers: Option<&Answers>,
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
            if answers.is_none() {
                target = (target + place(&late, chunk.band, n)?)?;
                if chunk.band > 0 {
                    let older = column_sums(&p, shape)?.narrow(2, 0, chunk.band)?;
                    target = (target + place(&older, 0, n)?)?;
                }
            }
        }
        let observed = observed.broadcast_mul(&self.early_shares(n, shape.group, queries.device())?)?;
        target = match answers {
            None => target.broadcast_mul(&self.shares(n, shape.group, queries.device())?)?,
            Some(answers) => {
                let queries = queries.reshape((batch, heads, n, head_dim))?;
                answers.largest(&queries, keys, sliding)?
            }
        };
        let by_row = |x: Tensor| -> Result<Tensor> { Ok(x.transpose(1, 2)?.contiguous()?) };
        Ok((Tensor::cat(&outputs, 2)?, by_row(observed)?, by_row(target)?))
    }

    /// 1 / (number of early queries and heads) of every token.
    fn early_shares(&self, n: usize, group: usize, device: &Device) -> Result<Tensor> {
        let shares: Vec<f32> = (0..n).map(|i| 1.0 / ((n - i).min(self.window) * group) as f32).collect();
        Ok(Tensor::from_vec(shares, n, device)?)
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
}

/// Queries that predict answers, and what they may see; the same for all layers.
struct Answers {
    /// Parts of at most `chunk` queries: their rows `[b, count]`, and the mask.
    parts: Vec<(Tensor, Tensor)>,
    /// 1 for tokens before the questions, else 0: `[b, 1, n]` f32.
    before: Tensor,
}

impl Answers {
    fn new(rows: &[Vec<u32>], before: &[usize], n: usize, chunk: usize, like: &Tensor) -> Result<Self> {
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut parts = Vec::new();
        for first in (0..most).step_by(chunk) {
            let count = chunk.min(most - first);
            // Sequences with fewer rows repeat their last one, which no maximum sees.
            let padded = rows.iter().flat_map(|rows| {
                let row = |i: usize| rows.get(i).or(rows.last()).copied().unwrap_or(0);
                (first..first + count).map(row)
            });
            let padded: Vec<u32> = padded.collect();
            let hidden =
                padded.iter().flat_map(|&row| (0..n as u32).map(move |i| if i > row { -1e9 } else { 0.0 }));
            let mask = Tensor::from_vec(hidden.collect::<Vec<f32>>(), (rows.len(), count, n), &Device::Cpu)?;
            let mask = mask.to_dtype(like.dtype())?.to_device(like.device())?;
            let index =
                Tensor::from_vec(padded, (rows.len(), count), &Device::Cpu)?.to_device(like.device())?;
            parts.push((index, mask));
        }
        let keep = before.iter().flat_map(|&before| (0..n).map(move |i| f32::from(u8::from(i < before))));
        let before = Tensor::from_vec(keep.collect::<Vec<f32>>(), (before.len(), 1, n), &Device::Cpu)?;
        Ok(Self { parts, before: before.to_device(like.device())? })
    }

    /// Largest attention of any answering query `[b, kv_heads, n]` f32; `queries` scaled `[b, heads, n, d]`.
    fn largest(&self, queries: &Tensor, keys: &Tensor, sliding: Option<usize>) -> Result<Tensor> {
        let (batch, heads, n, head_dim) = queries.dims4()?;
        let kv_heads = keys.dim(1)?;
        let group = heads / kv_heads;
        let mut largest = Tensor::zeros((batch, kv_heads, n), DType::F32, queries.device())?;
        for (rows, mask) in &self.parts {
            let count = rows.dim(1)?;
            let index = rows.reshape((batch, 1, count, 1))?.broadcast_as((batch, heads, count, head_dim))?;
            let q = queries.gather(&index.contiguous()?, 2)?;
            let q = q.reshape((batch, kv_heads, group * count, head_dim))?;
            let scores = q.matmul(&keys.t()?)?.reshape((batch, kv_heads * group, count, n))?;
            let mut scores = scores.broadcast_add(&mask.unsqueeze(1)?)?;
            if let Some(window) = sliding.filter(|&window| window < n) {
                let ages =
                    rows.to_dtype(DType::F32)?.unsqueeze(2)?.broadcast_sub(&positions(n, rows.device())?)?;
                let old = ages.ge(window as f64)?.to_dtype(scores.dtype())?.affine(-1e9, 0.0)?;
                scores = scores.broadcast_add(&old.unsqueeze(1)?)?;
            }
            let p =
                candle_nn::ops::softmax_last_dim(&scores)?.reshape((batch, kv_heads, group * count, n))?;
            largest = largest.maximum(&p.max(2)?.to_dtype(DType::F32)?)?;
        }
        Ok(largest.broadcast_mul(&self.before)?)
    }
}

/// `[1, 1, n]` f32.
fn positions(n: usize, device: &Device) -> Result<Tensor> {
    let positions: Vec<f32> = (0..n).map(|i| i as f32).collect();
    Ok(Tensor::from_vec(positions, (1, 1, n), device)?)
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
