//! The series that only the binary can fill: what is in force, what was planned, the process.

use anyhow::Context as _;
use locket_model::{kv_cache::CacheSettings, load::Checkpoint};
use prometheus::{Gauge, GaugeVec, Opts, Registry};

use crate::{config::Config, memory::MemoryPlan, side_car::FoundSideCar};

/// Names and values of labels.
type Labels = Vec<(&'static str, String)>;

/// What does not change while the server runs.
pub struct InForce<'a> {
    /// The name that answers carry.
    pub model_name: &'a str,
    /// The settings.
    pub config: &'a Config,
    /// The model's files.
    pub checkpoint: &'a Checkpoint,
    /// Memory, and how sequences use their blocks.
    pub plan: &'a MemoryPlan,
    /// Trained weights of the cache.
    pub side_car: Option<&'a FoundSideCar>,
}

/// Registers build, settings, memory plan and the process's own series.
///
/// # Errors
/// Somebody has registered one of them already.
pub fn register(registry: &Registry, facts: &InForce<'_>) -> anyhow::Result<()> {
    let collector = prometheus::process_collector::ProcessCollector::for_self();
    registry.register(Box::new(collector)).context("cannot register the process metrics")?;
    register_infos(registry, facts).context("cannot register the settings as metrics")?;
    register_plan(registry, facts.plan).context("cannot register the memory plan as metrics")
}

fn register_infos(registry: &Registry, facts: &InForce<'_>) -> Result<(), prometheus::Error> {
    let build = vec![
        ("version", crate::VERSION.to_owned()),
        ("commit", env!("BUILD_COMMIT").to_owned()),
        ("features", env!("BUILD_FEATURES").to_owned()),
    ];
    info(registry, "locket_build_info", "Version, commit and features; the value is 1.", build)?;
    let help = "Settings in force that change what answers say or take; the value is 1.";
    info(registry, "locket_settings_info", help, settings(facts))
}

/// A gauge of 1 that is there for its labels.
fn info(registry: &Registry, name: &str, help: &str, labels: Labels) -> Result<(), prometheus::Error> {
    let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let gauge = Gauge::with_opts(Opts::new(name, help).const_labels(labels))?;
    gauge.set(1.0);
    registry.register(Box::new(gauge))
}

/// What decides how good answers are, beside the weights, and for whom.
fn settings(facts: &InForce<'_>) -> Labels {
    let InForce { model_name, config, checkpoint, plan, side_car } = *facts;
    let choice = &plan.choice;
    let CacheSettings { method, slots, ring, sinks, recent, layer_budgets, .. } = choice.settings;
    let methods: Vec<&str> = choice.bounds.allowed.iter().map(|method| method.name()).collect();
    let reasoning = &config.reasoning;
    vec![
        ("model_name", model_name.to_owned()),
        ("quantization", checkpoint.quantization.clone()),
        ("backend", format!("{:?}", config.backend).to_lowercase()),
        ("context", choice.context.to_string()),
        ("trained_context", choice.trained.to_string()),
        ("cache_method", method.name().to_owned()),
        ("cache_methods", methods.join(",")),
        ("cache_slots", slots.to_string()),
        ("cache_ring", ring.to_string()),
        ("cache_sinks", sinks.to_string()),
        ("cache_recent", recent.to_string()),
        ("cache_layer_budgets", layer_budgets.to_string()),
        ("cache_dtype", plan.cache.slot_type.name().to_owned()),
        ("cache_side_car", side_car.map_or("none", |found| found.origin.as_str()).to_owned()),
        ("require_exact", choice.bounds.require_exact.to_string()),
        ("snapshots", plan.snapshots.is_on().to_string()),
        ("reasoning_mode", reasoning.mode.map_or("default", |mode| mode.name()).to_owned()),
        ("reasoning_budget", reasoning.budget.map_or("none".to_owned(), |budget| budget.to_string())),
    ]
}

fn register_plan(registry: &Registry, plan: &MemoryPlan) -> Result<(), prometheus::Error> {
    let planned =
        GaugeVec::new(Opts::new("locket_memory_plan_bytes", "Bytes planned at start, by part."), &["part"])?;
    let snapshots = plan.snapshots;
    for (part, bytes) in [
        ("model", plan.model_bytes),
        ("side_car", plan.side_car_bytes),
        ("cache", plan.cache.total_bytes()),
        ("snapshots", snapshots.kept_bytes.saturating_add(snapshots.taken_bytes)),
        ("turns", snapshots.turn_bytes),
    ] {
        planned.with_label_values(&[part]).set(bytes as f64);
    }
    registry.register(Box::new(planned))?;
    let budget = Gauge::new("locket_memory_budget_bytes", "Bytes that the plan had to fit into.")?;
    budget.set(plan.budget as f64);
    registry.register(Box::new(budget))
}

#[cfg(test)]
mod tests {
    use locket_model::testing;

    use super::*;
    use crate::{
        config::Sources,
        memory::{Beside, FreeMemory},
    };

    #[test]
    fn what_is_in_force_is_told_and_documented() {
        let config = Config::load(&Sources::default()).expect("the defaults");
        let checkpoint = Checkpoint::open(&testing::default_model()).expect("the default model");
        let free = FreeMemory { bytes: 4 << 30, bounded_by: "test".into() };
        let plan = MemoryPlan::make(&config, &checkpoint, None, Beside::default(), &free).expect("a plan");
        let facts = InForce {
            model_name: "smollm2",
            config: &config,
            checkpoint: &checkpoint,
            plan: &plan,
            side_car: None,
        };
        let registry = Registry::new();
        register(&registry, &facts).expect("an empty registry");
        let families = registry.gather();
        for family in families.iter().filter(|family| family.name().starts_with("locket_")) {
            let entry = format!("| `{}` |", family.name());
            assert!(include_str!("../../../docs/metrics.md").contains(&entry), "{entry} is not documented");
        }
        let parts: f64 = families
            .iter()
            .filter(|family| family.name() == "locket_memory_plan_bytes")
            .flat_map(|family| family.get_metric())
            .map(|metric| metric.get_gauge().get_value())
            .sum();
        assert_eq!(parts, plan.total_bytes() as f64);
        let settings = settings(&facts);
        let value = |name| settings.iter().find(|(label, _)| *label == name).map(|(_, value)| value.as_str());
        assert_eq!(value("cache_dtype"), Some("f16"));
        assert_eq!(value("cache_side_car"), Some("none"));
        assert_eq!(value("cache_slots"), Some(plan.choice.settings.slots.to_string().as_str()));
    }
}
