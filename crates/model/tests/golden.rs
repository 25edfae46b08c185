//! Logits of small random LLaMA-family checkpoints equal PyTorch transformers' over 200 positions.
//!
//! The checkpoints and expected logits are made by `tests/golden/make_llama.py`. Together they use
//! every branch of the geometry: grouped queries, tied and own heads, llama3, linear and YaRN
//! scaling, sliding windows, biases, head norms, explicit head sizes, shards, f32, f16 and bf16.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixtures;

use std::path::{Path, PathBuf};

use fixtures::{assert_close, build, teacher_force};
use locket_model::{
    kv_cache::{CacheMethod, CacheSettings, SlotType},
    load::Backend,
};

/// Folder of the configuration and logits, folder of the weights.
const VARIANTS: [(&str, &str); 7] = [
    ("llama3", "llama3"),
    ("linear", "llama3"),
    ("yarn", "llama3"),
    ("mistral", "llama3"),
    ("llama_bias", "llama_bias"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// A folder as a user would have it: configuration, weights, tokenizer.
fn checkpoint(variant: &str, weights: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: PathBuf| {
        let to = folder.path().join(from.file_name().unwrap());
        std::fs::copy(&from, to).unwrap();
    };
    copy(golden().join("tokenizer.json"));
    copy(golden().join(variant).join("config.json"));
    for entry in std::fs::read_dir(golden().join(weights)).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("model") {
            copy(path);
        }
    }
    folder
}

/// `ids [200]` and `logits [200, vocab]`.
fn expected(variant: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(golden().join(variant).join("logits.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("ids").unwrap().data().chunks_exact(8);
    let ids = ids.map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect();
    let logits = tensors.tensor("logits").unwrap().data().chunks_exact(4);
    (ids, logits.map(|logit| f32::from_le_bytes(logit.try_into().unwrap())).collect())
}

fn compare(backend: Backend, slot_type: SlotType, tolerance: f32) {
    for (variant, weights) in VARIANTS {
        let folder = checkpoint(variant, weights);
        let (ids, expected) = expected(variant);
        let mut model = build(folder.path(), backend, slot_type, &[(256, 1)]);
        assert_eq!(ids.len(), 200);
        for chunks in [&[200][..], &[1, 64, 3]] {
            let logits = teacher_force(model.as_mut(), CacheSettings::full(200), &ids, chunks);
            let what = format!("{variant}, {backend:?}, {} slots, chunks {chunks:?}", slot_type.name());
            assert_close(&what, &expected, &logits, model.config().vocab_size, tolerance);
        }
    }
}

#[test]
fn reference_equals_transformers() {
    compare(Backend::Reference, SlotType::F32, 1e-4);
}

/// Keys and values rounded to half types; nothing else differs.
#[test]
fn reference_with_half_slots_stays_near() {
    compare(Backend::Reference, SlotType::F16, 0.05);
    compare(Backend::Reference, SlotType::Bf16, 0.4);
}

/// Dense weights are multiplied in f32 on this backend too; the order of sums differs.
#[test]
fn cpu_equals_transformers() {
    compare(Backend::Cpu, SlotType::F32, 2e-4);
    compare(Backend::Cpu, SlotType::F16, 0.05);
}

/// Folds keep the backends together too, in every geometry.
#[test]
fn cpu_equals_reference_with_folds() {
    let window = CacheSettings { sinks: 4, recent: 0, ..CacheSettings::of(CacheMethod::Window, 48, 20) };
    for (variant, weights) in VARIANTS {
        let folder = checkpoint(variant, weights);
        let (ids, _) = expected(variant);
        let mut reference = build(folder.path(), Backend::Reference, SlotType::F32, &[(80, 1)]);
        let mut cpu = build(folder.path(), Backend::Cpu, SlotType::F32, &[(80, 1)]);
        let expected = teacher_force(reference.as_mut(), window, &ids, &[200]);
        let got = teacher_force(cpu.as_mut(), window, &ids, &[1, 64, 3]);
        assert_close(&format!("{variant}, folded"), &expected, &got, cpu.config().vocab_size, 1e-4);
    }
}
