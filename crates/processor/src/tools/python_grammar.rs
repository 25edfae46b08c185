//! Arguments as in Python, as a grammar. The values are written as in JSON: every schema holds for them then,
//! and a reader of Python's literals needs to know but three more words.

use serde_json::{Map, Value, json};

use super::pythonic::is_name;
use crate::steering::{GrammarError, GrammarSource};

/// Longest name of an argument in bytes that is read back.
const MAX_NAME_BYTES: usize = 256;

/// All values' schemas in bytes, each with the definitions that it refers to.
const MAX_BYTES: usize = 1 << 20;

/// Keywords that say more of an object than which arguments there are and what each is.
const UNSUPPORTED: [&str; 20] = [
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
    "anyOf",
    "allOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "enum",
    "const",
    "minProperties",
    "maxProperties",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
];

/// The arguments that a schema of parameters allows.
enum Arguments {
    /// Those with other names are not written.
    Named(Vec<Argument>),
    /// Any, each with a value of this schema.
    Any(Value),
}

struct Argument {
    name: String,
    /// The schema of its value.
    value: Value,
    is_required: bool,
}

/// The arguments of a call.
pub(super) fn arguments(schema: Option<&Value>) -> GrammarSource {
    match schema.map_or(Ok(Arguments::Named(Vec::new())), read) {
        Ok(Arguments::Named(arguments)) => named(arguments),
        Ok(Arguments::Any(value)) => any(&value),
        // It is checked before it comes here; this compiles to an error, never to something laxer.
        Err(_) => GrammarSource::JsonSchema(false.into()),
    }
}

/// The schemas of the values, each with the end of its path.
///
/// # Errors
/// A schema that a call in Python cannot keep to.
pub(super) fn value_schemas(schema: &Value) -> Result<Vec<(String, Value)>, GrammarError> {
    Ok(match read(schema)? {
        Arguments::Named(arguments) => {
            let path = |argument: &Argument| format!(".properties.{}", argument.name);
            arguments.into_iter().map(|argument| (path(&argument), argument.value)).collect()
        }
        Arguments::Any(value) => vec![(".additionalProperties".into(), value)],
    })
}

fn named(arguments: Vec<Argument>) -> GrammarSource {
    let (required, others): (Vec<Argument>, Vec<Argument>) =
        arguments.into_iter().partition(|argument| argument.is_required);
    let has_required = !required.is_empty();
    let written = |argument: Argument| {
        let name = GrammarSource::Text(format!("{}=", argument.name));
        GrammarSource::Sequence(vec![name, GrammarSource::JsonSchema(argument.value)])
    };
    let mut parts = Vec::new();
    for argument in required {
        if !parts.is_empty() {
            parts.push(comma());
        }
        parts.push(written(argument));
    }
    for argument in others {
        // With nothing in front that is always there, the comma stands behind; Python allows that.
        let argument = written(argument);
        let pair = if has_required { [comma(), argument] } else { [argument, comma()] };
        parts.push(optional(GrammarSource::Sequence(pair.into())));
    }
    if parts.is_empty() { nothing() } else { GrammarSource::Sequence(parts) }
}

fn any(value: &Value) -> GrammarSource {
    let argument = || {
        let name = GrammarSource::Regex("[A-Za-z_][A-Za-z0-9_]{0,63}=".into());
        GrammarSource::Sequence(vec![name, GrammarSource::JsonSchema(value.clone())])
    };
    let next = GrammarSource::Sequence(vec![comma(), argument()]);
    let more = optional(GrammarSource::OneOrMore(Box::new(next)));
    optional(GrammarSource::Sequence(vec![argument(), more]))
}

fn nothing() -> GrammarSource {
    GrammarSource::Text(String::new())
}

fn comma() -> GrammarSource {
    GrammarSource::Text(", ".into())
}

fn optional(part: GrammarSource) -> GrammarSource {
    GrammarSource::AnyOf(vec![part, nothing()])
}

fn refused<T>(path: impl Into<String>, reason: &str) -> Result<T, GrammarError> {
    Err(GrammarError { path: path.into(), reason: reason.into() })
}

fn read(schema: &Value) -> Result<Arguments, GrammarError> {
    let Value::Object(schema) = schema else {
        return refused("", "a schema of parameters must be an object");
    };
    if let Some(keyword) = schema.keys().find(|keyword| UNSUPPORTED.contains(&keyword.as_str())) {
        let reason = format!("calls as in Python cannot keep to the keyword `{keyword}` of all arguments");
        return refused(format!(".{keyword}"), &reason);
    }
    let is_object = match schema.get("type") {
        None => true,
        Some(Value::Array(types)) => types.iter().any(|kind| kind == "object"),
        Some(kind) => kind == "object",
    };
    if !is_object {
        return refused(".type", "arguments are an object");
    }
    let arguments = match schema.get("properties") {
        None => read_any(schema)?,
        Some(Value::Object(properties)) => read_named(schema, properties)?,
        Some(_) => return refused(".properties", "it must be an object"),
    };
    let bytes = match &arguments {
        Arguments::Named(named) => named.iter().map(|argument| size(&argument.value)).sum(),
        Arguments::Any(value) => size(value),
    };
    if bytes > MAX_BYTES {
        let reason = format!(
            "its arguments have some {bytes} bytes with the definitions that each refers to, but may have \
             {MAX_BYTES}"
        );
        return refused("", &reason);
    }
    Ok(arguments)
}

fn size(value: &Value) -> usize {
    GrammarSource::JsonSchema(value.clone()).size()
}

fn read_any(schema: &Map<String, Value>) -> Result<Arguments, GrammarError> {
    if !required(schema)?.is_empty() {
        return refused(".required", "the arguments must be among `properties`");
    }
    Ok(match schema.get("additionalProperties") {
        Some(Value::Bool(false)) => Arguments::Named(Vec::new()),
        inner => Arguments::Any(value(schema, inner.unwrap_or(&json!({})))),
    })
}

/// Arguments whose names cannot be written are left out, unless they are required.
fn read_named(
    schema: &Map<String, Value>,
    properties: &Map<String, Value>,
) -> Result<Arguments, GrammarError> {
    let required = required(schema)?;
    let can_be = |name: &str| {
        properties.get(name).is_some_and(|inner| *inner != false)
            && (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.chars().all(is_name)
    };
    if let Some(at) = required.iter().position(|name| !can_be(name)) {
        let reason = "the argument is not among `properties`, cannot have a value, or has a name that cannot \
                      be written in a call as in Python";
        return refused(format!(".required[{at}]"), reason);
    }
    let written = properties.iter().filter(|(name, _)| can_be(name));
    let argument = |(name, inner): (&String, &Value)| Argument {
        name: name.clone(),
        value: value(schema, inner),
        is_required: required.contains(&name.as_str()),
    };
    Ok(Arguments::Named(written.map(argument).collect()))
}

fn required(schema: &Map<String, Value>) -> Result<Vec<&str>, GrammarError> {
    let Some(required) = schema.get("required") else { return Ok(Vec::new()) };
    let names = required.as_array().and_then(|names| names.iter().map(Value::as_str).collect());
    names.map_or_else(|| refused(".required", "it must be an array of names"), Ok)
}

/// One argument's value. What the schema defines by name is defined in it too, and nothing else: references
/// start at the schema as a whole.
fn value(schema: &Map<String, Value>, inner: &Value) -> Value {
    let mut inner = inner.clone();
    let is_referring = refers(&inner);
    if let Value::Object(entries) = &mut inner {
        for key in ["$defs", "definitions"] {
            entries.shift_remove(key);
            if let Some(definitions) = schema.get(key).filter(|_| is_referring) {
                entries.insert(key.into(), definitions.clone());
            }
        }
    }
    inner
}

fn refers(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(refers),
        Value::Object(entries) => entries.contains_key("$ref") || entries.values().any(refers),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(schema: Value) -> Option<String> {
        value_schemas(&schema).err().map(|error| error.path)
    }

    #[test]
    fn what_a_call_cannot_keep_to_is_refused() {
        let properties = json!({"first name": {}, "a": {"$ref": "#/$defs/x"}, "no": false, "yes": true});
        let with = |key: &str, value: Value| {
            let mut schema = json!({"type": "object", "properties": properties});
            schema[key] = value;
            schema
        };
        for (schema, wanted) in [
            (with("required", json!(["a", "yes"])), None),
            (with("additionalProperties", json!(false)), None),
            (with("type", json!(["object", "null"])), None),
            (json!({}), None),
            (with("required", json!(["a", "first name"])), Some(".required[1]")),
            (with("required", json!(["no"])), Some(".required[0]")),
            (with("required", json!(["b"])), Some(".required[0]")),
            (with("required", json!([1])), Some(".required")),
            (with("minProperties", json!(1)), Some(".minProperties")),
            (with("$ref", json!("#/$defs/x")), Some(".$ref")),
            (json!({"anyOf": [{}]}), Some(".anyOf")),
            (json!({"type": "string"}), Some(".type")),
            (json!({"properties": 1}), Some(".properties")),
            (json!({"required": ["a"]}), Some(".required")),
            (json!(true), Some("")),
        ] {
            assert_eq!(path(schema.clone()).as_deref(), wanted, "{schema}");
        }
        let many: Map<String, Value> =
            (0..5000).map(|at| (format!("a{at}"), json!({"$ref": "#/$defs/x"}))).collect();
        let large = json!({"$defs": {"x": {"description": "x".repeat(1000)}}, "properties": many});
        assert_eq!(path(large).as_deref(), Some(""));
    }

    #[test]
    fn values_have_the_definitions_of_the_whole() {
        let schema = json!({
            "$defs": {"x": {"type": "null"}},
            "properties": {
                "a": {"items": {"$ref": "#/$defs/x"}, "$defs": {"y": {}}}, "b": {"$defs": {"x": {}}}, "no": false
            }
        });
        let wanted = [
            (
                ".properties.a".to_owned(),
                json!({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "null"}}}),
            ),
            (".properties.b".to_owned(), json!({})),
        ];
        assert_eq!(value_schemas(&schema), Ok(wanted.into()));
        let any = json!({"additionalProperties": {"type": "integer"}});
        let wanted = [(".additionalProperties".to_owned(), json!({"type": "integer"}))];
        assert_eq!(value_schemas(&any), Ok(wanted.into()));
    }
}
