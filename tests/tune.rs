//! `locket tune` from text to a side-car that the server takes.

use std::process::{Command, Output};

use locket_tests::{locket_binary, model_path, repository};
use serde_json::Value;

fn locket(arguments: &[&str]) -> Output {
    let output = Command::new(locket_binary())
        .args(arguments)
        .env_remove("LOCKET_CONFIG")
        .current_dir(repository())
        .output()
        .expect("locket runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "locket {arguments:?}: {text}");
    output
}

/// The strings in a safetensors file's header.
fn metadata(path: &std::path::Path) -> Value {
    let bytes = std::fs::read(path).expect("the side-car");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    header["__metadata__"].clone()
}

#[test]
fn trains_both_methods_for_the_default_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model_path();
    let model = model.to_str().expect("a path");
    let learned = ["--sequence", "256", "--windows", "32"];
    let lococo = ["--method", "lococo", "--slots", "32", "--ring", "32", "--sequence", "128"];
    for (method, arguments) in [("learned", &learned[..]), ("lococo", &lococo)] {
        let out = folder.path().join(method);
        let out = out.to_str().expect("a path");
        let common = ["tune", "lococo", "--model", model, "--data", "docs/kv-cache.md", "docs/api.md"];
        let common = [&common[..], &["--steps", "2", "--batch", "1", "--seed", "3", "--out", out], arguments];
        locket(&common.concat());
        let metadata = metadata(out.as_ref());
        assert_eq!((&metadata["kind"], &metadata["seed"]), (&method.into(), &"3".into()), "{metadata}");
        for key in ["model_hash", "recipe", "data_hash", "metrics", "layers", "kv_heads", "head_dim"] {
            assert!(metadata[key].is_string(), "no {key}: {metadata}");
        }
        let more: &[&str] =
            if method == "lococo" { &["--cache-slots", "32", "--cache-ring", "32"] } else { &[] };
        let serve = ["inspect", model, "--cache-method", method, "--cache-side-car", out];
        let plan = locket(&[&serve[..], &["--memory-budget", "1GiB"], more].concat());
        let plan = String::from_utf8_lossy(&plan.stdout).into_owned();
        assert!(plan.contains(method), "{plan}");
    }
}
