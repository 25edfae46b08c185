//! The page at `/`: its files, their headers, and the setting that turns it off. What the page does is
//! tested in a browser (`tests/page/`).

use axum::{
    body::Body,
    http::{Method, Request},
};
use locket_server::{ServerConfig, keys::KeyDigest};

use crate::fake::{Answer, TestServer};

async fn get(server: &TestServer, path: &str, known: Option<&str>) -> Answer {
    let request = Request::get(path);
    let request = match known {
        Some(tag) => request.header("if-none-match", tag),
        None => request,
    };
    server.send(request.body(Body::empty()).expect("a request")).await
}

#[tokio::test]
async fn files_come_with_policy_and_type() {
    let server = TestServer::start();
    for (path, media_type, part) in [
        ("/", "text/html; charset=utf-8", "<title>locket</title>"),
        ("/assets/main.js", "text/javascript; charset=utf-8", "import "),
        ("/assets/style.css", "text/css; charset=utf-8", ":root"),
        ("/assets/icon.svg", "image/svg+xml", "<svg"),
    ] {
        let answer = get(&server, path, None).await;
        answer.ok_status();
        assert!(answer.text.contains(part), "{path}");
        assert_eq!(answer.header("content-type"), media_type, "{path}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("referrer-policy"), "no-referrer");
        let policy = answer.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"), "{policy}");
        assert!(policy.contains("require-trusted-types-for 'script'"), "{policy}");
    }
}

#[tokio::test]
async fn a_browser_that_has_a_file_is_told_so() {
    let server = TestServer::start();
    for path in ["/", "/assets/live.js"] {
        let first = get(&server, path, None).await;
        let tag = first.header("etag").to_owned();
        assert!(tag.len() == 34 && tag.starts_with('"') && tag.ends_with('"'), "{tag}");
        assert_eq!(first.header("cache-control"), "no-cache");
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
            let again = get(&server, path, Some(&known)).await;
            assert_eq!((again.status.as_u16(), again.text.as_str()), (304, ""), "{path} {known}");
            assert_eq!(again.header("etag"), tag);
            assert_eq!(again.header("cache-control"), "no-cache");
        }
        get(&server, path, Some("\"other\"")).await.ok_status();
    }
    let (one, other) =
        (get(&server, "/assets/api.js", None).await, get(&server, "/assets/sse.js", None).await);
    assert_ne!(one.header("etag"), other.header("etag"));
}

#[tokio::test]
async fn what_is_not_there_is_an_error_of_the_contract() {
    let server = TestServer::start();
    for path in
        ["/assets/other.js", "/assets/index.html", "/assets/..%2fpage.rs", "/assets/a/main.js", "/assets"]
    {
        get(&server, path, None).await.is_error(404, "not_found");
    }
    let request = Request::builder().method(Method::POST).uri("/").body(Body::empty()).expect("a request");
    let answer = server.send(request).await;
    answer.is_error(405, "method_not_allowed");
    assert_eq!(answer.header("allow"), "GET,HEAD");
    let request = Request::head("/").body(Body::empty()).expect("a request");
    let head = server.send(request).await;
    assert_eq!((head.status.as_u16(), head.text.as_str()), (200, ""));
    assert_eq!(head.header("content-length"), get(&server, "/", None).await.text.len().to_string());
}

#[tokio::test]
async fn a_setting_turns_it_off() {
    let server = TestServer::with(ServerConfig { page: false, ..ServerConfig::default() }, 8);
    for path in ["/", "/assets/main.js"] {
        get(&server, path, None).await.is_error(404, "not_found");
    }
}

/// The page asks the reader for a key, so its files do not.
#[tokio::test]
async fn its_files_need_no_key() {
    let config = ServerConfig { api_keys: vec![KeyDigest::of(b"sk-right")], ..ServerConfig::default() };
    let server = TestServer::with(config.clone(), 8);
    for path in ["/", "/assets/main.js"] {
        get(&server, path, None).await.ok_status();
    }
    get(&server, "/v1/models", None).await.is_error(401, serde_json::Value::Null);
    // Where the page is off, these are paths like any other that is not here.
    let server = TestServer::with(ServerConfig { page: false, ..config }, 8);
    get(&server, "/", None).await.is_error(401, serde_json::Value::Null);
}
