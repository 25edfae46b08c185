//! A model in this process: the costs of its steps, then the engine over it.
//!
//! [`steps`] drives the model directly, [`engine`] adds scheduler, sampler and channels. Detokenizer
//! and HTTP are left out on purpose: the difference to a loaded server is their cost.

mod engine;
mod steps;

use std::path::Path;

use anyhow::ensure;
use locket_model::{
    MemoryUse,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, SideArrays},
    load::{BuildOptions, Checkpoint},
};
use serde::Serialize;

use self::{
    engine::Engine,
    steps::{DECODE_WARMUP_STEPS, Decode, Floor, Prefill, Stage},
};
use super::report::{self, Header};
use crate::{
    config::{Config, value::about_bytes},
    memory::{FreeMemory, free_memory},
    model_source, telemetry,
};

/// Arguments of the offline measurement. What is not given comes from the configuration.
#[derive(Debug, Clone, clap::Args)]
pub struct OfflineArgs {
    /// Sequences per decode step, and clients of the engine, one measurement each.
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
    /// Decode steps per measurement, after two that are not measured, and tokens that the engine
    /// generates per request.
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
    pub engine: Vec<Engine>,
}

/// [`MemoryUse`] for the report.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBytes {
    weights: u64,
    workspace: u64,
    cache: u64,
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
        // Blocks are used by method full: no fold is measured here.
        side: SideArrays::default(),
        classes: vec![BlockClass { capacity, blocks }],
    };
    let largest_step = args.chunk_sizes.iter().copied().max().unwrap_or(1).max(blocks) as usize;
    let max_batch_rows = largest_step.max(config.engine.max_batch_rows);
    let needed = checkpoint.planned_bytes(config.backend, max_batch_rows).saturating_add(cache.total_bytes());
    check_memory(needed, &allowed_memory(&config))?;
    let options = BuildOptions {
        backend: config.backend,
        cache,
        max_batch_rows,
        threads: config.threads,
        side_car: None,
    };
    let mut stage = Stage::new(checkpoint.build(&options)?, args.context, seed);

    let MemoryUse { weights, workspace, cache } = stage.memory();
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
    let load = engine::Load { prompt_tokens: args.context, output_tokens: args.decode_steps, seed };
    let engine = engine::measure(stage.into_model(), &config.engine, &args.batch_sizes, load)?;
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
        engine,
    })
}

/// The configuration that `locket serve` would have with these flags; starts logging by it, so that
/// fetching a model is seen.
fn configuration(args: &OfflineArgs, model: Option<&Path>) -> anyhow::Result<Config> {
    let flags = [
        ("model", model.map(|path| path.display().to_string())),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("backend", args.backend.clone()),
        ("cache.dtype", args.cache_dtype.clone()),
    ];
    let config = Config::of_flags(flags)?;
    telemetry::start(&config.log);
    Ok(config)
}

/// The operator's budget, else all that is free: nothing else is served meanwhile.
fn allowed_memory(config: &Config) -> FreeMemory {
    match config.memory_budget {
        Some(bytes) => {
            FreeMemory { bytes, bounded_by: format!("memory-budget ({})", config.origin("memory-budget")) }
        }
        None => free_memory(),
    }
}

fn check_memory(needed: u64, allowed: &FreeMemory) -> anyhow::Result<()> {
    ensure!(
        needed <= allowed.bytes,
        "this needs {}, but only {} may be taken, bounded by the {}; lower --batch-sizes or --context",
        about_bytes(needed),
        about_bytes(allowed.bytes),
        allowed.bounded_by
    );
    Ok(())
}

impl std::fmt::Display for OfflineReport {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { header, inputs, memory_bytes, floor, .. } = self;
        write!(out, "{header}")?;
        writeln!(
            out,
            "{} ({}), backend {}, threads {} (0: all), slots {}; no detokenizer, no HTTP",
            inputs.model, inputs.quantization, inputs.backend, inputs.threads, inputs.cache_dtype
        )?;
        writeln!(
            out,
            "weights {}, workspace {}, cache {}",
            about_bytes(memory_bytes.weights),
            about_bytes(memory_bytes.workspace),
            about_bytes(memory_bytes.cache)
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
        writeln!(out, "\nthe model alone: prefill of {} tokens", inputs.context)?;
        writeln!(out, "{:>8}{:>12}{:>12}{:>12}", "chunk", "tokens/s", "step ms", "GMAC/s")?;
        for Prefill { chunk, tokens_per_s, step_ms, gmac_per_s } in &self.prefill {
            writeln!(out, "{chunk:>8}{tokens_per_s:>12.1}{step_ms:>12.3}{gmac_per_s:>12.1}")?;
        }
        writeln!(out, "\nthe model alone: decode after {} tokens", inputs.context)?;
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
        engine::write_table(out, &self.engine, inputs.context, inputs.decode_steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_says_what_bounds_it() {
        let allowed = FreeMemory { bytes: 100 << 20, bounded_by: "cgroup /x".into() };
        assert!(check_memory(100 << 20, &allowed).is_ok());
        let text = check_memory(3 << 30, &allowed).unwrap_err().to_string();
        assert!(
            text.contains("3.00 GiB") && text.contains("100 MiB") && text.contains("cgroup /x"),
            "{text}"
        );
    }
}
