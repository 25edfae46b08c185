//! `GET /docs`: Swagger UI over `/openapi.json`. Its two files are embedded by `build.rs`.

use axum::{
    extract::Path,
    http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName},
    response::{IntoResponse, Response},
};

use crate::error::{ApiError, ErrorKind};

/// Nothing from elsewhere. Swagger UI sets styles on its elements, so those are allowed inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                      img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/start.js");
/// Compressed, as they are sent.
const BUNDLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui-bundle.js.gz"));
const STYLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui.css.gz"));

/// `GET /docs`
pub(crate) async fn show() -> Response {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-content-type-options"), "nosniff"),
    ];
    (headers, PAGE).into_response()
}

/// `GET /docs/{name}`: what the page loads.
pub(crate) async fn asset(Path(name): Path<String>) -> Result<Response, ApiError> {
    let compressed = |media_type: &'static str, bytes: &'static [u8]| {
        let headers = [
            (CONTENT_TYPE, media_type),
            (CONTENT_ENCODING, "gzip"),
            (CACHE_CONTROL, "public, max-age=86400"),
        ];
        (headers, bytes).into_response()
    };
    match name.as_str() {
        "start.js" => {
            Ok(([(CONTENT_TYPE, "text/javascript"), (CACHE_CONTROL, "no-cache")], SCRIPT).into_response())
        }
        "swagger-ui-bundle.js" => Ok(compressed("text/javascript", BUNDLE)),
        "swagger-ui.css" => Ok(compressed("text/css", STYLE)),
        _ => Err(ApiError::new(ErrorKind::NotFound, "The page has no such file.")),
    }
}
