//! Opening a model folder: Hugging Face's files, or one GGUF file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Checkpoint, Fingerprint, GenerationDefaults, TokenizerSource, gguf};
use crate::{
    Error,
    config::hf::{self, Fields},
    weights::{MappedFile, names::Naming, safetensors},
};

/// Configuration files above this are not believed: the largest known, a tokenizer's configuration
/// with thousands of added tokens, has about 2 MB; indexes of large models have less.
const MAX_JSON_BYTES: u64 = 64 << 20;
const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

pub(super) fn open(folder: &Path) -> Result<Checkpoint, Error> {
    let config_path = folder.join(CONFIG);
    let has_safetensors =
        ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| folder.join(name).is_file());
    if config_path.is_file() && has_safetensors {
        return open_safetensors(folder);
    }
    let gguf_files = gguf_files(folder)?;
    match gguf_files.as_slice() {
        [file] => gguf::open(folder, MappedFile::open(file)?),
        [] => Err(unusable(
            folder,
            "it has neither config.json with model.safetensors (or model.safetensors.index.json), nor a .gguf \
             file"
            .into(),
        )),
        several => {
            let names: Vec<_> =
                several.iter().filter_map(|path| path.file_name()?.to_str()).take(10).collect();
            Err(unusable(
                folder,
                format!("it has {} .gguf files; name one of them: {}", several.len(), names.join(", ")),
            ))
        }
    }
}

fn unusable(folder: &Path, reason: String) -> Error {
    Error::BrokenFile { path: folder.to_owned(), format: "model folder", reason }
}

/// The folder's `.gguf` files by name.
fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Io { path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn open_safetensors(folder: &Path) -> Result<Checkpoint, Error> {
    let config_json = read_json(&folder.join(CONFIG), CONFIG)?;
    let generation_json = read_optional_json(&folder.join(GENERATION), GENERATION)?;
    let config = hf::read(&config_json, generation_json.as_ref())?;
    let tokenizer = folder.join("tokenizer.json");
    if !tokenizer.is_file() {
        return Err(unusable(
            folder,
            "it has no tokenizer.json; convert the tokenizer with transformers' `save_pretrained`".into(),
        ));
    }
    let (weights, header_bytes) = safetensors::open(folder)?;
    let naming = if hf::is_llava(&config_json) {
        Naming::of_llava(|name| weights.info(name).is_some())
    } else {
        Naming::HuggingFace
    };
    let mut fingerprint = Fingerprint::new();
    fingerprint.add(config_json.to_string().as_bytes());
    for (file, header_bytes) in weights.files().iter().zip(header_bytes) {
        fingerprint.add_file(file.bytes(), header_bytes);
    }
    Ok(Checkpoint {
        path: folder.to_owned(),
        config,
        tokenizer: TokenizerSource::Json(tokenizer),
        chat_template: chat_template(folder)?,
        generation: generation_defaults(generation_json.as_ref())?,
        quantization: weights.most_frequent_type().to_owned(),
        weight_bytes: weights.total_bytes(),
        fingerprint: fingerprint.hex(),
        weights,
        naming,
    })
}

/// Reads a JSON file of bounded size; `format` names it in errors.
pub(crate) fn read_json(path: &Path, format: &'static str) -> Result<Value, Error> {
    let text = read_text(path, format)?;
    serde_json::from_str(&text).map_err(|e| Error::BrokenFile {
        path: path.to_owned(),
        format,
        reason: e.to_string(),
    })
}

fn read_optional_json(path: &Path, format: &'static str) -> Result<Option<Value>, Error> {
    if path.is_file() { read_json(path, format).map(Some) } else { Ok(None) }
}

fn read_text(path: &Path, format: &'static str) -> Result<String, Error> {
    use std::io::Read as _;
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let broken = |reason| Error::BrokenFile { path: path.to_owned(), format, reason };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    // One byte more than allowed, so that a longer file is told from one that just fits.
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(broken(format!("it is larger than {MAX_JSON_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|e| broken(e.to_string()))
}

/// `chat_template.jinja`, or the template in `chat_template.json`, `processor_config.json` (models with
/// images have these) or `tokenizer_config.json`: a text, or the one called `default` of a list.
fn chat_template(folder: &Path) -> Result<Option<String>, Error> {
    let own_file = folder.join("chat_template.jinja");
    if own_file.is_file() {
        return read_text(&own_file, "chat_template.jinja").map(Some);
    }
    for file in ["chat_template.json", "processor_config.json", TOKENIZER_CONFIG] {
        let config = read_optional_json(&folder.join(file), file)?;
        if let Some(template) = config.as_ref().map(template_of).transpose()?.flatten() {
            return Ok(Some(template));
        }
    }
    Ok(None)
}

/// The template in a configuration.
fn template_of(config: &Value) -> Result<Option<String>, Error> {
    let wrong = |reason: &str| Error::Config { field: "chat_template".into(), reason: reason.into() };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(named)) => {
            let default =
                named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            let template = default.and_then(|entry| entry.get("template")).and_then(Value::as_str);
            let template = template.ok_or_else(|| wrong("is a list without one named `default`"))?;
            Ok(Some(template.to_owned()))
        }
        Some(_) => Err(wrong("must be a text or a list of named templates")),
    }
}

/// Sampling defaults. `do_sample` is not read: OpenAI's clients expect sampling unless they ask for
/// temperature 0.
fn generation_defaults(generation: Option<&Value>) -> Result<GenerationDefaults, Error> {
    let Some(generation) = generation else { return Ok(GenerationDefaults::default()) };
    let fields = Fields::of(GENERATION, generation)?;
    // The ranges that requests are held to.
    let within = |key: &str, range: std::ops::RangeInclusive<f32>| {
        let value = fields.f32(key)?;
        match value {
            Some(value) if !range.contains(&value) => Err(Error::Config {
                field: format!("{GENERATION}: {key}"),
                reason: format!("is {value}; {} to {} are possible", range.start(), range.end()),
            }),
            value => Ok(value),
        }
    };
    // -1 and 0 both switch it off.
    let top_k = match generation.get("top_k").and_then(Value::as_i64) {
        Some(-1) => Some(0),
        _ => fields.u32("top_k")?,
    };
    Ok(GenerationDefaults {
        temperature: within("temperature", 0.0..=2.0)?,
        top_p: within("top_p", 0.0..=1.0)?,
        top_k,
        repetition_penalty: within("repetition_penalty", 0.01..=10.0)?,
    })
}
