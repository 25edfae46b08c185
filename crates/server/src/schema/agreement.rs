//! Schemas against parsers: bodies that a schema allows, and bodies just beside it, are read by the
//! route's parser, which must accept exactly those that the rendered schema does.

use std::cell::Cell;

use locket_vision::drop::Method;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::*;
use crate::{
    generation::{Bounds, seeing_bounds, test_bounds},
    known_fields::{Route, Row, Treatment},
    openapi::request_schema,
};

/// Holds the parser of `route` against its schema. `base` is the smallest body. A field named in
/// `looser` may be refused for reasons that JSON Schema cannot say; only what violates the schema
/// must be refused then. Both for a model that takes text only, and for one that sees.
pub(crate) fn assert_agreement(
    route: Route,
    base: &Value,
    looser: &[&str],
    parse: impl Fn(&Value, &Bounds) -> Result<(), ApiError>,
) {
    for bounds in [test_bounds(), seeing_bounds()] {
        agree(route, base, looser, &bounds, |body| parse(body, &bounds));
    }
}

fn agree(
    route: Route,
    base: &Value,
    looser: &[&str],
    bounds: &Bounds,
    parse: impl Fn(&Value) -> Result<(), ApiError>,
) {
    let mut renderer = Renderer::new(bounds);
    let schema = request_schema(&mut renderer, route);
    let whole = json!({"allOf": [schema], "components": {"schemas": renderer.into_named()}});
    let validator = jsonschema::validator_for(&whole).expect("a schema");
    assert!(parse(base).is_ok() && validator.is_valid(base), "the smallest body is valid");
    let mut accepted = 0;
    for row in route.rows() {
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(Config { cases: 150, ..Config::default() }, rng);
        let was_accepted = Cell::new(false);
        let result = runner.run(&near(row.schema, 0), |value| {
            let mut body = base.clone();
            body[row.name] = value;
            complete(route, &mut body, row);
            let outcome = parse(&body);
            if validator.is_valid(&body) {
                was_accepted.set(was_accepted.get() | outcome.is_ok());
                let may_fail = looser.contains(&row.name);
                prop_assert!(outcome.is_ok() || may_fail, "allowed, but refused: {body} {outcome:?}");
            } else {
                prop_assert!(outcome.is_err(), "accepted, but not allowed: {body}");
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", row.name);
        }
        assert!(was_accepted.get(), "no value of {} was accepted", row.name);
        accepted += usize::from(row.treatment != Treatment::Refused);
    }
    assert!(accepted > 0);
}

/// Gives a field its companions in half of the bodies that need them.
fn complete(route: Route, body: &mut Value, row: &Row) {
    match row.name {
        "stream_options" if body["stream_options"] != json!({}) => body["stream"] = json!(true),
        "top_logprobs" if body["top_logprobs"] == json!(1) => {}
        "top_logprobs" if route == Route::Responses => {
            body["include"] = json!(["message.output_text.logprobs"]);
        }
        "top_logprobs" => body["logprobs"] = json!(true),
        "messages" if route == Route::Tokenize && body["messages"] != json!(["x"]) => {
            body["prompt"] = Value::Null;
        }
        "continue_final_message" => body["add_generation_prompt"] = json!(false),
        "best_of" => body["n"] = body["best_of"].clone(),
        _ => {}
    }
}

/// Deepest nesting of generated values.
const MAX_DEPTH: u32 = 5;

/// Values of a schema, and others beside it.
fn near(schema: Schema, depth: u32) -> BoxedStrategy<Value> {
    let valid = of(schema, depth);
    prop_oneof![6 => valid, 1 => edges(schema), 1 => foreign()].boxed()
}

/// Small values of every type.
fn foreign() -> BoxedStrategy<Value> {
    select(vec![
        Value::Null,
        json!(true),
        json!(false),
        json!(0),
        json!(-1),
        json!(1),
        json!(1.0),
        json!(2.5),
        json!(1e300),
        json!(""),
        json!("x"),
        json!([]),
        json!([[]]),
        json!(["x"]),
        json!([1]),
        json!({}),
        json!({"x": 1}),
    ])
    .boxed()
}

/// Values on and beside the limits.
fn edges(schema: Schema) -> BoxedStrategy<Value> {
    let bounds = test_bounds();
    let renderer = Renderer::new(&bounds);
    match schema {
        Schema::Integer(min, max) => {
            let (min, max) = (renderer.limit(min), renderer.limit(max));
            let values = [min, max, min.saturating_sub(1), max.saturating_add(1)];
            select(values.map(Value::from).to_vec()).boxed()
        }
        Schema::Number(min, max) | Schema::Above(min, max) => {
            select([min, max, min - 0.125, max + 0.125].map(Value::from).to_vec()).boxed()
        }
        Schema::Text(min, max) => {
            let lengths = [min, max, min.saturating_sub(1), max.saturating_add(1)];
            let lengths = lengths.into_iter().filter(|length| *length < usize::MAX);
            select(lengths.map(|length| Value::from("x".repeat(length))).collect::<Vec<_>>()).boxed()
        }
        Schema::Pattern(_, max) => {
            select([1, max, max + 1].map(|length| Value::from("x".repeat(length))).to_vec()).boxed()
        }
        Schema::Array(items, min, max) if max <= 2048 => {
            (select(vec![min, max, max + 1]), of(*items, MAX_DEPTH))
                .prop_map(|(length, item)| Value::from(vec![item; length]))
                .boxed()
        }
        Schema::Map(_, _, max) => select(vec![max, max + 1])
            .prop_map(|length| (0..length).map(|index| (index.to_string(), json!(1))).collect())
            .boxed(),
        Schema::AnyOf(variants) => one_of(variants, |variant| edges(*variant)),
        Schema::Named(_, schema) | Schema::IfItSees(schema) => edges(*schema),
        _ => foreign(),
    }
}

/// Values of a schema; parts may be [`near`] theirs.
fn of(schema: Schema, depth: u32) -> BoxedStrategy<Value> {
    let bounds = test_bounds();
    let renderer = Renderer::new(&bounds);
    let names = |names: Vec<String>| select(names).prop_map(Value::from).boxed();
    match schema {
        Schema::Absent => Just(Value::Null).boxed(),
        Schema::Any => foreign(),
        Schema::Boolean => any::<bool>().prop_map(Value::from).boxed(),
        Schema::False => Just(json!(false)).boxed(),
        Schema::True => Just(json!(true)).boxed(),
        Schema::Integer(min, max) => {
            let (min, max) = (renderer.limit(min), renderer.limit(max));
            (min..=max).prop_map(Value::from).boxed()
        }
        Schema::Number(min, max) => (min..=max).prop_map(Value::from).boxed(),
        Schema::Above(min, max) => (min + 0.01..=max).prop_map(Value::from).boxed(),
        Schema::Text(min, max) => text(min, max),
        Schema::AnyText => text(0, 12),
        // A class of characters, one or more.
        Schema::Pattern(pattern, _) if pattern.contains('^') => {
            let class = pattern.trim_start_matches('^').trim_end_matches("+$");
            let texts = proptest::string::string_regex(&format!("{class}{{1,20}}")).expect("a pattern");
            texts.prop_map(Value::from).boxed()
        }
        Schema::Pattern(..) => "[ -~]{0,3}[!-~]{1,5}".prop_map(Value::from).boxed(),
        Schema::OneOf(allowed) => names(allowed.iter().map(|name| (*name).to_owned()).collect()),
        Schema::ServedModel => names(bounds.served_model_names.clone()),
        Schema::CacheMethod => {
            names(bounds.cache.allowed.iter().map(|method| method.name().to_owned()).collect())
        }
        Schema::Array(items, min, max) => {
            let most = max.min(min + 3);
            vec(part(*items, depth), min..=most).prop_map(Value::from).boxed()
        }
        Schema::AnyObject => select(vec![json!({}), json!({"x": 1}), json!({"x": {"y": [null]}})]).boxed(),
        Schema::Object(properties) | Schema::Closed(properties) => object(properties, depth),
        Schema::Map(keys, values, _) => {
            let key = match keys {
                Keys::Text(max) => format!("[a-z]{{1,{max}}}"),
                Keys::TokenIds => "0{0,2}[12]?[0-9]{1,2}|[3-9][0-9]{2}|-1".to_owned(),
            };
            let pairs = proptest::collection::btree_map(
                proptest::string::string_regex(&key).expect("a pattern"),
                part(*values, depth),
                0..3,
            );
            pairs.prop_map(|pairs| pairs.into_iter().collect()).boxed()
        }
        Schema::VisualMethod => names(Method::ALL.map(|method| method.name().to_owned()).to_vec()),
        Schema::IfItSees(schema) => of(*schema, depth),
        Schema::AnyOf(variants) => one_of(variants, |variant| of(*variant, depth)),
        Schema::Named(_, schema) => of(*schema, depth),
    }
}

/// ASCII, so that bytes are characters.
fn text(min: usize, max: usize) -> BoxedStrategy<Value> {
    let pattern = format!("[ -~]{{{min},{}}}", max.min(min + 12));
    proptest::string::string_regex(&pattern).expect("a pattern").prop_map(Value::from).boxed()
}

fn part(schema: Schema, depth: u32) -> BoxedStrategy<Value> {
    if depth >= MAX_DEPTH {
        of(schema, depth)
    } else {
        prop_oneof![9 => of(schema, depth + 1), 1 => near(schema, depth + 1)].boxed()
    }
}

fn one_of(
    variants: &'static [Schema],
    make: impl Fn(&'static Schema) -> BoxedStrategy<Value>,
) -> BoxedStrategy<Value> {
    proptest::strategy::Union::new(variants.iter().map(make)).boxed()
}

/// Some of the keys, and now and then an unknown one; a required one may be forgotten.
fn object(properties: &'static [Property], depth: u32) -> BoxedStrategy<Value> {
    let keys: Vec<_> = properties
        .iter()
        .map(|property| {
            let share = if property.is_required { 0.95 } else { 0.3 };
            proptest::option::weighted(share, part(property.schema, depth)).boxed()
        })
        .collect();
    (keys, proptest::option::weighted(0.1, foreign()))
        .prop_map(|(values, unknown)| {
            let known = properties.iter().zip(values);
            let mut object: Map<String, Value> =
                known.filter_map(|(property, value)| Some((property.name.to_owned(), value?))).collect();
            if let Some(value) = unknown {
                object.insert("unknown_key".to_owned(), value);
            }
            object.into()
        })
        .boxed()
}
