//! The official Python client, in strict mode, against the real server.

use std::process::Command;

use locket_tests::{Server, python, repository};

#[test]
fn official_python_client_in_strict_mode() {
    let folder = repository().join("tests/openai_client");
    let interpreter = python(&folder.join("requirements.txt"));
    let server = Server::start(&[]);
    let busy = Server::start(&["--max-running", "1", "--max-waiting", "1"]);
    let keys = tempfile::tempdir().expect("a folder");
    let key_file = keys.path().join("keys.toml");
    let one_a_minute = "[[key]]\nname = \"client\"\nkey = \"sk-conformance\"\nrequests-per-minute = 1\n";
    std::fs::write(&key_file, one_a_minute).expect("written");
    let keyed = Server::start(&["--api-key-file", &key_file.display().to_string()]);
    let status = Command::new(interpreter)
        .arg(folder.join("conformance.py"))
        .args([server.url(), busy.url(), keyed.url()])
        .status()
        .expect("python runs");
    assert!(status.success(), "conformance.py failed; its output is above");
}
