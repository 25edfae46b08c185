//! What happens once, before the threads start: taking the directory and looking at what is in it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    time::SystemTime,
};

use super::{FileFacts, SUFFIX, Shared, TEMPORARY_SUFFIX};
use crate::snapshots::file::{self, Refusal};

/// Makes the directory if need be, and takes its lock.
pub(super) fn take_directory(directory: &Path) -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mode = fs::metadata(directory)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        let mode = format!("{mode:o}");
        tracing::warn!(directory = %directory.display(), mode, "others may list the snapshots' directory");
    }
    let options = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).to_owned();
    let lock = options.open(directory.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::Error(error)) => Err(error),
        Err(fs::TryLockError::WouldBlock) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "another server uses it"))
        }
    }
}

impl Shared {
    /// Start: sweeps what is unfinished, indexes what is whole, and keeps to the bound.
    pub(super) fn scan(&self) -> io::Result<()> {
        let mut found: Vec<(SystemTime, file::Header, u64)> = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let has_suffix = |suffix| path.extension().is_some_and(|extension| extension == suffix);
            if has_suffix(TEMPORARY_SUFFIX) && path.with_extension("").extension() == Some(SUFFIX.as_ref()) {
                self.delete(&path);
            }
            if !has_suffix(SUFFIX) {
                continue;
            }
            match file::read_header(&path, &self.fingerprint) {
                // A renamed file would be looked for under another name.
                Ok(header) if self.path(&header.key) != path => {
                    self.refuse(&path, &Refusal::Foreign("its name is not its key's"));
                }
                Ok(header) => {
                    let facts = fs::metadata(&path)?;
                    let used = facts.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    found.push((used, header, facts.len()));
                }
                Err(refusal) => self.refuse(&path, &refusal),
            }
        }
        found.sort_by_key(|entry| entry.0);
        let mut index = self.index();
        for (_, header, bytes) in found {
            index.insert(&header.key, FileFacts { bytes, image_len: header.image_len });
        }
        self.tell(&index);
        tracing::info!(
            directory = %self.directory.display(),
            files = index.files.len(),
            bytes = index.bytes,
            "snapshots on disk"
        );
        drop(index);
        self.shrink_to(self.bound);
        Ok(())
    }
}
