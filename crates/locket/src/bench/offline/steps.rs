//! Step costs of a model: prefill by chunk size, decode by batch size.
//!
//! Drives [`Model`] directly. Beside each time stands what the step must at least read and multiply,
//! so that it can be held against what the machine can do.

use std::time::Instant;

use anyhow::Context;
use locket_model::{
    Batch, BlockId, MemoryUse, Model, ModelConfig,
    kv_cache::{CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use crate::bench::stats::quantile;

/// Decode steps that are not measured.
pub(super) const DECODE_WARMUP_STEPS: u32 = 2;

/// What any step of this model must at least do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(in crate::bench) struct Floor {
    /// Weights that every step reads, whatever its rows.
    pub weight_bytes: u64,
    /// Keys and values of one token in all layers.
    pub cache_bytes_per_token: u64,
    /// Multiply-adds of the layers' matrices for one row.
    pub macs_per_row: u64,
    /// Multiply-adds of the head for one sampled row.
    pub macs_per_sample: u64,
    /// Multiply-adds of attention for one row and one token that it sees.
    pub macs_per_attended_token: u64,
}

/// One chunk size.
#[derive(Debug, Serialize)]
pub(in crate::bench) struct Prefill {
    pub chunk: u32,
    pub tokens_per_s: f64,
    /// Mean over the prompt's steps, in the median repeat.
    pub step_ms: f64,
    pub gmac_per_s: f64,
}

/// One batch size.
#[derive(Debug, Serialize)]
pub(in crate::bench) struct Decode {
    pub batch: u32,
    pub tokens_per_s: f64,
    pub step_ms_median: f64,
    pub step_ms_p90: f64,
    /// Weights and cache read, per time.
    pub gb_per_s: f64,
    pub gmac_per_s: f64,
}

impl Floor {
    /// Counts for a model whose weights take `weight_bytes` in the backend's form.
    pub(super) fn of(config: &ModelConfig, weight_bytes: u64, slot_type: SlotType) -> Self {
        let (hidden, layers) = (config.hidden_size as u64, config.num_layers as u64);
        let slot_bytes = CachePlan::slot_bytes(CacheGeometry::of(config), slot_type, SideArrays::default());
        let positions = config.num_layers * config.num_kv_heads * size_of::<u32>();
        let attention = hidden * (config.qkv_dim() + config.q_dim()) as u64;
        let mlp = 3 * hidden * config.intermediate_size as u64;
        let macs_per_row = layers * (attention + mlp);
        let macs_per_sample = hidden * config.vocab_size as u64;
        // An embedding that is not the head as well is only looked up: one row per token. Its share
        // of the bytes is taken to be its share of the numbers.
        let stored = macs_per_row + macs_per_sample * if config.tie_embeddings { 1 } else { 2 };
        let read = u128::from(macs_per_row + macs_per_sample);
        Self {
            weight_bytes: (u128::from(weight_bytes) * read / u128::from(stored.max(1))) as u64,
            cache_bytes_per_token: slot_bytes - positions as u64,
            macs_per_row,
            macs_per_sample,
            macs_per_attended_token: layers * 2 * config.q_dim() as u64,
        }
    }

    /// Multiply-adds of prefilling `tokens` with one sampled row at the end.
    fn prefill_macs(&self, tokens: u64) -> u64 {
        tokens * self.macs_per_row
            + self.macs_per_sample
            + tokens * (tokens + 1) / 2 * self.macs_per_attended_token
    }

    /// Multiply-adds of a decode step of `batch` sequences that see `context` tokens each.
    fn decode_macs(&self, batch: u64, context: u64) -> u64 {
        batch * (self.macs_per_row + self.macs_per_sample + context * self.macs_per_attended_token)
    }

    /// Bytes that such a step reads.
    fn decode_bytes(&self, batch: u64, context: u64) -> u64 {
        self.weight_bytes + batch * context * self.cache_bytes_per_token
    }
}

/// A model and what its steps are made of.
pub(super) struct Stage {
    model: Box<dyn Model>,
    /// The prompt; its length is the context depth.
    prompt: Vec<u32>,
    rng: StdRng,
    batch: Batch,
    logits: Vec<f32>,
}

impl Stage {
    /// Draws a prompt of `context` random ids.
    pub(super) fn new(model: Box<dyn Model>, context: u32, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let vocab = model.config().vocab_size.max(1) as u32;
        let prompt = (0..context).map(|_| rng.random_range(0..vocab)).collect();
        Self { model, prompt, rng, batch: Batch::default(), logits: Vec::new() }
    }

    /// Bytes that the model holds.
    pub(super) fn memory(&self) -> MemoryUse {
        self.model.memory()
    }

    /// The model, all of whose blocks are closed.
    pub(super) fn into_model(self) -> Box<dyn Model> {
        self.model
    }

    /// Fills `block` with the prompt in steps of `chunk` rows and returns the seconds that it took.
    fn fill(&mut self, block: BlockId, chunk: u32) -> anyhow::Result<f64> {
        let capacity = self.model.cache_plan().capacity(block).context("the planned block is missing")?;
        self.model.open_block(block, CacheSettings::full(capacity))?;
        let num_chunks = self.prompt.len().div_ceil(chunk as usize);
        let start = Instant::now();
        for (index, ids) in self.prompt.chunks(chunk as usize).enumerate() {
            self.batch.clear();
            self.batch.push(block, index as u32 * chunk, ids, index + 1 == num_chunks);
            self.model.forward(&self.batch, &mut self.logits)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// Measures prefilling the prompt in steps of `chunk` rows.
    pub(super) fn prefill(&mut self, chunk: u32, repeats: u32, floor: &Floor) -> anyhow::Result<Prefill> {
        let block = BlockId(0);
        let mut seconds = Vec::new();
        for _ in 0..=repeats {
            seconds.push(self.fill(block, chunk)?);
            self.model.close_block(block);
        }
        seconds.remove(0);
        let median_s = median(&mut seconds)?;
        let tokens = self.prompt.len();
        Ok(Prefill {
            chunk,
            tokens_per_s: tokens as f64 / median_s,
            step_ms: median_s * 1e3 / tokens.div_ceil(chunk as usize) as f64,
            gmac_per_s: floor.prefill_macs(tokens as u64) as f64 / median_s / 1e9,
        })
    }

    /// Measures `steps` decode steps of `batch` sequences after the prompt.
    pub(super) fn decode(&mut self, batch: u32, steps: u32, floor: &Floor) -> anyhow::Result<Decode> {
        let chunk = self.model.max_batch_rows().min(128) as u32;
        self.fill(BlockId(0), chunk)?;
        for block in 1..batch {
            self.model.copy_block(BlockId(0), BlockId(block))?;
        }
        let (vocab, context) = (self.model.config().vocab_size.max(1) as u32, self.prompt.len() as u32);
        let mut seconds = Vec::new();
        for step in 0..DECODE_WARMUP_STEPS + steps {
            self.batch.clear();
            for block in 0..batch {
                let id = self.rng.random_range(0..vocab);
                self.batch.push(BlockId(block), context + step, &[id], true);
            }
            let start = Instant::now();
            self.model.forward(&self.batch, &mut self.logits)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        for block in 0..batch {
            self.model.close_block(BlockId(block));
        }
        seconds.drain(..DECODE_WARMUP_STEPS as usize);
        let median_s = median(&mut seconds)?;
        // The cache is this deep in the middle of the measured steps.
        let depth = u64::from(context + DECODE_WARMUP_STEPS + steps / 2);
        Ok(Decode {
            batch,
            tokens_per_s: f64::from(batch) / median_s,
            step_ms_median: median_s * 1e3,
            step_ms_p90: quantile(&seconds, 0.9).unwrap_or(median_s) * 1e3,
            gb_per_s: floor.decode_bytes(u64::from(batch), depth) as f64 / median_s / 1e9,
            gmac_per_s: floor.decode_macs(u64::from(batch), depth) as f64 / median_s / 1e9,
        })
    }
}

/// Sorts the values and returns the middle one.
fn median(values: &mut [f64]) -> anyhow::Result<f64> {
    values.sort_unstable_by(f64::total_cmp);
    quantile(values, 0.5).context("nothing was measured")
}

#[cfg(test)]
mod tests {
    use locket_model::config::{RopeConfig, RopeScaling, RopeStyle};

    use super::*;

    fn smollm2(tie_embeddings: bool) -> ModelConfig {
        ModelConfig {
            architecture: "llama".into(),
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1_536,
            num_layers: 30,
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            max_position: 8_192,
            rms_norm_eps: 1e-5,
            rope: RopeConfig {
                theta: 100_000.0,
                rotary_dim: 64,
                style: RopeStyle::Interleaved,
                scaling: RopeScaling::None,
            },
            tie_embeddings,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: vec![None; 30],
            eos_token_ids: vec![2],
            bos_token_id: None,
        }
    }

    /// Expected numbers are counted by hand in `docs/performance.md`.
    #[test]
    fn floor_of_the_default_model() {
        let floor = Floor::of(&smollm2(true), 96_436_224, SlotType::F16);
        assert_eq!(floor.weight_bytes, 96_436_224);
        assert_eq!(floor.macs_per_row, 106_168_320);
        assert_eq!(floor.macs_per_sample, 28_311_552);
        assert_eq!(floor.cache_bytes_per_token, 23_040);
        assert_eq!(floor.macs_per_attended_token, 34_560);
        assert_eq!(floor.decode_macs(2, 10), 2 * (134_479_872 + 345_600));
        assert_eq!(floor.decode_bytes(2, 10), 96_436_224 + 460_800);
        assert_eq!(floor.prefill_macs(3), 3 * 106_168_320 + 28_311_552 + 6 * 34_560);
    }

    #[test]
    fn an_untied_embedding_is_not_read_in_a_step() {
        let numbers = 106_168_320 + 2 * 28_311_552;
        let floor = Floor::of(&smollm2(false), 2 * numbers, SlotType::F16);
        assert_eq!(floor.weight_bytes, 2 * 134_479_872);
    }
}
