//! Weight files: mapped, their headers checked, tensors handed out one at a time.
//!
//! Nothing here trusts a length that the file states: every count, size and offset is compared with
//! the bytes that are there before it is used, and no allocation is larger than a small multiple of
//! the file. [`gguf`] and [`safetensors`] read headers; [`names`] knows which tensors a
//! [`ModelConfig`] needs.

pub(crate) mod gguf;
pub(crate) mod names;
pub(crate) mod safetensors;
mod tensor_files;

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml},
};
use memmap2::Mmap;

use crate::{Error, ModelConfig, ops::RawTensor};
use names::{Naming, Part};
pub use tensor_files::{TensorFiles, TensorView};

/// A weight file in the address space.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps `path` for reading.
    #[expect(unsafe_code, reason = "mapping a file is unsafe; see the paragraph below")]
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(failed(source));
        }
        // SAFETY: the mapping is private and read-only, and it is only ever seen as bytes and as
        // plain numbers, for which every bit pattern is valid, so what a file contains cannot break
        // memory safety. What could is a file that shrinks or changes while it is mapped. locket
        // never writes to a weight file in place: its cache renames complete files into position,
        // which leaves a mapped one intact. That no other program truncates or rewrites the file
        // during loading is required of the operator, as every server that maps weights does; the
        // window is short, because the mapping is dropped with the `Checkpoint`, after `build` has
        // copied each tensor out of it.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// An error that this file is not a sound `format`.
    pub(crate) fn broken(&self, format: &'static str, reason: impl Into<String>) -> Error {
        Error::BrokenFile { path: self.path.clone(), format, reason: reason.into() }
    }
}

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StoredType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// A GGUF block format.
    Quantized(BlockType),
    /// A safetensors type that no weight of ours may have (integers, 8-bit floats, …).
    Other(&'static str),
}

impl StoredType {
    /// The name that `inspect` and the logs show.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quantized(block) => block.name,
            Self::Other(name) => name,
        }
    }

    /// `(numbers, bytes)` of one block; plain types have blocks of one number.
    pub(crate) fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::Bf16 => Some((1, 2)),
            Self::Quantized(block) => Some((block.dtype().block_size(), block.dtype().type_size())),
            Self::Other(_) => None,
        }
    }
}

/// A GGUF block format that candle reads. `Q8_1` and `Q8_K` are not among them: they are forms of
/// activations during a product, and no published weights have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockType {
    /// The format's number in a GGUF file.
    code: u32,
    name: &'static str,
}

impl BlockType {
    const ALL: [(Self, GgmlDType); 10] = [
        (Self { code: 2, name: "Q4_0" }, GgmlDType::Q4_0),
        (Self { code: 3, name: "Q4_1" }, GgmlDType::Q4_1),
        (Self { code: 6, name: "Q5_0" }, GgmlDType::Q5_0),
        (Self { code: 7, name: "Q5_1" }, GgmlDType::Q5_1),
        (Self { code: 8, name: "Q8_0" }, GgmlDType::Q8_0),
        (Self { code: 10, name: "Q2_K" }, GgmlDType::Q2K),
        (Self { code: 11, name: "Q3_K" }, GgmlDType::Q3K),
        (Self { code: 12, name: "Q4_K" }, GgmlDType::Q4K),
        (Self { code: 13, name: "Q5_K" }, GgmlDType::Q5K),
        (Self { code: 14, name: "Q6_K" }, GgmlDType::Q6K),
    ];

    /// The format with this number in a GGUF file.
    pub(crate) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().map(|(block, _)| block).find(|block| block.code == code)
    }

    /// candle's name for it.
    pub(crate) fn dtype(self) -> GgmlDType {
        let found = Self::ALL.into_iter().find(|(block, _)| *block == self);
        found.expect("block types are only made from the table").1
    }
}

/// One tensor's place in the files, its bounds checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    /// `[rows, columns]` or `[width]`, row-major.
    pub shape: Vec<usize>,
    /// Number format.
    pub stored: StoredType,
    /// Index of the file.
    pub file_idx: usize,
    /// First byte in the file.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// All files of a checkpoint and the tensors in them.
pub(crate) struct WeightFiles {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl std::fmt::Debug for WeightFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<_> = self.files.iter().map(MappedFile::path).collect();
        f.debug_struct("WeightFiles").field("paths", &paths).field("tensors", &self.tensors.len()).finish()
    }
}

impl WeightFiles {
    /// Joins files and the tensors that their headers list.
    pub(crate) fn new(files: Vec<MappedFile>, tensors: BTreeMap<String, TensorInfo>) -> Self {
        Self { files, tensors }
    }

    /// The files, in the order in which they were opened.
    pub(crate) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// The tensor's place, if it exists.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Bytes of all tensors as stored.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.len as u64).sum()
    }

    /// The stored type that most matrices have; of equally frequent ones the first by name.
    pub(crate) fn most_frequent_type(&self) -> &'static str {
        let mut counts = BTreeMap::<&'static str, usize>::new();
        for info in self.tensors.values().filter(|info| info.shape.len() == 2) {
            *counts.entry(info.stored.name()).or_default() += 1;
        }
        counts
            .into_iter()
            .max_by_key(|&(name, count)| (count, std::cmp::Reverse(name)))
            .map_or("f32", |(name, _)| name)
    }

    /// Compares every tensor that `config` needs with what the files hold, and warns of the rest.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the file's name of the tensor and the expected shape.
    pub(crate) fn check(&self, config: &ModelConfig, naming: Naming) -> Result<(), Error> {
        let mut num_used = 0;
        names::for_each(config, |part, layer| {
            let name = part.name(naming, layer);
            self.check_one(&name, part, config)?;
            num_used += 1;
            Ok(())
        })?;
        if num_used < self.tensors.len() {
            self.warn_of_leftovers(config, naming);
        }
        Ok(())
    }

    fn check_one(&self, name: &str, part: Part, config: &ModelConfig) -> Result<(), Error> {
        let wrong = |reason| Error::Tensor { name: name.to_owned(), reason };
        let expected = part.shape(config);
        let Some(info) = self.tensors.get(name) else {
            return Err(wrong(format!("is missing; the configuration asks for shape {expected:?}")));
        };
        if info.shape != expected {
            return Err(wrong(format!(
                "has shape {:?}; the configuration asks for {expected:?} (outputs first)",
                info.shape
            )));
        }
        match info.stored {
            StoredType::F32 | StoredType::F16 | StoredType::Bf16 => Ok(()),
            StoredType::Quantized(_) if expected.len() == 2 => Ok(()),
            StoredType::Quantized(block) => {
                let name = block.name;
                Err(wrong(format!(
                    "is stored as {name}; norms and biases of shape {expected:?} must be f32, f16 or bf16"
                )))
            }
            StoredType::Other(kind) => {
                Err(wrong(format!("of shape {expected:?} is stored as {kind}; supported are f32, f16, bf16")))
            }
        }
    }

    fn warn_of_leftovers(&self, config: &ModelConfig, naming: Naming) {
        let mut used = std::collections::BTreeSet::new();
        let collected = names::for_each(config, |part, layer| {
            used.insert(part.name(naming, layer));
            Ok(())
        });
        debug_assert!(collected.is_ok(), "the closure never fails");
        let unused = |name: &&String| !used.contains(*name) && !naming.is_known_leftover(name);
        let leftovers: Vec<_> = self.tensors.keys().filter(unused).collect();
        if !leftovers.is_empty() {
            let first = &leftovers[..leftovers.len().min(5)];
            tracing::warn!(
                count = leftovers.len(),
                ?first,
                "the file has tensors that this model does not use"
            );
        }
    }

    /// Copies a tensor out of the mapping, still in its stored type, on the CPU.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none of this name, [`Error::Device`] from the tensor library.
    pub(crate) fn load(&self, name: &str) -> Result<RawTensor, Error> {
        let wrong = |reason: &str| Error::Tensor { name: name.to_owned(), reason: reason.to_owned() };
        let info = self.tensors.get(name).ok_or_else(|| wrong("is missing"))?;
        let file = self.files.get(info.file_idx).ok_or_else(|| wrong("is in an unknown file"))?;
        let bytes = info.start.checked_add(info.len).and_then(|end| file.bytes().get(info.start..end));
        let bytes = bytes.ok_or_else(|| wrong("lies outside of its file"))?;
        let dense = |dtype| {
            Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu)
                .map(RawTensor::Dense)
                .map_err(Error::from)
        };
        match info.stored {
            StoredType::F32 => dense(DType::F32),
            StoredType::F16 => dense(DType::F16),
            StoredType::Bf16 => dense(DType::BF16),
            StoredType::Quantized(block) => {
                let tensor: QTensor =
                    qtensor_from_ggml(block.dtype(), bytes, info.shape.clone(), &Device::Cpu)?;
                Ok(RawTensor::Quantized(tensor.into()))
            }
            StoredType::Other(_) => Err(wrong("has a type that is not supported")),
        }
    }

    /// A norm, bias or list of factors as f32 `[width]`.
    ///
    /// # Errors
    /// As [`Self::load`], and [`Error::Tensor`] if it is stored in a block format.
    pub(crate) fn load_vector(&self, name: &str) -> Result<Tensor, Error> {
        match self.load(name)? {
            RawTensor::Dense(tensor) => Ok(tensor.to_dtype(DType::F32)?),
            RawTensor::Quantized(_) => {
                let reason = "is stored in a block format; it must be f32, f16 or bf16".to_owned();
                Err(Error::Tensor { name: name.to_owned(), reason })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gguf::GgufFile;

    #[test]
    fn every_type_of_the_table_loads() {
        let numbers: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut file = GgufFile::empty();
        for (block, dtype) in BlockType::ALL {
            file.push_numbers(block.name, &[2, 256], &numbers, dtype);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        let tensors = gguf::parse(mapped.bytes()).unwrap().tensors;
        let files = WeightFiles::new(vec![mapped], tensors);
        for (block, dtype) in BlockType::ALL {
            let RawTensor::Quantized(tensor) = files.load(block.name).unwrap() else { unreachable!() };
            assert_eq!((tensor.dtype(), tensor.shape().dims()), (dtype, &[2, 256][..]));
            let wide = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
            let squares = wide.to_vec1::<f32>().unwrap().into_iter().zip(&numbers);
            let error = squares.map(|(x, y)| (x - y).powi(2)).sum::<f32>() / 512.0;
            // Two bits, the coarsest, are worth a step of 2/3.
            assert!(error < 0.04, "{}: mean square error {error}", block.name);
        }
    }
}
