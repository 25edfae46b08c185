//! Inner loops of the learned cache method's scorer: a depthwise causal convolution over a token's
//! features, and the small network's activation with its last product.
//!
//! Every row's arithmetic is the same whatever rows are beside it and whichever thread takes it.

use super::{
    Isa, Shared, Team,
    isa::SimdOp,
    kv::load_part,
    rows::for_rows,
    simd::{LANES, Simd},
};

/// A depthwise causal convolution of scaled features.
#[derive(Debug, Clone, Copy)]
pub struct CausalConv<'a> {
    /// Factor on the features `[width]`.
    pub scale: &'a [f32],
    /// `[taps, width]`; the last tap is the row itself.
    pub taps: &'a [f32],
}

/// For `rows` rows of `raw [taps - 1 + rows, width]` after its first `taps - 1`: `out [rows, 2 * width]` gets
/// the scaled features, then the convolved ones.
///
/// # Panics
/// If a length does not fit.
pub fn causal_conv(
    team: &mut Team,
    isa: Isa,
    rows: usize,
    conv: CausalConv<'_>,
    raw: &[f32],
    out: &mut [f32],
) {
    let width = conv.scale.len();
    assert!(width > 0 && conv.taps.len().is_multiple_of(width) && !conv.taps.is_empty(), "whole taps");
    let taps = conv.taps.len() / width;
    assert!((taps - 1 + rows) * width <= raw.len() && 2 * rows * width <= out.len(), "all rows are there");
    let out = Shared(out.as_mut_ptr());
    for_rows(team, rows, taps * width, |row| {
        let raw = &raw[row * width..(row + taps) * width];
        // SAFETY: lengths are checked; each row has one task.
        let out = unsafe { out.slice(2 * row * width, 2 * width) };
        isa.run(ConvRow { conv, raw, out });
    });
}

struct ConvRow<'a> {
    conv: CausalConv<'a>,
    /// `[taps, width]`.
    raw: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for ConvRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { conv, raw, out } = self;
        let width = conv.scale.len();
        let (own, convolved) = out.split_at_mut(width);
        let parts = own.chunks_mut(LANES).zip(convolved.chunks_mut(LANES)).zip(conv.scale.chunks(LANES));
        for (part, ((own, convolved), scale)) in parts.enumerate() {
            let at = part * LANES..part * LANES + own.len();
            let scale = load_part(s, scale);
            let (mut sum, mut x) = (s.splat(0.0), s.splat(0.0));
            for (raw, weights) in raw.chunks_exact(width).zip(conv.taps.chunks_exact(width)) {
                x = s.mul(load_part(s, &raw[at.clone()]), scale);
                sum = s.fma(x, load_part(s, &weights[at.clone()]), sum);
            }
            own.copy_from_slice(&s.to_array(x)[..own.len()]);
            convolved.copy_from_slice(&s.to_array(sum)[..convolved.len()]);
        }
    }
}

/// The last layer of a network.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// `[outputs, width]`.
    pub weight: &'a [f32],
    /// `[outputs]`.
    pub bias: &'a [f32],
}

/// `out [rows, outputs] = gelu(x) weightᵀ + bias` for `x [rows, width]`, which becomes `gelu(x)`: the exact
/// one, by an error function that is good to 2e-7 (Abramowitz and Stegun, 7.1.26).
///
/// # Panics
/// If a length does not fit.
pub fn gelu_project(
    team: &mut Team,
    isa: Isa,
    rows: usize,
    last: Projection<'_>,
    x: &mut [f32],
    out: &mut [f32],
) {
    let outputs = last.bias.len();
    assert!(outputs > 0 && last.weight.len().is_multiple_of(outputs), "a weight per output");
    let width = last.weight.len() / outputs;
    assert!(rows * width <= x.len() && rows * outputs <= out.len(), "all rows are there");
    let (x, out) = (Shared(x.as_mut_ptr()), Shared(out.as_mut_ptr()));
    for_rows(team, rows, width * (8 + outputs), |row| {
        // SAFETY: lengths are checked; each row has one task.
        let (x, out) = unsafe { (x.slice(row * width, width), out.slice(row * outputs, outputs)) };
        isa.run(ProjectRow { last, x, out });
    });
}

struct ProjectRow<'a> {
    last: Projection<'a>,
    x: &'a mut [f32],
    out: &'a mut [f32],
}

impl SimdOp for ProjectRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { last, x, out } = self;
        for part in x.chunks_mut(LANES) {
            let y = s.to_array(gelu(s, load_part(s, part)));
            part.copy_from_slice(&y[..part.len()]);
        }
        for ((out, weights), bias) in out.iter_mut().zip(last.weight.chunks_exact(x.len())).zip(last.bias) {
            let mut sum = s.splat(0.0);
            for (x, weights) in x.chunks(LANES).zip(weights.chunks(LANES)) {
                sum = s.fma(load_part(s, x), load_part(s, weights), sum);
            }
            *out = s.sum(sum) + bias;
        }
    }
}

#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    let size = s.max(x, s.sub(zero, x));
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(s.splat(1.0), s.fma(z, s.splat(0.327_591_1), s.splat(1.0)));
    let mut poly = s.splat(1.061_405_4);
    for coefficient in [-1.453_152_1, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        poly = s.fma(poly, t, s.splat(coefficient));
    }
    let tail = s.exp2(s.mul(s.mul(z, z), s.splat(-std::f32::consts::LOG2_E)));
    let erf = s.sub(s.splat(1.0), s.mul(s.mul(poly, t), tail));
    s.mul(s.splat(0.5), s.fma(size, erf, x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, by: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * by + 7) % 97) as f32 / 40.0 - 1.2).collect()
    }

    #[test]
    fn equals_plain_loops_and_the_same_bits_on_every_isa() {
        let mut team = Team::new(2).unwrap();
        // Widths that are no multiple of a register's.
        for (rows, width, taps, hidden, outputs) in [(1, 384, 9, 96, 6), (70, 40, 5, 24, 4), (3, 8, 1, 10, 2)]
        {
            let raw = numbers((taps - 1 + rows) * width, 31);
            let (scale, weights) = (numbers(width, 17), numbers(taps * width, 53));
            let (x, weight, bias) =
                (numbers(rows * hidden, 29), numbers(outputs * hidden, 41), numbers(outputs, 3));
            let mut results = Vec::new();
            for isa in Isa::available() {
                let mut out = vec![0.0; 2 * rows * width];
                let conv = CausalConv { scale: &scale, taps: &weights };
                causal_conv(&mut team, isa, rows, conv, &raw, &mut out);
                let (mut x, mut scores) = (x.clone(), vec![0.0; rows * outputs]);
                let last = Projection { weight: &weight, bias: &bias };
                gelu_project(&mut team, isa, rows, last, &mut x, &mut scores);
                results.push((out, x, scores));
            }
            let (out, y, scores) = &results[0];
            assert!(results.iter().all(|result| result == &results[0]), "instruction sets agree");
            for (row, out) in out.chunks(2 * width).enumerate() {
                for i in 0..width {
                    let scaled = |tap: usize| f64::from(raw[(row + tap) * width + i]) * f64::from(scale[i]);
                    let sum: f64 =
                        (0..taps).map(|tap| scaled(tap) * f64::from(weights[tap * width + i])).sum();
                    assert!((f64::from(out[i]) - scaled(taps - 1)).abs() < 1e-6);
                    assert!((f64::from(out[width + i]) - sum).abs() < 1e-5, "{} {sum}", out[width + i]);
                }
            }
            for ((y, scores), x) in y.chunks(hidden).zip(scores.chunks(outputs)).zip(x.chunks(hidden)) {
                for (y, x) in y.iter().zip(x) {
                    assert!((y - x.max(0.0)).abs() < 0.171, "between 0 and the ramp");
                }
                for (o, score) in scores.iter().enumerate() {
                    let products =
                        y.iter().zip(&weight[o * hidden..]).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let sum = products.sum::<f64>() + f64::from(bias[o]);
                    assert!((f64::from(*score) - sum).abs() < 1e-5);
                }
            }
        }
    }
}
