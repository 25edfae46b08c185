//! Defaults for models of several sizes, with and without weights, and refusals that name the setting.

use locket_model::testing;

use super::*;
use crate::config::{FileSource, Sources};

/// SmolLM2-135M.
const SMOL: CacheGeometry =
    CacheGeometry { num_layers: 30, num_heads: 9, num_kv_heads: 3, head_dim: 64, max_position: 8192 };

fn choose_for(
    file: &str,
    geometry: CacheGeometry,
    side_car: Option<&SideCar>,
) -> Result<CacheChoice, String> {
    let file = FileSource { path: "test.toml".into(), text: file.into() };
    let config = Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap();
    CacheChoice::make(&config, geometry, side_car).map_err(|error| error.to_string())
}

fn choose(file: &str) -> Result<CacheChoice, String> {
    choose_for(file, SMOL, None)
}

/// Weights of learned that recommend shares.
fn learned() -> SideCar {
    let weights = testing::side_car(SMOL, 128, 1);
    SideCar { lococo: None, recent_permille: Some(125), recall_permille: Some(300), ..weights }
}

#[test]
fn auto_is_learned_with_weights_and_observed_without() {
    let without = choose("").unwrap();
    assert_eq!(
        (without.settings.method, without.settings.slots, without.settings.ring),
        (CacheMethod::Observed, 2048, 128)
    );
    let names: Vec<&str> = without.bounds.allowed.iter().map(|method| method.name()).collect();
    assert_eq!(names, ["full", "window", "h2o", "tova", "keydiff", "observed"]);
    assert_eq!((without.side.columns, without.side.per_layer), (1, 0));

    let with = choose_for("", SMOL, Some(&learned())).unwrap();
    assert_eq!((with.settings.method, with.bounds.method), (CacheMethod::Learned, CacheMethod::Learned));
    assert_eq!((with.settings.recent, with.settings.recall_permille), (256, 300));
    assert!(
        with.bounds.allowed.contains(&CacheMethod::Learned)
            && !with.bounds.allowed.contains(&CacheMethod::Lococo)
    );
    assert_eq!((with.side.columns, with.side.per_layer), (3, 4 * 384));

    let named = choose_for("[cache]\nrecent = 0.5\nrecall = 0\n", SMOL, Some(&learned())).unwrap();
    assert_eq!((named.settings.recent, named.settings.recall_permille), (1024, 0));
    let observed = choose_for("[cache]\nmethod = \"observed\"\n", SMOL, Some(&learned())).unwrap();
    assert_eq!(observed.settings.method, CacheMethod::Observed);
}

#[test]
fn slots_follow_the_trained_context() {
    for (max_position, slots, ring, context) in [
        (2048, 512, 128, 131_072),
        (8192, 2048, 128, 131_072),
        (131_072, 4096, 128, 131_072),
        (1 << 20, 4096, 128, 1 << 20),
    ] {
        let choice = choose_for("", CacheGeometry { max_position, ..SMOL }, None).unwrap();
        assert_eq!((choice.settings.slots, choice.settings.ring), (slots, ring), "{max_position}");
        assert_eq!(choice.context, context, "{max_position}");
    }
    // A model that is smaller than the smallest default.
    let tiny = choose_for("", CacheGeometry { max_position: 512, ..SMOL }, None).unwrap();
    assert!(tiny.settings.capacity() <= 512 && tiny.context == 512, "{tiny:?}");
    let tiny = choose_for("", CacheGeometry { max_position: 64, ..SMOL }, None).unwrap();
    assert_eq!((tiny.settings.slots, tiny.context), (16, 64));
    let short = choose("max-model-len = 1000\n").unwrap();
    assert!(short.settings.capacity() <= 1000 && short.context == 1000, "{short:?}");
}

#[test]
fn blocks_for_short_requests_come_with_the_default() {
    assert_eq!(choose("").unwrap().capacities, [256, 1024, 2176]);
    assert_eq!(choose("[cache]\nslots = 512\n").unwrap().capacities, [256, 640]);
    assert_eq!(choose("[cache]\nslots = 64\n").unwrap().capacities, [128]);
    assert_eq!(choose("[cache]\nmethod = \"full\"\n").unwrap().capacities, [512, 2048, 8192]);
    let larger = choose("[cache]\nslots = 1024\ncapacities = [4096]\n").unwrap();
    assert_eq!((larger.capacities.as_slice(), larger.bounds.max_slots), (&[1152, 4096][..], 3968));
    assert_eq!((larger.bounds.max_full_len, larger.bounds.slots), (4096, 1024));
}

#[test]
fn full_ends_at_the_trained_context_and_others_do_not() {
    let full = choose("[cache]\nmethod = \"full\"\n").unwrap();
    assert_eq!((full.context, full.settings), (8192, CacheSettings::full(8192)));
    assert!(full.bounds.allowed.contains(&CacheMethod::Window) && full.bounds.max_slots >= full.bounds.slots);
    let text = choose("max-model-len = 9000\n[cache]\nmethod = \"full\"\n").unwrap_err();
    assert!(text.contains("max-model-len = 9000 (file test.toml:1)") && text.contains("8192"), "{text}");
    assert_eq!(choose("max-model-len = 9000\n").unwrap().context, 9000);
    // Blocks as long as the trained context leave nothing to compact.
    let text = choose("max-model-len = 9000\n[cache]\nslots = 8064\n").unwrap_err();
    assert!(text.contains("max-model-len = 9000") && text.contains("lower cache.slots"), "{text}");
    let longest = choose("[cache]\ncapacities = [8192]\n").unwrap();
    assert_eq!((longest.bounds.max_full_len, longest.bounds.max_slots), (8192, 8048));
}

#[test]
fn a_context_of_a_few_tokens_has_full_alone() {
    let few = choose("max-model-len = 40\n[cache]\nmethod = \"full\"\n").unwrap();
    assert_eq!(
        (few.bounds.allowed.as_slice(), few.capacities.as_slice()),
        (&[CacheMethod::Full][..], &[40][..])
    );
    let text = choose("max-model-len = 40\n[cache]\nmethod = \"full\"\nmethods = [\"tova\"]\n").unwrap_err();
    assert!(text.contains("cache.methods (file test.toml:4)"), "{text}");
    let text = choose("max-model-len = 1000\n[cache]\nmethod = \"full\"\nslots = 1000\n").unwrap_err();
    assert!(text.contains("cache.slots (file test.toml:4)") && text.contains("largest block"), "{text}");
}

#[test]
fn weights_are_needed_where_a_method_is_named() {
    for (file, key) in [
        ("[cache]\nmethod = \"learned\"\n", "cache.method (file test.toml:2) has learned"),
        ("[cache]\nmethods = [\"tova\", \"lococo\"]\n", "cache.methods (file test.toml:2) has lococo"),
    ] {
        let text = choose(file).unwrap_err();
        assert!(text.contains(key) && text.contains("cache.side-car"), "{text}");
    }
    let text = choose_for("[cache]\nmethod = \"lococo\"\n", SMOL, Some(&learned())).unwrap_err();
    assert!(text.contains("lococo"), "{text}");
}

#[test]
fn lococo_has_the_slots_of_its_weights() {
    let weights = testing::side_car(SMOL, 128, 1);
    let default = choose_for("[cache]\nmethod = \"lococo\"\n", SMOL, Some(&weights)).unwrap();
    assert_eq!((default.settings.slots, default.capacities.as_slice()), (128, &[192][..]));
    let text = choose_for("[cache]\nmethod = \"lococo\"\nslots = 256\n", SMOL, Some(&weights)).unwrap_err();
    assert!(text.contains("cache.slots (file test.toml:3)") && text.contains("128"), "{text}");
    // Named beside another, it gets a block of its own.
    let beside = choose_for("[cache]\nmethods = [\"lococo\"]\n", SMOL, Some(&weights)).unwrap();
    assert_eq!((beside.settings.slots, beside.capacities[0]), (2048, 192));
    assert_eq!(beside.bounds.allowed, [CacheMethod::Lococo, CacheMethod::Learned]);
}

#[test]
fn numbers_that_do_not_fit_name_their_setting() {
    for (file, parts) in [
        ("[cache]\nslots = 9000\n", ["cache.slots (file test.toml:2)", "8192"]),
        ("[cache]\nsinks = 600\n", ["cache.sinks (file test.toml:2)", "2048"]),
        (
            "max-model-len = 1000\n[cache]\ncapacities = [5000, 300]\n",
            ["cache.capacities has 5000 (file test.toml:3)", "1000 tokens"],
        ),
        ("[cache]\ncapacities = [9000]\n", ["cache.capacities has 9000 (file test.toml:2)", "8192 tokens"]),
    ] {
        let text = choose(file).unwrap_err();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

/// Whatever the settings: the server takes the bounds.
#[test]
fn the_server_takes_what_is_chosen() {
    let weights = testing::side_car(SMOL, 128, 1);
    for method in
        ["auto", "full", "window", "h2o", "tova", "expected", "keydiff", "observed", "lococo", "learned"]
    {
        for context in ["", "max-model-len = 16\n", "max-model-len = 100\n", "max-model-len = 20000\n"] {
            for more in
                ["", "sinks = 4\n", "ring = 30\n", "methods = [\"lococo\", \"full\"]\n", "methods = []\n"]
            {
                let file = format!("{context}[cache]\nmethod = \"{method}\"\n{more}");
                let Ok(choice) = choose_for(&file, SMOL, Some(&weights)) else { continue };
                let server =
                    locket_server::ServerConfig { cache: choice.bounds.clone(), ..Default::default() };
                assert_eq!(server.check(), Ok(()), "{file}");
                let stride = choice.capacities.last().copied().unwrap() as usize;
                let settings = choice.settings;
                let needed = settings.method.side_arrays(SMOL, Some(&weights));
                assert!(settings.check(stride, choice.side, needed).is_ok(), "{file}: {settings:?}");
            }
        }
    }
}
