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
//!
//! **Layer budgets.** By the settings, layers keep different numbers of slots, in the same memory
//! ([`CacheSettings::layer_budgets`]).
//!
//! **Positions.** Keys are stored rotated. A sequence that outgrows the trained context is
//! *compacted* at fixed positions ([`compaction`]): its slots move closer together so that the
//! newest position is inside the trained range again. A sequence's positions ascend and may have gaps
//! (dropped visual tokens): folds go by tokens, rotation and compaction by positions.

mod block;
mod budgets;
pub mod compaction;
mod fold;
mod image;
mod methods;
mod plan;
mod progress;
mod rotation;
mod settings;
pub mod side_car;

pub use block::{BlockState, Segment};
pub(crate) use budgets::most_slots;
pub use fold::{Fold, FoldContext, FoldScratch, LayerView, SlotMove, SlotReader, Turn};
pub use methods::{CacheMethod, Received, SideArrays};
pub use plan::{BlockClass, CachePlan, PlanRequest, SlotType};
pub use rotation::Rotation;
pub use settings::CacheSettings;
pub use side_car::SideCar;

/// The part of a model's geometry that decides the size of a slot and how many positions there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads per layer.
    pub num_heads: usize,
    /// Key/value heads per layer.
    pub num_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Positions that the model was trained on.
    pub max_position: usize,
}

impl CacheGeometry {
    /// Geometry of a model's cache.
    pub fn of(config: &crate::ModelConfig) -> Self {
        Self {
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            max_position: config.max_position,
        }
    }

    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}
