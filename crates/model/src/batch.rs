//! What one step computes: flat rows, no padding.

use std::{ops::Range, sync::Arc};

use crate::Error;

/// Names one sequence's cache memory. Blocks are numbered from 0 over all classes of the
/// [`CachePlan`](crate::kv_cache::CachePlan), smallest class first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Names an adapter that a model has loaded ([`Model::load_adapter`](crate::Model::load_adapter)). No
/// number is given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u32);

/// One step's input. Decode rows and prefill chunks share every matrix product; a row is one token, or
/// one visual token, whose embedding is given.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids `[rows]`; those of rows with an embedding are not looked up.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence `[rows]`, from 0. Positions of a sequence ascend; where
    /// tokens were left out they have gaps.
    pub positions: Vec<u32>,
    /// Which rows belong to which sequence; ranges are disjoint, ascending and cover all rows.
    pub sequences: Vec<BatchSequence>,
    /// Rows whose logits are wanted `[samples]`, ascending.
    pub sample_rows: Vec<u32>,
    /// Rows whose embedding is not the table's; ranges are disjoint and ascending.
    pub embedded: Vec<EmbeddedRows>,
    /// The layer that the rows come to first: 0, but for prompts that are held between layers.
    pub first_layer: u32,
}

/// The rows of one sequence in a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of this sequence: consecutive tokens, the first behind the last one that its block has seen.
    pub rows: Range<u32>,
    /// The sequence's cache, opened before.
    pub block: BlockId,
    /// The adapter that its rows go through; `None`: the model as it is.
    pub adapter: Option<AdapterId>,
}

/// Rows of a [`Batch`] whose embedding is given: visual tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddedRows {
    /// The rows.
    pub rows: Range<u32>,
    /// Embeddings `[more rows, hidden_size]` that others may share.
    pub embeddings: Arc<[f32]>,
    /// Which of them is the first row's.
    pub first: u32,
}

impl Batch {
    /// Empties the batch and keeps its allocations.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.sample_rows.clear();
        self.embedded.clear();
        self.first_layer = 0;
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.ids.len()
    }

    /// Appends one sequence's next tokens, the first at `position`, the others right behind it; `sample`
    /// asks for the logits of the last row.
    pub fn push(&mut self, block: BlockId, position: u32, ids: &[u32], sample: bool) {
        self.push_at(block, (position..).take(ids.len()), ids, sample);
    }

    /// Appends one sequence's next tokens at `positions`, one for each of `ids`; `sample` asks for the
    /// logits of the last row.
    pub fn push_at(
        &mut self,
        block: BlockId,
        positions: impl IntoIterator<Item = u32>,
        ids: &[u32],
        sample: bool,
    ) {
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend(positions);
        let end = self.ids.len() as u32;
        self.sequences.push(BatchSequence { rows: start..end, block, adapter: None });
        if sample && end > start {
            self.sample_rows.push(end - 1);
        }
    }

    /// Lets the rows of the sequence that was pushed last go through `adapter`.
    pub fn set_adapter(&mut self, adapter: Option<AdapterId>) {
        if let Some(sequence) = self.sequences.last_mut() {
            sequence.adapter = adapter;
        }
    }

    /// Gives `rows`, behind all that have an embedding already, those of `embeddings [more rows,
    /// hidden_size]` from `first` on.
    pub fn embed(&mut self, rows: Range<u32>, embeddings: &Arc<[f32]>, first: u32) {
        if !rows.is_empty() {
            self.embedded.push(EmbeddedRows { rows, embeddings: Arc::clone(embeddings), first });
        }
    }

    /// Checks everything about the batch that is not the cache's matter.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if it has no rows or more than `max_rows`, an id is not below
    /// `vocab_size`, embeddings are not there or not `hidden_size` wide, or rows, sequences and sample rows
    /// contradict one another. How far positions may go depends on a block's settings:
    /// [`BlockState::check_append`](crate::kv_cache::BlockState::check_append).
    pub fn check(&self, max_rows: usize, vocab_size: usize, hidden_size: usize) -> Result<(), Error> {
        let rows = self.num_rows();
        let invalid = |reason: String| Err(Error::InvalidBatch(reason));
        if rows == 0 || rows > max_rows {
            return invalid(format!("{rows} rows; 1 to {max_rows} are possible"));
        }
        if self.positions.len() != rows {
            return invalid(format!("{rows} ids but {} positions", self.positions.len()));
        }
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= vocab_size) {
            return invalid(format!("id {id}; the vocabulary has {vocab_size}"));
        }
        if self.sample_rows.iter().any(|&row| row as usize >= rows)
            || !self.sample_rows.is_sorted_by(|a, b| a < b)
        {
            return invalid(format!("sample rows must ascend below {rows}"));
        }
        let mut next = 0;
        for (idx, sequence) in self.sequences.iter().enumerate() {
            let Range { start, end } = sequence.rows;
            if start != next || end <= start || end as usize > rows {
                return invalid(format!("sequence {idx} has rows {start}..{end}, expected them from {next}"));
            }
            let positions = &self.positions[start as usize..end as usize];
            if !positions.is_sorted_by(|a, b| a < b) {
                return invalid(format!("positions of sequence {idx} do not ascend"));
            }
            next = end;
        }
        if next as usize != rows {
            return invalid(format!("sequences cover {next} of {rows} rows"));
        }
        self.check_embedded(hidden_size)
    }

    fn check_embedded(&self, hidden_size: usize) -> Result<(), Error> {
        let mut next = 0;
        for EmbeddedRows { rows, embeddings, first } in &self.embedded {
            let (Range { start, end }, first) = (rows.clone(), *first as usize);
            let have = embeddings.len().checked_div(hidden_size).unwrap_or(0);
            let in_order = start >= next && end > start && end as usize <= self.num_rows();
            if !in_order || first + rows.len() > have || !embeddings.len().is_multiple_of(hidden_size) {
                return Err(Error::InvalidBatch(format!(
                    "rows {start}..{end} have embeddings from {first} on of {} numbers, {hidden_size} each",
                    embeddings.len()
                )));
            }
            next = end;
        }
        Ok(())
    }

    /// Every row with an embedding, and the embedding `[hidden_size]`; after [`Self::check`].
    pub(crate) fn embeddings(&self, hidden_size: usize) -> impl Iterator<Item = (usize, &[f32])> {
        self.embedded.iter().flat_map(move |part| {
            let of_part = part.embeddings.chunks_exact(hidden_size).skip(part.first as usize);
            (part.rows.start as usize..part.rows.end as usize).zip(of_part)
        })
    }

    /// Positions of a sequence's rows.
    pub(crate) fn positions_of(&self, sequence: &BatchSequence) -> &[u32] {
        &self.positions[sequence.rows.start as usize..sequence.rows.end as usize]
    }
}
