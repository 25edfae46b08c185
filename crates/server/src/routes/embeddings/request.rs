//! The request's fields, read in document order.

use serde_json::Value;

use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, GenerationFields},
    known_fields::Route,
    prompt::TextOrIds,
};

/// Most inputs of a request.
const MAX_INPUTS: usize = 2048;

/// A checked request.
#[derive(Debug, Default)]
pub(crate) struct EmbeddingRequest {
    pub(crate) inputs: Vec<TextOrIds>,
    /// As base64 of little-endian numbers, not as a list.
    pub(crate) is_base64: bool,
    pub(crate) generation: GenerationFields,
}

impl EmbeddingRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// The first failing field.
    pub(crate) fn read(
        body: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<Self, ApiError> {
        let generation = GenerationFields { max_tokens: Some(0), ..GenerationFields::default() };
        let mut request = Self { generation, ..Self::default() };
        body.entries(|name, field| {
            if !Route::Embeddings.is_to_be_read(name, &field, ignored)?
                || request.generation.read(name, &field, bounds, ignored)?
            {
                return Ok(());
            }
            match name {
                "input" => request.inputs = read_inputs(&field, bounds)?,
                "encoding_format" => request.is_base64 = field.one_of(&["float", "base64"])? == "base64",
                // Every field to be read is read by one of the parsers; a test sends them all.
                _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
            }
            Ok(())
        })?;
        if request.inputs.is_empty() {
            return Err(body.missing("input"));
        }
        Ok(request)
    }
}

/// A string, an array of strings, an array of ids, or an array of arrays of ids; none of them empty.
fn read_inputs(field: &Field<'_, '_>, bounds: &Bounds) -> Result<Vec<TextOrIds>, ApiError> {
    let text =
        |field: &Field<'_, '_>| field.short_string(usize::MAX).map(|text| TextOrIds::Text(text.into()));
    let ids = |field: &Field<'_, '_>| {
        field.filled_array(usize::MAX)?;
        field.token_ids(usize::MAX, bounds.vocab_size).map(TextOrIds::Ids)
    };
    match field.value() {
        Value::String(_) => return Ok(vec![text(field)?]),
        Value::Array(_) => {}
        _ => {
            let reason = "must be a string, an array of strings, or arrays of token ids";
            return Err(field.error(ErrorKind::InvalidType, reason));
        }
    }
    // The first element says which kind of array it is.
    match field.filled_array(usize::MAX)?.first() {
        Some(Value::Number(_)) => Ok(vec![ids(field)?]),
        Some(Value::Array(_)) => field.each(field.array(MAX_INPUTS)?, |item| ids(&item)),
        _ => field.each(field.array(MAX_INPUTS)?, |item| text(&item)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    fn read(body: &Value) -> Result<EmbeddingRequest, ApiError> {
        EmbeddingRequest::read(&Field::root(body), &test_bounds(), &mut IgnoredFields::default())
    }

    #[test]
    fn four_forms_of_inputs() {
        let inputs = |input: Value| read(&json!({ "input": input })).expect("valid").inputs;
        let text = |text: &str| TextOrIds::Text(text.into());
        assert_eq!(inputs(json!("a")), [text("a")]);
        assert_eq!(inputs(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(inputs(json!([1, 2.0])), [TextOrIds::Ids(vec![1, 2])]);
        assert_eq!(inputs(json!([[1], [2, 3]])), [TextOrIds::Ids(vec![1]), TextOrIds::Ids(vec![2, 3])]);
        let request = read(&json!({"input": "a", "encoding_format": "base64", "user": "u", "priority": 2,
            "truncate_prompt_tokens": -1, "dimensions": null}))
        .expect("valid");
        assert!(request.is_base64);
        assert_eq!((request.generation.priority, request.generation.truncate_prompt_tokens), (2, Some(-1)));
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let rows = [
            (json!({}), MissingRequiredParameter, "input"),
            (json!({"input": ""}), EmptyString, "input"),
            (json!({"input": []}), EmptyArray, "input"),
            (json!({"input": ["a", ""]}), EmptyString, "input[1]"),
            (json!({"input": [[1], []]}), EmptyArray, "input[1]"),
            (json!({"input": [1, 300]}), IntegerAboveMaxValue, "input[1]"),
            (json!({"input": ["a", 1]}), InvalidType, "input[1]"),
            (json!({"input": {}}), InvalidType, "input"),
            (json!({"input": vec!["a"; 2049]}), ArrayAboveMaxLength, "input"),
            (json!({"input": "a", "encoding_format": "hex"}), InvalidValue, "encoding_format"),
            (json!({"input": "a", "dimensions": 64}), UnsupportedParameter, "dimensions"),
            (json!({"input": "a", "model": "other"}), ModelNotFound, "model"),
            (json!({"input": "a", "truncate_prompt_tokens": 0}), InvalidValue, "truncate_prompt_tokens"),
        ];
        for (body, kind, param) in rows {
            let error = read(&body).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }

    #[test]
    fn schema_and_parser_agree() {
        assert_agreement(Route::Embeddings, &json!({"input": "x"}), &[], |body, _| read(body).map(drop));
    }

    /// As for chat: a value of the wrong type is refused by name, whatever the field.
    #[test]
    fn no_field_is_forgotten() {
        for name in Route::Embeddings.read_fields() {
            let error = read(&json!({ name: [[{}]] })).expect_err("wrong type");
            assert_ne!(error.kind, ErrorKind::InternalError, "{name}");
            assert!(error.param.as_deref().is_some_and(|param| param.starts_with(name)), "{name}: {error:?}");
        }
    }
}
