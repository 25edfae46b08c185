//! The key/value cache: blocks of fixed size, the fold driver, and the methods that rank slots.
//!
//! A *block* is one sequence's cache: for each layer `K, V [kv_heads, capacity, head_dim]` with
//! `capacity = slots + ring`. All blocks are allocated at start in a few classes
//! ([`CachePlan`]). Backends own the keys and values; what is in which slot ([`BlockState`]) is
//! kept here, on the host, and is the same for every backend.
//!
//! **The fold rule.** A layer folds when and only when it is full, just before the next row is
//! appended: the method ranks the slots, the best `slots` survive, and survivors among the newest
//! slots move into the evicted ones. Folds depend on the sequence alone, never on chunking, load
//! or neighbours.

mod block;
mod full;
mod plan;
mod window;

pub use block::{BlockState, FoldScratch, Segment, SlotMove};
pub use plan::{BlockClass, CachePlan, PlanRequest, SlotType};

/// The part of a model's geometry that decides the size of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Decoder layers.
    pub num_layers: usize,
    /// Key/value heads per layer.
    pub num_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

impl CacheGeometry {
    /// Geometry of a model's cache.
    pub fn of(config: &crate::ModelConfig) -> Self {
        Self { num_layers: config.num_layers, num_kv_heads: config.num_kv_heads, head_dim: config.head_dim }
    }
}

/// Which tokens a full block keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheMethod {
    /// Everything: the block is as long as the sequence may become.
    #[default]
    Full,
    /// The first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453).
    Window,
}

impl CacheMethod {
    /// Every method, in the order in which documentation lists them.
    pub const ALL: [Self; 2] = [Self::Full, Self::Window];

    /// The name used in configuration, requests and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window => "window",
        }
    }

    /// The implementation.
    fn fold_method(self) -> &'static dyn FoldMethod {
        match self {
            Self::Full => &full::Full,
            Self::Window => &window::Window,
        }
    }
}

impl std::str::FromStr for CacheMethod {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|method| method.name() == name)
            .ok_or_else(|| format!("unknown cache method {name:?}; known are full, window"))
    }
}

/// How one sequence uses its block. Comes from the request's settings alone, never from load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSettings {
    /// Who ranks.
    pub method: CacheMethod,
    /// `M`: slots that survive a fold; exact attention up to this many tokens.
    pub slots: u32,
    /// `B`: slots filled between folds; 0 for [`CacheMethod::Full`].
    pub ring: u32,
    /// First tokens of the sequence that always survive.
    pub sinks: u32,
}

impl CacheSettings {
    /// A block that holds `tokens` tokens and never folds.
    pub fn full(tokens: u32) -> Self {
        Self { method: CacheMethod::Full, slots: tokens, ring: 0, sinks: 0 }
    }

    /// Slots per layer and head: `M + B`.
    pub fn capacity(&self) -> u32 {
        self.slots + self.ring
    }

    /// Checks the settings against a block whose memory has `stride` slots per layer and head.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`](crate::Error::InvalidBatch) naming the field that is wrong.
    pub fn check(&self, stride: usize) -> Result<(), crate::Error> {
        let invalid = |reason: String| Err(crate::Error::InvalidBatch(reason));
        if u64::from(self.slots) + u64::from(self.ring) > stride as u64 {
            return invalid(format!(
                "settings need {} + {} slots, but the block has {stride}",
                self.slots, self.ring
            ));
        }
        match self.method {
            _ if self.slots == 0 => invalid("slots is 0; at least one token must survive a fold".into()),
            CacheMethod::Full if self.ring != 0 => {
                invalid(format!("ring is {}, but method full never folds", self.ring))
            }
            CacheMethod::Window if self.ring == 0 => invalid("ring is 0; method window needs one".into()),
            CacheMethod::Window if self.sinks >= self.slots => {
                invalid(format!("sinks is {}, but must be below slots, {}", self.sinks, self.slots))
            }
            _ => Ok(()),
        }
    }
}

/// What a method sees of one layer of one block when it ranks.
#[derive(Debug, Clone, Copy)]
pub struct LayerView<'a> {
    /// The layer.
    pub layer: usize,
    /// Filled slots of each head.
    pub len: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Position of the token in each slot `[kv_heads, stride]`; `stride` is the block's capacity.
    pub positions: &'a [u32],
    /// Slots between two heads in [`Self::positions`].
    pub stride: usize,
}

/// Ranks slots. One driver folds for all methods; a method only says what is worth keeping.
pub(crate) trait FoldMethod: Send + Sync {
    /// Writes a score per slot into `scores [kv_heads, len]`; higher survives.
    fn rank(&self, view: LayerView<'_>, scores: &mut [f32]);
}
