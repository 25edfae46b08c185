//! `service_tier` and `priority`: who may be served earlier.

use serde_json::Value;

use super::Key;
use crate::error::{ApiError, ErrorKind};

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

/// Refuses a `priority` below that of requests that name none, unless the key may be served earlier.
/// What is no number is left to the route.
///
/// # Errors
/// 403 `permission_denied`.
pub(crate) fn check_priority(key: &Key, priority: Option<&Value>) -> Result<(), ApiError> {
    let is_earlier = priority.and_then(Value::as_f64).is_some_and(|priority| priority < 0.0);
    if !is_earlier || key.entry.may_prioritise {
        return Ok(());
    }
    let message = "`priority` is negative, but this API key may not be served before others. Send 0 or more.";
    Err(ApiError::field(ErrorKind::PermissionDenied, "priority", message))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::keys::{KeyDigest, KeyEntry, KeyLimits, LimitSettings};

    fn key(may_prioritise: bool) -> Key {
        Key {
            entry: KeyEntry { may_prioritise, ..KeyEntry::unlimited("a", KeyDigest::of(b"k")) },
            limits: Arc::new(KeyLimits::new(LimitSettings::default())),
        }
    }

    #[test]
    fn negative_priorities() {
        for (priority, is_good) in
            [(json!(-1), false), (json!(-2.0), false), (json!(0), true), (json!(5), true), (json!("x"), true)]
        {
            assert_eq!(check_priority(&key(false), Some(&priority)).is_ok(), is_good, "{priority}");
            assert_eq!(check_priority(&key(true), Some(&priority)), Ok(()));
        }
        assert_eq!(check_priority(&key(false), None), Ok(()));
    }

    #[test]
    fn only_keys_that_may_are_served_earlier() {
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
