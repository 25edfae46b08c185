//! Every way to use a block that tests of the cache go through.

use locket_model::kv_cache::{CacheMethod, CacheSettings};

/// Slots that survive a fold.
pub const SLOTS: u32 = 48;
/// Slots filled between folds.
pub const RING: u32 = 20;

/// Settings of `method`; `full` has `context` slots.
pub fn settings(method: CacheMethod, context: u32) -> CacheSettings {
    match method {
        CacheMethod::Full => CacheSettings::full(context),
        _ => CacheSettings { sinks: 4, recent: 12, ..CacheSettings::of(method, SLOTS, RING) },
    }
}

/// Every method, and with budgets per layer those that have them.
pub fn all(context: u32) -> Vec<CacheSettings> {
    let with_budgets = CacheMethod::ALL.into_iter().filter(|method| method.shares_layers());
    let with_budgets =
        with_budgets.map(|method| CacheSettings { layer_budgets: true, ..settings(method, context) });
    CacheMethod::ALL.into_iter().map(|method| settings(method, context)).chain(with_budgets).collect()
}
