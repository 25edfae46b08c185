//! The configuration: defaults < file < environment < flags, one typed tree, origins kept.
//!
//! Names are the same everywhere: `[cache] slots` in the file is `LOCKET_CACHE_SLOTS` in the
//! environment and `--cache-slots` on the command line. All come from one table ([`setting`]).
//! Unknown names are errors, and every value is checked before anything else is done.

mod document;
mod layers;
pub mod setting;
pub mod value;

use std::{path::PathBuf, time::Duration};

use locket_model::{
    kv_cache::{CacheMethod, SlotType},
    load::Backend,
};

pub use document::{reference_page, template_file};
#[cfg(test)]
pub use layers::FileSource;
pub use layers::{Origin, Sources};
use setting::{Kind, SETTINGS, Setting};
use value::Value;

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
    /// Limits of the engine.
    pub engine: EngineSettings,
    /// The key/value cache.
    pub cache: CacheOptions,
    /// Logging.
    pub log: LogSettings,
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

/// Section `[cache]`.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Who decides what stays.
    pub method: CacheMethod,
    /// `M`, in tokens.
    pub slots: u32,
    /// `B`, in tokens.
    pub ring: u32,
    /// `B` as the operator gave it; requests with other `slots` derive their own otherwise.
    pub ring_if_set: Option<u32>,
    /// First tokens that stay.
    pub sinks: u32,
    /// Number type of the slots.
    pub slot_type: SlotType,
    /// Sizes of blocks, in tokens; empty: derive them.
    pub capacities: Vec<u32>,
}

/// Section `[log]`.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// One JSON object per line.
    pub json: bool,
    /// A `tracing` filter.
    pub filter: String,
}

impl Config {
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
        let slots = read.integer("cache.slots") as u32;
        let ring_if_set = read.integer_if_set("cache.ring").map(|ring| ring as u32);
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
            },
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
                method: read.text("cache.method").parse().unwrap_or_default(),
                slots,
                ring: ring_if_set.unwrap_or_else(|| (slots / 4).clamp(64, 128)),
                ring_if_set,
                sinks: read.integer("cache.sinks") as u32,
                slot_type: match read.text("cache.dtype").as_str() {
                    "bf16" => SlotType::Bf16,
                    "f32" => SlotType::F32,
                    _ => SlotType::F16,
                },
                capacities: read.integers("cache.capacities"),
            },
            log: LogSettings { json: read.text("log.format") == "json", filter: read.text("log.filter") },
            entries: Vec::new(),
        };
        Self { entries, ..config }
    }

    /// Settings that are valid alone and make no sense together.
    fn contradictions(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.engine.prefill_chunk.is_multiple_of(16) {
            problems.push(format!(
                "prefill-chunk = {} ({}) is not a multiple of 16",
                self.engine.prefill_chunk,
                self.origin("prefill-chunk"),
            ));
        }
        if self.engine.prefill_chunk > self.engine.max_batch_rows && self.is_set("prefill-chunk") {
            problems.push(format!(
                "prefill-chunk = {} ({}) is more than max-batch-rows = {} ({})",
                self.engine.prefill_chunk,
                self.origin("prefill-chunk"),
                self.engine.max_batch_rows,
                self.origin("max-batch-rows"),
            ));
        }
        if self.cache.sinks >= self.cache.slots {
            problems.push(format!(
                "cache.sinks = {} ({}) leaves nothing of cache.slots = {} ({}) for the latest tokens",
                self.cache.sinks,
                self.origin("cache.sinks"),
                self.cache.slots,
                self.origin("cache.slots"),
            ));
        }
        let asks_for_cuda =
            |entry: &Entry| entry.setting.key == "backend" && entry.value == Some(Value::Text("cuda".into()));
        // The derived budget is a share of the machine's memory, which is not the device's.
        if self.memory_budget.is_none() && self.entries.iter().any(asks_for_cuda) {
            problems.push(format!(
                "backend = \"cuda\" ({}) needs memory-budget: how much of the device's memory may be taken",
                self.origin("backend"),
            ));
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.filter).is_err() {
            problems.push(format!(
                "log.filter = {:?} ({}) is not a filter such as info or info,locket_engine=debug",
                self.log.filter,
                self.origin("log.filter"),
            ));
        }
        problems
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

/// Typed access to the merged table. The table decides the type of every value, and a test reads
/// all of them, so a mismatch is a bug of this file alone.
struct Reader<'e> {
    entries: &'e [Entry],
}

impl Reader<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        let entry = self.entries.iter().find(|entry| entry.setting.key == key);
        entry.expect("the key is in the table").value.as_ref()
    }

    fn integer_if_set(&self, key: &str) -> Option<u64> {
        self.value(key).map(|value| match value {
            Value::Integer(number) => *number,
            other => unreachable!("{key} is an integer, not {other:?}"),
        })
    }

    fn integer(&self, key: &str) -> u64 {
        self.integer_if_set(key).expect("has a default")
    }

    fn number(&self, key: &str) -> f64 {
        match self.value(key) {
            Some(Value::Number(number)) => *number,
            other => unreachable!("{key} is a number, not {other:?}"),
        }
    }

    fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Switch(true)))
    }

    fn text_if_set(&self, key: &str) -> Option<String> {
        self.value(key).map(|value| match value {
            Value::Text(text) => text.clone(),
            other => unreachable!("{key} is a text, not {other:?}"),
        })
    }

    fn text(&self, key: &str) -> String {
        self.text_if_set(key).expect("has a default")
    }

    fn texts(&self, key: &str) -> Vec<String> {
        match self.value(key) {
            Some(Value::TextList(texts)) => texts.clone(),
            _ => Vec::new(),
        }
    }

    fn integers(&self, key: &str) -> Vec<u32> {
        match self.value(key) {
            Some(Value::IntegerList(numbers)) => numbers.iter().map(|&number| number as u32).collect(),
            _ => Vec::new(),
        }
    }
}

/// Command-line flags of all settings, generated from the table.
#[derive(Debug, Clone, Default)]
pub struct SettingFlags {
    /// Key and texts of every flag that was given.
    pub given: Vec<(&'static str, Vec<String>)>,
    /// `--config`.
    pub config: Option<PathBuf>,
}

impl clap::Args for SettingFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let file = clap::Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Configuration file [environment: LOCKET_CONFIG] [default: ./locket.toml if it exists]");
        SETTINGS.iter().fold(command.arg(file), |command, setting| command.arg(flag_of(setting)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

fn flag_of(setting: &'static Setting) -> clap::Arg {
    let preset = match setting.preset {
        setting::Preset::Value("") => "none",
        setting::Preset::Value(text) | setting::Preset::Derived(text) => text,
    };
    let help = format!("{} [{}] [default: {preset}]", setting.help, setting.kind.describe());
    let arg = clap::Arg::new(setting.key)
        .long(setting.flag())
        .help(help)
        .help_heading(setting.group.title())
        .action(clap::ArgAction::Append)
        .allow_hyphen_values(false);
    match setting.kind {
        Kind::Switch => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("true|false")
            .action(clap::ArgAction::Set),
        kind if kind.is_list() => arg.value_name("LIST"),
        Kind::Choice(words) => arg.value_name(words.join("|")).action(clap::ArgAction::Set),
        Kind::Text { .. } => arg.value_name("TEXT").action(clap::ArgAction::Set),
        _ => arg.value_name("N").action(clap::ArgAction::Set),
    }
}

impl clap::FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let given = SETTINGS
            .iter()
            .filter_map(|setting| {
                let texts = matches.get_many::<String>(setting.key)?;
                let texts = texts.flat_map(|text| match setting.kind.is_list() {
                    true => value::split_list(text),
                    false => vec![text.clone()],
                });
                Some((setting.key, texts.collect()))
            })
            .collect();
        Ok(Self { given, config: matches.get_one::<PathBuf>("config").cloned() })
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
