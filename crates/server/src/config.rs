//! What the operator decides about the HTTP interface. Values are checked once, by
//! [`ServerConfig::check`]; the binary fills this from its own configuration.

mod cache_bounds;

use std::{path::PathBuf, time::Duration};

use locket_engine::{AdapterId, Pooling};
use locket_model::load::GenerationDefaults;
use locket_processor::{
    reasoning::{ReasoningMode, ReasoningSettings},
    tools::ToolFormat,
};

pub use cache_bounds::CacheBounds;

use crate::{adapters::NamedAdapter, keys::KeyDigest, media::ImageSettings, visual::VisualConfig};

/// Settings of the server.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Names under which the model is served; the first is shown, all are accepted.
    pub served_model_names: Vec<String>,
    /// `root` in `/v1/models`: the repository or the file's name.
    pub model_root: String,
    /// Longest prompt plus answer in tokens.
    pub max_model_len: u32,
    /// Longest answer when the client names no limit, in tokens.
    pub default_max_tokens: u32,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Longest time that a body may take to arrive.
    pub body_timeout: Duration,
    /// Largest `n`, at most 128.
    pub max_n: u32,
    /// Requests with a body that are worked on at once; more get a 503.
    pub max_concurrent_requests: u32,
    /// Origins that browsers may call from; empty: CORS is off. `*` allows all.
    pub cors_origins: Vec<String>,
    /// Digests of the keys that callers may use; no keys and no file: nobody is asked for one.
    pub api_keys: Vec<KeyDigest>,
    /// File of further keys, which is read again by [`crate::AppState::reload`].
    pub api_key_file: Option<PathBuf>,
    /// `/metrics` asks for a key too.
    pub metrics_require_key: bool,
    /// Serve the page at `/`.
    pub page: bool,
    /// Certificate and key; `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// What a connection may take.
    pub connections: ConnectionLimits,
    /// What images may be, and where they may be fetched from.
    pub images: ImageSettings,
    /// What becomes of images in the decoder, for a model that sees.
    pub visual: VisualConfig,
    /// Adapters that clients may ask for by name.
    pub adapters: Vec<NamedAdapter>,
    /// Folder from which callers may load more; `None`: they may not.
    pub adapter_dir: Option<PathBuf>,
    /// Most adapters with names at once.
    pub max_adapters: usize,
    /// The adapter that conversations with images go through, if their model is not one.
    pub visual_adapter: Option<AdapterId>,
    /// Silence after which a stream sends a comment line.
    pub keep_alive: Duration,
    /// How long running requests may go on after the shutdown signal.
    pub drain_timeout: Duration,
    /// How the model writes calls of tools.
    pub tool_calls: ToolCallFormat,
    /// How the model thinks, and what requests get that say nothing about it.
    pub reasoning: ReasoningConfig,
    /// How sequences use their cache block, and what requests may say about it.
    pub cache: CacheBounds,
    /// Most bytes of generated turns that are remembered: an answer that a client sends back is then
    /// made of the tokens that were sampled, not of those that its text gives. 0 turns it off.
    pub turn_memory_bytes: usize,
    /// File in which remembered turns outlive the process, at most about twice as long; `None`: they do
    /// not. It has mode 0600 and holds conversations in clear, as files of snapshots do, beside which it
    /// belongs: without it, a conversation that returns after a restart may be tokenised in another way.
    /// One process at a time may use it.
    pub turn_file: Option<PathBuf>,
    /// Which hidden states make an embedding.
    pub embedding_pooling: Pooling,
    /// Sampling defaults of the checkpoint.
    pub generation: GenerationDefaults,
    /// Version string of the server.
    pub version: String,
    /// Digest of the weights and their quantisation, for `system_fingerprint`.
    pub fingerprint: String,
}

/// How the model writes calls of tools.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// As its chat template teaches it; as Hermes does if that says nothing.
    #[default]
    Auto,
    /// In this way.
    Format(ToolFormat),
    /// Tools are refused.
    Off,
}

impl ToolCallFormat {
    /// What `tool-call-format` may be.
    pub const NAMES: &[&str] = &["auto", "hermes", "llama-json", "pythonic", "none"];

    /// One of [`Self::NAMES`].
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "none" => Some(Self::Off),
            _ => ToolFormat::ALL.into_iter().find(|format| format.name() == name).map(Self::Format),
        }
    }
}

/// PEM files for TLS; both are read again by [`crate::AppState::reload`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by those that sign it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What a connection may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open connections; more wait to be accepted.
    pub max_connections: u32,
    /// From the connection to the head of its first request, TLS included.
    pub header_timeout: Duration,
    /// From the end of an answer to the head of the next request.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub stall_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            header_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(90),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            served_model_names: vec!["model".into()],
            model_root: "model".into(),
            max_model_len: 2048,
            default_max_tokens: 4096,
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(60),
            max_n: 16,
            max_concurrent_requests: 512,
            cors_origins: Vec::new(),
            api_keys: Vec::new(),
            api_key_file: None,
            metrics_require_key: false,
            page: true,
            tls: None,
            connections: ConnectionLimits::default(),
            images: ImageSettings::default(),
            visual: VisualConfig::default(),
            adapters: Vec::new(),
            adapter_dir: None,
            max_adapters: 8,
            visual_adapter: None,
            keep_alive: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
            tool_calls: ToolCallFormat::Auto,
            reasoning: ReasoningConfig::default(),
            cache: CacheBounds::default(),
            turn_memory_bytes: 16 << 20,
            turn_file: None,
            embedding_pooling: Pooling::default(),
            generation: GenerationDefaults::default(),
            version: env!("CARGO_PKG_VERSION").into(),
            fingerprint: String::new(),
        }
    }
}

/// Settings of reasoning: thoughts in front of answers.
#[derive(Debug, Clone)]
pub struct ReasoningConfig {
    /// Markers of thoughts; what is absent is found in the chat template.
    pub profile: ReasoningSettings,
    /// What a request gets that does not say whether to think; `None`: what the template does.
    pub mode: Option<ReasoningMode>,
    /// Most thought tokens of a request that names neither budget nor effort; `None`: no limit.
    pub budget: Option<u32>,
    /// Names under which thoughts are sent.
    pub field: ReasoningField,
}

impl Default for ReasoningConfig {
    fn default() -> Self {
        Self {
            profile: ReasoningSettings::default(),
            mode: None,
            budget: Some(4096),
            field: ReasoningField::Both,
        }
    }
}

/// Names of the text of thoughts in messages and deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningField {
    /// Under both names.
    Both,
    /// `reasoning`
    Reasoning,
    /// `reasoning_content`
    ReasoningContent,
}

impl ReasoningField {
    /// The values of `reasoning` and `reasoning_content`.
    pub(crate) fn values(self, text: Option<String>) -> (Option<String>, Option<String>) {
        match self {
            Self::Both => (text.clone(), text),
            Self::Reasoning => (text, None),
            Self::ReasoningContent => (None, text),
        }
    }
}

/// A setting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("server setting `{key}`: {reason}")]
pub struct ConfigError {
    /// The field of [`ServerConfig`].
    pub key: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl ServerConfig {
    /// Checks all values.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |key, reason: &str| Err(ConfigError { key, reason: reason.into() });
        if self.served_model_names.is_empty() || self.served_model_names.iter().any(String::is_empty) {
            return fail("served_model_names", "must hold at least one name, none of them empty");
        }
        if self.max_model_len < 2 {
            return fail("max_model_len", "must be at least 2: one token of prompt, one of answer");
        }
        if self.default_max_tokens == 0 {
            return fail("default_max_tokens", "must be at least 1");
        }
        if !(1..=128).contains(&self.max_n) {
            return fail("max_n", "must be 1 to 128");
        }
        if self.max_concurrent_requests == 0 {
            return fail("max_concurrent_requests", "must be at least 1");
        }
        if self.max_body_bytes == 0 {
            return fail("max_body_bytes", "must be at least 1");
        }
        if self.cors_origins.iter().any(|origin| axum::http::HeaderValue::from_str(origin).is_err()) {
            return fail("cors_origins", "must hold origins such as https://chat.example.org");
        }
        if self.connections.max_connections == 0 {
            return fail("connections.max_connections", "must be at least 1");
        }
        self.visual.check()?;
        self.cache.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_work_and_bad_values_name_their_key() {
        assert_eq!(ServerConfig::default().check(), Ok(()));
        let bad = ServerConfig { max_n: 129, ..ServerConfig::default() };
        assert_eq!(bad.check().expect_err("too many").key, "max_n");
        let bad = ServerConfig { served_model_names: Vec::new(), ..ServerConfig::default() };
        assert_eq!(bad.check().expect_err("no name").key, "served_model_names");
    }
}
