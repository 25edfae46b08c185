//! Body bytes to a JSON value: content type, size, depth, duplicate keys.
//!
//! `serde_json` itself bounds the depth (128) and refuses NaN, infinities and numbers out of
//! range. Objects keep their order, which decides which failing field is reported.

use std::{cell::Cell, fmt, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, header},
};
use futures_util::StreamExt as _;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::{
    blocking,
    error::{ApiError, ErrorKind},
};

/// Most JSON values in a body. Small ones take far more memory parsed than sent.
const MAX_VALUES: u32 = 1 << 20;

/// Bodies up to this many bytes are parsed on the async thread.
pub(crate) const SHORT_BYTES: usize = 64 << 10;

/// What the `Content-Type` header says about the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyType {
    /// `application/json`.
    Json,
    /// No header: accepted if the body is JSON.
    Unstated,
}

/// Checks the content type before the body is read.
///
/// # Errors
/// 415 for anything but JSON in UTF-8.
pub(crate) fn body_type(headers: &HeaderMap) -> Result<BodyType, ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(BodyType::Unstated) };
    let text = value.to_str().unwrap_or_default().to_ascii_lowercase();
    let mut parts = text.split(';').map(str::trim);
    let is_json = parts.next() == Some("application/json");
    let is_utf8 = parts.all(|parameter| match parameter.split_once('=') {
        Some(("charset", charset)) => matches!(charset.trim_matches('"'), "utf-8" | "utf8" | "us-ascii"),
        _ => true,
    });
    if is_json && is_utf8 { Ok(BodyType::Json) } else { Err(not_json()) }
}

fn not_json() -> ApiError {
    ApiError::new(ErrorKind::UnsupportedMediaType, "The body must be `application/json` in UTF-8.")
}

/// Reads the whole body, at most `max_bytes`, within `max_time`.
///
/// # Errors
/// 413 if it is longer; 400 if it ends early or takes too long.
pub(crate) async fn read_body(
    headers: &HeaderMap,
    body: Body,
    max_bytes: usize,
    max_time: Duration,
) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        let message = format!("The request body is larger than the limit of {max_bytes} bytes.");
        ApiError::new(ErrorKind::RequestTooLarge, message)
    };
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<u64>().ok());
    if declared.is_some_and(|length| length > max_bytes as u64) {
        return Err(too_large());
    }
    let read = async {
        let mut bytes = Vec::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk =
                chunk.map_err(|_| ApiError::new(ErrorKind::InvalidJson, "The request body ended early."))?;
            if bytes.len().saturating_add(chunk.len()) > max_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    };
    tokio::time::timeout(max_time, read).await.unwrap_or_else(|_| {
        let message = format!("The request body did not arrive within {} seconds.", max_time.as_secs());
        Err(ApiError::new(ErrorKind::InvalidJson, message))
    })
}

/// Parses a request body, a long one on a blocking thread.
///
/// # Errors
/// As [`parse_object`].
pub(crate) async fn parse_body(bytes: Vec<u8>, body_type: BodyType) -> Result<Value, ApiError> {
    blocking::run(bytes.len() > SHORT_BYTES, move || parse_object(&bytes, body_type)).await?
}

/// Parses a request body, which must be one object.
///
/// # Errors
/// 400 `invalid_json` with line and column, 400 `array_above_max_length` for too many values; 415
/// if the type was not stated and it is no JSON.
fn parse_object(bytes: &[u8], body_type: BodyType) -> Result<Value, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let count = Cell::new(0);
    let parsed = Strict { count: &count }.deserialize(&mut deserializer).and_then(|value| {
        deserializer.end()?;
        Ok(value)
    });
    match parsed {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => Err(ApiError::new(ErrorKind::InvalidType, "The request body must be a JSON object.")),
        Err(_) if count.get() > MAX_VALUES => Err(ApiError::new(
            ErrorKind::ArrayAboveMaxLength,
            format!("The request body has more than {MAX_VALUES} values."),
        )),
        Err(_) if body_type == BodyType::Unstated => Err(not_json()),
        Err(error) => Err(ApiError::new(
            ErrorKind::InvalidJson,
            format!("The request body is not valid JSON: {}.", clean_reason(&error)),
        )),
    }
}

/// The parser's reason with line and column. Its texts name what was expected, never the input.
fn clean_reason(error: &serde_json::Error) -> String {
    let reason = error.to_string();
    if reason.contains(" line ") {
        return reason;
    }
    format!("{reason} at line {} column {}", error.line(), error.column())
}

/// Builds a [`Value`] of at most [`MAX_VALUES`] values, and refuses objects that have a key twice:
/// readers disagree on which wins.
#[derive(Clone, Copy)]
struct Strict<'c> {
    /// Values begun so far.
    count: &'c Cell<u32>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.count.set(self.count.get() + 1);
        if self.count.get() > MAX_VALUES {
            return Err(D::Error::custom("too many values"));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self)?;
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("an object has the same key twice"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Value, ApiError> {
        parse_object(text.as_bytes(), BodyType::Json)
    }

    #[test]
    fn what_is_refused() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
        let rows = [
            ("", ErrorKind::InvalidJson),
            ("{", ErrorKind::InvalidJson),
            ("{} x", ErrorKind::InvalidJson),
            ("{\"a\":NaN}", ErrorKind::InvalidJson),
            ("{\"a\":Infinity}", ErrorKind::InvalidJson),
            ("{\"a\":1e999}", ErrorKind::InvalidJson),
            ("{\"a\":\"\\ud800\"}", ErrorKind::InvalidJson),
            ("{\"a\":1,\"a\":2}", ErrorKind::InvalidJson),
            ("{\"b\":[{\"a\":1,\"a\":2}]}", ErrorKind::InvalidJson),
            (deep.as_str(), ErrorKind::InvalidJson),
            ("[]", ErrorKind::InvalidType),
            ("3", ErrorKind::InvalidType),
            ("null", ErrorKind::InvalidType),
        ];
        for (text, wanted) in rows {
            let error = parse(text).expect_err("must fail");
            assert_eq!(error.kind, wanted, "{}", &text[..text.len().min(40)]);
            if wanted == ErrorKind::InvalidJson {
                assert!(
                    error.message.contains("line") && error.message.contains("column"),
                    "{}",
                    error.message
                );
            }
        }
        assert_eq!(
            parse_object(b"{\"a\":\"\xff\"}", BodyType::Json).expect_err("no UTF-8").kind,
            ErrorKind::InvalidJson
        );
        assert_eq!(
            parse_object(b"a=1", BodyType::Unstated).expect_err("a form").kind,
            ErrorKind::UnsupportedMediaType
        );
    }

    #[tokio::test]
    async fn values_are_counted() {
        // The object itself and the array are values too.
        let body = |items: u32| format!("{{\"a\":[{}0]}}", "0,".repeat(items as usize - 1)).into_bytes();
        let parsed = parse_body(body(MAX_VALUES - 2), BodyType::Json).await.expect("as many as allowed");
        assert_eq!(parsed["a"].as_array().map(Vec::len), Some(MAX_VALUES as usize - 2));
        for body_type in [BodyType::Json, BodyType::Unstated] {
            let error = parse_body(body(MAX_VALUES - 1), body_type).await.expect_err("one too many");
            assert_eq!(error.kind, ErrorKind::ArrayAboveMaxLength);
            assert!(error.message.contains("1048576"), "{}", error.message);
        }
    }

    #[test]
    fn the_message_never_repeats_the_body() {
        let error = parse("{\"a\": secretword}").expect_err("no JSON");
        assert!(!error.message.contains("secret"), "{}", error.message);
        let error = parse("{\"secretword\": 1, \"secretword\": 1}").expect_err("twice");
        assert!(!error.message.contains("secret"), "{}", error.message);
    }

    #[test]
    fn content_types() {
        let check = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().expect("a header"));
            body_type(&headers).is_ok()
        };
        assert!(check("application/json"));
        assert!(check("Application/JSON; charset=UTF-8"));
        assert!(check("application/json;charset=\"utf-8\""));
        assert!(!check("application/json; charset=latin1"));
        assert!(!check("text/plain"));
        assert!(!check("application/x-www-form-urlencoded"));
        assert!(!check("application/jsonx"));
        assert_eq!(body_type(&HeaderMap::new()), Ok(BodyType::Unstated));
    }

    proptest! {
        /// What is accepted equals what the plain parser reads.
        #[test]
        fn values_survive(numbers in proptest::collection::vec(any::<f64>(), 0..9), text in ".*", key in ".{0,9}") {
            let numbers: Vec<_> = numbers.into_iter().filter(|number| number.is_finite()).collect();
            let value = serde_json::json!({ "numbers": numbers, key: { "text": text, "flags": [true, null] } });
            let text = value.to_string();
            let plain = serde_json::from_str::<Value>(&text).map_err(|error| error.to_string());
            prop_assert_eq!(parse(&text).map_err(|error| error.message), plain);
        }
    }
}
