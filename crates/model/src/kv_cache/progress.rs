//! How far a layer has come in its sequence.
//!
//! Without gaps the number of tokens that a layer has seen is the position of the next one. Visual tokens
//! that were dropped leave gaps: then folds and ages go by tokens, rotation and compaction by positions.

/// What one layer of a block knows of the tokens that it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Progress {
    /// Tokens seen.
    pub(super) seen: u32,
    /// Position behind the latest token.
    pub(super) next: u32,
    /// How far the layer's positions lie before those of the sequence: what was dropped before it, if
    /// the rest was moved together.
    pub(super) shift: u32,
    /// Position in the block's frame behind the last of the sequence's first tokens that always survive.
    pub(super) sink_end: u32,
}

impl Progress {
    /// Positions without a token before the next token's.
    pub(super) fn gaps(self) -> u32 {
        self.next - self.seen
    }

    /// The layer's position of a token of the sequence.
    pub(super) fn position(self, position: u32) -> u32 {
        position - self.shift
    }

    /// Whether a block can have come this far in a layer, having come as far as `before` in the one below:
    /// all layers end at one position of the sequence.
    pub(super) fn may_follow(self, before: Option<Self>) -> bool {
        let end = |progress: Self| progress.next.checked_add(progress.shift);
        let is_possible = self.seen <= self.next && end(self).is_some();
        is_possible && before.is_none_or(|before| end(before) == end(self))
    }

    /// Counts tokens at `positions` of the sequence, not empty, of whose first ones `sinks` always
    /// survive.
    pub(super) fn append(&mut self, positions: &[u32], sinks: u32) {
        let Some(&last) = positions.last() else { return };
        let new = (positions.len() as u32).min(sinks.saturating_sub(self.seen));
        if let Some(sink) = new.checked_sub(1) {
            self.sink_end = self.position(positions[sink as usize]) + 1;
        }
        self.seen += positions.len() as u32;
        self.next = self.position(last) + 1;
    }

    /// Follows the sinks through a compaction by `step` positions.
    pub(super) fn compact(&mut self, step: u32, sinks: u32) {
        if let (Some(last), Some(rank)) = (self.sink_end.checked_sub(1), self.seen.min(sinks).checked_sub(1))
        {
            self.sink_end = last.saturating_sub(step).max(rank).min(last) + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_gaps_positions_count_tokens() {
        let mut progress = Progress::default();
        progress.append(&[0, 1, 2], 4);
        assert_eq!((progress.sink_end, progress.gaps()), (3, 0));
        progress.append(&[3, 4, 5], 4);
        assert_eq!((progress.sink_end, progress.next, progress.gaps()), (4, 6, 0));
        progress.compact(4, 4);
        assert_eq!(progress.sink_end, 4);
    }

    #[test]
    fn sinks_are_the_first_tokens_wherever_they_are() {
        let mut progress = Progress::default();
        progress.append(&[0, 7], 3);
        progress.append(&[90, 91], 3);
        assert_eq!(progress, Progress { seen: 4, next: 92, shift: 0, sink_end: 91 });
        assert_eq!(progress.gaps(), 88);
        progress.compact(64, 3);
        assert_eq!(progress.sink_end, 27);
        progress.compact(64, 3);
        assert_eq!(progress.sink_end, 3);
    }
}
