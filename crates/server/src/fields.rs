//! A typed reader over JSON values that knows where it is: every error names the path of the field.
//!
//! Requests are walked in document order, so the first failing field is the one reported. `null`
//! means absent everywhere ([`Field::entries`] skips it), integers count as floats, and floats
//! without a fraction count as integers.

use std::fmt;

use serde_json::{Map, Value};

use crate::error::{ApiError, ErrorKind, clip};

/// Where a value stands in the body; rendered only when there is an error to report.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Path<'p> {
    /// The body itself.
    Root,
    /// A key of an object.
    Key(&'p Path<'p>, &'p str),
    /// An element of an array.
    Index(&'p Path<'p>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Key(Path::Root, name) => write!(out, "{name}"),
            Self::Key(parent, name) => write!(out, "{parent}.{name}"),
            Self::Index(parent, index) => write!(out, "{parent}[{index}]"),
        }
    }
}

/// One value and its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'v, 'p> {
    value: &'v Value,
    path: Path<'p>,
}

impl<'v, 'p> Field<'v, 'p> {
    /// The whole body.
    pub(crate) fn root(value: &'v Value) -> Self {
        Self { value, path: Path::Root }
    }

    /// The value itself.
    pub(crate) fn value(&self) -> &'v Value {
        self.value
    }

    /// Where it is, as sent in `param`.
    pub(crate) fn path(&self) -> String {
        self.path.to_string()
    }

    /// An error of this field.
    pub(crate) fn error(&self, kind: ErrorKind, reason: impl fmt::Display) -> ApiError {
        let path = clip(&self.path());
        if path.is_empty() {
            return ApiError::new(kind, format!("The request body {reason}."));
        }
        ApiError::field(kind, path.clone(), format!("`{path}` {reason}."))
    }

    /// An error of a field that this object lacks.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let path = Path::Key(&self.path, name).to_string();
        let message = format!("`{path}` is required.");
        ApiError::field(ErrorKind::MissingRequiredParameter, path, message)
    }

    /// The refusal of something that the API knows and this server does not offer.
    pub(crate) fn unsupported(&self, reason: &str) -> ApiError {
        self.error(ErrorKind::UnsupportedParameter, format_args!("is not supported: {reason}"))
    }

    fn wrong_type(&self, wanted: &str) -> ApiError {
        let got = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.error(ErrorKind::InvalidType, format_args!("must be {wanted}, but is {got}"))
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&self) -> Result<bool, ApiError> {
        self.value.as_bool().ok_or_else(|| self.wrong_type("a boolean"))
    }

    /// A string.
    pub(crate) fn string(&self) -> Result<&'v str, ApiError> {
        self.value.as_str().ok_or_else(|| self.wrong_type("a string"))
    }

    /// A string of 1 to `max_bytes` bytes.
    pub(crate) fn short_string(&self, max_bytes: usize) -> Result<&'v str, ApiError> {
        let text = self.bounded_string(max_bytes)?;
        if text.is_empty() {
            return Err(self.error(ErrorKind::EmptyString, "must not be empty"));
        }
        Ok(text)
    }

    /// A string of at most `max_bytes` bytes.
    pub(crate) fn bounded_string(&self, max_bytes: usize) -> Result<&'v str, ApiError> {
        let text = self.string()?;
        if text.len() > max_bytes {
            let reason = format!("has {} bytes, but may have at most {max_bytes}", text.len());
            return Err(self.error(ErrorKind::StringAboveMaxLength, reason));
        }
        Ok(text)
    }

    /// One of `allowed`.
    pub(crate) fn one_of(&self, allowed: &[&'static str]) -> Result<&'static str, ApiError> {
        let text = self.string()?;
        allowed.iter().find(|name| **name == text).copied().ok_or_else(|| {
            let reason = format!("is {:?}, but must be one of {}", clip(text), allowed.join(", "));
            self.error(ErrorKind::InvalidValue, reason)
        })
    }

    /// An integer from `min` to `max`, both included.
    pub(crate) fn integer(&self, min: i64, max: i64) -> Result<i64, ApiError> {
        let Value::Number(number) = self.value else { return Err(self.wrong_type("an integer")) };
        let below = || {
            self.error(
                ErrorKind::IntegerBelowMinValue,
                format_args!("is {number}, but must be at least {min}"),
            )
        };
        let above = || {
            self.error(
                ErrorKind::IntegerAboveMaxValue,
                format_args!("is {number}, but must be at most {max}"),
            )
        };
        let value = match (number.as_i64(), number.as_f64()) {
            (Some(value), _) => value,
            // A `u64` above the range of `i64`.
            (None, _) if number.is_u64() => return Err(above()),
            (None, Some(float)) if float.fract() != 0.0 => return Err(self.wrong_type("an integer")),
            (None, Some(float)) if float >= TWO_POW_63 => return Err(above()),
            (None, Some(float)) if float < -TWO_POW_63 => return Err(below()),
            // Exact: the fraction is zero and the range was checked.
            (None, Some(float)) => float as i64,
            (None, None) => return Err(self.wrong_type("an integer")),
        };
        if value < min {
            return Err(below());
        }
        if value > max {
            return Err(above());
        }
        Ok(value)
    }

    /// A non-negative integer from `min` to `max`.
    pub(crate) fn count(&self, min: u32, max: u32) -> Result<u32, ApiError> {
        // In range: both bounds are `u32`.
        self.integer(i64::from(min), i64::from(max)).map(|value| value as u32)
    }

    /// A number from `min` to `max`, both included.
    pub(crate) fn float(&self, min: f64, max: f64) -> Result<f32, ApiError> {
        let number = self.value.as_f64().ok_or_else(|| self.wrong_type("a number"))?;
        if number < min {
            let reason = format!("is {number}, but must be at least {min}");
            return Err(self.error(ErrorKind::DecimalBelowMinValue, reason));
        }
        if number > max {
            let reason = format!("is {number}, but must be at most {max}");
            return Err(self.error(ErrorKind::DecimalAboveMaxValue, reason));
        }
        Ok(number as f32)
    }

    /// An array of at most `max` elements.
    pub(crate) fn array(&self, max: usize) -> Result<&'v [Value], ApiError> {
        let items = self.value.as_array().ok_or_else(|| self.wrong_type("an array"))?;
        if items.len() > max {
            let reason = format!("has {} elements, but may have at most {max}", items.len());
            return Err(self.error(ErrorKind::ArrayAboveMaxLength, reason));
        }
        Ok(items)
    }

    /// An array of 1 to `max` elements.
    pub(crate) fn filled_array(&self, max: usize) -> Result<&'v [Value], ApiError> {
        let items = self.array(max)?;
        if items.is_empty() {
            return Err(self.error(ErrorKind::EmptyArray, "must not be empty"));
        }
        Ok(items)
    }

    /// An object.
    pub(crate) fn object(&self) -> Result<&'v Map<String, Value>, ApiError> {
        self.value.as_object().ok_or_else(|| self.wrong_type("an object"))
    }

    /// Token ids, each below `vocab_size`.
    pub(crate) fn token_ids(&self, max: usize, vocab_size: u32) -> Result<Vec<u32>, ApiError> {
        let last = vocab_size.saturating_sub(1);
        self.each(self.array(max)?, |item| item.count(0, last))
    }

    /// Reads all `items` of this array in order.
    pub(crate) fn each<T>(
        &self,
        items: &'v [Value],
        mut read: impl FnMut(Field<'v, '_>) -> Result<T, ApiError>,
    ) -> Result<Vec<T>, ApiError> {
        items
            .iter()
            .enumerate()
            .map(|(index, value)| read(Field { value, path: Path::Index(&self.path, index) }))
            .collect()
    }

    /// Visits the keys of this object in document order; those with `null` are left out.
    pub(crate) fn entries(
        &self,
        mut read: impl FnMut(&'v str, Field<'v, '_>) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        for (name, value) in self.object()? {
            if !value.is_null() {
                read(name, Field { value, path: Path::Key(&self.path, name) })?;
            }
        }
        Ok(())
    }
}

/// 2^63 as a float: the first value above `i64`.
const TWO_POW_63: f64 = 9_223_372_036_854_775_808.0;

/// Names of fields that the server does not know, for the header `x-ignored-fields`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct IgnoredFields(Vec<String>);

impl IgnoredFields {
    const MAX: usize = 20;
    const MAX_NAME: usize = 64;

    /// Notes a field, if there is room and its name can stand in a header.
    pub(crate) fn push(&mut self, field: &Field<'_, '_>) {
        if self.0.len() >= Self::MAX {
            return;
        }
        let name: String = field
            .path()
            .chars()
            .take(Self::MAX_NAME)
            .map(|c| if c.is_ascii_graphic() && c != ',' { c } else { '?' })
            .collect();
        self.0.push(name);
    }

    /// The header's value, if there is anything to report.
    pub(crate) fn header(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join(","))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at<'v>(value: &'v Value) -> Field<'v, 'static> {
        Field { value, path: Path::Key(&Path::Root, "x") }
    }

    fn kind<T: fmt::Debug>(result: Result<T, ApiError>) -> ErrorKind {
        let error = result.expect_err("must fail");
        assert_eq!(error.param.as_deref(), Some("x"));
        error.kind
    }

    #[test]
    fn integers() {
        for (value, wanted) in
            [(json!(3), 3), (json!(3.0), 3), (json!(-4), -4), (json!(-0.0), 0), (json!(1e3), 1000)]
        {
            assert_eq!(at(&value).integer(-10, 1000).expect("in range"), wanted);
        }
        assert_eq!(at(&json!(i64::MIN)).integer(i64::MIN, i64::MAX).expect("in range"), i64::MIN);
        assert_eq!(at(&json!(-TWO_POW_63)).integer(i64::MIN, i64::MAX).expect("in range"), i64::MIN);
        let rows = [
            (json!(2.5), ErrorKind::InvalidType),
            (json!("3"), ErrorKind::InvalidType),
            (json!(true), ErrorKind::InvalidType),
            (json!([3]), ErrorKind::InvalidType),
            (json!({}), ErrorKind::InvalidType),
            (json!(0), ErrorKind::IntegerBelowMinValue),
            (json!(11), ErrorKind::IntegerAboveMaxValue),
            (json!(u64::MAX), ErrorKind::IntegerAboveMaxValue),
            (json!(1e300), ErrorKind::IntegerAboveMaxValue),
            (json!(-1e300), ErrorKind::IntegerBelowMinValue),
        ];
        for (value, wanted) in rows {
            assert_eq!(kind(at(&value).integer(1, 10)), wanted, "{value}");
        }
        assert_eq!(kind(at(&json!(TWO_POW_63)).integer(i64::MIN, i64::MAX)), ErrorKind::IntegerAboveMaxValue);
    }

    #[test]
    fn floats() {
        assert_eq!(at(&json!(1)).float(0.0, 2.0).expect("in range"), 1.0);
        assert_eq!(at(&json!(0.5)).float(0.0, 2.0).expect("in range"), 0.5);
        assert_eq!(kind(at(&json!(-0.1)).float(0.0, 2.0)), ErrorKind::DecimalBelowMinValue);
        assert_eq!(kind(at(&json!(2.1)).float(0.0, 2.0)), ErrorKind::DecimalAboveMaxValue);
        assert_eq!(kind(at(&json!("1")).float(0.0, 2.0)), ErrorKind::InvalidType);
    }

    #[test]
    fn strings_and_arrays() {
        assert_eq!(kind(at(&json!("")).short_string(4)), ErrorKind::EmptyString);
        assert_eq!(kind(at(&json!("abcde")).short_string(4)), ErrorKind::StringAboveMaxLength);
        assert_eq!(kind(at(&json!(1)).string()), ErrorKind::InvalidType);
        assert_eq!(kind(at(&json!("c")).one_of(&["a", "b"])), ErrorKind::InvalidValue);
        assert_eq!(at(&json!("b")).one_of(&["a", "b"]).expect("allowed"), "b");
        assert_eq!(kind(at(&json!([])).filled_array(2)), ErrorKind::EmptyArray);
        assert_eq!(kind(at(&json!([1, 2, 3])).array(2)), ErrorKind::ArrayAboveMaxLength);
        assert_eq!(kind(at(&json!({})).array(2)), ErrorKind::InvalidType);
        assert_eq!(kind(at(&json!([])).object()), ErrorKind::InvalidType);
        assert_eq!(kind(at(&json!(0)).boolean()), ErrorKind::InvalidType);
    }

    #[test]
    fn paths_name_the_first_failing_field() {
        let body = json!({"messages": [{"content": [{"text": "a"}, {"text": 3}]}]});
        let root = Field::root(&body);
        let result = root.entries(|_, messages| {
            messages.each(messages.array(9)?, |message| {
                message.entries(|_, content| {
                    content
                        .each(content.array(9)?, |part| part.entries(|_, text| text.string().map(drop)))
                        .map(drop)
                })
            })?;
            Ok(())
        });
        assert_eq!(result.expect_err("a number").param.as_deref(), Some("messages[0].content[1].text"));
        assert_eq!(root.missing("model").param.as_deref(), Some("model"));
    }

    #[test]
    fn token_ids_stay_below_the_vocabulary() {
        let value = json!([0, 9.0, 10]);
        let error = at(&value).token_ids(9, 10).expect_err("too large");
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::IntegerAboveMaxValue, Some("x[2]")));
    }

    #[test]
    fn ignored_names_are_bounded_and_safe_in_a_header() {
        let body: Value =
            (0..30).map(|i| (format!("f{i},\n"), json!(1))).collect::<Map<String, Value>>().into();
        let mut ignored = IgnoredFields::default();
        Field::root(&body)
            .entries(|_, field| {
                ignored.push(&field);
                Ok(())
            })
            .expect("an object");
        let header = ignored.header().expect("names");
        assert_eq!(header.split(',').count(), 20);
        assert!(header.starts_with("f0??,f1??"), "{header}");
    }
}
