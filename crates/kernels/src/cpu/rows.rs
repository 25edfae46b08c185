//! Operations on single rows: norms, rotation, the gate, 16-bit forms.
//!
//! Where the next product takes 16-bit activations, the operation that makes a row also quantises it
//! while it is in the first-level cache.

use super::{
    Isa, QUANT_BLOCK, QuantRows, Shared, Team,
    isa::SimdOp,
    kv::load_part,
    quant::{ActBlock, quantize_row},
    simd::{LANES, Simd},
};

/// Numbers of a task, so that a task outweighs its start.
const TASK_NUMBERS: usize = 16 << 10;

/// Calls `row` for every row, in parallel if there is enough to do.
pub(super) fn for_rows(team: &mut Team, rows: usize, width: usize, row: impl Fn(usize) + Sync) {
    let per_task = (TASK_NUMBERS / width.max(1)).max(1);
    team.run(rows.div_ceil(per_task), |_, task| {
        for row_idx in task * per_task..rows.min((task + 1) * per_task) {
            row(row_idx);
        }
    });
}

/// The 16-bit rows that an operation fills beside its f32 ones.
#[derive(Clone, Copy)]
struct QuantOut {
    blocks: Shared<ActBlock>,
    per_row: usize,
}

impl QuantOut {
    fn new(quant: Option<&mut QuantRows>, rows: usize, width: usize) -> Option<Self> {
        quant.map(|quant| {
            assert_eq!(quant.width(), width, "16-bit rows of the same width");
            assert!(rows <= quant.max_rows(), "16-bit rows for all rows");
            let per_row = quant.blocks_per_row();
            Self { blocks: Shared(quant.blocks_mut().as_mut_ptr()), per_row }
        })
    }

    /// # Safety
    /// One user per row at a time, and the row exists.
    unsafe fn row<'a>(self, row: usize) -> &'a mut [ActBlock] {
        // SAFETY: the caller's promise.
        unsafe { self.blocks.slice(row * self.per_row, self.per_row) }
    }
}

/// Root mean square norm (arXiv 1910.07467): `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[width]`.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// `out = norm(x)` of `rows` rows `[rows, width]`; `quant` receives the 16-bit form too.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(
    team: &mut Team,
    isa: Isa,
    norm: RmsNorm<'_>,
    rows: usize,
    x: &[f32],
    out: &mut [f32],
    quant: Option<&mut QuantRows>,
) {
    let width = norm.weight.len();
    assert!(rows * width <= x.len().min(out.len()), "rows of the norm's width");
    let quant = QuantOut::new(quant, rows, width);
    let out = Shared(out.as_mut_ptr());
    for_rows(team, rows, width, |row| {
        let x = &x[row * width..(row + 1) * width];
        // SAFETY: lengths are checked; each row has one task.
        let (out, quant) = unsafe { (out.slice(row * width, width), quant.map(|quant| quant.row(row))) };
        isa.run(NormRow { norm, x, out, quant });
    });
}

/// `residual += x; x = norm(residual)` of `rows` rows; `quant` receives the 16-bit form of `x` too.
///
/// # Panics
/// If a length does not fit.
pub fn add_rms_norm(
    team: &mut Team,
    isa: Isa,
    norm: RmsNorm<'_>,
    rows: usize,
    residual: &mut [f32],
    x: &mut [f32],
    quant: Option<&mut QuantRows>,
) {
    let width = norm.weight.len();
    assert!(rows * width <= residual.len().min(x.len()), "rows of the norm's width");
    let quant = QuantOut::new(quant, rows, width);
    let (residual, x) = (Shared(residual.as_mut_ptr()), Shared(x.as_mut_ptr()));
    for_rows(team, rows, width, |row| {
        // SAFETY: lengths are checked; each row has one task.
        let (residual, x) = unsafe { (residual.slice(row * width, width), x.slice(row * width, width)) };
        for (residual, x) in residual.iter_mut().zip(&*x) {
            *residual += x;
        }
        // SAFETY: as above.
        let quant = quant.map(|quant| unsafe { quant.row(row) });
        isa.run(NormRow { norm, x: residual, out: x, quant });
    });
}

struct NormRow<'a> {
    norm: RmsNorm<'a>,
    x: &'a [f32],
    out: &'a mut [f32],
    quant: Option<&'a mut [ActBlock]>,
}

impl SimdOp for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inverse = inverse_rms(s, self.x, self.norm.eps);
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.norm.weight) {
            *out = x * inverse * weight;
        }
        if let Some(blocks) = self.quant {
            quantize_row(s, self.out, blocks);
        }
    }
}

#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut squares = s.splat(0.0);
    for part in x.chunks(LANES) {
        let x = load_part(s, part);
        squares = s.fma(x, x, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
}

/// Norm over each head in place: `heads` heads of the norm's width from column `offset` of rows of
/// `stride` numbers.
///
/// # Panics
/// If a length does not fit.
pub fn head_norm(
    team: &mut Team,
    isa: Isa,
    norm: RmsNorm<'_>,
    rows: usize,
    data: &mut [f32],
    stride: usize,
    heads: std::ops::Range<usize>,
) {
    let dim = norm.weight.len();
    assert!(heads.end * dim <= stride && rows * stride <= data.len(), "heads lie in the rows");
    let data = Shared(data.as_mut_ptr());
    for_rows(team, rows, heads.len() * dim, |row| {
        for head in heads.clone() {
            // SAFETY: lengths are checked; each row has one task.
            let x = unsafe { data.slice(row * stride + head * dim, dim) };
            isa.run(HeadNorm { norm, x });
        }
    });
}

struct HeadNorm<'a> {
    norm: RmsNorm<'a>,
    x: &'a mut [f32],
}

impl SimdOp for HeadNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inverse = inverse_rms(s, self.x, self.norm.eps);
        for (x, weight) in self.x.iter_mut().zip(self.norm.weight) {
            *x = *x * inverse * weight;
        }
    }
}

/// Which dimensions form a rotary pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// `(2i, 2i + 1)`.
    Interleaved,
    /// `(i, i + rotary_dim / 2)`.
    HalfSplit,
}

/// A rotation of heads by their row's position.
#[derive(Debug, Clone, Copy)]
pub struct Rope<'a> {
    /// Which dimensions form a pair.
    pub pairs: RopePairs,
    /// `[rows, rotary_dim / 2]`.
    pub cos: &'a [f32],
    /// `[rows, rotary_dim / 2]`.
    pub sin: &'a [f32],
    /// Leading dimensions of a head that are rotated.
    pub rotary_dim: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

/// Rotates the first `heads` heads of `rows` rows of `stride` numbers in place.
///
/// # Panics
/// If a length does not fit.
pub fn rope(
    team: &mut Team,
    isa: Isa,
    rope: Rope<'_>,
    rows: usize,
    data: &mut [f32],
    stride: usize,
    heads: usize,
) {
    let half = rope.rotary_dim / 2;
    assert!(rope.rotary_dim.is_multiple_of(2) && rope.rotary_dim <= rope.head_dim, "pairs lie in a head");
    assert!(rows * half <= rope.cos.len().min(rope.sin.len()), "an angle per row and pair");
    assert!(heads * rope.head_dim <= stride && rows * stride <= data.len(), "heads lie in the rows");
    let data = Shared(data.as_mut_ptr());
    for_rows(team, rows, heads * rope.head_dim, |row| {
        // SAFETY: lengths are checked; each row has one task.
        let x = unsafe { data.slice(row * stride, heads * rope.head_dim) };
        let angles = row * half..(row + 1) * half;
        isa.run(RotateRow { rope, cos: &rope.cos[angles.clone()], sin: &rope.sin[angles], x });
    });
}

struct RotateRow<'a> {
    rope: Rope<'a>,
    cos: &'a [f32],
    sin: &'a [f32],
    x: &'a mut [f32],
}

impl SimdOp for RotateRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for head in self.x.chunks_exact_mut(self.rope.head_dim) {
            let head = &mut head[..self.rope.rotary_dim];
            match self.rope.pairs {
                RopePairs::Interleaved => {
                    for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(self.cos).zip(self.sin) {
                        let (a, b) = (pair[0], pair[1]);
                        pair[0] = a * cos - b * sin;
                        pair[1] = a * sin + b * cos;
                    }
                }
                RopePairs::HalfSplit => {
                    let (first, second) = head.split_at_mut(self.rope.rotary_dim / 2);
                    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(self.cos).zip(self.sin) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
            }
        }
    }
}

/// `out = silu(gate) * up` of rows `[gate | up]`, each `width` wide; `quant` receives the 16-bit form
/// too. `silu(x) = x / (1 + exp(-x))`, relative error below 1e-6.
///
/// # Panics
/// If a length does not fit.
pub fn silu_mul(
    team: &mut Team,
    isa: Isa,
    rows: usize,
    width: usize,
    gate_up: &[f32],
    out: &mut [f32],
    quant: Option<&mut QuantRows>,
) {
    assert!(2 * rows * width <= gate_up.len() && rows * width <= out.len(), "rows of gate and up");
    let quant = QuantOut::new(quant, rows, width);
    let out = Shared(out.as_mut_ptr());
    for_rows(team, rows, 2 * width, |row| {
        let (gate, up) = gate_up[2 * row * width..2 * (row + 1) * width].split_at(width);
        // SAFETY: lengths are checked; each row has one task.
        let (out, quant) = unsafe { (out.slice(row * width, width), quant.map(|quant| quant.row(row))) };
        isa.run(SiluRow { gate, up, out, quant });
    });
}

struct SiluRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
    quant: Option<&'a mut [ActBlock]>,
}

impl SimdOp for SiluRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = s.splat(1.0);
        let minus = s.splat(-std::f32::consts::LOG2_E);
        for ((out, gate), up) in
            self.out.chunks_mut(LANES).zip(self.gate.chunks(LANES)).zip(self.up.chunks(LANES))
        {
            let (gate, up) = (load_part(s, gate), load_part(s, up));
            let below = s.add(one, s.exp2(s.mul(gate, minus)));
            let y = s.to_array(s.mul(s.div(gate, below), up));
            out.copy_from_slice(&y[..out.len()]);
        }
        if let Some(blocks) = self.quant {
            quantize_row(s, self.out, blocks);
        }
    }
}

/// Quantises `rows` rows `[rows, quant.width()]`.
///
/// # Panics
/// If a length does not fit.
pub fn quantize(team: &mut Team, isa: Isa, rows: usize, x: &[f32], quant: &mut QuantRows) {
    let width = quant.width();
    debug_assert_eq!(width % QUANT_BLOCK, 0);
    assert!(rows * width <= x.len(), "rows of the 16-bit form's width");
    let Some(out) = QuantOut::new(Some(quant), rows, width) else { return };
    for_rows(team, rows, width, |row| {
        let x = &x[row * width..(row + 1) * width];
        // SAFETY: each row has one task.
        isa.run(QuantizeRow { x, blocks: unsafe { out.row(row) } });
    });
}

struct QuantizeRow<'a> {
    x: &'a [f32],
    blocks: &'a mut [ActBlock],
}

impl SimdOp for QuantizeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        quantize_row(s, self.x, self.blocks);
    }
}
