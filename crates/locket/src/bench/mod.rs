//! `locket bench`: a load generator for any OpenAI-compatible server, and the engine alone.
//!
//! The load generator speaks plain HTTP and knows nothing of the server behind it, so that locket
//! and its peers are measured by the same ruler. `--offline` drives [`locket_model::Model`] in this
//! process, then [`locket_engine`] over it: the cost of a step, and of scheduling and sampling.

mod arrivals;
mod client;
mod load;
mod memory;
mod offline;
mod prompts;
pub(crate) mod report;
mod sse;
mod stats;

use std::{io::Write, path::PathBuf};

use anyhow::Context;

/// Arguments of `locket bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// With --offline: a model file or folder; without it the default model is measured.
    #[arg(value_name = "MODEL", requires = "offline")]
    pub checkpoint: Option<PathBuf>,

    /// Measure a model's steps and the engine over it in this process instead of loading a server.
    #[arg(long, conflicts_with = "LoadArgs")]
    pub offline: bool,

    /// Seed of prompts, lengths and arrival times. Use another one when a server may still hold the
    /// prompts of the last run in a prefix cache.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Write everything that was asked and measured to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Arguments of the load generator.
    #[command(flatten, next_help_heading = "Load on a server")]
    pub load: load::LoadArgs,

    /// Arguments of the offline measurement.
    #[command(flatten, next_help_heading = "Offline (with --offline)")]
    pub steps: offline::OfflineArgs,
}

/// Runs the benchmark, prints its table and writes its JSON.
///
/// # Errors
/// Arguments that contradict each other, a server or model that cannot be used at all, and a run in
/// which no request succeeded. Single failed requests are counted, not raised.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let (text, json) = if args.offline {
        let report = offline::run(&args.steps, args.checkpoint.as_deref(), args.seed)?;
        (report.to_string(), serde_json::to_value(&report)?)
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the load generator's event loop")?;
        let report = runtime.block_on(load::run(&args.load, args.seed))?;
        (report.to_string(), serde_json::to_value(&report)?)
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the result")?;
    if let Some(path) = &args.json {
        let mut bytes = serde_json::to_vec_pretty(&json)?;
        bytes.push(b'\n');
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let succeeded = args.offline || json["results"]["requests_ok"].as_u64().is_some_and(|ok| ok > 0);
    anyhow::ensure!(succeeded, "no request succeeded; the table above lists the errors by kind");
    Ok(())
}
