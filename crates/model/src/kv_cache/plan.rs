//! The memory arithmetic: how many blocks of which size are allocated at start.

use super::CacheGeometry;
use crate::{BlockId, Error};

/// Number type of keys and values in the slots; one per process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SlotType {
    /// IEEE single.
    F32,
    /// IEEE half.
    #[default]
    F16,
    /// bfloat16.
    Bf16,
}

impl SlotType {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Blocks of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockClass {
    /// Slots per layer and head, `M + B`.
    pub capacity: u32,
    /// How many blocks are allocated.
    pub blocks: u32,
}

/// What is allocated at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachePlan {
    /// The model's geometry.
    pub geometry: CacheGeometry,
    /// Number type of the slots.
    pub slot_type: SlotType,
    /// Classes by ascending capacity.
    pub classes: Vec<BlockClass>,
}

/// What the operator asks of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRequest {
    /// The model's geometry.
    pub geometry: CacheGeometry,
    /// Number type of the slots.
    pub slot_type: SlotType,
    /// Capacities of the classes; the planner sorts them and drops duplicates.
    pub capacities: Vec<u32>,
    /// Bytes that the cache may take.
    pub budget_bytes: u64,
    /// Sequences that may run at once; no class gets more blocks than this.
    pub max_sequences: u32,
}

impl CachePlan {
    /// Bytes of one block of `capacity` slots: keys, values and side arrays.
    pub fn block_bytes(geometry: CacheGeometry, slot_type: SlotType, capacity: u32) -> u64 {
        let numbers = 2 * geometry.head_dim * slot_type.bytes();
        let side = size_of::<u32>();
        (geometry.num_layers * geometry.num_kv_heads) as u64 * u64::from(capacity) * (numbers + side) as u64
    }

    /// Bytes of all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.classes
            .iter()
            .map(|class| {
                u64::from(class.blocks) * Self::block_bytes(self.geometry, self.slot_type, class.capacity)
            })
            .sum()
    }

    /// Number of blocks in all classes.
    pub fn num_blocks(&self) -> u32 {
        self.classes.iter().map(|class| class.blocks).sum()
    }

    /// The capacity of `block`, or `None` if there is no such block.
    pub fn capacity(&self, block: BlockId) -> Option<u32> {
        let mut first = 0;
        for class in &self.classes {
            if block.0 < first + class.blocks {
                return Some(class.capacity);
            }
            first += class.blocks;
        }
        None
    }

    /// Fits blocks into the budget. (Filled in by the planner's author.)
    ///
    /// # Errors
    /// [`Error::Plan`] if not even one block of the largest class fits.
    pub fn fit(request: &PlanRequest) -> Result<Self, Error> {
        let _ = request;
        Err(Error::Plan("not planned yet".into()))
    }
}
