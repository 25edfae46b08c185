//! Puts the commit and the enabled features into the version, where they can be known.

use std::process::Command;

fn main() {
    // Given where the source has no repository with it, as in the images.
    println!("cargo::rerun-if-env-changed=LOCKET_COMMIT");
    let given = std::env::var("LOCKET_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given
        .map(|commit| commit.chars().take(12).collect())
        .or_else(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=BUILD_COMMIT={commit}");
    let features: Vec<_> = ["hub", "tls", "cuda"]
        .into_iter()
        .filter(|feature| std::env::var_os(format!("CARGO_FEATURE_{}", feature.to_uppercase())).is_some())
        .collect();
    let features = if features.is_empty() { "none".into() } else { features.join(",") };
    println!("cargo::rustc-env=BUILD_FEATURES={features}");
    println!("cargo::rerun-if-changed=build.rs");
    // A new commit changes one of these; outside a repository there is nothing to watch.
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name]).filter(|path| std::path::Path::new(path).exists());
        if let Some(path) = path {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// The first line that git prints, if there is git and a repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
