//! How much memory is free, and what the model makes of it.

use locket_model::{
    Extras,
    kv_cache::{CacheGeometry, CachePlan, PlanRequest, SideCar},
    load::Checkpoint,
};

use crate::{
    cache::{CacheChoice, ChoiceError},
    cgroup::{self, Limit},
    config::{Config, value::about_bytes},
    side_car::FoundSideCar,
    vision::FoundVision,
};

/// Memory that may still be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeMemory {
    /// Bytes.
    pub bytes: u64,
    /// What bounds them: the machine or a cgroup's limit.
    pub bounded_by: String,
}

/// The smaller of what the machine has available and what the cgroup's limits leave.
pub fn free_memory() -> FreeMemory {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let machine = FreeMemory { bytes: system.available_memory(), bounded_by: "machine".into() };
    match cgroup::tightest(cgroup::MOUNT.as_ref(), "/proc/self/cgroup".as_ref()) {
        Some(Limit { free, folder }) if free < machine.bytes => {
            FreeMemory { bytes: free, bounded_by: format!("cgroup {}", folder.display()) }
        }
        _ => machine,
    }
}

/// What is allocated at start, and why it is that much.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    /// Bytes for weights, workspace, cache and snapshots together.
    pub budget: u64,
    /// Where the budget comes from.
    pub budget_origin: String,
    /// Bytes of weights and workspace, the copy through which a block with layer budgets goes included.
    pub model_bytes: u64,
    /// Bytes of side-car weights and what scoring with them needs.
    pub side_car_bytes: u64,
    /// Bytes of the vision model, of images being seen, and of visual tokens that are kept.
    pub vision_bytes: u64,
    /// Bytes of adapters, and of rows that are held between layers.
    pub adapter_bytes: u64,
    /// The cache's blocks.
    pub cache: CachePlan,
    /// How sequences use them.
    pub choice: CacheChoice,
    /// States of blocks that are kept.
    pub snapshots: SnapshotPlan,
}

/// Memory for snapshots; all zero if they are off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SnapshotPlan {
    /// Bound of the states that are kept, in bytes.
    pub kept_bytes: u64,
    /// Bytes of the one state that is being taken: of the largest block.
    pub taken_bytes: u64,
    /// Bound of the generated turns that the server remembers, in bytes.
    pub turn_bytes: u64,
}

impl SnapshotPlan {
    /// Bytes in all.
    pub fn total_bytes(&self) -> u64 {
        self.kept_bytes.saturating_add(self.taken_bytes).saturating_add(self.turn_bytes)
    }

    /// Whether there are any.
    pub fn is_on(&self) -> bool {
        self.kept_bytes > 0
    }

    fn of(kept_bytes: u64, taken_bytes: u64) -> Self {
        match kept_bytes {
            0 => Self::default(),
            _ => Self { kept_bytes, taken_bytes, turn_bytes: (kept_bytes / TURN_SHARE).min(TURN_BYTES) },
        }
    }
}

/// Largest memory of snapshots that nobody asked for.
const SNAPSHOT_BYTES: u64 = 256 << 20;
/// And its part of what the budget leaves beside the weights: one of so many.
const SNAPSHOT_SHARE: u64 = 10;
/// Largest memory of generated turns.
const TURN_BYTES: u64 = 16 << 20;
/// And its part of the snapshots' memory: a token takes 4 bytes there, and far more in a state.
const TURN_SHARE: u64 = 16;

/// The memory plan does not fit, or the settings contradict the model.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Settings that contradict the model or its side-car.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// Weights and workspace alone are too large.
    #[error(
        "the model needs {needed} for weights and workspace, and the budget is {budget} ({origin}); \
         give more with memory-budget, or a smaller model"
    )]
    Weights {
        /// Bytes needed, for reading.
        needed: String,
        /// Bytes allowed, for reading.
        budget: String,
        /// Where the budget comes from.
        origin: String,
    },
    /// The snapshots' memory is more than there is.
    #[error(
        "snapshots.memory = {asked} ({origin}) does not fit: weights, workspace and one block of each size leave \
         {left} of the budget of {budget} ({budget_origin}); lower it, or raise memory-budget"
    )]
    Snapshots {
        /// Bytes asked for, for reading.
        asked: String,
        /// Who asked.
        origin: String,
        /// Bytes that are left, for reading.
        left: String,
        /// Bytes allowed, for reading.
        budget: String,
        /// Where the budget comes from.
        budget_origin: String,
    },
    /// Not one sequence fits beside the weights.
    #[error(
        "the cache does not fit: of the budget of {budget} ({origin}) weights and workspace leave {left}. {reason}"
    )]
    Cache {
        /// Bytes allowed, for reading.
        budget: String,
        /// Where the budget comes from.
        origin: String,
        /// Bytes that are left, for reading.
        left: String,
        /// The planner's reason.
        reason: String,
    },
}

/// What the budget has to hold beside cache and snapshots, in bytes.
#[derive(Debug, Clone, Copy)]
struct Fixed {
    model: u64,
    side_car: u64,
    vision: u64,
    adapters: u64,
}

/// What stands beside the model.
#[derive(Clone, Copy, Default)]
pub struct Beside<'a> {
    /// Its eyes.
    pub vision: Option<&'a FoundVision>,
    /// Room for adapters, and for prompts that lose tokens inside the decoder.
    pub extras: Extras,
}

impl MemoryPlan {
    /// Plans for `checkpoint` with `free` memory.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn make(
        config: &Config,
        checkpoint: &Checkpoint,
        side_car: Option<&FoundSideCar>,
        beside: Beside<'_>,
        free: &FreeMemory,
    ) -> Result<Self, PlanError> {
        let rows = config.engine.max_batch_rows;
        let weights = side_car.map(|found| found.weights.as_ref());
        let fixed = Fixed {
            model: checkpoint.planned_bytes(config.backend, rows),
            side_car: weights.map_or(0, |weights| weights.planned_bytes(rows)),
            vision: beside.vision.map_or(0, |vision| vision.planned_bytes(config)),
            adapters: beside.extras.planned_bytes(&checkpoint.config, rows),
        };
        Self::fit(config, free, fixed, CacheGeometry::of(&checkpoint.config), weights)
    }

    fn fit(
        config: &Config,
        free: &FreeMemory,
        fixed: Fixed,
        geometry: CacheGeometry,
        side_car: Option<&SideCar>,
    ) -> Result<Self, PlanError> {
        let mut choice = CacheChoice::make(config, geometry, side_car)?;
        if fixed.vision > 0 {
            // What is dropped of images leaves gaps between positions, of which folds must know.
            choice.side = choice.side.with_gaps();
        }
        let (budget, budget_origin) = match config.memory_budget {
            Some(bytes) => (bytes, config.origin("memory-budget")),
            None => {
                let free_text = about_bytes(free.bytes);
                (free.bytes / 2, format!("half of {free_text} free, bounded by the {}", free.bounded_by))
            }
        };
        // Where a block's layers get regions of their own, it is laid out anew through a copy.
        let largest = choice.capacities.last().copied().unwrap_or(0);
        let spread_bytes = match choice.bounds.layer_budgets {
            true => CachePlan::block_bytes(geometry, config.cache.slot_type, choice.side, largest),
            false => 0,
        };
        let model_bytes = fixed.model.saturating_add(spread_bytes);
        let needed = model_bytes
            .saturating_add(fixed.side_car)
            .saturating_add(fixed.vision)
            .saturating_add(fixed.adapters);
        let Some(left) = budget.checked_sub(needed) else {
            let (needed, budget) = (about_bytes(needed), about_bytes(budget));
            return Err(PlanError::Weights { needed, budget, origin: budget_origin });
        };
        let mut request = PlanRequest {
            geometry,
            slot_type: config.cache.slot_type,
            side: choice.side,
            capacities: choice.capacities.clone(),
            budget_bytes: left,
            max_sequences: u32::try_from(config.engine.max_running).unwrap_or(u32::MAX),
        };
        let fit = |request: &PlanRequest| {
            CachePlan::fit(request).map_err(|error| PlanError::Cache {
                budget: about_bytes(budget),
                origin: budget_origin.clone(),
                left: about_bytes(left),
                reason: error.to_string(),
            })
        };
        // What fits without snapshots is what they must leave room for.
        let bare = fit(&request)?;
        let snapshots = snapshots(config, &bare, left).map_err(|left| PlanError::Snapshots {
            asked: about_bytes(config.snapshots.memory.unwrap_or(0)),
            origin: config.origin("snapshots.memory"),
            left: about_bytes(left),
            budget: about_bytes(budget),
            budget_origin: budget_origin.clone(),
        })?;
        request.budget_bytes = left - snapshots.total_bytes();
        let cache = fit(&request)?;
        choice.bounds.snapshots = snapshots.is_on();
        Ok(Self {
            budget,
            budget_origin,
            model_bytes,
            side_car_bytes: fixed.side_car,
            vision_bytes: fixed.vision,
            adapter_bytes: fixed.adapters,
            cache,
            choice,
            snapshots,
        })
    }

    /// Bytes of everything that is planned.
    pub fn total_bytes(&self) -> u64 {
        let parts = [
            self.model_bytes,
            self.side_car_bytes,
            self.vision_bytes,
            self.adapter_bytes,
            self.cache.total_bytes(),
            self.snapshots.total_bytes(),
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// The plan in words, a line each.
    pub fn describe(&self) -> Vec<String> {
        let side_car = match self.side_car_bytes {
            0 => String::new(),
            bytes => format!(", side-car {}", about_bytes(bytes)),
        };
        let vision = match self.vision_bytes {
            0 => String::new(),
            bytes => format!(", vision {}", about_bytes(bytes)),
        };
        let adapters = match self.adapter_bytes {
            0 => String::new(),
            bytes => format!(", adapters {}", about_bytes(bytes)),
        };
        let mut lines = vec![
            format!("budget     {} ({})", about_bytes(self.budget), self.budget_origin),
            format!(
                "planned    {}: weights and workspace {}{side_car}{vision}{adapters}, cache {}, snapshots {}",
                about_bytes(self.total_bytes()),
                about_bytes(self.model_bytes),
                about_bytes(self.cache.total_bytes()),
                about_bytes(self.snapshots.total_bytes()),
            ),
        ];
        lines.extend(self.choice.describe(&self.cache));
        lines.extend(self.cache.describe().into_iter().map(|line| format!("cache      {line}")));
        lines.push(match self.snapshots.is_on() {
            true => format!(
                "snapshots  {} kept, {} for the one that is taken, {} for answers that come back",
                about_bytes(self.snapshots.kept_bytes),
                about_bytes(self.snapshots.taken_bytes),
                about_bytes(self.snapshots.turn_bytes),
            ),
            false => "snapshots  off".into(),
        });
        lines
    }
}

/// Memory of snapshots, of `left` bytes beside weights and workspace. One block of every size of `bare`
/// comes first: snapshots that nobody asked for take what that leaves, or are off.
///
/// # Errors
/// The bytes that are left for those that somebody asked for and that do not fit.
fn snapshots(config: &Config, bare: &CachePlan, left: u64) -> Result<SnapshotPlan, u64> {
    let block = |capacity| CachePlan::block_bytes(bare.geometry, bare.slot_type, bare.side, capacity);
    let needed = bare.classes.iter().fold(0, |sum: u64, class| sum.saturating_add(block(class.capacity)));
    let room = left.saturating_sub(needed);
    let taken = bare.classes.last().map_or(0, |class| block(class.capacity));
    if let Some(asked) = config.snapshots.memory {
        let plan = SnapshotPlan::of(asked, taken);
        return if plan.total_bytes() <= room { Ok(plan) } else { Err(room) };
    }
    let plan = SnapshotPlan::of((left / SNAPSHOT_SHARE).min(SNAPSHOT_BYTES), taken);
    match (plan.total_bytes() <= room, &config.snapshots.dir) {
        (true, _) => Ok(plan),
        (false, None) => Ok(SnapshotPlan::default()),
        (false, Some(_)) => Err(room),
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
