//! The extension object `locket`: what a request may say about its cache.

use locket_model::kv_cache::{CacheMethod, CacheSettings};

use super::Bounds;
use crate::{
    config::CacheBounds,
    error::{ApiError, ErrorKind, clip},
    fields::Field,
    visual::VisualFields,
};

/// Cache method and size of one request, within the operator's limits. `None`: the operator's or
/// the method's default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct CacheChoice {
    /// Who ranks.
    pub(crate) method: CacheMethod,
    /// Slots that survive a fold (`M`); without meaning for `full`.
    pub(crate) slots: u32,
    /// Share of the slots for recall, in thousandths.
    recall_permille: Option<u16>,
    /// First tokens that always survive: these and no more, whatever the prompt begins with.
    sinks: Option<u32>,
    /// Latest tokens that always survive.
    recent: Option<u32>,
}

impl CacheChoice {
    /// What a request gets that says nothing.
    pub(crate) fn default_of(bounds: &CacheBounds) -> Self {
        let method = bounds.method;
        let slots = bounds.default_slots(method);
        Self { method, slots, recall_permille: None, sinks: None, recent: None }
    }

    /// Every token keeps its slot.
    pub(crate) fn full() -> Self {
        Self { method: CacheMethod::Full, slots: 0, recall_permille: None, sinks: None, recent: None }
    }

    /// Whether a sequence can fold.
    pub(crate) fn folds(&self) -> bool {
        self.method != CacheMethod::Full
    }

    /// How many first tokens of a prompt may be pinned.
    pub(crate) fn most_pinned(&self) -> u32 {
        let pins = self.folds() && self.method != CacheMethod::Lococo && self.sinks.is_none();
        if pins { self.slots / 4 } else { 0 }
    }

    /// How a sequence of at most `tokens` tokens, whose first `pinned` ones are instructions, uses
    /// its block.
    pub(crate) fn settings(&self, bounds: &CacheBounds, tokens: u32, pinned: u32) -> CacheSettings {
        if !self.folds() {
            return CacheSettings::full(tokens);
        }
        let mut settings = self.without_pins(bounds);
        settings.sinks = settings.sinks.max(pinned.min(self.most_pinned()));
        settings.recent = settings.recent.min(self.slots.saturating_sub(settings.sinks));
        settings
    }

    /// The settings of a prompt that begins with no instructions.
    fn without_pins(&self, bounds: &CacheBounds) -> CacheSettings {
        let settings = bounds.settings(self.method, self.slots);
        CacheSettings {
            sinks: self.sinks.unwrap_or(settings.sinks),
            recent: self.recent.unwrap_or(settings.recent),
            recall_permille: self.recall_permille.unwrap_or(settings.recall_permille),
            ..settings
        }
    }

    /// All that a seeded answer depends on, for the fingerprint.
    pub(crate) fn describe(&self, bounds: &CacheBounds) -> String {
        format!("{:?}", self.without_pins(bounds))
    }

    /// Reads `{"method", "slots", "recall", "sinks", "recent"}`.
    fn read(field: &Field<'_, '_>, bounds: &CacheBounds) -> Result<Self, ApiError> {
        let mut named = Named::default();
        field.entries(|name, inner| {
            match name {
                "method" => named.method = Some(read_method(&inner, bounds)?),
                "slots" => named.slots = Some(inner.count(CacheBounds::MIN_SLOTS, bounds.max_slots)?),
                // Thousandths: the cast is exact for 0 to 1000.
                "recall" => named.recall = Some((inner.float(0.0, 1.0)? * 1000.0).round() as u16),
                "sinks" => named.sinks = Some(inner.count(0, bounds.max_slots)?),
                "recent" => named.recent = Some(inner.count(0, bounds.max_slots)?),
                _ => return Err(unknown_key(&inner, "method, slots, recall, sinks, recent")),
            }
            Ok(())
        })?;
        named.check(field, bounds)
    }
}

/// What was given, before it is known what it means together.
#[derive(Debug, Default)]
struct Named {
    method: Option<CacheMethod>,
    slots: Option<u32>,
    recall: Option<u16>,
    sinks: Option<u32>,
    recent: Option<u32>,
}

impl Named {
    /// Checks what the fields of the object `field` say together.
    fn check(self, field: &Field<'_, '_>, bounds: &CacheBounds) -> Result<CacheChoice, ApiError> {
        let invalid = |key: &str, reason: String| {
            let path = format!("{}.{key}", field.path());
            let message = format!("`{path}` {reason}.");
            Err(ApiError::field(ErrorKind::InvalidValue, path, message))
        };
        let method = self.method.unwrap_or(bounds.method);
        let name = method.name();
        let has_own_sinks = !matches!(method, CacheMethod::Full | CacheMethod::Lococo);
        let foreign = [
            ("slots", self.slots.is_some(), method != CacheMethod::Full),
            ("recall", self.recall.is_some(), method == CacheMethod::Learned),
            ("sinks", self.sinks.is_some(), has_own_sinks),
            ("recent", self.recent.is_some(), has_own_sinks),
        ];
        if let Some((key, ..)) = foreign.into_iter().find(|(_, is_given, belongs)| *is_given && !belongs) {
            let reason =
                format!("is given, but the method `{name}` has none; leave it out or name another method");
            return invalid(key, reason);
        }
        let slots = self.slots.unwrap_or_else(|| bounds.default_slots(method));
        if method == CacheMethod::Lococo
            && let Some(trained) = bounds.lococo_slots.filter(|trained| *trained != slots)
        {
            return invalid(
                "slots",
                format!("is {slots}, but the weights of `lococo` were trained for {trained}"),
            );
        }
        let choice = CacheChoice {
            method,
            slots,
            recall_permille: self.recall,
            sinks: self.sinks,
            recent: self.recent,
        };
        let CacheSettings { sinks, recent, .. } = choice.without_pins(bounds);
        if choice.folds() && u64::from(sinks) + u64::from(recent) >= u64::from(slots) {
            let key = if self.recent.is_some() { "recent" } else { "sinks" };
            // Defaults alone always leave room.
            if self.recent.is_some() || self.sinks.is_some() {
                let reason = format!(
                    "leaves nothing to choose: {sinks} sinks and {recent} recent tokens must be fewer \
                     than the {slots} slots"
                );
                return invalid(key, reason);
            }
        }
        Ok(choice)
    }
}

/// A method that the operator allows.
fn read_method(field: &Field<'_, '_>, bounds: &CacheBounds) -> Result<CacheMethod, ApiError> {
    let name = field.string()?;
    let known = CacheMethod::ALL.into_iter().find(|method| method.name() == name);
    if let Some(method) = known.filter(|method| bounds.allowed.contains(method)) {
        return Ok(method);
    }
    let allowed: Vec<&str> = bounds.allowed.iter().map(|method| method.name()).collect();
    let allowed = allowed.join(", ");
    match known {
        Some(_) => {
            let reason = format!("is {name:?}, which this server does not offer; it offers {allowed}");
            Err(field.error(ErrorKind::UnsupportedValue, reason))
        }
        None => {
            let reason = format!("is {:?}, but must be one of {allowed}", clip(name));
            Err(field.error(ErrorKind::InvalidValue, reason))
        }
    }
}

/// The object `locket`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LocketFields {
    /// `kv_cache`
    pub(crate) cache: Option<CacheChoice>,
    /// `require_exact`
    pub(crate) require_exact: Option<bool>,
    /// `cache_salt`
    pub(crate) cache_salt: Option<String>,
    /// `visual`
    pub(crate) visual: Option<VisualFields>,
}

impl LocketFields {
    /// Reads `{"kv_cache": {…}, "require_exact": …, "cache_salt": …, "visual": {…}}`. Unknown keys are errors: this
    /// object is ours, so a key that we do not know is a typing mistake.
    pub(crate) fn read(field: &Field<'_, '_>, bounds: &Bounds) -> Result<Self, ApiError> {
        let mut fields = Self::default();
        field.entries(|name, inner| {
            match name {
                "kv_cache" => fields.cache = Some(CacheChoice::read(&inner, &bounds.cache)?),
                "visual" => {
                    let visual = bounds.visual.as_ref();
                    let visual = visual.ok_or_else(|| inner.unsupported("this model takes text only"))?;
                    fields.visual = Some(VisualFields::read(&inner, visual)?);
                }
                "require_exact" => fields.require_exact = Some(inner.boolean()?),
                "cache_salt" => fields.cache_salt = Some(read_salt(&inner)?),
                _ => return Err(unknown_key(&inner, "kv_cache, require_exact, cache_salt, visual")),
            }
            Ok(())
        })?;
        Ok(fields)
    }
}

/// Who may share snapshots: 1 to 128 bytes.
pub(crate) fn read_salt(field: &Field<'_, '_>) -> Result<String, ApiError> {
    field.short_string(128).map(str::to_owned)
}

fn unknown_key(field: &Field<'_, '_>, known: &str) -> ApiError {
    field.error(ErrorKind::InvalidValue, format_args!("is not known; known are {known}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bounds() -> CacheBounds {
        CacheBounds {
            allowed: vec![
                CacheMethod::Full,
                CacheMethod::Window,
                CacheMethod::H2o,
                CacheMethod::Lococo,
                CacheMethod::Learned,
            ],
            lococo_slots: Some(128),
            max_slots: 512,
            ..CacheBounds::default()
        }
    }

    fn read(value: Value) -> Result<LocketFields, ApiError> {
        let body = json!({ "locket": value });
        let mut fields = LocketFields::default();
        let bounds = Bounds { cache: bounds(), ..crate::generation::test_bounds() };
        Field::root(&body).entries(|_, field| {
            fields = LocketFields::read(&field, &bounds)?;
            Ok(())
        })?;
        Ok(fields)
    }

    fn choice(kv_cache: Value) -> CacheChoice {
        read(json!({ "kv_cache": kv_cache })).expect("valid").cache.expect("a choice")
    }

    #[test]
    fn good_values() {
        assert_eq!(read(json!({})), Ok(LocketFields::default()));
        let fields = read(json!({"require_exact": true, "cache_salt": "a"})).expect("valid");
        assert_eq!((fields.require_exact, fields.cache_salt.as_deref()), (Some(true), Some("a")));
        assert_eq!(choice(json!({})), CacheChoice::default_of(&bounds()));
        let window = choice(json!({"slots": 128, "method": "window"}));
        assert_eq!((window.method, window.slots), (CacheMethod::Window, 128));
        assert_eq!(choice(json!({"method": "lococo"})).slots, 128);
        let learned =
            choice(json!({"method": "learned", "slots": 256, "recall": 0.3, "sinks": 2, "recent": 9}));
        let settings = learned.settings(&bounds(), 5000, 200);
        assert_eq!((settings.sinks, settings.recent, settings.recall_permille), (2, 9, 300));
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let rows = [
            (json!(3), InvalidType, "locket"),
            (json!({"x": 1}), InvalidValue, "locket.x"),
            (json!({"require_exact": 1}), InvalidType, "locket.require_exact"),
            (json!({"cache_salt": ""}), EmptyString, "locket.cache_salt"),
            (json!({"kv_cache": {"x": 1}}), InvalidValue, "locket.kv_cache.x"),
            (json!({"visual": {}}), UnsupportedParameter, "locket.visual"),
            (json!({"kv_cache": {"method": "h3"}}), InvalidValue, "locket.kv_cache.method"),
            (json!({"kv_cache": {"method": "tova"}}), UnsupportedValue, "locket.kv_cache.method"),
            (json!({"kv_cache": {"slots": 99}}), InvalidValue, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"slots": 1}}), IntegerBelowMinValue, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"slots": 513}}), IntegerAboveMaxValue, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"slots": 99.5}}), InvalidType, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"method": "lococo", "slots": 99}}), InvalidValue, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"method": "lococo", "sinks": 4}}), InvalidValue, "locket.kv_cache.sinks"),
            (json!({"kv_cache": {"method": "h2o", "recall": 0.5}}), InvalidValue, "locket.kv_cache.recall"),
            (
                json!({"kv_cache": {"method": "learned", "recall": 1.5}}),
                DecimalAboveMaxValue,
                "locket.kv_cache.recall",
            ),
            (
                json!({"kv_cache": {"method": "window", "slots": 64, "sinks": 64}}),
                InvalidValue,
                "locket.kv_cache.sinks",
            ),
            (
                json!({"kv_cache": {"method": "h2o", "slots": 64, "recent": 64}}),
                InvalidValue,
                "locket.kv_cache.recent",
            ),
            (
                json!({"kv_cache": {"method": "h2o", "recent": 513}}),
                IntegerAboveMaxValue,
                "locket.kv_cache.recent",
            ),
        ];
        for (value, kind, param) in rows {
            let error = read(value.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{value}");
        }
        let error = read(json!({"kv_cache": {"method": "tova"}})).expect_err("not allowed");
        assert!(error.message.contains("full, window, h2o, lococo, learned"), "{}", error.message);
    }

    /// Instructions are pinned up to a quarter of the slots, beside what must stay recent, and
    /// not where the request or the method decides otherwise.
    #[test]
    fn pinned_prompts() {
        let sinks = |kv_cache: Value, pinned| choice(kv_cache).settings(&bounds(), 5000, pinned).sinks;
        let window = json!({"method": "window", "slots": 128});
        assert_eq!(sinks(window.clone(), 0), 4);
        assert_eq!(sinks(window.clone(), 20), 20);
        assert_eq!(sinks(window, 1000), 32);
        assert_eq!(sinks(json!({"method": "window", "slots": 128, "sinks": 8}), 20), 8);
        assert_eq!(sinks(json!({"method": "lococo"}), 20), 0);
        assert_eq!(choice(json!({})).settings(&bounds(), 50, 20), CacheSettings::full(50));
        let tight = choice(json!({"method": "h2o", "slots": 64, "recent": 59}));
        let settings = tight.settings(&bounds(), 5000, 1000);
        assert_eq!((settings.sinks, settings.recent), (16, 48));
    }
}
