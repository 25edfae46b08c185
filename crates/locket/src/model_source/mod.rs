//! Where a model comes from: a path, a Hugging Face repository, or the default model.

mod default_model;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod listing;
mod progress;
mod wheel;

use std::path::{Path, PathBuf};

pub use default_model::{DefaultModel, FINGERPRINT as DEFAULT_FINGERPRINT};

use crate::config::Config;

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither a path that exists nor the name of a repository.
    #[error(
        "there is no file or folder {0:?}, and it is not a repository name such as org/name or \
         org/name:file-or-quantisation either"
    )]
    NotFound(String),
    /// A repository was asked for where the network may not be used, and it is not in the cache.
    #[cfg(feature = "hub")]
    #[error(
        "{0} is not complete in the Hugging Face cache, and the network may not be used (offline = true)"
    )]
    Offline(String),
    /// The hub could not be reached or refused.
    #[error("cannot fetch {repository}: {reason}")]
    Hub {
        /// `org/name`.
        repository: String,
        /// The hub's or the network's reason.
        reason: String,
    },
    /// A repository has nothing that can be served, or more than one thing.
    #[cfg(feature = "hub")]
    #[error("{repository}: {reason}")]
    Choice {
        /// `org/name`.
        repository: String,
        /// What was found and what to ask for.
        reason: String,
    },
    /// The default model is nowhere. The text names the three ways out.
    #[error("{0}")]
    DefaultModel(String),
    /// A file of the cache folder could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried: `cannot write`, …
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl SourceError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalModel {
    /// File or folder for `Checkpoint::open`.
    pub path: PathBuf,
    /// What clients may call it unless the operator says otherwise.
    pub name: String,
}

/// Finds the configured model and fetches it if it is not here. Blocks for as long as that takes.
///
/// # Errors
/// See [`SourceError`].
pub fn locate(config: &Config) -> Result<LocalModel, SourceError> {
    let Some(model) = &config.model else {
        let path = DefaultModel::new(cache_dir(config)?).fetch(config.offline)?;
        return Ok(LocalModel { path, name: default_model::NAME.into() });
    };
    let path = Path::new(model);
    if path.exists() {
        return Ok(LocalModel { path: path.to_owned(), name: name_of(path) });
    }
    let Some(reference) = RepositoryReference::parse(model) else {
        return Err(SourceError::NotFound(model.clone()));
    };
    fetch_repository(&reference, config.offline)
}

#[cfg(feature = "hub")]
fn fetch_repository(reference: &RepositoryReference, offline: bool) -> Result<LocalModel, SourceError> {
    let path = hub::fetch(reference, offline)?;
    Ok(LocalModel { path, name: reference.repository.clone() })
}

#[cfg(not(feature = "hub"))]
fn fetch_repository(reference: &RepositoryReference, _offline: bool) -> Result<LocalModel, SourceError> {
    let reason = "this build has no downloads (feature `hub`); give a path".into();
    Err(SourceError::Hub { repository: reference.repository.clone(), reason })
}

/// The file's name without `.gguf`, or the folder's name.
fn name_of(path: &Path) -> String {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    match name.get(name.len().saturating_sub(5)..) {
        Some(end) if end.eq_ignore_ascii_case(".gguf") && name.len() > 5 => name[..name.len() - 5].to_owned(),
        _ => name,
    }
}

/// `cache-dir`, else `$XDG_CACHE_HOME/locket`, else `~/.cache/locket`.
fn cache_dir(config: &Config) -> Result<PathBuf, SourceError> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    config
        .cache_dir
        .clone()
        .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("locket")))
        .or_else(|| absolute("HOME").map(|path| path.join(".cache").join("locket")))
        .ok_or_else(|| {
            SourceError::DefaultModel("there is no home folder; set cache-dir or give a path".into())
        })
}

/// `org/name[:file-or-quantisation]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryReference {
    /// `org/name`.
    pub repository: String,
    /// A file of it, or a part of one's name such as `Q4_K_M`.
    pub selector: Option<String>,
}

impl RepositoryReference {
    /// Reads a reference; `None` if it is not shaped like one.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, selector) = match text.split_once(':') {
            Some((_, "")) => return None,
            Some((repository, selector)) => (repository, Some(selector.to_owned())),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        (plain(owner) && plain(name)).then(|| Self { repository: repository.to_owned(), selector })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    #[test]
    fn references() {
        let parse = RepositoryReference::parse;
        assert_eq!(parse("a/b").map(|r| (r.repository, r.selector)), Some(("a/b".into(), None)));
        assert_eq!(parse("a/b-1.0:Q4_K_M").unwrap().selector.as_deref(), Some("Q4_K_M"));
        for wrong in ["a", "a/b/c", "./b", "../b", "a/", "/a", "a/b:", "a b/c", "http://x/y"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_path_wins_and_names_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("Tiny.Q4_1.GGUF");
        std::fs::write(&file, b"x").unwrap();
        let mut config = Config::load(&Sources::default()).unwrap();
        config.model = Some(file.to_string_lossy().into());
        assert_eq!(locate(&config).unwrap(), LocalModel { path: file, name: "Tiny.Q4_1".into() });
        config.model = Some(folder.path().join("none.gguf").to_string_lossy().into());
        assert!(matches!(locate(&config), Err(SourceError::NotFound(_))));
    }
}
