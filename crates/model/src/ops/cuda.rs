//! The decoder on a CUDA device with fixed buffers, so that a step can be captured as a graph.
//!
//! This is the skeleton of the fast path, in f32: it proves that [`Ops`] carries graph capture
//! (ADR 0003) and is checked against the reference backend. It is not offered as a serving
//! backend yet: `backend = "cuda"` runs [`super::reference`] on the device.
//!
//! Every operation reads what changes between steps through [`StepArrays`]. Folds change which
//! slots are free; their place is [`Ops::upload`], on the host's bookkeeping, before the launches.
//! For now a batch that would fold is refused.

use locket_kernels::cuda::{
    Buffer, Device, Error as CudaError, Graph, HeadLayout, Rotation, StepArrays, StepLimits, StepRows,
};

use super::{Ops, OpsConfig, RawTensor, Reg, WeightSpec, rope};
use crate::{
    BlockId, Error, Extras, MemoryUse,
    adapter::{Linear, LoraPair},
    batch::Batch,
    config::RopeStyle,
    kv_cache::{
        self, BlockState, CacheGeometry, CachePlan, CacheSettings, FoldContext, Segment, SideArrays, SlotType,
    },
};

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        Self::Device(error.to_string())
    }
}

/// A dense f32 matrix `[outputs, inputs]`, or a norm's vector, in device memory.
#[derive(Debug)]
pub struct CudaWeight {
    values: Buffer<f32>,
    bias: Option<Buffer<f32>>,
    outputs: usize,
    inputs: usize,
}

/// Where one block lies in the cache buffers.
#[derive(Debug, Clone, Copy)]
struct Place {
    base: usize,
    capacity: usize,
}

/// The backend: device, registers, cache and the host's view of the blocks.
pub struct CudaOps {
    config: OpsConfig,
    device: Device,
    arrays: StepArrays,
    rows: StepRows,
    rotation: Rotation,
    registers: [Buffer<f32>; 6],
    samples: Buffer<f32>,
    logits: Buffer<f32>,
    keys: Buffer<f32>,
    values: Buffer<f32>,
    places: Vec<Place>,
    states: Vec<BlockState>,
    fold_context: FoldContext,
    weight_bytes: u64,
}

/// Handle of an uploaded batch; the arrays themselves stay in the backend.
#[derive(Debug, Clone, Copy)]
pub struct CudaStep {
    rows: usize,
    samples: usize,
}

fn index(reg: Reg) -> usize {
    match reg {
        Reg::H => 0,
        Reg::X => 1,
        Reg::Qkv => 2,
        Reg::Attn => 3,
        Reg::GateUp => 4,
        Reg::Act => 5,
    }
}

impl CudaOps {
    /// Allocates registers and cache on device `ordinal`.
    ///
    /// # Errors
    /// [`Error::Plan`] for slot types other than f32, [`Error::Device`] if the device refuses.
    pub fn new(config: OpsConfig, ordinal: usize) -> Result<Self, Error> {
        if config.cache.slot_type != SlotType::F32 {
            return Err(Error::Plan("the CUDA decode skeleton keeps f32 slots only".into()));
        }
        let device = Device::new(ordinal)?;
        let model = &config.model;
        let rows = config.max_batch_rows;
        let geometry = config.cache.geometry;
        let (places, cache_len) = places(&config.cache);
        let limits = StepLimits {
            max_rows: rows,
            layers: model.num_layers,
            kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
            vocab: model.vocab_size,
            cache_len,
        };
        let (inv_freq, factor) = rope::frequencies(&model.rope);
        let rotation = device.rotation(&inv_freq, factor, model.rope.style == RopeStyle::Interleaved)?;
        let wide = model.hidden_size.max(model.q_dim());
        let registers = [
            device.zeros(rows * model.hidden_size)?,
            device.zeros(rows * wide)?,
            device.zeros(rows * model.qkv_dim())?,
            device.zeros(rows * model.q_dim())?,
            device.zeros(rows * 2 * model.intermediate_size)?,
            device.zeros(rows * model.intermediate_size)?,
        ];
        Ok(Self {
            arrays: device.step_arrays(limits)?,
            rows: StepRows::default(),
            rotation,
            registers,
            samples: device.zeros(rows * model.hidden_size)?,
            logits: device.zeros(rows * model.vocab_size)?,
            keys: device.zeros(cache_len)?,
            values: device.zeros(cache_len)?,
            states: places
                .iter()
                .map(|place| BlockState::new(geometry, place.capacity, SideArrays::default()))
                .collect(),
            places,
            fold_context: FoldContext {
                rotation: kv_cache::Rotation::of(&config.model),
                side_car: None,
                slot_type: SlotType::F32,
            },
            weight_bytes: 0,
            device,
            config,
        })
    }

    fn layout(&self) -> HeadLayout {
        let model = &self.config.model;
        HeadLayout { heads: model.num_heads, kv_heads: model.num_kv_heads, head_dim: model.head_dim }
    }

    /// Sample rows of `residual + delta`, normed, into [`Self::samples`].
    fn final_norm(
        &self,
        step: &CudaStep,
        norm: &CudaWeight,
        [residual, delta]: [Reg; 2],
    ) -> Result<(), Error> {
        let (eps, width) = (self.config.model.rms_norm_eps, self.config.model.hidden_size);
        let (residual, delta) = (self.reg(residual), self.reg(delta));
        self.device.gather_sum(&self.arrays, residual, delta, &self.samples, width)?;
        self.device.add_rms_norm(step.samples, &self.samples, None, &norm.values, &self.samples, eps)?;
        Ok(())
    }

    fn reg(&self, reg: Reg) -> &Buffer<f32> {
        &self.registers[index(reg)]
    }

    /// Copies a register `[rows, width]` to the host, after everything before has run.
    pub fn read(&self, reg: Reg, rows: usize, width: usize) -> Result<Vec<f32>, Error> {
        let mut values = self.device.read(self.reg(reg))?;
        values.truncate(rows * width);
        Ok(values)
    }

    /// From here on operations are recorded instead of executed, until [`Self::end_capture`].
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn begin_capture(&self) -> Result<(), Error> {
        Ok(self.device.begin_capture()?)
    }

    /// Ends a capture; must be called even when an operation in between has failed.
    ///
    /// # Errors
    /// [`Error::Device`] if something cannot be captured.
    pub fn end_capture(&self) -> Result<Graph, Error> {
        Ok(self.device.end_capture()?)
    }

    /// Waits until everything launched so far has run.
    pub fn synchronize(&self) -> Result<(), Error> {
        Ok(self.device.synchronize()?)
    }
}

/// Where each block of the plan begins, and the elements of all.
fn places(plan: &CachePlan) -> (Vec<Place>, usize) {
    let CacheGeometry { num_layers, num_kv_heads, head_dim, .. } = plan.geometry;
    let mut places = Vec::new();
    let mut base = 0;
    for class in &plan.classes {
        for _ in 0..class.blocks {
            let capacity = class.capacity as usize;
            places.push(Place { base, capacity });
            base += num_layers * num_kv_heads * head_dim * capacity;
        }
    }
    (places, base)
}

fn not_held() -> Error {
    Error::InvalidBatch("the CUDA decode skeleton drops no tokens yet".into())
}

impl Ops for CudaOps {
    type Weight = CudaWeight;
    type Step = CudaStep;
    type Lora = ();

    fn prepare(&mut self, spec: WeightSpec) -> Result<CudaWeight, Error> {
        let mut values = Vec::new();
        let (mut outputs, mut inputs) = (0, 1);
        for part in &spec.parts {
            let tensor = match part {
                RawTensor::Dense(tensor) => tensor.to_dtype(candle_core::DType::F32)?,
                RawTensor::Quantized(tensor) => tensor.dequantize(&candle_core::Device::Cpu)?,
            };
            match *tensor.dims() {
                [rows, columns] => (outputs, inputs) = (outputs + rows, columns),
                [rows] => outputs += rows,
                ref dims => return Err(Error::Device(format!("a weight of shape {dims:?}"))),
            }
            values.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
        }
        let bias = match &spec.bias {
            Some(bias) => {
                Some(self.device.buffer(&bias.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?)?)
            }
            None => None,
        };
        self.weight_bytes += (values.len() * size_of::<f32>()) as u64;
        Ok(CudaWeight { values: self.device.buffer(&values)?, bias, outputs, inputs })
    }

    fn upload(&mut self, batch: &Batch) -> Result<CudaStep, Error> {
        let model = &self.config.model;
        batch.check(self.config.max_batch_rows, model.vocab_size, model.hidden_size)?;
        if !batch.embedded.is_empty() || batch.first_layer > 0 {
            return Err(Error::InvalidBatch("the CUDA decode skeleton takes no embeddings yet".into()));
        }
        let blocks = self.states.len();
        for sequence in &batch.sequences {
            let Some(state) = self.states.get(sequence.block.0 as usize) else {
                let block = sequence.block.0;
                return Err(Error::InvalidBatch(format!("block {block} of {blocks}")));
            };
            let positions = batch.positions_of(sequence);
            state.check_append(0, positions)?;
            let whole = Segment { fold: false, compact: 0, rows: positions.len() };
            if (0..model.num_layers).any(|layer| state.next_segment(layer, positions) != whole) {
                return Err(Error::InvalidBatch("the CUDA decode skeleton does not fold yet".into()));
            }
            if batch.sequences.iter().filter(|other| other.block == sequence.block).count() > 1 {
                return Err(Error::InvalidBatch(format!("block {} is in the batch twice", sequence.block.0)));
            }
        }
        let (rows, layers) = (batch.num_rows(), self.config.model.num_layers);
        self.rows.ids.clone_from(&batch.ids);
        self.rows.positions.clone_from(&batch.positions);
        self.rows.sample_rows.clone_from(&batch.sample_rows);
        self.rows.base.clear();
        self.rows.capacity.clear();
        self.rows.slot.resize(layers * rows, 0);
        self.rows.visible.resize(layers * rows, 0);
        for sequence in &batch.sequences {
            let place = self.places[sequence.block.0 as usize];
            let state = &mut self.states[sequence.block.0 as usize];
            let range = sequence.rows.start as usize..sequence.rows.end as usize;
            self.rows.base.extend(range.clone().map(|_| place.base as u64));
            self.rows.capacity.extend(range.clone().map(|_| place.capacity as u32));
            for layer in 0..layers {
                let first = state.append(layer, batch.positions_of(sequence));
                for (offset, row) in range.clone().enumerate() {
                    self.rows.slot[layer * rows + row] = (first + offset) as u32;
                    self.rows.visible[layer * rows + row] = (first + offset + 1) as u32;
                }
            }
        }
        self.device.upload(&mut self.arrays, &self.rows)?;
        Ok(CudaStep { rows, samples: batch.sample_rows.len() })
    }

    fn embed(&mut self, _step: &CudaStep, table: &CudaWeight, dst: Reg) -> Result<(), Error> {
        Ok(self.device.embed(&self.arrays, &table.values, self.reg(dst), table.inputs)?)
    }

    fn rms_norm(&mut self, step: &CudaStep, weight: &CudaWeight, src: Reg, dst: Reg) -> Result<(), Error> {
        let eps = self.config.model.rms_norm_eps;
        let (src, dst) = (self.reg(src), self.reg(dst));
        Ok(self.device.add_rms_norm(step.rows, src, None, &weight.values, dst, eps)?)
    }

    fn add_rms_norm(
        &mut self,
        step: &CudaStep,
        weight: &CudaWeight,
        residual: Reg,
        delta: Reg,
        dst: Reg,
    ) -> Result<(), Error> {
        let eps = self.config.model.rms_norm_eps;
        let (residual, delta, dst) = (self.reg(residual), self.reg(delta), self.reg(dst));
        Ok(self.device.add_rms_norm(step.rows, residual, Some(delta), &weight.values, dst, eps)?)
    }

    fn linear(&mut self, step: &CudaStep, weight: &CudaWeight, src: Reg, dst: Reg) -> Result<(), Error> {
        let shape = (weight.outputs, weight.inputs);
        let [src, dst] = self
            .registers
            .get_disjoint_mut([index(src), index(dst)])
            .map_err(|_| Error::Device("linear cannot work in place".into()))?;
        Ok(self.device.linear(step.rows, &weight.values, weight.bias.as_ref(), src, dst, shape)?)
    }

    fn prepare_lora(&mut self, _pair: &LoraPair, _linear: Linear) -> Result<(), Error> {
        Err(Error::Plan("the CUDA decode skeleton takes no adapters yet".into()))
    }

    fn lora_bytes(_lora: &()) -> u64 {
        0
    }

    fn add_lora(
        &mut self,
        _step: &CudaStep,
        _rows: &[u32],
        _lora: &(),
        _registers: (Reg, Reg),
        _offset: usize,
    ) -> Result<(), Error> {
        Err(Error::InvalidBatch("the CUDA decode skeleton takes no adapters yet".into()))
    }

    fn reserve(&mut self, extras: &Extras) -> Result<(), Error> {
        if *extras == Extras::default() {
            return Ok(());
        }
        Err(Error::Plan("the CUDA decode skeleton takes no adapters and drops no tokens yet".into()))
    }

    fn head_norm(&mut self, step: &CudaStep, q: &CudaWeight, k: &CudaWeight) -> Result<(), Error> {
        let (eps, layout) = (self.config.model.rms_norm_eps, self.layout());
        Ok(self.device.head_norm(step.rows, layout, self.reg(Reg::Qkv), &q.values, &k.values, eps)?)
    }

    fn observe(&mut self, _step: &CudaStep, _layer: usize) -> Result<(), Error> {
        // Blocks of this backend have no side arrays, so no method that observes can be opened.
        Ok(())
    }

    fn write_rows(&mut self, _step: &CudaStep, _rows: &[f32]) -> Result<(), Error> {
        Err(not_held())
    }

    fn read_rows(&mut self, _step: &CudaStep, _reg: Reg, _out: &mut Vec<f32>) -> Result<(), Error> {
        Err(not_held())
    }

    fn check_held(&self, _block: BlockId, _positions: &[u32]) -> Result<(), Error> {
        Err(not_held())
    }

    fn remove_slots(&mut self, _block: BlockId, _layer: usize, _slots: &[u32]) -> Result<(), Error> {
        Err(not_held())
    }

    fn settle_block(&mut self, _block: BlockId, _next: u32) -> Result<(), Error> {
        Err(not_held())
    }

    fn rope(&mut self, _step: &CudaStep, _layer: usize) -> Result<(), Error> {
        Ok(self.device.rope(&self.arrays, self.layout(), self.reg(Reg::Qkv), &self.rotation)?)
    }

    fn attend(&mut self, _step: &CudaStep, layer: usize) -> Result<(), Error> {
        let (qkv, out) = (self.reg(Reg::Qkv), self.reg(Reg::Attn));
        let cache = (&self.keys, &self.values);
        Ok(self.device.attend(&self.arrays, self.layout(), layer, qkv, cache, out)?)
    }

    fn silu_mul(&mut self, step: &CudaStep) -> Result<(), Error> {
        let inner = self.config.model.intermediate_size;
        Ok(self.device.silu_mul(step.rows, self.reg(Reg::GateUp), self.reg(Reg::Act), inner)?)
    }

    fn logits(
        &mut self,
        step: &CudaStep,
        norm: &CudaWeight,
        head: &CudaWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.final_norm(step, norm, [residual, delta])?;
        let shape = (head.outputs, head.inputs);
        self.device.linear(step.samples, &head.values, None, &self.samples, &mut self.logits, shape)?;
        *out = self.device.read(&self.logits)?;
        out.truncate(step.samples * head.outputs);
        Ok(())
    }

    fn select_rows(&mut self, step: &mut CudaStep, rows: &[u32]) -> Result<(), Error> {
        self.rows.sample_rows.clear();
        self.rows.sample_rows.extend_from_slice(rows);
        self.device.upload(&mut self.arrays, &self.rows)?;
        step.samples = rows.len();
        Ok(())
    }

    fn states(
        &mut self,
        step: &CudaStep,
        norm: &CudaWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.final_norm(step, norm, [residual, delta])?;
        *out = self.device.read(&self.samples)?;
        out.truncate(step.samples * self.config.model.hidden_size);
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        match self.states.get_mut(block.0 as usize) {
            Some(state) => state.open(settings, &self.fold_context),
            None => Err(Error::InvalidBatch(format!("there is no block {}", block.0))),
        }
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        // Device-to-device copies come with the serving path; nothing here forks sequences.
        Err(Error::InvalidBatch(format!("block {} cannot be copied to {} on this backend", from.0, to.0)))
    }

    fn close_block(&mut self, block: BlockId) {
        if let Some(state) = self.states.get_mut(block.0 as usize) {
            state.close();
        }
    }

    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        Err(Error::InvalidBatch(format!("block {} cannot be exported from this backend", block.0)))
    }

    fn import_block(&mut self, block: BlockId, _image: &[u8]) -> Result<(), Error> {
        Err(Error::InvalidBatch(format!("block {} cannot be imported on this backend", block.0)))
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        self.states.get(block.0 as usize).map_or(0, BlockState::folded_tokens)
    }

    fn config(&self) -> &OpsConfig {
        &self.config
    }

    fn memory(&self) -> MemoryUse {
        let floats = |buffers: &[&Buffer<f32>]| buffers.iter().map(|b| b.len() as u64 * 4).sum();
        let registers: u64 = self.registers.iter().map(|buffer| buffer.len() as u64 * 4).sum();
        MemoryUse {
            weights: self.weight_bytes,
            workspace: registers + floats(&[&self.samples, &self.logits]),
            cache: floats(&[&self.keys, &self.values]),
        }
    }
}
