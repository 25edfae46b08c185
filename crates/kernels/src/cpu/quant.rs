//! Activations as 16-bit blocks, in two digits that the byte instructions can multiply.
//!
//! Eight bits are what comparable engines use, and they cost: on SmolLM2-135M they move logits by
//! 0.18 in the root mean square, enough to turn answers; sixteen bits by 0.0009 (both figures are
//! printed by `crates/model/tests/quantized_llama.rs`). The price is a second multiply-add per
//! weight register, which is nothing where products wait for memory.

use super::simd::{LANES, Simd};

/// Numbers that share a scale, in weights and in activations.
pub const QUANT_BLOCK: usize = 32;

/// The base of the two digits: each lies within ±127, so that no byte instruction saturates.
pub(super) const DIGIT_BASE: i32 = 255;

/// The largest number that two digits write: `127 * 255 + 127`.
const LARGEST: f32 = 32512.0;

/// 32 activations: `x ≈ scale * q` with `q = 255 high + low`, rounded to nearest, within ±32512.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(16))]
pub(super) struct ActBlock {
    /// High digits, within ±127.
    pub(super) high: [i8; QUANT_BLOCK],
    /// Low digits, within ±127.
    pub(super) low: [i8; QUANT_BLOCK],
    /// Largest magnitude / 32512; NaN if any number was not finite, so that results show it.
    pub(super) scale: f32,
    /// `scale * sum(q)`: the share of a weight block's minimum.
    pub(super) scaled_sum: f32,
    /// `-128 * sum(q)`: takes back the offset that makes signed weights unsigned.
    pub(super) offset: i32,
}

impl ActBlock {
    /// Number `i` without its scale.
    #[inline(always)]
    pub(super) fn q(&self, i: usize) -> i32 {
        DIGIT_BASE * i32::from(self.high[i]) + i32::from(self.low[i])
    }
}

/// Rows of activations in 16 bits: 32 numbers share an f32 scale.
#[derive(Debug, Clone)]
pub struct QuantRows {
    blocks: Vec<ActBlock>,
    max_rows: usize,
    width: usize,
}

impl QuantRows {
    /// Room for `max_rows` rows of `width` numbers.
    ///
    /// # Panics
    /// If `width` is no multiple of 32: such an activation has no 16-bit form.
    pub fn new(max_rows: usize, width: usize) -> Self {
        assert_eq!(width % QUANT_BLOCK, 0, "16-bit rows are whole blocks of {QUANT_BLOCK}");
        Self { blocks: vec![ActBlock::default(); max_rows * width / QUANT_BLOCK], max_rows, width }
    }

    /// Bytes of one row of `width` numbers.
    pub fn row_bytes(width: usize) -> usize {
        width.div_ceil(QUANT_BLOCK) * size_of::<ActBlock>()
    }

    /// Rows that fit.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Numbers in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes held.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.blocks.as_slice())
    }

    /// The numbers that row `row` stands for, into `out [width]` (for tests and inspection).
    ///
    /// # Panics
    /// If the row does not exist or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.width, "one row");
        let blocks = &self.blocks()[row * self.blocks_per_row()..][..self.blocks_per_row()];
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(QUANT_BLOCK)) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = block.scale * block.q(i) as f32;
            }
        }
    }

    pub(super) fn blocks_per_row(&self) -> usize {
        self.width / QUANT_BLOCK
    }

    pub(super) fn blocks(&self) -> &[ActBlock] {
        &self.blocks
    }

    pub(super) fn blocks_mut(&mut self) -> &mut [ActBlock] {
        &mut self.blocks
    }
}

/// Quantises one row. `row` has 32 numbers per block.
#[inline(always)]
pub(super) fn quantize_row<S: Simd>(s: S, row: &[f32], blocks: &mut [ActBlock]) {
    debug_assert_eq!(row.len(), blocks.len() * QUANT_BLOCK);
    for (x, block) in row.chunks_exact(QUANT_BLOCK).zip(blocks) {
        // SAFETY: a chunk has 32 numbers, each digit array 32 bytes.
        unsafe {
            let (a, b) = (s.load(x.as_ptr()), s.load(x.as_ptr().add(LANES)));
            let largest = f32::from_bits(s.max_abs_bits(a, b));
            // Below this, LARGEST / largest would overflow; such a block is 0 for all purposes.
            let by = if largest < 1e-30 || !largest.is_finite() { 0.0 } else { LARGEST / largest };
            block.scale = if largest.is_finite() { largest / LARGEST } else { f32::NAN };
            let sum = if largest.is_finite() {
                let (high, low) = (block.high.as_mut_ptr(), block.low.as_mut_ptr());
                s.store_digits(high, low, a, by) + s.store_digits(high.add(LANES), low.add(LANES), b, by)
            } else {
                block.high = [0; QUANT_BLOCK];
                block.low = [0; QUANT_BLOCK];
                0
            };
            block.scaled_sum = block.scale * sum as f32;
            block.offset = -128 * sum;
        }
    }
}
