//! Trained tensors, stacked over layers, and the optimiser.

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use rand::{Rng, SeedableRng as _, rngs::StdRng};

use crate::error::Result;

/// A trained tensor `[layers, ..]` in f32 and how it is trained.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    pub name: &'static str,
    pub value: Tensor,
    /// Factor on the learning rate.
    pub rate: f64,
    pub weight_decay: f64,
}

/// All trained tensors in a fixed order.
#[derive(Debug, Clone)]
pub(crate) struct Parameters(pub Vec<Parameter>);

/// One layer's slices as variables, in the order of [`Parameters`].
pub(crate) struct Leaves(pub Vec<Var>);

impl Parameters {
    pub(crate) fn layers(&self) -> Result<usize> {
        self.0.first().map_or(Ok(0), |parameter| Ok(parameter.value.dim(0)?))
    }

    /// Copies of one layer's values that gradients can be taken of.
    pub(crate) fn leaves(&self, layer: usize) -> Result<Leaves> {
        let leaf = |parameter: &Parameter| Var::from_tensor(&parameter.value.get(layer)?);
        Ok(Leaves(self.0.iter().map(leaf).collect::<candle_core::Result<_>>()?))
    }

    /// Replaces the value of `name`.
    pub(crate) fn set(&mut self, name: &str, value: Tensor) {
        if let Some(parameter) = self.0.iter_mut().find(|parameter| parameter.name == name) {
            parameter.value = value;
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|parameter| parameter.name == name).map(|parameter| &parameter.value)
    }
}

/// Sums of gradients per layer and parameter over the parts of one step.
pub(crate) struct Gradients {
    /// `[layers][parameters]`.
    sums: Vec<Vec<Option<Tensor>>>,
}

impl Gradients {
    pub(crate) fn new(parameters: &Parameters) -> Result<Self> {
        Ok(Self { sums: vec![vec![None; parameters.0.len()]; parameters.layers()?] })
    }

    /// Adds what `store` knows of one layer's variables.
    pub(crate) fn add(&mut self, layer: usize, leaves: &Leaves, store: &GradStore) -> Result<()> {
        for (sum, leaf) in self.sums[layer].iter_mut().zip(&leaves.0) {
            if let Some(gradient) = store.get(leaf) {
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + gradient)?,
                    None => gradient.clone(),
                });
            }
        }
        Ok(())
    }

    /// One tensor `[layers, ..]` per parameter; zeros where nothing was added.
    pub(crate) fn stacked(self, parameters: &Parameters) -> Result<Vec<Tensor>> {
        let stack = |(at, parameter): (usize, &Parameter)| -> Result<Tensor> {
            let layers = self.sums.iter().map(|layer| match &layer[at] {
                Some(gradient) => Ok(gradient.clone()),
                None => Ok(parameter.value.get(0)?.zeros_like()?),
            });
            Ok(Tensor::stack(&layers.collect::<Result<Vec<_>>>()?, 0)?)
        };
        parameters.0.iter().enumerate().map(stack).collect()
    }
}

/// AdamW (arXiv 1711.05101) with a rate and a decay per parameter and a bound on the norm of all
/// gradients together. Nothing is read back from the device.
pub(crate) struct AdamW {
    beta1: f64,
    beta2: f64,
    /// Largest norm of all gradients together; `None` leaves them.
    clip: Option<f64>,
    /// Steps taken.
    pub steps: u64,
    /// First and second moment per parameter.
    pub moments: Vec<[Tensor; 2]>,
}

const EPSILON: f64 = 1e-8;

impl AdamW {
    pub(crate) fn new(parameters: &Parameters, betas: (f64, f64), clip: Option<f64>) -> Result<Self> {
        let zeros = |p: &Parameter| Ok([p.value.zeros_like()?, p.value.zeros_like()?]);
        let moments = parameters.0.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { beta1: betas.0, beta2: betas.1, clip, steps: 0, moments })
    }

    /// One step at learning rate `rate`; `gradients` as [`Gradients::stacked`] gives them.
    pub(crate) fn step(
        &mut self,
        parameters: &mut Parameters,
        gradients: &[Tensor],
        rate: f64,
    ) -> Result<()> {
        self.steps += 1;
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - self.beta1.powi(steps), 1.0 - self.beta2.powi(steps));
        let factor = self.clip.map(|most| clip_factor(gradients, most)).transpose()?;
        for ((parameter, gradient), moments) in parameters.0.iter_mut().zip(gradients).zip(&mut self.moments)
        {
            let gradient = match &factor {
                Some(factor) => gradient.broadcast_mul(factor)?,
                None => gradient.clone(),
            };
            let rate = rate * parameter.rate;
            let [first, second] = moments;
            *first = (first.affine(self.beta1, 0.0)? + gradient.affine(1.0 - self.beta1, 0.0)?)?;
            *second = (second.affine(self.beta2, 0.0)? + gradient.sqr()?.affine(1.0 - self.beta2, 0.0)?)?;
            let root = (second.affine(1.0 / correct2, 0.0)?.sqrt()? + EPSILON)?;
            let change = (first.affine(rate / correct1, 0.0)? / root)?;
            let decayed = parameter.value.affine(1.0 - rate * parameter.weight_decay, 0.0)?;
            parameter.value = (decayed - change)?;
        }
        Ok(())
    }
}

/// What to multiply all gradients with so that their common norm is at most `most`; stays on the device.
fn clip_factor(gradients: &[Tensor], most: f64) -> Result<Tensor> {
    let squares = gradients.iter().map(|gradient| Ok(gradient.sqr()?.sum_all()?));
    let norm = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?.sum_all()?.sqrt()?;
    Ok((((norm + 1e-6)?.recip()? * most)?).minimum(1.0)?)
}

/// Independent random numbers for one purpose at one time of a seeded run.
pub(crate) fn random(seed: u64, purpose: u64, at: u64) -> StdRng {
    let mut bytes = [0; 32];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip([seed, purpose, at, 0x6c6f_636b_6574]) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    StdRng::from_seed(bytes)
}

/// Normal numbers with standard deviation `deviation` (Box and Muller, 1958).
pub(crate) fn normal(
    shape: &[usize],
    deviation: f64,
    random: &mut StdRng,
    device: &Device,
) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let numbers = (0..count).map(|_| {
        let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
        (deviation * radius * (std::f64::consts::TAU * random.random::<f64>()).cos()) as f32
    });
    Ok(Tensor::from_vec(numbers.collect(), shape, &Device::Cpu)?.to_device(device)?)
}

/// `value` in every element, f32.
pub(crate) fn filled(shape: &[usize], value: f64, device: &Device) -> Result<Tensor> {
    Ok(Tensor::full(value, shape, device)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps of PyTorch's AdamW (lr .1, betas .9/.98, weight decay .5) after
    /// `clip_grad_norm_(1.)`, gradients `[3, -4]`, `[.1, .2]`, `[0, 1]`.
    #[test]
    fn equals_pytorch() {
        let value = Tensor::new(&[[1f32, -2.0]], &Device::Cpu).unwrap();
        let mut parameters = Parameters(vec![Parameter { name: "w", value, rate: 0.5, weight_decay: 0.5 }]);
        let mut adam = AdamW::new(&parameters, (0.9, 0.98), Some(1.0)).unwrap();
        for gradient in [[3f32, -4.0], [0.1, 0.2], [0.0, 1.0]] {
            let gradient = Tensor::new(&[gradient], &Device::Cpu).unwrap();
            adam.step(&mut parameters, &[gradient], 0.2).unwrap();
        }
        let got = parameters.get("w").unwrap().to_vec2::<f32>().unwrap();
        for (got, expected) in got[0].iter().zip(EXPECTED) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    /// Printed by `tests/fixtures/scorer.py`.
    const EXPECTED: [f32; 2] = [0.631_244_7, -1.605_885_9];
}
