//! How sequences use their cache block, and what a request may ask for.

use locket_model::kv_cache::{CacheMethod, CacheSettings};

use super::ConfigError;

/// The operator's limits and defaults of the key/value cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheBounds {
    /// Methods that requests may name; [`Self::method`] is one of them. The blocks were planned for
    /// all of them, and trained weights are there for those that need some.
    pub allowed: Vec<CacheMethod>,
    /// Method of requests that name none.
    pub method: CacheMethod,
    /// Slots that survive a fold (`M`) of requests that name none.
    pub slots: u32,
    /// Slots filled between folds (`B`); `None`: a quarter of the slots, 64 to 128.
    pub ring: Option<u32>,
    /// Most slots that a request may ask for; with its ring it fits into the largest block
    /// ([`Self::largest_slots`]).
    pub max_slots: u32,
    /// Most tokens, prompt and answer, of a sequence with the method `full`: what the largest block
    /// and the trained context hold. Other methods go on up to `max_model_len`.
    pub max_full_len: u32,
    /// First tokens that always survive; `None`: as the method suggests. At most a quarter of the slots.
    pub sinks: Option<u32>,
    /// Latest tokens that always survive, in thousandths of the slots, for the method `learned`;
    /// `None`: as the method suggests. A side-car file may recommend it.
    pub learned_recent_permille: Option<u16>,
    /// Share of the slots that `learned` fills by its recall score, in thousandths; `None`: as the
    /// method suggests. A side-car file may recommend it.
    pub learned_recall_permille: Option<u16>,
    /// Whether layers get the shares of the slots that the side-car names, with methods that allow it.
    pub layer_budgets: bool,
    /// The slots that the weights of `lococo` were trained for: it has no others.
    pub lococo_slots: Option<u32>,
    /// Whether requests are refused, or their answers end, instead of folding, unless they say otherwise.
    pub require_exact: bool,
    /// Prompts are scored with the method `full`, unless the request names another; else with that of
    /// the request.
    pub scoring_full: bool,
    /// Whether the engine keeps snapshots, and requests go on from them. Chats then keep their method
    /// however short they are, so that the next turn finds what the last one left.
    pub snapshots: bool,
}

impl Default for CacheBounds {
    /// Everything that needs no trained weights.
    fn default() -> Self {
        Self {
            allowed: CacheMethod::ALL.into_iter().filter(|method| !method.needs_side_car()).collect(),
            method: CacheMethod::Full,
            slots: 1024,
            ring: None,
            max_slots: 4096,
            max_full_len: u32::MAX,
            sinks: None,
            learned_recent_permille: None,
            learned_recall_permille: None,
            layer_budgets: false,
            lococo_slots: None,
            require_exact: false,
            scoring_full: false,
            snapshots: false,
        }
    }
}

impl CacheBounds {
    /// Fewest slots of a request.
    pub const MIN_SLOTS: u32 = 16;

    /// The ring (`B`) of a block with `slots` (`M`): `fixed`, or a quarter of the slots, 64 to 128.
    pub fn ring_of(slots: u32, fixed: Option<u32>) -> u32 {
        fixed.unwrap_or_else(|| (slots / 4).clamp(64, 128))
    }

    /// The most slots that a block of `capacity` slots has room for beside their ring; 0 if it has
    /// room for the ring alone or less.
    pub fn largest_slots(capacity: u32, ring: Option<u32>) -> u32 {
        // The ring grows with the slots, so the largest one leaves the fewest: look from there up.
        let fewest = capacity.saturating_sub(ring.unwrap_or(128));
        let fits = |slots: u32| slots.saturating_add(Self::ring_of(slots, ring)) <= capacity;
        (fewest..=capacity).rev().find(|slots| fits(*slots)).unwrap_or(0)
    }

    /// The ring of a request with `slots`.
    pub fn ring(&self, slots: u32) -> u32 {
        Self::ring_of(slots, self.ring)
    }

    /// Slots of requests with this method that name none.
    pub fn default_slots(&self, method: CacheMethod) -> u32 {
        match (method, self.lococo_slots) {
            (CacheMethod::Lococo, Some(slots)) => slots,
            _ => self.slots,
        }
    }

    /// Settings of `method` with `slots`, before a request's own wishes and its pinned prompt.
    pub fn settings(&self, method: CacheMethod, slots: u32) -> CacheSettings {
        let mut settings = CacheSettings::of(method, slots, self.ring(slots));
        if method == CacheMethod::Full || method == CacheMethod::Lococo {
            // As published, LoCoCo protects nothing.
            return settings;
        }
        settings.layer_budgets = self.layer_budgets && method.shares_layers();
        settings.sinks = self.sinks.map_or(settings.sinks, |sinks| sinks.min(slots / 4));
        if method == CacheMethod::Learned {
            let recent = self.learned_recent_permille.map(|permille| share(slots, permille));
            settings.recent = recent.unwrap_or(settings.recent).min(slots - settings.sinks);
            settings.recall_permille = self.learned_recall_permille.unwrap_or(settings.recall_permille);
        }
        settings
    }

    /// Checks all values.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let fail = |key, reason: String| Err(ConfigError { key, reason });
        if !self.allowed.contains(&self.method) {
            let name = self.method.name();
            return fail("cache.allowed", format!("must hold the default method, {name}"));
        }
        if self.allowed.contains(&CacheMethod::Lococo) && self.lococo_slots.is_none() {
            let reason = "must be given where lococo is allowed: its weights fix the number of slots";
            return fail("cache.lococo_slots", reason.into());
        }
        let range = Self::MIN_SLOTS..=self.max_slots;
        for (key, slots) in [("cache.slots", Some(self.slots)), ("cache.lococo_slots", self.lococo_slots)] {
            if slots.is_some_and(|slots| !range.contains(&slots)) && self.folds() {
                return fail(key, format!("must be {} to {}", range.start(), range.end()));
            }
        }
        if self.ring == Some(0) {
            return fail("cache.ring", "must be at least 1".into());
        }
        let permilles = [
            ("cache.learned_recent_permille", self.learned_recent_permille),
            ("cache.learned_recall_permille", self.learned_recall_permille),
        ];
        for (key, permille) in permilles {
            if permille.is_some_and(|permille| permille > 1000) {
                return fail(key, "must be 0 to 1000".into());
            }
        }
        if self.max_full_len < 2 {
            let reason = "must be at least 2: one token of prompt, one of answer";
            return fail("cache.max_full_len", reason.into());
        }
        Ok(())
    }

    /// Whether any method is allowed that folds.
    fn folds(&self) -> bool {
        self.allowed.iter().any(|method| *method != CacheMethod::Full)
    }
}

/// So many thousandths of `slots`.
fn share(slots: u32, permille: u16) -> u32 {
    // At most `slots` where the share is at most 1000.
    (u64::from(slots) * u64::from(permille) / 1000) as u32
}

#[cfg(test)]
mod tests {
    use locket_model::kv_cache::SideArrays;

    use super::*;

    /// Whatever the method and the size: the model takes the settings.
    #[test]
    fn settings_are_valid_for_every_method_and_size() {
        let bounds = CacheBounds {
            sinks: Some(40),
            learned_recent_permille: Some(1000),
            learned_recall_permille: Some(1000),
            ..CacheBounds::default()
        };
        for method in CacheMethod::ALL {
            for slots in CacheBounds::MIN_SLOTS..300 {
                for bounds in [&bounds, &CacheBounds::default()] {
                    let settings = bounds.settings(method, slots);
                    let none = SideArrays::default();
                    assert_eq!(
                        settings.check(1 << 20, none, none).map_err(|error| error.to_string()),
                        Ok(())
                    );
                }
            }
        }
    }

    #[test]
    fn rings_and_the_slots_beside_them() {
        let bounds = CacheBounds::default();
        assert_eq!([8, 256, 400, 4096].map(|slots| bounds.ring(slots)), [64, 64, 100, 128]);
        assert_eq!(CacheBounds::largest_slots(1152, None), 1024);
        assert_eq!(CacheBounds::largest_slots(100, Some(64)), 36);
        assert_eq!(CacheBounds::largest_slots(64, None), 0);
        for capacity in 65..2000 {
            let slots = CacheBounds::largest_slots(capacity, None);
            let (less, more) = (slots + bounds.ring(slots), slots + 1 + bounds.ring(slots + 1));
            assert!(less <= capacity && more > capacity, "{capacity}: {slots}");
        }
    }

    #[test]
    fn the_side_cars_recommendation_is_for_learned_alone() {
        let bounds = CacheBounds {
            learned_recent_permille: Some(125),
            learned_recall_permille: Some(300),
            ..CacheBounds::default()
        };
        let settings = bounds.settings(CacheMethod::Learned, 256);
        assert_eq!((settings.recent, settings.recall_permille), (32, 300));
        assert_eq!(bounds.settings(CacheMethod::Observed, 256).recent, 64);
        let bounds = CacheBounds { layer_budgets: true, ..bounds };
        let has_budgets = |method| bounds.settings(method, 256).layer_budgets;
        assert!(has_budgets(CacheMethod::Learned) && has_budgets(CacheMethod::Observed));
        assert!(!has_budgets(CacheMethod::Tova) && !has_budgets(CacheMethod::Full));
    }

    #[test]
    fn bad_values_name_their_key() {
        let key = |bounds: CacheBounds| bounds.check().map_err(|error| error.key);
        let base = CacheBounds::default;
        assert_eq!(key(base()), Ok(()));
        assert_eq!(key(CacheBounds { method: CacheMethod::Learned, ..base() }), Err("cache.allowed"));
        let all = CacheMethod::ALL.to_vec();
        assert_eq!(key(CacheBounds { allowed: all.clone(), ..base() }), Err("cache.lococo_slots"));
        assert_eq!(
            key(CacheBounds { allowed: all.clone(), lococo_slots: Some(9999), ..base() }),
            Err("cache.lococo_slots")
        );
        assert_eq!(key(CacheBounds { allowed: all, lococo_slots: Some(128), ..base() }), Ok(()));
        assert_eq!(key(CacheBounds { slots: 8, ..base() }), Err("cache.slots"));
        assert_eq!(key(CacheBounds { ring: Some(0), ..base() }), Err("cache.ring"));
        assert_eq!(
            key(CacheBounds { learned_recall_permille: Some(1001), ..base() }),
            Err("cache.learned_recall_permille")
        );
        assert_eq!(key(CacheBounds { max_full_len: 1, ..base() }), Err("cache.max_full_len"));
        let only_full = CacheBounds { allowed: vec![CacheMethod::Full], max_slots: 0, ..base() };
        assert_eq!(key(only_full), Ok(()), "slots are of no use there");
    }
}
