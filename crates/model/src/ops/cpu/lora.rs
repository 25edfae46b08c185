//! Adapters on packed kernels: rows are gathered, run through two small products, and added where they
//! belong. A row's arithmetic is its own, as everywhere here.

use locket_kernels::cpu::{Activations, Destination, Isa, PackedMatrix, Team, WeightFormat, matmul};

use crate::{
    Error, Extras, ModelConfig,
    adapter::{LoraPair, LoraType},
};

/// A linear's second path, packed.
pub struct CpuLora {
    a: PackedMatrix,
    b: PackedMatrix,
    scale: f32,
}

impl CpuLora {
    pub(super) fn pack(pair: &LoraPair, (outputs, inputs): (usize, usize)) -> Result<Self, Error> {
        let pack = |numbers: &[f32], rows, cols| {
            let (format, bytes) = stored(numbers, pair.stored);
            let failed = |error| Error::Device(format!("packing an adapter: {error}"));
            PackedMatrix::pack(format, &bytes, rows, cols).map_err(failed)
        };
        Ok(Self {
            a: pack(&pair.a, pair.rank, inputs)?,
            b: pack(&pair.b, outputs, pair.rank)?,
            scale: pair.scale,
        })
    }

    pub(super) fn num_bytes(&self) -> u64 {
        (self.a.num_bytes() + self.b.num_bytes()) as u64
    }
}

fn stored(numbers: &[f32], stored: LoraType) -> (WeightFormat, Vec<u8>) {
    let halves = |of: fn(f32) -> [u8; 2]| numbers.iter().flat_map(|&number| of(number)).collect();
    match stored {
        LoraType::F32 => {
            (WeightFormat::F32, numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
        }
        LoraType::F16 => (WeightFormat::F16, halves(|number| half::f16::from_f32(number).to_le_bytes())),
        LoraType::Bf16 => (WeightFormat::Bf16, halves(|number| half::bf16::from_f32(number).to_le_bytes())),
    }
}

/// Buffers for the largest batch.
#[derive(Debug, Default)]
pub(super) struct LoraScratch {
    /// Inputs, then what `A` makes of them, then outputs.
    numbers: Vec<f32>,
}

impl LoraScratch {
    pub(super) fn new(extras: &Extras, model: &ModelConfig, max_rows: usize) -> Self {
        let width = if extras.adapters > 0 { extras.scratch_width(model) } else { 0 };
        Self { numbers: vec![0.0; max_rows * width] }
    }

    pub(super) fn num_bytes(&self) -> usize {
        size_of_val(self.numbers.as_slice())
    }

    /// `into[row, offset..] += scale * B (A src[row])` for `rows`; `into` is data, its width and the offset.
    pub(super) fn add(
        &mut self,
        team: &mut Team,
        isa: Isa,
        lora: &CpuLora,
        rows: &[u32],
        src: &[f32],
        (into, width, offset): (&mut [f32], usize, usize),
    ) {
        let (inputs, rank, outputs) = (lora.a.cols(), lora.a.rows(), lora.b.rows());
        let count = rows.len();
        let (gathered, rest) = self.numbers.split_at_mut(count * inputs);
        let (down, rest) = rest.split_at_mut(count * rank);
        let up = &mut rest[..count * outputs];
        for (to, &row) in gathered.chunks_exact_mut(inputs).zip(rows) {
            to.copy_from_slice(&src[row as usize * inputs..][..inputs]);
        }
        let out = Destination { data: &mut *down, stride: rank, offset: 0 };
        matmul(team, isa, &lora.a, Activations::F32(gathered), count, None, out);
        let out = Destination { data: &mut *up, stride: outputs, offset: 0 };
        matmul(team, isa, &lora.b, Activations::F32(down), count, None, out);
        for (more, &row) in up.chunks_exact(outputs).zip(rows) {
            let sum = &mut into[row as usize * width + offset..][..outputs];
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += lora.scale * more);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::adapter::Extras;

    /// Against the same sums in f64; tolerance: 1e-5 of the largest output. Other rows keep their bits.
    #[test]
    fn rows_get_what_a_slow_sum_says() {
        let mut random = StdRng::seed_from_u64(5);
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-1.0..1.0)).collect() };
        let (inputs, outputs, rank, scale, width, offset) = (64, 40, 5, 0.7, 60, 11);
        let pair = LoraPair {
            a: numbers(rank * inputs),
            b: numbers(outputs * rank),
            rank,
            scale,
            stored: LoraType::F32,
        };
        let (src, before) = (numbers(9 * inputs), numbers(9 * width));
        let lora = CpuLora::pack(&pair, (outputs, inputs)).unwrap();
        let mut team = Team::new(2).unwrap();
        let mut scratch = LoraScratch { numbers: vec![0.0; 9 * (inputs + rank + outputs)] };
        let mut got = before.clone();
        scratch.add(&mut team, Isa::best(), &lora, &[1, 4, 5, 8], &src, (&mut got, width, offset));
        for row in 0..9 {
            let x = &src[row * inputs..][..inputs];
            for column in 0..width {
                let (got, before) = (got[row * width + column], before[row * width + column]);
                let is_touched = [1, 4, 5, 8].contains(&row) && (offset..offset + outputs).contains(&column);
                if !is_touched {
                    assert_eq!(got.to_bits(), before.to_bits());
                    continue;
                }
                let b = &pair.b[(column - offset) * rank..][..rank];
                let through = |r: usize| -> f64 {
                    x.iter().zip(&pair.a[r * inputs..]).map(|(x, a)| f64::from(*x) * f64::from(*a)).sum()
                };
                let sum: f64 = b.iter().enumerate().map(|(r, b)| f64::from(*b) * through(r)).sum();
                let expected = f64::from(before) + f64::from(scale) * sum;
                assert!((f64::from(got) - expected).abs() < 1e-4, "{got} {expected}");
            }
        }
    }

    #[test]
    fn scratch_is_what_was_planned() {
        let extras = Extras { adapters: 1, max_rank: 8, held_rows: 0 };
        let config = crate::testing::gguf::tiny_geometry();
        let scratch = LoraScratch::new(&extras, &config, 32);
        assert_eq!(scratch.num_bytes(), 4 * 32 * (96 + 8 + 96));
        assert_eq!(LoraScratch::new(&Extras::default(), &config, 32).num_bytes(), 0);
    }
}
