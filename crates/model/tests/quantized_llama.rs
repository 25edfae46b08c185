//! Logits of the default GGUF equal candle-transformers' `quantized_llama` over 246 positions.
//!
//! candle multiplies quantised weights with activations rounded to int8 (blocks of 32 for Q4_1 and
//! Q8_0), our `reference` with activations in f32, our `cpu` with 16 bits. So there are two oracles:
//! candle as it is, and candle on the same file widened to f32, which `reference` meets up to
//! rounding (8.7e-5 at most were measured) and `cpu` up to its 16 bits. candle's own int8 arithmetic
//! is a thousand times further from it.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixtures;

use std::{fs::File, io::BufWriter, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_transformers::models::quantized_llama::ModelWeights;
use fixtures::{
    CPU_TOLERANCE, TEXT, assert_close, assert_close_in_int8, build, default_model, teacher_force,
};
use locket_model::{
    kv_cache::{CacheSettings, SlotType},
    load::Backend,
};

const VOCAB: usize = 49_152;

/// candle's logits, a token at a time: it gives those of the last position only.
fn candle_logits(path: &Path) -> Vec<f32> {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let mut logits = Vec::with_capacity(TEXT.len() * VOCAB);
    for (position, &id) in TEXT.iter().enumerate() {
        let ids = Tensor::new(&[[id]], &Device::Cpu).unwrap();
        let row = model.forward(&ids, position).unwrap();
        logits.extend_from_slice(&row.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
    logits
}

/// The same file with every tensor in f32.
fn widen(path: &Path, to: &Path) {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let tensors: Vec<(String, QTensor)> = content
        .tensor_infos
        .keys()
        .map(|name| {
            let stored = content.tensor(&mut file, name, &Device::Cpu).unwrap();
            let wide = stored.dequantize(&Device::Cpu).unwrap();
            (name.clone(), QTensor::quantize(&wide, GgmlDType::F32).unwrap())
        })
        .collect();
    let metadata: Vec<(&str, &gguf_file::Value)> =
        content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut BufWriter::new(File::create(to).unwrap()), &metadata, &tensors).unwrap();
}

#[test]
fn logits_equal_candle_transformers() {
    let path = default_model();
    let folder = tempfile::tempdir().unwrap();
    let wide_path = folder.path().join("wide.gguf");
    widen(&path, &wide_path);
    let wide = candle_logits(&wide_path);
    let stored = candle_logits(&path);
    let ours = |backend| {
        let mut model = build(&path, backend, SlotType::F32, &[(256, 1)]);
        teacher_force(model.as_mut(), CacheSettings::full(256), TEXT, &[112])
    };
    assert_close_in_int8("candle f32 : candle int8", &wide, &stored, VOCAB);
    let reference = ours(Backend::Reference);
    assert_close("candle f32 : reference", &wide, &reference, VOCAB, 1e-3);
    assert_close_in_int8("candle int8 : reference", &stored, &reference, VOCAB);
    let cpu = ours(Backend::Cpu);
    assert_close_in_int8("candle int8 : cpu", &stored, &cpu, VOCAB);
    assert_close("candle f32 : cpu", &wide, &cpu, VOCAB, CPU_TOLERANCE);
}
