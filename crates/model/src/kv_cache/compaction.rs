//! Keeping positions inside the trained range.
//!
//! Rotary embeddings are trained on positions below some `T`. A sequence whose block folds may become
//! longer than that. When its next row would be at absolute position `T, T + D, T + 2D, …` the block
//! is *compacted*: with a head's slots in order of their positions `p_0 < p_1 < …`, slot `j` moves to
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

    /// The position that the row at absolute position `position` is rotated to.
    pub fn position(&self, position: u32) -> u32 {
        if position < self.trained || self.step == 0 {
            position
        } else {
            self.trained - self.step + (position - self.trained) % self.step
        }
    }

    /// Whether the block is compacted before the row at absolute position `position` is appended.
    pub fn is_border(&self, position: u32) -> bool {
        self.step > 0 && position >= self.trained && (position - self.trained).is_multiple_of(self.step)
    }

    /// Rows from absolute position `position` to the next border, that position's own border excepted.
    pub fn until_border(&self, position: u32) -> u32 {
        if self.step == 0 {
            u32::MAX
        } else if position < self.trained {
            self.trained - position
        } else {
            self.step - (position - self.trained) % self.step
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
        assert!(frame.is_border(8192) && frame.is_border(12288) && !frame.is_border(8193));
        assert_eq!((frame.position(8192), frame.position(12287), frame.position(12288)), (4096, 8191, 4096));
        assert_eq!(
            (frame.until_border(0), frame.until_border(8192), frame.until_border(12287)),
            (8192, 4096, 1)
        );
        for position in 0..100_000 {
            assert!(frame.position(position) < 8192);
            assert_eq!(
                frame.position(position + 1) == frame.position(position) + 1,
                !frame.is_border(position + 1)
            );
        }
    }

    #[test]
    fn large_blocks_take_smaller_steps_and_too_large_ones_none() {
        let frame = Frame::new(8192, 6000);
        assert_eq!(frame.step(), 2192 / 16 * 16);
        assert!(frame.position(8192) >= 6000);
        let frame = Frame::new(8192, 8192);
        assert_eq!((frame.step(), frame.limit(), frame.is_border(8192)), (0, 8192, false));
        assert_eq!(Frame::fixed(512).limit(), 512);
    }
}
