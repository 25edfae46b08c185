//! What one step computes: flat rows, no padding.

use std::ops::Range;

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
}
