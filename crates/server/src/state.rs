//! What handlers share. Nothing here changes after start but counters, permits, the flag that says
//! the server drains, and what [`AppState::reload`] reads again.

use std::{
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use axum::body::Bytes;
use locket_engine::{EngineHandle, EngineStatus};
use locket_model::stable_hash::Fnv1a;
use locket_processor::{Processor, tools::ToolFormat};
use locket_vision::VisionModel;
use prometheus::Registry;

use crate::{
    adapters::{Adapters, NamedAdapter},
    config::{ConfigError, ServerConfig, ToolCallFormat},
    generation::{Bounds, GenerationFields, GrammarMemory, Reasoning},
    keys::{ApiKeys, KeysError},
    limits::Permits,
    media::FetcherError,
    metrics::HttpMetrics,
    openai::Stamp,
    openapi,
    serve::{Tls, TlsError},
    turns::TurnMemory,
    visual::Sight,
};

/// Why the server cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A setting cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The metrics could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The API keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The client that fetches images cannot be set up.
    #[error(transparent)]
    Fetcher(#[from] FetcherError),
    /// No threads for images.
    #[error("threads for images: {0}")]
    TowerThreads(std::io::Error),
    /// The vision model's tokens are not as wide as the decoder's.
    #[error("the vision model makes tokens of {vision} numbers, but the model has {model}")]
    Width {
        /// Width of visual tokens.
        vision: usize,
        /// Width of the decoder.
        model: usize,
    },
    /// The file of remembered turns cannot be used.
    #[error("turn file {}: {source}", path.display())]
    Turns {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
}

/// Handle of everything that a handler needs; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    shared: Arc<Shared>,
}

struct Shared {
    config: ServerConfig,
    bounds: Bounds,
    engine: EngineHandle,
    processor: Arc<Processor>,
    registry: Registry,
    metrics: HttpMetrics,
    permits: Permits,
    keys: ApiKeys,
    tls: Option<Tls>,
    turns: Option<Arc<TurnMemory>>,
    grammars: GrammarMemory,
    reasoning: Reasoning,
    sight: Option<Sight>,
    is_draining: AtomicBool,
    created: u64,
    /// `/openapi.json` without and with the need of a key, made when it is first asked for.
    documents: [OnceLock<Bytes>; 2],
}

impl AppState {
    /// Puts the parts together and registers the HTTP metrics.
    ///
    /// # Errors
    /// A setting that cannot work, metrics that are registered already, or a file of turns that cannot
    /// be read or written.
    pub fn new(
        config: ServerConfig,
        engine: EngineHandle,
        processor: Arc<Processor>,
        registry: Registry,
    ) -> Result<Self, SetupError> {
        Self::seeing(config, engine, processor, registry, None)
    }

    /// The same with a vision model; the processor must see images too
    /// ([`Processor::see_images`]).
    ///
    /// # Errors
    /// As [`Self::new`]; a vision model that does not fit the decoder, and no threads for it.
    pub fn seeing(
        config: ServerConfig,
        engine: EngineHandle,
        processor: Arc<Processor>,
        registry: Registry,
        vision: Option<Arc<VisionModel>>,
    ) -> Result<Self, SetupError> {
        config.check()?;
        let sight = vision.map(|vision| {
            let decoder = &engine.facts().model;
            let (own, model) = (vision.geometry().hidden_size, decoder.hidden_size);
            if own != model {
                return Err(SetupError::Width { vision: own, model });
            }
            Sight::new(vision, decoder.num_layers, &config, &registry)
        });
        let sight = sight.transpose()?;
        let bounds = Bounds {
            served_model_names: config.served_model_names.clone(),
            adapters: Adapters::new(config.adapters.clone()),
            vocab_size: u32::try_from(processor.vocab_size()).unwrap_or(u32::MAX),
            max_model_len: config.max_model_len,
            max_n: config.max_n,
            images: config.images.clone(),
            cache: config.cache.clone(),
            visual: sight.is_some().then(|| config.visual.clone()),
        };
        let metrics = HttpMetrics::register(&registry)?;
        let keys = ApiKeys::open(&config.api_keys, config.api_key_file.as_deref())?;
        warn_of_unserved_models(&keys, &config.served_model_names);
        let tls = config.tls.clone().map(Tls::load).transpose()?;
        let reasoning = Reasoning::new(&config.reasoning, &processor)?;
        let permits = Permits::new(config.max_concurrent_requests);
        let turns = match (config.turn_memory_bytes, &config.turn_file) {
            (0, _) => None,
            (bytes, None) => Some(TurnMemory::new(bytes)),
            (bytes, Some(path)) => {
                let opened = TurnMemory::open(bytes, path, &config.fingerprint);
                Some(opened.map_err(|source| SetupError::Turns { path: path.clone(), source })?)
            }
        };
        let turns = turns.map(|turns| Arc::new(turns.counted(metrics.turns().clone())));
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                bounds,
                engine,
                processor,
                registry,
                metrics,
                permits,
                keys,
                tls,
                turns,
                grammars: GrammarMemory::new(),
                reasoning,
                sight,
                is_draining: AtomicBool::new(false),
                created: unix_seconds(),
                documents: Default::default(),
            }),
        })
    }

    /// The operator's settings.
    pub fn config(&self) -> &ServerConfig {
        &self.shared.config
    }

    /// The engine.
    pub fn engine(&self) -> &EngineHandle {
        &self.shared.engine
    }

    pub(crate) fn bounds(&self) -> &Bounds {
        &self.shared.bounds
    }

    pub(crate) fn processor(&self) -> &Arc<Processor> {
        &self.shared.processor
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    pub(crate) fn metrics(&self) -> &HttpMetrics {
        &self.shared.metrics
    }

    pub(crate) fn permits(&self) -> &Permits {
        &self.shared.permits
    }

    /// How calls of tools are written; `None` if tools are turned off.
    pub(crate) fn tool_format(&self) -> Option<ToolFormat> {
        match self.config().tool_calls {
            ToolCallFormat::Auto => Some(self.processor().tool_format().unwrap_or_default()),
            ToolCallFormat::Format(format) => Some(format),
            ToolCallFormat::Off => None,
        }
    }

    pub(crate) fn keys(&self) -> &ApiKeys {
        &self.shared.keys
    }

    /// Certificate and key, if connections are encrypted.
    pub(crate) fn tls(&self) -> Option<&Tls> {
        self.shared.tls.as_ref()
    }

    /// Whether callers need an API key.
    pub fn requires_key(&self) -> bool {
        self.shared.keys.is_required()
    }

    /// Reads the key file and the certificate again. A file that cannot be used is logged and counted,
    /// and what was read before stays in use.
    pub fn reload(&self) {
        let metrics = self.metrics();
        if self.config().api_key_file.is_some() {
            let result = self.keys().reload();
            metrics.count_reload("keys", result.is_ok());
            match result {
                Ok(gone) => {
                    gone.iter().for_each(|name| metrics.forget_key(name));
                    warn_of_unserved_models(self.keys(), &self.config().served_model_names);
                    tracing::info!(keys = self.keys().names().len(), "the API keys were read again");
                }
                Err(error) => tracing::error!(%error, "the API keys stay as they were"),
            }
        }
        if let Some(tls) = self.tls() {
            let result = tls.reload();
            metrics.count_reload("certificate", result.is_ok());
            match result {
                Ok(()) => tracing::info!("the certificate was read again"),
                Err(error) => tracing::error!(%error, "the certificate stays as it was"),
            }
        }
    }

    /// How the model thinks.
    pub(crate) fn reasoning(&self) -> &Reasoning {
        &self.shared.reasoning
    }

    /// The eyes of a model that sees.
    pub(crate) fn sight(&self) -> Option<&Sight> {
        self.shared.sight.as_ref()
    }

    /// Generated turns, if they are remembered.
    pub(crate) fn turns(&self) -> Option<&Arc<TurnMemory>> {
        self.shared.turns.as_ref()
    }

    /// Grammars compiled before.
    pub(crate) fn grammars(&self) -> &GrammarMemory {
        &self.shared.grammars
    }

    /// When the server was set up, in Unix seconds: `created` of the models.
    pub(crate) fn created(&self) -> u64 {
        self.shared.created
    }

    /// `/openapi.json` as it is sent.
    pub(crate) fn openapi(&self) -> Bytes {
        let needs_key = self.keys().is_required();
        let document = &self.shared.documents[usize::from(needs_key)];
        document.get_or_init(|| openapi::bytes(self.bounds(), &self.config().version, needs_key)).clone()
    }

    /// Turns readiness off and refuses new requests; the engine takes nothing new.
    pub fn begin_drain(&self) {
        self.shared.is_draining.store(true, Ordering::Release);
        self.shared.engine.drain();
    }

    /// Whether new requests are refused because the server drains.
    pub fn is_draining(&self) -> bool {
        self.shared.is_draining.load(Ordering::Acquire)
            || matches!(self.shared.engine.status(), EngineStatus::Draining | EngineStatus::Stopped)
    }

    /// What all parts of the answer `id` to a request have in common.
    pub(crate) fn stamp(&self, id: String, fields: &GenerationFields) -> Stamp {
        Stamp {
            id,
            created: unix_seconds(),
            model: fields.model.clone().unwrap_or_else(|| self.bounds().primary_model()),
            system_fingerprint: self.fingerprint(fields),
        }
    }

    /// `system_fingerprint` of a request: changes when the text for a fixed seed could change.
    pub(crate) fn fingerprint(&self, fields: &GenerationFields) -> String {
        let config = &self.shared.config;
        let cache = fields.cache(&self.bounds().cache).describe(&config.cache);
        let mut parts = format!("{}|{}|{cache}", config.fingerprint, config.version);
        let adapter = fields.model.as_ref().and_then(|name| self.bounds().adapters.find(name));
        if let Some(NamedAdapter { id, .. }) = adapter {
            parts.push_str(&format!("|{}", id.0));
        }
        format!("fp_{:016x}", Fnv1a::of(parts.as_bytes()))
    }
}

/// A key whose models are all misspelt is refused everywhere; better to hear of it here.
fn warn_of_unserved_models(keys: &ApiKeys, served: &[String]) {
    for (key, model) in keys.unserved_models(served) {
        tracing::warn!(key, model, "a key may use a model that is not served");
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
