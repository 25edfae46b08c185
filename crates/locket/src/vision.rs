//! The model's eyes: a vision tower of its own folder, or a file beside it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use locket_model::load::Checkpoint;
use locket_vision::{Error, VisionModel, model::OpenOptions};

use crate::config::Config;

/// What is put behind the model's name for the vision model beside it.
const MODEL_SUFFIX: &str = ".vision.safetensors";
/// And for its adapter.
const ADAPTER_SUFFIX: &str = ".vision-adapter";
/// Says in a setting that there is to be none.
const NONE: &str = "none";
/// Images that are decoded at once, and bytes of a pixel.
const DECODED_IMAGES: u64 = 2;
const PIXEL_BYTES: u64 = 3;

/// A vision model that was found.
pub struct FoundVision {
    /// The model.
    pub model: Arc<VisionModel>,
    /// Where.
    pub origin: PathBuf,
    /// Folder of the adapter that conversations with images go through.
    pub adapter: Option<PathBuf>,
}

impl FoundVision {
    /// The model in words.
    pub fn describe(&self) -> String {
        let geometry = self.model.geometry();
        format!(
            "{}: tiles of {} pixels, {} tokens each, at most {} an image",
            self.origin.display(),
            geometry.tile,
            geometry.patches(),
            geometry.max_tokens()
        )
    }

    /// Bytes that it takes: weights, workspace, images being decoded, visual tokens that are kept.
    pub fn planned_bytes(&self, config: &Config) -> u64 {
        let decoded = DECODED_IMAGES.saturating_mul(PIXEL_BYTES).saturating_mul(config.api.images.max_pixels);
        let parts = [
            self.model.weight_bytes(),
            self.model.workspace_bytes(),
            decoded,
            config.visual.config.cache_bytes as u64,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Opens the vision model that the operator names, or that the model has; `None`: text only.
///
/// # Errors
/// One that is named and cannot be used; one that is found and is broken or does not fit the model.
pub fn find(config: &Config, checkpoint: &Checkpoint) -> anyhow::Result<Option<FoundVision>> {
    let beside_model = beside(&checkpoint.path, MODEL_SUFFIX);
    let (path, origin) = match config.visual.model.as_deref() {
        Some(NONE) => return Ok(None),
        Some(path) => (PathBuf::from(path), config.origin("visual.model")),
        None if beside_model.is_file() => (beside_model, "found beside the model".into()),
        None if checkpoint.path.is_dir() => (checkpoint.path.clone(), "of the model's folder".into()),
        None => return Ok(None),
    };
    let options = OpenOptions { threads: threads(config), ..OpenOptions::default() };
    let opened = VisionModel::open(&path, &options);
    let model = match opened {
        // Most folders have none.
        Err(Error::NoVision { .. }) if config.visual.model.is_none() => return Ok(None),
        opened => opened.with_context(|| format!("visual.model ({origin})"))?,
    };
    model
        .check_decoder(checkpoint.config.hidden_size)
        .with_context(|| format!("visual.model {} ({origin})", path.display()))?;
    let adapter = adapter(config, &checkpoint.path);
    Ok(Some(FoundVision { model: Arc::new(model), origin: path, adapter }))
}

fn adapter(config: &Config, model: &Path) -> Option<PathBuf> {
    match config.visual.adapter.as_deref() {
        Some(NONE) => None,
        Some(path) => Some(path.into()),
        None => Some(beside(model, ADAPTER_SUFFIX)).filter(|path| path.is_dir()),
    }
}

/// CPU threads for the tower.
fn threads(config: &Config) -> usize {
    let of_model = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    match config.visual.threads {
        0 => (of_model / 2).max(1),
        threads => threads,
    }
}

/// The model's path with something behind its name.
fn beside(model: &Path, suffix: &str) -> PathBuf {
    // Components leave out a slash at the end, which would put the file into a folder.
    let mut name: OsString = model.components().collect::<PathBuf>().into_os_string();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use locket_model::testing::TinyLlama;
    use locket_vision::testing::{tiny, write_random};

    use super::*;
    use crate::config::{FileSource, Sources};

    fn config(file: &str) -> Config {
        let file = FileSource { path: "test.toml".into(), text: file.into() };
        Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap()
    }

    #[test]
    fn a_vision_model_beside_the_model_is_taken_and_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::create_dir(&path).unwrap();
        TinyLlama::default().write(&path).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert!(find(&config(""), &checkpoint).unwrap().is_none(), "the folder has none");
        let file = beside(&path, MODEL_SUFFIX);
        write_random(&file, &tiny(checkpoint.config.hidden_size), 1).unwrap();
        let found = find(&config(""), &checkpoint).unwrap().unwrap();
        assert_eq!((&found.origin, &found.adapter), (&file, &None));
        let small = config("max-image-pixels = 1000\n[visual]\ncache = 0\n");
        let weights = found.model.weight_bytes() + found.model.workspace_bytes();
        assert_eq!(found.planned_bytes(&small), weights + 6000);
        assert!(find(&config("[visual]\nmodel = \"none\"\n"), &checkpoint).unwrap().is_none());
        std::fs::create_dir(beside(&path, ADAPTER_SUFFIX)).unwrap();
        assert!(find(&config(""), &checkpoint).unwrap().unwrap().adapter.is_some());
        write_random(&file, &tiny(checkpoint.config.hidden_size + 1), 1).unwrap();
        let error = format!("{:#}", find(&config(""), &checkpoint).err().unwrap());
        assert!(error.contains("found beside the model"), "{error}");
        let error =
            format!("{:#}", find(&config("[visual]\nmodel = \"/nowhere\"\n"), &checkpoint).err().unwrap());
        assert!(error.contains("visual.model (file test.toml:2)"), "{error}");
    }
}
