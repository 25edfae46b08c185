//! The teacher's chunked sums against plain loops in f64.

use locket_model::testing::TinyLlama;
use serde_json::json;

use super::*;
use crate::testing;

const WINDOW: usize = 5;

/// `[layers]` of observed and target `[b][n][kv_heads]`, by definition.
fn naive(decoder: &Decoder, ids: &Tensor, aim: &Aim) -> Vec<[Vec<f64>; 2]> {
    let config = decoder.config();
    let (batch, n) = ids.dims2().unwrap();
    let (heads, kv_heads, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
    let group = heads / kv_heads;
    let rotation = decoder.rotation(0, n).unwrap();
    let mut x = decoder.embed(ids).unwrap();
    let mut layers = Vec::new();
    for layer in 0..config.num_layers {
        let projected = decoder.project(layer, &x).unwrap();
        let numbers =
            |x: &Tensor| x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        let q = numbers(&decoder.rotate(&projected.queries, &rotation).unwrap());
        let k = numbers(&decoder.rotate(&projected.keys, &rotation).unwrap());
        let v = numbers(&projected.values);
        let mut attended = vec![0.0; batch * heads * n * d];
        let (mut observed, mut target) = (vec![0.0; batch * n * kv_heads], vec![0.0; batch * n * kv_heads]);
        for (b, h, j) in (0..batch * heads * n).map(|at| (at / (heads * n), at / n % heads, at % n)) {
            let kv = h / group;
            let row = |of: &[f64], i: usize| of[((b * kv_heads + kv) * n + i) * d..][..d].to_vec();
            let query = &q[((b * heads + h) * n + j) * d..][..d];
            let first = config.sliding_window[layer].map_or(0, |window| (j + 1).saturating_sub(window));
            let dot = |key: Vec<f64>| key.iter().zip(query).map(|(a, b)| a * b).sum::<f64>();
            let weights: Vec<f64> =
                (first..=j).map(|i| (dot(row(&k, i)) / (d as f64).sqrt()).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (i, weight) in (first..=j).zip(weights) {
                let p = weight / sum;
                let out = &mut attended[((b * heads + h) * n + j) * d..][..d];
                out.iter_mut().zip(row(&v, i)).for_each(|(out, value)| *out += p * value);
                let at = (b * n + i) * kv_heads + kv;
                if j - i < WINDOW {
                    observed[at] += p / (group * WINDOW.min(n - i)) as f64;
                }
                match aim {
                    Aim::Mean if j - i < WINDOW => {}
                    Aim::Mean => target[at] += p / (group * (n - i - WINDOW)) as f64,
                    Aim::Answers { rows, before } if rows[b].contains(&(j as u32)) && i < before[b] => {
                        target[at] = target[at].max(p);
                    }
                    Aim::Answers { .. } => {}
                }
            }
        }
        let attended = Tensor::from_vec(attended, (batch, heads, n, d), &Device::Cpu).unwrap();
        x = decoder.finish(layer, &x, &attended.to_dtype(DType::F32).unwrap()).unwrap();
        layers.push([observed, target]);
    }
    layers
}

fn check(tiny: &TinyLlama, aim: &Aim, chunk: usize) {
    let (_folder, checkpoint) = testing::checkpoint(tiny);
    let decoder = Decoder::load(&checkpoint, &Device::Cpu, DType::F32).unwrap();
    let ids: Vec<u32> = (0..2 * 43).map(|i| (i * i * 7 + i * 31) % 300).collect();
    let ids = Tensor::from_vec(ids, (2, 43), &Device::Cpu).unwrap();
    let expected = naive(&decoder, &ids, aim);
    let mut visited = 0;
    let visit = |layer: usize, maps: LayerMaps| {
        assert_eq!(layer, visited);
        visited += 1;
        for (got, expected) in [maps.observed, maps.target].iter().zip(&expected[layer]) {
            assert_eq!(got.dims(), [2, 43, 2]);
            for (at, (got, expected)) in got.flatten_all()?.to_vec1::<f32>()?.iter().zip(expected).enumerate()
            {
                assert!((f64::from(*got) - expected).abs() < 2e-6, "{layer} {at}: {got} {expected}");
            }
        }
        Ok(())
    };
    Teacher::new(&decoder, WINDOW, chunk).walk(&ids, aim, visit).unwrap();
    assert_eq!(visited, expected.len());
}

#[test]
fn maps_equal_plain_loops() {
    let tiny = TinyLlama::default();
    let uneven = Aim::Answers { rows: vec![vec![20, 22, 23, 41], vec![33]], before: vec![20, 31] };
    let even = Aim::Answers { rows: vec![(25..42).collect(), (24..41).collect()], before: vec![24, 24] };
    for aim in [Aim::Mean, uneven, even] {
        for chunk in [3, 16, 64] {
            check(&tiny, &aim, chunk);
        }
    }
}

#[test]
fn sliding_windows_and_head_norms_are_the_models() {
    let mistral = TinyLlama::default()
        .with("model_type", "mistral")
        .with("architectures", json!(["MistralForCausalLM"]));
    let mistral = mistral.with("sliding_window", 9);
    check(&mistral, &Aim::Mean, 16);
    let answers = Aim::Answers { rows: vec![(25..42).collect(), vec![26]], before: vec![24, 21] };
    check(&mistral, &answers, 16);
    let qwen =
        TinyLlama::default().with("model_type", "qwen3").with("architectures", json!(["Qwen3ForCausalLM"]));
    check(&qwen.with("head_dim", 16), &Aim::Mean, 16);
}
