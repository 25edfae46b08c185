//! `locket eval vqa`: what dropping visual tokens costs in right answers, and what it saves.
//!
//! The work is [`locket_eval::vqa`]'s; here are its flags, and the engine that answers: requests go the way
//! that the server's go, so that what is measured is what is served.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use locket_engine::{
    EngineConfig, EngineHandle, FinishReason, GenerationRequest, SamplingParams, SequenceEvent, VisualSpan,
};
use locket_eval::{
    Error,
    vqa::{
        Answer, DEFAULT_ROWS, Decoder, Prompt, Row, VqaEvaluation, VqaOptions, VqaReport, draw,
        report::VqaInputs,
    },
};
use locket_model::{
    Adapter, AdapterId, Extras, Model,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{BuildOptions, Checkpoint},
};
use locket_processor::Processor;
use locket_vision::{VisionModel, model::OpenOptions};

use super::{check_folders, check_memory, slot_type, with_header, write_results, write_whole};
use crate::{
    config::{Config, EngineSettings},
    model_source, telemetry,
};

/// Arguments of `locket eval vqa`.
#[derive(Debug, Clone, clap::Args)]
pub struct VqaArgs {
    /// A model file or folder, as in `locket serve`.
    #[arg(long)]
    model: Option<String>,

    /// A folder or safetensors file with the vision model [default: the model's own].
    #[arg(long, value_name = "PATH")]
    vision: Option<PathBuf>,

    /// A PEFT folder: the adapter of prompts with an image. Prompts without one go without it.
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,

    /// JSONL of pages: `image` (a path beside the file), `kind`, and `questions` with `question` and `answer`.
    #[arg(long, value_name = "FILE")]
    pages: PathBuf,

    /// What to compare: `blind`, or `method[:field=value...]` with `@budget` (a share or a number of tokens) or
    /// `~share` (of an image's tokens in the mean over layers).
    #[arg(long, value_delimiter = ',', default_value = DEFAULT_ROWS)]
    rows: Vec<Row>,

    /// Most pages.
    #[arg(long, default_value_t = 400)]
    most_pages: usize,

    /// Methods that all others are compared with, question by question, at the same budget if they have one.
    #[arg(long, value_delimiter = ',', default_value = "none,random,uniform")]
    against: Vec<String>,

    /// Pages on which times are measured, one request at a time; the first only warms up.
    #[arg(long, default_value_t = 9)]
    timed_pages: usize,

    /// Sequences that decode together when throughput is measured; 0 measures none.
    #[arg(long, default_value_t = 8, value_name = "SEQUENCES")]
    decode_batch: usize,

    /// Tokens that each of them decodes.
    #[arg(long, default_value_t = 32)]
    decode_tokens: u32,

    /// Number type of the slots: f32, f16, bf16 or int8.
    #[arg(long, default_value = "f16", value_parser = slot_type)]
    slot_type: SlotType,

    /// Who computes: cpu, reference or, if built in, cuda.
    #[arg(long)]
    backend: Option<String>,

    /// CPU threads; 0 takes all physical cores.
    #[arg(long)]
    threads: Option<usize>,

    /// Bytes that weights, workspace and cache may take [default: what is free]; needed for cuda.
    #[arg(long)]
    memory_budget: Option<String>,

    /// Write everything that was asked and measured to this file as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Draw right answers, time to the first token and memory over tokens into this SVG file.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

/// Runs the evaluation, prints its tables and writes its files. Fails if a row failed, after everything else
/// was written.
///
/// # Errors
/// Options that are not possible with this model and these pages, and a model that cannot be loaded.
pub fn run(args: &VqaArgs) -> anyhow::Result<ExitCode> {
    check_folders(args.out.iter().chain(&args.picture))?;
    let config = configuration(args)?;
    telemetry::start(&config.log);
    let (name, report) = measured(args, &config)?;
    if let Some(path) = &args.picture {
        write_whole(path, draw(&report)?.as_bytes())?;
    }
    let text = format!("locket {} eval vqa of {name}\n{report}", crate::LONG_VERSION);
    let mut json = with_header("vqa", &name, serde_json::to_value(&report)?);
    json["schema"] = "locket-eval-vqa/1".into();
    write_results(args.out.as_deref(), &text, &json)?;
    let has_failed = report.results.iter().any(|entry| entry.failed.is_some());
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The model's name and what was measured.
fn measured(args: &VqaArgs, config: &Config) -> anyhow::Result<(String, VqaReport)> {
    let local = model_source::locate(config)?;
    let checkpoint = Checkpoint::open(&local.path)?;
    let mut processor = Processor::load(&checkpoint)?;
    let seen_by = args.vision.as_deref().unwrap_or(&local.path);
    let vision = open_vision(seen_by, config)?;
    processor.see_images(vision.geometry().image_token_id);
    let geometry = CacheGeometry::of(&checkpoint.config);
    let evaluation = VqaEvaluation::prepare(options(args), geometry, &processor)?;
    let build = build_options(args, config, &evaluation, geometry, vision.geometry().max_tokens());
    let adapter = args.adapter.as_deref().map(|folder| Adapter::open(folder, &checkpoint.config));
    let adapter = adapter.transpose().context("cannot open the adapter")?;
    let extras = Extras {
        adapters: usize::from(adapter.is_some()),
        max_rank: adapter.as_ref().map_or(0, Adapter::max_rank),
        held_rows: evaluation.most_slots(vision.geometry().max_tokens()),
    };
    let parts = [
        checkpoint.planned_bytes(build.backend, build.max_batch_rows),
        build.cache.total_bytes(),
        extras.planned_bytes(&checkpoint.config, build.max_batch_rows),
        vision.weight_bytes(),
        vision.workspace_bytes(),
    ];
    check_memory(config, parts.into_iter().fold(0, u64::saturating_add))?;
    let inputs = VqaInputs {
        checkpoint: checkpoint.fingerprint.clone(),
        quantization: checkpoint.quantization.clone(),
        vision: seen_by.display().to_string(),
        adapter: args.adapter.as_ref().map(|folder| folder.display().to_string()),
        pages: args.pages.display().to_string(),
        num_pages: evaluation.num_pages(),
        layers: geometry.num_layers,
        slot_type: args.slot_type.name(),
        backend: format!("{:?}", config.backend).to_lowercase(),
        threads: config.threads,
        timed_pages: args.timed_pages,
        decode_batch: args.decode_batch as u32,
    };
    let start = EngineStart { settings: &config.engine, most: evaluation.most_together(), extras, adapter };
    let report =
        start.run(checkpoint.build(&build)?, |decoder| Ok(evaluation.run(inputs, &vision, decoder)?))?;
    Ok((local.name, report))
}

fn configuration(args: &VqaArgs) -> anyhow::Result<Config> {
    Ok(Config::of_flags([
        ("model", args.model.clone()),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("backend", args.backend.clone()),
        ("memory-budget", args.memory_budget.clone()),
    ])?)
}

fn open_vision(path: &Path, config: &Config) -> anyhow::Result<VisionModel> {
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if config.threads == 0 { available } else { config.threads };
    VisionModel::open(path, &OpenOptions { threads, ..OpenOptions::default() })
        .with_context(|| format!("cannot open the vision model of {}; give --vision", path.display()))
}

fn options(args: &VqaArgs) -> VqaOptions {
    VqaOptions {
        rows: args.rows.clone(),
        pages: args.pages.clone(),
        most_pages: args.most_pages,
        against: args.against.clone(),
        timed_pages: args.timed_pages,
        decode_batch: args.decode_batch,
        decode_tokens: args.decode_tokens,
        slot_type: args.slot_type,
    }
}

fn build_options(
    args: &VqaArgs,
    config: &Config,
    evaluation: &VqaEvaluation,
    geometry: CacheGeometry,
    image_tokens: usize,
) -> BuildOptions {
    let capacity = u32::try_from(evaluation.most_slots(image_tokens)).unwrap_or(u32::MAX);
    let blocks = u32::try_from(evaluation.most_together()).unwrap_or(u32::MAX);
    BuildOptions {
        backend: config.backend,
        cache: CachePlan {
            geometry,
            slot_type: args.slot_type,
            side: SideArrays::default(),
            classes: vec![BlockClass { capacity, blocks }],
        },
        max_batch_rows: config.engine.max_batch_rows,
        threads: config.threads,
        side_car: None,
    }
}

/// How the engine starts.
struct EngineStart<'a> {
    settings: &'a EngineSettings,
    /// Most prompts at once.
    most: usize,
    extras: Extras,
    adapter: Option<Adapter>,
}

impl EngineStart<'_> {
    /// Starts the engine over `model`, and stops it when `work` is done.
    fn run<T>(
        self,
        model: Box<dyn Model>,
        work: impl FnOnce(&mut dyn Decoder) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let config = EngineConfig {
            max_batch_rows: self.settings.max_batch_rows,
            prefill_chunk: self.settings.prefill_chunk,
            target_step: self.settings.target_step,
            max_waiting: self.most,
            max_running: self.most,
            queue_timeout: Duration::ZERO,
            extras: self.extras,
            ..EngineConfig::default()
        };
        let (engine, thread) = locket_engine::start(model, config, &prometheus::Registry::new())?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().build().context("cannot start an event loop")?;
        let adapter = self.adapter.map(|adapter| engine.load_adapter(adapter)).transpose()?;
        let result = work(&mut EngineDecoder { engine, runtime, adapter });
        // Without a handle the engine stops.
        thread.join()?;
        result
    }
}

/// Answers by the product's own engine.
struct EngineDecoder {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    /// What prompts with an image go through.
    adapter: Option<AdapterId>,
}

impl Decoder for EngineDecoder {
    fn answer(&mut self, prompts: &[Prompt]) -> Result<Vec<Answer>, Error> {
        let start = Instant::now();
        let work = prompts.iter().map(|prompt| continued(&self.engine, request(prompt, self.adapter), start));
        self.runtime.block_on(try_join_all(work))
    }
}

async fn continued(
    engine: &EngineHandle,
    request: GenerationRequest,
    start: Instant,
) -> Result<Answer, Error> {
    let failed = |error: String| Error::Decoder(error);
    let mut streams = engine.submit(request).map_err(|error| failed(error.to_string()))?;
    let mut stream = streams.pop().ok_or_else(|| failed("the engine gave no stream".into()))?;
    let mut answer = Answer { ids: Vec::new(), times: Vec::new() };
    while let Some(event) = stream.next().await {
        match event {
            SequenceEvent::Started { .. } | SequenceEvent::Finished { reason: FinishReason::Length, .. } => {}
            SequenceEvent::Token(token) => {
                answer.ids.push(token.id);
                answer.times.push(start.elapsed());
            }
            other => return Err(failed(format!("the engine ended a sequence early: {other:?}"))),
        }
    }
    Ok(answer)
}

/// A greedy request that nothing but its length ends.
fn request(prompt: &Prompt, adapter: Option<AdapterId>) -> GenerationRequest {
    let span = prompt.image.as_ref().map(|image| VisualSpan {
        rows: image.first..image.first + image.offsets.len() as u32,
        embeddings: image.embeddings.clone(),
        offsets: image.offsets.clone(),
        run: image.span,
        key: image.key,
        drops: image.drops.clone(),
    });
    let slots = u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX).saturating_add(prompt.tokens);
    GenerationRequest {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        visual: span.into_iter().collect(),
        adapter: adapter.filter(|_| prompt.image.is_some()),
        ..GenerationRequest::new("vqa", prompt.ids.clone(), prompt.tokens, CacheSettings::full(slots))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use locket_eval::vqa::PromptImage;

    use super::*;

    fn parse(words: &[&str]) -> Result<VqaArgs, String> {
        crate::cli::parsed(&[&["vqa"], words].concat())
    }

    #[test]
    fn rows_are_read_and_mistakes_are_named() {
        let args = parse(&["--pages", "a", "--rows", "none,hired:newline=rows@20%,must~0.2"]).unwrap();
        let names: Vec<&str> = args.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["none", "hired:newline=rows@20%", "must~0.2"]);
        assert_eq!(parse(&["--pages", "a"]).unwrap().rows.len(), 24);
        assert!(parse(&["--pages", "a", "--rows", "best"]).unwrap_err().contains("known are none, hired"));
        assert!(parse(&[]).is_err());
    }

    /// Pages of noise, so that patches differ.
    fn pages(folder: &std::path::Path) -> PathBuf {
        let mut state = 7u32;
        let mut lines = String::new();
        for page in 0..3 {
            let (width, height) = (48u32, [48u32, 40, 24][page]);
            let mut bytes = b"BM".to_vec();
            bytes.extend((54 + width * 3 * height).to_le_bytes());
            for word in [0, 54, 40, width, height, 1 | 24 << 16, 0, width * 3 * height, 0, 0, 0, 0] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend((0..width * 3 * height).map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            }));
            std::fs::write(folder.join(format!("{page}.bmp")), bytes).unwrap();
            let ask =
                r#"[{"question": "How many?", "answer": "3"}, {"question": "Which?", "answer": "none"}]"#;
            lines += &format!("{{\"image\": \"{page}.bmp\", \"kind\": \"noise\", \"questions\": {ask}}}\n");
        }
        let path = folder.join("pages.jsonl");
        std::fs::write(&path, lines).unwrap();
        path
    }

    /// The whole way with random weights: every method runs in the engine with the counts it planned, and a
    /// whole budget answers as if nothing had been asked for.
    #[test]
    fn every_method_runs_with_a_random_model() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        locket_model::testing::TinyLlama::default().write(&model).unwrap();
        let width = Checkpoint::open(&model).unwrap().config.hidden_size;
        let vision = folder.path().join("vision.safetensors");
        locket_vision::testing::write_random(&vision, &locket_vision::testing::tiny(width), 1).unwrap();
        let rows = "none,blind,thumbnail,hired@1.0,hired@0.5,hired:compat@0.5,hired:newline=rows@0.5,dpp@0.5,\
                    random@0.5,uniform@0.5,pyramid,fastv@0.5,must@0.25,must:compat";
        let words = |path: &std::path::Path| path.display().to_string();
        let (model, vision, pages) = (words(&model), words(&vision), words(&pages(folder.path())));
        let flags =
            ["--model", &model, "--vision", &vision, "--pages", &pages, "--rows", rows, "--threads", "1"];
        let sizes = ["--timed-pages", "2", "--decode-batch", "2", "--decode-tokens", "4"];
        let args = parse(&[&flags[..], &sizes].concat()).unwrap();
        let (_, report) = measured(&args, &configuration(&args).unwrap()).unwrap();
        let failed: Vec<_> = report.results.iter().filter_map(|entry| entry.failed.as_ref()).collect();
        assert!(failed.is_empty(), "{failed:?}");
        let of = |name: &str| report.results.iter().find(|entry| entry.name == name).unwrap();
        let (none, whole, half) = (of("none"), of("hired@1.0"), of("hired@0.5"));
        assert_eq!(whole.questions, none.questions);
        assert_eq!(
            (whole.tokens_in, of("blind").tokens_in, of("thumbnail").tokens_in),
            (none.tokens_in, 0.0, 36.0)
        );
        assert!((half.tokens_in / none.tokens_in - 0.5).abs() < 0.01);
        for name in ["hired:newline=rows@0.5", "dpp@0.5", "random@0.5", "uniform@0.5"] {
            assert_eq!(of(name).tokens_in, half.tokens_in, "{name}");
        }
        assert!(of("must@0.25").tokens_in < none.tokens_in);
        assert!(report.results.iter().all(|entry| entry.questions.len() == 6 && entry.times.is_some()));
    }

    #[test]
    fn an_image_becomes_a_span_of_rows() {
        let image = PromptImage {
            first: 3,
            embeddings: Arc::from([0.0; 8]),
            offsets: Arc::from([1, 5]),
            span: 9,
            key: 7,
            drops: None,
        };
        let prompt = Prompt { ids: vec![1, 1, 1, 0, 0, 2], image: Some(image), tokens: 4 };
        let blind = Prompt { image: None, ..prompt.clone() };
        assert_eq!(request(&blind, Some(AdapterId(3))).adapter, None);
        let request = request(&prompt, Some(AdapterId(3)));
        assert_eq!(request.adapter, Some(AdapterId(3)));
        assert_eq!((request.visual[0].rows.clone(), request.visual[0].run), (3..5, 9));
        assert_eq!(request.cache.capacity(), 10);
    }
}
