//! The request's fields, read in document order.

use locket_processor::steering::GrammarSource;
use serde_json::{Value, json};

use super::input::read_input;
use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, GenerationFields, ReasoningFields, StreamOptions, Structured, read_named_schema},
    known_fields::Route,
    message::MessagePlan,
    routes::chat::{TemplateFields, ToolFields, ToolStyle, read_metadata, read_service_tier},
    visual::ImagePart,
};

/// A checked request.
#[derive(Debug, Default)]
pub(super) struct ResponsesRequest {
    /// The items of `input` as the template sees them.
    pub(super) messages: Vec<Value>,
    /// The images in them, by their index.
    pub(super) images: Vec<ImagePart>,
    pub(super) template: TemplateFields,
    pub(super) generation: GenerationFields,
    pub(super) reasoning: ReasoningFields,
    pub(super) tools: ToolFields,
    /// How the answer is read.
    pub(super) message_plan: MessagePlan,
    /// `text.format`, if it constrains the answer.
    format: Option<Structured>,
    /// The tier that the request names.
    pub(super) service_tier: Option<&'static str>,
    /// Drop the oldest items of a conversation that is too long.
    pub(super) truncates: bool,
    pub(super) echo: Echo,
}

/// What the response repeats.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<u32>,
    pub(super) metadata: Value,
    pub(super) parallel_tool_calls: bool,
    pub(super) reasoning: Value,
    /// The tier that the request gets.
    pub(super) service_tier: &'static str,
    pub(super) text: Value,
    pub(super) tool_choice: Value,
    pub(super) tools: Value,
    pub(super) top_logprobs: u32,
    pub(super) truncation: &'static str,
}

impl Default for Echo {
    fn default() -> Self {
        Self {
            instructions: None,
            max_output_tokens: None,
            metadata: json!({}),
            parallel_tool_calls: true,
            reasoning: json!({"effort": null, "summary": null}),
            service_tier: "default",
            text: json!({"format": {"type": "text"}}),
            tool_choice: json!("auto"),
            tools: json!([]),
            top_logprobs: 0,
            truncation: "disabled",
        }
    }
}

impl ResponsesRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// The first failing field, then what fields contradict.
    pub(super) fn read(
        body: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<Self, ApiError> {
        let mut request = Self { tools: ToolFields::new(ToolStyle::Flat), ..Self::default() };
        let mut wants_logprobs = false;
        body.entries(|name, field| {
            if !Route::Responses.is_to_be_read(name, &field, ignored)? {
                return Ok(());
            }
            match name {
                "include" => wants_logprobs = read_include(&field)?,
                _ if request.read_own(name, &field, bounds, ignored)?
                    || request.generation.read(name, &field, bounds, ignored)?
                    || request.reasoning.read(name, &field, ignored)?
                    || request.template.read(name, &field)? => {}
                // Every field to be read is read by one of the parsers; a test sends them all.
                _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
            }
            Ok(())
        })?;
        if request.messages.is_empty() {
            return Err(body.missing("input"));
        }
        request.reasoning.check_together()?;
        request.tools.check_together()?;
        request.add_format()?;
        request.generation.check_together(ErrorKind::UnsupportedParameter)?;
        if request.echo.top_logprobs > 0 && !wants_logprobs {
            let message = "`top_logprobs` needs `include: [\"message.output_text.logprobs\"]`.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "top_logprobs", message));
        }
        request.generation.logprobs = wants_logprobs.then_some(request.echo.top_logprobs);
        request.generation.max_tokens = request.echo.max_output_tokens;
        Ok(request)
    }

    /// Constrains the answer by `text.format`.
    fn add_format(&mut self) -> Result<(), ApiError> {
        let Some(format) = self.format.take() else { return Ok(()) };
        if let Some(other) = self.generation.structured.constraint() {
            let message = format!(
                "`{}` and `{}` both constrain the answer; give one of them.",
                other.param, format.param
            );
            return Err(ApiError::field(ErrorKind::InvalidValue, format.param, message));
        }
        self.generation.structured.set(Some(format));
        Ok(())
    }

    /// `{"effort", "summary"}`. There are no summaries: the thoughts themselves are sent.
    fn read_reasoning(&mut self, field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        let echo = &mut self.echo.reasoning;
        field.entries(|name, inner| {
            match name {
                "effort" => {
                    self.reasoning.read("reasoning_effort", &inner, ignored)?;
                    echo["effort"] = inner.value().clone();
                }
                "summary" | "generate_summary" => {
                    echo["summary"] = inner.one_of(&["auto", "concise", "detailed"])?.into();
                }
                _ => ignored.push(&inner),
            }
            Ok(())
        })
    }

    /// Reads one field. `false` means that it is not one that only this route has.
    fn read_own(
        &mut self,
        name: &str,
        field: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        let echo = &mut self.echo;
        match name {
            "input" => {
                let read = read_input(field, bounds, ignored)?;
                (self.messages, self.images) = (read.messages, read.images);
            }
            "instructions" => echo.instructions = Some(field.string()?.to_owned()),
            "max_output_tokens" => echo.max_output_tokens = Some(field.count(1, u32::MAX)?),
            "metadata" => echo.metadata = read_metadata(field)?,
            "service_tier" => self.service_tier = Some(read_service_tier(field)?),
            "top_logprobs" => echo.top_logprobs = field.count(0, 20)?,
            "truncation" => {
                echo.truncation = field.one_of(&["auto", "disabled"])?;
                self.truncates = echo.truncation == "auto";
            }
            "tools" => {
                self.tools.read(name, field, ignored)?;
                echo.tools = field.value().clone();
            }
            "tool_choice" => {
                self.tools.read(name, field, ignored)?;
                echo.tool_choice = field.value().clone();
            }
            "parallel_tool_calls" => {
                self.tools.read(name, field, ignored)?;
                echo.parallel_tool_calls = field.boolean()?;
            }
            "background" => {
                if field.boolean()? {
                    return Err(field.unsupported("nothing is stored, so nobody could fetch the answer"));
                }
            }
            "stream_options" => {
                read_stream_options(field, ignored)?;
                self.generation.stream_options = Some(StreamOptions::default());
            }
            "reasoning" => self.read_reasoning(field, ignored)?,
            "text" => (echo.text, self.format) = read_text(field, ignored)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Whether log-probabilities are wanted.
fn read_include(field: &Field<'_, '_>) -> Result<bool, ApiError> {
    const MAX: usize = 64;
    let mut wants_logprobs = false;
    field.each(field.array(MAX)?, |item| match item.string()? {
        "message.output_text.logprobs" => {
            wants_logprobs = true;
            Ok(())
        }
        // Thoughts are sent as they are.
        "reasoning.encrypted_content" => Ok(()),
        _ => {
            let reason = "is not offered; only `message.output_text.logprobs` and \
                          `reasoning.encrypted_content` are";
            Err(item.error(ErrorKind::UnsupportedValue, reason))
        }
    })?;
    Ok(wants_logprobs)
}

fn read_stream_options(field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
    field.entries(|name, inner| {
        match name {
            // Accepted; no padding is sent.
            "include_obfuscation" => drop(inner.boolean()?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })
}

/// `{"format", "verbosity"}`: what is repeated, and what the answer must be.
fn read_text(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<(Value, Option<Structured>), ApiError> {
    let (mut text, mut structured) = (json!({"format": {"type": "text"}}), None);
    field.entries(|name, inner| {
        match name {
            "format" => {
                structured = read_format(&inner, ignored)?;
                text["format"] = inner.value().clone();
            }
            "verbosity" => text["verbosity"] = inner.one_of(&["low", "medium", "high"])?.into(),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    Ok((text, structured))
}

/// `text.format`; its type is read first, since other fields belong to one type only.
fn read_format(field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<Option<Structured>, ApiError> {
    let mut kind = None;
    field.entries(|name, inner| {
        if name == "type" {
            kind = Some(inner.one_of(&["text", "json_object", "json_schema"])?);
        }
        Ok(())
    })?;
    let kind = kind.ok_or_else(|| field.missing("type"))?;
    if kind == "json_schema" {
        return read_named_schema(field, ignored).map(Some);
    }
    field.entries(|name, inner| {
        if name != "type" {
            ignored.push(&inner);
        }
        Ok(())
    })?;
    let (source, param) = (GrammarSource::JsonObject, field.path());
    Ok((kind == "json_object").then_some(Structured { source, param, is_response_format: true }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    fn read(extra: Value) -> Result<(ResponsesRequest, Option<String>), ApiError> {
        let mut body = json!({"input": "Hi"});
        let (Value::Object(all), Value::Object(extra)) = (&mut body, extra) else { panic!("two objects") };
        all.extend(extra);
        let mut ignored = IgnoredFields::default();
        let request = ResponsesRequest::read(&Field::root(&body), &test_bounds(), &mut ignored)?;
        Ok((request, ignored.header()))
    }

    #[test]
    fn good_values() {
        let tool =
            json!({"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}});
        let format =
            json!({"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": true});
        let (request, ignored) = read(json!({
            "instructions": "Be brief.", "max_output_tokens": 5, "top_logprobs": 2, "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "store": true,
            "service_tier": "auto", "parallel_tool_calls": false, "truncation": "auto", "background": false,
            "stream": true, "stream_options": {"include_obfuscation": true, "include_usage": true},
            "reasoning": {"effort": "low", "summary": "auto", "x": 1}, "text": {"format": format, "verbosity": "low"},
            "tools": [tool], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
                {"type": "function", "name": "f"}]}, "thinking_token_budget": 9,
            "user": "u", "top_k": 4, "seed": 1, "locket": {"require_exact": false}, "previous_response_id": null,
            "foo": 1
        }))
        .expect("all valid");
        let (fields, echo) = (&request.generation, &request.echo);
        assert_eq!((fields.max_tokens, fields.logprobs, fields.top_k), (Some(5), Some(2), Some(4)));
        assert!(request.truncates && fields.stream && !echo.parallel_tool_calls);
        assert_eq!(fields.stream_options(), StreamOptions::default());
        assert_eq!(echo.reasoning, json!({"effort": "low", "summary": "auto"}));
        assert_eq!(echo.text, json!({"format": format, "verbosity": "low"}));
        assert_eq!(echo.metadata, json!({"a": "b"}));
        assert_eq!((&echo.tools, &echo.tool_choice["mode"]), (&json!([tool]), &json!("auto")));
        let rendered = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        assert_eq!(request.tools.rendered(), Some(vec![json!({"type": "function", "function": rendered})]));
        let constraint = fields.structured.constraint().expect("a schema");
        assert_eq!(constraint.source, GrammarSource::JsonSchema(json!({"type": "object"})));
        assert_eq!(constraint.param, "text.format.schema");
        assert_eq!(ignored.as_deref(), Some("stream_options.include_usage,reasoning.x,foo"));
        let (request, _) = read(json!({"text": {"format": {"type": "json_object"}}})).expect("valid");
        let constraint = request.generation.structured.constraint().expect("an object");
        assert_eq!(constraint.param, "text.format");
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let schema = json!({"type": "json_schema", "name": "a", "schema": {}});
        let tool = json!({"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true});
        let rows = [
            (json!({"input": null}), MissingRequiredParameter, "input"),
            (json!({"input": []}), EmptyArray, "input"),
            (json!({"instructions": []}), InvalidType, "instructions"),
            (json!({"max_output_tokens": 0}), IntegerBelowMinValue, "max_output_tokens"),
            (json!({"top_logprobs": 21}), IntegerAboveMaxValue, "top_logprobs"),
            (json!({"top_logprobs": 1}), InvalidValue, "top_logprobs"),
            (json!({"include": ["file_search_call.results"]}), UnsupportedValue, "include[0]"),
            (json!({"include": [1]}), InvalidType, "include[0]"),
            (json!({"truncation": "middle"}), InvalidValue, "truncation"),
            (json!({"background": true}), UnsupportedParameter, "background"),
            (json!({"previous_response_id": "resp_1"}), UnsupportedParameter, "previous_response_id"),
            (json!({"conversation": "conv_1"}), UnsupportedParameter, "conversation"),
            (json!({"prompt": {"id": "x"}}), UnsupportedParameter, "prompt"),
            (json!({"stream_options": {}}), InvalidValue, "stream_options"),
            (
                json!({"stream": true, "stream_options": {"include_obfuscation": 1}}),
                InvalidType,
                "stream_options.include_obfuscation",
            ),
            (json!({"reasoning": {"effort": "huge"}}), InvalidValue, "reasoning.effort"),
            (json!({"reasoning": {"summary": "long"}}), InvalidValue, "reasoning.summary"),
            (json!({"text": {"verbosity": 1}}), InvalidType, "text.verbosity"),
            (json!({"text": {"format": {}}}), MissingRequiredParameter, "text.format.type"),
            (json!({"text": {"format": {"type": "xml"}}}), InvalidValue, "text.format.type"),
            (
                json!({"text": {"format": {"type": "json_schema"}}}),
                MissingRequiredParameter,
                "text.format.name",
            ),
            (
                json!({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}),
                InvalidValue,
                "text.format.name",
            ),
            (json!({"guided_regex": "a", "text": {"format": schema}}), InvalidValue, "text.format.schema"),
            (json!({"tools": []}), EmptyArray, "tools"),
            (json!({"tools": [{"type": "web_search"}]}), UnsupportedValue, "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), MissingRequiredParameter, "tools[0].name"),
            (json!({"tool_choice": "required"}), InvalidValue, "tool_choice"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "function", "name": "g"}}),
                InvalidValue,
                "tool_choice.name",
            ),
            (json!({"thinking": {}}), MissingRequiredParameter, "thinking.type"),
            (json!({"service_tier": "gold"}), InvalidValue, "service_tier"),
            (json!({"metadata": {"a": 1}}), InvalidType, "metadata.a"),
            (json!({"store": "no"}), InvalidType, "store"),
            (json!({"temperature": 3}), DecimalAboveMaxValue, "temperature"),
            (json!({"max_tokens": 3}), UnsupportedParameter, "max_tokens"),
            (json!({"response_format": {}}), UnsupportedParameter, "response_format"),
            (json!({"messages": []}), UnsupportedParameter, "messages"),
        ];
        for (extra, kind, param) in rows {
            let error = read(extra.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{extra}");
        }
    }

    /// Every field that the table gives to the parsers is read by one: a value of the wrong type
    /// is refused by name, and never by the internal error of a forgotten field.
    #[test]
    fn no_field_is_forgotten() {
        for name in Route::Responses.read_fields() {
            let wrong = json!([[{}]]);
            let body = json!({ name: wrong });
            let read =
                ResponsesRequest::read(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default());
            let error = read.expect_err("wrong type");
            assert_ne!(error.kind, ErrorKind::InternalError, "{name}");
            assert!(error.param.as_deref().is_some_and(|param| param.starts_with(name)), "{name}: {error:?}");
        }
    }

    /// `locket` and `input` have rules between their keys; names and ids of tools refer to each other.
    #[test]
    fn schema_and_parser_agree() {
        let base = json!({"input": "Hi"});
        let looser = ["locket", "input", "tools", "tool_choice", "text"];
        assert_agreement(Route::Responses, &base, &looser, |body, bounds| {
            ResponsesRequest::read(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
        });
    }
}
