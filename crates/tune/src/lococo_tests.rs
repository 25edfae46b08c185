//! The stream equals the reference decoder while nothing is compressed; gradients afterwards are right.

use candle_core::Device;
use locket_model::{
    Batch, BlockId,
    llama::Llama,
    ops::{Ops as _, OpsConfig, reference::ReferenceOps},
    testing::TinyLlama,
};

use super::*;
use crate::testing;

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + i * 31) % 300).collect()
}

/// Logits `[n, vocab]` of the model crate's differentiable decoder, as mean cross entropy.
fn reference_loss(checkpoint: &locket_model::load::Checkpoint, ids: &[u32]) -> f64 {
    let weights_only = ReferenceOps::for_weights(checkpoint.config.clone(), Device::Cpu, DType::F64);
    let config = OpsConfig { max_batch_rows: 64, ..weights_only.config().clone() };
    let mut ops = ReferenceOps::without_cache(config, Device::Cpu, DType::F64);
    let weights = checkpoint.prepare(&mut ops).unwrap();
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &ids[..ids.len() - 1], false);
    batch.sample_rows = (0..ids.len() as u32 - 1).collect();
    let logits = Llama::new(ops, weights).forward_train(&batch).unwrap().to_vec2::<f64>().unwrap();
    let nll = |(row, target): (&Vec<f64>, &u32)| {
        row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[*target as usize]
    };
    logits.iter().zip(&ids[1..]).map(nll).sum::<f64>() / logits.len() as f64
}

#[test]
fn an_uncompressed_stream_equals_the_reference() {
    for tiny in [TinyLlama::default(), TinyLlama::default().with("model_type", "qwen3").with("head_dim", 16)]
    {
        let (_folder, checkpoint) = testing::checkpoint(&tiny);
        let decoder = Decoder::load(&checkpoint, &Device::Cpu, DType::F64).unwrap();
        let settings = LococoSettings { slots: 64, ..LococoSettings::default() };
        let parameters = mixture::initial(&settings, 2, 16, 1, &Device::Cpu).unwrap();
        let leaves: Vec<_> = (0..2).map(|layer| parameters.leaves(layer).unwrap()).collect();
        let mixtures: Vec<_> = leaves.iter().map(|leaves| LayerMixture::of(leaves).unwrap()).collect();
        let sequence = ids(31);
        let tensor = ids_tensor(std::slice::from_ref(&sequence), &Device::Cpu).unwrap();
        let mut stream = BlockStream::new(&decoder, 64);
        let mut sum = 0.0;
        for start in [0, 10, 20] {
            let x =
                stream.block(&tensor.narrow(1, start, 10).unwrap().contiguous().unwrap(), &mixtures).unwrap();
            assert!(!x.track_op());
            let targets = tensor.narrow(1, start + 1, 10).unwrap().contiguous().unwrap();
            sum += decoder.loss(&x, &targets).unwrap().to_scalar::<f64>().unwrap() / 3.0;
        }
        let expected = reference_loss(&checkpoint, &sequence);
        assert!((sum - expected).abs() < 1e-9, "{sum} {expected}");
    }
}

/// With one compression there is no history that the published gradient leaves out.
#[test]
fn gradients_through_the_decoder_equal_differences() {
    let (_folder, checkpoint) = testing::checkpoint(&TinyLlama::default());
    let decoder = Decoder::load(&checkpoint, &Device::Cpu, DType::F64).unwrap();
    let settings = LococoSettings { slots: 6, kernel: 3, deviation: 0.3, ..LococoSettings::default() };
    let mut parameters = mixture::initial(&settings, 2, 16, 1, &Device::Cpu).unwrap();
    for parameter in &mut parameters.0 {
        parameter.value = parameter.value.to_dtype(DType::F64).unwrap();
    }
    let tensor = ids_tensor(&[ids(21), ids(42)[21..].to_vec()], &Device::Cpu).unwrap();
    let loss = |parameters: &Parameters| {
        let leaves: Vec<_> = (0..2).map(|layer| parameters.leaves(layer).unwrap()).collect();
        let mixtures: Vec<_> = leaves.iter().map(|leaves| LayerMixture::of(leaves).unwrap()).collect();
        let mut stream = BlockStream::new(&decoder, 6);
        let part = |from| tensor.narrow(1, from, 10).unwrap().contiguous().unwrap();
        stream.block(&part(0), &mixtures).unwrap();
        let x = stream.block(&part(10), &mixtures).unwrap();
        assert_eq!(stream.caches[0].keys.dim(2).unwrap(), 16, "six slots and the block");
        let loss = decoder.loss(&x, &part(11)).unwrap();
        (leaves, loss)
    };
    let (leaves, value) = loss(&parameters);
    let store = value.backward().unwrap();
    for (layer, at) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
        let leaf = &leaves[layer].0[at];
        let gradient = store.get(leaf).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let all = parameters.0[at].value.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for element in (0..gradient.len()).step_by(1 + gradient.len() / 3) {
            let shifted = |by: f64| {
                let mut parameters = parameters.clone();
                let mut values = all.clone();
                values[layer * gradient.len() + element] += by;
                let shape = parameters.0[at].value.shape().clone();
                parameters.0[at].value = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
                loss(&parameters).1.to_scalar::<f64>().unwrap()
            };
            let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            let error = (numeric - gradient[element]).abs();
            assert!(error < 1e-8, "{layer} {at} {element}: {} {numeric}", gradient[element]);
        }
    }
}
