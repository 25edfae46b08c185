//! Checks and prepares a JSON schema, and finds the place of an error in it.

use llguidance::api::{GrammarInit, TopLevelGrammar};
use serde_json::{Map, Value, json};

use super::{
    GrammarError,
    grammar::{first_line, on_compiler_thread},
    lark_text, limits,
};

/// White space between the parts of a JSON text: one blank, or a new line with up to 32 blanks of
/// indentation. Models may write JSON in their usual way, but cannot go on with blanks for ever.
const WHITE_SPACE: &str = r"( |\n {0,32})";

/// Keywords that cannot be turned into a grammar.
const UNSUPPORTED: [&str; 17] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "extends",
];

/// Keywords that describe and never restrict, and that the library does not know as such.
const ANNOTATIONS: [&str; 6] =
    ["deprecated", "contentSchema", "$vocabulary", "$dynamicAnchor", "$recursiveAnchor", "x-guidance"];

/// The schemas directly inside a schema, each with the end of its path.
fn children(schema: &Map<String, Value>) -> Vec<(String, &Value)> {
    let mut all = Vec::new();
    for (keyword, value) in schema {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(schemas)) => {
                all.extend(schemas.iter().map(|(name, inner)| (format!(".{keyword}.{name}"), inner)));
            }
            ("anyOf" | "allOf" | "oneOf" | "prefixItems" | "items", Value::Array(schemas)) => {
                let schemas = schemas.iter().enumerate();
                all.extend(schemas.map(|(index, inner)| (format!(".{keyword}[{index}]"), inner)));
            }
            ("items" | "additionalItems" | "additionalProperties", inner) => {
                all.push((format!(".{keyword}"), inner));
            }
            _ => {}
        }
    }
    all
}

/// Roughly the bytes of a value's text.
pub(super) fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 3,
        Value::Array(items) => items.iter().map(|item| size(item) + 1).sum::<usize>() + 2,
        Value::Object(entries) => {
            entries.iter().map(|(key, inner)| key.len() + 4 + size(inner)).sum::<usize>() + 2
        }
        _ => 5,
    }
}

/// Levels of objects and arrays.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(entries) => 1 + entries.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// A schema as it goes to the library: checked, annotations left out, white space bounded.
///
/// # Errors
/// Too large, nested too deeply, or a keyword that is not supported, with its path.
pub(super) fn prepare(schema: &Value) -> Result<Value, GrammarError> {
    let (bytes, levels) = (size(schema), depth(schema));
    if bytes > limits::MAX_SCHEMA_BYTES || levels > limits::MAX_SCHEMA_DEPTH {
        return Err(GrammarError::whole(format!(
            "it has some {bytes} bytes in {levels} levels, but may have at most {} in {}",
            limits::MAX_SCHEMA_BYTES,
            limits::MAX_SCHEMA_DEPTH
        )));
    }
    let mut prepared = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        _ => return Err(GrammarError::whole("a schema must be an object, or true")),
    };
    check(&mut prepared, "")?;
    if let Value::Object(root) = &mut prepared {
        let options = json!({"whitespace_flexible": true, "whitespace_pattern": WHITE_SPACE});
        root.insert("x-guidance".into(), options);
    }
    Ok(prepared)
}

fn check(schema: &mut Value, path: &str) -> Result<(), GrammarError> {
    let Value::Object(entries) = schema else { return Ok(()) };
    // Says nothing, and generators of schemas write it.
    entries.retain(|keyword, value| {
        !(ANNOTATIONS.contains(&keyword.as_str()) || keyword == "uniqueItems" && value == &json!(false))
    });
    if let Some(keyword) = entries.keys().find(|keyword| UNSUPPORTED.contains(&keyword.as_str())) {
        let path = format!("{path}.{keyword}");
        return Err(GrammarError { path, reason: format!("the keyword `{keyword}` is not supported") });
    }
    let patterns = entries.get("patternProperties").and_then(Value::as_object);
    let keys = patterns.into_iter().flat_map(|patterns| patterns.keys().map(String::as_str));
    let pattern = entries.get("pattern").and_then(Value::as_str);
    let keys = keys.map(|key| (format!(".patternProperties.{key}"), key));
    for (end, pattern) in pattern.map(|pattern| (".pattern".to_owned(), pattern)).into_iter().chain(keys) {
        let at = |error: GrammarError| GrammarError { path: format!("{path}{end}"), ..error };
        if pattern.len() > limits::MAX_REGEX_BYTES {
            let reason = format!("it has {} bytes, but may have {}", pattern.len(), limits::MAX_REGEX_BYTES);
            return Err(at(GrammarError::whole(reason)));
        }
        lark_text::check_brackets(pattern).map_err(at)?;
    }
    exclude_leap_seconds(entries);
    for (keyword, value) in entries.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(schemas)) => {
                for (name, inner) in schemas {
                    check(inner, &format!("{path}.{keyword}.{name}"))?;
                }
            }
            ("anyOf" | "allOf" | "oneOf" | "prefixItems" | "items", Value::Array(schemas)) => {
                for (index, inner) in schemas.iter_mut().enumerate() {
                    check(inner, &format!("{path}.{keyword}[{index}]"))?;
                }
            }
            ("items" | "additionalItems" | "additionalProperties", inner) => {
                check(inner, &format!("{path}.{keyword}"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A 61st second is right at midnight UTC only, which no regular expression can tell; the library allows
/// it at any time of day.
fn exclude_leap_seconds(schema: &mut Map<String, Value>) {
    let pattern = match schema.get("format").and_then(Value::as_str) {
        Some("time") => "^.{6}[0-5]",
        Some("date-time") => "^.{17}[0-5]",
        _ => return,
    };
    if !schema.contains_key("pattern") {
        schema.insert("pattern".into(), pattern.into());
        return;
    }
    let also = json!({"type": "string", "pattern": pattern});
    match schema.get_mut("allOf") {
        Some(Value::Array(all)) => all.push(also),
        _ => drop(schema.insert("allOf".into(), json!([also]))),
    }
}

/// The error of a prepared schema with the path of the innermost schema that has it too.
pub(super) fn located(schema: &Value, reason: String) -> GrammarError {
    /// Schemas compiled on the search at most.
    const MAX_TRIES: usize = 256;
    let root = schema.as_object();
    let mut place = (String::new(), schema);
    let mut tries = 0;
    while let Value::Object(entries) = place.1 {
        let guilty = children(entries).into_iter().find(|(_, inner)| {
            tries += 1;
            tries <= MAX_TRIES && root.is_some_and(|root| fails_alike(inner, root, &reason))
        });
        let Some((end, inner)) = guilty else { break };
        place = (place.0 + &end, inner);
    }
    GrammarError { path: place.0, reason }
}

/// Whether a part of a schema fails by itself for the same reason. It keeps the definitions that it
/// may refer to.
fn fails_alike(part: &Value, root: &Map<String, Value>, reason: &str) -> bool {
    let Value::Object(part) = part else { return false };
    let mut alone = part.clone();
    for definitions in ["$defs", "definitions"] {
        if let Some(value) = root.get(definitions) {
            alone.entry(definitions).or_insert_with(|| value.clone());
        }
    }
    compile_prepared(&Value::Object(alone)).is_err_and(|error| reason.contains(&error))
}

/// Whether a schema can be a grammar, or part of one, short of what only whole grammars show.
///
/// # Errors
/// As of [`Grammars::compile`](super::Grammars::compile).
pub fn check_schema(schema: &Value) -> Result<(), GrammarError> {
    on_compiler_thread(|| {
        let prepared = prepare(schema)?;
        compile_prepared(&prepared).map_err(|reason| located(&prepared, reason))
    })
}

/// What [`check_schema`] says, without the search for the place of an error, which takes many times as
/// long.
pub fn is_grammar(schema: &Value) -> bool {
    on_compiler_thread(|| compile_prepared(&prepare(schema)?).map_err(GrammarError::whole)).is_ok()
}

fn compile_prepared(schema: &Value) -> Result<(), String> {
    let grammar = TopLevelGrammar::from_json_schema(schema.clone());
    let compiled = GrammarInit::Serialized(grammar).to_internal(None, limits::parser_limits());
    compiled.map(drop).map_err(|error| first_line(&error))
}
