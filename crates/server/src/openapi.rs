//! `GET /openapi.json`: the document of the API, made of the tables and types that requests and
//! answers go through, with the limits of this server; and its page at `/docs`.

mod answers;
mod operations;
mod page;

use axum::{
    body::Bytes,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use crate::{error::ErrorKind, generation::Bounds, known_fields::Route, schema::Renderer, state::AppState};

pub(crate) use page::{asset, show as show_page};

use operations::{OPERATIONS, Operation};

/// Of the specification.
const VERSION: &str = "3.1.1";

/// `GET /openapi.json`
pub(crate) async fn show(State(state): State<AppState>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], state.openapi()).into_response()
}

/// The document as it is sent.
pub(crate) fn bytes(bounds: &Bounds, version: &str, needs_key: bool) -> Bytes {
    document(bounds, version, needs_key).to_string().into()
}

/// The document. `needs_key`: requests without a key are refused.
fn document(bounds: &Bounds, version: &str, needs_key: bool) -> Value {
    let mut parts = Parts { renderer: Renderer::new(bounds), derived: Map::new(), needs_key };
    let mut paths: Map<String, Value> = Map::new();
    for operation in OPERATIONS {
        for (index, path) in operation.paths.iter().enumerate() {
            let rendered = parts.operation(operation, index, path);
            paths.insert((*path).to_owned(), json!({ operation.method: rendered }));
        }
    }
    let mut schemas = parts.renderer.into_named();
    schemas.extend(parts.derived);
    json!({
        "openapi": VERSION,
        "info": {
            "title": "locket",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "An OpenAI-compatible inference server. Fields that are not listed are ignored and \
                named in the response header `x-ignored-fields`; `null` is the same as absent; fields whose \
                only value is `null` are known and refused. Lengths of strings are counted in bytes.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": errors(),
            "headers": headers(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    })
}

/// What operations have in common.
struct Parts<'b> {
    renderer: Renderer<'b>,
    /// Schemas of answers.
    derived: Map<String, Value>,
    needs_key: bool,
}

impl Parts<'_> {
    fn operation(&mut self, operation: &Operation, index: usize, path: &str) -> Value {
        let id = match index {
            0 => operation.id.to_owned(),
            _ => format!("{}{}", operation.id, index + 1),
        };
        let mut rendered = json!({
            "operationId": id,
            "tags": [operation.tag],
            "summary": operation.summary,
            "responses": self.responses(operation),
            "security": if operation.is_open { json!([]) }
                else if self.needs_key { json!([{"bearer": []}]) }
                else { json!([{}, {"bearer": []}]) },
        });
        if !operation.about.is_empty() {
            rendered["description"] = operation.about.into();
        }
        if let Some(route) = operation.body {
            let schema = self.body(route);
            rendered["requestBody"] =
                json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        if path.contains("{id}") {
            let schema = self.renderer.render(crate::schema::Schema::ServedModel);
            rendered["parameters"] =
                json!([{"name": "id", "in": "path", "required": true, "schema": schema}]);
        }
        rendered
    }

    /// The schema of a body: the rows of its table.
    fn body(&mut self, route: Route) -> Value {
        let name = format!("{route:?}Request");
        if !self.derived.contains_key(&name) {
            let schema = request_schema(&mut self.renderer, route);
            self.derived.insert(name.clone(), schema);
        }
        json!({"$ref": format!("#/components/schemas/{name}")})
    }

    fn responses(&mut self, operation: &Operation) -> Value {
        let mut headers = Map::new();
        for name in ALWAYS {
            headers.insert((*name).to_owned(), header_ref(name));
        }
        if operation.body.is_some() {
            headers.insert(IGNORED.to_owned(), header_ref(IGNORED));
        }
        let content = operation.answer.content(&mut self.renderer, &mut self.derived);
        let success = json!({"description": operation.answer.about, "headers": headers, "content": content});
        let mut responses = Map::from_iter([("200".to_owned(), success)]);
        for status in operation.errors {
            let reference = json!({"$ref": format!("#/components/responses/{}", error_name(*status))});
            responses.insert(status.to_string(), reference);
        }
        responses.into()
    }
}

/// The schema of the body of `route`.
pub(crate) fn request_schema(renderer: &mut Renderer<'_>, route: Route) -> Value {
    let mut schema = renderer.object(route.properties());
    for row in route.rows() {
        schema["properties"][row.name]["x-treatment"] = row.treatment.word().into();
    }
    let rules = route.rules();
    if !rules.is_empty() {
        schema["allOf"] = rules.into();
    }
    schema
}

/// On every answer.
const ALWAYS: &[&str] = &["x-request-id", "openai-processing-ms", "openai-version"];
const IGNORED: &str = "x-ignored-fields";

fn header_ref(name: &str) -> Value {
    json!({"$ref": format!("#/components/headers/{name}")})
}

fn headers() -> Value {
    let text = |about: &str| json!({"description": about, "schema": {"type": "string"}});
    let number = |about: &str| json!({"description": about, "schema": {"type": "integer", "minimum": 0}});
    json!({
        "x-request-id": text("The client's, if it is 1 to 128 visible ASCII characters; else a new one."),
        "openai-processing-ms": number("Milliseconds since the last byte of the body."),
        "openai-version": text("Version of the API that is spoken."),
        "x-ignored-fields": text("Names of fields that the server does not know, at most 20."),
        "retry-after": number("Seconds to wait before the next try."),
        "retry-after-ms": number("The same in milliseconds."),
        "www-authenticate": text("`Bearer`"),
    })
}

fn error_name(status: u16) -> String {
    format!("Error{status}")
}

/// One response for each status of the error table, with its codes.
fn errors() -> Value {
    let mut responses: Map<String, Value> = Map::new();
    for kind in ErrorKind::ALL {
        let row = kind.row();
        let response = responses
            .entry(error_name(row.status))
            .or_insert_with(|| error_response(row.status, row.error_type));
        let code = &mut response["content"]["application/json"]["schema"]["properties"]["error"]["properties"]
            ["code"];
        if let Some(codes) = code["enum"].as_array_mut() {
            let value = json!(row.code);
            if !codes.contains(&value) {
                codes.push(value);
            }
        }
    }
    responses.into()
}

fn error_response(status: u16, error_type: &str) -> Value {
    let mut names = ALWAYS.to_vec();
    match status {
        401 => names.push("www-authenticate"),
        429 | 503 => names.extend(["retry-after", "retry-after-ms"]),
        _ => {}
    }
    let headers: Map<String, Value> =
        names.iter().map(|name| ((*name).to_owned(), header_ref(name))).collect();
    let schema = json!({
        "type": "object",
        "required": ["error"],
        "properties": {"error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"const": error_type},
                "param": {"type": ["string", "null"], "description": "Path of the field."},
                "code": {"enum": []},
            },
        }},
    });
    let reason = axum::http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    json!({
        "description": reason.unwrap_or("Error"),
        "headers": headers,
        "content": {"application/json": {"schema": schema}},
    })
}

#[cfg(test)]
mod tests;
