//! Tiny random checkpoints for tests of this crate and of those above it.
//!
//! Not part of the public interface: nothing but tests calls this.

#[cfg(test)]
pub(crate) mod gguf;
#[cfg(test)]
pub(crate) mod scorer_fixture;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::{
    ModelConfig,
    config::hf,
    kv_cache::{
        CacheGeometry, SideCar,
        side_car::{LearnedLayer, LearnedWeights, LococoLayer, LococoWeights},
    },
    weights::names::{self, Naming, Part},
};

/// The default model's file: `LOCKET_TEST_MODEL`, or the cache that `locket pull` fills.
///
/// # Panics
/// If it is not there, with the way to get it.
pub fn default_model() -> PathBuf {
    let from = |key: &str| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = from("LOCKET_TEST_MODEL").unwrap_or_else(|| {
        from("LOCKET_CACHE_DIR")
            .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join("locket")))
            .or_else(|| from("HOME").map(|home| home.join(".cache/locket")))
            .unwrap_or_default()
            .join("SmolLM2-135M-Instruct.Q4_1.gguf")
    });
    assert!(
        path.is_file(),
        "{} is not there: run 'locket pull' first, or set LOCKET_TEST_MODEL",
        path.display()
    );
    path
}

/// A random LLaMA in Hugging Face's format. The defaults make a model of some 90,000 numbers.
#[derive(Debug, Clone)]
pub struct TinyLlama {
    /// Keys that are added to `config.json`, or replace the defaults.
    pub config: Map<String, Value>,
    /// Seed of all weights.
    pub seed: u64,
    /// Largest number of bytes of a shard; `None` writes one `model.safetensors`.
    pub shard_bytes: Option<usize>,
}

impl Default for TinyLlama {
    fn default() -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": false,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "torch_dtype": "float32"
        });
        let config = match config {
            Value::Object(config) => config,
            _ => Map::new(),
        };
        Self { config, seed: 1, shard_bytes: None }
    }
}

impl TinyLlama {
    /// Sets a key of `config.json`.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config.insert(key.to_owned(), value.into());
        self
    }

    /// Writes `config.json`, f32 safetensors, `tokenizer.json` (bytes as tokens 0 to 255, then
    /// `<|im_start|>` 256, `<|im_end|>` 257, `<|endoftext|>` 258) and a ChatML template into
    /// `folder`, which must exist.
    ///
    /// # Errors
    /// The configuration's error as [`io::ErrorKind::InvalidInput`], or the file system's.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let config_json = Value::Object(self.config.clone());
        let config =
            hf::read(&config_json, None).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        std::fs::write(folder.join("config.json"), format!("{config_json:#}"))?;
        std::fs::write(folder.join("tokenizer.json"), byte_tokenizer().to_string())?;
        std::fs::write(folder.join("tokenizer_config.json"), json!({ "chat_template": CHATML }).to_string())?;
        let tensors = random_tensors(&config, Naming::HuggingFace, self.seed);
        match self.shard_bytes {
            None => write_shard(&folder.join("model.safetensors"), &tensors),
            Some(limit) => write_shards(folder, &tensors, limit),
        }
    }
}

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Random weights of both trained cache methods; those of `lococo` are for `slots` slots.
pub fn side_car(geometry: CacheGeometry, slots: u32, seed: u64) -> SideCar {
    let mut random = SplitMix(seed);
    let mut numbers = |count: usize, centre: f32, spread: f32| -> Vec<f32> {
        (0..count).map(|_| centre + spread * random.symmetric()).collect()
    };
    let heads = geometry.num_kv_heads;
    let (features, taps, hidden) = (2 * heads * geometry.head_dim, 5, 24);
    let layer = |numbers: &mut dyn FnMut(usize, f32, f32) -> Vec<f32>| LearnedLayer {
        scale: numbers(features, 1.0, 0.3),
        dw: numbers(features * taps, 0.0, 0.5),
        // What halves can hold, so that backends that store halves compute the same.
        p1: numbers(hidden * 2 * features, 0.0, 0.3)
            .into_iter()
            .map(|number| half::f16::from_f32(number).to_f32())
            .collect(),
        b1: numbers(hidden, 0.0, 0.1),
        p2: numbers(2 * heads * hidden, 0.0, 0.5),
        b2: numbers(2 * heads, -5.0, 1.0),
        a: numbers(2 * heads, 1.0, 0.2),
    };
    let layers = (0..geometry.num_layers).map(|_| layer(&mut numbers)).collect();
    let learned = LearnedWeights { features, taps, hidden, layers };
    let (mixed, kernel) = (slots as usize / 2, 5);
    let layer = |numbers: &mut dyn FnMut(usize, f32, f32) -> Vec<f32>| LococoLayer {
        weight: numbers(mixed * 2 * geometry.head_dim * kernel, 0.0, 0.2),
        bias: numbers(mixed, 0.0, 0.1),
        gate: 0.4,
    };
    let layers = (0..geometry.num_layers).map(|_| layer(&mut numbers)).collect();
    let lococo = LococoWeights { slots, kernel, layers };
    let layer_shares = (0..geometry.num_layers).map(|layer| [0.4, 1.9, 0.7][layer % 3]).collect();
    SideCar {
        learned: Some(learned),
        lococo: Some(lococo),
        layer_shares: Some(layer_shares),
        ..SideCar::default()
    }
}

/// A tensor before it is written: shape and numbers.
pub(crate) type Numbers = (Vec<usize>, Vec<f32>);

/// Every tensor of `config`: norms near 1, biases near 0, matrices with a deviation of about
/// `1 / sqrt(inputs)`. The same seed gives the same numbers in every naming.
pub(crate) fn random_tensors(config: &ModelConfig, naming: Naming, seed: u64) -> BTreeMap<String, Numbers> {
    let mut random = SplitMix(seed);
    let mut tensors = BTreeMap::new();
    let visited = names::for_each(config, |part, layer| {
        let shape = part.shape(config);
        let inputs = *shape.last().unwrap_or(&1) as f32;
        let (centre, spread) = match (part, shape.len()) {
            (Part::Embedding, _) => (0.0, 1.0),
            (_, 2) => (0.0, (3.0 / inputs).sqrt()),
            (Part::AttnNorm | Part::MlpNorm | Part::FinalNorm | Part::QNorm | Part::KNorm, _) => (1.0, 0.1),
            _ => (0.0, 0.1),
        };
        let count = shape.iter().product();
        let numbers = (0..count).map(|_| centre + spread * random.symmetric()).collect();
        tensors.insert(part.name(naming, layer), (shape, numbers));
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the closure never fails");
    tensors
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014), enough for test weights.
struct SplitMix(u64);

impl SplitMix {
    /// Uniform in `[-1, 1)`.
    fn symmetric(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn write_shard<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a String, &'a Numbers)>,
) -> io::Result<()> {
    let bytes: Vec<_> = tensors
        .into_iter()
        .map(|(name, (shape, numbers))| {
            (name, shape, numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        TensorView::new(Dtype::F32, (*shape).clone(), bytes).map(|view| ((*name).clone(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    safetensors::serialize_to_file(views, None, path).map_err(io::Error::other)
}

fn write_shards(folder: &Path, tensors: &BTreeMap<String, Numbers>, limit: usize) -> io::Result<()> {
    let mut shards: Vec<Vec<(&String, &Numbers)>> = vec![Vec::new()];
    let mut filled = 0;
    for (name, tensor) in tensors {
        let bytes = 4 * tensor.1.len();
        if filled > 0 && filled + bytes > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((name, tensor));
        }
    }
    let mut weight_map = Map::new();
    let count = shards.len();
    for (idx, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", idx + 1);
        weight_map.extend(shard.iter().map(|(name, _)| ((*name).clone(), Value::from(file.clone()))));
        write_shard(&folder.join(&file), shard)?;
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string())
}

/// A byte-level tokenizer without merges: every byte is a token.
fn byte_tokenizer() -> Value {
    let mut vocab = Map::new();
    // GPT-2's alphabet gives every byte a printable character: itself, or one from 256 on.
    let mut next = 256;
    for byte in 0..=255u32 {
        let is_printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if is_printable { byte } else { next };
        next += u32::from(!is_printable);
        let text = char::from_u32(code).map(String::from).unwrap_or_default();
        vocab.insert(text, byte.into());
    }
    let added: Vec<_> = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        .into_iter()
        .zip(256..)
        .map(|(text, id)| {
            vocab.insert(text.to_owned(), id.into());
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            })
        })
        .collect();
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}
