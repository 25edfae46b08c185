//! Safetensors files, single or sharded.
//!
//! The format's own crate bounds the header's length by the file and checks that the tensors tile
//! the data section exactly, with sizes computed without overflow. Here: which files, their names,
//! and that no tensor is in two of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use ::safetensors::{Dtype, SafeTensors};

use super::{MappedFile, StoredType, TensorInfo, WeightFiles};
use crate::{Error, load::read_json};

pub(super) const FORMAT: &str = "safetensors";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest published checkpoints have fewer than 200 shards.
const MAX_SHARDS: usize = 1024;

/// Opens the weights of the folder: `model.safetensors`, or the shards that the index lists.
/// Returns also the bytes of each header, for the fingerprint.
///
/// # Errors
/// [`Error::Io`] and [`Error::BrokenFile`].
pub(crate) fn open(folder: &Path) -> Result<(WeightFiles, Vec<usize>), Error> {
    let index = folder.join(INDEX);
    let (paths, index) = if index.is_file() {
        let weight_map = weight_map(&index)?;
        let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        (names.into_iter().map(|name| folder.join(name)).collect(), Some(weight_map))
    } else {
        (vec![folder.join(SINGLE)], None)
    };
    let mut files = Vec::with_capacity(paths.len());
    let mut header_bytes = Vec::with_capacity(paths.len());
    let mut tensors = BTreeMap::new();
    for path in paths {
        let file = MappedFile::open(&path)?;
        header_bytes.push(read_header(&file, files.len(), &mut tensors)?);
        files.push(file);
    }
    if let Some(weight_map) = index {
        check_index(folder, &weight_map, &files, &tensors)?;
    }
    Ok((WeightFiles::new(files, tensors), header_bytes))
}

/// Adds the file's tensors to `tensors`; returns the length of its header.
pub(super) fn read_header(
    file: &MappedFile,
    file_idx: usize,
    tensors: &mut BTreeMap<String, TensorInfo>,
) -> Result<usize, Error> {
    let (json_bytes, metadata) =
        SafeTensors::read_metadata(file.bytes()).map_err(|e| file.broken(FORMAT, e.to_string()))?;
    // Eight bytes of length come before the JSON header.
    let data_start = json_bytes + 8;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let info = TensorInfo {
            shape: info.shape.clone(),
            stored: stored_type(info.dtype),
            file_idx,
            start: data_start + start,
            len: end - start,
        };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(file.broken(FORMAT, format!("tensor {name:?} is also in another shard")));
        }
    }
    Ok(data_start)
}

fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::BF16 => StoredType::Bf16,
        Dtype::I8 => StoredType::Other("i8"),
        Dtype::F64 => StoredType::Other("f64"),
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => StoredType::Other("an 8-bit float"),
        _ => StoredType::Other("an integer or unusual type"),
    }
}

/// The index's `tensor → file` table, its file names checked to stay inside the folder.
fn weight_map(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let broken = |reason: String| Error::BrokenFile { path: path.to_owned(), format: INDEX, reason };
    let index = read_json(path, INDEX)?;
    let map = index.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| broken("it has no object `weight_map`".into()))?;
    let mut weight_map = BTreeMap::new();
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| broken(format!("the file of tensor {tensor:?} is not a text")))?;
        let is_plain = Path::new(file).file_name().is_some_and(|name| name == file) && !file.contains('\\');
        if !is_plain || !file.ends_with(".safetensors") {
            return Err(broken(format!("{file:?} is not the name of a .safetensors file in this folder")));
        }
        weight_map.insert(tensor.clone(), file.to_owned());
    }
    let num_shards = weight_map.values().collect::<BTreeSet<_>>().len();
    if num_shards == 0 || num_shards > MAX_SHARDS {
        return Err(broken(format!("it lists {num_shards} files; 1 to {MAX_SHARDS} are allowed")));
    }
    Ok(weight_map)
}

/// Every tensor of the index is in the file that it names.
fn check_index(
    folder: &Path,
    weight_map: &BTreeMap<String, String>,
    files: &[MappedFile],
    tensors: &BTreeMap<String, TensorInfo>,
) -> Result<(), Error> {
    for (tensor, file) in weight_map {
        let path: PathBuf = folder.join(file);
        let found = tensors.get(tensor).and_then(|info| files.get(info.file_idx));
        if found.is_none_or(|found| found.path() != path) {
            return Err(Error::Tensor {
                name: tensor.clone(),
                reason: format!("the index says that it is in {file}, but it is not there"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Random damage to a sound file: an error or a table that stays inside the file, never a panic.

    use proptest::prelude::*;

    use super::*;
    use crate::testing::TinyLlama;

    static TINY: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        TinyLlama::default().write(folder.path()).unwrap();
        std::fs::read(folder.path().join(SINGLE)).unwrap()
    });

    fn assert_sound(bytes: &[u8]) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(SINGLE), bytes).unwrap();
        let Ok((weights, _)) = open(folder.path()) else { return };
        for (name, info) in &weights.tensors {
            assert!(info.start.checked_add(info.len).is_some_and(|end| end <= bytes.len()));
            if !matches!(info.stored, StoredType::Other(_)) {
                weights.load(name).unwrap();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn damaged_headers_never_panic(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..4),
            cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
        ) {
            let mut bytes = TINY.clone();
            for (at, value) in flips {
                bytes[at.index(2000)] = value;
            }
            // Digits replaced by digits keep the JSON sound and make the numbers lie.
            let digit_places: Vec<_> = (8..2000).filter(|&at| bytes[at].is_ascii_digit()).collect();
            for (at, digit) in digits.into_iter().filter(|_| !digit_places.is_empty()) {
                bytes[digit_places[at.index(digit_places.len())]] = digit;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            assert_sound(&bytes);
        }
    }
}
