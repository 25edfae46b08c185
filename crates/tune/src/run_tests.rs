//! Whole runs on a tiny model.

use std::{collections::BTreeMap, path::Path};

use locket_model::{
    kv_cache::{CacheGeometry, SideCar},
    testing::TinyLlama,
};
use safetensors::SafeTensors;

use super::*;
use crate::testing;

fn settings(folder: &Path, method: Method) -> Settings {
    Settings {
        method,
        data: vec![testing::text(folder)],
        out: folder.join("side.safetensors"),
        model_name: "tiny".into(),
        budget: Budget::Steps(6),
        batch: 2,
        micro_batch: 1,
        sequence: 300,
        rate: 2e-3,
        seed: 5,
        device: DeviceKind::Cpu,
        precision: Precision::F32,
        checkpoints: None,
        resume: false,
    }
}

fn methods() -> [Method; 2] {
    [
        Method::Learned(LearnedSettings {
            hidden: 8,
            kernel: 3,
            windows: vec![20],
            ..LearnedSettings::default()
        }),
        Method::Lococo(LococoSettings { slots: 16, ring: 24, kernel: 3, ..LococoSettings::default() }),
    ]
}

/// Tensors as bytes by name, and the metadata.
fn read(path: &Path) -> (BTreeMap<String, Vec<u8>>, BTreeMap<String, String>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap().into_iter().collect();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    (file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect(), metadata)
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    for method in methods() {
        let folder = tempfile::tempdir().unwrap();
        let (_model, checkpoint) = testing::checkpoint(&TinyLlama::default());
        let processor = testing::processor();
        let mut settings = settings(folder.path(), method);
        let whole = run(&settings, &checkpoint, &processor).unwrap();
        let (expected, metadata) = read(&settings.out);
        assert_eq!((whole.steps, whole.tokens), (6, 3600));
        assert!(whole.losses.values().all(|loss| loss.is_finite() && *loss > 0.0));
        assert_eq!(metadata["kind"], settings.method.name());
        assert_eq!(metadata["model_hash"], checkpoint.fingerprint);
        let side_car = SideCar::open(&settings.out, CacheGeometry::of(&checkpoint.config)).unwrap();
        assert_eq!(side_car.learned.is_some(), metadata["kind"] == "learned");
        assert_eq!(side_car.lococo.is_some(), metadata["kind"] == "lococo");

        // The last checkpoint is four steps in; going on from it is a run that was cut there.
        settings.checkpoints = Some((folder.path().join("checkpoints"), 4));
        run(&settings, &checkpoint, &processor).unwrap();
        assert_eq!(read(&settings.out).0, expected);
        std::fs::remove_file(&settings.out).unwrap();
        settings.resume = true;
        let resumed = run(&settings, &checkpoint, &processor).unwrap();
        assert_eq!(read(&settings.out).0, expected);
        assert_eq!(resumed.losses, whole.losses);

        settings.seed = 6;
        let error = run(&settings, &checkpoint, &processor).unwrap_err().to_string();
        assert!(error.contains("was made with seed 5, not 6"), "{error}");
        settings.resume = false;
        run(&settings, &checkpoint, &processor).unwrap();
        assert_ne!(read(&settings.out).0, expected);
    }
}

#[test]
fn settings_that_contradict_the_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_model, checkpoint) = testing::checkpoint(&TinyLlama::default());
    let processor = testing::processor();
    let [learned, lococo] = methods();
    let refused = |change: &dyn Fn(&mut Settings), method: &Method, field: &str| {
        let mut settings = settings(folder.path(), method.clone());
        change(&mut settings);
        let error = run(&settings, &checkpoint, &processor).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    };
    refused(&|s| s.sequence = 513, &learned, "sequence");
    refused(&|s| s.sequence = 30, &learned, "sequence");
    refused(&|s| s.sequence = 60, &lococo, "sequence");
    refused(&|s| s.batch = 0, &learned, "batch");
    refused(&|s| s.budget = Budget::Steps(0), &learned, "steps");
    refused(&|s| s.rate = f64::NAN, &learned, "lr");
    refused(&|s| s.resume = true, &learned, "resume");
    let odd = Method::Lococo(LococoSettings { slots: 15, ring: 24, kernel: 3, ..LococoSettings::default() });
    refused(&|_| (), &odd, "slots");
}
