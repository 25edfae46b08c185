//! The table of settings: the one place from which flags, environment variables, the file, the
//! reference page and the validation come.

use super::value::Value;

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Key in the file, a dot between section and name. The flag is `--section-name`, the
    /// environment variable `LOCKET_SECTION_NAME`.
    pub key: &'static str,
    /// Heading under which it stands in the file, the reference and the help.
    pub group: Group,
    /// What a value must look like.
    pub kind: Kind,
    /// What holds when nobody says anything.
    pub preset: Preset,
    /// Why one would change it, in one or two sentences.
    pub help: &'static str,
}

/// Headings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Model, address, memory.
    Basics,
    /// Limits of the HTTP interface.
    Api,
    /// Limits of the engine.
    Engine,
    /// The key/value cache.
    Cache,
    /// Logging.
    Log,
}

impl Group {
    /// The heading's text.
    pub fn title(self) -> &'static str {
        match self {
            Self::Basics => "What is served, where, and with how much memory",
            Self::Api => "The HTTP interface",
            Self::Engine => "The engine's steps, queues and limits",
            Self::Cache => "The key/value cache: what a sequence remembers",
            Self::Log => "Logging",
        }
    }
}

/// Type, range and unit of a setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Switch,
    /// A whole number, both ends included.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
        /// Unit, for messages and documentation.
        unit: &'static str,
    },
    /// A finite decimal number, both ends included.
    Number {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
        /// Unit, for messages and documentation.
        unit: &'static str,
    },
    /// A number of bytes; `KiB`, `MiB`, `GiB`, `TiB` (powers of 1,024) and `KB`, `MB`, `GB`, `TB`
    /// (powers of 1,000) may follow it.
    Bytes {
        /// Smallest.
        min: u64,
    },
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Free text, not empty.
    Text {
        /// What it names.
        what: &'static str,
    },
    /// Texts; comma-separated outside the file.
    TextList {
        /// What each names.
        what: &'static str,
    },
    /// Whole numbers; comma-separated outside the file.
    IntegerList {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
        /// Unit, for messages and documentation.
        unit: &'static str,
    },
}

/// The default of a setting.
#[derive(Debug, Clone, Copy)]
pub enum Preset {
    /// This value, as one would write it on the command line.
    Value(&'static str),
    /// Unset; the text says what is done then.
    Derived(&'static str),
}

impl Setting {
    /// `--section-name` without the dashes.
    pub fn flag(&self) -> String {
        self.key.replace('.', "-")
    }

    /// `LOCKET_SECTION_NAME`.
    pub fn variable(&self) -> String {
        format!("LOCKET_{}", self.key.replace(['.', '-'], "_").to_uppercase())
    }

    /// The section of the file, empty at the top.
    pub fn section(&self) -> &'static str {
        self.key.split_once('.').map_or("", |(section, _)| section)
    }

    /// The name inside the section.
    pub fn name(&self) -> &'static str {
        self.key.split_once('.').map_or(self.key, |(_, name)| name)
    }

    /// The default as a value.
    pub fn default_value(&self) -> Option<Value> {
        match self.preset {
            Preset::Derived(_) => None,
            Preset::Value(text) => {
                let parts = match self.kind {
                    Kind::TextList { .. } | Kind::IntegerList { .. } => super::value::split_list(text),
                    _ => vec![text.to_owned()],
                };
                Some(Value::parse(self.kind, &parts).expect("the table's own defaults are valid (tested)"))
            }
        }
    }
}

impl Kind {
    /// Type, range and unit in words: `1 to 65535`, `text or json`, …
    pub fn describe(self) -> String {
        match self {
            Self::Switch => "true or false".into(),
            Self::Integer { min, max, unit } => format!("{min} to {max} {unit}").trim_end().into(),
            Self::Number { min, max, unit } => format!("{min} to {max} {unit}").trim_end().into(),
            Self::Bytes { min } => format!("bytes, at least {}", super::value::format_bytes(min)),
            Self::Choice(words) => words.join(" or "),
            Self::Text { what } => what.into(),
            Self::TextList { what } => format!("list of {what}"),
            Self::IntegerList { min, max, unit } => {
                format!("list of {min} to {max} {unit}").trim_end().into()
            }
        }
    }

    /// Whether several values may be given.
    pub fn is_list(self) -> bool {
        matches!(self, Self::TextList { .. } | Self::IntegerList { .. })
    }
}

#[cfg(not(feature = "cuda"))]
const BACKENDS: &[&str] = &["cpu", "reference"];
#[cfg(feature = "cuda")]
const BACKENDS: &[&str] = &["cpu", "reference", "cuda"];

const fn setting(key: &'static str, group: Group, kind: Kind, preset: Preset, help: &'static str) -> Setting {
    Setting { key, group, kind, preset, help }
}

/// Every setting, in the order of the file.
pub static SETTINGS: &[Setting] = &[
    setting(
        "model",
        Group::Basics,
        Kind::Text { what: "path or repository" },
        Preset::Derived("SmolLM2-135M-Instruct (Q4_1, 98 MB), fetched once"),
        "What to serve: a .gguf file, a folder with config.json and safetensors, or a Hugging Face repository \
         org/name[:file-or-quantisation].",
    ),
    setting(
        "served-model-name",
        Group::Basics,
        Kind::TextList { what: "names" },
        Preset::Derived("the name of the model's file, folder or repository"),
        "Names under which clients may ask for the model; answers carry the first.",
    ),
    setting(
        "host",
        Group::Basics,
        Kind::Text { what: "address or host name" },
        Preset::Value("127.0.0.1"),
        "Where to listen. Loopback by default because there is no authentication yet; 0.0.0.0 is every network.",
    ),
    setting(
        "port",
        Group::Basics,
        Kind::Integer { min: 0, max: 65_535, unit: "" },
        Preset::Value("8080"),
        "TCP port; 0 takes a free one, which the line on standard output names.",
    ),
    setting(
        "max-model-len",
        Group::Basics,
        Kind::Integer { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Derived("the context length that the model was trained for"),
        "Longest prompt plus answer. A smaller value makes room for more sequences with method full.",
    ),
    setting(
        "backend",
        Group::Basics,
        Kind::Choice(BACKENDS),
        Preset::Value("cpu"),
        "Who computes: cpu has packed kernels, reference is the slow oracle for comparisons. Builds with the feature \
         cuda also have cuda: plain operations on the first device, for comparisons too; it needs memory-budget.",
    ),
    setting(
        "threads",
        Group::Basics,
        Kind::Integer { min: 0, max: 1_024, unit: "threads" },
        Preset::Value("0"),
        "CPU threads for the model; 0 takes all physical cores that the process may use.",
    ),
    setting(
        "memory-budget",
        Group::Basics,
        Kind::Bytes { min: 64 << 20 },
        Preset::Derived("half of the memory that the machine or its cgroup has free"),
        "Weights, workspace and cache together never take more; the start is refused if they do not fit. Must be \
         given with backend cuda, whose device has memory of its own.",
    ),
    setting(
        "prefault",
        Group::Basics,
        Kind::Switch,
        Preset::Value("false"),
        "Write to all memory of the cache at start: a machine without it fails then and not under load, and no \
         request waits for a page. Takes seconds where gigabytes are planned.",
    ),
    setting(
        "offline",
        Group::Basics,
        Kind::Switch,
        Preset::Value("false"),
        "Never use the network; a model that is not here is an error at once.",
    ),
    setting(
        "cache-dir",
        Group::Basics,
        Kind::Text { what: "folder" },
        Preset::Derived("$XDG_CACHE_HOME/locket, else ~/.cache/locket"),
        "Where the default model is kept. Repositories are kept in the Hugging Face cache (HF_HOME).",
    ),
    setting(
        "max-body-bytes",
        Group::Api,
        Kind::Bytes { min: 1_024 },
        Preset::Value("32MiB"),
        "Largest request body; larger ones get 413 before they are read.",
    ),
    setting(
        "max-concurrent-requests",
        Group::Api,
        Kind::Integer { min: 1, max: 65_536, unit: "requests" },
        Preset::Value("512"),
        "Requests worked on at once, streams included; one more gets 503 with Retry-After.",
    ),
    setting(
        "default-max-tokens",
        Group::Api,
        Kind::Integer { min: 1, max: 1 << 24, unit: "tokens" },
        Preset::Value("4096"),
        "Longest answer where a chat request names no limit. With method full a sequence's block must hold prompt \
         and answer, so a smaller one lets more sequences run at once.",
    ),
    setting(
        "max-n",
        Group::Api,
        Kind::Integer { min: 1, max: 128, unit: "continuations" },
        Preset::Value("16"),
        "Largest n of a request; each continuation takes a block of its own.",
    ),
    setting(
        "cors-origins",
        Group::Api,
        Kind::TextList { what: "origins" },
        Preset::Value(""),
        "Web pages that browsers let call this server, for example http://localhost:3000; * is any; none by default.",
    ),
    setting(
        "max-batch-rows",
        Group::Engine,
        Kind::Integer { min: 32, max: 65_536, unit: "rows" },
        Preset::Value("512"),
        "Most tokens computed in one step, prompt chunks and answers together. More is faster for prompts and makes \
         the gap between two streamed tokens longer.",
    ),
    setting(
        "prefill-chunk",
        Group::Engine,
        Kind::Integer { min: 16, max: 65_536, unit: "tokens" },
        Preset::Value("512"),
        "Most prompt tokens of one sequence in a step, a multiple of 16. Smaller is fairer between prompts.",
    ),
    setting(
        "max-waiting",
        Group::Engine,
        Kind::Integer { min: 1, max: 1 << 20, unit: "sequences" },
        Preset::Value("256"),
        "Length of the queue for a free block; beyond it requests get 503 with Retry-After.",
    ),
    setting(
        "max-running",
        Group::Engine,
        Kind::Integer { min: 1, max: 65_536, unit: "sequences" },
        Preset::Value("64"),
        "Most sequences generated at once; memory for them is planned at start.",
    ),
    setting(
        "queue-timeout-s",
        Group::Engine,
        Kind::Number { min: 0.0, max: 86_400.0, unit: "seconds" },
        Preset::Value("300"),
        "Longest wait for a block before a request is given up; 0 is no limit.",
    ),
    setting(
        "drain-timeout-s",
        Group::Engine,
        Kind::Number { min: 0.0, max: 86_400.0, unit: "seconds" },
        Preset::Value("30"),
        "After SIGTERM, how long running requests may still take.",
    ),
    setting(
        "target-step-ms",
        Group::Engine,
        Kind::Number { min: 1.0, max: 60_000.0, unit: "milliseconds" },
        Preset::Value("100"),
        "Step time that the scheduler aims at by giving prompts fewer rows; it bounds the gap between two tokens.",
    ),
    setting(
        "cache.method",
        Group::Cache,
        Kind::Choice(&["full", "window"]),
        Preset::Value("full"),
        "What a sequence remembers: full keeps every token, window its first and its latest ones in fixed memory.",
    ),
    setting(
        "cache.slots",
        Group::Cache,
        Kind::Integer { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Value("1024"),
        "Tokens that survive when a block is full; answers are exact up to this length. Not used by method full.",
    ),
    setting(
        "cache.ring",
        Group::Cache,
        Kind::Integer { min: 1, max: 1 << 20, unit: "tokens" },
        Preset::Derived("a quarter of slots, at least 64 and at most 128"),
        "Tokens appended between two clean-ups of a full block: more is faster and takes more memory.",
    ),
    setting(
        "cache.sinks",
        Group::Cache,
        Kind::Integer { min: 0, max: 1 << 20, unit: "tokens" },
        Preset::Value("4"),
        "First tokens of a sequence that method window never drops.",
    ),
    setting(
        "cache.dtype",
        Group::Cache,
        Kind::Choice(&["f16", "bf16", "f32"]),
        Preset::Value("f16"),
        "Number type of keys and values; f32 takes twice the memory.",
    ),
    setting(
        "cache.capacities",
        Group::Cache,
        Kind::IntegerList { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Derived(
            "full: 1/16, 1/4 and all of the context; window: slots + ring and smaller ones of these",
        ),
        "Sizes of the blocks that are allocated at start; a sequence takes the smallest that holds it.",
    ),
    setting(
        "log.format",
        Group::Log,
        Kind::Choice(&["text", "json"]),
        Preset::Value("text"),
        "Log lines on standard error for people or for machines.",
    ),
    setting(
        "log.filter",
        Group::Log,
        Kind::Text { what: "filter" },
        Preset::Value("info"),
        "What is logged: a level (error, warn, info, debug, trace), or per module: info,locket_engine=debug.",
    ),
];

/// The setting called `key`.
pub fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// The known name nearest to `word`, if it is near enough to be a slip of the keyboard.
pub fn nearest<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let limit = (word.chars().count() / 3).clamp(1, 3);
    names
        .map(|name| (edit_distance(word, name), name))
        .filter(|&(distance, _)| distance <= limit)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`
/// (optimal string alignment).
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_names_unique() {
        let mut flags = std::collections::HashSet::new();
        for setting in SETTINGS {
            assert_eq!(setting.default_value().is_some(), matches!(setting.preset, Preset::Value(_)));
            assert!(flags.insert(setting.flag()), "{} twice", setting.flag());
            assert!(setting.help.ends_with('.'), "{}", setting.key);
        }
    }

    #[test]
    fn distances() {
        assert_eq!(edit_distance("port", "port"), 0);
        assert_eq!(edit_distance("prot", "port"), 1);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("thread", "threads"), 1);
        let names = || ["port", "host", "max-model-len"].into_iter();
        assert_eq!(nearest("prot", names()), Some("port"));
        assert_eq!(nearest("max_model_len", names()), Some("max-model-len"));
        assert_eq!(nearest("entirely", names()), None);
    }
}
