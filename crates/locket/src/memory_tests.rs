//! Plans that fit, and refusals with numbers.

use locket_model::{
    kv_cache::CacheMethod,
    load::{Backend, BuildOptions},
    testing::{self, TinyLlama},
};

use super::*;
use crate::config::{FileSource, Sources};

/// SmolLM2-135M.
const SMOL: CacheGeometry =
    CacheGeometry { num_layers: 30, num_heads: 9, num_kv_heads: 3, head_dim: 64, max_position: 8192 };

fn config(file: &str) -> Config {
    let file = FileSource { path: "test.toml".into(), text: file.into() };
    Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap()
}

fn plan(file: &str, free: u64) -> Result<MemoryPlan, PlanError> {
    let free = FreeMemory { bytes: free, bounded_by: "machine".into() };
    MemoryPlan::fit(
        &config(file),
        &free,
        Fixed { model: 200 << 20, side_car: 0, vision: 0, adapters: 0 },
        SMOL,
        None,
    )
}

fn sizes(plan: &MemoryPlan) -> Vec<u32> {
    plan.cache.classes.iter().map(|class| class.capacity).collect()
}

#[test]
fn free_memory_is_something() {
    let free = free_memory();
    assert!(free.bytes > 0, "{free:?}");
}

#[test]
fn the_default_model_fits_a_small_laptop() {
    // 4 GiB with 2 GiB free: budget 1 GiB, 824 MiB of cache and snapshots.
    let plan = plan("", 2 << 30).unwrap();
    assert_eq!(sizes(&plan), [256, 1024, 2176]);
    assert!(plan.total_bytes() <= plan.budget);
    assert!(plan.cache.num_blocks() >= 32, "{:?}", plan.cache);
    assert_eq!(plan.snapshots.kept_bytes, (824 << 20) / 10);
    assert!(plan.choice.bounds.snapshots);
    let lines = plan.describe().join("\n");
    for part in [
        "half of 2.00 GiB free, bounded by the machine",
        "131072 tokens, beyond the 8192",
        "observed: 2048 slots and a ring of 128, 4 sinks, 512 recent",
        // 2,176 slots of 90 * (256 + 4 + 4) bytes, and 131,072 of 90 * (256 + 4).
        "49.3 MiB at any length; the full cache would take 2.86 GiB at 131072 tokens",
        "snapshots  82.4 MiB kept, 49.3 MiB for the one that is taken",
        "may ask for full, window, h2o, tova, keydiff, observed; up to 2048 slots, or 2176 tokens",
    ] {
        assert!(lines.contains(part), "{part} is not in\n{lines}");
    }
}

#[test]
fn full_takes_the_whole_context() {
    let plan = plan("[cache]\nmethod = \"full\"\n", 2 << 30).unwrap();
    assert_eq!(sizes(&plan), [512, 2048, 8192]);
    assert!(plan.total_bytes() <= plan.budget);
    assert!(plan.cache.num_blocks() >= 12, "{:?}", plan.cache);
    assert!(plan.describe().join("\n").contains("full: every token is kept"));
}

#[test]
fn asked_capacities_and_context() {
    let full = "max-model-len = 1000\n[cache]\nmethod = \"full\"\ncapacities = [1000, 300]\n";
    assert_eq!(sizes(&plan(full, 2 << 30).unwrap()), [300, 1000]);
    let window = "[cache]\nmethod = \"window\"\nslots = 1024\n";
    let fits = plan(window, 2 << 30).unwrap();
    assert_eq!((sizes(&fits).as_slice(), fits.choice.settings.capacity()), (&[256, 512, 1152][..], 1152));
    let window = "[cache]\nmethod = \"window\"\nslots = 1024\ncapacities = [4096]\n";
    assert_eq!(sizes(&plan(window, 2 << 30).unwrap()), [1152, 4096]);
}

#[test]
fn side_arrays_and_narrow_slots_are_counted() {
    let bytes = |file: &str| plan(file, 2 << 30).unwrap().cache;
    let each = |cache: &CachePlan| CachePlan::slot_bytes(SMOL, cache.slot_type, cache.side);
    assert_eq!(each(&bytes("[cache]\nmethod = \"full\"\nmethods = []\n")), 23_400);
    assert_eq!(each(&bytes("")), 23_400 + 90 * 4);
    assert_eq!(each(&bytes("[cache]\ndtype = \"int8\"\n")), 90 * (128 + 8 + 4 + 4));
    let expected = bytes("[cache]\nmethods = [\"expected\"]\n");
    assert!(expected.side.per_layer > 0, "{expected:?}");
}

#[test]
fn snapshots_are_asked_for_turned_off_or_left_out() {
    let asked = plan("[snapshots]\nmemory = \"300MiB\"\n", 2 << 30).unwrap();
    assert_eq!((asked.snapshots.kept_bytes, asked.snapshots.turn_bytes), (300 << 20, 16 << 20));
    assert!(asked.total_bytes() <= asked.budget);
    let off = plan("[snapshots]\nmemory = 0\n", 2 << 30).unwrap();
    assert_eq!((off.snapshots, off.choice.bounds.snapshots), (SnapshotPlan::default(), false));
    assert!(off.describe().join("\n").contains("snapshots  off"));
    // The largest block alone fits beside the weights.
    let small = "memory-budget = \"260MiB\"\n";
    assert_eq!(plan(small, 2 << 30).unwrap().snapshots, SnapshotPlan::default());
    for file in ["[snapshots]\nmemory = \"2GiB\"\n", "memory-budget = \"260MiB\"\n[snapshots]\ndir = \"x\"\n"]
    {
        let text = plan(file, 2 << 30).unwrap_err().to_string();
        assert!(text.contains("snapshots.memory") && text.contains("memory-budget"), "{text}");
    }
    let rich = plan("", 64 << 30).unwrap();
    assert_eq!(rich.snapshots.kept_bytes, 256 << 20);
}

#[test]
fn refusals_have_numbers() {
    let text = plan("", 300 << 20).unwrap_err().to_string();
    assert!(text.contains("200 MiB for weights") && text.contains("150 MiB (half of 300 MiB"), "{text}");
    let text = plan("memory-budget = \"230MiB\"\n", 2 << 30).unwrap_err().to_string();
    assert!(text.contains("230 MiB (file test.toml:1)") && text.contains("leave 30.0 MiB"), "{text}");
}

/// Weights, workspace, blocks of every method and a side-car: nothing is held that was not planned.
#[test]
fn what_is_held_was_planned() {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().with("max_position_embeddings", 4096).write(folder.path()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let weights = std::sync::Arc::new(testing::side_car(geometry, 128, 1));
    let found =
        FoundSideCar { weights: std::sync::Arc::clone(&weights), origin: "test".into(), digest: [0; 32] };
    let free = FreeMemory { bytes: 512 << 20, bounded_by: "machine".into() };
    for (file, backend) in
        [("", Backend::Cpu), ("[cache]\ndtype = \"int8\"\n", Backend::Cpu), ("", Backend::Reference)]
    {
        let mut config = config(file);
        config.backend = backend;
        config.cache.methods = Some(match config.cache.slot_type.is_float() {
            true => CacheMethod::ALL.to_vec(),
            false => CacheMethod::ALL.into_iter().filter(|method| !method.mixes()).collect(),
        });
        let plan = MemoryPlan::make(&config, &checkpoint, Some(&found), Beside::default(), &free).unwrap();
        assert!(plan.side_car_bytes > 0 && plan.cache.side.columns == 3, "{plan:?}");
        let options = BuildOptions {
            backend,
            cache: plan.cache.clone(),
            max_batch_rows: config.engine.max_batch_rows,
            threads: 1,
            side_car: Some(std::sync::Arc::clone(&weights)),
        };
        let held = checkpoint.build(&options).unwrap().memory();
        assert!(held.cache <= plan.cache.total_bytes(), "{held:?}, {plan:?}");
        let planned = plan.model_bytes + plan.side_car_bytes;
        assert!(held.weights + held.workspace <= planned, "{held:?}, planned {planned}");
    }
}
