//! The worked example of our specification of LoCoCo, and gradients.

use super::*;

const KEYS: [[f64; 2]; 6] = [[0.5, -0.1], [0.2, 0.4], [-0.3, 0.8], [0.9, 0.1], [-0.6, -0.2], [0.1, 0.7]];
const VALUES: [[f64; 2]; 6] = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 0.2], [0.3, -0.4], [0.8, 0.9]];

fn entries(of: &[[f64; 2]; 6]) -> Tensor {
    Tensor::new(of, &Device::Cpu).unwrap().unsqueeze(0).unwrap().unsqueeze(0).unwrap()
}

fn parameters() -> Parameters {
    let tap = |at: usize| {
        let (m, c, tap) = (at / 12, at / 3 % 4, at % 3);
        0.1 * ((m + 1) * (c + 1)) as f64 - 0.2 * tap as f64
    };
    let w = Tensor::from_vec((0..24).map(tap).collect::<Vec<_>>(), (1, 2, 4, 3), &Device::Cpu).unwrap();
    let b = Tensor::new(&[[0.05f64, -0.05]], &Device::Cpu).unwrap();
    let g = Tensor::new(&[0.5f64], &Device::Cpu).unwrap();
    let parameter = |(name, value)| Parameter { name, value, rate: 1.0, weight_decay: 0.0 };
    Parameters([("w", w), ("b", b), ("g", g)].map(parameter).into())
}

fn select(received: &[f32], n: usize) -> Selection {
    let rows = SelectedRows::new(received, n, 4);
    Selection::upload(&[rows], &Device::Cpu).unwrap().remove(0)
}

fn compress(parameters: &Parameters, order: KeyOrder) -> (Leaves, Tensor, Tensor) {
    let leaves = parameters.leaves(0).unwrap();
    let selection = select(&[2.0, 0.3, 0.9, 0.1, 1.4, 0.6], 6);
    let mixture = LayerMixture::of(&leaves).unwrap();
    let (keys, values) = mixture.compress(&entries(&KEYS), &entries(&VALUES), &selection, order).unwrap();
    (leaves, keys, values)
}

#[test]
fn worked_example() {
    let expected_keys = [0.5, -0.1, -0.6, -0.2, -0.067542, 0.668290, 0.156454, 0.599762];
    let expected_values = [1.0, 0.0, 0.3, -0.4, 0.316267, 0.567581, 0.415260, 0.752800];
    // Two dimensions are one pair: both orders are the same.
    for order in [KeyOrder::HalfSplit, KeyOrder::Interleaved { rotary_dim: 2 }] {
        let (_, keys, values) = compress(&parameters(), order);
        for (got, expected) in [(keys, expected_keys), (values, expected_values)] {
            assert_eq!(got.dims(), [1, 1, 4, 2]);
            for (got, expected) in got.flatten_all().unwrap().to_vec1::<f64>().unwrap().iter().zip(expected) {
                assert!((got - expected).abs() < 1e-6, "{got} {expected}");
            }
        }
    }
}

#[test]
fn gradients_equal_differences() {
    let loss = |parameters: &Parameters| {
        let (leaves, keys, values) = compress(parameters, KeyOrder::HalfSplit);
        let weighted = (keys.affine(3.0, 0.0).unwrap() - values).unwrap().sqr().unwrap();
        (leaves, weighted.sum_all().unwrap())
    };
    let original = parameters();
    let (leaves, value) = loss(&original);
    let store = value.backward().unwrap();
    for (at, leaf) in leaves.0.iter().enumerate() {
        let gradient = store.get(leaf).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let values = leaf.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (element, gradient) in gradient.iter().enumerate() {
            let shifted = |by: f64| {
                let mut parameters = original.clone();
                let mut values = values.clone();
                values[element] += by;
                let shape = parameters.0[at].value.shape().clone();
                parameters.0[at].value = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
                loss(&parameters).1.to_scalar::<f64>().unwrap()
            };
            let numeric = (shifted(1e-6) - shifted(-1e-6)) / 2e-6;
            assert!((numeric - gradient).abs() < 1e-7, "{at} {element}: {gradient} {numeric}");
        }
    }
}

#[test]
fn interleaved_keys_are_read_in_half_split_order() {
    let settings = LococoSettings { slots: 4, kernel: 3, ..LococoSettings::default() };
    let parameters = initial(&settings, 1, 4, 2, &Device::Cpu).unwrap();
    let keys = normal(&[2, 3, 9, 4], 1.0, &mut random(1, 1, 1), &Device::Cpu).unwrap();
    let values = normal(&[2, 3, 9, 4], 1.0, &mut random(1, 1, 2), &Device::Cpu).unwrap();
    let received: Vec<f32> = (0..54).map(|i| (i * 17 % 23) as f32).collect();
    let selection = select(&received, 9);
    let leaves = parameters.leaves(0).unwrap();
    let mixture = LayerMixture::of(&leaves).unwrap();
    let order = KeyOrder::Interleaved { rotary_dim: 4 };
    let (stored, _) = mixture.compress(&keys, &values, &selection, order).unwrap();
    let split = half_split(&keys, 4).unwrap();
    let (expected, _) = mixture.compress(&split, &values, &selection, KeyOrder::HalfSplit).unwrap();
    let error = (half_split(&stored, 4).unwrap() - expected).unwrap().abs().unwrap().max_all().unwrap();
    assert!(error.to_scalar::<f32>().unwrap() < 1e-6);
    let first = keys.get(0).unwrap().get(0).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
    let first_split = split.get(0).unwrap().get(0).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(first_split, [first[0], first[2], first[1], first[3]]);
}
