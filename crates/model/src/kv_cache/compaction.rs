//! Keeping positions inside the trained range.
//!
//! Rotary embeddings are trained on positions below some `T`. A sequence whose block folds may become
//! longer than that. When its next row would be at or behind absolute position `T, T + D, T + 2D, …` the
//! block is *compacted* (a gap may cross several borders, which then count as one of their sum): with a head's slots in order of their positions `p_0 < p_1 < …`, slot `j` moves to
//! `max(p_j - D, j)`. Recent tokens keep their distances to each other and to what follows, sinks stay
//! where they are, and tokens from long ago crowd behind the sinks in order. Keys are turned by the
//! difference. It happens rarely and by a large step `D`, so rounding does not add up.

/// What positions mean in a block that folds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// `T`: positions that the model was trained on.
    trained: u32,
    /// `D`: positions gained by a compaction; 0 if the block cannot outgrow `T`.
    step: u32,
}

impl Frame {
    /// The frame of a block with `capacity` slots of a model trained on `max_position` positions.
    pub fn new(max_position: usize, capacity: u32) -> Self {
        let trained = u32::try_from(max_position).unwrap_or(u32::MAX);
        // After a compaction half of the range is free again, or what the slots leave.
        let kept = (trained / 2).max(capacity);
        let step = trained.saturating_sub(kept) / 16 * 16;
        Self { trained, step }
    }

    /// A frame that is never left: a block that does not fold.
    pub fn fixed(max_position: usize) -> Self {
        Self { trained: u32::try_from(max_position).unwrap_or(u32::MAX), step: 0 }
    }

    /// Absolute positions that a sequence may reach.
    pub fn limit(&self) -> u32 {
        if self.step == 0 { self.trained } else { u32::MAX }
    }

    /// `D`.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// How often the block was compacted before the row at absolute position `position` is appended.
    pub fn turns(&self, position: u32) -> u32 {
        match position.checked_sub(self.trained) {
            Some(beyond) if self.step > 0 => 1 + beyond / self.step,
            _ => 0,
        }
    }

    /// The position that the row at absolute position `position` is rotated to.
    pub fn position(&self, position: u32) -> u32 {
        if position < self.trained || self.step == 0 {
            position
        } else {
            self.trained - self.step + (position - self.trained) % self.step
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_stay_in_the_trained_range() {
        let frame = Frame::new(8192, 640);
        assert_eq!(frame.step(), 4096);
        assert_eq!(frame.position(8191), 8191);
        assert_eq!((frame.position(8192), frame.position(12287), frame.position(12288)), (4096, 8191, 4096));
        assert_eq!([0, 8191, 8192, 12287, 12288].map(|position| frame.turns(position)), [0, 0, 1, 1, 2]);
        for position in 0..100_000 {
            assert!(frame.position(position) < 8192);
            assert_eq!(
                frame.position(position + 1) == frame.position(position) + 1,
                frame.turns(position + 1) == frame.turns(position)
            );
        }
    }

    #[test]
    fn large_blocks_take_smaller_steps_and_too_large_ones_none() {
        let frame = Frame::new(8192, 6000);
        assert_eq!(frame.step(), 2192 / 16 * 16);
        assert!(frame.position(8192) >= 6000);
        let frame = Frame::new(8192, 8192);
        assert_eq!((frame.step(), frame.limit(), frame.turns(8192)), (0, 8192, 0));
        assert_eq!(Frame::fixed(512).limit(), 512);
    }
}
