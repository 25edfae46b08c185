//! Serving on CPUs: packed weights, flat registers with a 16-bit form, a thread team.
//!
//! Nothing is allocated in a step once the largest batch was seen (block formats without a kernel
//! here, which candle multiplies, are the exception). Every row's arithmetic is independent of
//! the rest of the batch, of chunking and of the number of threads, bit for bit.

mod cache;
mod geometry;
mod lora;
mod scorer;
mod weight;

use locket_kernels::cpu::{
    Isa, QUANT_BLOCK, QuantRows, Team,
    attention::{Attention, AttentionJob, AttentionRows, Received, ReceivedRows, SlotPositions, Window},
    kv::KvRows,
    rows::{self, RmsNorm, Rope, RopePairs},
};

use self::{
    cache::{Cache, NewRows},
    geometry::{REGISTERS, attention_shape, check_geometry, is_input, width_of},
    lora::{CpuLora, LoraScratch},
    scorer::Scorer,
    weight::{Form, Input},
};
use super::{Ops, OpsConfig, Reg, WeightSpec, rope};
use crate::{
    Batch, BlockId, Error, Extras, MemoryUse,
    adapter::{Linear, LoraPair},
    config::RopeStyle,
    kv_cache::{CacheSettings, most_slots},
};

pub use self::weight::CpuWeight;
pub(crate) use self::{geometry::workspace_bytes, weight::kernel_format};

/// A register `[max_batch_rows, width]`.
struct Register {
    width: usize,
    data: Vec<f32>,
    /// The 16-bit form, if this register can be a product's input and has whole blocks.
    quant: Option<QuantRows>,
    /// Whether the 16-bit form is that of `data`.
    quant_is_current: bool,
}

/// A batch that was uploaded to its [`CpuOps`]; valid until the next upload.
#[derive(Debug, Clone, Copy)]
pub struct CpuStep {
    rows: usize,
    samples: usize,
}

/// Packed kernels on CPU threads.
pub struct CpuOps {
    config: OpsConfig,
    isa: Isa,
    team: Team,
    registers: [Register; 6],
    cache: Cache,
    attention: Attention,
    batch: Batch,
    /// The positions that the batch's rows are rotated to.
    positions: Vec<u32>,
    /// For sequences with the learned cache method.
    scorer: Option<Scorer>,
    /// Where a layer's attention reports what slots received: per job, and the numbers.
    received_jobs: Vec<Option<Received>>,
    received: Vec<f32>,
    /// `[rows, rotary_dim / 2]` of the step.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The layer whose positions these are of.
    angles_of: usize,
    inv_freq: Vec<f32>,
    rope_factor: f32,
    /// Rows of each sequence that a layer's attention has done.
    done: Vec<usize>,
    jobs: Vec<AttentionJob>,
    /// Residual and normed rows of the head `[samples, hidden]`.
    head_residual: Vec<f32>,
    head: Register,
    /// For products that cannot go straight to their place.
    scratch: Vec<f32>,
    lora: LoraScratch,
    /// Whether any weight takes 16-bit activations.
    quantized: bool,
    weight_bytes: usize,
}

impl CpuOps {
    /// Starts the threads (`config.threads`, 0 for all cores that may be used) and allocates
    /// registers and blocks.
    ///
    /// # Errors
    /// [`Error::Config`] if the kernels cannot run this geometry, [`Error::Device`] if the system
    /// refuses a thread.
    pub fn new(config: OpsConfig) -> Result<Self, Error> {
        Self::with_isa(config, Isa::best())
    }

    /// As [`Self::new`], with the given instruction set; all give the same results.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_isa(config: OpsConfig, isa: Isa) -> Result<Self, Error> {
        let model = &config.model;
        check_geometry(model)?;
        let team = Team::new(config.threads).map_err(|error| Error::Device(format!("threads: {error}")))?;
        let rows = config.max_batch_rows;
        let registers = REGISTERS.map(|reg| Register::new(rows, width_of(model, reg), is_input(reg)));
        let cache = Cache::new(&config.cache, model, config.side_car.clone())?;
        let learned = config.side_car.as_ref().and_then(|side_car| side_car.learned.as_ref());
        let scorer = learned.map(|weights| Scorer::new(weights, model.head_dim, rows)).transpose()?;
        let slots = config.cache.classes.iter().map(|class| class.capacity as usize).max().unwrap_or(0);
        let shares = config.side_car.as_ref().and_then(|side_car| side_car.layer_shares.as_ref());
        let most = shares.map(|shares| most_slots(shares, slots, model.max_position));
        let slots = most.into_iter().flatten().max().unwrap_or(slots);
        let shape = attention_shape(model, cache.number);
        let (inv_freq, rope_factor) = rope::frequencies(&model.rope);
        let angles = rows * inv_freq.len();
        Ok(Self {
            isa,
            registers,
            attention: Attention::new(shape, team.num_threads()),
            team,
            batch: Batch::default(),
            positions: Vec::with_capacity(rows),
            weight_bytes: scorer.as_ref().map_or(0, Scorer::weight_bytes),
            scorer,
            received_jobs: Vec::with_capacity(cache.num_blocks()),
            received: Vec::with_capacity(slots * model.num_kv_heads),
            cos: Vec::with_capacity(angles),
            sin: Vec::with_capacity(angles),
            angles_of: 0,
            inv_freq,
            rope_factor,
            done: Vec::with_capacity(cache.num_blocks()),
            jobs: Vec::with_capacity(cache.num_blocks()),
            head_residual: vec![0.0; rows * model.hidden_size],
            head: Register::new(rows, model.hidden_size, true),
            scratch: Vec::new(),
            lora: LoraScratch::default(),
            quantized: false,
            cache,
            config,
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's included.
    pub fn num_threads(&self) -> usize {
        self.team.num_threads()
    }

    fn norm<'a>(&self, weight: &'a CpuWeight) -> Result<RmsNorm<'a>, Error> {
        Ok(RmsNorm { weight: weight.norm()?, eps: self.config.model.rms_norm_eps })
    }

    fn check(&self, batch: &Batch) -> Result<(), Error> {
        let model = &self.config.model;
        batch.check(self.config.max_batch_rows, model.vocab_size, model.hidden_size)?;
        for (idx, sequence) in batch.sequences.iter().enumerate() {
            // A batch has few sequences; a set would have to be allocated.
            if batch.sequences[..idx].iter().any(|earlier| earlier.block == sequence.block) {
                return Err(Error::InvalidBatch(format!("block {} is in the batch twice", sequence.block.0)));
            }
            let state = self.cache.state(sequence.block)?;
            state.check_append(batch.first_layer as usize, batch.positions_of(sequence))?;
        }
        Ok(())
    }

    /// Takes a register out so that another can be borrowed beside it. A panic before [`Self::put`]
    /// loses its numbers; [`Ops::upload`] gives the register its length back.
    fn take(&mut self, reg: Reg) -> Vec<f32> {
        std::mem::take(&mut self.registers[reg as usize].data)
    }

    /// Where keys and values lie in [`Reg::Qkv`]; its data is not borrowed.
    fn kv_rows(&self) -> KvRows<'static> {
        let model = &self.config.model;
        let stride = self.registers[Reg::Qkv as usize].width;
        KvRows { data: &[], stride, keys: model.q_dim(), values: model.q_dim() + model.kv_dim() }
    }

    /// Attention of all sequences into `out`. A round takes every sequence to its next fold; usually
    /// there is one.
    fn attend_into(&mut self, layer: usize, out: &mut [f32]) -> Result<(), Error> {
        let new = self.kv_rows();
        self.done.clear();
        self.done.resize(self.batch.sequences.len(), 0);
        loop {
            self.jobs.clear();
            let qkv = &self.registers[Reg::Qkv as usize];
            let new = KvRows { data: &qkv.data, ..new };
            let scores = self.scorer.as_ref().map_or(&[][..], Scorer::scores);
            for (sequence, done) in self.batch.sequences.iter().zip(&mut self.done) {
                let rows = sequence.rows.start as usize + *done..sequence.rows.end as usize;
                if rows.is_empty() {
                    continue;
                }
                let first_row = rows.start;
                let positions = &self.batch.positions[rows];
                let new = NewRows { first_row, positions, scores, numbers: new };
                let appended = self.cache.append(self.isa, sequence.block, layer, new)?;
                *done += appended.rows;
                let queries = &qkv.data[first_row * qkv.width..];
                let positions = &positions[..appended.rows];
                self.cache.keep_queries(sequence.block, layer, positions, queries, qkv.width);
                self.jobs.push(AttentionJob {
                    place: appended.place,
                    first_row,
                    rows: appended.rows,
                    slots_before: appended.slots_before,
                    id: sequence.block.0 as usize,
                });
            }
            if self.jobs.is_empty() {
                return Ok(());
            }
            self.gather_received(layer);
            let Self {
                cache, attention, team, isa, jobs, received_jobs, received, positions, registers, ..
            } = self;
            let qkv = &registers[Reg::Qkv as usize];
            let slots = LayerPositions { cache, layer };
            let window = self.config.model.sliding_window[layer].map(|size| Window {
                size: u32::try_from(size).unwrap_or(u32::MAX),
                row_positions: positions,
                slots: &slots,
            });
            let rows = AttentionRows { queries: &qkv.data, query_stride: qkv.width, out: &mut *out };
            if received_jobs.iter().all(Option::is_none) {
                attention.run(team, *isa, &cache.memory, jobs, rows, window);
            } else {
                let rows = ReceivedRows { rows, jobs: received_jobs, sums: received };
                attention.run_received(team, *isa, &cache.memory, jobs, rows, window);
                self.spread_received(layer);
            }
        }
    }

    /// Sample rows of `residual + delta`, normed, into the head's input; also in its 16-bit form if
    /// `quantize`.
    fn final_norm(
        &mut self,
        step: &CpuStep,
        norm: &CpuWeight,
        [residual, delta]: [Reg; 2],
        quantize: bool,
    ) -> Result<(), Error> {
        let norm = self.norm(norm)?;
        let width = self.head.width;
        for (i, &row) in self.batch.sample_rows.iter().enumerate() {
            let from = row as usize * width..(row as usize + 1) * width;
            let to = i * width..(i + 1) * width;
            self.head_residual[to.clone()]
                .copy_from_slice(&self.registers[residual as usize].data[from.clone()]);
            self.head.data[to].copy_from_slice(&self.registers[delta as usize].data[from]);
        }
        let Self { team, isa, head, head_residual, .. } = self;
        let quant = head.quant.as_mut().filter(|_| quantize);
        rows::add_rms_norm(team, *isa, norm, step.samples, head_residual, &mut head.data, quant);
        Ok(())
    }

    /// Lines up what the jobs' slots have received so far.
    fn gather_received(&mut self, layer: usize) {
        self.received_jobs.clear();
        self.received.clear();
        for job in &self.jobs {
            let Some(mode) = self.cache.received_mode(job.id) else {
                self.received_jobs.push(None);
                continue;
            };
            let (at, filled) = (self.received.len(), job.slots_before + job.rows);
            if let Some((received, stride)) = self.cache.received_mut(job.id, layer) {
                for head in received.chunks_exact(stride) {
                    self.received.extend_from_slice(&head[..filled]);
                }
            }
            self.received_jobs.push(Some(Received { mode, at, stride: filled }));
        }
    }

    /// Takes back what [`Self::gather_received`] lined up.
    fn spread_received(&mut self, layer: usize) {
        for (job, request) in self.jobs.iter().zip(&self.received_jobs) {
            let Some(Received { at, stride: filled, .. }) = *request else { continue };
            if let Some((received, stride)) = self.cache.received_mut(job.id, layer) {
                for (head, new) in
                    received.chunks_exact_mut(stride).zip(self.received[at..].chunks_exact(filled))
                {
                    head[..filled].copy_from_slice(new);
                }
            }
        }
    }

    /// Positions and angles of the batch's rows in `layer`.
    fn turn_to(&mut self, layer: usize) -> Result<(), Error> {
        self.angles_of = layer;
        self.cos.clear();
        self.sin.clear();
        self.positions.clear();
        for sequence in &self.batch.sequences {
            let state = self.cache.state(sequence.block)?;
            let rows = self.batch.positions_of(sequence).iter();
            self.positions.extend(rows.map(|&position| state.frame_position(layer, position)));
        }
        for &position in &self.positions {
            for &inv_freq in &self.inv_freq {
                let (sin, cos) = (f64::from(position) * f64::from(inv_freq)).sin_cos();
                self.cos.push((cos * f64::from(self.rope_factor)) as f32);
                self.sin.push((sin * f64::from(self.rope_factor)) as f32);
            }
        }
        Ok(())
    }

    /// Whether the rows of some sequence have other positions in `layer` than those that the angles are of.
    fn has_moved(&self, layer: usize) -> Result<bool, Error> {
        for sequence in &self.batch.sequences {
            let state = self.cache.state(sequence.block)?;
            if state.shift(layer) != state.shift(self.angles_of) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn put(&mut self, reg: Reg, data: Vec<f32>, quant_is_current: bool) {
        let register = &mut self.registers[reg as usize];
        register.data = data;
        register.quant_is_current = quant_is_current;
    }
}

/// Positions of one layer's slots, by block.
struct LayerPositions<'a> {
    cache: &'a Cache,
    layer: usize,
}

impl SlotPositions for LayerPositions<'_> {
    fn slot_positions(&self, block: usize) -> (&[u32], usize) {
        self.cache.positions(block, self.layer)
    }
}

impl Register {
    fn new(rows: usize, width: usize, is_input: bool) -> Self {
        let quant = (is_input && width.is_multiple_of(QUANT_BLOCK)).then(|| QuantRows::new(rows, width));
        Self { width, data: vec![0.0; rows * width], quant, quant_is_current: false }
    }

    /// Full length again, whatever a panic in an earlier step left; usually that changes nothing.
    fn restore(&mut self, rows: usize) {
        self.data.resize(rows * self.width, 0.0);
        self.quant_is_current = false;
    }

    fn num_bytes(&self) -> usize {
        size_of_val(self.data.as_slice()) + self.quant.as_ref().map_or(0, QuantRows::num_bytes)
    }
}

impl Ops for CpuOps {
    type Weight = CpuWeight;
    type Step = CpuStep;
    type Lora = CpuLora;

    fn prepare(&mut self, spec: WeightSpec) -> Result<CpuWeight, Error> {
        let weight = CpuWeight::prepare(&spec)?;
        if let Form::Matrix(matrix) = &weight.0 {
            self.quantized |= matrix.takes_quantized();
            let scratch = matrix.scratch_width() * self.config.max_batch_rows;
            // Exactly, or growing would take up to twice that.
            self.scratch.reserve_exact(scratch.saturating_sub(self.scratch.len()));
            self.scratch.resize(self.scratch.len().max(scratch), 0.0);
        }
        self.weight_bytes += weight.num_bytes();
        Ok(weight)
    }

    fn upload(&mut self, batch: &Batch) -> Result<CpuStep, Error> {
        self.check(batch)?;
        for sequence in &batch.sequences {
            if batch.first_layer == 0 {
                self.cache.spread_if_due(sequence.block)?;
            }
        }
        for register in &mut self.registers {
            register.restore(self.config.max_batch_rows);
        }
        self.batch.clone_from(batch);
        self.turn_to(batch.first_layer as usize)?;
        Ok(CpuStep { rows: batch.num_rows(), samples: batch.sample_rows.len() })
    }

    fn embed(&mut self, _: &CpuStep, table: &CpuWeight, dst: Reg) -> Result<(), Error> {
        let matrix = table.matrix()?;
        let register = &mut self.registers[dst as usize];
        for (&id, out) in self.batch.ids.iter().zip(register.data.chunks_exact_mut(register.width)) {
            matrix.read_row(id as usize, out)?;
        }
        for (row, embedding) in self.batch.embeddings(register.width) {
            register.data[row * register.width..(row + 1) * register.width].copy_from_slice(embedding);
        }
        register.quant_is_current = false;
        Ok(())
    }

    fn rms_norm(&mut self, step: &CpuStep, weight: &CpuWeight, src: Reg, dst: Reg) -> Result<(), Error> {
        let norm = self.norm(weight)?;
        let [source, target] = self
            .registers
            .get_disjoint_mut([src as usize, dst as usize])
            .map_err(|_| Error::Device("a norm's source and destination are one register".into()))?;
        let out = &mut target.data;
        let quant = target.quant.as_mut().filter(|_| self.quantized);
        let current = quant.is_some();
        rows::rms_norm(&mut self.team, self.isa, norm, step.rows, &source.data, out, quant);
        target.quant_is_current = current;
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        step: &CpuStep,
        weight: &CpuWeight,
        residual: Reg,
        delta: Reg,
        dst: Reg,
    ) -> Result<(), Error> {
        let norm = self.norm(weight)?;
        let mut x = self.take(dst);
        if delta != dst {
            let delta = &self.registers[delta as usize];
            x[..step.rows * delta.width].copy_from_slice(&delta.data[..step.rows * delta.width]);
        }
        let mut sum = self.take(residual);
        let quant = self.registers[dst as usize].quant.as_mut().filter(|_| self.quantized);
        let current = quant.is_some();
        rows::add_rms_norm(&mut self.team, self.isa, norm, step.rows, &mut sum, &mut x, quant);
        self.put(residual, sum, false);
        self.put(dst, x, current);
        Ok(())
    }

    fn linear(&mut self, step: &CpuStep, weight: &CpuWeight, src: Reg, dst: Reg) -> Result<(), Error> {
        let matrix = weight.matrix()?;
        let mut out = self.take(dst);
        let source = &mut self.registers[src as usize];
        if matrix.takes_quantized()
            && !source.quant_is_current
            && let Some(quant) = &mut source.quant
        {
            rows::quantize(&mut self.team, self.isa, step.rows, &source.data, quant);
            source.quant_is_current = true;
        }
        let input = Input { x: &source.data, quant: source.quant.as_ref(), rows: step.rows };
        let result = matrix.product(&mut self.team, self.isa, input, &mut out, &mut self.scratch);
        self.put(dst, out, false);
        result
    }

    fn prepare_lora(&mut self, pair: &LoraPair, linear: Linear) -> Result<CpuLora, Error> {
        CpuLora::pack(pair, linear.shape(&self.config.model))
    }

    fn lora_bytes(lora: &CpuLora) -> u64 {
        lora.num_bytes()
    }

    fn add_lora(
        &mut self,
        _: &CpuStep,
        rows: &[u32],
        lora: &CpuLora,
        (src, dst): (Reg, Reg),
        offset: usize,
    ) -> Result<(), Error> {
        let [source, target] = self
            .registers
            .get_disjoint_mut([src as usize, dst as usize])
            .map_err(|_| Error::Device("an adapter's source and destination are one register".into()))?;
        let into = (target.data.as_mut_slice(), target.width, offset);
        self.lora.add(&mut self.team, self.isa, lora, rows, &source.data, into);
        target.quant_is_current = false;
        Ok(())
    }

    fn reserve(&mut self, extras: &Extras) -> Result<(), Error> {
        self.lora = LoraScratch::new(extras, &self.config.model, self.config.max_batch_rows);
        Ok(())
    }

    fn head_norm(&mut self, step: &CpuStep, q: &CpuWeight, k: &CpuWeight) -> Result<(), Error> {
        let (q, k) = (self.norm(q)?, self.norm(k)?);
        let model = &self.config.model;
        let heads = model.num_heads + model.num_kv_heads;
        let register = &mut self.registers[Reg::Qkv as usize];
        let (data, width) = (&mut register.data, register.width);
        rows::head_norm(&mut self.team, self.isa, q, step.rows, data, width, 0..model.num_heads);
        rows::head_norm(&mut self.team, self.isa, k, step.rows, data, width, model.num_heads..heads);
        Ok(())
    }

    fn rope(&mut self, step: &CpuStep, layer: usize) -> Result<(), Error> {
        if self.has_moved(layer)? {
            self.turn_to(layer)?;
        }
        let model = &self.config.model;
        let rope = Rope {
            pairs: match model.rope.style {
                RopeStyle::Interleaved => RopePairs::Interleaved,
                RopeStyle::HalfSplit => RopePairs::HalfSplit,
            },
            cos: &self.cos,
            sin: &self.sin,
            rotary_dim: model.rope.rotary_dim,
            head_dim: model.head_dim,
        };
        let register = &mut self.registers[Reg::Qkv as usize];
        let heads = model.num_heads + model.num_kv_heads;
        rows::rope(&mut self.team, self.isa, rope, step.rows, &mut register.data, register.width, heads);
        Ok(())
    }

    fn observe(&mut self, _: &CpuStep, layer: usize) -> Result<(), Error> {
        let new = self.kv_rows();
        let qkv = &self.registers[Reg::Qkv as usize];
        let new = KvRows { data: &qkv.data, ..new };
        let mut scored = 0;
        for sequence in &self.batch.sequences {
            let rows = sequence.rows.start as usize..sequence.rows.end as usize;
            let state = self.cache.state_mut(sequence.block);
            let Some(method) = state.settings().map(|settings| settings.method) else { continue };
            if let (true, Some(scorer)) = (method.scores_rows(), &mut self.scorer) {
                let count = rows.len();
                let (state, rotation) = self.cache.state_and_rotation(sequence.block);
                let threads = (&mut self.team, self.isa);
                scorer.gather(layer, rows, new, rotation, state.kept_mut(layer), scored, threads);
                scored += count;
            }
        }
        let Some(scorer) = self.scorer.as_mut().filter(|_| scored > 0) else { return Ok(()) };
        scorer.run(layer, scored, &mut self.team, self.isa)?;
        for sequence in self.batch.sequences.iter().rev() {
            let settings = self.cache.state(sequence.block)?.settings();
            if settings.is_some_and(|settings| settings.method.scores_rows()) {
                scored -= sequence.rows.len();
                scorer.spread(scored, sequence.rows.start as usize..sequence.rows.end as usize);
            }
        }
        Ok(())
    }

    fn attend(&mut self, _: &CpuStep, layer: usize) -> Result<(), Error> {
        let mut out = self.take(Reg::Attn);
        let attended = self.attend_into(layer, &mut out);
        self.put(Reg::Attn, out, false);
        attended
    }

    fn silu_mul(&mut self, step: &CpuStep) -> Result<(), Error> {
        let [gate_up, act] = self
            .registers
            .get_disjoint_mut([Reg::GateUp as usize, Reg::Act as usize])
            .map_err(|error| Error::Device(error.to_string()))?;
        let quant = act.quant.as_mut().filter(|_| self.quantized);
        let current = quant.is_some();
        rows::silu_mul(&mut self.team, self.isa, step.rows, act.width, &gate_up.data, &mut act.data, quant);
        act.quant_is_current = current;
        Ok(())
    }

    fn write_rows(&mut self, step: &CpuStep, rows: &[f32]) -> Result<(), Error> {
        for reg in [Reg::H, Reg::X] {
            let register = &mut self.registers[reg as usize];
            let data = &mut register.data[..step.rows * register.width];
            match reg {
                Reg::H => data.copy_from_slice(rows),
                _ => data.fill(0.0),
            }
            register.quant_is_current = false;
        }
        Ok(())
    }

    fn read_rows(&mut self, step: &CpuStep, reg: Reg, out: &mut Vec<f32>) -> Result<(), Error> {
        let register = &self.registers[reg as usize];
        out.clear();
        out.extend_from_slice(&register.data[..step.rows * register.width]);
        Ok(())
    }

    fn logits(
        &mut self,
        step: &CpuStep,
        norm: &CpuWeight,
        head: &CpuWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let matrix = head.matrix()?;
        self.final_norm(step, norm, [residual, delta], matrix.takes_quantized())?;
        let Self { team, isa, head, scratch, .. } = self;
        out.resize(step.samples * matrix.rows, 0.0);
        let input = Input { x: &head.data, quant: head.quant.as_ref(), rows: step.samples };
        matrix.product(team, *isa, input, out, scratch)
    }

    fn select_rows(&mut self, step: &mut CpuStep, rows: &[u32]) -> Result<(), Error> {
        self.batch.sample_rows.clear();
        self.batch.sample_rows.extend_from_slice(rows);
        step.samples = rows.len();
        Ok(())
    }

    fn states(
        &mut self,
        step: &CpuStep,
        norm: &CpuWeight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.final_norm(step, norm, [residual, delta], false)?;
        out.clear();
        out.extend_from_slice(&self.head.data[..step.samples * self.head.width]);
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        self.cache.open(block, settings)
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        self.cache.copy(from, to)
    }

    fn close_block(&mut self, block: BlockId) {
        self.cache.close(block);
    }

    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        self.cache.export(block)
    }

    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        self.cache.import(block, image)
    }

    fn check_held(&self, block: BlockId, positions: &[u32]) -> Result<(), Error> {
        self.cache.state(block)?.check_held(positions)
    }

    fn remove_slots(&mut self, block: BlockId, layer: usize, slots: &[u32]) -> Result<(), Error> {
        self.cache.remove_slots(block, layer, slots)
    }

    fn settle_block(&mut self, block: BlockId, next: u32) -> Result<(), Error> {
        self.cache.state(block)?;
        self.cache.state_mut(block).settle(next);
        Ok(())
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        self.cache.state(block).map_or(0, |state| state.folded_tokens())
    }

    fn config(&self) -> &OpsConfig {
        &self.config
    }

    fn prefault(&mut self) {
        self.cache.touch_pages();
    }

    fn memory(&self) -> MemoryUse {
        let registers: usize = self.registers.iter().chain([&self.head]).map(Register::num_bytes).sum();
        let buffers = [&self.head_residual, &self.scratch, &self.cos, &self.sin];
        let buffers: usize = buffers.iter().map(|buffer| buffer.capacity() * size_of::<f32>()).sum();
        let scorer = self.scorer.as_ref().map_or(0, Scorer::num_bytes);
        MemoryUse {
            weights: self.weight_bytes as u64,
            workspace: (registers + buffers + scorer + self.attention.num_bytes() + self.lora.num_bytes())
                as u64,
            cache: self.cache.num_bytes() as u64,
        }
    }
}

#[cfg(test)]
mod tests;
