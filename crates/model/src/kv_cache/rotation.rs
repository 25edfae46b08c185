//! Rotating and un-rotating single heads on the host, for methods that look at keys from before
//! rotary embedding and for compaction.

use crate::{ModelConfig, config::RopeStyle, ops::rope};

/// A model's rotary embedding.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// Angle per position of each rotated pair.
    inv_freq: Vec<f32>,
    /// Factor on cos and sin of a query's or key's own rotation (1 but for YaRN).
    factor: f32,
    style: RopeStyle,
}

impl Rotation {
    /// The rotation of `model`.
    pub fn of(model: &ModelConfig) -> Self {
        let (inv_freq, factor) = rope::frequencies(&model.rope);
        Self { inv_freq, factor, style: model.rope.style }
    }

    /// No rotation at all.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { inv_freq: Vec::new(), factor: 1.0, style: RopeStyle::HalfSplit }
    }

    /// Rotated pairs.
    fn pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// Where pair `i` lies in a head.
    fn pair(&self, i: usize) -> (usize, usize) {
        match self.style {
            RopeStyle::HalfSplit => (i, i + self.pairs()),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        }
    }

    fn turn(&self, head: &mut [f32], factor: f64, angle: impl Fn(f64) -> (f64, f64)) {
        for (i, &inv_freq) in self.inv_freq.iter().enumerate() {
            let (sin, cos) = angle(f64::from(inv_freq));
            let (x, y) = self.pair(i);
            let (a, b) = (f64::from(head[x]), f64::from(head[y]));
            head[x] = ((a * cos - b * sin) * factor) as f32;
            head[y] = ((b * cos + a * sin) * factor) as f32;
        }
    }

    /// Turns a rotated head `[head_dim]` further by `by` positions (back if negative).
    pub fn shift(&self, head: &mut [f32], by: i64) {
        self.turn(head, 1.0, |inv_freq| (by as f64 * inv_freq).sin_cos());
    }

    /// The head `[head_dim]` as it was before it was rotated to `position`.
    pub fn undo(&self, head: &mut [f32], position: u32) {
        self.turn(head, 1.0 / f64::from(self.factor), |inv_freq| (-f64::from(position) * inv_freq).sin_cos());
    }

    /// Rotates an un-rotated head `[head_dim]` by the mean over positions `from..from + count`.
    pub fn apply_mean(&self, head: &mut [f32], from: u32, count: u32) {
        let mean = |inv_freq: f64| {
            // The sum of a geometric series of rotations is one rotation times a factor.
            let (half, middle) = (0.5 * inv_freq, f64::from(from) + 0.5 * f64::from(count - 1));
            let factor = if half.sin().abs() < 1e-12 {
                1.0
            } else {
                (f64::from(count) * half).sin() / (f64::from(count) * half.sin())
            };
            let (sin, cos) = (middle * inv_freq).sin_cos();
            (sin * factor, cos * factor)
        };
        self.turn(head, f64::from(self.factor), mean);
    }

    /// Copies an un-rotated head `[head_dim]` in the half-split order that side-car weights expect:
    /// pair `i` at `i` and `i + rotary_dim / 2`.
    pub fn copy_half_split(&self, head: &[f32], out: &mut [f32]) {
        out.copy_from_slice(head);
        if self.style == RopeStyle::Interleaved {
            for i in 0..self.pairs() {
                out[i] = head[2 * i];
                out[i + self.pairs()] = head[2 * i + 1];
            }
        }
    }
}
