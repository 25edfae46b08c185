//! The request's fields, read in document order.

use serde_json::Value;

use crate::{
    echo::EchoedPrompt,
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, GenerationFields},
    known_fields::Route,
};

const MAX_PROMPTS: usize = 256;

/// A checked completion request.
#[derive(Debug, Default)]
pub(crate) struct CompletionRequest {
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) generation: GenerationFields,
    /// By prompt, if prompts are echoed; set when their ids are known.
    pub(crate) echoed: Vec<EchoedPrompt>,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Taken as it is; at least one.
    Ids(Vec<u32>),
}

impl Prompt {
    /// The text, if it is one.
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Ids(_) => None,
        }
    }
}

impl CompletionRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// The first failing field, then what fields contradict.
    pub(crate) fn read(
        body: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<Self, ApiError> {
        let mut request = Self::default();
        body.entries(|name, field| {
            if !Route::Completions.is_to_be_read(name, &field, ignored)? {
                return Ok(());
            }
            // Here alone it may be 0.
            if name == "max_tokens" {
                request.generation.max_tokens = Some(field.count(0, u32::MAX)?);
                return Ok(());
            }
            if request.generation.read(name, &field, bounds, ignored)? {
                return Ok(());
            }
            match name {
                "prompt" => request.prompts = read_prompts(&field, bounds)?,
                "logprobs" => request.generation.logprobs = Some(field.count(0, 20)?),
                "echo" => request.generation.echo = field.boolean()?,
                // Every field to be read is read by one of the parsers; a test sends them all.
                _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
            }
            Ok(())
        })?;
        if request.prompts.is_empty() {
            return Err(body.missing("prompt"));
        }
        request.generation.check_together(ErrorKind::UnsupportedValue)?;
        if request.generation.max_tokens == Some(0) && !request.generation.echo {
            let message = "`max_tokens` must be at least 1; 0 is for `echo: true` alone.";
            return Err(ApiError::field(ErrorKind::IntegerBelowMinValue, "max_tokens", message));
        }
        Ok(request)
    }
}

/// A string, an array of strings, an array of ids, or an array of arrays of ids.
fn read_prompts(field: &Field<'_, '_>, bounds: &Bounds) -> Result<Vec<Prompt>, ApiError> {
    match field.value() {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(_) => {}
        _ => {
            let reason = "must be a string, an array of strings, or arrays of token ids";
            return Err(field.error(ErrorKind::InvalidType, reason));
        }
    }
    let ids = |field: &Field<'_, '_>| {
        field.filled_array(usize::MAX)?;
        field.token_ids(usize::MAX, bounds.vocab_size).map(Prompt::Ids)
    };
    // The first element says which kind of array it is.
    match field.filled_array(usize::MAX)?.first() {
        Some(Value::Number(_)) => Ok(vec![ids(field)?]),
        Some(Value::Array(_)) => field.each(field.array(MAX_PROMPTS)?, |item| ids(&item)),
        _ => field.each(field.array(MAX_PROMPTS)?, |item| Ok(Prompt::Text(item.string()?.to_owned()))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    fn read(body: Value) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::read(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default())
    }

    #[test]
    fn four_forms_of_prompts() {
        let prompts = |prompt: Value| read(json!({ "prompt": prompt })).expect("valid").prompts;
        assert_eq!(prompts(json!("")), [Prompt::Text(String::new())]);
        assert_eq!(prompts(json!(["a", "b"])), [Prompt::Text("a".into()), Prompt::Text("b".into())]);
        assert_eq!(prompts(json!([1, 2.0])), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(prompts(json!([[1], [2, 3]])), [Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]);
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let rows = [
            (json!({}), MissingRequiredParameter, "prompt"),
            (json!({"prompt": null}), MissingRequiredParameter, "prompt"),
            (json!({"prompt": 3}), InvalidType, "prompt"),
            (json!({"prompt": []}), EmptyArray, "prompt"),
            (json!({"prompt": [[]]}), EmptyArray, "prompt[0]"),
            (json!({"prompt": [[1], "x"]}), InvalidType, "prompt[1]"),
            (json!({"prompt": ["x", 1]}), InvalidType, "prompt[1]"),
            (json!({"prompt": [1, "x"]}), InvalidType, "prompt[1]"),
            (json!({"prompt": [1, 300]}), IntegerAboveMaxValue, "prompt[1]"),
            (json!({"prompt": [[1], [-1]]}), IntegerBelowMinValue, "prompt[1][0]"),
            (json!({"prompt": vec!["x"; 257]}), ArrayAboveMaxLength, "prompt"),
            (json!({"prompt": "x", "max_tokens": 0}), IntegerBelowMinValue, "max_tokens"),
            (json!({"prompt": "x", "logprobs": 21}), IntegerAboveMaxValue, "logprobs"),
            (json!({"prompt": "x", "logprobs": true}), InvalidType, "logprobs"),
            (json!({"prompt": "x", "max_tokens": 0, "echo": false}), IntegerBelowMinValue, "max_tokens"),
            (json!({"prompt": "x", "echo": 1}), InvalidType, "echo"),
            (json!({"prompt": "x", "prompt_logprobs": 21}), IntegerAboveMaxValue, "prompt_logprobs"),
            (json!({"prompt": "x", "prompt_logprobs": 1, "stream": true}), InvalidValue, "prompt_logprobs"),
            (json!({"prompt": "x", "suffix": ""}), UnsupportedParameter, "suffix"),
            (json!({"prompt": "x", "best_of": 3, "n": 2}), UnsupportedValue, "best_of"),
        ];
        for (body, kind, param) in rows {
            let error = read(body.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }

    /// `locket` has rules between its keys.
    #[test]
    fn schema_and_parser_agree() {
        assert_agreement(Route::Completions, &json!({"prompt": "x"}), &["locket"], |body, bounds| {
            CompletionRequest::read(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
        });
    }

    /// As for chat: a value of the wrong type is refused by name, whatever the field.
    #[test]
    fn no_field_is_forgotten() {
        for name in Route::Completions.read_fields() {
            let error = read(json!({ name: [[{}]] })).expect_err("wrong type");
            assert_ne!(error.kind, ErrorKind::InternalError, "{name}");
            assert!(error.param.as_deref().is_some_and(|param| param.starts_with(name)), "{name}: {error:?}");
        }
    }
}
