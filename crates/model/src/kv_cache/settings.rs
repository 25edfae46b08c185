//! How one sequence uses its block.

use super::{CacheMethod, SideArrays};
use crate::Error;

/// How one sequence uses its block. Comes from the request's settings alone, never from load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSettings {
    /// Who ranks.
    pub method: CacheMethod,
    /// `M`: slots that survive a fold; exact attention up to this many tokens.
    pub slots: u32,
    /// `B`: slots filled between folds; 0 for [`CacheMethod::Full`].
    pub ring: u32,
    /// First tokens of the sequence that always survive: attention sinks, and a pinned system prompt.
    pub sinks: u32,
    /// Latest tokens that always survive a fold.
    pub recent: u32,
    /// Thousandths of the slots that are neither sinks nor recent which [`CacheMethod::Learned`]
    /// fills by its recall score.
    pub recall_permille: u16,
    /// Share the slots out among the layers by the side-car's [`SideCar::layer_shares`] once the sequence
    /// has outgrown its block; a step's rows must then not cross [`Self::rows_to_border`].
    ///
    /// [`SideCar::layer_shares`]: super::SideCar::layer_shares
    pub layer_budgets: bool,
}

impl CacheSettings {
    /// A block that holds `tokens` tokens and never folds.
    pub fn full(tokens: u32) -> Self {
        Self {
            method: CacheMethod::Full,
            slots: tokens,
            ring: 0,
            sinks: 0,
            recent: 0,
            recall_permille: 0,
            layer_budgets: false,
        }
    }

    /// `method` with `slots` and `ring`, and the sinks and recent tokens that its authors or our
    /// measurements suggest.
    pub fn of(method: CacheMethod, slots: u32, ring: u32) -> Self {
        if method == CacheMethod::Full {
            return Self::full(slots);
        }
        let (sinks, recent) = match method {
            // As published: nothing is protected.
            CacheMethod::Tova | CacheMethod::Lococo => (0, 0),
            CacheMethod::H2o => (0, slots / 2),
            CacheMethod::Expected | CacheMethod::KeyDiff => (4, slots / 2),
            _ => (4, slots / 4),
        };
        let recall_permille = if method == CacheMethod::Learned { 500 } else { 0 };
        let sinks = sinks.min(slots / 4);
        Self { method, slots, ring, sinks, recent, recall_permille, layer_budgets: false }
    }

    /// Most rows that one step may append to a block that has seen `seen` tokens: a block with layer
    /// budgets is laid out anew between two steps when all its layers are full for the first time.
    pub fn rows_to_border(&self, seen: u32) -> u32 {
        match self.capacity().checked_sub(seen) {
            Some(rows) if rows > 0 && self.layer_budgets => rows,
            _ => u32::MAX,
        }
    }

    /// Slots per layer and head: `M + B`.
    pub fn capacity(&self) -> u32 {
        self.slots.saturating_add(self.ring)
    }

    /// Whether the block can fold at all.
    pub fn folds(&self) -> bool {
        self.ring > 0
    }

    /// Checks the settings against a block whose memory has `stride` slots per layer and head and
    /// these side arrays, of which `needed` are wanted. A sequence that would fold later may live in a
    /// smaller block for as long as it fits.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] naming the field that is wrong.
    pub fn check(&self, stride: usize, side: SideArrays, needed: SideArrays) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::InvalidBatch(reason));
        if self.ring == 0 && self.slots as usize > stride {
            return invalid(format!("settings need {} slots, but the block has {stride}", self.slots));
        }
        if self.slots.checked_add(self.ring).is_none() {
            return invalid(format!("settings need {} + {} slots", self.slots, self.ring));
        }
        if !side.holds(needed) {
            return invalid(format!(
                "method {} was not among the methods that the blocks were planned for",
                self.method.name()
            ));
        }
        let name = self.method.name();
        match self.method {
            _ if self.slots == 0 => invalid("slots is 0; at least one token must survive a fold".into()),
            CacheMethod::Full if self.ring != 0 => {
                invalid(format!("ring is {}, but method full never folds", self.ring))
            }
            CacheMethod::Full => Ok(()),
            _ if self.ring == 0 => invalid(format!("ring is 0; method {name} needs one")),
            _ if u64::from(self.sinks) + u64::from(self.recent) > u64::from(self.slots) => invalid(format!(
                "sinks is {} and recent {}, together more than slots, {}",
                self.sinks, self.recent, self.slots
            )),
            CacheMethod::Window if self.sinks >= self.slots => {
                invalid(format!("sinks is {}, but must be below slots, {}", self.sinks, self.slots))
            }
            _ if self.layer_budgets && !self.method.shares_layers() => {
                invalid(format!("layer_budgets is on, but method {name} gives all layers the same slots"))
            }
            _ if self.recall_permille > 1000 => {
                invalid(format!("recall_permille is {}, but a share ends at 1000", self.recall_permille))
            }
            _ => Ok(()),
        }
    }
}
