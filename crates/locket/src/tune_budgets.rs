//! `locket tune budgets`: measures which layers need their slots and writes it into a side-car.

use std::{fmt::Write as _, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::Args;
use locket_eval::{EvalOptions, Evaluation, Task, layer_shares::LayerShares};
use locket_model::{
    kv_cache::{CacheGeometry, CacheMethod, SideCar, SlotType},
    load::Checkpoint,
};
use locket_processor::Processor;
use serde_json::json;

use crate::{config::Config, eval::write_whole, model_source, telemetry};

/// Arguments of `locket tune budgets`.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    /// A model file, folder or repository, as in `locket serve`; without it the default model.
    #[arg(long)]
    model: Option<String>,
    /// The side-car that gets the shares; its weights judge the tokens.
    #[arg(long, value_name = "FILE")]
    side_car: PathBuf,
    /// The side-car to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Text to measure on, no test text: JSONL with `text`, or one document per file.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Method to measure with: learned or observed.
    #[arg(long, default_value = "learned")]
    method: CacheMethod,
    /// Slots to measure with. Shares found with few slots serve more of them, too.
    #[arg(long, default_value_t = 128)]
    slots: u32,
    /// Slots filled between folds.
    #[arg(long, default_value_t = 128)]
    ring: u32,
    /// Tokens of each text and each probe.
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Documents of text.
    #[arg(long, default_value_t = 8)]
    documents: usize,
    /// Probes per task.
    #[arg(long, default_value_t = 16)]
    probes: usize,
    /// Kinds of probes.
    #[arg(long, value_delimiter = ',', default_value = "passkey,multi-key")]
    tasks: Vec<Task>,
    /// Seed of windows, haystacks and probes.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Who computes: cpu, reference or, if built in, cuda.
    #[arg(long)]
    backend: Option<String>,
    /// Bytes that weights, workspace and cache may take [default: what is free]; needed for cuda.
    #[arg(long)]
    memory_budget: Option<String>,
    /// Sequences that advance together.
    #[arg(long, default_value_t = 4, value_name = "SEQUENCES")]
    batch: u32,
    /// Runs at a time, each with a model of its own: on a GPU one run alone leaves it half idle.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Also write everything that was measured to this file as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Measures, writes the side-car, and says what came out.
///
/// # Errors
/// A model, side-car or text that cannot be used, and options that contradict each other.
pub fn run(args: &BudgetArgs) -> anyhow::Result<String> {
    let flags = [
        ("model", args.model.clone()),
        ("backend", args.backend.clone()),
        ("memory-budget", args.memory_budget.clone()),
    ];
    let config = Config::of_flags(flags)?;
    telemetry::start(&config.log);
    let local = model_source::locate(&config)?;
    let checkpoint = Checkpoint::open(&local.path)?;
    let processor = Processor::load(&checkpoint).context("the model's tokenizer")?;
    let path = &args.side_car;
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let side_car = Arc::new(SideCar::read(path, &bytes, CacheGeometry::of(&checkpoint.config))?);
    let options = args.options(&config);
    let evaluation = Evaluation::prepare(&checkpoint, &processor, &args.data, options, Some(side_car))?;
    let measured = evaluation.layer_shares(args.jobs, &mut |line| tracing::info!("{line}"))?;
    locket_tune::write_layer_shares(&bytes, &measured.shares, args.note(), &args.out)?;
    if let Some(path) = &args.report {
        write_whole(path, &serde_json::to_vec_pretty(&measured)?)?;
    }
    Ok(described(args, &measured))
}

impl BudgetArgs {
    fn options(&self, config: &Config) -> EvalOptions {
        EvalOptions {
            methods: vec![self.method],
            slots: vec![self.slots],
            ring: self.ring,
            slot_types: vec![SlotType::F16],
            context: self.context,
            probe_context: self.context,
            documents: self.documents,
            tasks: std::iter::once(Task::Perplexity).chain(self.tasks.iter().copied()).collect(),
            probes: self.probes,
            against: Vec::new(),
            seed: self.seed,
            sinks: None,
            recent_permille: None,
            recall_permille: None,
            layer_budgets: true,
            backend: config.backend,
            threads: config.threads,
            lockstep: self.batch,
            chunk: 128,
        }
    }

    /// How the shares were found, for the file's metadata.
    fn note(&self) -> String {
        let tasks: Vec<_> = self.tasks.iter().map(|task| task.name()).collect();
        let note = json!({
            "method": self.method.name(),
            "slots": self.slots,
            "ring": self.ring,
            "context": self.context,
            "documents": self.documents,
            "probes": self.probes,
            "tasks": tasks,
            "seed": self.seed,
            "bounds": locket_eval::layer_shares::BOUNDS,
            "locket_version": env!("CARGO_PKG_VERSION"),
        });
        note.to_string()
    }
}

fn described(args: &BudgetArgs, measured: &LayerShares) -> String {
    let LayerShares { shares, equal, shared, .. } = measured;
    let mut text = format!("{}: shares of {} layers\n", args.out.display(), shares.len());
    let shares: Vec<_> = shares.iter().map(|share| format!("{share:.2}")).collect();
    let _ = writeln!(text, "{}", shares.join(" "));
    let _ = writeln!(text, "text   {:.4} nats per token, {:.4} with equal shares", shared.text, equal.text);
    let _ =
        writeln!(text, "probes {:.4} nats per token, {:.4} with equal shares", shared.probes, equal.probes);
    text
}
