//! The fields that say what an answer may be: `response_format`, `structured_outputs` and its older
//! names. They are read here; whether the schema or grammar compiles shows when the request is queued.

use locket_processor::steering::GrammarSource;
use serde_json::Value;

use crate::{
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
};

/// One constraint, and the field that holds it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Structured {
    pub(crate) source: GrammarSource,
    /// Path of the schema, expression or grammar.
    pub(crate) param: String,
    /// A format of messages, which has nothing to say where the answer must be calls.
    pub(crate) is_response_format: bool,
}

/// The fields of the request, in its order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct StructuredFields(Vec<Structured>);

impl StructuredFields {
    /// Reads one field. `false` means that it is not one of these.
    pub(crate) fn read(
        &mut self,
        name: &str,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        match name {
            "response_format" => self.0.extend(read_response_format(field, ignored)?),
            "structured_outputs" => self.0.push(read_structured_outputs(field, ignored)?),
            "guided_json" => self.push(field, schema(field)?),
            "guided_regex" => self.push(field, regex(field)?),
            "guided_choice" => self.push(field, choice(field)?),
            "guided_grammar" => self.push(field, lark(field)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn push(&mut self, field: &Field<'_, '_>, source: GrammarSource) {
        self.0.push(Structured { source, param: field.path(), is_response_format: false });
    }

    /// Checks that the fields do not contradict each other.
    ///
    /// # Errors
    /// 400 for a second constraint: an answer cannot be promised to follow both.
    pub(crate) fn check_together(&self) -> Result<(), ApiError> {
        let [first, second, ..] = self.0.as_slice() else { return Ok(()) };
        let message =
            format!("`{}` and `{}` both constrain the answer; give one of them.", first.param, second.param);
        Err(ApiError::field(ErrorKind::InvalidValue, second.param.clone(), message))
    }

    /// The constraint, if there is one.
    pub(crate) fn constraint(&self) -> Option<&Structured> {
        self.0.first()
    }

    /// Adds what another route's field says (`text.format` of `/v1/responses`).
    pub(crate) fn set(&mut self, constraint: Option<Structured>) {
        self.0 = constraint.into_iter().collect();
    }
}

/// `response_format`; `None` is plain text.
fn read_response_format(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<Option<Structured>, ApiError> {
    let (mut kind, mut named) = (None, None);
    field.entries(|name, inner| {
        match name {
            "type" => kind = Some(inner.one_of(&["text", "json_object", "json_schema"])?),
            "json_schema" => named = Some(read_named_schema(&inner, ignored)?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    match kind {
        None => Err(field.missing("type")),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Structured {
            source: GrammarSource::JsonObject,
            param: field.path(),
            is_response_format: true,
        })),
        Some(_) => named.map(Some).ok_or_else(|| field.missing("json_schema")),
    }
}

/// A schema with a name, as `response_format.json_schema` and `text.format` have it.
///
/// # Errors
/// The name is absent or not 1 to 64 of `[A-Za-z0-9_-]`; the schema is absent.
pub(crate) fn read_named_schema(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<Structured, ApiError> {
    const MAX_NAME: usize = 64;
    let (mut has_name, mut found) = (false, None);
    field.entries(|name, inner| {
        match name {
            "name" => {
                let text = inner.short_string(MAX_NAME)?;
                let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
                if !text.bytes().all(is_plain) {
                    let reason =
                        format!("is {:?}, but may have only letters, digits, `_` and `-`", clip(text));
                    return Err(inner.error(ErrorKind::InvalidValue, reason));
                }
                has_name = true;
            }
            "description" => drop(inner.string()?),
            // Every answer follows the schema, with or without it.
            "strict" => drop(inner.boolean()?),
            "schema" => {
                let source = GrammarSource::JsonSchema(Value::Object(inner.object()?.clone()));
                found = Some(Structured { source, param: inner.path(), is_response_format: true });
            }
            // The kind, where the name stands beside it.
            "type" => {}
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    if !has_name {
        return Err(field.missing("name"));
    }
    found.ok_or_else(|| field.missing("schema"))
}

/// `structured_outputs`: exactly one of its kinds.
fn read_structured_outputs(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<Structured, ApiError> {
    let mut found: Option<Structured> = None;
    field.entries(|name, inner| {
        let source = match name {
            "json" => schema(&inner)?,
            "regex" => regex(&inner)?,
            "choice" => choice(&inner)?,
            "grammar" => lark(&inner)?,
            "json_object" if inner.boolean()? => GrammarSource::JsonObject,
            "json_object" => {
                return Err(inner.error(ErrorKind::InvalidValue, "must be true, or be left out"));
            }
            "structural_tag" => return Err(inner.unsupported("use `grammar`")),
            _ => {
                ignored.push(&inner);
                return Ok(());
            }
        };
        if found.is_some() {
            let reason = "is the second constraint; exactly one may be given";
            return Err(inner.error(ErrorKind::InvalidValue, reason));
        }
        found = Some(Structured { source, param: inner.path(), is_response_format: false });
        Ok(())
    })?;
    found.ok_or_else(|| {
        let reason = "must have one of `json`, `regex`, `choice`, `grammar` and `json_object`";
        field.error(ErrorKind::InvalidValue, reason)
    })
}

/// A schema as an object, or as its JSON text.
fn schema(field: &Field<'_, '_>) -> Result<GrammarSource, ApiError> {
    let Value::String(text) = field.value() else {
        return Ok(GrammarSource::JsonSchema(Value::Object(field.object()?.clone())));
    };
    let parsed = serde_json::from_str(text).map_err(|error| {
        field.error(ErrorKind::InvalidJsonSchema, format_args!("is a string, but not of JSON: {error}"))
    })?;
    Ok(GrammarSource::JsonSchema(parsed))
}

fn regex(field: &Field<'_, '_>) -> Result<GrammarSource, ApiError> {
    Ok(GrammarSource::Regex(field.short_string(usize::MAX)?.to_owned()))
}

fn lark(field: &Field<'_, '_>) -> Result<GrammarSource, ApiError> {
    Ok(GrammarSource::Lark(field.short_string(usize::MAX)?.to_owned()))
}

fn choice(field: &Field<'_, '_>) -> Result<GrammarSource, ApiError> {
    const MAX_CHOICES: usize = 4096;
    let items = field.filled_array(MAX_CHOICES)?;
    let texts = field.each(items, |item| item.short_string(usize::MAX).map(str::to_owned))?;
    Ok(GrammarSource::Choice(texts))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<StructuredFields, ApiError> {
        let mut fields = StructuredFields::default();
        let mut ignored = IgnoredFields::default();
        Field::root(&body).entries(|name, field| {
            assert!(fields.read(name, &field, &mut ignored)?, "{name}");
            Ok(())
        })?;
        fields.check_together().map(|()| fields)
    }

    #[test]
    fn every_way_to_say_it() {
        let schema = json!({"type": "integer"});
        let named = json!({"name": "a-B_9", "description": "d", "strict": true, "schema": schema});
        let object = GrammarSource::JsonSchema(schema.clone());
        let lark = GrammarSource::Lark("start: \"a\"".into());
        let choice = GrammarSource::Choice(vec!["a".into(), "b".into()]);
        let rows = [
            (
                json!({"response_format": {"type": "json_schema", "json_schema": named}}),
                object.clone(),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_object"}}),
                GrammarSource::JsonObject,
                "response_format",
            ),
            (json!({"structured_outputs": {"json": schema}}), object.clone(), "structured_outputs.json"),
            (json!({"structured_outputs": {"json": schema.to_string()}}), object, "structured_outputs.json"),
            (json!({"structured_outputs": {"choice": ["a", "b"]}}), choice, "structured_outputs.choice"),
            (
                json!({"structured_outputs": {"json_object": true}}),
                GrammarSource::JsonObject,
                "structured_outputs.json_object",
            ),
            (
                json!({"guided_regex": "a+", "response_format": {"type": "text"}}),
                GrammarSource::Regex("a+".into()),
                "guided_regex",
            ),
            (json!({"guided_grammar": "start: \"a\""}), lark, "guided_grammar"),
        ];
        for (body, source, param) in rows {
            let fields = read(body.clone()).expect("valid");
            let constraint = fields.constraint().expect("a constraint");
            assert_eq!((&constraint.source, constraint.param.as_str()), (&source, param), "{body}");
        }
        assert_eq!(read(json!({"response_format": {"type": "text"}})), Ok(StructuredFields::default()));
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let format =
            |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": schema}});
        let name = "response_format.json_schema.name";
        let rows = [
            (json!({"response_format": {}}), MissingRequiredParameter, "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), InvalidValue, "response_format.type"),
            (
                json!({"response_format": {"type": "json_schema"}}),
                MissingRequiredParameter,
                "response_format.json_schema",
            ),
            (format(json!({"schema": {}})), MissingRequiredParameter, name),
            (format(json!({"name": "", "schema": {}})), EmptyString, name),
            (format(json!({"name": "a b", "schema": {}})), InvalidValue, name),
            (format(json!({"name": "a".repeat(65), "schema": {}})), StringAboveMaxLength, name),
            (format(json!({"name": "a"})), MissingRequiredParameter, "response_format.json_schema.schema"),
            (format(json!({"name": "a", "schema": []})), InvalidType, "response_format.json_schema.schema"),
            (json!({"structured_outputs": {}}), InvalidValue, "structured_outputs"),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}),
                InvalidValue,
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"json_object": false}}),
                InvalidValue,
                "structured_outputs.json_object",
            ),
            (json!({"structured_outputs": {"json": "{"}}), InvalidJsonSchema, "structured_outputs.json"),
            (
                json!({"structured_outputs": {"structural_tag": "x"}}),
                UnsupportedParameter,
                "structured_outputs.structural_tag",
            ),
            (json!({"guided_json": 3}), InvalidType, "guided_json"),
            (json!({"guided_choice": []}), EmptyArray, "guided_choice"),
            (json!({"guided_choice": ["a", ""]}), EmptyString, "guided_choice[1]"),
            (json!({"guided_regex": ""}), EmptyString, "guided_regex"),
            (
                json!({"guided_regex": "a", "response_format": {"type": "json_object"}}),
                InvalidValue,
                "response_format",
            ),
        ];
        for (body, kind, param) in rows {
            let error = read(body.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }
}
