//! The extension object `locket`: what a request may say about its cache.

use locket_model::kv_cache::CacheMethod;

use crate::{
    config::CacheDefaults,
    error::{ApiError, ErrorKind},
    fields::Field,
};

/// Cache method and size of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheChoice {
    /// Who ranks.
    pub(crate) method: CacheMethod,
    /// Slots that survive a fold; without meaning for `full`.
    pub(crate) slots: u32,
}

impl CacheChoice {
    /// What a request gets that says nothing.
    pub(crate) fn default_of(defaults: &CacheDefaults) -> Self {
        Self { method: defaults.method, slots: defaults.slots }
    }

    /// Reads `locket: {"kv_cache": {"method": …, "slots": …}}`. Unknown keys are errors: this
    /// object is ours, so a key that we do not know is a typing mistake.
    pub(crate) fn read(field: &Field<'_, '_>, defaults: &CacheDefaults) -> Result<Self, ApiError> {
        let mut choice = Self::default_of(defaults);
        field.entries(|name, inner| match name {
            "kv_cache" => choice.read_kv_cache(&inner, defaults),
            _ => Err(unknown_key(&inner, "kv_cache")),
        })?;
        Ok(choice)
    }

    fn read_kv_cache(&mut self, field: &Field<'_, '_>, defaults: &CacheDefaults) -> Result<(), ApiError> {
        let mut has_slots = false;
        field.entries(|name, inner| {
            match name {
                "method" => {
                    let name = inner.one_of(&CacheMethod::ALL.map(CacheMethod::name))?;
                    self.method = name
                        .parse()
                        .map_err(|reason: String| inner.error(ErrorKind::InvalidValue, reason))?;
                }
                "slots" => {
                    self.slots = inner.count(defaults.min_slots(), defaults.max_slots)?;
                    has_slots = true;
                }
                _ => return Err(unknown_key(&inner, "method, slots")),
            }
            Ok(())
        })?;
        if has_slots && self.method == CacheMethod::Full {
            let reason = "has `slots`, which the method `full` does not have";
            return Err(field.error(ErrorKind::InvalidValue, reason));
        }
        Ok(())
    }
}

fn unknown_key(field: &Field<'_, '_>, known: &str) -> ApiError {
    field.error(ErrorKind::InvalidValue, format_args!("is not known; known are {known}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn methods_and_limits() {
        let defaults = CacheDefaults::default();
        let read = |value: serde_json::Value| {
            let body = json!({ "locket": value });
            let mut choice = None;
            Field::root(&body).entries(|_, field| {
                choice = Some(CacheChoice::read(&field, &defaults)?);
                Ok(())
            })?;
            Ok::<_, ApiError>(choice)
        };
        assert_eq!(read(json!({})), Ok(Some(CacheChoice::default_of(&defaults))));
        let window = CacheChoice { method: CacheMethod::Window, slots: 128 };
        assert_eq!(read(json!({"kv_cache": {"method": "window", "slots": 128}})), Ok(Some(window)));
        let rows = [
            (json!(3), ErrorKind::InvalidType, "locket"),
            (json!({"x": 1}), ErrorKind::InvalidValue, "locket.x"),
            (json!({"kv_cache": {"x": 1}}), ErrorKind::InvalidValue, "locket.kv_cache.x"),
            (json!({"kv_cache": {"method": "h3"}}), ErrorKind::InvalidValue, "locket.kv_cache.method"),
            (json!({"kv_cache": {"slots": 9}}), ErrorKind::InvalidValue, "locket.kv_cache"),
            (json!({"kv_cache": {"slots": 1}}), ErrorKind::IntegerBelowMinValue, "locket.kv_cache.slots"),
            (json!({"kv_cache": {"slots": 9999}}), ErrorKind::IntegerAboveMaxValue, "locket.kv_cache.slots"),
        ];
        for (value, kind, param) in rows {
            let error = read(value.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{value}");
        }
    }
}
