//! Where trained weights of cache methods come from: the setting, a file beside the model, or this
//! binary, which carries those of the default model.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use locket_model::{
    kv_cache::{CacheGeometry, SideCar},
    load::Checkpoint,
};
use sha2::{Digest, Sha256};

use crate::{config::Config, model_source::DEFAULT_FINGERPRINT};

/// The default model's weights for method learned.
const BUILT_IN: &[u8] = include_bytes!("../assets/smollm2-135m-instruct.learned.safetensors");
/// How messages call them.
const BUILT_IN_NAME: &str = "built-in";
/// What is added to the path of a model's file or folder.
const SUFFIX: &str = ".locket.safetensors";

/// Weights that were found.
#[derive(Debug, Clone)]
pub struct FoundSideCar {
    /// The weights.
    pub weights: Arc<SideCar>,
    /// Where they come from, for people.
    pub origin: String,
    /// SHA-256 of the files: snapshots are of use to the same weights only.
    pub digest: [u8; 32],
}

/// Weights that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cache.side-car ({origin}): {reason}. Give another file, or cache.side-car = \"none\" to do without")]
pub struct SideCarError {
    /// Who asked for them.
    origin: String,
    /// The file and what is wrong with it.
    reason: locket_model::Error,
}

/// Looks for weights that serve `checkpoint`, and reads them.
///
/// # Errors
/// A file that is there and cannot be used: a server that silently does without would answer worse
/// and nobody would know.
pub fn find(config: &Config, checkpoint: &Checkpoint) -> Result<Option<FoundSideCar>, SideCarError> {
    let geometry = CacheGeometry::of(&checkpoint.config);
    let asked: Vec<&str> = config.cache.side_car.iter().map(String::as_str).collect();
    let (files, origin) = match asked.as_slice() {
        ["none"] => return Ok(None),
        [] => match unasked(checkpoint) {
            Some((file, origin)) => (vec![file], origin.to_owned()),
            None => return Ok(None),
        },
        paths => {
            let file = |&name: &&str| match name {
                BUILT_IN_NAME => File::BuiltIn,
                path => File::Path(path.into()),
            };
            (paths.iter().map(file).collect(), config.origin("cache.side-car"))
        }
    };
    read(&files, geometry).map(Some).map_err(|reason| SideCarError { origin, reason })
}

/// What is taken where nobody asks: the file beside the model, else the built-in weights if the model is the
/// default model's file. Its fingerprint decides and not its name or geometry: many models have the
/// geometry of SmolLM2-135M, and a file can be renamed. Other files of the same model, quantised
/// otherwise, have other fingerprints; who wants the weights for them says `built-in`.
fn unasked(checkpoint: &Checkpoint) -> Option<(File, &'static str)> {
    let path = beside(&checkpoint.path);
    if path.is_file() {
        return Some((File::Path(path), "found beside the model"));
    }
    (checkpoint.fingerprint == DEFAULT_FINGERPRINT).then_some((File::BuiltIn, "for the default model"))
}

/// `MODEL.locket.safetensors`.
fn beside(model: &Path) -> PathBuf {
    // Components leave out a slash at the end, which would put the file into a folder.
    let mut name: OsString = model.components().collect::<PathBuf>().into_os_string();
    name.push(SUFFIX);
    name.into()
}

#[derive(Debug, PartialEq, Eq)]
enum File {
    BuiltIn,
    Path(PathBuf),
}

fn read(files: &[File], geometry: CacheGeometry) -> Result<FoundSideCar, locket_model::Error> {
    let mut weights = SideCar::default();
    let mut digest = Sha256::new();
    let mut names = Vec::new();
    for file in files {
        let (name, one) = match file {
            File::BuiltIn => {
                digest.update(Sha256::digest(BUILT_IN));
                (BUILT_IN_NAME.to_owned(), SideCar::read(BUILT_IN_NAME.as_ref(), BUILT_IN, geometry)?)
            }
            File::Path(path) => {
                let one = SideCar::open(path, geometry)?;
                let bytes = std::fs::read(path);
                let bytes = bytes.map_err(|source| locket_model::Error::Io { path: path.clone(), source })?;
                digest.update(Sha256::digest(bytes));
                (path.display().to_string(), one)
            }
        };
        names.push(name);
        weights = weights.join(one);
    }
    Ok(FoundSideCar {
        weights: Arc::new(weights),
        origin: names.join(", "),
        digest: digest.finalize().into(),
    })
}

#[cfg(test)]
pub mod tests {
    use locket_model::testing::{TinyLlama, default_model};

    use super::*;
    use crate::config::{FileSource, Sources};

    fn config(file: &str) -> Config {
        let file = FileSource { path: "test.toml".into(), text: file.into() };
        Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap()
    }

    fn tiny(folder: &Path) -> Checkpoint {
        let model = folder.join("model");
        std::fs::create_dir(&model).unwrap();
        TinyLlama::default().write(&model).unwrap();
        Checkpoint::open(&model).unwrap()
    }

    /// A side-car of method learned, all weights zero, as bytes of a file.
    pub fn zeros(geometry: CacheGeometry, metadata: &[(&str, &str)]) -> Vec<u8> {
        let (layers, heads) = (geometry.num_layers, geometry.num_kv_heads);
        let (features, taps, hidden) = (2 * heads * geometry.head_dim, 3, 4);
        let shapes: [(&str, Vec<usize>); 7] = [
            ("scale", vec![layers, features]),
            ("dw", vec![layers, features, taps]),
            ("p1", vec![layers, hidden, 2 * features]),
            ("b1", vec![layers, hidden]),
            ("p2", vec![layers, 2 * heads, hidden]),
            ("b2", vec![layers, 2 * heads]),
            ("a", vec![layers, heads, 2]),
        ];
        let mut header = serde_json::Map::new();
        let metadata = [("kind", "learned")].iter().chain(metadata);
        let metadata: serde_json::Map<_, _> =
            metadata.map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        header.insert("__metadata__".into(), metadata.into());
        let mut end = 0;
        for (name, shape) in shapes {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            let entry = serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
            header.insert(name.into(), entry);
        }
        let header = serde_json::Value::from(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + end, 0);
        bytes
    }

    #[test]
    fn the_default_model_has_built_in_weights() {
        let checkpoint = Checkpoint::open(&default_model()).unwrap();
        assert_eq!(checkpoint.fingerprint, DEFAULT_FINGERPRINT);
        let found = find(&config("[cache]\nside-car = \"built-in\"\n"), &checkpoint).unwrap().unwrap();
        assert!(found.weights.learned.is_some() && found.weights.recall_permille.is_some());
        assert_eq!(found.origin, "built-in");
        assert!(find(&config("[cache]\nside-car = \"none\"\n"), &checkpoint).unwrap().is_none());
    }

    #[test]
    fn a_file_beside_the_model_is_taken_and_must_be_usable() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = tiny(folder.path());
        let geometry = CacheGeometry::of(&checkpoint.config);
        assert!(find(&config(""), &checkpoint).unwrap().is_none(), "there is none for another model");
        let path = folder.path().join("model.locket.safetensors");
        std::fs::write(&path, zeros(geometry, &[("recent_permille", "125")])).unwrap();
        let found = find(&config(""), &checkpoint).unwrap().unwrap();
        assert_eq!((found.weights.recent_permille, found.origin), (Some(125), path.display().to_string()));
        std::fs::write(&path, zeros(geometry, &[("layers", "77")])).unwrap();
        let error = find(&config(""), &checkpoint).unwrap_err().to_string();
        assert!(error.contains("found beside the model") && error.contains("77 layers"), "{error}");
        assert!(error.contains("cache.side-car = \"none\""), "{error}");
        assert!(find(&config("[cache]\nside-car = \"none\"\n"), &checkpoint).unwrap().is_none());
    }

    #[test]
    fn files_that_are_named_are_taken_and_their_digest_is_theirs() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = tiny(folder.path());
        let path = folder.path().join("mine.safetensors");
        let named = config(&format!("[cache]\nside-car = {:?}\n", path.display().to_string()));
        let error = find(&named, &checkpoint).unwrap_err().to_string();
        assert!(error.contains("cache.side-car (file test.toml:2)") && error.contains("mine"), "{error}");
        let geometry = CacheGeometry::of(&checkpoint.config);
        let digest = |metadata: &[(&str, &str)]| {
            std::fs::write(&path, zeros(geometry, metadata)).unwrap();
            find(&named, &checkpoint).unwrap().unwrap().digest
        };
        assert_ne!(digest(&[("seed", "1")]), digest(&[("seed", "2")]));
        let built_in = config("[cache]\nside-car = \"built-in\"\n");
        let error = find(&built_in, &checkpoint).unwrap_err().to_string();
        assert!(error.contains("built-in") && error.contains("30 layers"), "{error}");
    }

    #[test]
    fn the_place_beside_a_model() {
        assert_eq!(beside("a/b.gguf".as_ref()), Path::new("a/b.gguf.locket.safetensors"));
        assert_eq!(beside("a/model/".as_ref()), Path::new("a/model.locket.safetensors"));
    }
}
