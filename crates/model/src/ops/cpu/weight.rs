//! Weights in the form of the CPU kernels.

use std::borrow::Cow;

use candle_core::{
    DType, Tensor,
    quantized::{GgmlDType, QTensor, QuantizedType},
};
use locket_kernels::cpu::{
    Activations, Destination, Isa, PackedMatrix, QuantRows, Team, WeightFormat, matmul,
};

use crate::{
    Error,
    ops::{RawTensor, WeightRole, WeightSpec},
};

/// A prepared weight of [`CpuOps`](super::CpuOps).
pub struct CpuWeight(pub(super) Form);

pub(super) enum Form {
    /// `[width]`.
    Norm(Vec<f32>),
    Matrix(Matrix),
}

/// Matrices stacked along their rows. Neighbours of one stored type are packed as one.
pub(super) struct Matrix {
    parts: Vec<Part>,
    bias: Option<Vec<f32>>,
    pub(super) rows: usize,
    cols: usize,
}

enum Part {
    Packed(PackedMatrix),
    /// A stored type without a kernel here: candle's row-by-row dot. It runs on candle's own threads,
    /// one pool for the process, whose size `OpsConfig::threads` cannot set: candle reads it from
    /// `CANDLE_NUM_THREADS`, else `RAYON_NUM_THREADS`, when the pool is first used, and takes all
    /// cores if neither is set.
    Candle {
        blocks: Box<dyn QuantizedType>,
        rows: usize,
        bytes: usize,
    },
}

/// The kernels' name of a stored type, if they have it.
pub(crate) fn kernel_format(dtype: GgmlDType) -> Option<WeightFormat> {
    match dtype {
        GgmlDType::Q4_0 => Some(WeightFormat::Q4_0),
        GgmlDType::Q4_1 => Some(WeightFormat::Q4_1),
        GgmlDType::Q8_0 => Some(WeightFormat::Q8_0),
        GgmlDType::F16 => Some(WeightFormat::F16),
        GgmlDType::BF16 => Some(WeightFormat::Bf16),
        GgmlDType::F32 => Some(WeightFormat::F32),
        _ => None,
    }
}

/// Stored rows of one type, not yet packed.
struct Stored<'a> {
    format: Option<WeightFormat>,
    /// Set if `format` is not.
    dtype: GgmlDType,
    bytes: Cow<'a, [u8]>,
    rows: usize,
}

impl CpuWeight {
    pub(super) fn prepare(spec: &WeightSpec) -> Result<Self, Error> {
        if spec.role == WeightRole::Norm {
            let [part] = spec.parts.as_slice() else {
                return Err(Error::Device(format!("a norm of {} parts", spec.parts.len())));
            };
            return Ok(Self(Form::Norm(numbers(part)?)));
        }
        let mut cols = 0;
        let mut stored: Vec<Stored<'_>> = Vec::new();
        for part in &spec.parts {
            let next = Stored::read(part, &mut cols)?;
            match stored.last_mut() {
                Some(last) if last.format == next.format && last.dtype == next.dtype => {
                    last.bytes.to_mut().extend_from_slice(&next.bytes);
                    last.rows += next.rows;
                }
                _ => stored.push(next),
            }
        }
        let rows = stored.iter().map(|part| part.rows).sum();
        let parts = stored.into_iter().map(|part| part.pack(cols)).collect::<Result<_, _>>()?;
        let bias = match &spec.bias {
            Some(bias) => Some(bias.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?),
            None => None,
        };
        if bias.as_ref().is_some_and(|bias| bias.len() != rows) {
            return Err(Error::Device(format!("a bias that has not the {rows} numbers of its weight")));
        }
        Ok(Self(Form::Matrix(Matrix { parts, bias, rows, cols })))
    }

    /// Bytes held.
    pub(super) fn num_bytes(&self) -> usize {
        match &self.0 {
            Form::Norm(weight) => size_of_val(weight.as_slice()),
            Form::Matrix(matrix) => {
                let bias = matrix.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()));
                bias + matrix.parts.iter().map(Part::num_bytes).sum::<usize>()
            }
        }
    }

    pub(super) fn matrix(&self) -> Result<&Matrix, Error> {
        match &self.0 {
            Form::Matrix(matrix) => Ok(matrix),
            Form::Norm(_) => Err(Error::Device("a norm's weight was used as a matrix".into())),
        }
    }

    pub(super) fn norm(&self) -> Result<&[f32], Error> {
        match &self.0 {
            Form::Norm(weight) => Ok(weight),
            Form::Matrix(_) => Err(Error::Device("a matrix was used as a norm's weight".into())),
        }
    }
}

fn numbers(part: &RawTensor) -> Result<Vec<f32>, Error> {
    let dense = match part {
        RawTensor::Dense(tensor) => tensor.clone(),
        RawTensor::Quantized(tensor) => tensor.dequantize(&candle_core::Device::Cpu)?,
    };
    Ok(dense.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

impl<'a> Stored<'a> {
    fn read(part: &'a RawTensor, cols: &mut usize) -> Result<Self, Error> {
        let (rows, width) = match part {
            RawTensor::Dense(tensor) => tensor.dims2()?,
            RawTensor::Quantized(tensor) => tensor.shape().dims2()?,
        };
        if *cols != 0 && *cols != width {
            return Err(Error::Device(format!("stacked matrices of {cols} and {width} columns")));
        }
        *cols = width;
        match part {
            RawTensor::Dense(tensor) => Self::dense(tensor, rows),
            RawTensor::Quantized(tensor) => Self::quantized(tensor, rows),
        }
    }

    fn dense(tensor: &Tensor, rows: usize) -> Result<Self, Error> {
        let flat = tensor.flatten_all()?;
        let (format, dtype, bytes) = match tensor.dtype() {
            DType::F16 => {
                let bytes = flat.to_vec1::<half::f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
                (WeightFormat::F16, GgmlDType::F16, bytes)
            }
            DType::BF16 => {
                let bytes = flat.to_vec1::<half::bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
                (WeightFormat::Bf16, GgmlDType::BF16, bytes)
            }
            _ => {
                let flat = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                (WeightFormat::F32, GgmlDType::F32, flat.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
        };
        Ok(Self { format: Some(format), dtype, bytes: Cow::Owned(bytes), rows })
    }

    fn quantized(tensor: &'a QTensor, rows: usize) -> Result<Self, Error> {
        let dtype = tensor.dtype();
        Ok(Self { format: kernel_format(dtype), dtype, bytes: tensor.data()?, rows })
    }

    fn pack(self, cols: usize) -> Result<Part, Error> {
        let Some(format) = self.format else {
            let bytes = self.bytes.len();
            return Ok(Part::Candle { blocks: self.dtype.from_data(self.bytes), rows: self.rows, bytes });
        };
        PackedMatrix::pack(format, &self.bytes, self.rows, cols)
            .map(Part::Packed)
            .map_err(|error| Error::Device(format!("packing a {:?} matrix: {error}", self.dtype)))
    }
}

impl Part {
    fn rows(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.rows(),
            Self::Candle { rows, .. } => *rows,
        }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.num_bytes(),
            Self::Candle { bytes, .. } => *bytes,
        }
    }
}

impl Matrix {
    /// Whether a product reads the 16-bit form of its input.
    pub(super) fn takes_quantized(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Packed(packed) if packed.is_quantized()))
    }

    /// Numbers per input row that a product needs as scratch.
    pub(super) fn scratch_width(&self) -> usize {
        let candle = self.parts.iter().filter(|part| matches!(part, Part::Candle { .. }));
        if self.parts.len() == 1 { 0 } else { candle.map(Part::rows).max().unwrap_or(0) }
    }

    /// Row `row`, widened into `out [cols]`.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.rows() {
                match part {
                    Part::Packed(packed) => packed.read_row(row - first, out),
                    Part::Candle { blocks, rows, .. } => {
                        let ids = [(row - first) as u32];
                        let storage = blocks.embedding(&ids, *rows, self.cols)?;
                        out.copy_from_slice(storage.as_slice::<f32>()?);
                    }
                }
                return Ok(());
            }
            first += part.rows();
        }
        Err(Error::InvalidBatch(format!("row {row} of a table of {}", self.rows)))
    }

    /// `out [rows, self.rows] = x weightᵀ + bias`.
    pub(super) fn product(
        &self,
        team: &mut Team,
        isa: Isa,
        input: Input<'_>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) -> Result<(), Error> {
        let mut offset = 0;
        let rows = input.rows;
        for part in &self.parts {
            let bias = self.bias.as_ref().map(|bias| &bias[offset..offset + part.rows()]);
            match part {
                Part::Packed(packed) => {
                    let x = match input.quant {
                        Some(quant) if packed.is_quantized() => Activations::Quant(quant),
                        _ => Activations::F32(input.x),
                    };
                    let destination = Destination { data: &mut *out, stride: self.rows, offset };
                    matmul(team, isa, packed, x, rows, bias, destination);
                }
                Part::Candle { blocks, rows: width, .. } => {
                    let shape = (rows, self.cols, *width);
                    let x = &input.x[..rows * self.cols];
                    if self.parts.len() == 1 {
                        blocks.matmul_t(shape, x, &mut out[..rows * width])?;
                    } else {
                        let product = &mut scratch[..rows * width];
                        blocks.matmul_t(shape, x, product)?;
                        for (row, product) in product.chunks_exact(*width).enumerate() {
                            out[row * self.rows + offset..][..*width].copy_from_slice(product);
                        }
                    }
                    if let Some(bias) = bias {
                        for out in out.chunks_exact_mut(self.rows).take(rows) {
                            for (out, bias) in out[offset..].iter_mut().zip(bias) {
                                *out += bias;
                            }
                        }
                    }
                }
            }
            offset += part.rows();
        }
        Ok(())
    }
}

/// Input rows of a product.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// `[rows, cols]`.
    pub(super) x: &'a [f32],
    /// Their 16-bit form, if the weight takes it.
    pub(super) quant: Option<&'a QuantRows>,
    pub(super) rows: usize,
}
