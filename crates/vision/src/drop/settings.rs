//! What one image may cost, and who chooses what stays: parsed field by field, checked as a whole.

use std::{fmt, str::FromStr};

/// Who chooses the visual tokens that stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Method {
    /// Everything stays.
    #[default]
    None,
    /// HiRED: class-token attention, the budget shared over tiles; before the decoder.
    Hired,
    /// PyramidDrop: the last prompt token's attention at three depths of the decoder.
    Pyramid,
    /// MustDrop: like windows merged before the decoder, then the question's attention at four depths.
    Must,
    /// FastV: the last prompt token's attention once, after two layers.
    Fastv,
    /// Greedy determinantal choice: salient tokens that are unlike one another; before the decoder.
    Dpp,
    /// A random choice (seeded); a baseline.
    Random,
    /// Evenly spaced tokens; a baseline.
    Uniform,
    /// Tokens of the whole, shrunk image only, none of its tiles; a baseline.
    Thumbnail,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 9] = [
        Self::None,
        Self::Hired,
        Self::Pyramid,
        Self::Must,
        Self::Fastv,
        Self::Dpp,
        Self::Random,
        Self::Uniform,
        Self::Thumbnail,
    ];

    /// The name in requests, configuration and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hired => "hired",
            Self::Pyramid => "pyramid",
            Self::Must => "must",
            Self::Fastv => "fastv",
            Self::Dpp => "dpp",
            Self::Random => "random",
            Self::Uniform => "uniform",
            Self::Thumbnail => "thumbnail",
        }
    }

    /// Whether tokens leave inside the decoder, so that what stays depends on the question.
    pub fn drops_in_llm(self) -> bool {
        matches!(self, Self::Pyramid | Self::Must | Self::Fastv)
    }

    /// Whether `compat` means something: a rule of the released code that differs from ours.
    pub fn has_compat(self) -> bool {
        matches!(self, Self::Hired | Self::Must)
    }

    /// The budget where none is given: the setting that the method was published with.
    pub fn default_budget(self) -> Budget {
        match self {
            Self::None | Self::Thumbnail => Budget::ALL,
            Self::Pyramid => Budget::Fraction(0.125),
            Self::Fastv => Budget::Fraction(0.5),
            Self::Hired | Self::Must | Self::Dpp | Self::Random | Self::Uniform => Budget::Fraction(0.2),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name);
        Self::ALL
            .into_iter()
            .find(|method| method.name() == name)
            .ok_or_else(|| format!("{name:?} is no dropping method; known are {}", names.join(", ")))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(self.name())
    }
}

/// How many of an image's tokens stay: in every layer for methods before the decoder, in the layers
/// behind the last boundary for methods inside it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Share of the image's tokens, above 0 and at most 1.
    Fraction(f64),
    /// Tokens per image, from 1. An image with fewer keeps all.
    Count(u32),
}

impl Budget {
    /// Everything stays.
    pub const ALL: Self = Self::Fraction(1.0);

    /// The budget in tokens of an image with `tokens`: from 1 (unless there are none) to `tokens`.
    pub fn of(self, tokens: usize) -> usize {
        let wanted = match self {
            // A share like 0.29 has no exact binary form: 0.29 of 100 is 29.
            Self::Fraction(share) => (tokens as f64 * share + 1e-9).floor() as usize,
            Self::Count(count) => count as usize,
        };
        wanted.clamp(1, tokens.max(1)).min(tokens)
    }

    /// The budget that a JSON number means: up to 1 a share, above 1 a number of tokens.
    ///
    /// # Errors
    /// What would be right.
    pub fn of_number(number: f64) -> Result<Self, String> {
        if number > 0.0 && number <= 1.0 {
            return Ok(Self::Fraction(number));
        }
        if number > 1.0 && number.fract() == 0.0 && number <= f64::from(u32::MAX) {
            return Ok(Self::Count(number as u32));
        }
        let reason = "is neither a share above 0 and at most 1 nor a whole number of tokens above 1";
        Err(format!("{number} {reason}"))
    }
}

impl FromStr for Budget {
    type Err = String;

    /// Reads `0.2`, `20%` or `196`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no budget; give a share such as 0.2 or 20%, or a number of tokens");
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
            return if percent > 0.0 && percent <= 100.0 {
                Ok(Self::Fraction(percent / 100.0))
            } else {
                Err(wrong())
            };
        }
        Self::of_number(text.trim().parse().map_err(|_| wrong())?)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fraction(share) => write!(out, "{share}"),
            Self::Count(count) => write!(out, "{count}"),
        }
    }
}

/// What happens to the newline tokens behind the rows of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Newline {
    /// They are dropped, as in HiRED's release, and stay only where the budget has room for all patches.
    #[default]
    None,
    /// The newline of every row with a token that stays is kept, and counted.
    Rows,
}

/// Which positions the tokens that stay have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Positions {
    /// Those they would have if nothing had been dropped: gaps stay.
    #[default]
    Original,
    /// Consecutive ones. Where tokens leave inside the decoder, those behind them move up in the layers that
    /// miss them, as in PyramidDrop's release.
    Compact,
}

macro_rules! named {
    ($type:ident, $what:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// The name in requests and configuration.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(name: &str) -> Result<Self, String> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(format!(concat!("{:?} is no ", $what, "; known are {}"), name, [$($name),+].join(", "))),
                }
            }
        }
    };
}

named!(Newline, "treatment of newlines", None = "none", Rows = "rows");
named!(Positions, "kind of positions", Original = "original", Compact = "compact");

/// A value of a field, as JSON or a configuration file has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FieldValue<'a> {
    /// A string, or a flag's text.
    Text(&'a str),
    /// A number.
    Number(f64),
    /// True or false.
    Bool(bool),
}

/// Why settings cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SettingError {
    /// The field, as [`VisualSettings::FIELDS`] spells it, or the unknown one.
    pub field: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl SettingError {
    fn new(field: &str, reason: impl Into<String>) -> Self {
        Self { field: field.to_owned(), reason: reason.into() }
    }
}

/// How an image's tokens are chosen. `Default` keeps everything.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisualSettings {
    /// Who chooses.
    pub method: Method,
    /// How many stay; `None`: [`Method::default_budget`], or what `lambda` says.
    pub budget: Option<Budget>,
    /// The released code's rule in place of ours: `hired`'s strips and rounding, `must`'s thresholds.
    /// Counts are then no longer exact, only bounded.
    pub compat: bool,
    /// What happens to newline tokens; methods before the decoder only.
    pub newline: Newline,
    /// Which positions tokens have.
    pub positions: Positions,
    /// `hired`: share of the budget that the whole, shrunk image gets, from 0 to 1.
    pub alpha: f64,
    /// `pyramid`: share that survives each boundary, in place of a budget, which is its third power.
    pub lambda: Option<f64>,
    /// `must`: share of the windows that are merged, the most uniform first; 0 to 1. With `compat`
    /// the least mean cosine of a window that is merged; above 1 none is.
    pub merge: Option<f64>,
    /// `must` with `compat`: a token is dropped if its share of the attention is below this, ...
    pub global_threshold: f64,
    /// ... and no text token gives it as much as this.
    pub individual_threshold: f64,
    /// `random`: the seed.
    pub seed: u64,
}

impl Default for VisualSettings {
    fn default() -> Self {
        Self {
            method: Method::None,
            budget: None,
            compat: false,
            newline: Newline::None,
            positions: Positions::Original,
            alpha: 0.5,
            lambda: None,
            merge: None,
            global_threshold: 0.0012,
            individual_threshold: 0.001,
            seed: 0,
        }
    }
}

impl VisualSettings {
    /// Fields that [`Self::set`] knows.
    pub const FIELDS: [&'static str; 11] = [
        "method",
        "budget",
        "compat",
        "newline",
        "positions",
        "alpha",
        "lambda",
        "merge",
        "global_threshold",
        "individual_threshold",
        "seed",
    ];

    /// Settings of `method` with its published budget.
    pub fn of(method: Method) -> Self {
        Self { method, ..Self::default() }
    }

    /// These settings with another budget.
    pub fn with_budget(self, budget: Budget) -> Self {
        Self { budget: Some(budget), ..self }
    }

    /// Sets one field. The combination is [`Self::check`]'s matter.
    ///
    /// # Errors
    /// [`SettingError`] for an unknown field, and a value of the wrong kind or out of range.
    pub fn set(&mut self, field: &str, value: FieldValue<'_>) -> Result<(), SettingError> {
        let named = |reason: String| SettingError::new(field, reason);
        match field {
            "method" => self.method = parsed(value).map_err(named)?,
            "budget" => {
                self.budget = Some(match value {
                    FieldValue::Number(number) => Budget::of_number(number).map_err(named)?,
                    _ => parsed(value).map_err(named)?,
                });
            }
            "compat" => self.compat = boolean(value).map_err(named)?,
            "newline" => self.newline = parsed(value).map_err(named)?,
            "positions" => self.positions = parsed(value).map_err(named)?,
            "alpha" => self.alpha = number(value, 0.0, 1.0).map_err(named)?,
            "lambda" => {
                let lambda = number(value, 0.0, 1.0).map_err(named)?;
                if lambda == 0.0 {
                    return Err(named("0 would keep nothing; a share above 0 is wanted".into()));
                }
                self.lambda = Some(lambda);
            }
            "merge" => self.merge = Some(number(value, 0.0, 2.0).map_err(named)?),
            "global_threshold" => self.global_threshold = number(value, 0.0, 1.0).map_err(named)?,
            "individual_threshold" => self.individual_threshold = number(value, 0.0, 1.0).map_err(named)?,
            "seed" => {
                let seed = number(value, 0.0, 9_007_199_254_740_992.0).map_err(named)?;
                if seed.fract() != 0.0 {
                    return Err(named(format!("{seed} is no whole number")));
                }
                self.seed = seed as u64;
            }
            _ => {
                let known = Self::FIELDS.join(", ");
                return Err(SettingError::new(field, format!("is no visual setting; known are {known}")));
            }
        }
        Ok(())
    }

    /// Checks that the fields go together.
    ///
    /// # Errors
    /// [`SettingError`] naming the field that would have to change.
    pub fn check(&self) -> Result<(), SettingError> {
        let method = self.method;
        let wrong = |field, reason: String| Err(SettingError::new(field, reason));
        if self.compat && !method.has_compat() {
            return wrong("compat", format!("method {method} has no released rule that differs from ours"));
        }
        if self.lambda.is_some() && method != Method::Pyramid {
            return wrong("lambda", format!("belongs to method pyramid, not {method}"));
        }
        if self.lambda.is_some() && self.budget.is_some() {
            return wrong("lambda", "says what budget says too; give one of them".into());
        }
        if self.merge.is_some() && method != Method::Must {
            return wrong("merge", format!("belongs to method must, not {method}"));
        }
        if !self.compat && self.merge.is_some_and(|share| share > 1.0) {
            return wrong("merge", "is a share of the windows and ends at 1".into());
        }
        if method == Method::None && self.budget.is_some_and(|budget| budget != Budget::ALL) {
            return wrong("budget", "method none keeps everything; name a method that drops".into());
        }
        if method == Method::Must && self.compat && self.budget.is_some() {
            return wrong(
                "budget",
                "method must with compat goes by thresholds; leave the budget out".into(),
            );
        }
        if self.newline == Newline::Rows && (method.drops_in_llm() || self.compat) {
            return wrong("newline", "rows is for methods before the decoder, and not for compat".into());
        }
        Ok(())
    }

    /// The budget in effect.
    pub fn effective_budget(&self) -> Budget {
        match (self.budget, self.lambda) {
            (Some(budget), _) => budget,
            (None, Some(lambda)) => Budget::Fraction(lambda.powi(3)),
            (None, None) => self.method.default_budget(),
        }
    }

    /// Everything that decides what stays, as text: equal texts choose equally. For cache keys.
    pub fn fingerprint(&self) -> String {
        let Self { method, compat, newline, positions, alpha, merge, seed, .. } = self;
        let (newline, positions, budget) = (newline.name(), positions.name(), self.effective_budget());
        // A count of 1 and a share of 1 are shown alike.
        let kind = if matches!(budget, Budget::Count(_)) { "count" } else { "share" };
        let thresholds = (self.global_threshold, self.individual_threshold);
        format!(
            "{method} {kind} {budget} {compat} {newline} {positions} {alpha} {lambda:?} {merge:?} \
             {thresholds:?} {seed}",
            lambda = self.lambda
        )
    }
}

fn parsed<T: FromStr<Err = String>>(value: FieldValue<'_>) -> Result<T, String> {
    match value {
        FieldValue::Text(text) => text.parse(),
        FieldValue::Number(number) => number.to_string().parse(),
        FieldValue::Bool(value) => value.to_string().parse(),
    }
}

fn boolean(value: FieldValue<'_>) -> Result<bool, String> {
    match value {
        FieldValue::Bool(value) => Ok(value),
        FieldValue::Text("true") => Ok(true),
        FieldValue::Text("false") => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

fn number(value: FieldValue<'_>, least: f64, most: f64) -> Result<f64, String> {
    let number = match value {
        FieldValue::Number(number) => number,
        FieldValue::Text(text) => text.trim().parse().map_err(|_| format!("{text:?} is no number"))?,
        FieldValue::Bool(value) => return Err(format!("{value} is no number")),
    };
    if (least..=most).contains(&number) {
        return Ok(number);
    }
    Err(format!("{number} is not between {least} and {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(fields: &[(&str, FieldValue<'_>)]) -> Result<VisualSettings, String> {
        let mut settings = VisualSettings::default();
        for &(field, value) in fields {
            settings.set(field, value).map_err(|error| error.to_string())?;
        }
        settings.check().map_err(|error| error.to_string())?;
        Ok(settings)
    }

    #[test]
    fn fields_are_read_and_mistakes_are_named() {
        use FieldValue::{Bool, Number, Text};
        let settings =
            set(&[("method", Text("hired")), ("budget", Number(0.2)), ("newline", Text("rows"))]).unwrap();
        assert_eq!((settings.method, settings.newline), (Method::Hired, Newline::Rows));
        assert_eq!(settings.effective_budget(), Budget::Fraction(0.2));
        assert_eq!(
            set(&[("method", Text("dpp")), ("budget", Text("196"))]).unwrap().budget,
            Some(Budget::Count(196))
        );
        let wrong = |fields: &[(&str, FieldValue<'_>)]| set(fields).unwrap_err();
        assert!(
            wrong(&[("method", Text("best"))])
                .starts_with("method: \"best\" is no dropping method; known are none, hired")
        );
        assert!(
            wrong(&[("methode", Text("hired"))])
                .starts_with("methode: is no visual setting; known are method, budget")
        );
        for bad in
            [Number(0.0), Number(-1.0), Number(1.5), Number(f64::NAN), Text("101%"), Text("much"), Bool(true)]
        {
            assert!(wrong(&[("method", Text("hired")), ("budget", bad)]).starts_with("budget: "), "{bad:?}");
        }
        assert!(wrong(&[("budget", Number(0.5))]).starts_with("budget: method none keeps everything"));
        assert!(wrong(&[("method", Text("dpp")), ("compat", Bool(true))]).starts_with("compat: "));
        assert!(wrong(&[("method", Text("hired")), ("alpha", Number(1.1))]).starts_with("alpha: 1.1 is not"));
        assert!(wrong(&[("lambda", Number(0.5))]).starts_with("lambda: belongs to method pyramid"));
        assert!(wrong(&[("seed", Number(0.5))]).starts_with("seed: "));
        assert!(wrong(&[("compat", Number(1.0))]).starts_with("compat: must be true or false"));
    }

    #[test]
    fn every_name_and_field_is_read_back() {
        for method in Method::ALL {
            assert_eq!(method.name().parse(), Ok(method));
        }
        for field in VisualSettings::FIELDS {
            let error = VisualSettings::default().set(field, FieldValue::Text("?")).unwrap_err();
            assert!(!error.reason.contains("is no visual setting"), "{error}");
        }
    }

    #[test]
    fn shares_round_down_but_not_past_their_own_text() {
        assert_eq!(Budget::Fraction(0.29).of(100), 29);
        assert_eq!(Budget::Fraction(0.3).of(80), 24);
        assert_eq!(Budget::Fraction(1e-6).of(1008), 1);
        assert_eq!(Budget::Count(5000).of(1008), 1008);
        assert_eq!(Budget::ALL.of(0), 0);
        assert_eq!("20%".parse(), Ok(Budget::Fraction(0.2)));
    }

    #[test]
    fn lambda_is_the_cube_root_of_the_budget() {
        let mut settings = VisualSettings::of(Method::Pyramid);
        assert_eq!(settings.effective_budget(), Budget::Fraction(0.125));
        settings.lambda = Some(0.5);
        assert_eq!(settings.effective_budget(), Budget::Fraction(0.125));
    }
}
