//! The memory arithmetic: how many blocks of which size are allocated at start.

use super::{CacheGeometry, SideArrays};
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
    /// 8-bit integers with a scale per slot and head for the key and one for the value. Every slot is
    /// quantised once, when it is appended.
    I8,
    /// 4-bit integers between the least and the largest of 32 numbers: an experiment that only the
    /// reference backend has.
    I4,
}

impl SlotType {
    /// Every type, in the order in which documentation lists them.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::I8, Self::I4];

    /// Bytes of a key and a value of `key` and `value` numbers.
    fn pair_bytes(self, key: u64, value: u64) -> u64 {
        let numbers = key.saturating_add(value);
        match self {
            Self::F32 => numbers.saturating_mul(4),
            Self::F16 | Self::Bf16 => numbers.saturating_mul(2),
            // Two f32 scales.
            Self::I8 => numbers.saturating_add(8),
            // A least number and a step in half precision per 32 numbers.
            Self::I4 => numbers.div_ceil(2).saturating_add(numbers.div_ceil(32).saturating_mul(4)),
        }
    }

    /// Whether slots hold numbers as they come, so that mixtures may be written into them.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::I8 | Self::I4)
    }

    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I8 => "int8",
            Self::I4 => "int4",
        }
    }
}

/// The CPU backend's blocks have whole groups of this many slots, and its values whole groups of
/// this many dimensions, so that vector registers are full.
const PADDING: u64 = 16;

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
    /// What the methods that may be used keep beside keys, values and positions.
    pub side: SideArrays,
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
    /// What the methods that may be used keep beside keys, values and positions.
    pub side: SideArrays,
    /// Capacities of the classes; the planner sorts them and drops duplicates.
    pub capacities: Vec<u32>,
    /// Bytes that the cache may take.
    pub budget_bytes: u64,
    /// Sequences that may run at once; no class gets more blocks than this.
    pub max_sequences: u32,
}

impl CachePlan {
    /// Bytes of one block of `capacity` slots, rounded up to 16 as the CPU backend does: keys,
    /// values and side arrays. `u64::MAX` if they cannot be counted, which no budget pays for.
    pub fn block_bytes(geometry: CacheGeometry, slot_type: SlotType, side: SideArrays, capacity: u32) -> u64 {
        let per_layer = (side.per_layer as u64).saturating_mul(size_of::<f32>() as u64);
        Self::slot_bytes(geometry, slot_type, side)
            .saturating_mul(u64::from(capacity).next_multiple_of(PADDING))
            .saturating_add(per_layer.saturating_mul(geometry.num_layers as u64))
    }

    /// Bytes that one token takes in all layers and heads: a key, a value (its dimensions rounded
    /// up to 16), a position and side arrays each.
    pub fn slot_bytes(geometry: CacheGeometry, slot_type: SlotType, side: SideArrays) -> u64 {
        let beside = (1 + u64::from(side.gaps) + side.columns as u64).saturating_mul(size_of::<u32>() as u64);
        let key = geometry.head_dim as u64;
        let value = key.checked_next_multiple_of(PADDING).unwrap_or(u64::MAX);
        slot_type
            .pair_bytes(key, value)
            .saturating_add(beside)
            .saturating_mul(geometry.num_layers as u64)
            .saturating_mul(geometry.num_kv_heads as u64)
    }

    /// Bytes of all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.classes.iter().fold(0, |sum: u64, class| sum.saturating_add(self.class_bytes(class)))
    }

    fn class_bytes(&self, class: &BlockClass) -> u64 {
        Self::block_bytes(self.geometry, self.slot_type, self.side, class.capacity)
            .saturating_mul(u64::from(class.blocks))
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

    /// Fits blocks into the budget.
    ///
    /// 1. One block of every class that fits, the largest class first, so that the promised
    ///    context is always possible.
    /// 2. Then block by block to the class that holds the fewest bytes so far (the larger one if
    ///    equal), passing over classes that have [`PlanRequest::max_sequences`] blocks or whose
    ///    block no longer fits. Classes end up with about equal bytes, so there are many small
    ///    blocks and short requests do not hold long ones.
    ///
    /// More budget never means fewer blocks of the largest class, and what stays unused is less
    /// than a block of the smallest class that could still have one.
    ///
    /// # Errors
    /// [`Error::Plan`] if not even one block of the largest class fits, or the request has no
    /// capacity or no sequence.
    pub fn fit(request: &PlanRequest) -> Result<Self, Error> {
        let mut capacities = request.capacities.clone();
        capacities.sort_unstable();
        capacities.dedup();
        if capacities.first().is_none_or(|&smallest| smallest == 0) {
            return Err(Error::Plan("every class of blocks needs a capacity of at least one slot".into()));
        }
        if request.max_sequences == 0 {
            return Err(Error::Plan("max_sequences is 0; at least one sequence must fit".into()));
        }
        // Blocks are numbered by u32 over all classes.
        let most = request.max_sequences.min(u32::MAX / capacities.len() as u32);
        let bytes: Vec<u64> = capacities
            .iter()
            .map(|&capacity| Self::block_bytes(request.geometry, request.slot_type, request.side, capacity))
            .collect();
        let mut left = request.budget_bytes;
        let mut blocks = vec![0u32; capacities.len()];
        for class in (0..capacities.len()).rev() {
            if bytes[class] <= left {
                left -= bytes[class];
                blocks[class] = 1;
            } else if class + 1 == capacities.len() {
                return Err(does_not_fit(request, capacities[class]));
            }
        }
        let next = |blocks: &[u32], left: u64| {
            (0..blocks.len())
                .rev()
                .filter(|&class| blocks[class] < most && bytes[class] <= left)
                .min_by_key(|&class| bytes[class] * u64::from(blocks[class]))
        };
        while let Some(class) = next(&blocks, left) {
            left -= bytes[class];
            blocks[class] += 1;
        }
        let classes = capacities
            .into_iter()
            .zip(blocks)
            .filter(|&(_, blocks)| blocks > 0)
            .map(|(capacity, blocks)| BlockClass { capacity, blocks })
            .collect();
        Ok(Self { geometry: request.geometry, slot_type: request.slot_type, side: request.side, classes })
    }

    /// The plan in words, a line per class and one for the total, for the start-up print.
    pub fn describe(&self) -> Vec<String> {
        let class_line = |class: &BlockClass| {
            let each = Self::block_bytes(self.geometry, self.slot_type, self.side, class.capacity);
            format!(
                "{} x {} slots, {} per block, {} in all",
                class.blocks,
                class.capacity,
                mebibytes(each),
                mebibytes(self.class_bytes(class))
            )
        };
        let mut lines: Vec<String> = self.classes.iter().map(class_line).collect();
        lines.push(format!(
            "{} blocks, {} in {} slots of {} bytes per token",
            self.num_blocks(),
            mebibytes(self.total_bytes()),
            self.slot_type.name(),
            Self::slot_bytes(self.geometry, self.slot_type, self.side)
        ));
        lines
    }
}

fn does_not_fit(request: &PlanRequest, capacity: u32) -> Error {
    let needed = CachePlan::block_bytes(request.geometry, request.slot_type, request.side, capacity);
    let slot = CachePlan::slot_bytes(request.geometry, request.slot_type, request.side);
    let possible = request.budget_bytes.checked_div(slot).unwrap_or(0) / PADDING * PADDING;
    let narrower = match request.slot_type {
        SlotType::F32 => "--cache-dtype f16 (half the bytes)",
        SlotType::F16 | SlotType::Bf16 => "--cache-dtype int8 (half the bytes)",
        SlotType::I8 | SlotType::I4 => "there is no narrower --cache-dtype",
    };
    Error::Plan(format!(
        "one sequence of {capacity} slots needs {needed} bytes of cache ({slot} per token), but {} are \
         available. Ways out: a smaller --max-model-len (at most {possible} here) or cache method window \
         with fewer slots; {narrower}; a larger --memory-budget",
        request.budget_bytes
    ))
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// SmolLM2-135M.
    const SMOL: CacheGeometry =
        CacheGeometry { num_layers: 30, num_heads: 9, num_kv_heads: 3, head_dim: 64, max_position: 8192 };

    fn request(capacities: &[u32], budget_bytes: u64, max_sequences: u32) -> PlanRequest {
        PlanRequest {
            geometry: SMOL,
            slot_type: SlotType::F16,
            side: SideArrays::default(),
            capacities: capacities.to_vec(),
            budget_bytes,
            max_sequences,
        }
    }

    #[test]
    fn smollm2_token_takes_23400_bytes_in_f16() {
        // 30 layers * 3 heads * (2 * 64 * 2 bytes + 4 bytes of position).
        assert_eq!(CachePlan::slot_bytes(SMOL, SlotType::F16, SideArrays::default()), 23_400);
        assert_eq!(CachePlan::slot_bytes(SMOL, SlotType::Bf16, SideArrays::default()), 23_400);
        assert_eq!(CachePlan::slot_bytes(SMOL, SlotType::F32, SideArrays::default()), 46_440);
        // 2 * 64 bytes, two scales, position, three side arrays.
        let learned = SideArrays { columns: 3, per_layer: 8 * 384, gaps: false };
        assert_eq!(CachePlan::slot_bytes(SMOL, SlotType::I8, learned), 90 * (128 + 8 + 16));
        assert_eq!(CachePlan::block_bytes(SMOL, SlotType::I8, learned, 256), 256 * 90 * 152 + 30 * 4 * 3072);
        assert_eq!(CachePlan::block_bytes(SMOL, SlotType::F16, SideArrays::default(), 8192), 191_692_800);
        assert_eq!(CachePlan::slot_bytes(SMOL, SlotType::F16, SideArrays::default().with_gaps()), 23_760);
        let monstrous = CacheGeometry {
            num_layers: usize::MAX,
            num_heads: usize::MAX,
            num_kv_heads: usize::MAX,
            head_dim: usize::MAX,
            max_position: 1,
        };
        assert_eq!(
            CachePlan::block_bytes(monstrous, SlotType::F32, SideArrays::default(), u32::MAX),
            u64::MAX
        );
    }

    #[test]
    fn what_backends_pad_is_counted() {
        let geometry =
            CacheGeometry { num_layers: 2, num_heads: 3, num_kv_heads: 3, head_dim: 40, max_position: 1 };
        // Values take 48 dimensions.
        let slot = 2 * 3 * ((40 + 48) * 2 + 4);
        assert_eq!(CachePlan::slot_bytes(geometry, SlotType::F16, SideArrays::default()), slot);
        for (capacity, slots) in [(1, 16), (16, 16), (17, 32), (u32::MAX, 1 << 32)] {
            assert_eq!(
                CachePlan::block_bytes(geometry, SlotType::F16, SideArrays::default(), capacity),
                slots * slot
            );
        }
    }

    #[test]
    fn classes_share_bytes_equally() {
        // Budget of 48 blocks of the smallest class: 16 units for each class.
        let unit = CachePlan::block_bytes(SMOL, SlotType::F16, SideArrays::default(), 256);
        let plan = CachePlan::fit(&request(&[4096, 256, 1024, 256], 48 * unit, 64)).unwrap();
        let blocks: Vec<_> = plan.classes.iter().map(|class| (class.capacity, class.blocks)).collect();
        assert_eq!(blocks, [(256, 16), (1024, 4), (4096, 1)]);
        assert_eq!(plan.total_bytes(), 48 * unit);
        let lines = plan.describe();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], "16 x 256 slots, 5.7 MiB per block, 91.4 MiB in all");
        assert_eq!(lines[3], "21 blocks, 274.2 MiB in f16 slots of 23400 bytes per token");
    }

    #[test]
    fn the_largest_class_comes_first() {
        let largest = CachePlan::block_bytes(SMOL, SlotType::F16, SideArrays::default(), 4096);
        let plan = CachePlan::fit(&request(&[256, 4096], largest, 64)).unwrap();
        assert_eq!(plan.classes, [BlockClass { capacity: 4096, blocks: 1 }]);
    }

    #[test]
    fn refuses_with_bytes_and_ways_out() {
        let error = CachePlan::fit(&request(&[256, 8192], 100_000_000, 64)).unwrap_err().to_string();
        for part in [
            "191692800",
            "100000000",
            "--max-model-len (at most 4272",
            "--cache-dtype",
            "--memory-budget",
            "window",
        ] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        assert!(CachePlan::fit(&request(&[], 1 << 40, 64)).is_err());
        assert!(CachePlan::fit(&request(&[0, 8], 1 << 40, 64)).is_err());
        assert!(CachePlan::fit(&request(&[8], 1 << 40, 0)).is_err());
    }

    fn requests() -> impl Strategy<Value = PlanRequest> {
        let geometry = (1usize..40, 1usize..9, 1usize..129);
        let slot_type = prop::sample::select(SlotType::ALL.to_vec());
        (geometry, slot_type, prop::collection::vec(1u32..5000, 1..5), 0u64..1 << 33, 1u32..100).prop_map(
            |((num_layers, num_kv_heads, head_dim), slot_type, capacities, budget_bytes, max_sequences)| {
                let geometry = CacheGeometry {
                    num_layers,
                    num_heads: num_kv_heads,
                    num_kv_heads,
                    head_dim,
                    max_position: 1,
                };
                let side = SideArrays { columns: 3, per_layer: 100, gaps: false };
                PlanRequest { geometry, slot_type, side, capacities, budget_bytes, max_sequences }
            },
        )
    }

    proptest! {
        #[test]
        fn keeps_its_promises(request in requests()) {
            let largest = *request.capacities.iter().max().unwrap();
            let bytes = |capacity| CachePlan::block_bytes(request.geometry, request.slot_type, request.side, capacity);
            let Ok(plan) = CachePlan::fit(&request) else {
                prop_assert!(bytes(largest) > request.budget_bytes);
                return Ok(());
            };
            prop_assert!(plan.total_bytes() <= request.budget_bytes);
            prop_assert!(plan.classes.windows(2).all(|pair| pair[0].capacity < pair[1].capacity));
            prop_assert_eq!(plan.classes.last().unwrap().capacity, largest);
            let left = request.budget_bytes - plan.total_bytes();
            for class in &plan.classes {
                prop_assert!((1..=request.max_sequences).contains(&class.blocks));
                prop_assert!(class.blocks == request.max_sequences || bytes(class.capacity) > left);
            }
            for &capacity in &request.capacities {
                let planned = plan.classes.iter().any(|class| class.capacity == capacity);
                prop_assert!(planned || bytes(capacity) > left);
            }
        }

        #[test]
        fn more_budget_never_costs_long_sequences(request in requests(), more in 0u64..1 << 32) {
            let larger = PlanRequest { budget_bytes: request.budget_bytes + more, ..request.clone() };
            if let Ok(plan) = CachePlan::fit(&request) {
                let larger = CachePlan::fit(&larger).unwrap();
                prop_assert!(larger.classes.last().unwrap().blocks >= plan.classes.last().unwrap().blocks);
            }
        }

        #[test]
        fn every_block_id_has_the_capacity_of_its_class(request in requests()) {
            if let Ok(plan) = CachePlan::fit(&request) {
                let capacities: Vec<u32> =
                    (0..plan.num_blocks()).map(|id| plan.capacity(BlockId(id)).unwrap()).collect();
                let expected: Vec<u32> = plan
                    .classes
                    .iter()
                    .flat_map(|class| std::iter::repeat_n(class.capacity, class.blocks as usize))
                    .collect();
                prop_assert_eq!(capacities, expected);
                prop_assert_eq!(plan.capacity(BlockId(plan.num_blocks())), None);
                prop_assert_eq!(plan.capacity(BlockId(u32::MAX)), None);
            }
        }
    }
}
