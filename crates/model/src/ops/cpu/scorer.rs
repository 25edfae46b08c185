//! The learned method's scores: a causal convolution and a small network, once per token.

use candle_core::{DType, Device, Tensor};
use locket_kernels::cpu::{
    Isa, Team,
    kv::KvRows,
    scorer::{CausalConv, Projection, causal_conv, gelu_project},
};

use super::weight::{CpuWeight, Input};
use crate::{
    Error,
    kv_cache::{
        Rotation,
        side_car::{LearnedLayer, LearnedWeights},
    },
    ops::{RawTensor, WeightRole, WeightSpec},
};

/// One layer's weights.
struct LayerScorer {
    /// `[features]`.
    scale: Vec<f32>,
    /// `[taps, features]`: tap by tap, so that the inner loop runs over features.
    taps: Vec<f32>,
    /// `[hidden, 2 * features]` with its bias.
    hidden: CpuWeight,
    /// `[outputs, hidden]`.
    output: Vec<f32>,
    output_bias: Vec<f32>,
}

/// The scorers of all layers, and buffers for the largest batch.
pub(super) struct Scorer {
    features: usize,
    taps: usize,
    outputs: usize,
    head_dim: usize,
    layers: Vec<LayerScorer>,
    /// Raw features of one sequence after its tail `[taps - 1 + rows, features]`.
    raw: Vec<f32>,
    /// `[rows, 2 * features]`.
    input: Vec<f32>,
    /// `[rows, hidden]`.
    activations: Vec<f32>,
    /// `[rows of the batch, outputs]`.
    scores: Vec<f32>,
}

impl Scorer {
    pub(super) fn new(weights: &LearnedWeights, head_dim: usize, max_rows: usize) -> Result<Self, Error> {
        let LearnedWeights { features, taps, hidden, .. } = *weights;
        let layers = weights.layers.iter().map(|layer| LayerScorer::new(layer, weights));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let outputs = layers.first().map_or(0, |layer| layer.output_bias.len());
        Ok(Self {
            features,
            taps,
            outputs,
            head_dim,
            layers,
            raw: vec![0.0; (max_rows + taps - 1) * features],
            input: vec![0.0; max_rows * 2 * features],
            activations: vec![0.0; max_rows * hidden],
            scores: vec![0.0; max_rows * outputs],
        })
    }

    /// Bytes of weights.
    pub(super) fn weight_bytes(&self) -> usize {
        let numbers = |layer: &LayerScorer| {
            let own = [&layer.scale, &layer.taps, &layer.output, &layer.output_bias];
            own.into_iter().map(|numbers| size_of_val(numbers.as_slice())).sum::<usize>()
        };
        self.layers.iter().map(|layer| numbers(layer) + layer.hidden.num_bytes()).sum()
    }

    /// Bytes of buffers.
    pub(super) fn num_bytes(&self) -> usize {
        let buffers = [&self.raw, &self.input, &self.activations, &self.scores];
        buffers.into_iter().map(|buffer| size_of_val(buffer.as_slice())).sum()
    }

    /// Scores `[rows of the batch, kv_heads, 2]` of the layer that was scored last.
    pub(super) fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Takes the features of a sequence's rows from keys and values that are not rotated yet, and puts
    /// the network's input to row `at` of the buffer. `tail [taps - 1, features]` has the features before
    /// them and afterwards their last ones.
    #[expect(clippy::too_many_arguments, reason = "where from, where to, and who computes")]
    pub(super) fn gather(
        &mut self,
        layer: usize,
        rows: std::ops::Range<usize>,
        new: KvRows<'_>,
        rotation: &Rotation,
        tail: &mut [f32],
        at: usize,
        (team, isa): (&mut Team, Isa),
    ) {
        let (width, dim) = (self.features, self.head_dim);
        let (count, before) = (rows.len(), (self.taps - 1) * width);
        let LayerScorer { scale, taps, .. } = &self.layers[layer];
        self.raw[..before].copy_from_slice(&tail[..before]);
        for (row, raw) in rows.zip(self.raw[before..].chunks_exact_mut(width)) {
            let row = &new.data[row * new.stride..(row + 1) * new.stride];
            for (head, pair) in raw.chunks_exact_mut(2 * dim).enumerate() {
                let (key, value) = pair.split_at_mut(dim);
                rotation.copy_half_split(&row[new.keys + head * dim..][..dim], key);
                value.copy_from_slice(&row[new.values + head * dim..][..dim]);
            }
        }
        let conv = CausalConv { scale, taps };
        let input = &mut self.input[2 * at * width..];
        causal_conv(team, isa, count, conv, &self.raw, input);
        tail[..before].copy_from_slice(&self.raw[count * width..][..before]);
    }

    /// Runs the network on the first `count` rows of its input.
    pub(super) fn run(&mut self, layer: usize, count: usize, team: &mut Team, isa: Isa) -> Result<(), Error> {
        let LayerScorer { hidden, output, output_bias, .. } = &self.layers[layer];
        let input = Input { x: &self.input, quant: None, rows: count };
        hidden.matrix()?.product(team, isa, input, &mut self.activations, &mut [])?;
        let last = Projection { weight: output, bias: output_bias };
        gelu_project(team, isa, count, last, &mut self.activations, &mut self.scores);
        Ok(())
    }

    /// Brings scores from row `from` of the network's output to rows `to` of the batch; called from the
    /// last sequence to the first, so that nothing is overwritten.
    pub(super) fn spread(&mut self, from: usize, to: std::ops::Range<usize>) {
        let width = self.outputs;
        self.scores.copy_within(from * width..(from + to.len()) * width, to.start * width);
    }
}

impl LayerScorer {
    fn new(layer: &LearnedLayer, weights: &LearnedWeights) -> Result<Self, Error> {
        let LearnedWeights { features, taps, hidden, .. } = *weights;
        let by_tap = |i: usize| layer.dw[i % features * taps + i / features];
        // The file's numbers are halves, or become halves here: half the bytes for the same scores.
        let matrix =
            Tensor::from_slice(&layer.p1, (hidden, 2 * features), &Device::Cpu)?.to_dtype(DType::F16)?;
        let bias = Tensor::from_slice(&layer.b1, hidden, &Device::Cpu)?;
        let spec =
            WeightSpec { parts: vec![RawTensor::Dense(matrix)], bias: Some(bias), role: WeightRole::Linear };
        Ok(Self {
            scale: layer.scale.clone(),
            taps: (0..features * taps).map(by_tap).collect(),
            hidden: CpuWeight::prepare(&spec)?,
            output: layer.p2.clone(),
            output_bias: layer.b2.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::scorer_fixture::Fixture;

    /// Layers 0, 15 and 29 of a scorer for SmolLM2-135M against PyTorch, at once and in two parts.
    #[test]
    fn scores_are_those_of_the_fixture() {
        let fixture = Fixture::read();
        let mut team = Team::new(2).unwrap();
        let side_car = &fixture.side_car;
        let weights = side_car.learned.as_ref().unwrap();
        let mut scorer = Scorer::new(weights, 64, 32).unwrap();
        for layer in 0..3 {
            let new = fixture.rows();
            let mut run = |scorer: &mut Scorer, borders: &[usize]| {
                let mut tail = vec![0.0; weights.tail_len()];
                let mut scores = Vec::new();
                for pair in borders.windows(2) {
                    let rows = pair[0]..pair[1];
                    scorer.gather(
                        layer,
                        rows.clone(),
                        new,
                        &Rotation::none(),
                        &mut tail,
                        0,
                        (&mut team, Isa::best()),
                    );
                    scorer.run(layer, rows.len(), &mut team, Isa::best()).unwrap();
                    scores.extend_from_slice(&scorer.scores()[..rows.len() * 6]);
                }
                scores
            };
            let whole = run(&mut scorer, &[0, 20]);
            assert_eq!(run(&mut scorer, &[0, 12, 20]), whole, "the tail carries what is needed");
            for (i, score) in whole.iter().enumerate() {
                let expected = fixture.expected(layer, i / 6, i % 6 / 2, i % 2);
                assert!((score - expected).abs() < 1e-4, "layer {layer}: {score} {expected}");
            }
        }
    }
}
