//! `locket.visual`: what a request says about its images' tokens.

use locket_vision::drop::{Budget, FieldValue, Method, SettingError, VisualSettings};
use serde_json::Value;

use super::{Detail, VisualConfig};
use crate::{
    error::{ApiError, ErrorKind, clip},
    fields::Field,
};

/// The request's own settings.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct VisualFields {
    /// Fields of [`VisualSettings`] in the order in which they came.
    given: Vec<(String, Given)>,
    /// The answer tells which tokens stayed.
    pub(crate) report: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Given {
    Text(String),
    Number(f64),
    Bool(bool),
}

impl Given {
    fn as_value(&self) -> FieldValue<'_> {
        match self {
            Self::Text(text) => FieldValue::Text(text),
            Self::Number(number) => FieldValue::Number(*number),
            Self::Bool(flag) => FieldValue::Bool(*flag),
        }
    }
}

impl VisualFields {
    /// Reads `{"method", "budget", …, "report"}`. Unknown keys are errors, as everywhere in `locket`.
    ///
    /// # Errors
    /// The first failing field; what fields contradict; a method or budget that the operator does not
    /// allow.
    pub(crate) fn read(field: &Field<'_, '_>, config: &VisualConfig) -> Result<Self, ApiError> {
        let mut fields = Self::default();
        let mut settings = VisualSettings::default();
        field.entries(|name, inner| {
            if name == "report" {
                fields.report = inner.boolean()?;
                return Ok(());
            }
            if !VisualSettings::FIELDS.contains(&name) {
                let known = VisualSettings::FIELDS.join(", ");
                let reason = format!("is not known; known are {known}, report");
                return Err(inner.error(ErrorKind::InvalidValue, reason));
            }
            let given = read_value(name, &inner)?;
            settings
                .set(name, given.as_value())
                .map_err(|error| inner.error(ErrorKind::InvalidValue, said(&error)))?;
            match name {
                "method" => check_method(&inner, settings.method, config)?,
                "budget" => check_budget(&inner, settings.budget, config)?,
                _ => {}
            }
            fields.given.push((name.to_owned(), given));
            Ok(())
        })?;
        for detail in [Detail::Auto, Detail::Low, Detail::High] {
            fields.settings(config, detail).check().map_err(|error| {
                let path = format!("{}.{}", field.path(), error.field);
                let message = format!("`{path}`: {}.", said(&error));
                ApiError::field(ErrorKind::InvalidValue, path, message)
            })?;
        }
        Ok(fields)
    }

    /// The settings of an image of this detail: the operator's, with the request's own over them. A
    /// method other than the operator's comes with its own budget.
    pub(crate) fn settings(&self, config: &VisualConfig, detail: Detail) -> VisualSettings {
        let mut settings = config.of_detail(detail);
        let mut own = VisualSettings::default();
        let has = |name: &str| self.given.iter().any(|(given, _)| given == name);
        for (name, value) in &self.given {
            // Checked when they were read.
            let _ = own.set(name, value.as_value());
        }
        if has("method") && own.method != settings.method {
            settings = VisualSettings { positions: settings.positions, ..VisualSettings::of(own.method) };
        }
        if has("lambda") {
            settings.budget = None;
        }
        for (name, value) in &self.given {
            let _ = settings.set(name, value.as_value());
        }
        settings
    }
}

/// Names are text, numbers are numbers; a budget may also be a percentage.
fn read_value(name: &str, field: &Field<'_, '_>) -> Result<Given, ApiError> {
    match (name, field.value()) {
        ("method" | "newline" | "positions", _) => Ok(Given::Text(field.string()?.to_owned())),
        ("compat", _) => field.boolean().map(Given::Bool),
        ("budget", Value::String(text)) => Ok(Given::Text(text.clone())),
        (_, Value::Number(number)) => Ok(Given::Number(number.as_f64().unwrap_or(f64::NAN))),
        // The error names the type.
        _ => field.float(f64::MIN, f64::MAX).map(|number| Given::Number(f64::from(number))),
    }
}

fn said(error: &SettingError) -> String {
    clip(&error.reason)
}

fn check_method(field: &Field<'_, '_>, method: Method, config: &VisualConfig) -> Result<(), ApiError> {
    if config.methods.contains(&method) {
        return Ok(());
    }
    let offered: Vec<&str> = config.methods.iter().map(|method| method.name()).collect();
    let reason = format!("is `{method}`, which this server does not offer; it offers {}", offered.join(", "));
    Err(field.error(ErrorKind::UnsupportedValue, reason))
}

/// A share above the operator's; numbers of tokens are cut down to it.
fn check_budget(
    field: &Field<'_, '_>,
    budget: Option<Budget>,
    config: &VisualConfig,
) -> Result<(), ApiError> {
    let Some(Budget::Fraction(share)) = budget.filter(|_| config.max_budget < 1.0) else { return Ok(()) };
    if share <= config.max_budget {
        return Ok(());
    }
    let reason = format!("is {share}, but this server allows at most {}", config.max_budget);
    Err(field.error(ErrorKind::DecimalAboveMaxValue, reason))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<VisualFields, ApiError> {
        let config = VisualConfig {
            methods: vec![Method::Hired, Method::Dpp],
            max_budget: 0.5,
            ..VisualConfig::default()
        };
        VisualFields::read(&Field::root(&json!({ "visual": value })["visual"].clone()), &config)
    }

    fn settings(value: Value, detail: Detail) -> VisualSettings {
        let config = VisualConfig::default();
        let fields = VisualFields::read(&Field::root(&value), &config).expect("good fields");
        fields.settings(&config, detail)
    }

    #[test]
    fn requests_override_the_operator_within_limits() {
        let plain = settings(json!({}), Detail::Low);
        assert_eq!((plain.method, plain.budget), (Method::Hired, Some(Budget::Fraction(0.5))));
        let own = settings(json!({"budget": 0.2}), Detail::High);
        assert_eq!((own.method, own.budget), (Method::Hired, Some(Budget::Fraction(0.2))));
        let other = settings(json!({"method": "dpp"}), Detail::Auto);
        assert_eq!((other.method, other.budget), (Method::Dpp, None), "its own published budget");
        let counted = settings(json!({"budget": 196, "method": "dpp", "positions": "compact"}), Detail::Auto);
        assert_eq!(counted.budget, Some(Budget::Count(196)));
        assert_eq!(settings(json!({"budget": "25%"}), Detail::Auto).budget, Some(Budget::Fraction(0.25)));
        assert_eq!(settings(json!({"method": "none"}), Detail::Auto).effective_budget(), Budget::ALL);
        let steep = settings(json!({"method": "pyramid", "lambda": 0.5}), Detail::Auto);
        assert_eq!(steep.effective_budget(), Budget::Fraction(0.125));
    }

    #[test]
    fn bad_values_name_their_field() {
        use ErrorKind::*;
        let rows = [
            (json!({"method": "best"}), InvalidValue, "method"),
            (json!({"method": "random"}), UnsupportedValue, "method"),
            (json!({"method": 1}), InvalidType, "method"),
            (json!({"budget": 0}), InvalidValue, "budget"),
            (json!({"budget": 0.6}), DecimalAboveMaxValue, "budget"),
            (json!({"budget": "much"}), InvalidValue, "budget"),
            (json!({"budget": true}), InvalidType, "budget"),
            (json!({"alpha": 2}), InvalidValue, "alpha"),
            (json!({"alpha": "x"}), InvalidType, "alpha"),
            (json!({"compat": 1}), InvalidType, "compat"),
            (json!({"report": 1}), InvalidType, "report"),
            (json!({"bugdet": 1}), InvalidValue, "bugdet"),
            (json!({"lambda": 0.5}), InvalidValue, ".lambda"),
            (json!({"method": "dpp", "compat": true}), InvalidValue, ".compat"),
        ];
        for (value, kind, param) in rows {
            let error = read(value.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{value}: {error:?}");
        }
    }
}
