//! The scorer against PyTorch.

use super::*;

#[test]
fn equals_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/scorer.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let parameter = |name| Parameter { name, value: tensors[name].clone(), rate: 1.0, weight_decay: 0.0 };
    let parameters = Parameters(NAMES.map(parameter).into());
    for layer in 0..2 {
        let leaves = parameters.leaves(layer).unwrap();
        let scorer = LayerScorer::of(&leaves).unwrap();
        let expected = tensors["scores"].get(layer).unwrap();
        for output in [Output::Text, Output::Recall] {
            let got = scorer.score(&tensors["features"], output).unwrap();
            let expected = expected.narrow(3, output as usize, 1).unwrap().squeeze(3).unwrap();
            let error = (got - expected).unwrap().abs().unwrap().max_all().unwrap();
            let error = error.to_scalar::<f32>().unwrap();
            assert!(error < 1e-5, "{layer} {output:?}: {error}");
        }
    }
}

#[test]
fn a_token_is_judged_by_what_came_before() {
    let shape = ScorerShape { layers: 1, kv_heads: 2, head_dim: 4, hidden: 5, kernel: 3 };
    let parameters = initial(shape, 1, 20.0, &Device::Cpu).unwrap();
    let leaves = parameters.leaves(0).unwrap();
    let scorer = LayerScorer::of(&leaves).unwrap();
    let features = normal(&[1, 9, 16], 1.0, &mut random(1, 9, 9), &Device::Cpu).unwrap();
    let whole = scorer.score(&features, Output::Text).unwrap().to_vec3::<f32>().unwrap();
    let part = scorer.score(&features.narrow(1, 0, 5).unwrap(), Output::Text).unwrap();
    let part = part.to_vec3::<f32>().unwrap();
    for (a, b) in whole[0].iter().zip(&part[0]).flat_map(|(a, b)| a.iter().zip(b)) {
        assert!((a - b).abs() < 1e-6);
    }
}
