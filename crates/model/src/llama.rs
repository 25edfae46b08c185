//! The LLaMA family's decoder, written once for every backend.
//!
//! Geometry and order of operations follow "LLaMA" (arXiv 2302.13971) with grouped-query attention
//! (arXiv 2305.13245); Mistral's window, Qwen2's biases and Qwen3's head norms are fields of
//! [`ModelConfig`], not other files.

use crate::{
    Adapter, AdapterId, Batch, BlockId, Error, Extras, MemoryUse, Model, ModelConfig, TokenScore,
    adapter::{AdaptedRows, Linear, Loaded},
    held::{Held, HeldProgress, HeldPrompt},
    kv_cache::{CachePlan, CacheSettings},
    ops::{Ops, Reg},
};

/// One decoder layer's weights in the backend's form.
pub struct Layer<W> {
    /// Norm before attention `[hidden]`.
    pub attn_norm: W,
    /// Fused projection `[q_dim + 2 kv_dim, hidden]`.
    pub qkv: W,
    /// Head norms `[head_dim]` of queries and keys.
    pub qk_norm: Option<(W, W)>,
    /// Output projection `[hidden, q_dim]`.
    pub output: W,
    /// Norm before the MLP `[hidden]`.
    pub mlp_norm: W,
    /// Fused gate and up projection `[2 intermediate, hidden]`.
    pub gate_up: W,
    /// Down projection `[hidden, intermediate]`.
    pub down: W,
}

/// All weights in the backend's form.
pub struct LlamaWeights<W> {
    /// Embedding `[vocab, hidden]`; also the head when `head` is `None`.
    pub embedding: W,
    /// Decoder layers in order.
    pub layers: Vec<Layer<W>>,
    /// Final norm `[hidden]`.
    pub norm: W,
    /// Head `[vocab, hidden]`, absent when tied.
    pub head: Option<W>,
}

/// A decoder on one backend.
pub struct Llama<O: Ops> {
    ops: O,
    weights: LlamaWeights<O::Weight>,
    /// The latest step of [`Model::forward`] and its rows; its registers still hold its output.
    latest: Option<(O::Step, u32)>,
    adapters: Loaded<O::Lora>,
    held: Option<Held>,
    extras: Extras,
}

impl<O: Ops> Llama<O> {
    /// Joins a backend and the weights that it prepared.
    pub fn new(ops: O, weights: LlamaWeights<O::Weight>) -> Self {
        Self {
            ops,
            weights,
            latest: None,
            adapters: Loaded::default(),
            held: None,
            extras: Extras::default(),
        }
    }

    /// The backend, for callers that need more than [`Model`] (training, graph capture).
    pub fn ops_mut(&mut self) -> &mut O {
        &mut self.ops
    }

    /// The backend and the weights, for callers that drive operations of their own.
    pub fn parts_mut(&mut self) -> (&mut O, &LlamaWeights<O::Weight>) {
        (&mut self.ops, &self.weights)
    }

    /// Runs `batch` up to and without the final norm: the last layer's output is left as
    /// residual [`Reg::H`] plus delta [`Reg::X`].
    pub fn hidden(&mut self, batch: &Batch) -> Result<O::Step, Error> {
        let Self { ops, weights, latest, adapters, .. } = self;
        *latest = None;
        let adapted = adapters.rows(batch)?;
        let step = ops.upload(batch)?;
        ops.embed(&step, &weights.embedding, Reg::H)?;
        for (layer_idx, layer) in weights.layers.iter().enumerate() {
            decode_layer(ops, &step, layer, layer_idx, &adapted)?;
        }
        Ok(step)
    }
}

impl<W> LlamaWeights<W> {
    /// The output projection.
    pub(crate) fn head(&self) -> &W {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// One decoder layer. The residual is [`Reg::H`]; on entry of every layer but the first the
/// previous layer's MLP output is still in [`Reg::X`], so that its addition is fused with the norm.
/// `adapted` are the rows that go through adapters.
pub fn decode_layer<O: Ops>(
    ops: &mut O,
    step: &O::Step,
    layer: &Layer<O::Weight>,
    layer_idx: usize,
    adapted: &[AdaptedRows<'_, O::Lora>],
) -> Result<(), Error> {
    project_layer(ops, step, layer, layer_idx, adapted)?;
    ops.observe(step, layer_idx)?;
    ops.rope(step, layer_idx)?;
    attend_layer(ops, step, layer, layer_idx, adapted)
}

/// The first part of [`decode_layer`]: queries, keys and values, not rotated yet.
pub(crate) fn project_layer<O: Ops>(
    ops: &mut O,
    step: &O::Step,
    layer: &Layer<O::Weight>,
    layer_idx: usize,
    adapted: &[AdaptedRows<'_, O::Lora>],
) -> Result<(), Error> {
    if layer_idx == 0 {
        ops.rms_norm(step, &layer.attn_norm, Reg::H, Reg::X)?;
    } else {
        ops.add_rms_norm(step, &layer.attn_norm, Reg::H, Reg::X, Reg::X)?;
    }
    ops.linear(step, &layer.qkv, Reg::X, Reg::Qkv)?;
    let linears = [Linear::Q, Linear::K, Linear::V];
    adapt(ops, step, (adapted, layer_idx), &linears, (Reg::X, Reg::Qkv))?;
    if let Some((q, k)) = &layer.qk_norm {
        ops.head_norm(step, q, k)?;
    }
    Ok(())
}

/// The last part of [`decode_layer`]: attention and MLP.
pub(crate) fn attend_layer<O: Ops>(
    ops: &mut O,
    step: &O::Step,
    layer: &Layer<O::Weight>,
    layer_idx: usize,
    adapted: &[AdaptedRows<'_, O::Lora>],
) -> Result<(), Error> {
    let adapt = |ops: &mut O, linears: &[Linear], src: Reg, dst: Reg| {
        adapt(ops, step, (adapted, layer_idx), linears, (src, dst))
    };
    ops.attend(step, layer_idx)?;
    ops.linear(step, &layer.output, Reg::Attn, Reg::X)?;
    adapt(ops, &[Linear::Output], Reg::Attn, Reg::X)?;
    ops.add_rms_norm(step, &layer.mlp_norm, Reg::H, Reg::X, Reg::X)?;
    ops.linear(step, &layer.gate_up, Reg::X, Reg::GateUp)?;
    adapt(ops, &[Linear::Gate, Linear::Up], Reg::X, Reg::GateUp)?;
    ops.silu_mul(step)?;
    ops.linear(step, &layer.down, Reg::Act, Reg::X)?;
    adapt(ops, &[Linear::Down], Reg::Act, Reg::X)
}

/// Adds the second paths of `linears`, whose outputs lie side by side in the second register.
fn adapt<O: Ops>(
    ops: &mut O,
    step: &O::Step,
    (adapted, layer_idx): (&[AdaptedRows<'_, O::Lora>], usize),
    linears: &[Linear],
    registers: (Reg, Reg),
) -> Result<(), Error> {
    for AdaptedRows { rows, layers } in adapted {
        let mut offset = 0;
        for &linear in linears {
            if let Some(lora) = &layers[layer_idx][linear as usize] {
                ops.add_lora(step, rows, lora, registers, offset)?;
            }
            offset += linear.shape(&ops.config().model).0;
        }
    }
    Ok(())
}

/// Makes `rows` the sample rows of the latest step, and hands it out.
fn reselect<'s, O: Ops>(
    ops: &mut O,
    latest: &'s mut Option<(O::Step, u32)>,
    rows: &[u32],
) -> Result<&'s O::Step, Error> {
    let Some((step, num_rows)) = latest else {
        return Err(Error::InvalidBatch("rows of a step that was not run".into()));
    };
    if rows.iter().any(|row| *row >= *num_rows) || !rows.is_sorted_by(|a, b| a < b) {
        return Err(Error::InvalidBatch(format!("rows must ascend below {num_rows}")));
    }
    ops.select_rows(step, rows)?;
    Ok(step)
}

impl<O: Ops + Send> Model for Llama<O>
where
    O::Weight: Send,
{
    fn config(&self) -> &ModelConfig {
        &self.ops.config().model
    }

    fn cache_plan(&self) -> &CachePlan {
        &self.ops.config().cache
    }

    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), Error> {
        let step = self.hidden(batch)?;
        let Self { ops, weights, latest, .. } = self;
        ops.logits(&step, &weights.norm, weights.head(), Reg::H, Reg::X, logits)?;
        *latest = Some((step, batch.num_rows() as u32));
        Ok(())
    }

    fn row_logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), Error> {
        let Self { ops, weights, latest, .. } = self;
        let step = reselect(ops, latest, rows)?;
        ops.logits(step, &weights.norm, weights.head(), Reg::H, Reg::X, logits)
    }

    fn row_states(&mut self, rows: &[u32], states: &mut Vec<f32>) -> Result<(), Error> {
        let Self { ops, weights, latest, .. } = self;
        let step = reselect(ops, latest, rows)?;
        ops.states(step, &weights.norm, Reg::H, Reg::X, states)
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        self.ops.open_block(block, settings)
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        self.ops.copy_block(from, to)
    }

    fn close_block(&mut self, block: BlockId) {
        self.ops.close_block(block);
    }

    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        self.ops.export_block(block)
    }

    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        self.ops.import_block(block, image)
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        self.ops.folded_tokens(block)
    }

    fn score_tokens(
        &mut self,
        batch: &Batch,
        targets: &[u32],
        out: &mut Vec<TokenScore>,
    ) -> Result<(), Error> {
        if targets.len() != batch.sample_rows.len() {
            let (targets, rows) = (targets.len(), batch.sample_rows.len());
            return Err(Error::InvalidBatch(format!("{targets} targets for {rows} sample rows")));
        }
        let step = self.hidden(batch)?;
        let Self { ops, weights, .. } = self;
        ops.score(&step, &weights.norm, weights.head(), Reg::H, Reg::X, targets, out)
    }

    fn reserve(&mut self, extras: &Extras) -> Result<(), Error> {
        self.ops.reserve(extras)?;
        self.extras = *extras;
        self.adapters.limit(*extras);
        Ok(())
    }

    fn extras(&self) -> Extras {
        self.extras
    }

    fn load_adapter(&mut self, adapter: &Adapter) -> Result<AdapterId, Error> {
        self.adapters.load(adapter, &mut self.ops)
    }

    fn unload_adapter(&mut self, adapter: AdapterId) -> Result<(), Error> {
        self.adapters.unload(adapter)
    }

    fn hold(&mut self, prompt: &HeldPrompt) -> Result<(), Error> {
        self.held = None;
        let held = Held::new(prompt, self.extras.held_rows, &self.ops.config().model)?;
        self.ops.check_held(held.block(), &prompt.batch.positions)?;
        self.held = Some(held);
        Ok(())
    }

    fn advance_held(&mut self, max_rows: usize, logits: &mut Vec<f32>) -> Result<HeldProgress, Error> {
        let Self { ops, weights, latest, adapters, held, .. } = self;
        let Some(mut prompt) = held.take() else {
            return Err(Error::InvalidBatch("no prompt is held".into()));
        };
        *latest = None;
        let progress = prompt.advance(ops, weights, adapters, max_rows, logits)?;
        if matches!(progress, HeldProgress::Working { .. }) {
            *held = Some(prompt);
        }
        Ok(progress)
    }

    fn release_held(&mut self) {
        self.held = None;
    }

    fn max_batch_rows(&self) -> usize {
        self.ops.config().max_batch_rows
    }

    fn memory(&self) -> MemoryUse {
        let memory = self.ops.memory();
        MemoryUse {
            weights: memory.weights + self.adapters.num_bytes(),
            workspace: memory.workspace + self.extras.held_bytes(&self.ops.config().model),
            ..memory
        }
    }

    fn prefault(&mut self) {
        self.ops.prefault();
    }
}
