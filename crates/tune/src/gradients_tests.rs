//! Every rule against central differences in f64.

use candle_core::{Device, Var};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;

fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut random = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| random.random_range(-1.5..1.5)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Compares the gradient of a fixed weighted sum of `f`'s values with differences at every element.
fn check(shape: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) {
    let var = Var::from_tensor(&random(7, shape)).unwrap();
    let loss = |x: &Tensor| {
        let y = f(x).unwrap();
        (&y * random(11, y.dims())).unwrap().sum_all().unwrap()
    };
    let analytic = loss(&var).backward().unwrap();
    let analytic = analytic.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let values = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for (at, gradient) in analytic.iter().enumerate() {
        let shifted = |by: f64| {
            let mut values = values.clone();
            values[at] += by;
            let x = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            loss(&x).to_scalar::<f64>().unwrap()
        };
        let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
        assert!((numeric - gradient).abs() < 1e-7, "element {at}: {gradient} but numerically {numeric}");
    }
}

#[test]
fn rules_equal_differences() {
    check(&[2, 3, 4], |x| linear(x, &random(1, &[5, 4]), Some(&random(2, &[5]))));
    check(&[2, 3, 4], |x| rms_norm(x, &random(1, &[4]), 1e-5));
    check(&[2, 2, 3, 5], |x| softmax(x, Some(&random(3, &[2, 2, 3, 5]))));
    check(&[2, 3, 6], silu_mul);
    check(&[9], smooth_l1);
    check(&[3, 2, 4], |weight| convolve(&random(4, &[2, 7, 4]), weight));
    check(&[2, 3, 4], |weights| mix(weights, &random(5, &[2, 4, 6])));
    let targets = Tensor::new(&[3u32, 0, 6, 2, 2], &Device::Cpu).unwrap();
    check(&[5, 4], |x| cross_entropy(x, &random(6, &[7, 4]), &targets, 2));
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let angles = random(8, &[3, 2]);
        let rotation = Rotation { cos: angles.cos().unwrap(), sin: angles.sin().unwrap(), style };
        check(&[2, 2, 3, 4], |x| rotate(x, &rotation));
        check(&[1, 2, 3, 6], |x| rotate(x, &rotation));
    }
}

#[test]
fn a_constant_argument_costs_no_graph() {
    let y = linear(&random(1, &[2, 3]), &random(2, &[4, 3]), None).unwrap();
    assert!(!y.track_op());
}

#[test]
fn cross_entropy_is_the_mean_of_negative_log_probabilities() {
    let (hidden, head) = (random(1, &[3, 4]), random(2, &[5, 4]));
    let targets = Tensor::new(&[1u32, 4, 0], &Device::Cpu).unwrap();
    let logits = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2::<f64>().unwrap();
    let nll = |(row, target): (&Vec<f64>, usize)| row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target];
    let expected: f64 = logits.iter().zip([1, 4, 0]).map(nll).sum::<f64>() / 3.0;
    let got = cross_entropy(&hidden, &head, &targets, 2).unwrap().to_scalar::<f64>().unwrap();
    assert!((got - expected).abs() < 1e-12);
}
