//! The header of a GGUF file, versions 1 to 3, little-endian.
//!
//! Layout after the GGUF specification (github.com/ggml-org/ggml, `docs/gguf.md`). The header is
//! untrusted: the reader borrows from the mapped file and allocates only one table entry per key
//! and tensor, each of which occupies more than a dozen bytes of the file.

mod cursor;
mod metadata;

use std::collections::BTreeMap;

use super::{BlockType, StoredType, TensorInfo};
use cursor::{Cursor, shown};
pub(crate) use metadata::{Metadata, Value};

const MAX_TENSOR_NAME_BYTES: usize = 256;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: usize = 32;

/// A parsed header; borrows from the file's bytes.
#[derive(Debug)]
pub(crate) struct Header<'a> {
    /// Key-value pairs.
    pub metadata: Metadata<'a>,
    /// Every tensor, its place checked to be inside the file and to overlap no other.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// Bytes before the tensor data.
    pub header_bytes: usize,
}

/// Reads and checks the header of the file `bytes`.
///
/// # Errors
/// The reason for an [`Error::BrokenFile`](crate::Error::BrokenFile).
pub(crate) fn parse(bytes: &[u8]) -> Result<Header<'_>, String> {
    let mut cursor = Cursor::new(bytes, true);
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err("it does not start with `GGUF`".into());
    }
    let version = cursor.u32("the version")?;
    match version {
        1 => cursor = cursor.narrow(),
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err("it is big-endian; only little-endian files are supported".into());
        }
        _ => return Err(format!("version {version} is unknown; known are 1, 2, 3")),
    }
    let num_tensors = cursor.count("tensors")?;
    let num_keys = cursor.count("metadata keys")?;
    let metadata = metadata::read(&mut cursor, num_keys)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = BTreeMap::new();
    for idx in 0..num_tensors {
        let (name, info) = read_tensor(&mut cursor, alignment).map_err(|e| format!("tensor {idx}: {e}"))?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("tensor {name:?} is listed twice"));
        }
    }
    let header_bytes = cursor.at();
    let data_start = header_bytes.checked_next_multiple_of(alignment).ok_or("the header is too long")?;
    place(&mut tensors, data_start, bytes.len())?;
    Ok(Header { metadata, tensors, header_bytes })
}

fn alignment(metadata: &Metadata<'_>) -> Result<usize, String> {
    let alignment = match metadata.get("general.alignment") {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(alignment)) => *alignment,
        Some(_) => return Err("general.alignment is not an unsigned number".into()),
    };
    // The specification asks for a multiple of 8; every reader assumes a power of two.
    if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
        return Err(format!("general.alignment is {alignment}; it must be a power of two from 8 to 1048576"));
    }
    usize::try_from(alignment).map_err(|e| e.to_string())
}

/// One entry of the tensor table. `start` is still relative to the data section.
fn read_tensor(cursor: &mut Cursor<'_>, alignment: usize) -> Result<(String, TensorInfo), String> {
    let name = cursor.string("its name")?;
    if name.is_empty() || name.len() > MAX_TENSOR_NAME_BYTES {
        return Err(format!("its name has {} bytes; 1 to {MAX_TENSOR_NAME_BYTES} are allowed", name.len()));
    }
    let of = |reason: String| format!("{}: {reason}", shown(name));
    let num_dims = cursor.u32("its number of dimensions")?;
    if !(1..=MAX_DIMS).contains(&num_dims) {
        return Err(of(format!("{num_dims} dimensions; 1 to {MAX_DIMS} are allowed")));
    }
    let mut shape = Vec::with_capacity(num_dims as usize);
    let mut elements = 1usize;
    for _ in 0..num_dims {
        let dim = cursor.length("a dimension")?;
        elements = elements.checked_mul(dim).ok_or_else(|| of("its dimensions overflow".into()))?;
        shape.push(dim);
    }
    if elements == 0 {
        return Err(of(format!("has an empty dimension: {shape:?}")));
    }
    let stored = stored_type(cursor.u32("its type")?).map_err(of)?;
    let (block_numbers, block_bytes) = stored.block().ok_or_else(|| of("its type has no size".into()))?;
    // GGUF lists the fastest dimension first; blocks lie along it.
    if !shape[0].is_multiple_of(block_numbers) {
        let kind = stored.name();
        return Err(of(format!("rows of {} are not whole {kind} blocks of {block_numbers}", shape[0])));
    }
    shape.reverse();
    let len = (elements / block_numbers).checked_mul(block_bytes);
    let len = len.ok_or_else(|| of("its size overflows".into()))?;
    let offset = cursor.u64("its offset")?;
    let start = usize::try_from(offset).map_err(|_| of(format!("its offset {offset} is too large")))?;
    if !start.is_multiple_of(alignment) {
        return Err(of(format!("its offset {start} is not a multiple of the alignment {alignment}")));
    }
    Ok((name.to_owned(), TensorInfo { shape, stored, file_idx: 0, start, len }))
}

fn stored_type(code: u32) -> Result<StoredType, String> {
    match code {
        0 => Ok(StoredType::F32),
        1 => Ok(StoredType::F16),
        30 => Ok(StoredType::Bf16),
        _ => BlockType::from_code(code).map(StoredType::Quantized).ok_or_else(|| {
            let known = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K";
            format!("type {code} cannot be read here; known are {known}")
        }),
    }
}

/// Turns relative offsets into absolute ones, and refuses what leaves the file or overlaps.
fn place(
    tensors: &mut BTreeMap<String, TensorInfo>,
    data_start: usize,
    file_len: usize,
) -> Result<(), String> {
    let mut spans = Vec::with_capacity(tensors.len());
    for (name, info) in tensors.iter_mut() {
        let start = info.start.checked_add(data_start);
        let end = start.and_then(|start| start.checked_add(info.len)).filter(|&end| end <= file_len);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!(
                "tensor {name:?} needs {} bytes at offset {} of the data, but the file ends after {} of it \
                 (a truncated download?)",
                info.len,
                info.start,
                file_len.saturating_sub(data_start)
            ));
        };
        info.start = start;
        spans.push((start, end, name.as_str()));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].1 > pair[1].0 {
            return Err(format!("tensors {:?} and {:?} overlap", pair[0].2, pair[1].2));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
