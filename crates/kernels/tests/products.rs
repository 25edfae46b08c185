//! Packed products against slow f64 ones, on every instruction set of this machine.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use half::{bf16, f16};
use locket_kernels::cpu::{
    Activations, Destination, Isa, PackError, PackedMatrix, QuantRows, Team, WeightFormat, matmul, rows,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

const FORMATS: [WeightFormat; 6] = [
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q8_0,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::F32,
];

/// A random stored matrix and the numbers that it stands for.
fn matrix(rng: &mut StdRng, format: WeightFormat, numbers: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    let mut half = |low: f32, high: f32| f16::from_f32(rng.random_range(low..high));
    let scales: Vec<(f16, f16)> =
        (0..numbers.div_ceil(32)).map(|_| (half(0.001, 0.2), half(-1.0, 1.0))).collect();
    match format {
        WeightFormat::Q4_0 | WeightFormat::Q4_1 => {
            for (d, m) in scales {
                let q: [u8; 16] = rng.random();
                bytes.extend(d.to_le_bytes());
                let min = if format == WeightFormat::Q4_0 { -8.0 * d.to_f32() } else { m.to_f32() };
                if format == WeightFormat::Q4_1 {
                    bytes.extend(m.to_le_bytes());
                }
                bytes.extend(q);
                let nibbles = q.iter().map(|q| q & 15).chain(q.iter().map(|q| q >> 4));
                values.extend(nibbles.map(|q| d.to_f32() * f32::from(q) + min));
            }
        }
        WeightFormat::Q8_0 => {
            for (d, _) in scales {
                // All 256 values, -128 too.
                let q: [u8; 32] = rng.random();
                bytes.extend(d.to_le_bytes());
                bytes.extend(q);
                values.extend(q.iter().map(|&q| d.to_f32() * f32::from(q as i8)));
            }
        }
        _ => {
            for _ in 0..numbers {
                let x: f32 = rng.random_range(-1.0..1.0);
                match format {
                    WeightFormat::F16 => {
                        bytes.extend(f16::from_f32(x).to_le_bytes());
                        values.push(f16::from_f32(x).to_f32());
                    }
                    WeightFormat::Bf16 => {
                        bytes.extend(bf16::from_f32(x).to_le_bytes());
                        values.push(bf16::from_f32(x).to_f32());
                    }
                    _ => {
                        bytes.extend(x.to_le_bytes());
                        values.push(x);
                    }
                }
            }
        }
    }
    (bytes, values)
}

struct Case {
    weight: PackedMatrix,
    values: Vec<f32>,
    x: Vec<f32>,
    quant: Option<QuantRows>,
    rows: usize,
}

impl Case {
    fn new(seed: u64, format: WeightFormat, features: usize, cols: usize, rows: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (bytes, values) = matrix(&mut rng, format, features * cols);
        let weight = PackedMatrix::pack(format, &bytes, features, cols).unwrap();
        let x: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-3.0..3.0)).collect();
        let quant = weight.is_quantized().then(|| {
            let mut quant = QuantRows::new(rows, cols);
            rows::quantize(&mut Team::new(1).unwrap(), Isa::best(), rows, &x, &mut quant);
            quant
        });
        Self { weight, values, x, quant, rows }
    }

    /// Input rows as the product sees them.
    fn input(&self) -> Vec<f32> {
        let mut x = self.x.clone();
        if let Some(quant) = &self.quant {
            for (row, x) in x.chunks_exact_mut(self.weight.cols()).enumerate() {
                quant.read_row(row, x);
            }
        }
        x
    }

    fn product(&self, team: &mut Team, isa: Isa, bias: Option<&[f32]>) -> Vec<f32> {
        let (stride, offset) = (self.weight.rows() + 5, 3);
        let mut out = vec![7.0; self.rows * stride];
        let x = match &self.quant {
            Some(quant) => Activations::Quant(quant),
            None => Activations::F32(&self.x),
        };
        let destination = Destination { data: &mut out, stride, offset };
        matmul(team, isa, &self.weight, x, self.rows, bias, destination);
        let mut product = Vec::new();
        for row in out.chunks_exact(stride) {
            assert_eq!(
                (&row[..offset], &row[stride - 2..]),
                (&[7.0; 3][..], &[7.0; 2][..]),
                "neighbours stay"
            );
            product.extend_from_slice(&row[offset..stride - 2]);
        }
        product
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Error bound: every product is within 1e-5 of the sum of its terms' magnitudes.
    #[test]
    fn products_are_close_to_f64(
        seed: u64, format in 0..FORMATS.len(), features in 1usize..70, depth in 1usize..9,
        odd in 0usize..32, rows in 1usize..27,
    ) {
        let format = FORMATS[format];
        let cols = if format.is_quantized() { 32 * depth } else { 32 * depth - odd };
        let case = Case::new(seed, format, features, cols, rows);
        let bias: Vec<f32> = (0..features).map(|i| i as f32 * 0.01).collect();
        let x = case.input();
        let mut team = Team::new(3).unwrap();
        let first = case.product(&mut team, Isa::best(), Some(&bias));
        for (row, out) in first.chunks_exact(features).enumerate() {
            for (feature, &got) in out.iter().enumerate() {
                let terms = case.values[feature * cols..(feature + 1) * cols]
                    .iter()
                    .zip(&x[row * cols..(row + 1) * cols])
                    .map(|(w, x)| f64::from(*w) * f64::from(*x));
                let want = terms.clone().sum::<f64>() + f64::from(bias[feature]);
                let bound = 1e-5 * (terms.map(f64::abs).sum::<f64>() + 1.0);
                prop_assert!((f64::from(got) - want).abs() <= bound, "{format:?} {got} {want}");
            }
        }
        for isa in Isa::available() {
            let other = case.product(&mut team, isa, Some(&bias));
            prop_assert_eq!(bits(&first), bits(&other), "{:?} on {}", format, isa.name());
        }
    }

    /// A row's result has the same bits alone and among others, with one thread and with three.
    #[test]
    fn alone_is_together(seed: u64, format in 0..FORMATS.len(), features in 1usize..70, rows in 1usize..40) {
        let cols = 96;
        let case = Case::new(seed, FORMATS[format], features, cols, rows);
        let together = case.product(&mut Team::new(3).unwrap(), Isa::best(), None);
        let mut team = Team::new(1).unwrap();
        for row in 0..rows {
            let x = case.x[row * cols..(row + 1) * cols].to_vec();
            let mut quant = case.quant.as_ref().map(|_| QuantRows::new(1, cols));
            if let Some(quant) = &mut quant {
                rows::quantize(&mut team, Isa::best(), 1, &x, quant);
            }
            let input = quant.as_ref().map_or(Activations::F32(&x), Activations::Quant);
            let mut out = vec![0.0; features];
            let destination = Destination { data: &mut out, stride: features, offset: 0 };
            matmul(&mut team, Isa::best(), &case.weight, input, 1, None, destination);
            prop_assert_eq!(bits(&out), bits(&together[row * features..(row + 1) * features]));
        }
    }

    #[test]
    fn packed_rows_can_be_read_back(seed: u64, format in 0..FORMATS.len(), features in 1usize..40) {
        let case = Case::new(seed, FORMATS[format], features, 64, 1);
        let mut row = vec![0.0; 64];
        for feature in 0..features {
            case.weight.read_row(feature, &mut row);
            prop_assert_eq!(&row[..], &case.values[feature * 64..(feature + 1) * 64]);
        }
    }

    /// Quantisation errs by at most half a step, and is the same on every instruction set.
    #[test]
    fn quantized_rows_are_close(seed: u64, magnitude in -20i32..20) {
        let mut rng = StdRng::seed_from_u64(seed);
        let scale = 2f32.powi(magnitude);
        let x: Vec<f32> = (0..160).map(|_| rng.random_range(-1.0..1.0) * scale).collect();
        let mut team = Team::new(1).unwrap();
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let mut quant = QuantRows::new(1, 160);
            rows::quantize(&mut team, isa, 1, &x, &mut quant);
            let mut back = vec![0.0; 160];
            quant.read_row(0, &mut back);
            for (x, back) in x.chunks(32).zip(back.chunks(32)) {
                let step = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 32512.0;
                for (x, back) in x.iter().zip(back) {
                    prop_assert!((x - back).abs() <= 0.51 * step);
                }
            }
            let back = bits(&back);
            prop_assert_eq!(first.get_or_insert_with(|| back.clone()), &back);
        }
    }
}

#[test]
fn numbers_that_are_not_finite_stay_visible() {
    let weight = PackedMatrix::pack(WeightFormat::Q8_0, &[1; 34], 1, 32).unwrap();
    let mut team = Team::new(1).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for isa in Isa::available() {
            let mut x = [1.0; 32];
            x[17] = bad;
            let mut quant = QuantRows::new(1, 32);
            rows::quantize(&mut team, isa, 1, &x, &mut quant);
            let mut out = [0.0];
            let destination = Destination { data: &mut out, stride: 1, offset: 0 };
            matmul(&mut team, isa, &weight, Activations::Quant(&quant), 1, None, destination);
            assert!(!out[0].is_finite());
        }
    }
}

#[test]
fn matrices_that_cannot_be_packed_are_refused() {
    let pack = PackedMatrix::pack;
    assert_eq!(pack(WeightFormat::Q4_1, &[0; 20], 1, 33).unwrap_err(), PackError::Columns { cols: 33 });
    let short = PackError::Length { got: 19, want: 20 };
    assert_eq!(pack(WeightFormat::Q4_1, &[0; 19], 1, 32).unwrap_err(), short);
    let mut huge = [0; 18];
    huge[..2].copy_from_slice(&f16::from_f32(9000.0).to_le_bytes());
    assert_eq!(pack(WeightFormat::Q4_0, &huge, 1, 32).unwrap_err(), PackError::Scale);
}
