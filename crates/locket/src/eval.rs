//! `locket eval`: what a cache method costs in perplexity and recall, on text that nothing was tuned to; and
//! `locket eval vqa`: what dropping visual tokens costs.
//!
//! The work is [`locket_eval`]'s; here are its flags, and where its results go.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, ensure};
use locket_eval::{EvalOptions, Evaluation, Report, Task, fingerprint, picture};
use locket_model::{
    kv_cache::{CacheGeometry, CacheMethod, SideCar, SlotType},
    load::Checkpoint,
};
use locket_processor::Processor;
use serde_json::{Value, json};

use crate::{
    bench::report,
    config::{Config, value::about_bytes},
    memory::free_memory,
    model_source, telemetry,
};

mod vqa;

/// Name and version of the JSON's form; see [`locket_eval::report`].
const SCHEMA: &str = "locket-eval/1";

/// Arguments of `locket eval`.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: Option<EvalCommand>,

    /// A model file, folder or repository, as in `locket serve`; without it the default model.
    #[arg(long)]
    model: Option<String>,

    /// Files of held-out text: JSONL with `text` and perhaps `name`, or one document per file.
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "fingerprint")]
    text: Vec<PathBuf>,

    /// Cache methods to compare.
    #[arg(long, value_delimiter = ',', default_value = "full,window,h2o,tova,expected,keydiff,observed")]
    methods: Vec<CacheMethod>,

    /// Slots that survive a fold, one configuration per method each. `full` has as many as the context.
    #[arg(long, value_delimiter = ',', default_value = "128,256,512")]
    slots: Vec<u32>,

    /// Slots filled between folds. Perplexities with different rings are not comparable.
    #[arg(long, default_value_t = 128)]
    ring: u32,

    /// Number types of the slots: f32, f16, bf16, int8, or int4 (simulated by the reference backend).
    #[arg(long, value_delimiter = ',', default_value = "f16", value_parser = slot_type)]
    slot_type: Vec<SlotType>,

    /// Tokens of each text whose perplexity is measured. Shorter documents are left out.
    #[arg(long, default_value_t = 8192)]
    context: usize,

    /// Tokens of each probe [default: as --context].
    #[arg(long)]
    probe_context: Option<usize>,

    /// Documents whose perplexity is measured, at most.
    #[arg(long, default_value_t = 24)]
    documents: usize,

    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "perplexity,passkey,multi-key,copy,many-shot")]
    tasks: Vec<Task>,

    /// Probes per task.
    #[arg(long, default_value_t = 200)]
    probes: usize,

    /// Methods that the others are compared with, document by document and probe by probe.
    #[arg(long, value_delimiter = ',', default_value = "tova,full")]
    against: Vec<CacheMethod>,

    /// Seed of windows, haystacks and probes.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Trained weights for `learned` or `lococo`; may be given once for each.
    #[arg(long, value_name = "FILE")]
    side_car: Vec<PathBuf>,

    /// First tokens that always survive [default: the method's own].
    #[arg(long)]
    sinks: Option<u32>,

    /// Latest tokens that always survive, in thousandths of the slots [default: the side-car's, else the
    /// method's own].
    #[arg(long)]
    recent_permille: Option<u32>,

    /// Share of `learned`'s free slots that its recall score fills, in thousandths [default: the
    /// side-car's, else 500].
    #[arg(long)]
    recall_permille: Option<u16>,

    /// Give all layers as many slots, whatever shares the side-car names.
    #[arg(long)]
    uniform_layers: bool,

    /// Who computes: cpu, reference or, if built in, cuda.
    #[arg(long)]
    backend: Option<String>,

    /// CPU threads; 0 takes all physical cores.
    #[arg(long)]
    threads: Option<usize>,

    /// Bytes that weights, workspace and cache may take [default: what is free]; needed for cuda.
    #[arg(long)]
    memory_budget: Option<String>,

    /// Sequences that advance together.
    #[arg(long, default_value_t = 4, value_name = "SEQUENCES")]
    batch: u32,

    /// Rows per sequence and step, a multiple of 16. No result depends on it.
    #[arg(long, default_value_t = 128)]
    chunk: usize,

    /// Write everything that was asked and measured to this file as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Draw perplexity and recall over slots and over bytes into this SVG file.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,

    /// Instead of all that: print the likelihood of 1,024 tokens with 64 slots for every method, slot
    /// type, chunk and neighbourhood as JSON. Text is built in unless a file is given.
    #[arg(long)]
    fingerprint: bool,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum EvalCommand {
    /// Ask questions about images with every way to drop visual tokens, at several budgets.
    ///
    /// Right is a greedy answer that is right as a whole. Pages come from benches/vqa/make_pages.py.
    Vqa(Box<vqa::VqaArgs>),
}

fn slot_type(name: &str) -> Result<SlotType, String> {
    SlotType::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
        let known: Vec<_> = SlotType::ALL.iter().map(|kind| kind.name()).collect();
        format!("unknown slot type; known are {}", known.join(", "))
    })
}

/// Runs the evaluation, prints its tables and writes its files. Fails if a configuration failed, after
/// everything else was written.
///
/// # Errors
/// Options that are not possible with this model and text, and a model that cannot be loaded.
pub fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    if let Some(EvalCommand::Vqa(args)) = &args.command {
        return vqa::run(args);
    }
    check_folders(args.out.iter().chain(&args.picture))?;
    let config = configuration(args)?;
    let local = model_source::locate(&config)?;
    let checkpoint = Checkpoint::open(&local.path)?;
    let processor = Processor::load(&checkpoint)?;
    let side_car = side_car(&args.side_car, CacheGeometry::of(&checkpoint.config))?;
    if args.fingerprint {
        let prints = prints(args, &config, &checkpoint, &processor, side_car.as_ref())?;
        return finish(args, &prints, &with_header("fingerprint", &local.name, json!({ "prints": prints })));
    }
    let options = options(args, &config);
    let evaluation = Evaluation::prepare(&checkpoint, &processor, &args.text, options, side_car)?;
    check_memory(&config, evaluation.peak_bytes())?;
    let report = evaluation.run()?;
    if let Some(path) = &args.picture {
        write_whole(path, picture::draw(&report)?.as_bytes())?;
    }
    let text = format!("locket {} eval of {}\n{report}", crate::LONG_VERSION, local.name);
    let json = with_header("eval", &local.name, serde_json::to_value(&report)?);
    write_results(args.out.as_deref(), &text, &json)?;
    Ok(exit_code(&report))
}

/// Fails before anything is measured if a result could not be written.
fn check_folders<'a>(mut paths: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<()> {
    paths.try_for_each(|path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        ensure!(folder.is_none_or(Path::is_dir), "there is no folder to write {} into", path.display());
        Ok(())
    })
}

fn exit_code(report: &Report) -> ExitCode {
    if report.results.iter().any(|entry| entry.failed.is_some()) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The configuration that `locket serve` would have with these flags; starts logging by it.
fn configuration(args: &EvalArgs) -> anyhow::Result<Config> {
    let flags = [
        ("model", args.model.clone()),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("backend", args.backend.clone()),
        ("memory-budget", args.memory_budget.clone()),
    ];
    let config = Config::of_flags(flags)?;
    telemetry::start(&config.log);
    Ok(config)
}

fn options(args: &EvalArgs, config: &Config) -> EvalOptions {
    EvalOptions {
        methods: args.methods.clone(),
        slots: args.slots.clone(),
        ring: args.ring,
        slot_types: args.slot_type.clone(),
        context: args.context,
        probe_context: args.probe_context.unwrap_or(args.context),
        documents: args.documents,
        tasks: args.tasks.clone(),
        probes: args.probes,
        against: args.against.clone(),
        seed: args.seed,
        sinks: args.sinks,
        recent_permille: args.recent_permille,
        recall_permille: args.recall_permille,
        layer_budgets: !args.uniform_layers,
        backend: config.backend,
        threads: config.threads,
        lockstep: args.batch,
        chunk: args.chunk,
    }
}

fn side_car(paths: &[PathBuf], geometry: CacheGeometry) -> anyhow::Result<Option<Arc<SideCar>>> {
    let mut joined: Option<SideCar> = None;
    for path in paths {
        let opened = SideCar::open(path, geometry)?;
        joined = Some(match joined {
            Some(before) => before.join(opened),
            None => opened,
        });
    }
    Ok(joined.map(Arc::new))
}

fn check_memory(config: &Config, needed: u64) -> anyhow::Result<()> {
    let (allowed, origin) = match config.memory_budget {
        Some(bytes) => (bytes, format!("memory-budget ({})", config.origin("memory-budget"))),
        None => (free_memory().bytes, "free memory".to_owned()),
    };
    ensure!(
        needed <= allowed,
        "the largest configuration needs {}, but only {} may be taken ({origin}); lower --batch or --context",
        about_bytes(needed),
        about_bytes(allowed)
    );
    Ok(())
}

fn prints(
    args: &EvalArgs,
    config: &Config,
    checkpoint: &Checkpoint,
    processor: &Processor,
    side_car: Option<&Arc<SideCar>>,
) -> anyhow::Result<Vec<fingerprint::Print>> {
    let text = match args.text.first() {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        None => fingerprint::TEXT.to_owned(),
    };
    let options = fingerprint::FingerprintOptions {
        methods: CacheMethod::ALL.to_vec(),
        slot_types: args.slot_type.clone(),
        chunks: fingerprint::CHUNKS.to_vec(),
        with_neighbours: true,
        backend: config.backend,
        threads: config.threads,
    };
    let ids = processor.encode(&text, true)?;
    Ok(fingerprint::fingerprint(checkpoint, &ids, side_car, &options)?)
}

/// `results` behind where, when and with what they were measured.
fn with_header(kind: &'static str, model: &str, results: Value) -> Value {
    let mut header = report::header(kind);
    header.schema = SCHEMA;
    let mut json = json!(header);
    json["model"] = model.into();
    if let (Some(json), Value::Object(results)) = (json.as_object_mut(), results) {
        json.extend(results);
    }
    json
}

/// A fingerprint's result is its JSON.
fn finish(args: &EvalArgs, prints: &[fingerprint::Print], json: &Value) -> anyhow::Result<ExitCode> {
    let lines = prints.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    write_results(args.out.as_deref(), &format!("[\n{}\n]\n", lines.join(",\n")), json)?;
    Ok(ExitCode::SUCCESS)
}

fn write_results(out: Option<&Path>, text: &str, json: &Value) -> anyhow::Result<()> {
    if let Some(path) = out {
        let mut bytes = serde_json::to_vec_pretty(json)?;
        bytes.push(b'\n');
        write_whole(path, &bytes)?;
    }
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the result")
}

/// Writes a file that is there as a whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, bytes)
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<EvalArgs, String> {
        crate::cli::parsed(&[&["eval"], words].concat())
    }

    #[test]
    fn lists_are_read_and_mistakes_are_named() {
        let args = parse(&["--text", "a", "b", "--methods", "full,tova", "--slot-type", "f16,int8"]).unwrap();
        assert_eq!(args.text, ["a", "b"].map(PathBuf::from));
        assert_eq!(args.methods, [CacheMethod::Full, CacheMethod::Tova]);
        assert_eq!(args.slot_type, [SlotType::F16, SlotType::I8]);
        assert_eq!((args.tasks.len(), &args.slots[..]), (5, &[128, 256, 512][..]));
        assert!(parse(&["--text", "a", "--methods", "best"]).unwrap_err().contains("known are full, window"));
        assert!(parse(&["--text", "a", "--slot-type", "int2"]).unwrap_err().contains("int8, int4"));
        assert!(parse(&["--text", "a", "--tasks", "sums"]).unwrap_err().contains("perplexity, passkey"));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--fingerprint"]).unwrap().text.is_empty());
    }

    #[test]
    fn files_are_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let text = format!("{:#}", write_whole(&folder.path().join("none/a"), b"x").unwrap_err());
        assert!(text.contains("cannot write"), "{text}");
    }

    #[test]
    fn results_stand_behind_their_header() {
        let json = with_header("eval", "tiny", json!({ "results": [1] }));
        assert_eq!((&json["schema"], &json["kind"]), (&json!("locket-eval/1"), &json!("eval")));
        assert_eq!((&json["model"], &json["results"]), (&json!("tiny"), &json!([1])));
    }
}
