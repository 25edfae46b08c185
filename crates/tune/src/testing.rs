//! What this crate's tests share: a tiny random model with a byte tokenizer, and a text.

use std::path::{Path, PathBuf};

use locket_model::{load::Checkpoint, testing::TinyLlama};
use locket_processor::Processor;

/// A tiny model in a folder that lives as long as the first of the pair.
pub(crate) fn checkpoint(tiny: &TinyLlama) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    tiny.write(folder.path()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

/// A tokenizer whose tokens are bytes.
pub(crate) fn processor() -> Processor {
    let (_folder, checkpoint) = checkpoint(&TinyLlama::default());
    Processor::load(&checkpoint).unwrap()
}

/// Writes a plain text of some 20,000 bytes with repetitions and variety.
pub(crate) fn text(folder: &Path) -> PathBuf {
    let path = folder.join("text.txt");
    let sentence =
        |i: usize| format!("Line {i} says that {} times {} is {}. ", i % 7, i % 11, (i % 7) * (i % 11));
    std::fs::write(&path, (0..600).map(sentence).collect::<String>()).unwrap();
    path
}
