//! What the operator decides about visual tokens, and what a request gets.

use locket_vision::drop::{Budget, Method, VisualSettings};

use crate::config::ConfigError;

/// Settings of images in the decoder. Without a vision model they have no effect.
#[derive(Debug, Clone, PartialEq)]
pub struct VisualConfig {
    /// What an image of `detail` `auto` gets in a request that says nothing else.
    pub auto: VisualSettings,
    /// Budget of `detail` `low`, which is one tile of the whole image: a share of that tile's tokens.
    pub low_budget: Budget,
    /// Budget of `detail` `high` and `original`.
    pub high_budget: Budget,
    /// Methods that requests may name.
    pub methods: Vec<Method>,
    /// Largest share of an image's tokens that a request may ask for.
    pub max_budget: f64,
    /// Bound of the visual tokens that are kept for images to come, in bytes.
    pub cache_bytes: usize,
    /// Images that may wait for the tower.
    pub max_waiting: usize,
}

impl Default for VisualConfig {
    fn default() -> Self {
        Self {
            auto: VisualSettings::of(Method::Hired).with_budget(Budget::Fraction(0.4)),
            low_budget: Budget::Fraction(0.5),
            high_budget: Budget::ALL,
            methods: Method::ALL.to_vec(),
            max_budget: 1.0,
            cache_bytes: 64 << 20,
            max_waiting: 64,
        }
    }
}

impl VisualConfig {
    /// Checks all values.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let fail = |key, reason: String| Err(ConfigError { key, reason });
        if let Err(error) = self.auto.check() {
            return fail("visual.auto", error.to_string());
        }
        if !(self.max_budget > 0.0 && self.max_budget <= 1.0) {
            return fail("visual.max_budget", "must be above 0 and at most 1".into());
        }
        if self.max_waiting == 0 {
            return fail("visual.max_waiting", "must be at least 1".into());
        }
        Ok(())
    }

    /// The settings of an image of this detail, before the request's own are looked at.
    pub(crate) fn of_detail(&self, detail: Detail) -> VisualSettings {
        let keeps_all = self.auto.method == Method::None;
        match detail {
            _ if keeps_all => self.auto,
            Detail::Auto => self.auto,
            Detail::Low => self.auto.with_budget(self.low_budget),
            Detail::High | Detail::Original => self.auto.with_budget(self.high_budget),
        }
    }
}

/// How closely an image is to be looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Detail {
    /// As the operator decides.
    #[default]
    Auto,
    /// The whole image in one tile, and the least of that.
    Low,
    /// All tiles, and the most of them.
    High,
    /// The same.
    Original,
}

impl Detail {
    /// The words of the API.
    pub(crate) const NAMES: [&'static str; 4] = ["auto", "low", "high", "original"];

    /// One of [`Self::NAMES`].
    pub(crate) fn of_name(name: &str) -> Self {
        match name {
            "low" => Self::Low,
            "high" => Self::High,
            "original" => Self::Original,
            _ => Self::Auto,
        }
    }

    /// The word of the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Low => "low",
            Self::High => "high",
            Self::Original => "original",
        }
    }

    /// Whether only the tile of the whole image is looked at.
    pub(crate) fn is_base_only(self) -> bool {
        self == Self::Low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_have_budgets() {
        let config = VisualConfig::default();
        assert_eq!(config.check(), Ok(()));
        let budget = |detail| config.of_detail(detail).effective_budget();
        assert_eq!(budget(Detail::Auto), Budget::Fraction(0.4));
        assert_eq!(budget(Detail::Low), Budget::Fraction(0.5));
        assert_eq!(budget(Detail::Original), Budget::ALL);
        for name in Detail::NAMES {
            assert_eq!(Detail::of_name(name).name(), name);
        }
        let all = VisualConfig { auto: VisualSettings::default(), ..config };
        assert_eq!(all.of_detail(Detail::Low), VisualSettings::default(), "nothing is dropped");
        let bad = VisualConfig { max_budget: 0.0, ..all };
        assert_eq!(bad.check().expect_err("no share").key, "visual.max_budget");
    }
}
