//! Finding a vision model: in a folder, or in a file of its own.

use std::path::Path;

use locket_model::weights::TensorFiles;
use serde_json::Value;

use crate::{
    Error, VisionGeometry,
    config::{self, is_llava},
    geometry::{BaseFit, invalid},
    weights::Parts,
};

/// Configuration files above this are not believed.
const MAX_JSON_BYTES: u64 = 16 << 20;

pub(crate) struct Opened {
    pub files: TensorFiles,
    pub geometry: VisionGeometry,
}

pub(crate) fn open(path: &Path, base_fit: Option<BaseFit>) -> Result<Opened, Error> {
    let none = |reason: &str| Error::NoVision { path: path.to_owned(), reason: reason.to_owned() };
    let (files, config, preprocessor) = if path.is_dir() {
        let config = read_json(&path.join("config.json"))?.ok_or_else(|| none("it has no config.json"))?;
        if !is_llava(&config) {
            return Err(none("model_type of its config.json is neither llava nor llava_next"));
        }
        let preprocessor = match read_json(&path.join("preprocessor_config.json"))? {
            None => read_json(&path.join("processor_config.json"))?,
            found => found,
        };
        (TensorFiles::open(path)?, config, preprocessor)
    } else {
        let files = TensorFiles::open(path)?;
        let config = metadata_json(&files, "config")?;
        let config = config.ok_or_else(|| none("its metadata has no text `config`"))?;
        let preprocessor = metadata_json(&files, "preprocessor_config")?;
        (files, config, preprocessor)
    };
    let shapes = Parts::find(&files).map_err(|reason| none(&reason))?.shapes()?;
    let mut geometry = config::read(&config, preprocessor.as_ref(), shapes)?;
    geometry.base_fit = base_fit.unwrap_or(geometry.base_fit);
    Ok(Opened { files, geometry })
}

fn metadata_json(files: &TensorFiles, key: &str) -> Result<Option<Value>, Error> {
    let Some(text) = files.metadata().get(key) else { return Ok(None) };
    serde_json::from_str(text)
        .map(Some)
        .map_err(|error| invalid(&format!("metadata: {key}"), error.to_string()))
}

/// `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    use std::io::Read as _;
    if !path.is_file() {
        return Ok(None);
    }
    let failed = |source| locket_model::Error::Io { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_JSON_BYTES).read_to_string(&mut text).map_err(failed)?;
    let broken = |error: serde_json::Error| locket_model::Error::BrokenFile {
        path: path.to_owned(),
        format: "JSON",
        reason: error.to_string(),
    };
    Ok(Some(serde_json::from_str(&text).map_err(broken)?))
}
