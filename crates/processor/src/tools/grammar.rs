//! Grammars of calls: for answers that must be calls, and for calls that the model begins by itself.

use serde_json::{Value, json};

use super::{ToolFormat, hermes, python_grammar};
use crate::steering::{GrammarError, GrammarSource};

/// A function that the model may call.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToolSpec {
    /// 1 to 64 of `[A-Za-z0-9_-]`.
    pub name: String,
    /// JSON Schema of an object; `None` is a function without arguments.
    pub parameters: Option<Value>,
    /// The arguments must fit the schema. Otherwise they do where the schema can be made a grammar,
    /// and are any object where it cannot.
    pub is_strict: bool,
}

/// The calls that an answer may have.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolSyntax {
    /// How they are written.
    pub format: ToolFormat,
    /// The functions, at least one.
    pub tools: Vec<ToolSpec>,
    /// More than one call.
    pub is_parallel: bool,
}

/// How calls come about in free text.
#[derive(Debug, Clone, PartialEq)]
pub struct CallTrigger {
    /// Texts with which a call begins.
    pub markers: Vec<String>,
    /// The grammar begins with the marker; otherwise right after it.
    pub grammar_has_marker: bool,
    /// One call, or one list of calls.
    pub grammar: GrammarSource,
}

impl ToolSyntax {
    /// The names of all functions.
    pub fn names(&self) -> Vec<String> {
        self.tools.iter().map(|tool| tool.name.clone()).collect()
    }

    /// How often the model may call.
    pub fn max_calls(&self) -> Option<u32> {
        if self.is_parallel { None } else { Some(1) }
    }

    /// The schemas of tools that are not strict. Whether they can be made grammars is for
    /// [`is_grammar`](crate::steering::is_grammar) to say.
    pub fn lenient_schemas(&self) -> Vec<Value> {
        let lenient = self.tools.iter().filter(|tool| !tool.is_strict);
        lenient
            .filter_map(|tool| tool.parameters.as_ref())
            .map(|schema| all_sources(self.format, schema))
            .collect()
    }

    /// Lets the arguments of tools that are not strict be any object where their schema cannot be
    /// made a grammar; `are_grammars` says it of each of the [`Self::lenient_schemas`].
    pub fn relax(&mut self, are_grammars: &[bool]) {
        let lenient = self.tools.iter_mut().filter(|tool| !tool.is_strict);
        let schemas = lenient.filter_map(|tool| tool.parameters.as_mut());
        for (schema, _) in schemas.zip(are_grammars).filter(|(_, is_grammar)| !**is_grammar) {
            *schema = json!({"type": "object"});
        }
    }

    /// What no text may have that is not to have calls: its parts, with any blanks between them. Where a
    /// call has no marker of its own, it is the functions' names in the places of calls.
    pub fn call_texts(&self) -> Vec<Vec<String>> {
        let markers = self.format.markers().iter().map(|marker| vec![(*marker).to_owned()]);
        let names = self.tools.iter().filter_map(|tool| match self.format {
            ToolFormat::Hermes => None,
            ToolFormat::LlamaJson => {
                Some(vec!["\"name\"".to_owned(), ":".to_owned(), format!("\"{}\"", tool.name)])
            }
            ToolFormat::Pythonic => Some(vec!["[".to_owned(), format!("{}(", tool.name)]),
        });
        markers.chain(names).collect()
    }

    /// How a call begins in free text, and how it then goes on.
    pub fn trigger(&self) -> CallTrigger {
        let (markers, grammar_has_marker) = match self.format {
            ToolFormat::Hermes => (vec![hermes::OPEN.to_owned()], false),
            ToolFormat::LlamaJson => {
                (self.tools.iter().flat_map(|tool| object_heads(&tool.name)).collect(), true)
            }
            ToolFormat::Pythonic => {
                (self.tools.iter().map(|tool| format!("[{}(", tool.name)).collect(), true)
            }
        };
        CallTrigger { markers, grammar_has_marker, grammar: self.after_marker() }
    }

    /// An answer of calls only, one or several.
    pub fn calls(&self) -> GrammarSource {
        let one = || self.any_tool(|tool| one_call(self.format, tool));
        let more = |separator: &str| {
            let next = sequence([text(separator), one()]);
            optional(GrammarSource::OneOrMore(Box::new(next)))
        };
        match (self.format, self.is_parallel) {
            (ToolFormat::Pythonic, false) => sequence([text("["), one(), text("]")]),
            (ToolFormat::Pythonic, true) => sequence([text("["), one(), more(", "), text("]")]),
            (_, false) => one(),
            (ToolFormat::Hermes, true) => sequence([one(), more("\n")]),
            (ToolFormat::LlamaJson, true) => sequence([one(), more("; ")]),
        }
    }

    /// What follows a marker; where the marker is a call's own beginning, together with that.
    fn after_marker(&self) -> GrammarSource {
        match self.format {
            ToolFormat::Hermes => self.any_tool(|tool| {
                let blank = || GrammarSource::Regex("[ \\n]?".into());
                sequence([blank(), object(tool, "arguments"), blank(), marker(hermes::CLOSE)])
            }),
            ToolFormat::LlamaJson => self.any_tool(|tool| {
                sequence([
                    GrammarSource::Choice(object_heads(&tool.name).into()),
                    GrammarSource::Regex(", ?\"(parameters|arguments)\": ?".into()),
                    arguments(tool),
                    text("}"),
                ])
            }),
            ToolFormat::Pythonic => self.calls(),
        }
    }

    fn any_tool(&self, call: impl Fn(&ToolSpec) -> GrammarSource) -> GrammarSource {
        GrammarSource::AnyOf(self.tools.iter().map(call).collect())
    }
}

fn text(text: &str) -> GrammarSource {
    GrammarSource::Text(text.into())
}

fn marker(text: &str) -> GrammarSource {
    GrammarSource::Marker(text.into())
}

fn sequence(parts: impl Into<Vec<GrammarSource>>) -> GrammarSource {
    GrammarSource::Sequence(parts.into())
}

fn optional(part: GrammarSource) -> GrammarSource {
    GrammarSource::AnyOf(vec![part, text("")])
}

/// A call as it is written where nothing but calls may come, without what stands around a list.
fn one_call(format: ToolFormat, tool: &ToolSpec) -> GrammarSource {
    match format {
        ToolFormat::Hermes => sequence([
            marker(hermes::OPEN),
            text("\n"),
            object(tool, "arguments"),
            text("\n"),
            marker(hermes::CLOSE),
        ]),
        ToolFormat::LlamaJson => object(tool, "parameters"),
        ToolFormat::Pythonic => {
            let arguments = python_grammar::arguments(tool.parameters.as_ref());
            sequence([text(&format!("{}(", tool.name)), arguments, text(")")])
        }
    }
}

/// `{"name": "weather", "arguments": {…}}`
fn object(tool: &ToolSpec, key: &str) -> GrammarSource {
    let head = format!("{{\"name\": \"{}\", \"{key}\": ", tool.name);
    sequence([text(&head), arguments(tool), text("}")])
}

/// How a call of this name may begin where it is the object itself that tells it.
fn object_heads(name: &str) -> [String; 3] {
    [
        format!("{{\"name\": \"{name}\""),
        format!("{{\"name\":\"{name}\""),
        format!("{{\"type\": \"function\", \"name\": \"{name}\""),
    ]
}

/// Arguments as a JSON object.
fn arguments(tool: &ToolSpec) -> GrammarSource {
    match &tool.parameters {
        None => text("{}"),
        Some(schema) => GrammarSource::JsonSchema(object_schema(schema)),
    }
}

/// A schema of parameters as one of objects, which it is meant to be if it does not say so.
pub fn object_schema(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(entries) = &mut schema
        && !["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| entries.contains_key(*key))
    {
        entries.insert("type".into(), "object".into());
    }
    schema
}

/// The schemas that a grammar of calls with these parameters is made of, each with the end of its path, and
/// first the one that they are parts of: what is wrong in it is to be told with its own path.
///
/// # Errors
/// Parameters that the format has no way to keep to.
pub fn argument_schemas(
    format: ToolFormat,
    parameters: &Value,
) -> Result<Vec<(String, Value)>, GrammarError> {
    let mut schemas = vec![(String::new(), object_schema(parameters))];
    if format == ToolFormat::Pythonic {
        schemas.extend(python_grammar::value_schemas(parameters)?);
    }
    Ok(schemas)
}

/// One schema that can be a grammar if, and only if, all can that a grammar of calls is made of.
fn all_sources(format: ToolFormat, parameters: &Value) -> Value {
    if format != ToolFormat::Pythonic {
        return object_schema(parameters);
    }
    // Never a grammar.
    let Ok(schemas) = python_grammar::value_schemas(parameters) else { return false.into() };
    let values: Vec<Value> = schemas.into_iter().map(|(_, schema)| schema).collect();
    let count = values.len();
    let mut all = json!({"type": "array", "prefixItems": values, "items": false, "minItems": count});
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = parameters.get(key) {
            all[key] = definitions.clone();
        }
    }
    all
}
