//! `tools`, `tool_choice` and `parallel_tool_calls`: what the model is told, what it may call, and what
//! makes its calls well-formed.

use std::{collections::HashSet, sync::Arc};

use locket_processor::{
    Processor,
    steering::ForbiddenTexts,
    tools::{ToolFormat, ToolSpec, ToolSyntax, argument_schemas},
};
use serde_json::{Map, Value, json};

use crate::{
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
    generation::{CallsInText, GenerationFields, WantedCalls, refused},
    message::MessagePlan,
    state::AppState,
};

const MAX_TOOLS: usize = 128;
const MAX_NAME_BYTES: usize = 64;

/// How a route writes functions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum ToolStyle {
    /// Chat: in an object `function`.
    #[default]
    Nested,
    /// Responses: beside `type`.
    Flat,
}

/// A function of the request.
#[derive(Debug, Clone)]
struct Tool {
    spec: ToolSpec,
    /// As the template sees it.
    rendered: Value,
    /// Path of its name.
    name_path: String,
    /// Path of its schema.
    schema_path: String,
}

/// What the model is to call.
#[derive(Debug, Clone, PartialEq)]
enum ToolChoice {
    None,
    Auto,
    Required,
    /// This one, once.
    Function(Named),
    /// Some of them.
    Allowed {
        is_required: bool,
        names: Vec<Named>,
    },
}

/// A function that is named, and where.
#[derive(Debug, Clone, PartialEq)]
struct Named {
    name: String,
    path: String,
}

/// The fields of a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct ToolFields {
    style: ToolStyle,
    tools: Vec<Tool>,
    choice: Option<ToolChoice>,
    is_parallel: Option<bool>,
}

impl ToolFields {
    /// Nothing given yet.
    pub(crate) fn new(style: ToolStyle) -> Self {
        Self { style, ..Self::default() }
    }

    /// Reads one field. `false` means that it is not one of these.
    pub(crate) fn read(
        &mut self,
        name: &str,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        match name {
            "tools" => self.tools = read_tools(field, self.style, ignored)?,
            "tool_choice" => self.choice = Some(read_choice(field, self.style, ignored)?),
            "parallel_tool_calls" => self.is_parallel = Some(field.boolean()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Checks what the fields say together.
    pub(crate) fn check_together(&self) -> Result<(), ApiError> {
        let named: &[Named] = match &self.choice {
            None | Some(ToolChoice::None) => return Ok(()),
            Some(ToolChoice::Auto | ToolChoice::Required) => &[],
            Some(ToolChoice::Function(named)) => std::slice::from_ref(named),
            Some(ToolChoice::Allowed { names, .. }) => names,
        };
        if self.tools.is_empty() {
            let message = "`tool_choice` needs `tools`; without them it may only be `none`.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "tool_choice", message));
        }
        let is_known = |named: &&Named| self.tools.iter().any(|tool| tool.spec.name == named.name);
        match named.iter().find(|named| !is_known(named)) {
            None => Ok(()),
            Some(Named { name, path }) => {
                let message = format!("`{path}` is {:?}, which is not in `tools`.", clip(name));
                Err(ApiError::field(ErrorKind::InvalidValue, path.clone(), message))
            }
        }
    }

    /// The tools as the template sees them.
    pub(crate) fn rendered(&self) -> Option<Vec<Value>> {
        (!self.tools.is_empty()).then(|| self.tools.iter().map(|tool| tool.rendered.clone()).collect())
    }

    /// The functions that may be called, whether one must be, and whether several may.
    fn callable(&self) -> Option<(Vec<&Tool>, bool, bool)> {
        let of = |names: &[Named]| -> Vec<&Tool> {
            let is_named = |tool: &&Tool| names.iter().any(|named| named.name == tool.spec.name);
            self.tools.iter().filter(is_named).collect()
        };
        let is_parallel = self.is_parallel.unwrap_or(true);
        let callable = match self.choice.as_ref().unwrap_or(&ToolChoice::Auto) {
            ToolChoice::None => return None,
            ToolChoice::Auto => (self.tools.iter().collect(), false, is_parallel),
            ToolChoice::Required => (self.tools.iter().collect(), true, is_parallel),
            ToolChoice::Function(named) => (of(std::slice::from_ref(named)), true, false),
            ToolChoice::Allowed { is_required, names } => (of(names), *is_required, is_parallel),
        };
        Some(callable).filter(|(tools, ..)| !tools.is_empty())
    }

    /// Lets the answer have calls, or makes it consist of them: tells the generation what constrains
    /// it, and the plan of messages how to read it.
    ///
    /// # Errors
    /// 400 if the operator has turned tools off; 422 for a strict schema that calls cannot keep to; those
    /// of [`GrammarMemory::relaxed`].
    ///
    /// [`GrammarMemory::relaxed`]: crate::generation::GrammarMemory::relaxed
    pub(crate) async fn apply(
        &self,
        state: &AppState,
        fields: &mut GenerationFields,
        plan: &mut MessagePlan,
    ) -> Result<(), ApiError> {
        if self.tools.is_empty() {
            return Ok(());
        }
        let format = state.tool_format().ok_or_else(|| {
            let message = "`tools` is not supported: the operator has turned tools off.";
            ApiError::field(ErrorKind::UnsupportedParameter, "tools", message)
        })?;
        let syntax = |tools: &mut dyn Iterator<Item = &Tool>, is_parallel| {
            let tools = tools.map(|tool| tool.spec.clone()).collect();
            ToolSyntax { format, tools, is_parallel }
        };
        let Some((tools, is_required, is_parallel)) = self.callable() else {
            let uncalled = syntax(&mut self.tools.iter(), true);
            fields.wanted.forbidden = Some(Arc::new(ForbiddenTexts::new(&uncalled.call_texts())));
            return Ok(());
        };
        let schemas = strict_schemas(&tools, format)?;
        let syntax = syntax(&mut tools.iter().copied(), is_parallel);
        let syntax = Arc::new(state.grammars().relaxed(syntax).await?);
        fields.wanted.calls = Some(wanted(&syntax, is_required, schemas));
        fields.shown_token_ids = control_tokens(state.processor(), format);
        plan.set_tools(syntax);
        Ok(())
    }
}

/// The schemas that strict tools' arguments must fit, each with its path.
///
/// # Errors
/// 422 for one that calls in this format cannot keep to.
fn strict_schemas(tools: &[&Tool], format: ToolFormat) -> Result<Vec<(String, Value)>, ApiError> {
    let mut all = Vec::new();
    for tool in tools.iter().filter(|tool| tool.spec.is_strict) {
        let Some(parameters) = &tool.spec.parameters else { continue };
        let schemas = argument_schemas(format, parameters)
            .map_err(|error| refused(ErrorKind::InvalidJsonSchema, &tool.schema_path, &error))?;
        all.extend(schemas.into_iter().map(|(end, schema)| (format!("{}{end}", tool.schema_path), schema)));
    }
    Ok(all)
}

/// What the engine is told of calls.
pub(crate) fn wanted(
    syntax: &Arc<ToolSyntax>,
    is_required: bool,
    schemas: Vec<(String, Value)>,
) -> WantedCalls {
    let in_text = (!is_required).then(|| {
        let trigger = syntax.trigger();
        CallsInText {
            markers: trigger.markers,
            grammar_has_marker: trigger.grammar_has_marker,
            grammar: trigger.grammar,
            max_calls: syntax.max_calls(),
        }
    });
    WantedCalls { calls: syntax.calls(), in_text, schemas, syntax: Arc::clone(syntax) }
}

/// Markers that are control tokens, which are hidden from a text unless it needs them.
fn control_tokens(processor: &Processor, format: ToolFormat) -> Vec<u32> {
    let ids = format.markers().iter().filter_map(|marker| processor.encode(marker, false).ok());
    ids.filter(|ids| ids.len() == 1).flatten().filter(|id| processor.is_special(*id)).collect()
}

/// Reads 1 to 128 tools as the template sees them.
///
/// # Errors
/// The first failing field, with its path.
pub(crate) fn read_rendered_tools(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<Vec<Value>, ApiError> {
    let tools = read_tools(field, ToolStyle::Nested, ignored)?;
    Ok(tools.into_iter().map(|tool| tool.rendered).collect())
}

fn read_tools(
    field: &Field<'_, '_>,
    style: ToolStyle,
    ignored: &mut IgnoredFields,
) -> Result<Vec<Tool>, ApiError> {
    let mut names = HashSet::new();
    field.each(field.filled_array(MAX_TOOLS)?, |item| {
        let tool = read_tool(&item, style, ignored)?;
        if names.insert(tool.spec.name.clone()) {
            return Ok(tool);
        }
        let message = format!("`{}` is the name of an earlier tool.", tool.name_path);
        Err(ApiError::field(ErrorKind::InvalidValue, tool.name_path, message))
    })
}

fn read_tool(item: &Field<'_, '_>, style: ToolStyle, ignored: &mut IgnoredFields) -> Result<Tool, ApiError> {
    read_type(item, "function")?;
    if style == ToolStyle::Flat {
        return read_function(item, Some("type"), ignored);
    }
    let mut tool = None;
    item.entries(|name, inner| {
        match name {
            "type" => {}
            "function" => tool = Some(read_function(&inner, None, ignored)?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    tool.ok_or_else(|| item.missing("function"))
}

/// `type`, which must be there, and be `wanted`.
fn read_type(item: &Field<'_, '_>, wanted: &str) -> Result<(), ApiError> {
    let mut found = false;
    item.entries(|name, inner| {
        if name == "type" {
            found = true;
            if inner.string()? != wanted {
                let reason = format!("is not offered; only `{wanted}` is");
                return Err(inner.error(ErrorKind::UnsupportedValue, reason));
            }
        }
        Ok(())
    })?;
    if found { Ok(()) } else { Err(item.missing("type")) }
}

fn read_function(
    item: &Field<'_, '_>,
    read_already: Option<&str>,
    ignored: &mut IgnoredFields,
) -> Result<Tool, ApiError> {
    let mut spec = ToolSpec::default();
    let mut rendered = Map::new();
    let mut name_path = None;
    item.entries(|name, field| {
        match name {
            "name" => {
                spec.name = read_name(&field)?;
                name_path = Some(field.path());
                rendered.insert(name.into(), spec.name.as_str().into());
            }
            "description" => {
                rendered.insert(name.into(), field.string()?.into());
            }
            "parameters" => {
                spec.parameters = Some(field.object()?.clone().into());
                rendered.insert(name.into(), field.value().clone());
            }
            "strict" => spec.is_strict = field.boolean()?,
            _ if Some(name) == read_already => {}
            _ => ignored.push(&field),
        }
        Ok(())
    })?;
    let name_path = name_path.ok_or_else(|| item.missing("name"))?;
    // Some templates look into it.
    rendered.entry("parameters").or_insert_with(|| json!({"type": "object", "properties": {}}));
    let schema_path = item.missing("parameters").param.unwrap_or_default();
    Ok(Tool { spec, rendered: json!({"type": "function", "function": rendered}), name_path, schema_path })
}

/// 1 to 64 of `[A-Za-z0-9_-]`.
fn read_name(field: &Field<'_, '_>) -> Result<String, ApiError> {
    let name = field.short_string(MAX_NAME_BYTES)?;
    if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
        return Ok(name.to_owned());
    }
    Err(field.error(ErrorKind::InvalidValue, "may have letters, digits, `_` and `-` only"))
}

fn read_choice(
    field: &Field<'_, '_>,
    style: ToolStyle,
    ignored: &mut IgnoredFields,
) -> Result<ToolChoice, ApiError> {
    if field.value().is_string() {
        return Ok(match field.one_of(&["none", "auto", "required"])? {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            _ => ToolChoice::Required,
        });
    }
    if !field.value().is_object() {
        return Err(field.error(ErrorKind::InvalidType, "must be a string or an object"));
    }
    let mut kind = None;
    field.entries(|name, inner| {
        if name == "type" {
            kind = Some(match inner.string()? {
                kind @ ("function" | "allowed_tools") => kind,
                _ => {
                    let reason = "is not offered; only `function` and `allowed_tools` are";
                    return Err(inner.error(ErrorKind::UnsupportedValue, reason));
                }
            });
        }
        Ok(())
    })?;
    match kind.ok_or_else(|| field.missing("type"))? {
        "function" => read_named(field, style, ignored).map(ToolChoice::Function),
        _ if style == ToolStyle::Flat => read_allowed(field, style, ignored),
        _ => {
            let mut allowed = None;
            field.entries(|name, inner| {
                match name {
                    "type" => {}
                    "allowed_tools" => allowed = Some(read_allowed(&inner, style, ignored)?),
                    _ => ignored.push(&inner),
                }
                Ok(())
            })?;
            allowed.ok_or_else(|| field.missing("allowed_tools"))
        }
    }
}

/// `{"mode", "tools"}`
fn read_allowed(
    field: &Field<'_, '_>,
    style: ToolStyle,
    ignored: &mut IgnoredFields,
) -> Result<ToolChoice, ApiError> {
    let (mut mode, mut names) = (None, None);
    field.entries(|name, inner| {
        match name {
            "mode" => mode = Some(inner.one_of(&["auto", "required"])?),
            "tools" => {
                let tools = inner.filled_array(MAX_TOOLS)?;
                names = Some(inner.each(tools, |tool| {
                    read_type(&tool, "function")?;
                    read_named(&tool, style, ignored)
                })?);
            }
            "type" if style == ToolStyle::Flat => {}
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    let is_required = mode.ok_or_else(|| field.missing("mode"))? == "required";
    Ok(ToolChoice::Allowed { is_required, names: names.ok_or_else(|| field.missing("tools"))? })
}

/// `{"type": "function", "function": {"name"}}`, or the name beside the type.
fn read_named(
    field: &Field<'_, '_>,
    style: ToolStyle,
    ignored: &mut IgnoredFields,
) -> Result<Named, ApiError> {
    let mut named = None;
    let mut read = |inner: &Field<'_, '_>, ignored: &mut IgnoredFields| {
        inner.entries(|name, field| {
            match name {
                "name" => named = Some(Named { name: field.string()?.to_owned(), path: field.path() }),
                "type" if style == ToolStyle::Flat => {}
                _ => ignored.push(&field),
            }
            Ok(())
        })?;
        named.take().ok_or_else(|| inner.missing("name"))
    };
    if style == ToolStyle::Flat {
        return read(field, ignored);
    }
    let mut found = None;
    field.entries(|name, inner| {
        match name {
            "type" => {}
            "function" => found = Some(read(&inner, ignored)?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    found.ok_or_else(|| field.missing("function"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(style: ToolStyle, body: &Value) -> Result<ToolFields, ApiError> {
        let mut fields = ToolFields::new(style);
        let mut ignored = IgnoredFields::default();
        Field::root(body).entries(|name, field| {
            assert!(fields.read(name, &field, &mut ignored)?);
            Ok(())
        })?;
        fields.check_together()?;
        Ok(fields)
    }

    fn tools() -> Value {
        json!([
            {"type": "function", "function": {"name": "a", "description": "A", "parameters": {"type": "object"}, "strict": true}},
            {"type": "function", "function": {"name": "b"}}
        ])
    }

    #[test]
    fn choices() {
        let callable = |choice: Value, is_parallel: Value| {
            let body = json!({"tool_choice": choice, "parallel_tool_calls": is_parallel, "tools": tools()});
            let fields = read(ToolStyle::Nested, &body).expect("valid");
            let callable = fields.callable();
            callable.map(|(tools, is_required, is_parallel)| {
                let names: String = tools.iter().map(|tool| tool.spec.name.as_str()).collect();
                (names, is_required, is_parallel)
            })
        };
        let named = json!({"type": "function", "function": {"name": "b"}});
        let allowed =
            |mode| json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}});
        let rows = [
            (Value::Null, Value::Null, Some(("ab", false, true))),
            (json!("auto"), json!(false), Some(("ab", false, false))),
            (json!("none"), Value::Null, None),
            (json!("required"), json!(true), Some(("ab", true, true))),
            (named.clone(), json!(true), Some(("b", true, false))),
            (allowed("auto"), Value::Null, Some(("b", false, true))),
            (allowed("required"), json!(false), Some(("b", true, false))),
        ];
        for (choice, is_parallel, wanted) in rows {
            let wanted = wanted.map(|(names, required, parallel)| (names.to_owned(), required, parallel));
            assert_eq!(callable(choice.clone(), is_parallel), wanted, "{choice}");
        }
    }

    /// What one format can keep to, another may not.
    #[test]
    fn strict_schemas_have_their_paths() {
        let of = |parameters: Value, format| {
            let function = json!({"name": "f", "strict": true, "parameters": parameters});
            let body = json!({"tools": [{"type": "function", "function": function}]});
            let fields = read(ToolStyle::Nested, &body).expect("valid");
            strict_schemas(&fields.tools.iter().collect::<Vec<_>>(), format)
        };
        let paths = |parameters: Value, format| -> Vec<String> {
            of(parameters, format).expect("schemas").into_iter().map(|(path, _)| path).collect()
        };
        let root = "tools[0].function.parameters";
        let good = json!({"properties": {"a": {}, "b c": {}}, "required": ["a"]});
        assert_eq!(paths(good.clone(), ToolFormat::Hermes), [root]);
        assert_eq!(paths(good, ToolFormat::Pythonic), [root.to_owned(), format!("{root}.properties.a")]);
        let bad = json!({"properties": {"a": {}, "b c": {}}, "required": ["b c"]});
        assert_eq!(paths(bad.clone(), ToolFormat::LlamaJson), [root]);
        let error = of(bad, ToolFormat::Pythonic).expect_err("a name with a blank");
        assert_eq!(error.kind, ErrorKind::InvalidJsonSchema);
        assert_eq!(error.param.as_deref(), Some("tools[0].function.parameters.required[0]"));
    }

    #[test]
    fn tools_are_rendered_without_what_is_ours() {
        let fields = read(ToolStyle::Nested, &json!({"tools": tools()})).expect("valid");
        let wanted = json!([
            {"type": "function", "function": {"name": "a", "description": "A", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "b", "parameters": {"type": "object", "properties": {}}}}
        ]);
        assert_eq!(fields.rendered().map(Value::from), Some(wanted));
        assert!(fields.tools[0].spec.is_strict && fields.tools[1].spec.parameters.is_none());
        assert_eq!(fields.tools[0].schema_path, "tools[0].function.parameters");
        let flat = json!({
            "tools": [{"type": "function", "name": "a", "parameters": {}, "strict": null}],
            "tool_choice": {"type": "function", "name": "a"}
        });
        let flat = read(ToolStyle::Flat, &flat).expect("valid");
        assert_eq!(flat.rendered().map(|tools| tools[0]["function"]["name"].clone()), Some(json!("a")));
        assert_eq!(flat.tools[0].schema_path, "tools[0].parameters");
        assert!(flat.callable().is_some_and(|(_, is_required, _)| is_required));
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        let choice = |choice: Value| json!({"tools": [tool("a")], "tool_choice": choice});
        let rows = [
            (json!({"tools": []}), EmptyArray, "tools"),
            (json!({"tools": {}}), InvalidType, "tools"),
            (json!({"tools": vec![tool("a"); 129]}), ArrayAboveMaxLength, "tools"),
            (json!({"tools": ["a"]}), InvalidType, "tools[0]"),
            (json!({"tools": [{"function": {"name": "a"}}]}), MissingRequiredParameter, "tools[0].type"),
            (json!({"tools": [{"type": "custom", "custom": {}}]}), UnsupportedValue, "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), MissingRequiredParameter, "tools[0].function"),
            (function(json!({})), MissingRequiredParameter, "tools[0].function.name"),
            (function(json!({"name": ""})), EmptyString, "tools[0].function.name"),
            (function(json!({"name": "a b"})), InvalidValue, "tools[0].function.name"),
            (function(json!({"name": "a".repeat(65)})), StringAboveMaxLength, "tools[0].function.name"),
            (function(json!({"name": "a", "parameters": []})), InvalidType, "tools[0].function.parameters"),
            (function(json!({"name": "a", "strict": 1})), InvalidType, "tools[0].function.strict"),
            (json!({"tools": [tool("a"), tool("a")]}), InvalidValue, "tools[1].function.name"),
            (json!({"tool_choice": "auto"}), InvalidValue, "tool_choice"),
            (json!({"tool_choice": "required"}), InvalidValue, "tool_choice"),
            (choice(json!("maybe")), InvalidValue, "tool_choice"),
            (choice(json!(1)), InvalidType, "tool_choice"),
            (choice(json!({})), MissingRequiredParameter, "tool_choice.type"),
            (choice(json!({"type": "custom"})), UnsupportedValue, "tool_choice.type"),
            (choice(json!({"type": "function"})), MissingRequiredParameter, "tool_choice.function"),
            (choice(tool("b")), InvalidValue, "tool_choice.function.name"),
            (
                choice(json!({"type": "allowed_tools", "allowed_tools": {"tools": [tool("a")]}})),
                MissingRequiredParameter,
                "tool_choice.allowed_tools.mode",
            ),
            (
                choice(json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}})),
                EmptyArray,
                "tool_choice.allowed_tools.tools",
            ),
            (
                choice(
                    json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("b")]}}),
                ),
                InvalidValue,
                "tool_choice.allowed_tools.tools[0].function.name",
            ),
            (json!({"parallel_tool_calls": "no"}), InvalidType, "parallel_tool_calls"),
        ];
        for (body, kind, param) in rows {
            let error = read(ToolStyle::Nested, &body).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }
}
