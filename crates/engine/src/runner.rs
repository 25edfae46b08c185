//! From a plan to the model and back: builds batches, knows no queues.

use std::time::Duration;

use locket_model::{Batch, BlockId, Error, Model, kv_cache::CacheSettings};

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
}

impl Runner {
    pub(crate) fn new(model: Box<dyn Model>) -> Self {
        Self { model, batch: Batch::default(), logits: Vec::new(), row_values: Vec::new() }
    }

    /// The model.
    pub(crate) fn model(&self) -> &dyn Model {
        self.model.as_ref()
    }

    /// Runs the rows of `plan`; the logits of its `n`-th part with `sample` are row `n` of
    /// [`Self::logits_row`].
    pub(crate) fn run(&mut self, plan: &StepPlan, running: &[Sequence]) -> Result<(), Error> {
        self.batch.clear();
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
