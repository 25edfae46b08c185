//! Step costs of a model in this process: prefill by chunk size, decode by batch size.
//!
//! Drives [`Model`] directly. Scheduler, sampler, detokenizer and HTTP are left out on purpose: the
//! difference to a loaded server is their cost. Beside each time stands what the step must at least
//! read and multiply, so that it can be held against what the machine can do.

use std::{path::Path, time::Instant};

use anyhow::{Context, ensure};
use locket_model::{
    Batch, BlockId, MemoryUse, Model, ModelConfig,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SlotType},
    load::{BuildOptions, Checkpoint},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use super::{
    report::{self, Header},
    stats::quantile,
};
use crate::{
    config::{Config, SettingFlags, Sources},
    model_source,
};

/// Arguments of the offline measurement. What is not given comes from the configuration.
#[derive(Debug, Clone, clap::Args)]
pub struct OfflineArgs {
    /// Sequences per decode step, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64", requires = "offline")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch_sizes: Vec<u32>,
    /// Rows per prefill step, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "16,64,128,256", requires = "offline")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65_536))]
    chunk_sizes: Vec<u32>,
    /// Tokens that are prefilled, and that each sequence holds when decoding begins.
    #[arg(long, default_value_t = 256, requires = "offline")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    context: u32,
    /// Decode steps per measurement, after two that are not measured.
    #[arg(long, default_value_t = 32, requires = "offline")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65_536))]
    decode_steps: u32,
    /// Prefills per measurement, after one that is not measured; the median counts.
    #[arg(long, default_value_t = 3, requires = "offline")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000))]
    prefill_repeats: u32,
    /// CPU threads; 0 takes all physical cores.
    #[arg(long, requires = "offline")]
    threads: Option<usize>,
    /// Who computes, as in `locket serve`.
    #[arg(long, requires = "offline")]
    backend: Option<String>,
    /// Number type of the cache, as in `locket serve`.
    #[arg(long, requires = "offline")]
    cache_dtype: Option<String>,
}

/// Decode steps that are not measured.
const DECODE_WARMUP_STEPS: u32 = 2;

/// What was asked.
#[derive(Debug, Serialize)]
pub(super) struct Inputs {
    pub model: String,
    pub quantization: String,
    pub backend: String,
    pub threads: usize,
    pub cache_dtype: &'static str,
    pub context: u32,
    pub decode_steps: u32,
    pub prefill_repeats: u32,
    pub seed: u64,
}

/// What any step of this model must at least do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Floor {
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
pub(super) struct Prefill {
    pub chunk: u32,
    pub tokens_per_s: f64,
    /// Mean over the prompt's steps, in the median repeat.
    pub step_ms: f64,
    pub gmac_per_s: f64,
}

/// One batch size.
#[derive(Debug, Serialize)]
pub(super) struct Decode {
    pub batch: u32,
    pub tokens_per_s: f64,
    pub step_ms_median: f64,
    pub step_ms_p90: f64,
    /// Weights and cache read, per time.
    pub gb_per_s: f64,
    pub gmac_per_s: f64,
}

/// Everything about one run.
#[derive(Debug, Serialize)]
pub(super) struct OfflineReport {
    #[serde(flatten)]
    pub header: Header,
    pub inputs: Inputs,
    pub memory_bytes: MemoryBytes,
    pub floor: Floor,
    pub prefill: Vec<Prefill>,
    pub decode: Vec<Decode>,
}

/// [`MemoryUse`] for the report.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBytes {
    weights: u64,
    workspace: u64,
    cache: u64,
}

impl Floor {
    /// Counts for a model whose weights take `weight_bytes` in the backend's form.
    fn of(config: &ModelConfig, weight_bytes: u64, slot_type: SlotType) -> Self {
        let (hidden, layers) = (config.hidden_size as u64, config.num_layers as u64);
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
            cache_bytes_per_token: layers * (2 * config.kv_dim() * slot_type.bytes()) as u64,
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

/// Loads the model and measures it.
pub(super) fn run(args: &OfflineArgs, model: Option<&Path>, seed: u64) -> anyhow::Result<OfflineReport> {
    let config = configuration(args, model)?;
    let local = model_source::locate(&config)?;
    let checkpoint = Checkpoint::open(&local.path)?;
    let geometry = CacheGeometry::of(&checkpoint.config);
    let capacity = args.context + args.decode_steps + DECODE_WARMUP_STEPS;
    let trained = checkpoint.config.max_position;
    ensure!(
        capacity as usize <= trained,
        "--context and --decode-steps make sequences of {capacity} tokens, but the model ends at {trained}"
    );
    let blocks = args.batch_sizes.iter().copied().max().unwrap_or(1);
    let cache = CachePlan {
        geometry,
        slot_type: config.cache.slot_type,
        classes: vec![BlockClass { capacity, blocks }],
    };
    let max_batch_rows = args.chunk_sizes.iter().copied().max().unwrap_or(1).max(blocks) as usize;
    check_memory(checkpoint.planned_bytes(config.backend, max_batch_rows) + cache.total_bytes())?;
    let options = BuildOptions { backend: config.backend, cache, max_batch_rows, threads: config.threads };
    let mut stage = Stage::new(checkpoint.build(&options)?, args.context, seed);

    let MemoryUse { weights, workspace, cache } = stage.model.memory();
    let floor = Floor::of(&checkpoint.config, weights, config.cache.slot_type);
    let prefill = args
        .chunk_sizes
        .iter()
        .map(|&chunk| stage.prefill(chunk, args.prefill_repeats, &floor))
        .collect::<anyhow::Result<_>>()?;
    let decode = args
        .batch_sizes
        .iter()
        .map(|&batch| stage.decode(batch, args.decode_steps, &floor))
        .collect::<anyhow::Result<_>>()?;
    Ok(OfflineReport {
        header: report::header("offline"),
        inputs: Inputs {
            model: local.name,
            quantization: checkpoint.quantization,
            backend: format!("{:?}", config.backend).to_lowercase(),
            threads: config.threads,
            cache_dtype: config.cache.slot_type.name(),
            context: args.context,
            decode_steps: args.decode_steps,
            prefill_repeats: args.prefill_repeats,
            seed,
        },
        memory_bytes: MemoryBytes { weights, workspace, cache },
        floor,
        prefill,
        decode,
    })
}

/// The configuration that `locket serve` would have with these flags.
fn configuration(args: &OfflineArgs, model: Option<&Path>) -> anyhow::Result<Config> {
    let flags = [
        ("model", model.map(|path| path.display().to_string())),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("backend", args.backend.clone()),
        ("cache.dtype", args.cache_dtype.clone()),
    ];
    let given = flags.into_iter().filter_map(|(key, text)| Some((key, vec![text?]))).collect();
    let sources = Sources::of_process(SettingFlags { given, config: None })?;
    Ok(Config::load(&sources)?)
}

fn check_memory(bytes: u64) -> anyhow::Result<()> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let available = system.available_memory();
    ensure!(
        bytes <= available,
        "this needs {}, but {} are free; lower --batch-sizes or --context",
        report::mebibytes(bytes),
        report::mebibytes(available)
    );
    Ok(())
}

/// A model and what its steps are made of.
struct Stage {
    model: Box<dyn Model>,
    /// The prompt; its length is the context depth.
    prompt: Vec<u32>,
    rng: StdRng,
    batch: Batch,
    logits: Vec<f32>,
}

impl Stage {
    fn new(model: Box<dyn Model>, context: u32, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let vocab = model.config().vocab_size.max(1) as u32;
        let prompt = (0..context).map(|_| rng.random_range(0..vocab)).collect();
        Self { model, prompt, rng, batch: Batch::default(), logits: Vec::new() }
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

    fn prefill(&mut self, chunk: u32, repeats: u32, floor: &Floor) -> anyhow::Result<Prefill> {
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

    fn decode(&mut self, batch: u32, steps: u32, floor: &Floor) -> anyhow::Result<Decode> {
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

impl std::fmt::Display for OfflineReport {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { header, inputs, memory_bytes, floor, .. } = self;
        write!(out, "{header}")?;
        writeln!(
            out,
            "{} ({}), backend {}, threads {} (0: all), slots {}; the model alone: no scheduler, sampler, HTTP",
            inputs.model, inputs.quantization, inputs.backend, inputs.threads, inputs.cache_dtype
        )?;
        writeln!(
            out,
            "weights {}, workspace {}, cache {}",
            report::mebibytes(memory_bytes.weights),
            report::mebibytes(memory_bytes.workspace),
            report::mebibytes(memory_bytes.cache)
        )?;
        writeln!(
            out,
            "floor per step: {:.2} MB of weights; per row: {:.2} M multiply-adds, {:.2} M for its logits, {} for \
             each token it sees",
            floor.weight_bytes as f64 / 1e6,
            floor.macs_per_row as f64 / 1e6,
            floor.macs_per_sample as f64 / 1e6,
            floor.macs_per_attended_token
        )?;
        writeln!(out, "\nprefill of {} tokens", inputs.context)?;
        writeln!(out, "{:>8}{:>12}{:>12}{:>12}", "chunk", "tokens/s", "step ms", "GMAC/s")?;
        for Prefill { chunk, tokens_per_s, step_ms, gmac_per_s } in &self.prefill {
            writeln!(out, "{chunk:>8}{tokens_per_s:>12.1}{step_ms:>12.3}{gmac_per_s:>12.1}")?;
        }
        writeln!(out, "\ndecode after {} tokens", inputs.context)?;
        writeln!(
            out,
            "{:>8}{:>12}{:>12}{:>12}{:>12}{:>12}",
            "batch", "tokens/s", "step ms", "p90 ms", "GB/s", "GMAC/s"
        )?;
        for row in &self.decode {
            writeln!(
                out,
                "{:>8}{:>12.1}{:>12.3}{:>12.3}{:>12.1}{:>12.1}",
                row.batch,
                row.tokens_per_s,
                row.step_ms_median,
                row.step_ms_p90,
                row.gb_per_s,
                row.gmac_per_s
            )?;
        }
        Ok(())
    }
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
