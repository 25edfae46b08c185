//! `GET /`: a page to talk to the model, and what it loads, under `/assets/`. Everything is embedded as
//! it lies in `page/assets`: plain ES modules and one style sheet, made by no other tool. The page uses the
//! API and `/metrics` as any client does; this module only hands out files. `docs/page.md` describes it.

use std::sync::OnceLock;

use axum::{
    Router,
    extract::Path,
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
    routing::get,
};
use sha2::{Digest as _, Sha256};

use crate::{
    error::{ApiError, ErrorKind},
    state::AppState,
};

/// Scripts, styles and answers from this server only, nothing inline; images that the reader chose; text
/// is never parsed as HTML (trusted types, none of which can be made).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// A file of the page.
struct Asset {
    name: &'static str,
    media_type: &'static str,
    bytes: &'static [u8],
    /// Of the bytes; made when it is first asked for.
    tag: OnceLock<HeaderValue>,
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! asset {
    ($name:literal, $media_type:expr) => {
        Asset {
            name: $name,
            media_type: $media_type,
            bytes: include_bytes!(concat!("page/assets/", $name)),
            tag: OnceLock::new(),
        }
    };
}

static PAGE: Asset = asset!("index.html", HTML);
/// All files that the page loads.
static ASSETS: [Asset; 21] = [
    asset!("announcer.js", SCRIPT),
    asset!("api.js", SCRIPT),
    asset!("appearance.js", SCRIPT),
    asset!("composer.js", SCRIPT),
    asset!("conversations.js", SCRIPT),
    asset!("dom.js", SCRIPT),
    asset!("drawers.js", SCRIPT),
    asset!("icon.svg", "image/svg+xml"),
    asset!("live.js", SCRIPT),
    asset!("main.js", SCRIPT),
    asset!("markdown.js", SCRIPT),
    asset!("metrics_text.js", SCRIPT),
    asset!("overlay.js", SCRIPT),
    asset!("requests.js", SCRIPT),
    asset!("settings.js", SCRIPT),
    asset!("spans.js", SCRIPT),
    asset!("sse.js", SCRIPT),
    asset!("style.css", "text/css; charset=utf-8"),
    asset!("theme.js", SCRIPT),
    asset!("transcript.js", SCRIPT),
    asset!("vault.js", SCRIPT),
];

/// Adds the page's routes if the operator wants the page.
pub(crate) fn add(routes: Router<AppState>, is_on: bool) -> Router<AppState> {
    if !is_on {
        return routes;
    }
    routes.route("/", get(show)).route("/assets/{name}", get(asset))
}

/// `GET /`
async fn show(headers: HeaderMap) -> Response {
    PAGE.answer(&headers)
}

/// `GET /assets/{name}`
async fn asset(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    match ASSETS.iter().find(|asset| asset.name == name) {
        Some(asset) => Ok(asset.answer(&headers)),
        None => Err(ApiError::new(ErrorKind::NotFound, "The page has no such file.")),
    }
}

impl Asset {
    /// The file, or 304 to a browser that has it. Names do not change with the content, so browsers ask
    /// each time whether theirs is still good.
    fn answer(&self, request: &HeaderMap) -> Response {
        let tag = self.tag();
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static(self.media_type)),
            (ETAG, tag.clone()),
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
            (
                HeaderName::from_static("cross-origin-resource-policy"),
                HeaderValue::from_static("same-origin"),
            ),
        ];
        if is_known(request, tag) {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
        (headers, self.bytes).into_response()
    }

    fn tag(&self) -> &HeaderValue {
        self.tag.get_or_init(|| {
            let digest = Sha256::digest(self.bytes);
            let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            // Hexadecimal digits in quotes are a header.
            HeaderValue::from_str(&format!("\"{hex}\"")).unwrap_or(HeaderValue::from_static("\"\""))
        })
    }
}

/// Whether the request names the tag as one that it has. Tags are compared weakly, as RFC 9110 says for
/// this header.
fn is_known(request: &HeaderMap, tag: &HeaderValue) -> bool {
    let mut named = request
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().trim_start_matches("W/"));
    named.any(|name| name == "*" || name.as_bytes() == tag.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn text(asset: &Asset) -> &'static str {
        std::str::from_utf8(asset.bytes).expect("UTF-8")
    }

    /// The table has exactly the files of the folder.
    #[test]
    fn every_file_is_embedded() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page/assets");
        let there: BTreeSet<String> = std::fs::read_dir(folder)
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        let embedded = ASSETS.iter().chain([&PAGE]).map(|asset| asset.name.to_owned()).collect();
        assert_eq!(there, embedded);
    }

    /// What a file loads is there, and lies on this server.
    #[test]
    fn every_reference_leads_to_a_file() {
        let known: BTreeSet<&str> = ASSETS.iter().map(|asset| asset.name).collect();
        let mut references = 0;
        for asset in ASSETS.iter().chain([&PAGE]) {
            for rest in text(asset).split("from \"./").skip(1).chain(text(asset).split("\"assets/").skip(1)) {
                let name = rest.split('"').next().unwrap_or_default();
                assert!(known.contains(name), "{} names {name}", asset.name);
                references += 1;
            }
        }
        assert!(references > 20, "{references}");
    }

    /// The policy would refuse these; the browser test shows that it does.
    #[test]
    fn nothing_is_inline_and_nothing_becomes_html() {
        let html = text(&PAGE);
        for banned in ["style=", "onclick", "onload", "javascript:", "<style"] {
            assert!(!html.contains(banned), "index.html has {banned}");
        }
        assert!(html.matches("<script").count() == html.matches("<script src=").count() + 1);
        let sinks = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("];
        for asset in &ASSETS {
            for sink in sinks {
                assert!(!text(asset).contains(sink), "{} has {sink}", asset.name);
            }
        }
    }

    #[test]
    fn tags_are_compared() {
        let tag = HeaderValue::from_static("\"ab\"");
        let known = |value: &'static str| {
            let headers = HeaderMap::from_iter([(IF_NONE_MATCH, HeaderValue::from_static(value))]);
            is_known(&headers, &tag)
        };
        for same in ["\"ab\"", "W/\"ab\"", "\"x\", \"ab\"", "*"] {
            assert!(known(same), "{same}");
        }
        for other in ["\"a\"", "ab", "", "\"abc\""] {
            assert!(!known(other), "{other}");
        }
        assert!(!is_known(&HeaderMap::new(), &tag));
    }
}
