//! `locket tune`: trains what some cache methods need beside a model.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use locket_model::load::Checkpoint;
use locket_processor::Processor;
use locket_tune::{
    Budget, DeviceKind, LearnedSettings, LococoSettings, Method, Precision, Settings, Summary,
};

use crate::{
    config::Config,
    model_source, telemetry,
    tune_budgets::{self, BudgetArgs},
};

/// What to train.
#[derive(Debug, Args)]
pub struct TuneArgs {
    #[command(subcommand)]
    command: TuneCommand,
}

#[derive(Debug, Subcommand)]
enum TuneCommand {
    /// Train side-car weights of the cache methods `learned` and `lococo` from text, the model frozen.
    ///
    /// On a GPU: --device cuda --dtype bf16. The side-car is a safetensors file of a few megabytes.
    Lococo(Box<LococoArgs>),
    /// Measure which layers need their slots, and write their shares into a side-car.
    ///
    /// Every layer in turn gets fewer slots, then more; what that costs in perplexity and in recall decides.
    Budgets(Box<BudgetArgs>),
}

#[derive(Debug, Args)]
struct LococoArgs {
    /// A .gguf file, a folder with config.json and safetensors, or a Hugging Face repository
    /// org/name[:file-or-quantisation] [default: SmolLM2-135M-Instruct].
    #[arg(long)]
    model: Option<String>,
    /// Training text: .jsonl or .ndjson with a text field per line, or plain text files. Streamed.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// The side-car to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Cache method to train for.
    #[arg(long, value_enum, default_value = "learned")]
    method: MethodName,
    /// Optimiser steps [default: 350 for learned, 200 for lococo].
    #[arg(long, conflicts_with = "tokens")]
    steps: Option<u64>,
    /// Training tokens instead of steps, rounded up to whole steps.
    #[arg(long)]
    tokens: Option<u64>,
    /// Sequences per step [default: 6 for learned, 128 for lococo].
    #[arg(long)]
    batch: Option<usize>,
    /// Sequences that are computed at once; smaller needs less memory [default: the batch, at most 16].
    #[arg(long)]
    micro_batch: Option<usize>,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 4096)]
    sequence: usize,
    /// Peak learning rate [default: 0.002 for learned, 0.05 for lococo].
    #[arg(long)]
    lr: Option<f64>,
    /// Seed of weights, order of text and planted facts.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,
    /// Number type of the frozen model; what is trained is always f32.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: PrecisionName,
    /// Folder for a checkpoint, replaced every --checkpoint-every steps.
    #[arg(long, value_name = "FOLDER")]
    checkpoint_dir: Option<PathBuf>,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 50, requires = "checkpoint_dir")]
    checkpoint_every: u64,
    /// Go on from the checkpoint, if there is one; all other flags must be the same.
    #[arg(long, requires = "checkpoint_dir")]
    resume: bool,
    #[command(flatten)]
    learned: LearnedArgs,
    #[command(flatten)]
    lococo: LococoMethodArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Method learned")]
struct LearnedArgs {
    /// Width of the scorer's hidden layer [default: 96].
    #[arg(long)]
    hidden: Option<usize>,
    /// Queries after a token whose attention is observed, not predicted: one of these by turns
    /// [default: 96,512,2048].
    #[arg(long, value_delimiter = ',')]
    windows: Vec<usize>,
    /// Factor on the learning rate of the coefficient of observed attention [default: 20].
    #[arg(long)]
    coefficient_rate: Option<f64>,
    /// Recent tokens always kept, in thousandths of the slots; recommended to the server [default: 250].
    #[arg(long)]
    recent_permille: Option<u32>,
    /// Factor on the coefficient when serving; recommended to the server [default: 1].
    #[arg(long)]
    beta: Option<f32>,
    /// Share of the slots for recall, in thousandths; recommended to the server [default: 300].
    #[arg(long)]
    recall_permille: Option<u32>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Method lococo")]
struct LococoMethodArgs {
    /// Slots that remain after a compression: the weights are for this number only [default: 128].
    #[arg(long)]
    slots: Option<usize>,
    /// Tokens of a block [default: 512].
    #[arg(long)]
    ring: Option<usize>,
    /// Taps of the convolution [default: 21 for lococo, 9 for learned].
    #[arg(long)]
    kernel: Option<usize>,
    /// Standard deviation of the convolution's weights at the start [default: 1].
    #[arg(long)]
    init_std: Option<f64>,
    /// Gate between exact entries (0) and mixtures (1) at the start [default: 0.5].
    #[arg(long)]
    gate: Option<f64>,
    /// Bound on the gradients' norm [default: none, as published].
    #[arg(long)]
    clip: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodName {
    /// The score-once convolution.
    Learned,
    /// The published mixing convolution.
    Lococo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    F32,
    Bf16,
}

impl DeviceName {
    fn kind(self) -> anyhow::Result<DeviceKind> {
        match self {
            Self::Cpu => Ok(DeviceKind::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(DeviceKind::Cuda),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => anyhow::bail!("this build has no CUDA (feature `cuda`); use --device cpu"),
        }
    }
}

impl LococoArgs {
    fn settings(&self, model_name: String) -> anyhow::Result<Settings> {
        let method = self.method();
        let (steps, batch, rate) = match self.method {
            MethodName::Learned => (350, 6, 2e-3),
            MethodName::Lococo => (200, 128, 5e-2),
        };
        let batch = self.batch.unwrap_or(batch);
        let budget = match (self.steps, self.tokens) {
            (_, Some(tokens)) => Budget::Tokens(tokens),
            (given, None) => Budget::Steps(given.unwrap_or(steps)),
        };
        Ok(Settings {
            method,
            data: self.data.clone(),
            out: self.out.clone(),
            model_name,
            budget,
            batch,
            micro_batch: self.micro_batch.unwrap_or(batch.min(16)),
            sequence: self.sequence,
            rate: self.lr.unwrap_or(rate),
            seed: self.seed,
            device: self.device.kind()?,
            precision: match self.dtype {
                PrecisionName::F32 => Precision::F32,
                PrecisionName::Bf16 => Precision::Bf16,
            },
            checkpoints: self.checkpoint_dir.clone().map(|folder| (folder, self.checkpoint_every)),
            resume: self.resume,
        })
    }

    fn method(&self) -> Method {
        let Self { learned, lococo, .. } = self;
        match self.method {
            MethodName::Learned => {
                let preset = LearnedSettings::default();
                Method::Learned(LearnedSettings {
                    hidden: learned.hidden.unwrap_or(preset.hidden),
                    kernel: lococo.kernel.unwrap_or(preset.kernel),
                    windows: if learned.windows.is_empty() {
                        preset.windows
                    } else {
                        learned.windows.clone()
                    },
                    coefficient_rate: learned.coefficient_rate.unwrap_or(preset.coefficient_rate),
                    recent_permille: learned.recent_permille.unwrap_or(preset.recent_permille),
                    beta: learned.beta.unwrap_or(preset.beta),
                    recall_permille: learned.recall_permille.unwrap_or(preset.recall_permille),
                })
            }
            MethodName::Lococo => {
                let preset = LococoSettings::default();
                Method::Lococo(LococoSettings {
                    slots: lococo.slots.unwrap_or(preset.slots),
                    ring: lococo.ring.unwrap_or(preset.ring),
                    kernel: lococo.kernel.unwrap_or(preset.kernel),
                    deviation: lococo.init_std.unwrap_or(preset.deviation),
                    gate: lococo.gate.unwrap_or(preset.gate),
                    clip: lococo.clip,
                })
            }
        }
    }
}

/// Trains, and says what came out.
///
/// # Errors
/// A model that cannot be found or opened, and everything that [`locket_tune::run`] refuses.
pub fn run(args: TuneArgs) -> anyhow::Result<String> {
    let args = match args.command {
        TuneCommand::Lococo(args) => args,
        TuneCommand::Budgets(args) => return tune_budgets::run(&args),
    };
    let config = Config::of_flags([("model", args.model.clone())])?;
    telemetry::start(&config.log);
    let model = model_source::locate(&config)?;
    let settings = args.settings(model.name)?;
    let checkpoint = Checkpoint::open(&model.path)?;
    let processor = Processor::load(&checkpoint).context("the model's tokenizer")?;
    let summary = locket_tune::run(&settings, &checkpoint, &processor)?;
    Ok(described(&settings, &summary))
}

fn described(settings: &Settings, summary: &Summary) -> String {
    let Summary { steps, tokens, seconds, losses } = summary;
    let mut text = format!(
        "{}: method {}, {steps} steps, {tokens} tokens, {seconds:.1} s\n",
        settings.out.display(),
        settings.method.name()
    );
    for (kind, loss) in losses {
        let _ = writeln!(text, "loss {kind:<10} {loss:.4}");
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        tune: TuneArgs,
    }

    fn settings(flags: &str) -> anyhow::Result<Settings> {
        let flags = format!("tune lococo --data a.jsonl b.txt --out s.safetensors {flags}");
        let TuneCommand::Lococo(args) = Cli::try_parse_from(flags.split_whitespace())?.tune.command else {
            anyhow::bail!("another command");
        };
        args.settings("m".into())
    }

    #[test]
    fn defaults_follow_the_method() {
        let learned = settings("").unwrap();
        assert_eq!((learned.steps(), learned.batch, learned.micro_batch), (350, 6, 6));
        assert_eq!(learned.method, Method::Learned(LearnedSettings::default()));
        let lococo = settings("--method lococo --slots 256 --tokens 1000000").unwrap();
        assert_eq!((lococo.steps(), lococo.batch, lococo.micro_batch), (2, 128, 16));
        assert_eq!(lococo.method, Method::Lococo(LococoSettings { slots: 256, ..LococoSettings::default() }));
    }

    #[test]
    fn contradictions_are_refused() {
        for flags in ["--steps 3 --tokens 4", "--resume", "--checkpoint-every 5", "--method other"] {
            assert!(settings(flags).is_err(), "{flags}");
        }
        assert_eq!(settings("--device cuda").is_ok(), cfg!(feature = "cuda"));
    }
}
