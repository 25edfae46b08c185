//! Precedence, suggestions, origins, and the two written copies of the table.

use clap::{Args as _, FromArgMatches as _};

use super::*;

fn flags(line: &[&str]) -> SettingFlags {
    let command = SettingFlags::augment_args(clap::Command::new("locket"));
    SettingFlags::from_arg_matches(&command.get_matches_from(["locket"].iter().chain(line))).unwrap()
}

fn sources(file: &str, environment: &[(&str, &str)], line: &[&str]) -> Sources {
    Sources {
        file: Some(FileSource { path: "my.toml".into(), text: file.into() }),
        environment: environment.iter().map(|&(name, value)| (name.into(), value.into())).collect(),
        flags: flags(line),
    }
}

fn problems(sources: &Sources) -> String {
    Config::load(sources).unwrap_err().to_string()
}

#[test]
fn defaults_alone() {
    let config = Config::load(&Sources::default()).unwrap();
    assert_eq!((config.host.as_str(), config.port), ("127.0.0.1", 8080));
    assert_eq!(config.model, None);
    // Decided when the model is known.
    assert_eq!((config.cache.method, config.cache.slots, config.cache.ring), (None, None, None));
    assert!(config.cache.methods.is_none() && config.cache.side_car.is_empty());
    assert_eq!(
        (config.snapshots.memory, config.snapshots.interval, &config.snapshots.dir),
        (None, 1024, &None)
    );
    assert_eq!(config.api.max_body_bytes, 32 << 20);
    assert_eq!(config.engine.target_step, Duration::from_millis(100));
    assert!(
        config.api.api_keys.is_empty() && config.api.tls.is_none() && config.api.images.url_hosts.is_empty()
    );
    // The server's own defaults are the same.
    assert_eq!(config.api.connections, ConnectionLimits::default());
    assert_eq!(config.api.images, ImageSettings::default());
}

#[test]
fn keys_are_kept_as_digests_and_never_shown() {
    let given = sources("api-key-file = \"keys.toml\"\n", &[("LOCKET_API_KEY", "sk-one, sk-two")], &[]);
    let config = Config::load(&given).unwrap();
    let digests = ["sk-one", "sk-two"].map(|key| KeyDigest::of(key.as_bytes()));
    assert_eq!(config.api.api_keys, digests);
    let text = config.to_toml();
    assert!(text.contains("api-key = [\"***\", \"***\"]"), "{text}");
    let shown = format!("{config:?} {:?}", flags(&["--api-key", "sk-flag"]));
    for key in ["sk-one", "sk-two", "sk-flag", &digests[0].to_hex()] {
        assert!(!text.contains(key) && !shown.contains(key), "{key}");
    }
    let refused =
        problems(&sources("api-key = [\"sk-three\", \"sk four\"]\n", &[], &["--tls-cert", "a.pem"]));
    assert!(refused.contains("api-key (file my.toml:1): one of its keys"), "{refused}");
    assert!(!refused.contains("three") && !refused.contains("four"), "{refused}");
}

#[test]
fn later_layers_win() {
    let file = "port = 1\nhost = \"file\"\nthreads = 3\n[cache]\nslots = 300\n";
    let environment = [("LOCKET_PORT", "2"), ("LOCKET_HOST", "environment")];
    let config = Config::load(&sources(file, &environment, &["--port", "3"])).unwrap();
    assert_eq!((config.port, config.host.as_str(), config.threads), (3, "environment", 3));
    assert_eq!(config.cache.slots, Some(300));
    assert_eq!(config.origin("port"), "flag --port");
    assert_eq!(config.origin("host"), "environment LOCKET_HOST");
    assert_eq!(config.origin("cache.slots"), "file my.toml:5");
    assert_eq!(config.origin("cache.sinks"), "default");
}

#[test]
fn lists_switches_and_bytes_in_every_spelling() {
    let file = "served-model-name = [\"a\", \"b\"]\nmemory-budget = 1073741824\noffline = true\n";
    let config = Config::load(&sources(file, &[], &[])).unwrap();
    assert_eq!(config.served_model_name, ["a", "b"]);
    assert_eq!((config.memory_budget, config.offline), (Some(1 << 30), true));
    let line = ["--served-model-name", "x, y", "--served-model-name", "z", "--offline=false", "--prefault"];
    let config = Config::load(&sources(file, &[("LOCKET_MEMORY_BUDGET", "2GiB")], &line)).unwrap();
    assert_eq!(config.served_model_name, ["x", "y", "z"]);
    assert_eq!((config.memory_budget, config.offline, config.prefault), (Some(2 << 30), false, true));
    let config = Config::load(&sources("", &[("LOCKET_CACHE_CAPACITIES", "256,1024")], &[])).unwrap();
    assert_eq!(config.cache.capacities, [256, 1024]);
    let file = "[cache]\nmethods = [\"full\", \"tova\"]\nrecent = 0.125\nside-car = \"none\"\n";
    let config =
        Config::load(&sources(file, &[("LOCKET_SNAPSHOTS_MEMORY", "0")], &["--cache-dtype", "int8"]))
            .unwrap();
    assert_eq!(config.cache.methods.as_deref(), Some(&[CacheMethod::Full, CacheMethod::Tova][..]));
    assert_eq!((config.cache.recent_permille, config.cache.slot_type), (Some(125), SlotType::I8));
    assert_eq!(
        (config.cache.side_car.as_slice(), config.snapshots.memory),
        (&["none".to_owned()][..], Some(0))
    );
}

#[test]
fn unknown_names_are_errors_with_a_suggestion() {
    let text =
        problems(&sources("prot = 1\n\n[cache]\nslot = 4\nthreads = 2\n", &[("LOCKET_POTR", "1")], &[]));
    assert!(text.contains("unknown setting prot (file my.toml:1); did you mean port?"), "{text}");
    assert!(
        text.contains("unknown setting cache.slot (file my.toml:4); did you mean cache.slots?"),
        "{text}"
    );
    assert!(text.contains("unknown setting cache.threads (file my.toml:5); did you mean threads?"), "{text}");
    assert!(
        text.contains("unknown setting in the environment: LOCKET_POTR; did you mean LOCKET_PORT?"),
        "{text}"
    );
    let text = problems(&sources("[cahce]\nslots = 4\n", &[], &[]));
    assert!(text.contains("unknown setting cahce.slots") && text.contains("cache.slots?"), "{text}");
}

#[test]
fn wrong_values_name_key_and_source() {
    let text = problems(&sources("port = 99999\n", &[("LOCKET_THREADS", "many")], &["--cache-dtype", "f8"]));
    assert!(text.contains("port (file my.toml:1): \"99999\" is not 0 to 65535"), "{text}");
    assert!(
        text.contains("threads (environment LOCKET_THREADS): \"many\" is not 0 to 1024 threads"),
        "{text}"
    );
    assert!(
        text.contains("cache.dtype (flag --cache-dtype): \"f8\" is not one of f16, bf16, f32, int8, int4"),
        "{text}"
    );
    let text = problems(&sources(
        "[cache]\nmethod = \"magic\"\nrecall = 2\n",
        &[("LOCKET_CACHE_METHODS", "tova,lru")],
        &[],
    ));
    assert!(
        text.contains("cache.method (file my.toml:2): \"magic\" is not one of auto, full, window"),
        "{text}"
    );
    assert!(
        text.contains("cache.methods (environment LOCKET_CACHE_METHODS): \"lru\" is not one of full"),
        "{text}"
    );
    assert!(text.contains("cache.recall (file my.toml:3): \"2\" is not 0 to 1"), "{text}");
    let text = problems(&sources("port = [1]\nhost = { a = 1 }\n", &[], &[]));
    assert!(text.contains("port (file my.toml:1)") && text.contains("unknown setting host.a"), "{text}");
    let text = problems(&sources("port = \n", &[], &[]));
    assert!(text.contains("my.toml:1"), "{text}");
}

#[test]
fn contradictions_are_found() {
    let text = problems(&sources("[cache]\nslots = 16\nsinks = 16\n", &[], &["--prefill-chunk", "1000"]));
    assert!(
        text.contains("cache.sinks = 16 (file my.toml:3) is more than a quarter of cache.slots = 16"),
        "{text}"
    );
    assert!(text.contains("prefill-chunk = 1000 (flag --prefill-chunk) is not a"), "{text}");
    assert!(text.contains("is more than max-batch-rows = 512 (default)"), "{text}");
    let text = problems(&sources("[cache]\nmethods = [\"lococo\"]\ndtype = \"int4\"\n", &[], &[]));
    assert!(
        text.contains("cache.dtype = int4 (file my.toml:3) is an experiment of backend reference"),
        "{text}"
    );
    assert!(text.contains("cache.methods (file my.toml:2) has lococo") && text.contains("f16"), "{text}");
    let oracle = sources("[cache]\ndtype = \"int4\"\n", &[], &["--backend", "reference"]);
    assert_eq!(Config::load(&oracle).unwrap().cache.slot_type, SlotType::I4);
    let text = problems(&sources("[cache]\nside-car = [\"none\", \"a\"]\n", &[], &[]));
    assert!(text.contains("cache.side-car (file my.toml:2) has none beside others"), "{text}");
    let text = problems(&sources("[snapshots]\nmemory = 0\ndir = \"x\"\ninterval = 100\n", &[], &[]));
    assert!(text.contains("snapshots.dir (file my.toml:3) needs snapshots.memory"), "{text}");
    assert!(text.contains("snapshots.interval = 100 (file my.toml:4) is not a multiple of 16"), "{text}");
    let text = problems(&sources("image-url-hosts = \"http://a\"\n", &[], &["--tls-cert", "a.pem"]));
    assert!(text.contains("tls-cert (flag --tls-cert) needs tls-key"), "{text}");
    assert!(text.contains("image-url-hosts (file my.toml:1): \"http://a\" is not a host"), "{text}");
    let text = problems(&sources("[log]\nfilter = \"=,=\"\n", &[], &[]));
    assert!(text.contains("log.filter"), "{text}");
}

/// The word is set behind the table's back, since only builds with the feature `cuda` admit it.
#[test]
fn a_device_needs_a_budget_of_its_own() {
    let problems = |line: &[&str]| {
        let mut config = Config::load(&sources("", &[], line)).unwrap();
        let backend = config.entries.iter_mut().find(|entry| entry.setting.key == "backend").unwrap();
        backend.value = Some(Value::Text("cuda".into()));
        config.contradictions()
    };
    let refused = problems(&[]);
    assert!(refused.len() == 1 && refused[0].contains("needs memory-budget"), "{refused:?}");
    assert!(problems(&["--memory-budget", "4GiB"]).is_empty());
}

#[test]
fn variables_of_others_are_ignored() {
    let environment = [
        ("LOCKET_PORT", "tcp://10.0.0.1:8080"),
        ("LOCKET_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("LOCKET_SERVICE_HOST", "10.0.0.1"),
        ("LOCKET_TEST_MODEL", "x.gguf"),
        ("LOCKET_MODEL", ""),
        ("LOCKET_CONFIG", "my.toml"),
    ];
    assert_eq!(Config::load(&sources("", &environment, &[])).unwrap().port, 8080);
}

#[test]
fn the_effective_configuration_is_valid_and_says_where_it_comes_from() {
    let given = sources("port = 1\n", &[("LOCKET_CACHE_SLOTS", "64")], &["--model", "a \"b\".gguf"]);
    let text = Config::load(&given).unwrap().to_toml();
    assert!(text.lines().any(|l| l.starts_with("port = 1 ") && l.ends_with("# file my.toml:1")), "{text}");
    assert!(
        text.lines().any(|l| l.starts_with("slots = 64 ") && l.ends_with("LOCKET_CACHE_SLOTS")),
        "{text}"
    );
    assert!(text.lines().any(|l| l.starts_with("host = ") && l.ends_with("# default")), "{text}");
    let again = Config::load(&sources(&text, &[], &[])).unwrap();
    assert_eq!((again.port, again.cache.slots, again.model.as_deref()), (1, Some(64), Some("a \"b\".gguf")));
}

#[test]
fn the_written_copies_are_true() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (name, command, made) in [
        ("config/locket.toml", "--template", template_file()),
        ("docs/configuration.md", "--reference", reference_page()),
    ] {
        let written = std::fs::read_to_string(root.join(name)).unwrap_or_default();
        let command = format!("cargo run --release -p locket -- config {command} > {name}");
        // With the feature `cuda` the table has one more backend than the committed page.
        assert!(cfg!(feature = "cuda") || written == made, "{name} is out of date; run: {command}");
    }
}

#[test]
fn the_template_uncommented_is_the_default_configuration() {
    let settings = template_file()
        .lines()
        .filter_map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.split_once(" = ").is_some_and(|(name, _)| !name.contains(' ')) => {
                Some(setting)
            }
            Some(_) => None,
            None => Some(line),
        })
        .collect::<Vec<_>>()
        .join("\n");
    let from_file = Config::load(&sources(&settings, &[], &[])).unwrap();
    let defaults = Config::load(&Sources::default()).unwrap();
    for (a, b) in from_file.entries.iter().zip(&defaults.entries) {
        assert_eq!(a.value, b.value, "{}", a.setting.key);
        assert_eq!(a.origin == Origin::Default, b.value.is_none(), "{}", a.setting.key);
    }
}
