//! A tiny random model and its tokenizer, for this crate's tests.

use std::path::{Path, PathBuf};

use locket_model::{
    Model,
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::TinyLlama,
};
use locket_processor::Processor;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

/// A folder with a tiny checkpoint, and its byte-level tokenizer.
pub(crate) fn byte_processor() -> (TempDir, Processor) {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().write(folder.path()).unwrap();
    let processor = Processor::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    (folder, processor)
}

/// Writes files into `folder` and returns their paths.
pub(crate) fn folder_with(folder: &TempDir, files: &[(&str, &str)]) -> Vec<PathBuf> {
    let write = |(name, text): &(&str, &str)| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    files.iter().map(write).collect()
}

/// Methods that a model without trained weights beside it can use.
pub(crate) fn methods_without_side_car() -> Vec<CacheMethod> {
    CacheMethod::ALL
        .into_iter()
        .filter(|method| !matches!(method, CacheMethod::Lococo | CacheMethod::Learned))
        .collect()
}

/// A random model on the CPU backend with `blocks` blocks of `capacity` f16 slots.
pub(crate) fn tiny_model(methods: &[CacheMethod], capacity: u32, blocks: u32, rows: usize) -> Box<dyn Model> {
    tiny_model_on(Backend::Cpu, methods, capacity, blocks, rows)
}

/// As [`tiny_model`], on `backend`.
pub(crate) fn tiny_model_on(
    backend: Backend,
    methods: &[CacheMethod],
    capacity: u32,
    blocks: u32,
    rows: usize,
) -> Box<dyn Model> {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().write(folder.path()).unwrap();
    build(folder.path(), backend, methods, BlockClass { capacity, blocks }, rows)
}

fn build(
    path: &Path,
    backend: Backend,
    methods: &[CacheMethod],
    class: BlockClass,
    max_batch_rows: usize,
) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let side = SideArrays::of(methods, geometry, None);
    let cache = CachePlan { geometry, slot_type: SlotType::F16, side, classes: vec![class] };
    checkpoint.build(&BuildOptions { backend, cache, max_batch_rows, threads: 1, side_car: None }).unwrap()
}

/// Uniform random ids.
pub(crate) fn random_ids(seed: u64, count: usize, vocab: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..vocab as u32)).collect()
}

/// Options for a small evaluation of the tiny model.
pub(crate) fn options() -> crate::EvalOptions {
    use crate::Task;
    crate::EvalOptions {
        methods: vec![CacheMethod::Full, CacheMethod::Window, CacheMethod::Tova, CacheMethod::Observed],
        slots: vec![32, 64],
        ring: 16,
        slot_types: vec![SlotType::F16],
        context: 200,
        probe_context: 300,
        documents: 3,
        tasks: vec![Task::Perplexity, Task::Passkey],
        probes: 2,
        against: vec![CacheMethod::Tova, CacheMethod::Full],
        seed: 0,
        sinks: None,
        recent_permille: None,
        recall_permille: None,
        layer_budgets: true,
        backend: Backend::Cpu,
        threads: 1,
        lockstep: 2,
        chunk: 32,
    }
}
