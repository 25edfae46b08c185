//! Reads file, environment and flags, and lays them over each other.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use toml::de::{DeTable, DeValue};

use super::{
    ConfigError, Entry, SettingFlags,
    setting::{self, Setting, nearest},
    table::SETTINGS,
    value::{self, Value},
};

/// Who set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody: the table's default.
    Default,
    /// A line of the file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A command-line flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "file {}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// A configuration file that was read; it may hold keys.
#[derive(Clone)]
pub struct FileSource {
    /// Its path, for messages.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

/// Everything that configuration comes from; it may hold keys.
#[derive(Clone, Default)]
pub struct Sources {
    /// The file, if there is one.
    pub file: Option<FileSource>,
    /// Environment variables that begin with `LOCKET_`.
    pub environment: Vec<(String, String)>,
    /// The command line.
    pub flags: SettingFlags,
}

/// A configuration file larger than this is none.
const MAX_FILE_BYTES: u64 = 1 << 20;

impl Sources {
    /// Reads the process's environment and the file: `--config`, else `LOCKET_CONFIG`, else
    /// `./locket.toml` if it exists.
    ///
    /// # Errors
    /// A file that was named and cannot be read.
    pub fn of_process(flags: SettingFlags) -> Result<Self, ConfigError> {
        let environment: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| name.starts_with("LOCKET_"))
            .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
            .collect();
        let variable = environment.iter().find(|(name, value)| name == "LOCKET_CONFIG" && !value.is_empty());
        let named = match (&flags.config, variable) {
            (Some(path), _) => Some((path.clone(), "--config")),
            (None, Some((_, path))) => Some((PathBuf::from(path), "LOCKET_CONFIG")),
            (None, None) => None,
        };
        let file = match named {
            Some((path, source)) => Some(read_file(&path, source)?),
            None => match Path::new("locket.toml").is_file() {
                true => Some(read_file(Path::new("locket.toml"), "found in the working folder")?),
                false => None,
            },
        };
        Ok(Self { file, environment, flags })
    }
}

fn read_file(path: &Path, source: &str) -> Result<FileSource, ConfigError> {
    let fail =
        |reason: String| ConfigError(vec![format!("cannot read {} ({source}): {reason}", path.display())]);
    let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
    if size > MAX_FILE_BYTES {
        return Err(fail(format!("{size} bytes are too many for a configuration file")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    Ok(FileSource { path: path.to_owned(), text })
}

/// Merges all sources into one entry per setting.
pub(super) fn merge(sources: &Sources) -> Result<Vec<Entry>, ConfigError> {
    let mut merger = Merger {
        entries: SETTINGS
            .iter()
            .map(|setting| Entry { setting, value: setting.default_value(), origin: Origin::Default })
            .collect(),
        problems: Vec::new(),
    };
    if let Some(file) = &sources.file {
        merger.file(file);
    }
    merger.environment(&sources.environment);
    for (key, texts) in &sources.flags.given {
        if let Some(setting) = setting::find(key) {
            merger.set(setting, texts, Origin::Flag(setting.flag()));
        }
    }
    if merger.problems.is_empty() { Ok(merger.entries) } else { Err(ConfigError(merger.problems)) }
}

struct Merger {
    entries: Vec<Entry>,
    problems: Vec<String>,
}

impl Merger {
    fn set(&mut self, setting: &'static Setting, texts: &[String], origin: Origin) {
        match Value::parse(setting.kind, texts) {
            Err(reason) => self.problems.push(format!("{} ({origin}): {reason}", setting.key)),
            Ok(value) => {
                let entry = self.entries.iter_mut().find(|entry| entry.setting.key == setting.key);
                let entry = entry.expect("there is an entry per setting");
                entry.value = Some(value);
                entry.origin = origin;
            }
        }
    }

    fn file(&mut self, file: &FileSource) {
        let table = match DeTable::parse(&file.text) {
            Ok(table) => table,
            Err(error) => {
                let line = error.span().map_or(1, |span| line_of(&file.text, span.start));
                self.problems.push(format!("{}:{line}: {}", file.path.display(), error.message()));
                return;
            }
        };
        for (name, item) in table.get_ref() {
            match item.get_ref() {
                DeValue::Table(section) => {
                    for (inner, value) in section {
                        let key = format!("{}.{}", name.get_ref(), inner.get_ref());
                        self.file_value(file, &key, line_of(&file.text, inner.span().start), value.get_ref());
                    }
                }
                value => self.file_value(file, name.get_ref(), line_of(&file.text, name.span().start), value),
            }
        }
    }

    fn file_value(&mut self, file: &FileSource, key: &str, line: usize, value: &DeValue<'_>) {
        let origin = Origin::File { path: file.path.clone(), line };
        let Some(setting) = setting::find(key) else {
            self.problems.push(format!("unknown setting {key} ({origin}){}", suggest_key(key)));
            return;
        };
        let texts = match value {
            DeValue::Array(items) if setting.kind.is_list() => {
                items.iter().map(|item| scalar(item.get_ref())).collect::<Option<Vec<_>>>()
            }
            DeValue::Array(_) => None,
            single => scalar(single).map(|text| vec![text]),
        };
        match texts {
            Some(texts) => self.set(setting, &texts, origin),
            None => {
                let reason =
                    format!("a {} cannot stand here; it is {}", value.type_str(), setting.kind.describe());
                self.problems.push(format!("{key} ({origin}): {reason}"));
            }
        }
    }

    fn environment(&mut self, variables: &[(String, String)]) {
        for (name, text) in variables {
            // Compose files pass on variables that nobody has set as empty ones.
            if text.is_empty() || is_foreign(name, text) {
                continue;
            }
            let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == *name) else {
                let names: Vec<_> = SETTINGS.iter().map(Setting::variable).collect();
                let hint = match nearest(name, names.iter().map(String::as_str)) {
                    Some(near) => format!("; did you mean {near}?"),
                    None => String::new(),
                };
                self.problems.push(format!("unknown setting in the environment: {name}{hint}"));
                continue;
            };
            let texts = if setting.kind.is_list() { value::split_list(text) } else { vec![text.clone()] };
            self.set(setting, &texts, Origin::Environment(name.clone()));
        }
    }
}

/// Variables that are not settings: where the file is, what tests use, and the addresses that
/// Kubernetes puts into every container beside a service called `locket`.
fn is_foreign(name: &str, text: &str) -> bool {
    name == "LOCKET_CONFIG"
        || name.starts_with("LOCKET_TEST_")
        || name.starts_with("LOCKET_SERVICE_")
        || name.starts_with("LOCKET_PORT_")
        || (name == "LOCKET_PORT" && text.contains("://"))
}

fn suggest_key(key: &str) -> String {
    let keys = || SETTINGS.iter().map(|setting| setting.key);
    // A right name in the wrong section is as frequent as a slip of the keyboard.
    let name = key.rsplit('.').next().unwrap_or(key);
    let moved = SETTINGS.iter().find(|setting| setting.name() == name).map(|setting| setting.key);
    match moved.or_else(|| nearest(key, keys())) {
        Some(near) => format!("; did you mean {near}?"),
        None => "; `locket config --template` lists all".into(),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(on) => Some(on.to_string()),
        _ => None,
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count() + 1
}
