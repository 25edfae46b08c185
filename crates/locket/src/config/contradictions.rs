//! Settings that are valid alone and make no sense together.

use locket_model::{kv_cache::SlotType, load::Backend};
use locket_server::media::HostList;

use super::{Config, Entry, value::Value};

/// Rows of chunks and of states of blocks are multiples of this.
const CHUNK_ROWS: u32 = 16;

impl Config {
    /// One text per contradiction, naming the settings and who set them.
    pub(super) fn contradictions(&self) -> Vec<String> {
        let mut problems = self.of_the_api();
        problems.extend(self.of_the_engine());
        problems.extend(self.of_the_cache());
        problems.extend(self.of_snapshots());
        problems.extend(self.of_images());
        if tracing_subscriber::EnvFilter::try_new(&self.log.filter).is_err() {
            problems.push(format!(
                "log.filter = {:?} ({}) is not a filter such as info or info,locket_engine=debug",
                self.log.filter,
                self.origin("log.filter"),
            ));
        }
        problems
    }

    /// The text that a setting has.
    pub(super) fn text_of(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|entry| entry.setting.key == key).and_then(|entry| match &entry.value {
            Some(Value::Text(text)) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The texts that a setting has.
    pub(super) fn texts_of(&self, key: &str) -> &[String] {
        let entry = self.entries.iter().find(|entry| entry.setting.key == key);
        match entry.and_then(|entry| entry.value.as_ref()) {
            Some(Value::TextList(texts)) => texts,
            _ => &[],
        }
    }

    fn of_the_api(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, other) in [("tls-cert", "tls-key"), ("tls-key", "tls-cert")] {
            if self.is_set(key) && !self.is_set(other) {
                problems.push(format!("{key} ({}) needs {other} beside it", self.origin(key)));
            }
        }
        let hosts = self.entries.iter().find(|entry| entry.setting.key == "image-url-hosts");
        if let Some(Entry { value: Some(Value::TextList(hosts)), .. }) = hosts
            && let Err(error) = HostList::new(hosts)
        {
            problems.push(format!("image-url-hosts ({}): {error}", self.origin("image-url-hosts")));
        }
        problems
    }

    fn of_the_engine(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.engine.prefill_chunk.is_multiple_of(CHUNK_ROWS as usize) {
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
        let asks_for_cuda =
            |entry: &Entry| entry.setting.key == "backend" && entry.value == Some(Value::Text("cuda".into()));
        // The derived budget is a share of the machine's memory, which is not the device's.
        if self.memory_budget.is_none() && self.entries.iter().any(asks_for_cuda) {
            problems.push(format!(
                "backend = \"cuda\" ({}) needs memory-budget: how much of the device's memory may be taken",
                self.origin("backend"),
            ));
        }
        problems
    }

    fn of_the_cache(&self) -> Vec<String> {
        let cache = &self.cache;
        let mut problems = Vec::new();
        if let (Some(sinks), Some(slots)) = (cache.sinks, cache.slots)
            && sinks > slots / 4
        {
            problems.push(format!(
                "cache.sinks = {sinks} ({}) is more than a quarter of cache.slots = {slots} ({})",
                self.origin("cache.sinks"),
                self.origin("cache.slots"),
            ));
        }
        if cache.slot_type == SlotType::I4 && self.backend != Backend::Reference {
            problems.push(format!(
                "cache.dtype = int4 ({}) is an experiment of backend reference; backend ({}) is another, which \
                 has int8",
                self.origin("cache.dtype"),
                self.origin("backend"),
            ));
        }
        let named = [
            ("cache.method", cache.method.as_slice()),
            ("cache.methods", cache.methods.as_deref().unwrap_or(&[])),
        ];
        for (key, methods) in named {
            let mixing = methods.iter().find(|method| method.mixes());
            if let (Some(method), false) = (mixing, cache.slot_type.is_float()) {
                problems.push(format!(
                    "{key} ({}) has {}, which writes mixtures of tokens into slots; cache.dtype = {} ({}) cannot \
                     hold them, f16 can",
                    self.origin(key),
                    method.name(),
                    cache.slot_type.name(),
                    self.origin("cache.dtype"),
                ));
            }
        }
        if cache.side_car.len() > 1 && cache.side_car.iter().any(|name| name == "none") {
            problems
                .push(format!("cache.side-car ({}) has none beside others", self.origin("cache.side-car")));
        }
        problems
    }

    fn of_snapshots(&self) -> Vec<String> {
        let snapshots = &self.snapshots;
        let mut problems = Vec::new();
        if !snapshots.interval.is_multiple_of(CHUNK_ROWS) {
            problems.push(format!(
                "snapshots.interval = {} ({}) is not a multiple of 16",
                snapshots.interval,
                self.origin("snapshots.interval"),
            ));
        }
        if snapshots.dir.is_some() && snapshots.memory == Some(0) {
            problems.push(format!(
                "snapshots.dir ({}) needs snapshots.memory, which is 0 ({}): files are read into it",
                self.origin("snapshots.dir"),
                self.origin("snapshots.memory"),
            ));
        }
        problems
    }
}
