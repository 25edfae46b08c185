//! Key-value pairs of a header.

use std::collections::HashMap;

use super::cursor::{Cursor, shown};
use crate::Error;

pub(super) const MAX_KEY_BYTES: usize = 65_535;
pub(super) const MAX_ARRAY_DEPTH: usize = 4;

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
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
    pub(super) fn from_code(code: u32) -> Result<Self, String> {
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
    pub(super) fn min_bytes(self, wide: bool) -> usize {
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
        let mut cursor = Cursor::new(self.bytes, self.wide);
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
    pub(super) entries: HashMap<&'a str, Value<'a>>,
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

/// Reads `num_keys` key-value pairs.
///
/// # Errors
/// The reason for an [`Error::BrokenFile`].
pub(super) fn read<'a>(cursor: &mut Cursor<'a>, num_keys: u64) -> Result<Metadata<'a>, String> {
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
            let bytes = cursor.take(scalar.min_bytes(cursor.is_wide()), "a number")?;
            scalar.scalar(bytes)
        }
    }
}

fn read_array<'a>(cursor: &mut Cursor<'a>) -> Result<Array<'a>, String> {
    let element = Kind::from_code(cursor.u32("an array's element type")?)?;
    let len = cursor.array_len(element)?;
    let start = cursor.at();
    skip_elements(cursor, element, len, 1)?;
    Ok(Array { element, len, bytes: cursor.since(start), wide: cursor.is_wide() })
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
            let bytes = len.checked_mul(scalar.min_bytes(cursor.is_wide())).ok_or("an array is too long")?;
            cursor.take(bytes, "an array")?;
        }
    }
    Ok(())
}
