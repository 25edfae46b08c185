//! The page at `/` in a real Chromium, and its types as the compiler of TypeScript sees them.
//!
//! Packages are installed under the target folder once. Chromium is Debian's, installed where it is
//! missing and the test may do that; `CHROMIUM` names another.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use locket_tests::{Server, node_modules, repository};

fn folder() -> PathBuf {
    repository().join("tests/page")
}

fn run(mut command: Command) {
    let status = command.status().expect("the program runs");
    assert!(status.success(), "{command:?} failed; its output is above");
}

/// The browser's program.
fn chromium() -> PathBuf {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return path.into();
    }
    let path = Path::new("/usr/bin/chromium");
    if !path.exists() {
        let apt = |arguments: &[&str]| {
            let mut command = Command::new("apt-get");
            command.args(["-qq", "-o", "DPkg::Lock::Timeout=600"]).args(arguments);
            command.env("DEBIAN_FRONTEND", "noninteractive");
            run(command);
        };
        apt(&["update"]);
        apt(&["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]);
    }
    path.to_owned()
}

#[test]
fn types() {
    let packages = node_modules(&folder());
    let mut command = Command::new("node");
    command
        .arg(packages.join("node_modules/typescript/bin/tsc"))
        .arg("-p")
        .arg(folder().join("tsconfig.json"));
    run(command);
}

#[test]
fn in_a_browser() {
    let packages = node_modules(&folder());
    let browser = chromium();
    let open = Server::start(&["--default-max-tokens", "64", "--max-model-len", "4096"]);
    let guarded = Server::start(&["--api-key", "sk-page", "--metrics-require-key"]);
    // Modules are looked up beside the script.
    for name in ["page.mjs", "modules.mjs", "browser.mjs"] {
        std::fs::copy(folder().join(name), packages.join(name)).expect("the script can be copied");
    }
    let mut command = Command::new("node");
    command.args(["--test", "--test-reporter", "spec"]).arg(packages.join("page.mjs"));
    command.env("SERVER", open.url()).env("GUARDED_SERVER", guarded.url()).env("CHROMIUM", browser);
    run(command);
}
