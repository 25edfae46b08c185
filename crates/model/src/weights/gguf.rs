//! The header of a GGUF file, versions 1 to 3, little-endian.
//!
//! Layout after the GGUF specification (github.com/ggml-org/ggml, `docs/gguf.md`). The header is
//! untrusted: the reader borrows from the mapped file and allocates only one table entry per key
//! and tensor, each of which occupies more than a dozen bytes of the file.

use std::collections::{BTreeMap, HashMap};

use super::{BlockType, StoredType, TensorInfo};
use crate::Error;

/// More keys or tensors than this are not believed; the largest published models have about 1,200
/// tensors and 60 keys.
const MAX_ENTRIES: u64 = 100_000;
const MAX_KEY_BYTES: usize = 65_535;
const MAX_TENSOR_NAME_BYTES: usize = 256;
const MAX_DIMS: u32 = 4;
const MAX_ARRAY_DEPTH: usize = 4;
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
/// The reason for an [`Error::BrokenFile`].
pub(crate) fn parse(bytes: &[u8]) -> Result<Header<'_>, String> {
    let mut cursor = Cursor { bytes, at: 0, wide: true };
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err("it does not start with `GGUF`".into());
    }
    let version = cursor.u32("the version")?;
    match version {
        1 => cursor.wide = false,
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err("it is big-endian; only little-endian files are supported".into());
        }
        _ => return Err(format!("version {version} is unknown; known are 1, 2, 3")),
    }
    let num_tensors = cursor.count("tensors")?;
    let num_keys = cursor.count("metadata keys")?;
    let metadata = read_metadata(&mut cursor, num_keys)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = BTreeMap::new();
    for idx in 0..num_tensors {
        let (name, info) = read_tensor(&mut cursor, alignment).map_err(|e| format!("tensor {idx}: {e}"))?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("tensor {name:?} is listed twice"));
        }
    }
    let header_bytes = cursor.at;
    let data_start = header_bytes.checked_next_multiple_of(alignment).ok_or("the header is too long")?;
    place(&mut tensors, data_start, bytes.len())?;
    Ok(Header { metadata, tensors, header_bytes })
}

fn read_metadata<'a>(cursor: &mut Cursor<'a>, num_keys: u64) -> Result<Metadata<'a>, String> {
    let mut entries = HashMap::new();
    for idx in 0..num_keys {
        let key = cursor.string("a key").map_err(|e| format!("metadata key {idx}: {e}"))?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(format!(
                "metadata key {idx} has {} bytes; 1 to {MAX_KEY_BYTES} are allowed",
                key.len()
            ));
        }
        let value = read_value(cursor).map_err(|e| format!("value of {}: {e}", shown(key)))?;
        if entries.insert(key, value).is_some() {
            return Err(format!("metadata key {} is given twice", shown(key)));
        }
    }
    Ok(Metadata { entries })
}

fn read_value<'a>(cursor: &mut Cursor<'a>) -> Result<Value<'a>, String> {
    let kind = Kind::from_code(cursor.u32("a value's type")?)?;
    match kind {
        Kind::String => Ok(Value::String(cursor.string("a text")?)),
        Kind::Array => read_array(cursor).map(Value::Array),
        scalar => {
            let bytes = cursor.take(scalar.min_bytes(cursor.wide), "a number")?;
            scalar.scalar(bytes)
        }
    }
}

fn read_array<'a>(cursor: &mut Cursor<'a>) -> Result<Array<'a>, String> {
    let element = Kind::from_code(cursor.u32("an array's element type")?)?;
    let len = cursor.array_len(element)?;
    let start = cursor.at;
    skip_elements(cursor, element, len, 1)?;
    Ok(Array { element, len, bytes: &cursor.bytes[start..cursor.at], wide: cursor.wide })
}

/// Walks over an array's elements; each step consumes at least one byte of the file.
fn skip_elements(cursor: &mut Cursor<'_>, element: Kind, len: usize, depth: usize) -> Result<(), String> {
    match element {
        Kind::String => {
            for _ in 0..len {
                let bytes = cursor.length("a text's length")?;
                cursor.take(bytes, "a text")?;
            }
        }
        Kind::Array if depth >= MAX_ARRAY_DEPTH => {
            return Err(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep"));
        }
        Kind::Array => {
            for _ in 0..len {
                let inner = Kind::from_code(cursor.u32("an array's element type")?)?;
                let inner_len = cursor.array_len(inner)?;
                skip_elements(cursor, inner, inner_len, depth + 1)?;
            }
        }
        scalar => {
            let bytes = len.checked_mul(scalar.min_bytes(cursor.wide)).ok_or("an array is too long")?;
            cursor.take(bytes, "an array")?;
        }
    }
    Ok(())
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
            let known = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K to Q6_K, Q8_K";
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

/// A name as messages show it: escaped and short.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    format!("{short:?}")
}

/// A position in the file; every read is checked against its end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Lengths are u64 (versions 2 and 3) instead of u32.
    wide: bool,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(format!(
                "{what} of {len} bytes at byte {} passes the end of the file at {}",
                self.at,
                self.bytes.len()
            ));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn wide_number(&mut self, what: &str) -> Result<u64, String> {
        if self.wide { self.u64(what) } else { self.u32(what).map(u64::from) }
    }

    fn length(&mut self, what: &str) -> Result<usize, String> {
        let length = self.wide_number(what)?;
        usize::try_from(length).map_err(|_| format!("{what} is {length}, which cannot be addressed"))
    }

    fn count(&mut self, what: &str) -> Result<u64, String> {
        let count = self.wide_number(&format!("the number of {what}"))?;
        if count > MAX_ENTRIES {
            return Err(format!("it claims {count} {what}; at most {MAX_ENTRIES} are believed"));
        }
        Ok(count)
    }

    fn array_len(&mut self, element: Kind) -> Result<usize, String> {
        let len = self.length("an array's length")?;
        let left = self.bytes.len() - self.at;
        if len > left / element.min_bytes(self.wide) {
            return Err(format!("an array claims {len} elements, more than the {left} bytes left can hold"));
        }
        Ok(len)
    }

    fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let len = self.length("a text's length")?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| format!("{what} is not UTF-8: {e}"))
    }
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_code(code: u32) -> Result<Self, String> {
        const ALL: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::String,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        let kind = usize::try_from(code).ok().and_then(|idx| ALL.get(idx));
        kind.copied().ok_or_else(|| format!("value type {code} is unknown; known are 0 to 12"))
    }

    /// Bytes of a number, or the fewest bytes of a text or array.
    fn min_bytes(self, wide: bool) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
            Self::String if wide => 8,
            Self::String => 4,
            Self::Array if wide => 12,
            Self::Array => 8,
        }
    }

    /// Decodes a number of [`Self::min_bytes`] bytes.
    fn scalar(self, bytes: &[u8]) -> Result<Value<'static>, String> {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        Ok(match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Unsigned(unsigned),
            Self::I8 => Value::Signed(i64::from(unsigned as u8 as i8)),
            Self::I16 => Value::Signed(i64::from(unsigned as u16 as i16)),
            Self::I32 => Value::Signed(i64::from(unsigned as u32 as i32)),
            Self::I64 => Value::Signed(unsigned as i64),
            Self::F32 => Value::Float(f64::from(f32::from_bits(unsigned as u32))),
            Self::F64 => Value::Float(f64::from_bits(unsigned)),
            Self::Bool if unsigned <= 1 => Value::Bool(unsigned == 1),
            Self::Bool => return Err(format!("a truth value is {unsigned}; it must be 0 or 1")),
            Self::String | Self::Array => return Err("a text or array is not a number".into()),
        })
    }
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    String(&'a str),
    /// An array, decoded on demand.
    Array(Array<'a>),
}

impl Value<'_> {
    fn as_whole(&self) -> Option<i128> {
        match *self {
            Self::Unsigned(value) => Some(value.into()),
            Self::Signed(value) => Some(value.into()),
            _ => None,
        }
    }

    fn as_float(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            _ => self.as_whole().map(|value| value as f64),
        }
    }
}

/// An array whose elements have been walked over once, so that they lie inside the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Array<'a> {
    element: Kind,
    len: usize,
    bytes: &'a [u8],
    wide: bool,
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The elements of an array of texts.
    ///
    /// # Errors
    /// [`Error::Config`] with `key` if it holds something else, or text that is not UTF-8.
    pub(crate) fn strings(&self, key: &str) -> Result<Vec<String>, Error> {
        if self.element != Kind::String {
            return Err(wrong(key, "must be an array of texts"));
        }
        let mut cursor = Cursor { bytes: self.bytes, at: 0, wide: self.wide };
        (0..self.len)
            .map(|idx| {
                cursor
                    .string("a text")
                    .map(str::to_owned)
                    .map_err(|e| wrong(key, format!("entry {idx}: {e}")))
            })
            .collect()
    }

    /// The elements of an array of whole numbers.
    ///
    /// # Errors
    /// [`Error::Config`] with `key` if it holds something else.
    pub(crate) fn whole_numbers(&self, key: &str) -> Result<Vec<i64>, Error> {
        let whole = |value: Value<'_>| value.as_whole().and_then(|value| i64::try_from(value).ok());
        self.numbers(key, whole, "must be an array of whole numbers")
    }

    /// The elements of an array of numbers.
    ///
    /// # Errors
    /// [`Error::Config`] with `key` if it holds something else.
    pub(crate) fn floats(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.numbers(key, |value| value.as_float().map(|value| value as f32), "must be an array of numbers")
    }

    fn numbers<T>(
        &self,
        key: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
        expected: &str,
    ) -> Result<Vec<T>, Error> {
        if matches!(self.element, Kind::String | Kind::Array) {
            return Err(wrong(key, expected));
        }
        let chunks = self.bytes.chunks_exact(self.element.min_bytes(self.wide));
        let value =
            |bytes| self.element.scalar(bytes).ok().and_then(&convert).ok_or_else(|| wrong(key, expected));
        chunks.map(value).collect()
    }
}

/// All key-value pairs, with typed access.
#[derive(Debug, Default)]
pub(crate) struct Metadata<'a> {
    entries: HashMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    /// The value of `key`.
    pub(crate) fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.entries.get(key)
    }

    /// A text.
    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong(key, "must be a text")),
        }
    }

    /// A truth value.
    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(wrong(key, "must be true or false")),
        }
    }

    /// A whole number that is not negative.
    pub(crate) fn usize(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let whole = value.as_whole().and_then(|value| usize::try_from(value).ok());
        whole.map(Some).ok_or_else(|| wrong(key, "must be a whole number, 0 or above"))
    }

    /// A token id.
    pub(crate) fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = self.usize(key)? else { return Ok(None) };
        u32::try_from(value).map(Some).map_err(|_| wrong(key, format!("{value} is too large")))
    }

    /// A finite number.
    pub(crate) fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_float().map(|value| value as f32).filter(|value| value.is_finite());
        number.map(Some).ok_or_else(|| wrong(key, "must be a finite number"))
    }

    /// An array.
    pub(crate) fn array(&self, key: &str) -> Result<Option<Array<'a>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(*array)),
            Some(_) => Err(wrong(key, "must be an array")),
        }
    }
}

fn wrong(key: &str, reason: impl Into<String>) -> Error {
    Error::Config { field: key.to_owned(), reason: reason.into() }
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
