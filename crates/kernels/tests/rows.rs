//! Row operations against slow f64 ones, on every instruction set of this machine.

use locket_kernels::cpu::{
    Isa, QuantRows, Team,
    rows::{self, RmsNorm, Rope, RopePairs},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

fn numbers(rng: &mut StdRng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-4.0..4.0)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn close(got: f32, want: f64, tolerance: f64) -> bool {
    (f64::from(got) - want).abs() <= tolerance * want.abs().max(1e-3)
}

fn exact_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let rms = (square / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| f64::from(*x) / rms * f64::from(*w)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Relative error below 2e-6; the fused forms give the bits of the separate ones.
    #[test]
    fn norms(seed: u64, rows in 1usize..20, width in 1usize..200) {
        let mut rng = StdRng::seed_from_u64(seed);
        let (weight, residual, delta) =
            (numbers(&mut rng, width), numbers(&mut rng, rows * width), numbers(&mut rng, rows * width));
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        let mut team = Team::new(3).unwrap();
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let (mut sum, mut out) = (residual.clone(), delta.clone());
            rows::add_rms_norm(&mut team, isa, norm, rows, &mut sum, &mut out, None);
            for row in 0..rows {
                let at = row * width..(row + 1) * width;
                for (got, want) in out[at.clone()].iter().zip(exact_norm(&sum[at], &weight, 1e-5)) {
                    prop_assert!(close(*got, want, 2e-6), "{got} {want}");
                }
            }
            for ((sum, a), b) in sum.iter().zip(&residual).zip(&delta) {
                prop_assert_eq!(*sum, a + b);
            }
            let mut plain = vec![0.0; rows * width];
            rows::rms_norm(&mut team, isa, norm, rows, &sum, &mut plain, None);
            prop_assert_eq!(bits(&plain), bits(&out));
            let out = bits(&out);
            prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out);
        }
    }

    #[test]
    fn fused_rounding_is_separate_rounding(seed: u64, rows in 1usize..9, blocks in 1usize..9) {
        let mut rng = StdRng::seed_from_u64(seed);
        let width = 32 * blocks;
        let (weight, x) = (numbers(&mut rng, width), numbers(&mut rng, rows * width * 2));
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        let mut team = Team::new(2).unwrap();
        for isa in Isa::available() {
            let mut out = vec![0.0; rows * width];
            let (mut fused, mut separate) = (QuantRows::new(rows, width), QuantRows::new(rows, width));
            let (mut a, mut b) = (vec![0.0; width], vec![0.0; width]);
            for silu in [false, true] {
                if silu {
                    rows::silu_mul(&mut team, isa, rows, width, &x, &mut out, Some(&mut fused));
                } else {
                    rows::rms_norm(&mut team, isa, norm, rows, &x, &mut out, Some(&mut fused));
                }
                rows::quantize(&mut team, isa, rows, &out, &mut separate);
                for row in 0..rows {
                    fused.read_row(row, &mut a);
                    separate.read_row(row, &mut b);
                    prop_assert_eq!(bits(&a), bits(&b));
                }
            }
        }
    }

    /// Error below 2e-6 of the result, or of 1e-3 if that is larger.
    #[test]
    fn silu(seed: u64, rows in 1usize..9, width in 1usize..100, magnitude in 0i32..8) {
        let mut rng = StdRng::seed_from_u64(seed);
        let scale = 2f32.powi(magnitude);
        let x: Vec<f32> = numbers(&mut rng, 2 * rows * width).iter().map(|x| x * scale).collect();
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let mut out = vec![0.0; rows * width];
            rows::silu_mul(&mut Team::new(2).unwrap(), isa, rows, width, &x, &mut out, None);
            for (row, out) in out.chunks(width).enumerate() {
                let (gate, up) = x[2 * row * width..2 * (row + 1) * width].split_at(width);
                for ((got, gate), up) in out.iter().zip(gate).zip(up) {
                    let (gate, up) = (f64::from(*gate), f64::from(*up));
                    prop_assert!(close(*got, gate / (1.0 + (-gate).exp()) * up, 2e-6), "{got}");
                }
            }
            let out = bits(&out);
            prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out);
        }
    }

    /// Error below 2e-6; dimensions behind `rotary_dim` and columns behind the heads stay.
    #[test]
    fn rotation(seed: u64, rows in 1usize..20, heads in 1usize..5, pairs in 1usize..20, rest in 0usize..5) {
        let mut rng = StdRng::seed_from_u64(seed);
        let (rotary_dim, head_dim) = (2 * pairs, 2 * pairs + rest);
        let stride = heads * head_dim + 7;
        let x = numbers(&mut rng, rows * stride);
        let angles: Vec<f64> = (0..rows * pairs).map(|_| rng.random_range(-3.0..3.0)).collect();
        let cos: Vec<f32> = angles.iter().map(|angle| angle.cos() as f32).collect();
        let sin: Vec<f32> = angles.iter().map(|angle| angle.sin() as f32).collect();
        for style in [RopePairs::Interleaved, RopePairs::HalfSplit] {
            let rope = Rope { pairs: style, cos: &cos, sin: &sin, rotary_dim, head_dim };
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut got = x.clone();
                rows::rope(&mut Team::new(2).unwrap(), isa, rope, rows, &mut got, stride, heads);
                let mut want: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (row, want) in want.chunks_exact_mut(stride).enumerate() {
                    for head in want[..heads * head_dim].chunks_exact_mut(head_dim) {
                        for pair in 0..pairs {
                            let (i, j) = match style {
                                RopePairs::Interleaved => (2 * pair, 2 * pair + 1),
                                RopePairs::HalfSplit => (pair, pair + pairs),
                            };
                            let (sin, cos) = angles[row * pairs + pair].sin_cos();
                            (head[i], head[j]) = (head[i] * cos - head[j] * sin, head[i] * sin + head[j] * cos);
                        }
                    }
                }
                for (got, want) in got.iter().zip(&want) {
                    prop_assert!((f64::from(*got) - want).abs() < 2e-6);
                }
                let got = bits(&got);
                prop_assert_eq!(first.get_or_insert_with(|| got.clone()), &got);
            }
        }
    }

    #[test]
    fn head_norms(seed: u64, rows in 1usize..9, dim in 1usize..70) {
        let mut rng = StdRng::seed_from_u64(seed);
        let (stride, weight) = (4 * dim, numbers(&mut rng, dim));
        let x = numbers(&mut rng, rows * stride);
        let norm = RmsNorm { weight: &weight, eps: 1e-6 };
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let mut got = x.clone();
            rows::head_norm(&mut Team::new(2).unwrap(), isa, norm, rows, &mut got, stride, 1..3);
            for (got, x) in got.chunks_exact(stride).zip(x.chunks_exact(stride)) {
                prop_assert_eq!(&got[..dim], &x[..dim]);
                prop_assert_eq!(&got[3 * dim..], &x[3 * dim..]);
                for head in 1..3 {
                    let want = exact_norm(&x[head * dim..(head + 1) * dim], &weight, 1e-6);
                    for (got, want) in got[head * dim..].iter().zip(want) {
                        prop_assert!(close(*got, want, 2e-6));
                    }
                }
            }
            let got = bits(&got);
            prop_assert_eq!(first.get_or_insert_with(|| got.clone()), &got);
        }
    }
}
