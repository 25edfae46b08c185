//! What a setting is: name, type and range, default, reason. All of them are in [`super::table`].

use super::{table::SETTINGS, value::Value};

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
    /// What a model thinks before it answers.
    Reasoning,
    /// The key/value cache.
    Cache,
    /// States of the cache that are kept for prompts to come.
    Snapshots,
    /// Images: which of their tokens the model sees.
    Visual,
    /// Logging.
    Log,
    /// Spans for a collector.
    Trace,
}

impl Group {
    /// The heading's text.
    pub fn title(self) -> &'static str {
        match self {
            Self::Basics => "What is served, where, and with how much memory",
            Self::Api => "The HTTP interface",
            Self::Reasoning => "Reasoning: what is thought before an answer",
            Self::Engine => "The engine's steps, queues and limits",
            Self::Cache => "The key/value cache: what a sequence remembers",
            Self::Snapshots => "Snapshots: prompts go on where an earlier one with the same start was",
            Self::Visual => "Images: which of their visual tokens the model sees",
            Self::Log => "Logging",
            Self::Trace => "Tracing: spans of requests for a collector",
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
    /// Some of these words; comma-separated outside the file.
    ChoiceList(&'static [&'static str]),
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
    /// API keys, which are never shown; comma-separated outside the file.
    SecretList,
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
                    kind if kind.is_list() => super::value::split_list(text),
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
            Self::Bytes { min: 0 } => "bytes".into(),
            Self::Bytes { min } => format!("bytes, at least {}", super::value::format_bytes(min)),
            Self::Choice(words) => words.join(" or "),
            Self::ChoiceList(words) => format!("list of {}", words.join(", ")),
            Self::Text { what } => what.into(),
            Self::TextList { what } => format!("list of {what}"),
            Self::SecretList => "list of keys".into(),
            Self::IntegerList { min, max, unit } => {
                format!("list of {min} to {max} {unit}").trim_end().into()
            }
        }
    }

    /// Whether several values may be given.
    pub fn is_list(self) -> bool {
        matches!(
            self,
            Self::TextList { .. } | Self::SecretList | Self::IntegerList { .. } | Self::ChoiceList(_)
        )
    }
}

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
