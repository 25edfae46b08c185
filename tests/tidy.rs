//! The source's own rules: the line of crates, paths named in documents, whitespace, banned words.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use locket_tests::repository;

/// Files under version control, or about to be.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(repository())
        .output()
        .expect("git runs");
    assert!(output.status.success());
    let names = String::from_utf8(output.stdout).expect("names are UTF-8");
    names.lines().map(PathBuf::from).filter(|path| repository().join(path).is_file()).collect()
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(repository().join(path)).ok()
}

#[test]
fn crates_depend_only_on_those_below() {
    let line = ["locket", "server", "processor", "engine", "model", "kernels"];
    for (height, name) in line.iter().enumerate() {
        let manifest = text(Path::new(&format!("crates/{name}/Cargo.toml"))).expect("a manifest");
        for above in &line[..=height] {
            let dependency =
                if *above == "locket" { "locket.".to_owned() } else { format!("locket-{above}.") };
            assert!(!manifest.contains(&format!("\n{dependency}workspace")), "{name} depends on {above}");
        }
    }
}

#[test]
fn every_path_named_in_the_documents_exists() {
    let mut named = 0;
    for path in files().iter().filter(|path| path.extension().is_some_and(|kind| kind == "md")) {
        let document = text(path).expect("a document");
        for word in document.split('`').skip(1).step_by(2).chain(links(&document)) {
            let word = word.split('#').next().unwrap_or_default();
            let roots = ["crates/", "tests/", "docs/", "config/", "benches/", "deploy/", "docker/", ".ci/"];
            let is_path =
                roots.iter().any(|root| word.starts_with(root)) && !word.contains([' ', '*', '{', '<']);
            if is_path {
                named += 1;
                assert!(repository().join(word).exists(), "{}: {word} does not exist", path.display());
            }
        }
    }
    assert!(named > 20, "the check found only {named} paths");
}

/// Targets of Markdown links.
fn links(document: &str) -> impl Iterator<Item = &str> {
    document.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

#[test]
fn no_tabs_no_trailing_spaces_no_unfinished_work() {
    let kinds = ["rs", "toml", "md", "py", "sh", "yaml", "json", "cu"];
    let unfinished = [
        ["to", "do!("].concat(),
        ["unimple", "mented!("].concat(),
        ["#[ig", "nore"].concat(),
        ["No figures", " yet"].concat(),
        ["PERFORMANCE-", "SUMMARY"].concat(),
    ];
    for path in files() {
        let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
        if !kinds.contains(&kind) || path.ends_with("Cargo.lock") {
            continue;
        }
        let content = text(&path).unwrap_or_else(|| panic!("{} is not UTF-8", path.display()));
        assert!(
            content.is_empty() || content.ends_with('\n'),
            "{} does not end with a newline",
            path.display()
        );
        for (number, line) in content.lines().enumerate() {
            let at = || format!("{}:{}", path.display(), number + 1);
            assert!(!line.contains('\t'), "tab at {}", at());
            assert_eq!(line.trim_end(), line, "trailing space at {}", at());
            for word in &unfinished {
                assert!(!line.contains(word.as_str()), "{word} at {}", at());
            }
        }
    }
}

#[test]
fn file_names_say_what_is_in_them() {
    let banned: BTreeSet<&str> = ["utils", "util", "common", "helpers", "helper", "manager", "misc"].into();
    for path in files() {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        assert!(!banned.contains(stem), "{}", path.display());
    }
}

#[test]
fn unsafe_code_is_where_it_belongs() {
    let keyword = ["uns", "afe"].concat();
    for path in files().iter().filter(|path| path.extension().is_some_and(|kind| kind == "rs")) {
        let name = path.to_string_lossy();
        // Kernels, and the memory-mapped weight file.
        if name.starts_with("crates/kernels/") || name.starts_with("crates/model/src/weights") {
            continue;
        }
        let content = text(path).expect("a source file");
        for needle in [format!("{keyword} {{"), format!("{keyword} fn"), format!("{keyword} impl")] {
            assert!(!content.contains(&needle), "{name} contains {needle:?}");
        }
    }
}
