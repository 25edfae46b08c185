//! The operations that a decoder is made of, on named registers of a workspace.
//!
//! `llama.rs` is written once against [`Ops`]; a backend decides what a register is: a candle
//! tensor ([`reference`]), a flat buffer beside its 16-bit form ([`cpu`]), or device memory. A device
//! backend's launches of one forward pass can be captured as a graph, because every operation
//! reads what changes from step to step through the uploaded [`Ops::Step`] alone.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
pub mod rope;

use std::sync::Arc;

use candle_core::{Tensor, quantized::QTensor};

use crate::{
    BlockId, Error, Extras, MemoryUse, ModelConfig, TokenScore,
    adapter::{Linear, LoraPair},
    batch::Batch,
    kv_cache::{CachePlan, CacheSettings, SideCar},
};

/// A register: a `[rows, width]` activation that the backend's workspace owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reg {
    /// The residual stream, `hidden_size` wide.
    H,
    /// Normalised input of a projection, or its output on the way to the residual, `hidden_size`.
    X,
    /// Queries, keys and values of a layer, `q_dim + 2 kv_dim`.
    Qkv,
    /// Attention's output, `q_dim`.
    Attn,
    /// Gate and up projections side by side, `2 intermediate_size`.
    GateUp,
    /// `silu(gate) * up`, `intermediate_size`.
    Act,
}

/// A tensor as it was stored.
#[derive(Debug, Clone)]
pub enum RawTensor {
    /// f32, f16 or bf16, on the CPU.
    Dense(Tensor),
    /// A GGUF block format, still quantised, on the CPU.
    Quantized(Arc<QTensor>),
}

/// What [`Ops::prepare`] turns into the backend's own form.
#[derive(Debug, Clone)]
pub struct WeightSpec {
    /// Matrices `[out_i, in]`, stacked along their rows in this order (fused Q, K, V; gate, up).
    /// Parts may have different stored types. A norm's weight is one part `[width]`.
    pub parts: Vec<RawTensor>,
    /// Bias `[sum of out_i]`.
    pub bias: Option<Tensor>,
    /// How the weight will be used.
    pub role: WeightRole,
}

/// What a weight is for; decides its prepared form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightRole {
    /// Argument of [`Ops::linear`].
    Linear,
    /// Argument of [`Ops::embed`].
    Embedding,
    /// Argument of [`Ops::embed`] and of [`Ops::logits`]: a tied head.
    TiedEmbedding,
    /// Argument of [`Ops::logits`].
    Head,
    /// Argument of the norms.
    Norm,
}

/// What a backend must know before the first weight.
#[derive(Debug, Clone)]
pub struct OpsConfig {
    /// The model's geometry.
    pub model: ModelConfig,
    /// Blocks to allocate.
    pub cache: CachePlan,
    /// Rows of the largest batch.
    pub max_batch_rows: usize,
    /// CPU threads, the calling one included.
    pub threads: usize,
    /// Weights of the trained cache methods.
    pub side_car: Option<Arc<SideCar>>,
}

/// The operations. Registers hold `[rows, width]` of the step's batch.
///
/// Backends fail only for device errors; shapes were checked when weights were loaded.
pub trait Ops {
    /// A prepared weight.
    type Weight;
    /// Handle of an uploaded batch.
    type Step: Send;
    /// A linear's second path.
    type Lora: Send;

    /// Fuses, reorders and packs a weight into the backend's form.
    fn prepare(&mut self, spec: WeightSpec) -> Result<Self::Weight, Error>;

    /// Checks `batch` against the cache and brings it to where the operations read it.
    fn upload(&mut self, batch: &Batch) -> Result<Self::Step, Error>;

    /// `dst = table[ids]`.
    fn embed(&mut self, step: &Self::Step, table: &Self::Weight, dst: Reg) -> Result<(), Error>;

    /// `dst = rms_norm(src) * weight`.
    fn rms_norm(&mut self, step: &Self::Step, weight: &Self::Weight, src: Reg, dst: Reg)
    -> Result<(), Error>;

    /// `residual += delta; dst = rms_norm(residual) * weight`.
    fn add_rms_norm(
        &mut self,
        step: &Self::Step,
        weight: &Self::Weight,
        residual: Reg,
        delta: Reg,
        dst: Reg,
    ) -> Result<(), Error>;

    /// `dst = src * weightᵀ + bias`.
    fn linear(&mut self, step: &Self::Step, weight: &Self::Weight, src: Reg, dst: Reg) -> Result<(), Error>;

    /// Brings a pair of `linear` into the backend's form.
    fn prepare_lora(&mut self, pair: &LoraPair, linear: Linear) -> Result<Self::Lora, Error>;

    /// Bytes of a prepared pair.
    fn lora_bytes(lora: &Self::Lora) -> u64;

    /// `dst[row, offset..] += scale * B (A src[row])` for `rows`, ascending; other rows are not touched.
    fn add_lora(
        &mut self,
        step: &Self::Step,
        rows: &[u32],
        lora: &Self::Lora,
        registers: (Reg, Reg),
        offset: usize,
    ) -> Result<(), Error>;

    /// Makes room for what `extras` name.
    fn reserve(&mut self, extras: &Extras) -> Result<(), Error>;

    /// RMS norm over `head_dim` of every query head (weight `q`) and key head (`k`) in [`Reg::Qkv`].
    fn head_norm(&mut self, step: &Self::Step, q: &Self::Weight, k: &Self::Weight) -> Result<(), Error>;

    /// Takes from [`Reg::Qkv`] what the sequences' cache methods need of keys and values before they are
    /// rotated: the scores of new tokens.
    fn observe(&mut self, step: &Self::Step, layer: usize) -> Result<(), Error>;

    /// Rotates queries and keys in [`Reg::Qkv`] by their positions in `layer`.
    fn rope(&mut self, step: &Self::Step, layer: usize) -> Result<(), Error>;

    /// Per sequence: fold if the layer's block is full, append keys and values, attend; reads
    /// [`Reg::Qkv`], writes [`Reg::Attn`]. Queries read keys and values in stored form.
    fn attend(&mut self, step: &Self::Step, layer: usize) -> Result<(), Error>;

    /// `Act = silu(gate) * up` of [`Reg::GateUp`].
    fn silu_mul(&mut self, step: &Self::Step) -> Result<(), Error>;

    /// [`Reg::H`]` = rows [rows, hidden_size]` and [`Reg::X`]` = 0`.
    fn write_rows(&mut self, step: &Self::Step, rows: &[f32]) -> Result<(), Error>;

    /// Writes a register's rows `[rows, width]` into `out`.
    fn read_rows(&mut self, step: &Self::Step, reg: Reg, out: &mut Vec<f32>) -> Result<(), Error>;

    /// For the sample rows only: `residual += delta`, final norm, head; writes
    /// `[samples, vocab_size]` into `out`. Does not change the registers.
    fn logits(
        &mut self,
        step: &Self::Step,
        norm: &Self::Weight,
        head: &Self::Weight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error>;

    /// Makes `rows`, ascending rows of the step, its sample rows from now on.
    fn select_rows(&mut self, step: &mut Self::Step, rows: &[u32]) -> Result<(), Error>;

    /// For the sample rows only: `residual += delta`, final norm; writes `[samples, hidden_size]` into
    /// `out`. Does not change the registers.
    fn states(
        &mut self,
        step: &Self::Step,
        norm: &Self::Weight,
        residual: Reg,
        delta: Reg,
        out: &mut Vec<f32>,
    ) -> Result<(), Error>;

    /// As [`Self::logits`], but only how likely `targets [samples]` are and what would have been likeliest.
    #[expect(clippy::too_many_arguments, reason = "logits' arguments and the targets")]
    fn score(
        &mut self,
        step: &Self::Step,
        norm: &Self::Weight,
        head: &Self::Weight,
        residual: Reg,
        delta: Reg,
        targets: &[u32],
        out: &mut Vec<TokenScore>,
    ) -> Result<(), Error> {
        let mut logits = Vec::new();
        self.logits(step, norm, head, residual, delta, &mut logits)?;
        score_logits(&logits, targets, out);
        Ok(())
    }

    /// See [`Model::open_block`](crate::Model::open_block).
    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error>;

    /// See [`Model::copy_block`](crate::Model::copy_block).
    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error>;

    /// See [`Model::close_block`](crate::Model::close_block).
    fn close_block(&mut self, block: BlockId);

    /// See [`Model::export_block`](crate::Model::export_block).
    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error>;

    /// See [`Model::import_block`](crate::Model::import_block).
    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error>;

    /// Checks that the block is open and empty and that a whole prompt at `positions` may go into it.
    fn check_held(&self, block: BlockId, positions: &[u32]) -> Result<(), Error>;

    /// Takes the tokens in `slots`, ascending, out of a layer of a block, unless that has folded.
    fn remove_slots(&mut self, block: BlockId, layer: usize, slots: &[u32]) -> Result<(), Error>;

    /// Lets all layers of a block go on with the sequence's position `next`, each behind its own last one.
    fn settle_block(&mut self, block: BlockId, next: u32) -> Result<(), Error>;

    /// See [`Model::folded_tokens`](crate::Model::folded_tokens).
    fn folded_tokens(&self, block: BlockId) -> u32;

    /// The configuration that the backend was built with.
    fn config(&self) -> &OpsConfig;

    /// Bytes of weights prepared so far, workspace and cache.
    fn memory(&self) -> MemoryUse;

    /// See [`Model::prefault`](crate::Model::prefault).
    fn prefault(&mut self) {}
}

/// Scores `targets [samples]` by `logits [samples, vocab_size]`.
fn score_logits(logits: &[f32], targets: &[u32], out: &mut Vec<TokenScore>) {
    out.clear();
    out.resize(targets.len(), TokenScore::default());
    if targets.is_empty() {
        return;
    }
    let width = logits.len() / targets.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(targets.len());
    let share = targets.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (i, (targets, out)) in targets.chunks(share).zip(out.chunks_mut(share)).enumerate() {
            let logits = &logits[i * share * width..][..targets.len() * width];
            scope.spawn(move || {
                for ((row, &target), out) in logits.chunks_exact(width).zip(targets).zip(out) {
                    *out = TokenScore::of(row, target);
                }
            });
        }
    });
}
