//! A small GGUF writer, able to write broken files.

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::random_tensors;
use crate::{ModelConfig, config::hf, weights::names::Naming};

/// A metadata value.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    /// Type code and payload as they are to stand in the file.
    Raw(u32, Vec<u8>),
}

impl From<u32> for Item {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Item {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<&str> for Item {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

/// A tensor's table entry and data.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub name: String,
    /// Fastest dimension first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Overrides the offset that follows from the order.
    pub offset: Option<u64>,
}

/// A file to be.
#[derive(Debug, Clone)]
pub(crate) struct GgufFile {
    pub version: u32,
    pub alignment: usize,
    pub metadata: Vec<(String, Item)>,
    pub tensors: Vec<Entry>,
    /// Override the counts in the header.
    pub num_tensors: Option<u64>,
    pub num_keys: Option<u64>,
}

impl GgufFile {
    pub(crate) fn empty() -> Self {
        Self {
            version: 3,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
            num_tensors: None,
            num_keys: None,
        }
    }

    /// A complete `llama` model of 2 layers, its matrices stored as `kind`.
    pub(crate) fn tiny(kind: GgmlDType) -> Self {
        let mut file = Self::empty();
        let config = tiny_geometry();
        let tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            .into_iter()
            .map(str::to_owned)
            .chain((3..config.vocab_size).map(|id| format!("t{id}")))
            .collect();
        let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
        let pairs: [(&str, Item); 17] = [
            ("general.architecture", "llama".into()),
            ("llama.block_count", 2.into()),
            ("llama.context_length", 128.into()),
            ("llama.embedding_length", 64.into()),
            ("llama.feed_forward_length", 96.into()),
            ("llama.attention.head_count", 4.into()),
            ("llama.attention.head_count_kv", 2.into()),
            ("llama.attention.layer_norm_rms_epsilon", 1e-5.into()),
            ("llama.rope.freq_base", 10_000.0.into()),
            ("llama.rope.dimension_count", 16.into()),
            ("tokenizer.ggml.model", "gpt2".into()),
            ("tokenizer.ggml.pre", "smollm".into()),
            ("tokenizer.ggml.tokens", Item::Texts(tokens)),
            ("tokenizer.ggml.token_type", Item::I32s(types)),
            ("tokenizer.ggml.merges", Item::Texts(vec!["t 3".into()])),
            ("tokenizer.ggml.eos_token_id", 2.into()),
            ("tokenizer.chat_template", "{{ messages }}".into()),
        ];
        file.metadata = pairs.into_iter().map(|(key, item)| (key.to_owned(), item)).collect();
        for (name, (shape, numbers)) in random_tensors(&config, Naming::Gguf, 7) {
            let kind = if shape.len() == 2 { kind } else { GgmlDType::F32 };
            file.push_numbers(&name, &shape, &numbers, kind);
        }
        file
    }

    pub(crate) fn push_numbers(&mut self, name: &str, shape: &[usize], numbers: &[f32], kind: GgmlDType) {
        let tensor = Tensor::from_slice(numbers, shape, &Device::Cpu).unwrap();
        let data = QTensor::quantize(&tensor, kind).unwrap().data().unwrap().into_owned();
        let dims = shape.iter().rev().map(|&dim| dim as u64).collect();
        self.tensors.push(Entry { name: name.into(), dims, kind: code(kind), data, offset: None });
    }

    /// Sets or replaces a metadata key.
    pub(crate) fn set(mut self, key: &str, item: impl Into<Item>) -> Self {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), item.into()));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(name, _)| name != key);
        self
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Entry {
        self.tensors.iter_mut().find(|entry| entry.name == name).unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        self.length(&mut out, self.num_tensors.unwrap_or(self.tensors.len() as u64));
        self.length(&mut out, self.num_keys.unwrap_or(self.metadata.len() as u64));
        for (key, item) in &self.metadata {
            self.text(&mut out, key.as_bytes());
            self.item(&mut out, item);
        }
        let mut data = Vec::new();
        for entry in &self.tensors {
            self.text(&mut out, entry.name.as_bytes());
            out.extend((entry.dims.len() as u32).to_le_bytes());
            for &dim in &entry.dims {
                self.length(&mut out, dim);
            }
            out.extend(entry.kind.to_le_bytes());
            out.extend(entry.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&entry.data);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    fn length(&self, out: &mut Vec<u8>, value: u64) {
        if self.version == 1 {
            out.extend((value as u32).to_le_bytes());
        } else {
            out.extend(value.to_le_bytes());
        }
    }

    fn text(&self, out: &mut Vec<u8>, text: &[u8]) {
        self.length(out, text.len() as u64);
        out.extend(text);
    }

    fn item(&self, out: &mut Vec<u8>, item: &Item) {
        let code = match item {
            Item::U32(_) => 4,
            Item::F32(_) => 6,
            Item::Bool(_) => 7,
            Item::Text(_) => 8,
            Item::Texts(_) | Item::I32s(_) => 9,
            Item::Raw(code, _) => *code,
        };
        out.extend(u32::to_le_bytes(code));
        match item {
            Item::U32(value) => out.extend(value.to_le_bytes()),
            Item::F32(value) => out.extend(value.to_le_bytes()),
            Item::Bool(value) => out.push(u8::from(*value)),
            Item::Text(text) => self.text(out, text.as_bytes()),
            Item::Texts(texts) => {
                out.extend(8u32.to_le_bytes());
                self.length(out, texts.len() as u64);
                texts.iter().for_each(|text| self.text(out, text.as_bytes()));
            }
            Item::I32s(numbers) => {
                out.extend(5u32.to_le_bytes());
                self.length(out, numbers.len() as u64);
                numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
            Item::Raw(_, bytes) => out.extend(bytes),
        }
    }
}

/// The geometry of [`GgufFile::tiny`].
pub(crate) fn tiny_geometry() -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128
    });
    hf::read(&config, None).unwrap()
}

fn code(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}
