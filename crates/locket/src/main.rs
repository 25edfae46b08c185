//! locket: an OpenAI-compatible inference server whose memory does not grow with the conversation.

mod adapters;
mod bench;
mod cache;
mod cgroup;
mod cli;
mod config;
mod eval;
mod health;
mod inspect;
mod keys;
mod memory;
mod metrics;
mod model_source;
mod serve;
mod side_car;
mod telemetry;
mod tune;
mod tune_budgets;
mod vision;

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The package's version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Version, commit and features.
pub(crate) const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("BUILD_COMMIT"),
    ", features: ",
    env!("BUILD_FEATURES"),
    ")"
);

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
