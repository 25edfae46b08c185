//! Keys, their limits and TLS through the binary: refusals as the contract has them, and files that
//! are read again on SIGHUP.

use std::path::{Path, PathBuf};

use locket_tests::Server;
use serde_json::{Value, json};

/// A folder with a key file and a certificate with its key.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_keys(&self, text: &str) -> String {
        std::fs::write(self.path("keys.toml"), text).expect("written");
        self.path("keys.toml").display().to_string()
    }

    /// Writes a new pair and returns the certificate.
    fn write_certificate(&self) -> String {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let pair = rcgen::generate_simple_self_signed(names).expect("a certificate");
        std::fs::write(self.path("key.pem"), pair.signing_key.serialize_pem()).expect("written");
        std::fs::write(self.path("cert.pem"), pair.cert.pem()).expect("written");
        pair.cert.pem()
    }
}

fn chat(fields: Value) -> Value {
    let mut body = json!({
        "model": "smollm2", "max_tokens": 2, "temperature": 0,
        "messages": [{"role": "user", "content": "Hi"}],
    });
    if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
        body.extend(fields);
    }
    body
}

async fn post(
    server: &Server,
    key: &str,
    fields: Value,
) -> (reqwest::StatusCode, reqwest::header::HeaderMap, Value) {
    let request = server.client().post(format!("{}/v1/chat/completions", server.url())).json(&chat(fields));
    let request = if key.is_empty() { request } else { request.bearer_auth(key) };
    let response = request.send().await.expect("a response");
    let (status, headers) = (response.status(), response.headers().clone());
    (status, headers, response.json().await.expect("JSON"))
}

#[tokio::test]
async fn keys_limits_and_reloads() {
    let files = Files::new();
    let path = files.write_keys(
        "[[key]]\nname = \"ann\"\nkey = \"sk-ann\"\nrequests-per-minute = 2\n\
         [[key]]\nname = \"bob\"\nkey = \"sk-bob\"\nmodels = [\"another\"]\n",
    );
    let server = Server::start(&["--api-key-file", &path]);
    assert_eq!(server.get("/health").await.0, 200);
    assert_eq!(server.get("/v1/models").await.0, 401);

    let (status, headers, body) = post(&server, "", json!({})).await;
    assert_eq!(
        (status.as_u16(), &headers["www-authenticate"], &body["error"]["code"]),
        (401, &"Bearer".parse().expect("a header"), &Value::Null)
    );
    let (status, _, body) = post(&server, "sk-cat", json!({})).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (401, &json!("invalid_api_key")));
    let (status, _, body) = post(&server, "sk-bob", json!({})).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (403, &json!("permission_denied")));

    for left in ["1", "0"] {
        let (status, headers, body) = post(&server, "sk-ann", json!({})).await;
        assert_eq!(
            (status.as_u16(), headers["x-ratelimit-remaining-requests"].to_str().ok()),
            (200, Some(left)),
            "{body}"
        );
    }
    let (status, headers, body) = post(&server, "sk-ann", json!({})).await;
    assert_eq!((status.as_u16(), &body["error"]["type"]), (429, &json!("rate_limit_error")));
    let header = |name: &str| headers[name].to_str().expect("ASCII");
    let seconds: u64 = header("retry-after").parse().expect("whole seconds");
    let millis: u64 = header("retry-after-ms").parse().expect("milliseconds");
    assert!((1..=30).contains(&seconds) && millis <= seconds * 1000 && seconds < millis / 1000 + 2);
    assert!(header("x-ratelimit-reset-requests").ends_with('s'));

    files.write_keys("[[key]]\nname = \"cat\"\nkey = \"sk-cat\"\n");
    server.hang_up();
    server.until_metric("locket_reloads_total", &["file=\"keys\"", "result=\"ok\""], 1.0).await;
    assert_eq!(post(&server, "sk-cat", json!({})).await.0, 200);
    assert_eq!(post(&server, "sk-bob", json!({})).await.0, 401);
    files.write_keys("[[key]]\nname = \"dan\"\n");
    server.hang_up();
    server.until_metric("locket_reloads_total", &["file=\"keys\"", "result=\"failed\""], 1.0).await;
    assert_eq!(post(&server, "sk-cat", json!({})).await.0, 200, "a broken file changes nothing");
}

/// A client that trusts this certificate alone, and keeps no connection.
fn client(certificate: &str) -> reqwest::Client {
    let certificate = reqwest::Certificate::from_pem(certificate.as_bytes()).expect("a certificate");
    reqwest::Client::builder()
        .tls_certs_only([certificate])
        .pool_max_idle_per_host(0)
        .build()
        .expect("a client")
}

#[tokio::test]
async fn encrypted_connections_and_new_certificates() {
    let files = Files::new();
    let first = files.write_certificate();
    let path = |name: &str| files.path(name).display().to_string();
    let server = Server::start(&["--tls-cert", &path("cert.pem"), "--tls-key", &path("key.pem")]);
    assert!(server.url().starts_with("https://127.0.0.1:"), "{}", server.url());
    let url = format!("{}/v1/chat/completions", server.url());
    let trusting = client(&first);
    let response = trusting.post(&url).json(&chat(json!({"stream": true}))).send().await.expect("a response");
    assert_eq!((response.status().as_u16(), response.version()), (200, reqwest::Version::HTTP_2));
    assert!(response.text().await.expect("a body").ends_with("data: [DONE]\n\n"));
    // Without TLS there is nothing to talk to.
    let plain = server.url().replace("https", "http");
    assert!(server.client().get(format!("{plain}/health")).send().await.is_err());

    let second = files.write_certificate();
    server.hang_up();
    let renewed = client(&second);
    let health = format!("{}/health", server.url());
    // The new certificate is in use once it is trusted; the old one then is no more.
    while renewed.get(&health).send().await.is_err() {
        tokio::task::yield_now().await;
    }
    assert!(client(&first).get(&health).send().await.is_err());
    assert_broken_files_stop_the_start(files.folder.path());
}

/// The server says at start what is wrong with a certificate.
fn assert_broken_files_stop_the_start(folder: &Path) {
    let key = folder.join("key.pem");
    let output = std::process::Command::new(locket_tests::locket_binary())
        .args(["serve", "--port", "0", "--memory-budget", "1GiB"])
        .arg(locket_tests::model_path())
        .args([Path::new("--tls-cert"), &key, Path::new("--tls-key"), &key])
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("TLS certificate"), "{text}");
}
