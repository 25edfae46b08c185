//! The guard against silent drift on the default model: every method in f16 and int8 slots, in every
//! chunk, alone and among others; both backends; and PyTorch's figures, which
//! `tests/golden/make_fingerprint.py` made without any of this code.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{path::PathBuf, sync::Arc};

use locket_eval::fingerprint::{CHUNKS, FingerprintOptions, Print, fingerprint};
use locket_model::{
    kv_cache::{CacheGeometry, CacheMethod, SideCar, SlotType},
    load::{Backend, Checkpoint},
    testing::default_model,
};

/// Nats between the `cpu` backend and PyTorch in f32.
const FROM_PYTORCH: f64 = 5e-3;
/// The same in int8 slots, whose rounding costs 0.003 nats with method `full`.
const INT8_FROM_PYTORCH: f64 = 1e-2;
/// The same for `keydiff` in rounded slots: keys of one token are equal but for rounding, so rounding
/// decides which of them stay.
const KEYDIFF_FROM_PYTORCH: f64 = 2e-2;
/// Nats between backends.
const BETWEEN_BACKENDS: f64 = 1e-3;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

struct Golden {
    ids: Vec<u32>,
    nll: serde_json::Map<String, serde_json::Value>,
}

fn golden() -> Golden {
    let text = std::fs::read_to_string(repository().join("tests/golden/fingerprint.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = value["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    Golden { ids, nll: value["nll"].as_object().unwrap().clone() }
}

fn run(backend: Backend, slot_types: &[SlotType], chunks: &[usize], with_neighbours: bool) -> Vec<Print> {
    let checkpoint = Checkpoint::open(&default_model()).unwrap();
    let path = repository().join("crates/locket/assets/smollm2-135m-instruct.learned.safetensors");
    let side_car = Arc::new(SideCar::open(&path, CacheGeometry::of(&checkpoint.config)).unwrap());
    let options = FingerprintOptions {
        methods: CacheMethod::ALL.to_vec(),
        slot_types: slot_types.to_vec(),
        chunks: chunks.to_vec(),
        with_neighbours,
        backend,
        threads: 2,
    };
    fingerprint(&checkpoint, &golden().ids, Some(&side_car), &options).unwrap()
}

/// All methods but `lococo`, for which no weights are shipped.
const METHODS: usize = 8;

#[test]
fn the_default_models_fingerprint() {
    let golden = golden();
    let f16 = run(Backend::Cpu, &[SlotType::F16], &CHUNKS, true);
    assert_eq!(f16.len(), METHODS * 6);
    let f32s = run(Backend::Cpu, &[SlotType::F32], &CHUNKS[1..2], false);
    assert_eq!(f32s.len(), METHODS);
    let int8 = run(Backend::Cpu, &[SlotType::I8], &CHUNKS[1..], true);
    assert_eq!(int8.len(), METHODS * 4);
    for prints in
        [&f16, &f32s, &int8].into_iter().flat_map(|prints| prints.chunk_by(|a, b| a.method == b.method))
    {
        for print in prints {
            assert_eq!(print.bits, prints[0].bits, "{print:?} against {:?}", prints[0]);
        }
        let expected = golden.nll[prints[0].method].as_f64().unwrap();
        println!("{} {} {:.5}, PyTorch {expected:.5}", prints[0].method, prints[0].slot_type, prints[0].nll);
        let tolerance = match (prints[0].method, prints[0].slot_type) {
            (_, "f32") => FROM_PYTORCH,
            ("keydiff", _) => KEYDIFF_FROM_PYTORCH,
            (_, "int8") => INT8_FROM_PYTORCH,
            _ => FROM_PYTORCH,
        };
        assert!((prints[0].nll - expected).abs() <= tolerance, "{:?}: PyTorch has {expected}", prints[0]);
    }
    let reference = run(Backend::Reference, &[SlotType::F32], &CHUNKS[1..2], false);
    assert_eq!(reference.len(), METHODS);
    for print in &reference {
        let ours = f32s.iter().find(|ours| ours.method == print.method).unwrap();
        println!("{} cpu {:.5}, reference {:.5}", print.method, ours.nll, print.nll);
        assert!((ours.nll - print.nll).abs() <= BETWEEN_BACKENDS, "{ours:?} and {print:?}");
    }
}
