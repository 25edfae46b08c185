//! Random JSON schemas of everything that can be a grammar, and a validator that knows nothing of ours.

use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Map, Value, json};

/// A random schema. Recursion ends by itself in a random answer: a reference is always beside `null`.
pub fn random_schema(rng: &mut StdRng) -> Value {
    let with_definition = rng.random_bool(0.3);
    let mut schema = object(rng, 3, with_definition);
    if rng.random_bool(0.2) {
        schema = any(rng, 3, with_definition);
    }
    if with_definition {
        let mut node = object(rng, 1, false);
        node["properties"]["next"] = json!({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]});
        schema["$defs"] = json!({ "node": node });
    }
    schema
}

/// Whether a text is JSON that a schema allows; `None` if a number in it is beyond the parser's range.
pub fn is_valid(schema: &Value, text: &str) -> Option<bool> {
    let validator = jsonschema::options().should_validate_formats(true).build(schema).expect("a schema");
    match serde_json::from_str(text) {
        Ok(value) => Some(validator.is_valid(&value)),
        Err(error) if error.to_string().contains("number out of range") => None,
        Err(_) => Some(false),
    }
}

fn any(rng: &mut StdRng, depth: u32, with_definition: bool) -> Value {
    let kinds = if depth == 0 { 6 } else { 11 };
    match rng.random_range(0..kinds) {
        0 => string(rng),
        1 => integer(rng),
        2 => number(rng),
        3 => json!({"type": (["boolean", "null"].choose(rng))}),
        4 => enumeration(rng),
        5 => json!({"type": ["string", "null"], "maxLength": 4}),
        6 | 7 => object(rng, depth - 1, with_definition),
        8 => array(rng, depth - 1, with_definition),
        9 if with_definition => json!({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}),
        9 => json!({"allOf": [{"type": "integer", "minimum": -9}, {"maximum": 99}]}),
        _ => {
            let count = rng.random_range(2..4);
            let variants: Vec<Value> = (0..count).map(|_| any(rng, depth - 1, with_definition)).collect();
            json!({ "anyOf": variants, "description": "one of several" })
        }
    }
}

fn string(rng: &mut StdRng) -> Value {
    let patterns =
        ["^[a-z]{1,5}$", "^(ab|cd)+$", "^[0-9]{3}-[0-9]{2}$", "^[A-Z][a-zé]*$", r"^\d+(\.\d+)?$", "x"];
    let formats = ["date", "date-time", "time", "uuid", "ipv4", "ipv6", "hostname", "email", "duration"];
    match rng.random_range(0..4) {
        0 => json!({"type": "string", "pattern": patterns.choose(rng), "maxLength": 12}),
        1 => json!({"type": "string", "format": formats.choose(rng), "maxLength": 48}),
        2 => {
            let least = rng.random_range(0..4);
            json!({"type": "string", "minLength": least, "maxLength": least + rng.random_range(0..9)})
        }
        _ => json!({"type": "string"}),
    }
}

fn integer(rng: &mut StdRng) -> Value {
    let least = rng.random_range(-1000..1000);
    match rng.random_range(0..5) {
        0 => json!({"type": "integer"}),
        1 => json!({"type": "integer", "minimum": least, "maximum": least + rng.random_range(0..500)}),
        2 => json!({"type": "integer", "exclusiveMinimum": least}),
        3 => json!({"type": "integer", "multipleOf": rng.random_range(2..7), "minimum": 0, "maximum": 9999}),
        _ => json!({"type": "integer", "maximum": least}),
    }
}

fn number(rng: &mut StdRng) -> Value {
    let least = f64::from(rng.random_range(-400..400)) / 4.0;
    match rng.random_range(0..3) {
        0 => json!({"type": "number"}),
        1 => json!({"type": "number", "minimum": least, "maximum": least + 2.5}),
        _ => json!({"type": "number", "exclusiveMinimum": least, "exclusiveMaximum": least + 100.0}),
    }
}

fn enumeration(rng: &mut StdRng) -> Value {
    let values = [
        json!("red"),
        json!("größer \"quoted\"\n"),
        json!("😀"),
        json!(""),
        json!(7),
        json!(-2.5),
        json!(null),
        json!([1, {"a": "b"}]),
        json!({"k": [true]}),
    ];
    let count = rng.random_range(1..4);
    let chosen: Vec<&Value> = values.choose_multiple(rng, count).collect();
    if count == 1 { json!({"const": chosen[0]}) } else { json!({ "enum": chosen }) }
}

fn array(rng: &mut StdRng, depth: u32, with_definition: bool) -> Value {
    let least = rng.random_range(0..3);
    let most = least + rng.random_range(0..3);
    if rng.random_bool(0.3) {
        let first = [any(rng, depth, with_definition), any(rng, depth, with_definition)];
        return json!({"type": "array", "prefixItems": first, "items": false, "minItems": 2});
    }
    json!({"type": "array", "items": any(rng, depth, with_definition), "minItems": least, "maxItems": most})
}

fn object(rng: &mut StdRng, depth: u32, with_definition: bool) -> Value {
    let names = ["a", "name", "zwölf", "with space", "q\"uote", "next_one", "$ref?", "b2", ""];
    let mut properties = Map::new();
    let count = rng.random_range(0..5);
    let chosen: Vec<&&str> = names.choose_multiple(rng, count).collect();
    for name in chosen {
        properties.insert((*name).into(), any(rng, depth.saturating_sub(1), with_definition));
    }
    let required: Vec<String> = properties.keys().filter(|_| rng.random_bool(0.6)).cloned().collect();
    let additional = if rng.random_bool(0.15) { json!({"type": "boolean"}) } else { json!(false) };
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": additional})
}
