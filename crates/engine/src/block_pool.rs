//! Fixed-size cache blocks by class: take, give back, count. Knows numbers, not memory.

use locket_model::{BlockId, kv_cache::CachePlan};

/// Blocks of one size.
#[derive(Debug)]
struct Class {
    capacity: u32,
    /// Number of the first block of this class.
    first: u32,
    blocks: u32,
    free: Vec<BlockId>,
}

/// Free blocks, classes in ascending order of capacity.
#[derive(Debug)]
pub(crate) struct BlockPool {
    classes: Vec<Class>,
    /// Whether a sequence owns the block `[blocks]`; catches a block given back twice.
    taken: Vec<bool>,
    slots_total: u64,
    slots_taken: u64,
}

impl BlockPool {
    pub(crate) fn new(plan: &CachePlan) -> Self {
        let mut classes = Vec::with_capacity(plan.classes.len());
        let mut first = 0;
        let mut slots_total = 0;
        for class in &plan.classes {
            // Popped from the end: low numbers are used first.
            let free = (first..first + class.blocks).rev().map(BlockId).collect();
            classes.push(Class { capacity: class.capacity, first, blocks: class.blocks, free });
            first += class.blocks;
            slots_total += u64::from(class.capacity) * u64::from(class.blocks);
        }
        Self { classes, taken: vec![false; first as usize], slots_total, slots_taken: 0 }
    }

    /// Number of classes.
    pub(crate) fn num_classes(&self) -> usize {
        self.classes.len()
    }

    /// The smallest class that holds `capacity` slots; [`Self::num_classes`] if none does.
    pub(crate) fn class_for(&self, capacity: u32) -> usize {
        self.classes.partition_point(|class| class.capacity < capacity)
    }

    /// Takes `count` blocks of at least `capacity` slots from classes below `limit`, smallest
    /// first; all of them or none.
    pub(crate) fn take(&mut self, capacity: u32, count: usize, limit: usize) -> Option<Vec<BlockId>> {
        let from = self.class_for(capacity);
        let candidates = self.classes.get(from..limit)?;
        if candidates.iter().map(|class| class.free.len()).sum::<usize>() < count {
            return None;
        }
        let mut blocks = Vec::with_capacity(count);
        for class in &mut self.classes[from..limit] {
            while blocks.len() < count {
                let Some(block) = class.free.pop() else { break };
                self.taken[block.0 as usize] = true;
                self.slots_taken += u64::from(class.capacity);
                blocks.push(block);
            }
        }
        Some(blocks)
    }

    /// Gives `block` back.
    ///
    /// # Panics
    /// If nobody owns it: two sequences in one block would read each other.
    pub(crate) fn give_back(&mut self, block: BlockId) {
        let taken = std::mem::replace(&mut self.taken[block.0 as usize], false);
        assert!(taken, "block {} was given back twice", block.0);
        let class = self.classes.partition_point(|class| class.first + class.blocks <= block.0);
        self.slots_taken -= u64::from(self.classes[class].capacity);
        self.classes[class].free.push(block);
    }

    /// `(capacity, blocks, free)` of each class.
    pub(crate) fn classes(&self) -> impl Iterator<Item = (u32, u32, u32)> + '_ {
        self.classes.iter().map(|class| (class.capacity, class.blocks, class.free.len() as u32))
    }

    /// Slots (per layer and head) of all blocks.
    pub(crate) fn slots_total(&self) -> u64 {
        self.slots_total
    }

    /// Slots of the blocks that have an owner.
    pub(crate) fn slots_taken(&self) -> u64 {
        self.slots_taken
    }

    /// Whether no block has an owner.
    pub(crate) fn is_all_free(&self) -> bool {
        self.slots_taken == 0 && self.classes.iter().all(|class| class.free.len() == class.blocks as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locket_model::kv_cache::{BlockClass, CacheGeometry, SideArrays, SlotType};
    use proptest::prelude::*;

    fn plan(classes: &[(u32, u32)]) -> CachePlan {
        CachePlan {
            geometry: CacheGeometry {
                num_layers: 1,
                num_heads: 1,
                num_kv_heads: 1,
                head_dim: 1,
                max_position: 8192,
            },
            side: SideArrays::default(),
            slot_type: SlotType::F32,
            classes: classes.iter().map(|&(capacity, blocks)| BlockClass { capacity, blocks }).collect(),
        }
    }

    #[test]
    fn an_empty_class_falls_up_and_all_or_nothing_holds() {
        let mut pool = BlockPool::new(&plan(&[(64, 2), (256, 1)]));
        assert_eq!(pool.take(65, 1, 2), Some(vec![BlockId(2)]));
        assert_eq!(pool.take(10, 3, 2), None);
        pool.give_back(BlockId(2));
        assert_eq!(pool.take(10, 3, 1), None, "the large class is reserved");
        assert_eq!(pool.take(10, 3, 2), Some(vec![BlockId(0), BlockId(1), BlockId(2)]));
        assert_eq!(pool.take(300, 1, 2), None);
        assert_eq!(pool.slots_taken(), pool.slots_total());
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_block_cannot_be_given_back_twice() {
        let mut pool = BlockPool::new(&plan(&[(64, 2)]));
        let blocks = pool.take(1, 1, 1).unwrap();
        pool.give_back(blocks[0]);
        pool.give_back(blocks[0]);
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_owned_twice(
            steps in prop::collection::vec((any::<bool>(), 1u32..300, 1usize..4), 1..200),
        ) {
            let plan = plan(&[(32, 3), (128, 2), (256, 2)]);
            let mut pool = BlockPool::new(&plan);
            let mut owned: Vec<BlockId> = Vec::new();
            for (take, capacity, count) in steps {
                if take {
                    if let Some(blocks) = pool.take(capacity, count, pool.num_classes()) {
                        prop_assert_eq!(blocks.len(), count);
                        for block in blocks {
                            prop_assert!(!owned.contains(&block));
                            prop_assert!(plan.capacity(block).unwrap() >= capacity);
                            owned.push(block);
                        }
                    }
                } else if !owned.is_empty() {
                    pool.give_back(owned.swap_remove(capacity as usize % owned.len()));
                }
                let taken: u64 = owned.iter().map(|&block| u64::from(plan.capacity(block).unwrap())).sum();
                prop_assert_eq!(pool.slots_taken(), taken);
            }
            for block in owned.drain(..) {
                pool.give_back(block);
            }
            prop_assert!(pool.is_all_free());
        }
    }
}
