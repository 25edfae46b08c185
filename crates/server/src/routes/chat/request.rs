//! The request's fields, read in document order.

use locket_processor::ChatPrompt;
use serde_json::{Map, Value};

use super::{ToolFields, ToolStyle, read_messages};
use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, GenerationFields, ReasoningFields},
    known_fields::Route,
    message::MessagePlan,
    visual::ImagePart,
};

/// A checked chat request.
#[derive(Debug, Default)]
pub(crate) struct ChatRequest {
    /// Messages as the template sees them.
    pub(crate) messages: Vec<Value>,
    /// The images in them, by their index.
    pub(crate) images: Vec<ImagePart>,
    pub(crate) template: TemplateFields,
    pub(crate) reasoning: ReasoningFields,
    pub(crate) tools: ToolFields,
    pub(crate) generation: GenerationFields,
    /// How the answer is read.
    pub(crate) message_plan: MessagePlan,
    /// Answers that go on where the last message ends begin with it.
    pub(crate) echo: bool,
    /// What they begin with; set when the messages are known.
    pub(crate) echoed: Option<String>,
    /// Returned as it came.
    pub(crate) metadata: Option<Value>,
    /// The tier that the request names.
    pub(crate) service_tier: Option<&'static str>,
    /// The tier that it gets, which is returned.
    pub(crate) used_tier: &'static str,
}

/// Fields that go to the chat template; `/tokenize` has them too.
#[derive(Debug, Clone, Default)]
pub(crate) struct TemplateFields {
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
    pub(crate) kwargs: Map<String, Value>,
    documents: Option<Vec<Value>>,
}

impl TemplateFields {
    /// Reads one field. `false` means that it is not one of these.
    pub(crate) fn read(&mut self, name: &str, field: &Field<'_, '_>) -> Result<bool, ApiError> {
        match name {
            "add_generation_prompt" => self.add_generation_prompt = Some(field.boolean()?),
            "continue_final_message" => self.continue_final_message = field.boolean()?,
            "chat_template_kwargs" => self.kwargs = read_kwargs(field)?,
            "documents" => {
                const MAX_DOCUMENTS: usize = 2048;
                let items = field.array(MAX_DOCUMENTS)?;
                self.documents =
                    Some(field.each(items, |item| item.object().map(|object| object.clone().into()))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Checks what the fields say together.
    pub(crate) fn check_together(&self) -> Result<(), ApiError> {
        if self.continue_final_message && self.add_generation_prompt.unwrap_or(true) {
            let message = "`continue_final_message` and `add_generation_prompt` cannot both be true; \
                           the latter is true unless given.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "continue_final_message", message));
        }
        Ok(())
    }

    /// A prompt without messages.
    pub(crate) fn into_prompt(self) -> ChatPrompt {
        ChatPrompt {
            documents: self.documents,
            add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs,
            ..ChatPrompt::default()
        }
    }
}

/// Extra variables must not replace those that the server sets.
fn read_kwargs(field: &Field<'_, '_>) -> Result<Map<String, Value>, ApiError> {
    const RESERVED: [&str; 9] = [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "bos_token",
        "eos_token",
    ];
    field.entries(|name, inner| {
        if RESERVED.contains(&name) {
            return Err(inner.error(
                ErrorKind::InvalidValue,
                "cannot be given here: it is a field of the request, or the model sets it",
            ));
        }
        Ok(())
    })?;
    field.object().cloned()
}

impl ChatRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// The first failing field, then what fields contradict.
    pub(crate) fn read(
        body: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<Self, ApiError> {
        let mut request =
            Self { used_tier: "default", tools: ToolFields::new(ToolStyle::Nested), ..Self::default() };
        let mut own = OwnFields::default();
        body.entries(|name, field| {
            if !Route::Chat.is_to_be_read(name, &field, ignored)?
                || request.generation.read(name, &field, bounds, ignored)?
                || request.template.read(name, &field)?
                || request.reasoning.read(name, &field, ignored)?
                || request.tools.read(name, &field, ignored)?
            {
                return Ok(());
            }
            match name {
                "messages" => {
                    let read = read_messages(&field, bounds, ignored)?;
                    (request.messages, request.images) = (read.messages, read.images);
                }
                "echo" => request.echo = field.boolean()?,
                "metadata" => request.metadata = Some(read_metadata(&field)?),
                "service_tier" => request.service_tier = Some(read_service_tier(&field)?),
                _ => own.read(name, &field)?,
            }
            Ok(())
        })?;
        if request.messages.is_empty() {
            return Err(body.missing("messages"));
        }
        request.generation.check_together(ErrorKind::UnsupportedParameter)?;
        request.template.check_together()?;
        request.reasoning.check_together()?;
        request.tools.check_together()?;
        own.apply(&mut request.generation)?;
        Ok(request)
    }
}

/// Fields of chat alone whose meaning depends on each other.
#[derive(Debug, Default)]
struct OwnFields {
    max_completion_tokens: Option<u32>,
    logprobs: bool,
    top_logprobs: u32,
}

impl OwnFields {
    fn read(&mut self, name: &str, field: &Field<'_, '_>) -> Result<(), ApiError> {
        match name {
            "max_completion_tokens" => self.max_completion_tokens = Some(field.count(1, u32::MAX)?),
            "logprobs" => self.logprobs = field.boolean()?,
            "top_logprobs" => self.top_logprobs = field.count(0, 20)?,
            "modalities" => {
                field.each(field.array(16)?, |item| match item.string()? {
                    "text" => Ok(()),
                    _ => Err(item.error(ErrorKind::UnsupportedValue, "is not offered; only text is")),
                })?;
            }
            // Every field to be read is read by one of the parsers; a test sends them all.
            _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
        }
        Ok(())
    }

    fn apply(self, generation: &mut GenerationFields) -> Result<(), ApiError> {
        if self.top_logprobs > 0 && !self.logprobs {
            let message = "`top_logprobs` needs `logprobs: true`.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "top_logprobs", message));
        }
        generation.logprobs = self.logprobs.then_some(self.top_logprobs);
        // The older name loses.
        generation.max_tokens = self.max_completion_tokens.or(generation.max_tokens);
        Ok(())
    }
}

/// One of the API's tiers.
pub(crate) fn read_service_tier(field: &Field<'_, '_>) -> Result<&'static str, ApiError> {
    field.one_of(&["auto", "default", "flex", "scale", "priority", "fast"])
}

/// Up to 16 pairs of short strings.
pub(crate) fn read_metadata(field: &Field<'_, '_>) -> Result<Value, ApiError> {
    const MAX_PAIRS: usize = 16;
    const MAX_KEY: usize = 64;
    const MAX_VALUE: usize = 512;
    let pairs = field.object()?;
    if pairs.len() > MAX_PAIRS {
        let reason = format!("has {} pairs, but may have at most {MAX_PAIRS}", pairs.len());
        return Err(field.error(ErrorKind::ArrayAboveMaxLength, reason));
    }
    field.entries(|key, value| {
        let (keys, values) = (key.chars().count(), value.string()?.chars().count());
        if keys > MAX_KEY || values > MAX_VALUE {
            let reason = format!("is too long: keys have up to {MAX_KEY} characters, values {MAX_VALUE}");
            return Err(value.error(ErrorKind::StringAboveMaxLength, reason));
        }
        Ok(())
    })?;
    Ok(field.value().clone())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    fn read(extra: Value) -> Result<(ChatRequest, Option<String>), ApiError> {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        let (Value::Object(all), Value::Object(extra)) = (&mut body, extra) else { panic!("two objects") };
        all.extend(extra);
        let mut ignored = IgnoredFields::default();
        let request = ChatRequest::read(&Field::root(&body), &test_bounds(), &mut ignored)?;
        Ok((request, ignored.header()))
    }

    #[test]
    fn good_values() {
        let (request, ignored) = read(json!({
            "max_tokens": 9, "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 2,
            "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "reasoning_effort": "low",
            "modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": true, "user": "u",
            "documents": [{"title": "t"}], "chat_template_kwargs": {"x": 1}, "echo": true,
            "prediction": {}, "tools": null, "foo": 1, "bar,": 2
        }))
        .expect("all valid");
        assert_eq!(request.generation.max_tokens, Some(5));
        assert_eq!(request.generation.logprobs, Some(2));
        assert_eq!(request.metadata, Some(json!({"a": "b"})));
        assert!(request.template.into_prompt().add_generation_prompt);
        assert_eq!(ignored.as_deref(), Some("foo,bar?"));
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let pairs: Map<_, _> = (0..17).map(|i| (i.to_string(), json!("x"))).collect();
        let rows = [
            (json!({"messages": []}), EmptyArray, "messages"),
            (json!({"messages": null}), MissingRequiredParameter, "messages"),
            (json!({"max_completion_tokens": 0}), IntegerBelowMinValue, "max_completion_tokens"),
            (json!({"logprobs": 1}), InvalidType, "logprobs"),
            (json!({"top_logprobs": 21, "logprobs": true}), IntegerAboveMaxValue, "top_logprobs"),
            (json!({"top_logprobs": 1}), InvalidValue, "top_logprobs"),
            (json!({"tools": []}), EmptyArray, "tools"),
            (json!({"tools": [{"type": "function"}]}), MissingRequiredParameter, "tools[0].function"),
            (json!({"tools": 3}), InvalidType, "tools"),
            (json!({"tool_choice": "auto"}), InvalidValue, "tool_choice"),
            (json!({"parallel_tool_calls": "no"}), InvalidType, "parallel_tool_calls"),
            (json!({"reasoning_effort": "huge"}), InvalidValue, "reasoning_effort"),
            (json!({"metadata": {"a": 1}}), InvalidType, "metadata.a"),
            (json!({"metadata": {"a": "x".repeat(513)}}), StringAboveMaxLength, "metadata.a"),
            (json!({ "metadata": pairs }), ArrayAboveMaxLength, "metadata"),
            (json!({"service_tier": "gold"}), InvalidValue, "service_tier"),
            (json!({"modalities": ["text", "audio"]}), UnsupportedValue, "modalities[1]"),
            (json!({"audio": {}}), UnsupportedParameter, "audio"),
            (json!({"functions": []}), UnsupportedParameter, "functions"),
            (json!({"function_call": "auto"}), UnsupportedParameter, "function_call"),
            (json!({"echo": 1}), InvalidType, "echo"),
            (json!({"max_tokens": 0}), IntegerBelowMinValue, "max_tokens"),
            (json!({"prompt_logprobs": 0, "stream": true}), InvalidValue, "prompt_logprobs"),
            (json!({"chat_template": "x"}), UnsupportedParameter, "chat_template"),
            (
                json!({"chat_template_kwargs": {"messages": []}}),
                InvalidValue,
                "chat_template_kwargs.messages",
            ),
            (
                json!({"chat_template_kwargs": {"x": 1, "bos_token": ""}}),
                InvalidValue,
                "chat_template_kwargs.bos_token",
            ),
            (json!({"continue_final_message": true}), InvalidValue, "continue_final_message"),
            (json!({"documents": ["a"]}), InvalidType, "documents[0]"),
            (json!({"best_of": 2}), UnsupportedParameter, "best_of"),
            (json!({"thinking": {}}), MissingRequiredParameter, "thinking.type"),
            (json!({"thinking_token_budget": -1}), IntegerBelowMinValue, "thinking_token_budget"),
            (
                json!({"response_format": {"type": "json_schema"}}),
                MissingRequiredParameter,
                "response_format.json_schema",
            ),
        ];
        for (extra, kind, param) in rows {
            let error = read(extra.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{extra}");
        }
    }

    /// `locket` has rules between its keys; names and ids of tools refer to each other.
    #[test]
    fn schema_and_parser_agree() {
        let base = json!({"messages": [{"role": "user", "content": "Hi"}]});
        let looser = ["locket", "messages", "tools", "tool_choice"];
        assert_agreement(Route::Chat, &base, &looser, |body, bounds| {
            ChatRequest::read(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
        });
    }

    /// Every field that the table gives to the parsers is read by one: a value of the wrong type
    /// is refused by name, and never by the internal error of a forgotten field.
    #[test]
    fn no_field_is_forgotten() {
        for name in Route::Chat.read_fields() {
            let wrong = json!([[{}]]);
            let body = json!({ name: wrong });
            let error = ChatRequest::read(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default())
                .expect_err("wrong type");
            assert_ne!(error.kind, InternalError, "{name}");
            assert!(error.param.as_deref().is_some_and(|param| param.starts_with(name)), "{name}: {error:?}");
        }
    }

    use ErrorKind::InternalError;
}
