//! Safetensors files whose tensors are not a decoder's: vision towers, projectors, adapters.

use std::{collections::BTreeMap, path::Path};

use ::safetensors::SafeTensors;

use super::{MappedFile, WeightFiles, safetensors};
use crate::{Error, load::Fingerprint};

/// Mapped files with their headers checked, as open as they are: nothing is expected of the names.
#[derive(Debug)]
pub struct TensorFiles {
    weights: WeightFiles,
    metadata: BTreeMap<String, String>,
    fingerprint: String,
}

/// A tensor in a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// `f32`, `f16`, `bf16`, `i8`, or words for what is none of these.
    pub stored: &'static str,
    /// Row-major.
    pub shape: &'a [usize],
    /// Little-endian; as many as shape and type ask for.
    pub bytes: &'a [u8],
}

impl TensorFiles {
    /// Opens one file, or a folder's `model.safetensors` or the shards that its index lists.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::BrokenFile`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (weights, header_bytes) = if path.is_dir() {
            safetensors::open(path)?
        } else {
            let file = MappedFile::open(path)?;
            let mut tensors = BTreeMap::new();
            let header_bytes = safetensors::read_header(&file, 0, &mut tensors)?;
            (WeightFiles::new(vec![file], tensors), vec![header_bytes])
        };
        let mut metadata = BTreeMap::new();
        let mut fingerprint = Fingerprint::new();
        for (file, header_bytes) in weights.files().iter().zip(header_bytes) {
            fingerprint.add_file(file.bytes(), header_bytes);
            let (_, header) = SafeTensors::read_metadata(file.bytes())
                .map_err(|error| file.broken(safetensors::FORMAT, error.to_string()))?;
            metadata
                .extend(header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        }
        Ok(Self { weights, metadata, fingerprint: fingerprint.hex() })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.tensors.keys().map(String::as_str)
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let info = self.weights.info(name)?;
        let file = self.weights.files().get(info.file_idx)?;
        let bytes = file.bytes().get(info.start..info.start.checked_add(info.len)?)?;
        Some(TensorView { stored: info.stored.name(), shape: &info.shape, bytes })
    }

    /// Texts in the headers.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Hex digest of headers and sizes, as a checkpoint's.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use ::safetensors::{Dtype, serialize_to_file, tensor};

    use super::*;

    #[test]
    fn one_file_with_integers_and_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vision.safetensors");
        let view = tensor::TensorView::new(Dtype::I8, vec![2, 3], &[1, 2, 3, 4, 5, 255]).unwrap();
        let metadata = std::collections::HashMap::from([("kind".to_owned(), "vision".to_owned())]);
        serialize_to_file([("w", view)], Some(metadata), &path).unwrap();
        let files = TensorFiles::open(&path).unwrap();
        assert_eq!(files.names().collect::<Vec<_>>(), ["w"]);
        let view = files.get("w").unwrap();
        assert_eq!((view.stored, view.shape, view.bytes), ("i8", &[2, 3][..], &[1, 2, 3, 4, 5, 255][..]));
        assert_eq!(files.metadata()["kind"], "vision");
        assert!(files.get("v").is_none());
        std::fs::write(&path, b"no header").unwrap();
        assert_eq!(TensorFiles::open(&path).unwrap_err().kind(), "broken_file");
    }
}
