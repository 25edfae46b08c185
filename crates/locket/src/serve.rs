//! `locket serve`: model → engine → processor → server, and down again in reverse.

use std::{io::Write as _, path::Path, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use locket_engine::{EngineConfig, EngineHandle, EngineThread};
use locket_model::load::{BuildOptions, Checkpoint};
use locket_processor::Processor;
use locket_server::{AppState, ServerConfig};
use sha2::{Digest, Sha256};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use crate::{
    adapters::{self, FoundAdapters},
    config::Config,
    memory::{Beside, MemoryPlan, free_memory},
    metrics::{self, InForce},
    model_source::{self, LocalModel},
    side_car::{self, FoundSideCar},
    telemetry,
    vision::{self, FoundVision},
};

/// HTTP, JSON and tokenizing need little; the model has threads of its own.
const WORKER_THREADS: usize = 2;
/// Generated turns that outlive the process, beside the snapshots.
const TURN_FILE: &str = "turns.journal";
/// What shells use for a process that a signal ended.
const EXIT_SIGNALLED: u8 = 130;

/// Loads the model and serves until a signal, then drains.
///
/// # Errors
/// No model, a plan that does not fit, a port that is taken; and an engine that died, so that the
/// process ends with a code that makes its supervisor start another one.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let _tracing = telemetry::start_tracing(&config.trace)?;
    let local = model_source::locate(config)?;
    let checkpoint = Checkpoint::open(&local.path)?;
    let side_car = side_car::find(config, &checkpoint)?;
    // Before anything large is loaded.
    let free = free_memory();
    let vision = vision::find(config, &checkpoint)?;
    let adapters = adapters::find(config, &checkpoint, vision.as_ref())?;
    let beside = Beside { vision: vision.as_ref(), extras: adapters.extras };
    let plan = MemoryPlan::make(config, &checkpoint, side_car.as_ref(), beside, &free)?;
    tracing::info!("model      {} ({})", local.path.display(), checkpoint.quantization);
    if let Some(found) = &side_car {
        tracing::info!("side-car   {}", found.origin);
    }
    if let Some(found) = &vision {
        tracing::info!("vision     {}", found.origin.display());
    }
    plan.describe().iter().for_each(|line| tracing::info!("{line}"));
    let mut processor = Processor::load(&checkpoint)?;
    let vision_model = vision.as_ref().map(|found| Arc::clone(&found.model));
    if let Some(model) = &vision_model {
        processor.see_images(model.geometry().image_token_id);
    }
    let registry = prometheus::Registry::new();
    let parts = Parts {
        config,
        checkpoint: &checkpoint,
        plan: &plan,
        side_car: side_car.as_ref(),
        vision: vision.as_ref(),
        local: &local,
    };
    let (engine, thread) = start_engine(&parts, &adapters, &registry)?;
    let adapters = adapters.load(&engine)?;
    let model_name = &served_names(config, &local)[0];
    let side_car = side_car.as_ref();
    let in_force = InForce { model_name, config, checkpoint: &checkpoint, plan: &plan, side_car };
    metrics::register(&registry, &in_force)?;
    let settings =
        ServerConfig { adapters: adapters.named, visual_adapter: adapters.visual, ..server_config(&parts) };
    // The weights live in the model now; this unmaps the file.
    drop(checkpoint);
    let state = AppState::seeing(settings, engine, Arc::new(processor), registry, vision_model)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .thread_name("locket-http")
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let code = runtime.block_on(serve(config, state, thread));
    // What still hangs on a slow client does not hold up the end.
    runtime.shutdown_background();
    code
}

/// What a server is made of, before it is one.
struct Parts<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    plan: &'a MemoryPlan,
    side_car: Option<&'a FoundSideCar>,
    vision: Option<&'a FoundVision>,
    local: &'a LocalModel,
}

fn start_engine(
    parts: &Parts<'_>,
    adapters: &FoundAdapters,
    registry: &prometheus::Registry,
) -> anyhow::Result<(EngineHandle, EngineThread)> {
    let Parts { config, checkpoint, plan, side_car, local, .. } = *parts;
    let mut model = checkpoint.build(&BuildOptions {
        backend: config.backend,
        cache: plan.cache.clone(),
        max_batch_rows: config.engine.max_batch_rows,
        threads: config.threads,
        side_car: side_car.map(|found| Arc::clone(&found.weights)),
    })?;
    adapters.reserve(model.as_mut())?;
    if config.prefault {
        model.prefault();
    }
    let engine = &config.engine;
    let settings = EngineConfig {
        max_batch_rows: engine.max_batch_rows,
        prefill_chunk: engine.prefill_chunk,
        target_step: engine.target_step,
        max_waiting: engine.max_waiting,
        max_running: engine.max_running,
        queue_timeout: engine.queue_timeout,
        drain_timeout: engine.drain_timeout,
        model_name: served_names(config, local)[0].clone(),
        snapshot_memory_bytes: plan.snapshots.kept_bytes,
        snapshot_interval: config.snapshots.interval,
        snapshot_dir: config.snapshots.dir.clone(),
        snapshot_disk_bytes: config.snapshots.disk,
        model_fingerprint: model_fingerprint(parts),
        ..EngineConfig::default()
    };
    Ok(locket_engine::start(model, settings, registry)?)
}

/// Digest of all that makes the states of blocks what they are, so that snapshots of another model,
/// backend, number type or side-car are never taken for ours.
fn model_fingerprint(parts: &Parts<'_>) -> [u8; 32] {
    let Parts { config, checkpoint, plan, side_car, vision, .. } = *parts;
    let mut digest = Sha256::new();
    for part in [
        checkpoint.fingerprint.as_str(),
        checkpoint.quantization.as_str(),
        &format!("{:?}", config.backend),
        plan.cache.slot_type.name(),
    ] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    digest.update(side_car.map_or([0; 32], |found| found.digest));
    digest.update(vision.map_or("", |found| found.model.fingerprint()));
    digest.finalize().into()
}

/// The operator's names, else the model's own; never empty.
fn served_names(config: &Config, local: &LocalModel) -> Vec<String> {
    match config.served_model_name.as_slice() {
        [] => vec![local.name.clone()],
        names => names.to_vec(),
    }
}

/// What clients see as the model's origin: a repository's name as asked for, of a path its last part only.
fn model_root(config: &Config, local: &LocalModel) -> String {
    match &config.model {
        Some(asked) if !Path::new(asked).exists() => asked.clone(),
        Some(path) => Path::new(path)
            .file_name()
            .map_or_else(|| local.name.clone(), |name| name.to_string_lossy().into_owned()),
        None => local.name.clone(),
    }
}

fn server_config(parts: &Parts<'_>) -> ServerConfig {
    let Parts { config, checkpoint, plan, vision, local, .. } = *parts;
    let api = &config.api;
    ServerConfig {
        served_model_names: served_names(config, local),
        model_root: model_root(config, local),
        max_model_len: plan.choice.context,
        default_max_tokens: api.default_max_tokens,
        max_body_bytes: api.max_body_bytes,
        max_n: api.max_n,
        max_concurrent_requests: api.max_concurrent_requests,
        cors_origins: api.cors_origins.clone(),
        embedding_pooling: api.embedding_pooling,
        tool_calls: api.tool_calls,
        api_keys: api.api_keys.clone(),
        api_key_file: api.api_key_file.clone(),
        metrics_require_key: api.metrics_require_key,
        page: api.page,
        tls: api.tls.clone(),
        connections: api.connections.clone(),
        images: api.images.clone(),
        visual: config.visual.config.clone(),
        adapter_dir: config.adapters.dir.clone(),
        max_adapters: config.adapters.max,
        drain_timeout: config.engine.drain_timeout,
        reasoning: config.reasoning.clone(),
        cache: plan.choice.bounds.clone(),
        turn_memory_bytes: usize::try_from(plan.snapshots.turn_bytes).unwrap_or(usize::MAX),
        // The engine has made the folder and locked it for this process.
        turn_file: config.snapshots.dir.as_ref().map(|folder| folder.join(TURN_FILE)),
        generation: checkpoint.generation,
        version: crate::VERSION.into(),
        fingerprint: format!(
            "{}-{}-{:?}-{}{}",
            checkpoint.fingerprint,
            checkpoint.quantization,
            config.backend,
            plan.cache.slot_type.name(),
            vision.map(|found| format!("-{}", found.model.fingerprint())).unwrap_or_default(),
        ),
        ..ServerConfig::default()
    }
}

/// Listens, says so, and serves until the first signal or the engine's end.
async fn serve(config: &Config, state: AppState, thread: EngineThread) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind((config.host.as_str(), config.port))
        .await
        .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    let mut signals = Signals::new().context("cannot handle signals")?;
    let _reloads = AbortOnDrop(tokio::spawn(reload_on_hangup(state.clone())?).abort_handle());
    announce(&listener, &state)?;
    let mut engine_end = watch_engine(thread)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async {
        // Dropping the sender stops the server as well.
        let _ = stopped.await;
    };
    let mut server = std::pin::pin!(locket_server::serve(listener, state, shutdown));
    let mut ended = None;
    tokio::select! {
        result = &mut server => {
            result.context("the listener failed")?;
            anyhow::bail!("the server stopped without being asked");
        }
        name = signals.next() => tracing::info!("{name}: finishing what runs; a second signal quits at once"),
        result = &mut engine_end => {
            tracing::error!("the engine has ended; shutting down");
            ended = Some(result);
        }
    }
    drop(stop);
    let finish = async {
        server.await.context("the listener failed")?;
        let result = match ended {
            Some(result) => result,
            None => engine_end.await,
        };
        result.context("the engine thread was lost")?.context("the engine has died")
    };
    tokio::select! {
        result = finish => result.map(|()| ExitCode::SUCCESS),
        name = signals.next() => {
            tracing::warn!("{name} again: quitting at once");
            Ok(ExitCode::from(EXIT_SIGNALLED))
        }
    }
}

/// Reads keys and certificate again on each SIGHUP.
fn reload_on_hangup(state: AppState) -> anyhow::Result<impl Future<Output = ()>> {
    let mut hangups = signal(SignalKind::hangup()).context("cannot handle signals")?;
    Ok(async move {
        while hangups.recv().await.is_some() {
            let state = state.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || state.reload()).await {
                tracing::error!(%error, "reading files again has failed");
            }
        }
    })
}

/// Ends a task with what owns it.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The one line on standard output.
fn announce(listener: &TcpListener, state: &AppState) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the listener has no address")?;
    let scheme = if state.config().tls.is_some() { "https" } else { "http" };
    if !address.ip().is_loopback() && !state.requires_key() {
        tracing::warn!("anyone who can reach {address} may use this server: set api-key or api-key-file");
    }
    let mut stdout = std::io::stdout().lock();
    // Whoever started us may have closed its end; that is no reason not to serve.
    if let Err(error) =
        writeln!(stdout, "locket listening on {scheme}://{address}").and_then(|()| stdout.flush())
    {
        tracing::warn!("cannot write to standard output: {error}");
    }
    tracing::info!("listening on {scheme}://{address}");
    Ok(())
}

type EngineEnd = oneshot::Receiver<Result<(), locket_engine::Error>>;

/// Resolves when the engine's thread has ended, with its result.
fn watch_engine(thread: EngineThread) -> anyhow::Result<EngineEnd> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("locket-watch".into())
        .spawn(move || {
            // Nobody listens once the process quits on a second signal.
            let _ = sender.send(thread.join());
        })
        .context("cannot watch the engine")?;
    Ok(receiver)
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next one's name. Cancel-safe.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
