//! What one step computes: flat rows, no padding.

use std::ops::Range;

use crate::Error;

/// Names one sequence's cache memory. Blocks are numbered from 0 over all classes of the
/// [`CachePlan`](crate::kv_cache::CachePlan), smallest class first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// One step's input. Decode rows and prefill chunks share every matrix product; a row is one token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids `[rows]`.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence `[rows]`, from 0.
    pub positions: Vec<u32>,
    /// Which rows belong to which sequence; ranges are disjoint, ascending and cover all rows.
    pub sequences: Vec<BatchSequence>,
    /// Rows whose logits are wanted `[samples]`, ascending.
    pub sample_rows: Vec<u32>,
}

/// The rows of one sequence in a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of this sequence: consecutive tokens, the first at the position after the last one
    /// that its block has seen.
    pub rows: Range<u32>,
    /// The sequence's cache, opened before.
    pub block: BlockId,
}

impl Batch {
    /// Empties the batch and keeps its allocations.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.sample_rows.clear();
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.ids.len()
    }

    /// Appends one sequence's next tokens, the first at `position`; `sample` asks for the logits
    /// of the last row.
    pub fn push(&mut self, block: BlockId, position: u32, ids: &[u32], sample: bool) {
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend((position..).take(ids.len()));
        let end = self.ids.len() as u32;
        self.sequences.push(BatchSequence { rows: start..end, block });
        if sample && end > start {
            self.sample_rows.push(end - 1);
        }
    }

    /// Checks everything about the batch that is not the cache's matter.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if it has no rows or more than `max_rows`, an id is not below
    /// `vocab_size`, or rows, sequences and sample rows contradict one another. How far positions may
    /// go depends on a block's settings:
    /// [`BlockState::check_append`](crate::kv_cache::BlockState::check_append).
    pub fn check(&self, max_rows: usize, vocab_size: usize) -> Result<(), Error> {
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
            if !positions.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1])) {
                return invalid(format!("positions of sequence {idx} are not consecutive"));
            }
            next = end;
        }
        if next as usize != rows {
            return invalid(format!("sequences cover {next} of {rows} rows"));
        }
        Ok(())
    }
}
