//! How much memory is free, and what the model makes of it.

use locket_model::{
    kv_cache::{CacheGeometry, CacheMethod, CachePlan, CacheSettings, PlanRequest},
    load::Checkpoint,
};

use crate::{
    cgroup::{self, Limit},
    config::{Config, value::about_bytes},
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
    /// Bytes for weights, workspace and cache together.
    pub budget: u64,
    /// Where the budget comes from.
    pub budget_origin: String,
    /// Bytes of weights and workspace.
    pub model_bytes: u64,
    /// The cache's blocks.
    pub cache: CachePlan,
    /// How a sequence uses its block unless a request says otherwise.
    pub settings: CacheSettings,
    /// Longest prompt plus answer in tokens.
    pub context: usize,
}

/// The memory plan does not fit, or the settings contradict the model.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The operator asks for more context than the model has.
    #[error(
        "max-model-len = {asked} ({origin}) is more than the {trained} tokens that the model was trained for"
    )]
    Context {
        /// Tokens asked for.
        asked: usize,
        /// Who asked.
        origin: String,
        /// Tokens trained for.
        trained: usize,
    },
    /// The operator asks for a block that no sequence could fill.
    #[error(
        "cache.capacities has {asked} ({origin}), which is more than the context of {context} tokens; \
         lower it or raise max-model-len"
    )]
    Capacity {
        /// Tokens asked for.
        asked: u32,
        /// Who asked.
        origin: String,
        /// Longest prompt plus answer in tokens.
        context: usize,
    },
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

impl MemoryPlan {
    /// Plans for `checkpoint` with `free` memory.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn make(config: &Config, checkpoint: &Checkpoint, free: &FreeMemory) -> Result<Self, PlanError> {
        let model_bytes = checkpoint.planned_bytes(config.backend, config.engine.max_batch_rows);
        let trained = checkpoint.config.max_position;
        let geometry = CacheGeometry::of(&checkpoint.config);
        Self::fit(config, free, model_bytes, trained, geometry)
    }

    fn fit(
        config: &Config,
        free: &FreeMemory,
        model_bytes: u64,
        trained: usize,
        geometry: CacheGeometry,
    ) -> Result<Self, PlanError> {
        let context = match config.max_model_len {
            Some(asked) if asked > trained => {
                return Err(PlanError::Context { asked, origin: config.origin("max-model-len"), trained });
            }
            Some(asked) => asked,
            None => trained,
        };
        if let Some(&asked) = config.cache.capacities.iter().find(|&&size| size as usize > context) {
            return Err(PlanError::Capacity { asked, origin: config.origin("cache.capacities"), context });
        }
        let (budget, budget_origin) = match config.memory_budget {
            Some(bytes) => (bytes, config.origin("memory-budget")),
            None => {
                let free_text = about_bytes(free.bytes);
                (free.bytes / 2, format!("half of {free_text} free, bounded by the {}", free.bounded_by))
            }
        };
        let Some(left) = budget.checked_sub(model_bytes) else {
            let (needed, budget) = (about_bytes(model_bytes), about_bytes(budget));
            return Err(PlanError::Weights { needed, budget, origin: budget_origin });
        };
        let settings = settings(config, context);
        let request = PlanRequest {
            geometry,
            slot_type: config.cache.slot_type,
            capacities: capacities(config, context, settings),
            budget_bytes: left,
            max_sequences: u32::try_from(config.engine.max_running).unwrap_or(u32::MAX),
        };
        let cache = CachePlan::fit(&request).map_err(|error| PlanError::Cache {
            budget: about_bytes(budget),
            origin: budget_origin.clone(),
            left: about_bytes(left),
            reason: error.to_string(),
        })?;
        Ok(Self { budget, budget_origin, model_bytes, cache, settings, context })
    }

    /// Bytes of everything that is planned.
    pub fn total_bytes(&self) -> u64 {
        self.model_bytes.saturating_add(self.cache.total_bytes())
    }

    /// The plan in words, a line each.
    pub fn describe(&self) -> Vec<String> {
        let planned = self.total_bytes();
        let mut lines = vec![
            format!("budget     {} ({})", about_bytes(self.budget), self.budget_origin),
            format!(
                "planned    {}, of it weights and workspace {}",
                about_bytes(planned),
                about_bytes(self.model_bytes)
            ),
            format!("context    {} tokens, {}", self.context, describe_settings(self.settings)),
        ];
        lines.extend(self.cache.describe().into_iter().map(|line| format!("cache      {line}")));
        lines
    }
}

fn describe_settings(settings: CacheSettings) -> String {
    match settings.method {
        CacheMethod::Full => "every token is kept (method full)".into(),
        method => format!(
            "{} slots and a ring of {}, {} sinks (method {})",
            settings.slots,
            settings.ring,
            settings.sinks,
            method.name()
        ),
    }
}

/// How a sequence uses its block by default. `full` promises the whole context.
fn settings(config: &Config, context: usize) -> CacheSettings {
    let cache = &config.cache;
    match cache.method {
        CacheMethod::Full => CacheSettings::full(u32::try_from(context).unwrap_or(u32::MAX)),
        method => CacheSettings { method, slots: cache.slots, ring: cache.ring, sinks: cache.sinks },
    }
}

/// Smallest block that is planned on its own.
const SMALLEST: u32 = 256;
/// Blocks are multiples of this many slots, so that attention's tiles start at whole tiles.
const GRAIN: u32 = 64;

/// The sizes of the blocks: the operator's, else a sixteenth, a quarter and all of what a sequence
/// may need. The block of a sequence by default is always there; the operator's larger ones are for
/// requests with more `slots`.
fn capacities(config: &Config, context: usize, settings: CacheSettings) -> Vec<u32> {
    let context = u32::try_from(context).unwrap_or(u32::MAX - GRAIN);
    let default = match settings.method {
        CacheMethod::Full => context,
        _ => settings.capacity(),
    };
    let mut sizes: Vec<u32> = if config.cache.capacities.is_empty() {
        let derived = [context / 16, context / 4].map(|size| size.next_multiple_of(GRAIN).max(SMALLEST));
        derived.into_iter().filter(|&size| size < default).collect()
    } else {
        config.cache.capacities.clone()
    };
    sizes.push(default);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    /// SmolLM2-135M.
    const SMOL: CacheGeometry = CacheGeometry { num_layers: 30, num_kv_heads: 3, head_dim: 64 };

    fn config(file: &str) -> Config {
        let file = crate::config::FileSource { path: "test.toml".into(), text: file.into() };
        Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap()
    }

    fn plan(file: &str, free: u64) -> Result<MemoryPlan, PlanError> {
        let free = FreeMemory { bytes: free, bounded_by: "machine".into() };
        MemoryPlan::fit(&config(file), &free, 200 << 20, 8192, SMOL)
    }

    fn sizes(plan: &MemoryPlan) -> Vec<u32> {
        plan.cache.classes.iter().map(|class| class.capacity).collect()
    }

    #[test]
    fn free_memory_is_something() {
        let free = free_memory();
        assert!(free.bytes > 0, "{free:?}");
    }

    #[test]
    fn the_default_model_fits_a_small_laptop() {
        // 4 GiB with 2 GiB free: budget 1 GiB, 824 MiB of cache.
        let plan = plan("", 2 << 30).unwrap();
        assert_eq!(sizes(&plan), [512, 2048, 8192]);
        assert!(plan.model_bytes + plan.cache.total_bytes() <= plan.budget);
        assert!(plan.cache.num_blocks() >= 16, "{:?}", plan.cache);
        assert!(plan.describe()[0].contains("half of 2.00 GiB free, bounded by the machine"));
    }

    #[test]
    fn window_takes_its_capacity_and_smaller_ones() {
        let plan = plan("[cache]\nmethod = \"window\"\nslots = 1024\n", 2 << 30).unwrap();
        assert_eq!(sizes(&plan), [512, 1152]);
        assert_eq!(plan.settings.capacity(), 1152);
        assert_eq!(plan.context, 8192);
    }

    #[test]
    fn asked_capacities_and_context() {
        let fits = plan("max-model-len = 1000\n[cache]\ncapacities = [1000, 300]\n", 2 << 30).unwrap();
        assert_eq!(sizes(&fits), [300, 1000]);
        let window = "[cache]\nmethod = \"window\"\nslots = 1024\ncapacities = [4096]\n";
        assert_eq!(sizes(&plan(window, 2 << 30).unwrap()), [1152, 4096]);
        let error = plan("max-model-len = 1000\n[cache]\ncapacities = [5000, 300]\n", 2 << 30).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("cache.capacities has 5000 (file test.toml:3)"), "{text}");
        assert!(text.contains("1000 tokens"), "{text}");
    }

    #[test]
    fn refusals_have_numbers() {
        let text = plan("max-model-len = 9000\n", 2 << 30).unwrap_err().to_string();
        assert!(text.contains("9000 (file test.toml:1)") && text.contains("8192"), "{text}");
        let text = plan("", 300 << 20).unwrap_err().to_string();
        assert!(text.contains("200 MiB for weights") && text.contains("150 MiB (half of 300 MiB"), "{text}");
        let text = plan("memory-budget = \"300MiB\"\n", 2 << 30).unwrap_err().to_string();
        assert!(text.contains("300 MiB (file test.toml:1)") && text.contains("leave 100 MiB"), "{text}");
    }
}
