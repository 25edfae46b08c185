//! Training LoCoCo's convolution as published: next-token loss block by block over a compressed cache,
//! no gradient through the cache's history. The model stays frozen, its embeddings and norms included.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};

use crate::{
    decoder::Decoder,
    error::{Error, Result},
    gradients::softmax,
    mixture::{self, LayerMixture, SelectedRows, Selection},
    parameters::{Gradients, Leaves, Parameters},
    recipe::{Kind, TrainingBatch},
    settings::LococoSettings,
    training::{Trainer, ids_tensor, micro_batches},
};

/// See the [module](self).
pub(crate) struct LococoTrainer<'a> {
    decoder: &'a Decoder,
    settings: LococoSettings,
    micro_batch: usize,
}

impl<'a> LococoTrainer<'a> {
    pub(crate) fn new(decoder: &'a Decoder, settings: LococoSettings, micro_batch: usize) -> Result<Self> {
        if decoder.config().sliding_window.iter().any(Option::is_some) {
            let reason = "lococo is trained for full attention only; this model has a sliding window";
            return Err(Error::setting("model", reason));
        }
        Ok(Self { decoder, settings, micro_batch })
    }
}

impl Trainer for LococoTrainer<'_> {
    fn initial(&self, seed: u64) -> Result<Parameters> {
        let config = self.decoder.config();
        mixture::initial(&self.settings, config.num_layers, config.head_dim, seed, self.decoder.device())
    }

    fn optimizer(&self) -> ((f64, f64), Option<f64>) {
        ((0.9, 0.999), self.settings.clip)
    }

    /// Linear decay without warm-up.
    fn rate(&self, peak: f64, step: u64, steps: u64) -> f64 {
        peak * (1.0 - step as f64 / steps as f64)
    }

    fn kind(&self, _step: u64) -> Kind {
        Kind::Natural
    }

    fn gradients(&self, parameters: &Parameters, batch: &TrainingBatch) -> Result<(Gradients, Tensor)> {
        let layers = self.decoder.config().num_layers;
        let leaves = (0..layers).map(|layer| parameters.leaves(layer)).collect::<Result<Vec<Leaves>>>()?;
        let mixtures = leaves.iter().map(LayerMixture::of).collect::<Result<Vec<_>>>()?;
        let mut gradients = Gradients::new(parameters)?;
        let device = self.decoder.device();
        let mut total = Tensor::zeros((), DType::F32, device)?;
        let (length, ring) = (batch.length(), self.settings.ring);
        // The cache is compressed for the first time before the block that follows `slots + 1` tokens.
        let starts = (0..length - 1).step_by(ring);
        let trained = starts.clone().filter(|&start| start > self.settings.slots).count().max(1);
        for part in micro_batches(batch.sequences.len(), self.micro_batch) {
            let share = part.len() as f64 / (batch.sequences.len() * trained) as f64;
            let ids = ids_tensor(&batch.sequences[part], device)?;
            let mut stream = BlockStream::new(self.decoder, self.settings.slots);
            for start in starts.clone() {
                let len = ring.min(length - start);
                let x = stream.block(&ids.narrow(1, start, len)?.contiguous()?, &mixtures)?;
                if !x.track_op() {
                    continue;
                }
                let known = len.min(length - start - 1);
                let targets = ids.narrow(1, start + 1, known)?.contiguous()?;
                let loss = self.decoder.loss(&x.narrow(1, 0, known)?, &targets)?.to_dtype(DType::F32)?;
                let loss = (loss * share)?;
                let store = loss.backward()?;
                for (layer, leaves) in leaves.iter().enumerate() {
                    gradients.add(layer, leaves, &store)?;
                }
                total = (total + loss.detach())?;
            }
        }
        Ok((gradients, total))
    }
}

/// One layer's cache, cut from the graph.
struct LayerCache {
    /// `[b, kv_heads, n, head_dim]`, rotated at absolute positions.
    keys: Tensor,
    values: Tensor,
    /// Attention received in the last block `[b, kv_heads, n]` f32.
    received: Tensor,
}

/// Sequences read block by block into a cache of a fixed number of slots.
struct BlockStream<'a> {
    decoder: &'a Decoder,
    slots: usize,
    position: usize,
    caches: Vec<LayerCache>,
    /// Causal masks by entries before the block and rows of it.
    masks: HashMap<(usize, usize), Tensor>,
}

impl<'a> BlockStream<'a> {
    fn new(decoder: &'a Decoder, slots: usize) -> Self {
        Self { decoder, slots, position: 0, caches: Vec::new(), masks: HashMap::new() }
    }

    /// Reads `ids [b, len]`; the last layer's output `[b, len, hidden]`.
    fn block(&mut self, ids: &Tensor, mixtures: &[LayerMixture<'_>]) -> Result<Tensor> {
        let decoder = self.decoder;
        let rotation = decoder.rotation(self.position, ids.dim(1)?)?;
        let selections = self.select()?;
        let mut x = decoder.embed(ids)?;
        let mut caches = Vec::with_capacity(mixtures.len());
        for (layer, mixture) in mixtures.iter().enumerate() {
            let heads = decoder.project(layer, &x)?;
            let queries = decoder.rotate(&heads.queries, &rotation)?;
            let keys = decoder.rotate(&heads.keys, &rotation)?;
            let (keys, values) = match (self.caches.get(layer), selections.get(layer)) {
                (Some(cache), Some(selection)) => {
                    let (old_keys, old_values) =
                        mixture.compress(&cache.keys, &cache.values, selection, decoder.key_order())?;
                    (Tensor::cat(&[&old_keys, &keys], 2)?, Tensor::cat(&[&old_values, &heads.values], 2)?)
                }
                (Some(cache), None) => {
                    (Tensor::cat(&[&cache.keys, &keys], 2)?, Tensor::cat(&[&cache.values, &heads.values], 2)?)
                }
                (None, _) => (keys, heads.values),
            };
            let (attended, received) = self.attend(&queries, &keys, &values)?;
            caches.push(LayerCache { keys: keys.detach(), values: values.detach(), received });
            x = decoder.finish(layer, &x, &attended)?;
        }
        self.caches = caches;
        self.position += ids.dim(1)?;
        Ok(x)
    }

    /// One selection per layer if the caches must shrink, else none. All layers' attention sums come
    /// to the host in one transfer.
    fn select(&self) -> Result<Vec<Selection>> {
        let Some(cache) = self.caches.first() else { return Ok(Vec::new()) };
        let n = cache.keys.dim(2)?;
        if n <= self.slots {
            return Ok(Vec::new());
        }
        let received: Vec<&Tensor> = self.caches.iter().map(|cache| &cache.received).collect();
        let received = Tensor::stack(&received, 0)?.flatten_all()?.to_vec1::<f32>()?;
        let per_layer = received.len() / self.caches.len();
        let layers: Vec<&[f32]> = received.chunks_exact(per_layer).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let slots = self.slots;
        let select = |received: &&[f32]| SelectedRows::new(received, n, slots);
        let rows = std::thread::scope(|scope| {
            let groups = layers.chunks(layers.len().div_ceil(threads));
            let workers: Vec<_> = groups
                .map(|group| scope.spawn(move || group.iter().map(select).collect::<Vec<_>>()))
                .collect();
            let stopped = |_| candle_core::Error::Msg("a selection thread stopped".into());
            let rows = workers.into_iter().map(|worker| worker.join().map_err(stopped));
            rows.collect::<candle_core::Result<Vec<_>>>()
        })?;
        Selection::upload(&rows.concat(), self.decoder.device())
    }

    /// Attention's output `[b, heads, len, head_dim]` and what every entry received.
    fn attend(&mut self, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, heads, len, head_dim) = queries.dims4()?;
        let (kv_heads, n) = (keys.dim(1)?, keys.dim(2)?);
        let rows = heads / kv_heads * len;
        let queries = (queries * (head_dim as f64).powf(-0.5))?;
        let queries = queries.reshape((batch, kv_heads, rows, head_dim))?;
        let scores = queries.matmul(&keys.transpose(2, 3)?.contiguous()?)?;
        let mask = match self.masks.get(&(n - len, len)) {
            Some(mask) => mask.clone(),
            None => {
                let hidden = (0..len).flat_map(|j| (0..n).map(move |i| i > n - len + j));
                let mask: Vec<f32> = hidden.map(|hidden| if hidden { -1e9 } else { 0.0 }).collect();
                let mask = Tensor::from_vec(mask, (len, n), &candle_core::Device::Cpu)?;
                let mask = mask.to_dtype(scores.dtype())?.to_device(scores.device())?;
                let mask = mask.repeat((batch * heads, 1))?.reshape(scores.shape())?;
                self.masks.insert((n - len, len), mask.clone());
                mask
            }
        };
        let p = softmax(&scores, Some(&mask))?;
        let ones = Tensor::ones((batch, kv_heads, 1, rows), p.dtype(), p.device())?;
        let received = ones.matmul(&p.detach())?.squeeze(D::Minus2)?.to_dtype(DType::F32)?;
        let attended = p.matmul(values)?.reshape((batch, heads, len, head_dim))?;
        Ok((attended, received))
    }
}

#[cfg(test)]
#[path = "lococo_tests.rs"]
mod tests;
