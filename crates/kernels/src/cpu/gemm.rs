//! `out = x * weightᵀ + bias` over packed weights, shared among a team.
//!
//! A task owns some groups of 16 output features and computes them for all rows, a panel of rows
//! at a time so that the panel's activations stay in the second-level cache; within a panel each
//! weight register that was loaded and widened is used for up to [`WIDEST`] rows. Each output
//! element has its own accumulator and walks the columns in order, so it does not notice who else
//! is in the tile.

use super::{
    Isa, PackedMatrix, QuantRows, Shared, Team,
    isa::Level,
    packed::{Layout, Q4_BLOCK_BYTES, Q8_BLOCK_BYTES},
    quant::ActBlock,
    simd::LANES,
};

/// Most rows that share one pass over a weight group.
pub(super) const WIDEST: usize = 8;

/// Bytes of activations that a panel may take: a share of the second-level cache, small enough that
/// the output lines of a panel, which a power-of-two stride maps to few sets, stay there too.
const PANEL_BYTES: usize = 64 << 10;

/// Multiply-adds below which a product is not worth another thread's attention (about 2 µs).
const SERIAL_MACS: usize = 64 << 10;

/// The input rows of a product, in the form that the weight asks for.
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// `[rows, cols]`, for dense weights.
    F32(&'a [f32]),
    /// For quantised weights.
    Quant(&'a QuantRows),
}

/// Where a product goes: columns `offset..offset + weight.rows()` of rows of `stride` numbers.
#[derive(Debug)]
pub struct Destination<'a> {
    /// At least `rows * stride` numbers.
    pub data: &'a mut [f32],
    /// Numbers from one row to the next.
    pub stride: usize,
    /// First column written.
    pub offset: usize,
}

/// `out[row, offset + i] = sum over k of x[row, k] weight[i, k], + bias[i]` for `rows` rows.
///
/// Depth is walked in order with f32 accumulators: quantised weights add one block of 32 at a
/// time (an exact integer dot, scaled), dense ones one number at a time.
///
/// # Panics
/// If a length or the form of `x` contradicts the weight.
pub fn matmul(
    team: &mut Team,
    isa: Isa,
    weight: &PackedMatrix,
    x: Activations<'_>,
    rows: usize,
    bias: Option<&[f32]>,
    out: Destination<'_>,
) {
    assert!(bias.is_none_or(|bias| bias.len() == weight.rows()), "a bias per output feature");
    assert!(out.offset + weight.rows() <= out.stride, "the product fits into an output row");
    assert!(rows * out.stride <= out.data.len(), "the output has room for all rows");
    let job = Job {
        weight,
        rows,
        bias,
        out: Shared(out.data.as_mut_ptr()),
        out_stride: out.stride,
        out_offset: out.offset,
    };
    match x {
        Activations::Quant(x) => {
            assert!(weight.is_quantized(), "dense weights take f32 activations");
            assert_eq!(x.width(), weight.cols(), "input features");
            assert!(rows <= x.max_rows(), "input rows");
            let tiles = quant_tiles(isa, weight.layout());
            job.run(team, &tiles, x.blocks().as_ptr(), x.blocks_per_row(), x.blocks_per_row());
        }
        Activations::F32(x) => {
            assert!(!weight.is_quantized(), "quantised weights take 16-bit activations");
            assert!(rows * weight.cols() <= x.len(), "input rows");
            let tiles = dense_tiles(isa, weight.layout());
            job.run(team, &tiles, x.as_ptr(), weight.cols(), weight.cols());
        }
    }
}

/// Computes one group of 16 output features for as many rows as its entry in [`Tiles`] says:
/// `(weights, depth, first row, numbers or blocks from row to row, out [rows][16])`.
pub(super) type TileFn<A> = unsafe fn(*const u8, usize, *const A, usize, *mut [f32; LANES]);

/// Tile kernels for 8, 4, 2 and 1 rows.
pub(super) type Tiles<A> = [TileFn<A>; 4];

const TILE_ROWS: [usize; 4] = [WIDEST, 4, 2, 1];

struct Job<'a> {
    weight: &'a PackedMatrix,
    rows: usize,
    bias: Option<&'a [f32]>,
    out: Shared<f32>,
    out_stride: usize,
    out_offset: usize,
}

impl Job<'_> {
    fn run<A: Send + Sync>(
        &self,
        team: &mut Team,
        tiles: &Tiles<A>,
        x: *const A,
        x_stride: usize,
        depth: usize,
    ) {
        let groups = self.weight.num_groups();
        let macs = groups * LANES * self.weight.cols() * self.rows;
        let wanted = if macs <= SERIAL_MACS { 1 } else { team.num_threads() * 8 };
        let per_task = groups.div_ceil(wanted).max(1);
        let panel = (PANEL_BYTES / (x_stride * size_of::<A>()).max(1)).max(WIDEST) / WIDEST * WIDEST;
        let x = Shared(x.cast_mut());
        team.run(groups.div_ceil(per_task), |_, task| {
            let groups = task * per_task..groups.min((task + 1) * per_task);
            for first in (0..self.rows).step_by(panel) {
                let rows = first..self.rows.min(first + panel);
                for group in groups.clone() {
                    // SAFETY: `matmul` has checked that all rows of `x` are there and read-only,
                    // and that the output has the columns of this group, which is this task's.
                    unsafe { self.group(tiles, group, rows.clone(), x.get(), x_stride, depth) };
                }
            }
        });
    }

    /// One group of output features for a panel of rows.
    ///
    /// # Safety
    /// `x` has `rows.end` rows of `x_stride`; nobody else writes this group's columns.
    unsafe fn group<A>(
        &self,
        tiles: &Tiles<A>,
        group: usize,
        rows: std::ops::Range<usize>,
        x: *const A,
        x_stride: usize,
        depth: usize,
    ) {
        let mut tile = [[0.0; LANES]; WIDEST];
        let weights = self.weight.group(group).as_ptr();
        let first = group * LANES;
        let width = LANES.min(self.weight.rows() - first);
        let mut row = rows.start;
        for (tile_rows, kernel) in TILE_ROWS.into_iter().zip(tiles) {
            while rows.end - row >= tile_rows {
                // SAFETY: the caller's promise; the tile has room for the widest kernel.
                unsafe { kernel(weights, depth, x.add(row * x_stride), x_stride, tile.as_mut_ptr()) };
                for (i, tile) in tile[..tile_rows].iter_mut().enumerate() {
                    if let Some(bias) = self.bias {
                        for (x, bias) in tile.iter_mut().zip(&bias[first..]) {
                            *x += bias;
                        }
                    }
                    let at = (row + i) * self.out_stride + self.out_offset + first;
                    // SAFETY: checked in `matmul`; the caller's promise of exclusive columns.
                    unsafe { self.out.slice(at, width) }.copy_from_slice(&tile[..width]);
                }
                row += tile_rows;
            }
        }
    }
}

fn quant_tiles(isa: Isa, layout: Layout) -> Tiles<ActBlock> {
    let q4 = layout == Layout::Q4;
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if q4 => super::gemm_avx512::Q4,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::gemm_avx512::Q8,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 if q4 => super::gemm_avx2::Q4,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => super::gemm_avx2::Q8,
        _ if q4 => [q4_scalar::<8>, q4_scalar::<4>, q4_scalar::<2>, q4_scalar::<1>],
        _ => [q8_scalar::<8>, q8_scalar::<4>, q8_scalar::<2>, q8_scalar::<1>],
    }
}

fn dense_tiles(isa: Isa, layout: Layout) -> Tiles<f32> {
    match (isa.level(), layout) {
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Layout::F16) => super::gemm_avx512::F16,
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Layout::Bf16) => super::gemm_avx512::BF16,
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, _) => super::gemm_avx512::F32,
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Layout::F16) => super::gemm_avx2::F16,
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Layout::Bf16) => super::gemm_avx2::BF16,
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, _) => super::gemm_avx2::F32,
        (_, Layout::F16) => dense_scalar_tiles!(Layout::F16),
        (_, Layout::Bf16) => dense_scalar_tiles!(Layout::Bf16),
        _ => dense_scalar_tiles!(Layout::F32),
    }
}

/// A half from packed bytes.
unsafe fn half_at(p: *const u8, i: usize) -> f32 {
    // SAFETY: the caller's promise that half `i` exists.
    half::f16::from_bits(unsafe { p.cast::<u16>().add(i).read_unaligned() }).to_f32()
}

unsafe fn q4_scalar<const C: usize>(
    w: *const u8,
    depth: usize,
    x: *const ActBlock,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    for c in 0..C {
        let mut acc = [0f32; LANES];
        for b in 0..depth {
            // SAFETY: a group has `depth` blocks, and so has a row.
            let (block, y) = unsafe { (w.add(b * Q4_BLOCK_BYTES), &*x.add(c * x_stride + b)) };
            for (lane, acc) in acc.iter_mut().enumerate() {
                let mut dot = 0i32;
                for k in 0..16 {
                    // SAFETY: within the block's 256 bytes of nibbles.
                    let byte = unsafe { *block.add(k / 4 * 64 + lane * 4 + k % 4) };
                    dot += i32::from(byte & 15) * y.q(k);
                    dot += i32::from(byte >> 4) * y.q(k + 16);
                }
                // SAFETY: scales and minima follow the nibbles.
                let (scale, min) = unsafe { (half_at(block.add(256), lane), half_at(block.add(288), lane)) };
                *acc = (dot as f32).mul_add(scale * y.scale, *acc);
                *acc = min.mul_add(y.scaled_sum, *acc);
            }
        }
        // SAFETY: `out` has C rows.
        unsafe { *out.add(c) = acc };
    }
}

unsafe fn q8_scalar<const C: usize>(
    w: *const u8,
    depth: usize,
    x: *const ActBlock,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    for c in 0..C {
        let mut acc = [0f32; LANES];
        for b in 0..depth {
            // SAFETY: a group has `depth` blocks, and so has a row.
            let (block, y) = unsafe { (w.add(b * Q8_BLOCK_BYTES), &*x.add(c * x_stride + b)) };
            for (lane, acc) in acc.iter_mut().enumerate() {
                let mut dot = y.offset;
                for k in 0..32 {
                    // SAFETY: within the block's 512 bytes.
                    let byte = unsafe { *block.add(k / 4 * 64 + lane * 4 + k % 4) };
                    dot += i32::from(byte) * y.q(k);
                }
                // SAFETY: scales follow the last block.
                let scale = unsafe { half_at(w.add(depth * Q8_BLOCK_BYTES), b * LANES + lane) };
                *acc = (dot as f32).mul_add(scale * y.scale, *acc);
            }
        }
        // SAFETY: `out` has C rows.
        unsafe { *out.add(c) = acc };
    }
}

macro_rules! dense_scalar_tiles {
    ($layout:expr) => {
        [
            // SAFETY: the promise of [`TileFn`]'s callers.
            |w, d, x, s, o| unsafe { dense_scalar::<8>($layout, w, d, x, s, o) },
            // SAFETY: the promise of [`TileFn`]'s callers.
            |w, d, x, s, o| unsafe { dense_scalar::<4>($layout, w, d, x, s, o) },
            // SAFETY: the promise of [`TileFn`]'s callers.
            |w, d, x, s, o| unsafe { dense_scalar::<2>($layout, w, d, x, s, o) },
            // SAFETY: the promise of [`TileFn`]'s callers.
            |w, d, x, s, o| unsafe { dense_scalar::<1>($layout, w, d, x, s, o) },
        ]
    };
}
use dense_scalar_tiles;

unsafe fn dense_scalar<const C: usize>(
    layout: Layout,
    w: *const u8,
    depth: usize,
    x: *const f32,
    x_stride: usize,
    out: *mut [f32; LANES],
) {
    for c in 0..C {
        let mut acc = [0f32; LANES];
        for k in 0..depth {
            // SAFETY: a row has `depth` numbers.
            let x = unsafe { *x.add(c * x_stride + k) };
            for (lane, acc) in acc.iter_mut().enumerate() {
                let at = k * LANES + lane;
                // SAFETY: a group has 16 numbers per column.
                let w = unsafe {
                    match layout {
                        Layout::F16 => half_at(w, at),
                        Layout::Bf16 => {
                            half::bf16::from_bits(w.cast::<u16>().add(at).read_unaligned()).to_f32()
                        }
                        _ => w.cast::<f32>().add(at).read_unaligned(),
                    }
                };
                *acc = w.mul_add(x, *acc);
            }
        }
        // SAFETY: `out` has C rows.
        unsafe { *out.add(c) = acc };
    }
}
