//! The configuration: defaults < file < environment < flags, one typed tree, origins kept.
//!
//! Names are the same everywhere: `[cache] slots` in the file is `LOCKET_CACHE_SLOTS` in the
//! environment and `--cache-slots` on the command line. All come from one table ([`table`]).
//! Unknown names are errors, and every value is checked before anything else is done.

mod contradictions;
mod document;
mod flags;
mod layers;
mod reader;
mod reasoning;
pub mod setting;
pub mod table;
pub mod value;
mod visual;

use std::{path::PathBuf, time::Duration};

use locket_engine::Pooling;
use locket_model::{
    kv_cache::{CacheMethod, SlotType},
    load::Backend,
};
use locket_server::{
    ToolCallFormat,
    config::{ConnectionLimits, ReasoningConfig, TlsFiles},
    keys::KeyDigest,
    media::{HostList, ImageSettings},
};

pub use document::{reference_page, template_file};
pub use flags::SettingFlags;
#[cfg(test)]
pub use layers::FileSource;
pub use layers::{Origin, Sources};
use reader::Reader;
use setting::Setting;
use value::Value;
pub use visual::{AdapterOptions, VisualOptions};

/// What is wrong with the configuration; one line per problem, each naming key and source.
#[derive(Debug, thiserror::Error)]
#[error("configuration: {}", .0.join("\n  "))]
pub struct ConfigError(pub Vec<String>);

/// One setting's effective value.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The setting.
    pub setting: &'static Setting,
    /// Its value; `None` is "decide at start".
    pub value: Option<Value>,
    /// Who said so.
    pub origin: Origin,
}

/// The effective configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Values with their origins, in the table's order.
    pub entries: Vec<Entry>,
    /// What to serve; `None` is the default model.
    pub model: Option<String>,
    /// Names for clients; empty: derive one.
    pub served_model_name: Vec<String>,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on, 0 for any.
    pub port: u16,
    /// Longest prompt plus answer in tokens.
    pub max_model_len: Option<usize>,
    /// Who computes.
    pub backend: Backend,
    /// CPU threads, 0 for all physical cores.
    pub threads: usize,
    /// Bytes for weights, workspace and cache.
    pub memory_budget: Option<u64>,
    /// Touch the planned memory at start.
    pub prefault: bool,
    /// Never use the network.
    pub offline: bool,
    /// Folder of the default model.
    pub cache_dir: Option<PathBuf>,
    /// Limits of the HTTP interface.
    pub api: ApiSettings,
    /// Thoughts in front of answers.
    pub reasoning: ReasoningConfig,
    /// Limits of the engine.
    pub engine: EngineSettings,
    /// The key/value cache.
    pub cache: CacheOptions,
    /// States kept for prompts to come.
    pub snapshots: SnapshotOptions,
    /// Images.
    pub visual: VisualOptions,
    /// Adapters beside the model.
    pub adapters: AdapterOptions,
    /// Logging.
    pub log: LogSettings,
    /// Where spans go.
    pub trace: TraceSettings,
}

/// Limits of the HTTP interface.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Requests in the server at once.
    pub max_concurrent_requests: u32,
    /// Answer tokens where the request names none.
    pub default_max_tokens: u32,
    /// Largest `n`.
    pub max_n: u32,
    /// Allowed web origins.
    pub cors_origins: Vec<String>,
    /// Which hidden states make an embedding.
    pub embedding_pooling: Pooling,
    /// Prompts are scored with the method `full`.
    pub scoring_full: bool,
    /// How the model writes calls of tools.
    pub tool_calls: ToolCallFormat,
    /// Digests of the keys that callers may use.
    pub api_keys: Vec<KeyDigest>,
    /// File of further keys.
    pub api_key_file: Option<PathBuf>,
    /// `/metrics` asks for a key.
    pub metrics_require_key: bool,
    /// The page at `/` is served.
    pub page: bool,
    /// PEM files of certificate and key.
    pub tls: Option<TlsFiles>,
    /// What a connection may take.
    pub connections: ConnectionLimits,
    /// What images may be, and where they may come from.
    pub images: ImageSettings,
}

/// Limits of the engine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Rows of the largest step.
    pub max_batch_rows: usize,
    /// Most prompt rows of one sequence in a step.
    pub prefill_chunk: usize,
    /// Sequences that may wait.
    pub max_waiting: usize,
    /// Sequences that may run.
    pub max_running: usize,
    /// Longest wait.
    pub queue_timeout: Duration,
    /// Longest drain.
    pub drain_timeout: Duration,
    /// Step time to aim at.
    pub target_step: Duration,
}

/// Section `[cache]`. What is not set is decided when model and side-car are known, by
/// [`crate::cache`].
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Who decides what stays; `None`: `auto`.
    pub method: Option<CacheMethod>,
    /// Methods that requests may ask for.
    pub methods: Option<Vec<CacheMethod>>,
    /// `M`, in tokens.
    pub slots: Option<u32>,
    /// `B`, in tokens.
    pub ring: Option<u32>,
    /// First tokens that stay.
    pub sinks: Option<u32>,
    /// Thousandths of the slots for the latest tokens, method learned.
    pub recent_permille: Option<u16>,
    /// Thousandths of the other slots for the recall score, method learned.
    pub recall_permille: Option<u16>,
    /// Give layers the shares of the slots that the side-car names.
    pub layer_budgets: bool,
    /// Files of trained weights, `none` or `built-in`; empty: look for them.
    pub side_car: Vec<String>,
    /// Refuse instead of folding.
    pub require_exact: bool,
    /// Number type of the slots.
    pub slot_type: SlotType,
    /// Sizes of blocks, in tokens; empty: derive them.
    pub capacities: Vec<u32>,
}

/// Section `[snapshots]`.
#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// Bytes of RAM; 0 is off.
    pub memory: Option<u64>,
    /// Tokens between two of them.
    pub interval: u32,
    /// Where they outlive the process.
    pub dir: Option<PathBuf>,
    /// Bytes of files.
    pub disk: u64,
}

/// Section `[log]`.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// One JSON object per line.
    pub json: bool,
    /// A `tracing` filter.
    pub filter: String,
}

/// Section `[trace]`.
#[derive(Debug, Clone)]
pub struct TraceSettings {
    /// The collector's URL; `None`: no traces.
    pub endpoint: Option<String>,
    /// Share of the requests, 0 to 1.
    pub share: f64,
}

impl Config {
    /// What `locket serve` would have with these flags, the other sources below them.
    ///
    /// # Errors
    /// As [`Self::load`], and a file that cannot be read.
    pub fn of_flags(
        flags: impl IntoIterator<Item = (&'static str, Option<String>)>,
    ) -> Result<Self, ConfigError> {
        let given = flags.into_iter().filter_map(|(key, text)| Some((key, vec![text?]))).collect();
        Self::load(&Sources::of_process(SettingFlags { given, config: None })?)
    }

    /// Merges the sources and checks everything.
    ///
    /// # Errors
    /// All problems at once: unknown names with a suggestion, values out of range with their source.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let entries = layers::merge(sources)?;
        let config = Self::from_entries(entries);
        let problems = config.contradictions();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError(problems)) }
    }

    fn from_entries(entries: Vec<Entry>) -> Self {
        let read = Reader { entries: &entries };
        let config = Self {
            model: read.text_if_set("model"),
            served_model_name: read.texts("served-model-name"),
            host: read.text("host"),
            port: read.integer("port") as u16,
            max_model_len: read.integer_if_set("max-model-len").map(|tokens| tokens as usize),
            backend: backend(&read.text("backend")),
            threads: read.integer("threads") as usize,
            memory_budget: read.integer_if_set("memory-budget"),
            prefault: read.switch("prefault"),
            offline: read.switch("offline"),
            cache_dir: read.text_if_set("cache-dir").map(PathBuf::from),
            api: ApiSettings {
                max_body_bytes: usize::try_from(read.integer("max-body-bytes")).unwrap_or(usize::MAX),
                max_concurrent_requests: read.integer("max-concurrent-requests") as u32,
                default_max_tokens: read.integer("default-max-tokens") as u32,
                max_n: read.integer("max-n") as u32,
                cors_origins: read.texts("cors-origins"),
                embedding_pooling: match read.text("embedding-pooling").as_str() {
                    "mean" => Pooling::Mean,
                    _ => Pooling::Last,
                },
                scoring_full: read.text("scoring-cache") == "full",
                // The table admits only names that are known.
                tool_calls: ToolCallFormat::from_name(&read.text("tool-call-format")).unwrap_or_default(),
                api_keys: read.secrets("api-key"),
                api_key_file: read.text_if_set("api-key-file").map(PathBuf::from),
                metrics_require_key: read.switch("metrics-require-key"),
                page: read.switch("page"),
                tls: tls_files(&read),
                connections: ConnectionLimits {
                    max_connections: read.integer("max-connections") as u32,
                    header_timeout: Duration::from_secs_f64(read.number("header-timeout-s")),
                    idle_timeout: Duration::from_secs_f64(read.number("idle-timeout-s")),
                    stall_timeout: Duration::from_secs_f64(read.number("stall-timeout-s")),
                },
                images: ImageSettings {
                    max_images: read.integer("max-images") as u32,
                    max_pixels: read.integer("max-image-pixels"),
                    max_bytes: usize::try_from(read.integer("max-image-bytes")).unwrap_or(usize::MAX),
                    // What names no host is reported among the contradictions.
                    url_hosts: HostList::new(&read.texts("image-url-hosts")).unwrap_or_default(),
                    url_timeout: Duration::from_secs_f64(read.number("image-url-timeout-s")),
                },
            },
            reasoning: reasoning::read(&read),
            engine: EngineSettings {
                max_batch_rows: read.integer("max-batch-rows") as usize,
                prefill_chunk: read.integer("prefill-chunk") as usize,
                max_waiting: read.integer("max-waiting") as usize,
                max_running: read.integer("max-running") as usize,
                queue_timeout: Duration::from_secs_f64(read.number("queue-timeout-s")),
                drain_timeout: Duration::from_secs_f64(read.number("drain-timeout-s")),
                target_step: Duration::from_secs_f64(read.number("target-step-ms") / 1e3),
            },
            cache: CacheOptions {
                method: read.text("cache.method").parse().ok(),
                methods: read.texts_if_set("cache.methods").map(|names| {
                    // The table admits only names that are known.
                    names.iter().filter_map(|name| name.parse().ok()).collect()
                }),
                slots: read.integer_if_set("cache.slots").map(|slots| slots as u32),
                ring: read.integer_if_set("cache.ring").map(|ring| ring as u32),
                sinks: read.integer_if_set("cache.sinks").map(|sinks| sinks as u32),
                recent_permille: read.number_if_set("cache.recent").map(permille),
                recall_permille: read.number_if_set("cache.recall").map(permille),
                layer_budgets: read.switch("cache.layer-budgets"),
                side_car: read.texts_if_set("cache.side-car").unwrap_or_default(),
                require_exact: read.switch("cache.require-exact"),
                slot_type: slot_type(&read.text("cache.dtype")),
                capacities: read.integers("cache.capacities"),
            },
            snapshots: SnapshotOptions {
                memory: read.integer_if_set("snapshots.memory"),
                interval: read.integer("snapshots.interval") as u32,
                dir: read.text_if_set("snapshots.dir").map(PathBuf::from),
                disk: read.integer("snapshots.disk"),
            },
            visual: visual::read(&read),
            adapters: visual::read_adapters(&read),
            log: LogSettings { json: read.text("log.format") == "json", filter: read.text("log.filter") },
            trace: TraceSettings {
                endpoint: read.text_if_set("trace.endpoint"),
                share: read.number("trace.share"),
            },
            entries: Vec::new(),
        };
        Self { entries, ..config }
    }

    /// Who set `key`.
    pub fn origin(&self, key: &str) -> String {
        self.entries
            .iter()
            .find(|entry| entry.setting.key == key)
            .map_or_else(|| "unknown".into(), |entry| entry.origin.to_string())
    }

    fn is_set(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.setting.key == key && entry.origin != Origin::Default)
    }

    /// The effective configuration as TOML, each line with its origin.
    pub fn to_toml(&self) -> String {
        document::effective(&self.entries)
    }
}

/// Certificate and key; one alone is reported among the contradictions.
fn tls_files(read: &Reader<'_>) -> Option<TlsFiles> {
    let file = |key| read.text_if_set(key).map(PathBuf::from);
    let (certificate, key) = file("tls-cert").zip(file("tls-key"))?;
    Some(TlsFiles { certificate, key })
}

/// The number type of a word that the table admits.
fn slot_type(word: &str) -> SlotType {
    SlotType::ALL.into_iter().find(|slot_type| slot_type.name() == word).unwrap_or_default()
}

/// A share from 0 to 1 in thousandths.
fn permille(share: f64) -> u16 {
    (share * 1000.0).round() as u16
}

/// The backend of a word that the table admits.
fn backend(word: &str) -> Backend {
    match word {
        "reference" => Backend::Reference,
        other => device_backend(other).unwrap_or(Backend::Cpu),
    }
}

#[cfg(feature = "cuda")]
fn device_backend(word: &str) -> Option<Backend> {
    (word == "cuda").then_some(Backend::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn device_backend(_word: &str) -> Option<Backend> {
    None
}

#[cfg(test)]
mod tests;
