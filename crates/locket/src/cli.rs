//! The command line: subcommands and what they print. Flags of settings come from the table in
//! [`crate::config::setting`].

use std::{io::Write as _, path::Path, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

use crate::{
    bench::{self, BenchArgs},
    config::{self, Config, SettingFlags, Sources},
    eval::{self, EvalArgs},
    health::{self, HealthArgs},
    inspect,
    keys::{self, KeysCommand},
    model_source, serve, telemetry,
    tune::{self, TuneArgs},
};

/// An OpenAI-compatible inference server whose memory does not grow with the conversation.
///
/// Without a subcommand it serves the default model on 127.0.0.1:8080.
#[derive(Debug, Parser)]
#[command(name = "locket", version = crate::LONG_VERSION, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: SettingFlags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over the OpenAI API.
    Serve(ModelArgs),
    /// Fetch a model, so that serving it needs no network, and print its path.
    Pull(ModelArgs),
    /// Print a model's geometry, its tensors' types and the memory plan, without loading it.
    Inspect(ModelArgs),
    /// Print the effective configuration and where each value comes from.
    Config(ConfigArgs),
    /// Ask the server on this machine whether it takes requests: exit code 0 if it does, else 1.
    Health(HealthArgs),
    /// Make API keys, and entries of key files.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Measure a running server, or with --offline the engine alone.
    Bench(Box<BenchArgs>),
    /// Measure what cache methods cost: perplexity and recall on held-out text.
    Eval(Box<EvalArgs>),
    /// Train what some cache methods need beside a model.
    Tune(TuneArgs),
}

#[derive(Debug, Args)]
struct ModelArgs {
    /// A .gguf file, a folder with config.json and safetensors, or a Hugging Face repository
    /// org/name[:file-or-quantisation] [default: SmolLM2-135M-Instruct].
    #[arg(value_name = "MODEL", id = "MODEL", conflicts_with = "model")]
    positional: Option<String>,
    #[command(flatten)]
    flags: SettingFlags,
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// Print a file with every setting commented out: a start for one's own.
    #[arg(long, conflicts_with = "reference")]
    template: bool,
    /// Print the reference page, docs/configuration.md.
    #[arg(long)]
    reference: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

impl ModelArgs {
    fn config(self) -> anyhow::Result<Config> {
        let mut flags = self.flags;
        flags.given.extend(self.positional.map(|model| ("model", vec![model])));
        configure(flags)
    }
}

/// Loads the configuration and starts logging by it.
fn configure(flags: SettingFlags) -> anyhow::Result<Config> {
    let config = Config::load(&Sources::of_process(flags)?)?;
    telemetry::start(&config.log);
    Ok(config)
}

/// Does what the command line says.
///
/// # Errors
/// What the operator must know; `main` prints it.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        None => serve::run(&configure(cli.flags)?),
        Some(Command::Serve(args)) => serve::run(&args.config()?),
        Some(Command::Pull(args)) => {
            let model = model_source::locate(&args.config()?)?;
            print(&format!("{}\n", shown(&model.path)))
        }
        Some(Command::Inspect(args)) => print(&inspect::describe(&args.config()?)?),
        Some(Command::Config(args)) if args.template => print(&config::template_file()),
        Some(Command::Config(args)) if args.reference => print(&config::reference_page()),
        Some(Command::Config(args)) => print(&configure(args.flags)?.to_toml()),
        Some(Command::Health(args)) => print(&health::run(args)?),
        Some(Command::Keys(command)) => print(&keys::run(command)?),
        Some(Command::Bench(args)) => bench::run(*args).map(|()| ExitCode::SUCCESS),
        Some(Command::Tune(args)) => print(&tune::run(args)?),
        Some(Command::Eval(args)) => eval::run(&args),
    }
}

fn shown(path: &Path) -> String {
    std::fs::canonicalize(path).as_deref().unwrap_or(path).display().to_string()
}

/// Prints a command's result on standard output.
fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// The arguments of one command, for its tests; the first word is the command. Or the message of what is refused.
#[cfg(test)]
pub fn parsed<A: clap::Args>(words: &[&str]) -> Result<A, String> {
    #[derive(Parser)]
    struct Wrapped<A: clap::Args> {
        #[command(flatten)]
        args: A,
    }
    let outcome = Wrapped::<A>::try_parse_from(words);
    outcome.map(|wrapped| wrapped.args).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_work_with_and_without_subcommand() {
        let cli = Cli::try_parse_from(["locket", "--port", "1"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.flags.given, [("port", vec!["1".to_owned()])]);
        let cli = Cli::try_parse_from(["locket", "serve", "m.gguf", "--port", "2", "--offline"]).unwrap();
        let Some(Command::Serve(args)) = cli.command else { panic!("serve") };
        assert_eq!(args.positional.as_deref(), Some("m.gguf"));
        assert_eq!(args.flags.given.len(), 2);
        assert!(Cli::try_parse_from(["locket", "serve", "a", "--model", "b"]).is_err());
        assert!(Cli::try_parse_from(["locket", "--prot", "1"]).is_err());
    }
}
