//! Weight matrices reordered so that one vector register holds the same columns of 16 rows.

use half::{bf16, f16};

use super::{AlignedBuf, QUANT_BLOCK, simd::LANES};

/// How a matrix is stored row by row before it is packed, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// GGML `Q4_0`: blocks of 32, scale f16, `x = d (q - 8)`.
    Q4_0,
    /// GGML `Q4_1`: blocks of 32, scale and minimum f16, `x = d q + m`.
    Q4_1,
    /// GGML `Q8_0`: blocks of 32, scale f16, `x = d q`.
    Q8_0,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single.
    F32,
}

impl WeightFormat {
    /// Bytes of one stored row of `cols` numbers.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Q4_0 => cols / QUANT_BLOCK * 18,
            Self::Q4_1 => cols / QUANT_BLOCK * 20,
            Self::Q8_0 => cols / QUANT_BLOCK * 34,
            Self::F16 | Self::Bf16 => cols * 2,
            Self::F32 => cols * 4,
        }
    }

    /// Whether products with it take 16-bit activations.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q4_0 | Self::Q4_1 | Self::Q8_0)
    }
}

/// Why a matrix cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Quantised rows are whole blocks.
    #[error("{cols} columns are not a multiple of 32, as quantised rows must be")]
    Columns {
        /// Columns asked for.
        cols: usize,
    },
    /// Not as many bytes as the shape needs.
    #[error("{got} bytes for a matrix that has {want}")]
    Length {
        /// Bytes given.
        got: usize,
        /// Bytes that shape and format ask for.
        want: usize,
    },
    /// A `Q4_0` scale so large that eight times it is no half.
    #[error("the scale of a Q4_0 block exceeds 8188")]
    Scale,
}

/// The packed layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Per block of 32 columns: 256 bytes of nibbles, 16 scales, 16 minima (f16).
    /// Byte `64 c + 4 row + j` holds column `4c + j` low and `16 + 4c + j` high.
    Q4,
    /// Per block 512 bytes `q ^ 0x80`; byte `64 c + 4 row + j` holds column `4c + j`. After the
    /// last block 16 scales (f16) per block.
    Q8,
    /// Per column 16 halves.
    F16,
    /// Per column 16 bfloat16.
    Bf16,
    /// Per column 16 singles.
    F32,
}

pub(super) const Q4_BLOCK_BYTES: usize = 320;
pub(super) const Q8_BLOCK_BYTES: usize = 512;

/// A weight matrix `[rows, cols]` for [`matmul`](super::matmul): groups of 16 rows, interleaved.
/// A last group that is not full is padded with zero rows.
#[derive(Debug)]
pub struct PackedMatrix {
    layout: Layout,
    rows: usize,
    cols: usize,
    group_bytes: usize,
    data: AlignedBuf,
}

impl PackedMatrix {
    /// Packs `bytes`, `rows` rows of `cols` numbers in `format`. `Q4_0` becomes the form of `Q4_1`
    /// with the minimum `-8 d`, which is exact.
    ///
    /// # Errors
    /// See [`PackError`].
    pub fn pack(format: WeightFormat, bytes: &[u8], rows: usize, cols: usize) -> Result<Self, PackError> {
        if format.is_quantized() && !cols.is_multiple_of(QUANT_BLOCK) {
            return Err(PackError::Columns { cols });
        }
        let want = rows * format.row_bytes(cols);
        if bytes.len() != want {
            return Err(PackError::Length { got: bytes.len(), want });
        }
        let blocks = cols / QUANT_BLOCK;
        let (layout, group_bytes) = match format {
            WeightFormat::Q4_0 | WeightFormat::Q4_1 => (Layout::Q4, blocks * Q4_BLOCK_BYTES),
            WeightFormat::Q8_0 => (Layout::Q8, (blocks * (Q8_BLOCK_BYTES + 2 * LANES)).next_multiple_of(64)),
            WeightFormat::F16 => (Layout::F16, cols * 2 * LANES),
            WeightFormat::Bf16 => (Layout::Bf16, cols * 2 * LANES),
            WeightFormat::F32 => (Layout::F32, cols * 4 * LANES),
        };
        let mut data = AlignedBuf::zeroed(rows.div_ceil(LANES) * group_bytes);
        let row_bytes = format.row_bytes(cols);
        if row_bytes > 0 {
            for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                let group = &mut data.as_mut_slice::<u8>()[row / LANES * group_bytes..][..group_bytes];
                pack_row(format, bytes, group, row % LANES, blocks)?;
            }
        }
        Ok(Self { layout, rows, cols, group_bytes, data })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub fn num_bytes(&self) -> usize {
        self.data.num_bytes()
    }

    /// Whether products with it take 16-bit activations (else f32).
    pub fn is_quantized(&self) -> bool {
        matches!(self.layout, Layout::Q4 | Layout::Q8)
    }

    /// Row `row` widened into `out [cols]`: what an embedding looks up.
    ///
    /// # Panics
    /// If the row does not exist or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "one row");
        let group = self.group(row / LANES);
        let lane = row % LANES;
        let half_at = |bytes: &[u8], i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        match self.layout {
            Layout::Q4 => {
                for (block, out) in group.chunks_exact(Q4_BLOCK_BYTES).zip(out.chunks_exact_mut(QUANT_BLOCK))
                {
                    let scale = f16::from_bits(half_at(&block[256..], lane)).to_f32();
                    let min = f16::from_bits(half_at(&block[288..], lane)).to_f32();
                    for k in 0..16 {
                        let byte = block[k / 4 * 64 + lane * 4 + k % 4];
                        out[k] = scale * f32::from(byte & 15) + min;
                        out[k + 16] = scale * f32::from(byte >> 4) + min;
                    }
                }
            }
            Layout::Q8 => {
                let scales = &group[self.cols / QUANT_BLOCK * Q8_BLOCK_BYTES..];
                for (i, (block, out)) in
                    group.chunks_exact(Q8_BLOCK_BYTES).zip(out.chunks_exact_mut(QUANT_BLOCK)).enumerate()
                {
                    let scale = f16::from_bits(half_at(scales, i * LANES + lane)).to_f32();
                    for (k, out) in out.iter_mut().enumerate() {
                        let q = (block[k / 4 * 64 + lane * 4 + k % 4] ^ 0x80) as i8;
                        *out = scale * f32::from(q);
                    }
                }
            }
            Layout::F16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = f16::from_bits(half_at(group, k * LANES + lane)).to_f32();
                }
            }
            Layout::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = bf16::from_bits(half_at(group, k * LANES + lane)).to_f32();
                }
            }
            Layout::F32 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = 4 * (k * LANES + lane);
                    *out = f32::from_le_bytes([group[at], group[at + 1], group[at + 2], group[at + 3]]);
                }
            }
        }
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn num_groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The packed bytes of rows `16 group..16 group + 16`.
    pub(super) fn group(&self, group: usize) -> &[u8] {
        &self.data.as_slice::<u8>()[group * self.group_bytes..][..self.group_bytes]
    }
}

/// Scatters one stored row into lane `lane` of its group.
fn pack_row(
    format: WeightFormat,
    bytes: &[u8],
    group: &mut [u8],
    lane: usize,
    blocks: usize,
) -> Result<(), PackError> {
    match format {
        WeightFormat::Q4_0 | WeightFormat::Q4_1 => {
            let size = if format == WeightFormat::Q4_0 { 18 } else { 20 };
            for (block, out) in bytes.chunks_exact(size).zip(group.chunks_exact_mut(Q4_BLOCK_BYTES)) {
                let min = if format == WeightFormat::Q4_0 {
                    let min = f16::from_bits(u16::from_le_bytes([block[0], block[1]])).to_f32() * -8.0;
                    let min = f16::from_f32(min);
                    if min.is_infinite() {
                        return Err(PackError::Scale);
                    }
                    min.to_le_bytes()
                } else {
                    [block[2], block[3]]
                };
                out[256 + 2 * lane..][..2].copy_from_slice(&block[..2]);
                out[288 + 2 * lane..][..2].copy_from_slice(&min);
                for (c, quad) in block[size - 16..].chunks_exact(4).enumerate() {
                    out[64 * c + 4 * lane..][..4].copy_from_slice(quad);
                }
            }
        }
        WeightFormat::Q8_0 => {
            let (quants, scales) = group.split_at_mut(blocks * Q8_BLOCK_BYTES);
            for (i, (block, out)) in
                bytes.chunks_exact(34).zip(quants.chunks_exact_mut(Q8_BLOCK_BYTES)).enumerate()
            {
                scales[2 * (i * LANES + lane)..][..2].copy_from_slice(&block[..2]);
                for (c, quad) in block[2..].chunks_exact(4).enumerate() {
                    for (j, q) in quad.iter().enumerate() {
                        out[64 * c + 4 * lane + j] = q ^ 0x80;
                    }
                }
            }
        }
        WeightFormat::F16 | WeightFormat::Bf16 => scatter::<2>(bytes, group, lane),
        WeightFormat::F32 => scatter::<4>(bytes, group, lane),
    }
    Ok(())
}

/// Number `k` of the row goes to place `16 k + lane`.
fn scatter<const SIZE: usize>(bytes: &[u8], group: &mut [u8], lane: usize) {
    for (number, out) in bytes.chunks_exact(SIZE).zip(group.chunks_exact_mut(SIZE * LANES)) {
        out[SIZE * lane..][..SIZE].copy_from_slice(number);
    }
}
