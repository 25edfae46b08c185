//! What a request field may hold, as data: the table of fields is made of it, and `/openapi.json`
//! is rendered from it with the limits of this server. A property test holds it against the parsers.

#[cfg(test)]
pub(crate) mod agreement;

use serde_json::{Map, Value, json};

use crate::{error::ApiError, fields::Field, generation::Bounds};

/// The values of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Schema {
    /// No value but `null`: the field is refused.
    Absent,
    /// Any JSON.
    Any,
    /// `true` or `false`.
    Boolean,
    /// `false` alone.
    False,
    /// `true` alone.
    True,
    /// A whole number, both ends included.
    Integer(Limit, Limit),
    /// A number, both ends included.
    Number(f64, f64),
    /// A number above the first and up to the second.
    Above(f64, f64),
    /// A string of so many bytes, both ends included.
    Text(usize, usize),
    /// A string of any length.
    AnyText,
    /// A string that matches the regular expression, of at most so many bytes.
    Pattern(&'static str, usize),
    /// One of these strings.
    OneOf(&'static [&'static str]),
    /// A name under which the model is served.
    ServedModel,
    /// A cache method that the operator allows.
    CacheMethod,
    /// So many elements, both ends included.
    Array(&'static Schema, usize, usize),
    /// An object of any content.
    AnyObject,
    /// These keys; others are ignored, and `null` is the same as absent.
    Object(&'static [Property]),
    /// These keys and no others.
    Closed(&'static [Property]),
    /// Keys are data: at most so many of them.
    Map(Keys, &'static Schema, usize),
    /// A dropping method that the operator allows.
    VisualMethod,
    /// This, if the model sees; else nothing but `null`.
    IfItSees(&'static Schema),
    /// Any of these.
    AnyOf(&'static [Schema]),
    /// A schema with a name of its own in the document.
    Named(&'static str, &'static Schema),
}

/// The end of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// This number.
    Is(i64),
    /// The operator's largest `n`.
    MaxChoices,
    /// The last id of the vocabulary.
    LastToken,
    /// The longest prompt plus answer.
    ContextLength,
    /// The operator's largest number of slots.
    MaxSlots,
}

/// What the keys of a [`Schema::Map`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Strings of at most so many characters.
    Text(usize),
    /// Decimal ids of the vocabulary.
    TokenIds,
}

/// A key of an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Property {
    pub(crate) name: &'static str,
    pub(crate) schema: Schema,
    pub(crate) is_required: bool,
    /// One sentence or none, in Markdown.
    pub(crate) about: &'static str,
}

/// A key that must be there.
pub(crate) const fn required(name: &'static str, schema: Schema, about: &'static str) -> Property {
    Property { name, schema, is_required: true, about }
}

/// A key that may be absent or `null`.
pub(crate) const fn optional(name: &'static str, schema: Schema, about: &'static str) -> Property {
    Property { name, schema, is_required: false, about }
}

/// One token id.
pub(crate) const TOKEN: Schema = Schema::Integer(Limit::Is(0), Limit::LastToken);

/// An integer between two numbers.
pub(crate) const fn integer(min: i64, max: i64) -> Schema {
    Schema::Integer(Limit::Is(min), Limit::Is(max))
}

/// A positive number of tokens.
pub(crate) const COUNT: Schema = integer(1, u32::MAX as i64);

impl Schema {
    /// Checks a field that has no effect; the kinds that such fields have.
    pub(crate) fn check(self, field: &Field<'_, '_>) -> Result<(), ApiError> {
        match self {
            Self::Boolean => field.boolean().map(drop),
            Self::Text(_, max) => field.bounded_string(max).map(drop),
            Self::AnyObject => field.object().map(drop),
            Self::OneOf(allowed) => field.one_of(allowed).map(drop),
            _ => Err(ApiError::internal("a field without effect needs a parser of its own")),
        }
    }
}

/// Turns schemas into JSON Schema (draft 2020-12, as OpenAPI 3.1 has it).
pub(crate) struct Renderer<'b> {
    bounds: &'b Bounds,
    /// Schemas with names, for `components.schemas`.
    named: Map<String, Value>,
}

impl<'b> Renderer<'b> {
    /// With the limits of this server.
    pub(crate) fn new(bounds: &'b Bounds) -> Self {
        Self { bounds, named: Map::new() }
    }

    /// The schemas that were met and have names.
    pub(crate) fn into_named(self) -> Map<String, Value> {
        self.named
    }

    /// The JSON Schema of `schema`.
    pub(crate) fn render(&mut self, schema: Schema) -> Value {
        match schema {
            Schema::Absent => json!({"type": "null"}),
            Schema::Any => json!({}),
            Schema::Boolean => json!({"type": "boolean"}),
            Schema::False => json!({"const": false}),
            Schema::True => json!({"const": true}),
            Schema::Integer(min, max) => {
                json!({"type": "integer", "minimum": self.limit(min), "maximum": self.limit(max)})
            }
            Schema::Number(min, max) => json!({"type": "number", "minimum": min, "maximum": max}),
            Schema::Above(min, max) => json!({"type": "number", "exclusiveMinimum": min, "maximum": max}),
            Schema::Text(min, max) => text(min, max),
            Schema::AnyText => json!({"type": "string"}),
            Schema::Pattern(pattern, max) => json!({"type": "string", "pattern": pattern, "maxLength": max}),
            Schema::OneOf(names) => json!({"type": "string", "enum": names}),
            Schema::ServedModel => {
                let adapters = self.bounds.adapters.all().into_iter().map(|adapter| adapter.name);
                let names: Vec<String> =
                    self.bounds.served_model_names.iter().cloned().chain(adapters).collect();
                json!({"type": "string", "enum": names})
            }
            Schema::CacheMethod => {
                let names: Vec<_> = self.bounds.cache.allowed.iter().map(|method| method.name()).collect();
                json!({"type": "string", "enum": names})
            }
            Schema::Array(items, min, max) => self.array(*items, min, max),
            Schema::AnyObject => json!({"type": "object"}),
            Schema::Object(properties) => self.object(properties.iter().copied()),
            Schema::Closed(properties) => {
                let mut object = self.object(properties.iter().copied());
                object["additionalProperties"] = json!({"type": "null"});
                object
            }
            Schema::Map(keys, values, max) => {
                let values = nullable(self.render(*values));
                let keys = match keys {
                    Keys::Text(max) => json!({"maxLength": max}),
                    Keys::TokenIds => json!({"pattern": decimals_up_to(self.limit(Limit::LastToken))}),
                };
                json!({"type": "object", "propertyNames": keys, "additionalProperties": values,
                       "maxProperties": max})
            }
            Schema::VisualMethod => {
                let methods = self.bounds.visual.iter().flat_map(|visual| &visual.methods);
                json!({"type": "string", "enum": methods.map(|method| method.name()).collect::<Vec<_>>()})
            }
            Schema::IfItSees(schema) if self.bounds.visual.is_some() => self.render(*schema),
            Schema::IfItSees(_) => self.render(Schema::Absent),
            Schema::AnyOf(schemas) => {
                let sees = self.bounds.visual.is_some();
                let is_there = |schema: &&Schema| sees || !matches!(schema, Schema::IfItSees(_));
                let variants: Vec<_> =
                    schemas.iter().filter(is_there).map(|schema| self.render(*schema)).collect();
                json!({ "anyOf": variants })
            }
            Schema::Named(name, schema) => {
                if !self.named.contains_key(name) {
                    let rendered = self.render(*schema);
                    self.named.insert(name.to_owned(), rendered);
                }
                json!({"$ref": format!("#/components/schemas/{name}")})
            }
        }
    }

    /// An object whose other keys are ignored.
    pub(crate) fn object(&mut self, properties: impl Iterator<Item = Property>) -> Value {
        let mut required = Vec::new();
        let mut rendered = Map::new();
        for property in properties {
            let mut schema = self.render(property.schema);
            if property.is_required {
                required.push(property.name);
            } else {
                schema = nullable(schema);
            }
            if !property.about.is_empty() {
                schema["description"] = without_anchors(property.about).into();
            }
            rendered.insert(property.name.to_owned(), schema);
        }
        let mut object = json!({"type": "object", "properties": rendered});
        if !required.is_empty() {
            object["required"] = json!(required);
        }
        object
    }

    fn array(&mut self, items: Schema, min: usize, max: usize) -> Value {
        let mut array = json!({"type": "array", "items": self.render(items)});
        if min > 0 {
            array["minItems"] = json!(min);
        }
        if max < usize::MAX {
            array["maxItems"] = json!(max);
        }
        array
    }

    fn limit(&self, limit: Limit) -> i64 {
        match limit {
            Limit::Is(number) => number,
            Limit::MaxChoices => self.bounds.max_n.into(),
            Limit::LastToken => self.bounds.vocab_size.saturating_sub(1).into(),
            Limit::ContextLength => self.bounds.max_model_len.into(),
            Limit::MaxSlots => self.bounds.cache.max_slots.into(),
        }
    }
}

/// A string of so many characters.
fn text(min: usize, max: usize) -> Value {
    let mut schema = json!({"type": "string", "minLength": min});
    if max < usize::MAX {
        schema["maxLength"] = json!(max);
    }
    schema
}

/// The same values, or `null`.
fn nullable(mut schema: Value) -> Value {
    if schema.as_object().is_none_or(Map::is_empty) || schema["type"] == "null" {
        return schema;
    }
    if let Some(Value::Array(variants)) = schema.get_mut("anyOf") {
        variants.push(json!({"type": "null"}));
        return schema;
    }
    let Some(Value::String(name)) = schema.get("type") else {
        return json!({"anyOf": [schema, {"type": "null"}]});
    };
    let types = json!([name, "null"]);
    schema["type"] = types;
    if let Some(Value::Array(names)) = schema.get_mut("enum") {
        names.push(Value::Null);
    }
    schema
}

/// Links into docs/api.md lead nowhere outside of it: `[text](#place)` becomes `text`.
fn without_anchors(markdown: &str) -> String {
    let mut text = String::with_capacity(markdown.len());
    let mut rest = markdown;
    while let Some((before, label, after)) = rest.split_once('[').and_then(|(before, link)| {
        let (label, target) = link.split_once("](#")?;
        Some((before, label, target.split_once(')')?.1))
    }) {
        text.push_str(before);
        text.push_str(label);
        rest = after;
    }
    text + rest
}

/// A regular expression for the decimal numbers from 0 to `last`, with zeros in front or not.
fn decimals_up_to(last: i64) -> String {
    let digits = last.to_string();
    let mut ways = vec![digits.clone()];
    for (place, digit) in digits.bytes().enumerate() {
        let rest = digits.len() - place - 1;
        if digit > b'0' {
            let smaller = char::from(digit - 1);
            ways.push(format!("{}[0-{smaller}][0-9]{{{rest}}}", &digits[..place]));
        }
    }
    if digits.len() > 1 {
        ways.push(format!("[0-9]{{1,{}}}", digits.len() - 1));
    }
    format!("^0*({})$", ways.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::test_bounds;

    fn render(schema: Schema) -> Value {
        Renderer::new(&test_bounds()).render(schema)
    }

    #[test]
    fn limits_are_those_of_the_server() {
        assert_eq!(render(TOKEN), json!({"type": "integer", "minimum": 0, "maximum": 299}));
        assert_eq!(render(Schema::ServedModel), json!({"type": "string", "enum": ["tiny", "org/alias"]}));
    }

    #[test]
    fn optional_keys_may_be_null() {
        const KEYS: &[Property] = &[
            optional("a", Schema::OneOf(&["x"]), ""),
            required("b", Schema::Boolean, "See [there](#there), or [here](#here)."),
            optional("c", Schema::AnyOf(&[Schema::AnyText, Schema::Boolean]), ""),
            optional("d", Schema::False, ""),
            optional("e", Schema::Any, ""),
            optional("f", Schema::Absent, ""),
        ];
        assert_eq!(
            render(Schema::Object(KEYS)),
            json!({"type": "object", "required": ["b"], "properties": {
                "a": {"type": ["string", "null"], "enum": ["x", null]},
                "b": {"type": "boolean", "description": "See there, or here."},
                "c": {"anyOf": [{"type": "string"}, {"type": "boolean"}, {"type": "null"}]},
                "d": {"anyOf": [{"const": false}, {"type": "null"}]},
                "e": {},
                "f": {"type": "null"},
            }})
        );
    }

    #[test]
    fn decimal_ranges() {
        for last in [0, 7, 10, 99, 100, 299, 49_151] {
            let schema = json!({"type": "string", "pattern": decimals_up_to(last)});
            let validator = jsonschema::validator_for(&schema).expect("a schema");
            for number in 0..=last + 200 {
                assert_eq!(validator.is_valid(&number.to_string().into()), number <= last, "{number} {last}");
            }
            assert!(validator.is_valid(&"000".into()));
            for wrong in ["", "-1", "+1", "1.0", "x"] {
                assert!(!validator.is_valid(&wrong.into()), "{wrong}");
            }
        }
    }
}
