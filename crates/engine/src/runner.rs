//! From a plan to the model and back: builds batches, knows no queues.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use locket_model::{
    Adapter, AdapterId, Batch, BlockId, Error, HeldProgress, HeldPrompt, Model, kv_cache::CacheSettings,
};

use crate::{clock::Clock, scheduler::StepPlan, sequence::Sequence, visual};

/// Drives a model. Buffers are reused from step to step.
pub(crate) struct Runner {
    model: Box<dyn Model>,
    batch: Batch,
    /// Logits of the latest step `[sample_rows, vocab_size]`.
    logits: Vec<f32>,
    /// What some rows of it were asked for: logits `[rows, vocab_size]` of at most
    /// [`SCORED_ROWS`](crate::scoring::SCORED_ROWS), or states `[rows, hidden_size]`.
    row_values: Vec<f32>,
    /// Whose prompt the model holds.
    held: Option<BlockId>,
    held_logits: Vec<f32>,
    adapters: BTreeSet<AdapterId>,
}

impl Runner {
    pub(crate) fn new(model: Box<dyn Model>) -> Self {
        Self {
            model,
            batch: Batch::default(),
            logits: Vec::new(),
            row_values: Vec::new(),
            held: None,
            held_logits: Vec::new(),
            adapters: BTreeSet::new(),
        }
    }

    /// The model.
    pub(crate) fn model(&self) -> &dyn Model {
        self.model.as_ref()
    }

    /// Runs the rows of `plan`; the logits of its `n`-th part with `sample` are row `n` of
    /// [`Self::logits_row`].
    pub(crate) fn run(&mut self, plan: &StepPlan, running: &[Sequence]) -> Result<(), Error> {
        self.batch.clear();
        if plan.parts.is_empty() {
            self.logits.clear();
            return Ok(());
        }
        for part in &plan.parts {
            let sequence = &running[part.index];
            let (from, request) = (sequence.num_cached, &sequence.request);
            let first_row = self.batch.num_rows() as u32;
            let positions = (from..from + part.rows).map(|at| request.position(at));
            self.batch.push_at(sequence.block, positions, sequence.next_ids(part.rows), part.sample);
            self.batch.set_adapter(request.adapter);
            for (rows, span) in visual::overlapping(&request.visual, from..from + part.rows) {
                let batch_rows = first_row + rows.start - from..first_row + rows.end - from;
                self.batch.embed(batch_rows, &span.embeddings, rows.start - span.rows.start);
            }
        }
        self.forward()
    }

    /// Runs up to `rows` rows of a prompt whose images lose tokens through some layers, after [`Self::run`].
    /// Returns whether that was all; then the logits of its last row are the last of the step's.
    pub(crate) fn advance_held(&mut self, sequence: &Sequence, rows: usize) -> Result<bool, Error> {
        if self.held != Some(sequence.block) {
            self.held = None;
            self.model.hold(&held_prompt(sequence))?;
            self.held = Some(sequence.block);
        }
        let progress = self.model.advance_held(rows, &mut self.held_logits);
        let is_done = !matches!(progress, Ok(HeldProgress::Working { .. }));
        if is_done {
            self.held = None;
        }
        progress?;
        if is_done {
            let width = self.model.config().vocab_size;
            if self.held_logits.len() != width {
                let got = self.held_logits.len();
                return Err(Error::Device(format!("the model returned {got} logits instead of {width}")));
            }
            self.logits.extend_from_slice(&self.held_logits);
        }
        Ok(is_done)
    }

    /// Takes an adapter.
    pub(crate) fn load_adapter(&mut self, adapter: &Adapter) -> Result<AdapterId, Error> {
        self.model.load_adapter(adapter).inspect(|&id| {
            self.adapters.insert(id);
        })
    }

    /// Whether an adapter is loaded.
    pub(crate) fn has_adapter(&self, id: AdapterId) -> bool {
        self.adapters.contains(&id)
    }

    /// Forgets an adapter.
    pub(crate) fn unload_adapter(&mut self, id: AdapterId) {
        if self.adapters.remove(&id)
            && let Err(error) = self.model.unload_adapter(id)
        {
            tracing::error!(%error, "an adapter could not be unloaded");
        }
    }

    fn forward(&mut self) -> Result<(), Error> {
        self.model.forward(&self.batch, &mut self.logits)?;
        let wanted = self.batch.sample_rows.len() * self.model.config().vocab_size;
        if self.logits.len() != wanted {
            let got = self.logits.len();
            return Err(Error::Device(format!("the model returned {got} logits instead of {wanted}")));
        }
        Ok(())
    }

    /// Logits `[vocab_size]` of the `row`-th sampled row of the latest step.
    pub(crate) fn logits_row(&self, row: usize) -> &[f32] {
        let width = self.model.config().vocab_size;
        &self.logits[row * width..(row + 1) * width]
    }

    /// Logits of `rows` of the latest step, one after the other, and how many one row has.
    pub(crate) fn row_logits(&mut self, rows: &[u32]) -> Result<(&[f32], usize), Error> {
        self.model.row_logits(rows, &mut self.row_values)?;
        self.row_values(rows.len(), self.model.config().vocab_size)
    }

    /// Hidden states of `rows` of the latest step, one after the other, and how wide one is.
    pub(crate) fn row_states(&mut self, rows: &[u32]) -> Result<(&[f32], usize), Error> {
        self.model.row_states(rows, &mut self.row_values)?;
        self.row_values(rows.len(), self.model.config().hidden_size)
    }

    fn row_values(&self, rows: usize, width: usize) -> Result<(&[f32], usize), Error> {
        let got = self.row_values.len();
        if got != rows * width {
            let reason = format!("the model returned {got} numbers for {rows} rows of {width}");
            return Err(Error::Device(reason));
        }
        Ok((&self.row_values, width))
    }

    /// Empties a block for a new sequence.
    pub(crate) fn open(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        self.model.open_block(block, settings)
    }

    /// Gives `to` the state of `from`.
    pub(crate) fn copy(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        self.model.copy_block(from, to)
    }

    /// The state of `block` as bytes.
    pub(crate) fn export(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        self.model.export_block(block)
    }

    /// Opens `block` with the state in `image`; after an error it is closed.
    pub(crate) fn import(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        self.model.import_block(block, image)
    }

    /// Tokens that some layer no longer holds in slots of their own.
    pub(crate) fn folded_tokens(&self, block: BlockId) -> u32 {
        self.model.folded_tokens(block)
    }

    /// Scrubs a block.
    pub(crate) fn close(&mut self, block: BlockId) {
        if self.held == Some(block) {
            self.held = None;
            self.model.release_held();
        }
        self.model.close_block(block);
    }

    /// Runs one full step in the first block, so that pages are touched and threads exist before
    /// the first request, and says how many rows took how long.
    pub(crate) fn warm_up(&mut self, max_rows: usize, clock: &dyn Clock) -> Result<(usize, Duration), Error> {
        let block = BlockId(0);
        let Some(capacity) = self.model.cache_plan().capacity(block) else {
            return Err(Error::Plan("the cache has no blocks".into()));
        };
        let rows = max_rows.min(capacity as usize).min(self.model.config().max_position).max(1);
        self.open(block, CacheSettings::full(capacity))?;
        self.batch.clear();
        self.batch.push(block, 0, &vec![0; rows], true);
        let begin = clock.now();
        self.forward()?;
        let took = clock.now().saturating_sub(begin);
        self.close(block);
        Ok((rows, took))
    }
}

/// A sequence's whole prompt, and what its images lose.
fn held_prompt(sequence: &Sequence) -> HeldPrompt {
    let request = &sequence.request;
    let mut batch = Batch::default();
    let positions = (0..sequence.prompt_len()).map(|at| request.position(at));
    batch.push_at(sequence.block, positions, &request.prompt_ids, true);
    batch.set_adapter(request.adapter);
    for span in &request.visual {
        batch.embed(span.rows.clone(), &span.embeddings, 0);
    }
    let losing = request.visual.iter().filter_map(|span| {
        let drops = span.drops.as_ref().filter(|drops| !drops.boundaries.is_empty())?;
        Some((span.rows.clone(), Arc::clone(drops)))
    });
    let images = losing.collect();
    HeldPrompt { batch, images, visual: request.visual.iter().map(|span| span.rows.clone()).collect() }
}
