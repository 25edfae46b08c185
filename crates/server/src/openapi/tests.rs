use std::collections::BTreeSet;

use super::*;
use crate::generation::test_bounds;

fn test_document() -> Value {
    document(&test_bounds(), "1.2.3", true)
}

/// The document has exactly the routes of the router, apart from those that are not here.
#[test]
fn every_route_is_documented() {
    let source = include_str!("../lib.rs");
    let routed: BTreeSet<String> = source
        .split(".route(\"")
        .skip(1)
        .filter_map(|rest| rest.split_once("\", "))
        // What the page loads is no operation, and an object that is never there neither.
        .filter(|(path, handler)| *path != "/docs/{name}" && !handler.contains("not_stored"))
        .map(|(path, _)| path.replace("{*id}", "{id}"))
        .collect();
    let document = test_document();
    let documented: BTreeSet<String> =
        document["paths"].as_object().expect("paths").keys().cloned().collect();
    assert_eq!(documented, routed);
}

/// Operation ids are unique, and every reference leads somewhere.
#[test]
fn ids_and_references() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(target)) = object.get("$ref") {
                    found.push(target.clone());
                }
                object.values().for_each(|inner| references(inner, found));
            }
            Value::Array(items) => items.iter().for_each(|inner| references(inner, found)),
            _ => {}
        }
    }
    let document = test_document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 100, "{}", found.len());
    for target in found {
        let pointer = target.strip_prefix('#').expect("a local reference");
        assert!(document.pointer(pointer).is_some(), "{target}");
    }
    let operations = document["paths"].as_object().expect("paths").values();
    let ids: Vec<_> = operations
        .flat_map(|path| path.as_object().expect("methods").values())
        .map(|op| &op["operationId"])
        .collect();
    assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
}

/// Every schema of the document is one.
#[test]
fn schemas_are_valid() {
    let document = test_document();
    for (name, schema) in document["components"]["schemas"].as_object().expect("schemas") {
        assert!(jsonschema::meta::is_valid(schema), "{name}: {schema}");
    }
}

/// Every kind of error stands under its status, with its code.
#[test]
fn errors_are_documented() {
    let responses = errors();
    for kind in ErrorKind::ALL {
        let row = kind.row();
        let error = &responses[error_name(row.status)]["content"]["application/json"]["schema"]["properties"]
            ["error"];
        assert_eq!(error["properties"]["type"]["const"], row.error_type);
        let codes = error["properties"]["code"]["enum"].as_array().expect("codes");
        assert!(codes.contains(&json!(row.code)), "{kind:?}");
    }
}
