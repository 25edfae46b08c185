//! Clients of others, unchanged, against the real server over a real socket.
//!
//! Each installs its pinned packages under the target folder once. Python clients run with a guard
//! that lets them reach nothing but this machine.

mod async_openai;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use locket_tests::{Server, node_modules, python, repository};

/// Long enough for every answer; the model is small, so a client that asks for none gets a short one.
const SERVER: &[&str] = &["--default-max-tokens", "64", "--max-model-len", "2048"];

fn folder(name: &str) -> PathBuf {
    repository().join("tests/clients").join(name)
}

/// A program that may reach this machine only, and tells nobody that it runs.
fn client(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env("PYTHONPATH", folder("loopback"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("DO_NOT_TRACK", "1")
        .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        .env("LITELLM_TELEMETRY", "False")
        .env("LANGSMITH_TRACING", "false")
        .env("NO_PROXY", "127.0.0.1,localhost")
        .env_remove("OPENAI_API_KEY")
        .env_remove("OPENAI_BASE_URL");
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command
}

fn run(mut command: Command) {
    let status = command.status().expect("the client runs");
    assert!(status.success(), "{command:?} failed; its output is above");
}

/// The Python script of a client, with the server's address.
fn run_python(name: &str) {
    let interpreter = python(&folder(name).join("requirements.txt"));
    let server = Server::start(SERVER);
    let mut command = client(&interpreter);
    command.arg(folder(name).join("conformance.py")).arg(server.url());
    run(command);
}

#[test]
fn litellm() {
    run_python("litellm");
}

#[test]
fn instructor() {
    run_python("instructor");
}

#[test]
fn llm_command() {
    run_python("llm");
}

#[test]
fn openai_for_node() {
    let packages = node_modules(&folder("node"));
    let server = Server::start(SERVER);
    let mut command = client(Path::new("node"));
    // Modules are looked up beside the script.
    let script = packages.join("conformance.mjs");
    std::fs::copy(folder("node").join("conformance.mjs"), &script).expect("the script can be copied");
    command.arg(script).arg(server.url());
    run(command);
}

#[test]
fn langchain_standard_tests() {
    let interpreter = python(&folder("langchain").join("requirements.txt"));
    let server = Server::start(SERVER);
    let mut command = client(&interpreter);
    command
        .args([
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--asyncio-mode",
            "auto",
            "-o",
            "asyncio_default_test_loop_scope=session",
        ])
        .args(["--benchmark-disable", "-W", "ignore"])
        .arg(folder("langchain"))
        .env("SERVER_URL", server.url());
    run(command);
}

/// Requests made from `/openapi.json`, good ones and bad ones.
#[test]
fn schemathesis() {
    let interpreter = python(&folder("schemathesis").join("requirements.txt"));
    let server = Server::start(&["--default-max-tokens", "4", "--max-model-len", "512"]);
    // Reports and caches go to a folder of their own.
    let work = tempfile::tempdir().expect("a folder");
    let mut command = client(&interpreter.with_file_name("st"));
    command
        .args(["--config-file".as_ref(), folder("schemathesis").join("schemathesis.toml").as_os_str()])
        .args(["run", &format!("{}/openapi.json", server.url())])
        .env("SCHEMATHESIS_HOOKS", "hooks")
        .env(
            "PYTHONPATH",
            std::env::join_paths([folder("loopback"), folder("schemathesis")]).expect("two paths"),
        )
        .current_dir(work.path());
    run(command);
}
