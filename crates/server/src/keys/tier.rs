//! `service_tier`: who may be served earlier.

use super::Key;

/// Applies the tier that a request asks for to its place in the queue, and returns the one that is
/// used: `priority` and `fast` lower the rank by one class if the key may, all else is `default`.
pub(crate) fn apply_tier(asked: Option<&'static str>, key: Option<&Key>, priority: &mut i32) -> &'static str {
    let may = key.is_some_and(|key| key.entry.may_prioritise);
    match asked {
        Some(tier @ ("priority" | "fast")) if may => {
            *priority = priority.saturating_sub(1);
            tier
        }
        _ => "default",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::keys::{KeyDigest, KeyEntry, KeyLimits, LimitSettings};

    #[test]
    fn only_keys_that_may_are_served_earlier() {
        let key = |may_prioritise| Key {
            entry: KeyEntry { may_prioritise, ..KeyEntry::unlimited("a", KeyDigest::of(b"k")) },
            limits: Arc::new(KeyLimits::new(LimitSettings::default())),
        };
        let tier = |asked, key: Option<&Key>, mut priority| {
            let used = apply_tier(asked, key, &mut priority);
            (used, priority)
        };
        assert_eq!(tier(Some("priority"), Some(&key(true)), 3), ("priority", 2));
        assert_eq!(tier(Some("fast"), Some(&key(true)), i32::MIN), ("fast", i32::MIN));
        assert_eq!(tier(Some("flex"), Some(&key(true)), 3), ("default", 3));
        assert_eq!(tier(Some("priority"), Some(&key(false)), 3), ("default", 3));
        assert_eq!(tier(Some("priority"), None, 3), ("default", 3));
        assert_eq!(tier(None, Some(&key(true)), 3), ("default", 3));
    }
}
