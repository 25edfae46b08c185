//! What is compared: dropping methods with their budgets, and an answer without an image.

use std::str::FromStr;

use locket_vision::{
    ImageLayout,
    drop::{Budget, FieldValue, Method, VisualSettings, budget_for_mean},
};

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// As it was asked for: `hired@0.2`, `must~0.333`, `blind`.
    pub name: String,
    /// What is seen.
    pub sight: Sight,
}

/// What a row's questions are asked with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sight {
    /// No image: what a model answers from the question alone.
    Blind,
    /// The tokens that these settings keep.
    Kept(VisualSettings),
    /// The same, with the largest budget that has at most this share of an image's tokens in the mean over
    /// the decoder's layers.
    KeptMean(VisualSettings, f64),
}

impl Row {
    /// Name of the method, `blind` among them.
    pub fn method(&self) -> &'static str {
        match &self.sight {
            Sight::Blind => "blind",
            Sight::Kept(settings) | Sight::KeptMean(settings, _) => settings.method.name(),
        }
    }

    /// What rows that are compared have in common: the budget as it was asked for; `None` where a row has
    /// none to choose, and is compared with every other.
    pub(crate) fn budget(&self) -> Option<f64> {
        match &self.sight {
            Sight::Kept(settings)
                if settings.method != Method::None && settings.method != Method::Thumbnail =>
            {
                match settings.effective_budget() {
                    Budget::Fraction(share) => Some(share),
                    Budget::Count(count) => Some(f64::from(count)),
                }
            }
            Sight::KeptMean(_, mean) => Some(*mean),
            _ => None,
        }
    }

    /// What is left out beside method and budget, for the picture's lines.
    pub(crate) fn series(&self) -> String {
        self.name.split(['@', '~']).next().unwrap_or_default().to_owned()
    }

    /// The settings for an image of this layout in a decoder of `layers` layers; `Ok(None)`: no image.
    ///
    /// # Errors
    /// Why the image cannot be seen so.
    pub(crate) fn settings(
        &self,
        layers: usize,
        layout: &ImageLayout,
    ) -> Result<Option<VisualSettings>, String> {
        match &self.sight {
            Sight::Blind => Ok(None),
            Sight::Kept(settings) => Ok(Some(*settings)),
            Sight::KeptMean(settings, mean) => {
                let tokens = mean * layout.tokens() as f64;
                let budget = budget_for_mean(settings, layers, layout, tokens).ok_or_else(|| {
                    format!(
                        "{} has more than {tokens:.1} tokens per layer whatever it keeps",
                        settings.method
                    )
                })?;
                Ok(Some(settings.with_budget(budget)))
            }
        }
    }
}

impl FromStr for Row {
    type Err = String;

    /// Reads `blind` or `method[:field=value ...][@budget or ~mean]`, fields separated by colons.
    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_owned();
        if text == "blind" {
            return Ok(Self { name, sight: Sight::Blind });
        }
        let (head, mean) = match text.split_once('~') {
            Some((head, mean)) => (head, Some(share(mean).map_err(|reason| format!("{text}: {reason}"))?)),
            None => (text, None),
        };
        let (head, budget) = match head.split_once('@') {
            Some((head, budget)) => (head, Some(budget)),
            None => (head, None),
        };
        let mut fields = head.split(':');
        let mut settings = VisualSettings::default();
        let mut set = |field: &str, value: &str| {
            settings.set(field, FieldValue::Text(value)).map_err(|error| format!("{text}: {error}"))
        };
        set("method", fields.next().unwrap_or_default())?;
        for field in fields {
            // `compat` alone is `compat=true`.
            let (field, value) = field.split_once('=').unwrap_or((field, "true"));
            set(field, value)?;
        }
        if let Some(budget) = budget {
            set("budget", budget)?;
        }
        settings.check().map_err(|error| format!("{text}: {error}"))?;
        let sight = match mean {
            None => Sight::Kept(settings),
            Some(_) if budget.is_some() || settings.lambda.is_some() => {
                return Err(format!("{text}: a mean is a budget already; give one of them"));
            }
            Some(_) if settings.compat || matches!(settings.method, Method::None | Method::Thumbnail) => {
                return Err(format!("{text}: has no budget that a mean could choose"));
            }
            Some(mean) => Sight::KeptMean(settings, mean),
        };
        Ok(Self { name, sight })
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<Budget>()? {
        Budget::Fraction(share) => Ok(share),
        Budget::Count(count) => Err(format!("{count}: a mean is a share, at most 1")),
    }
}

/// Rows that say what dropping costs, with every baseline.
pub const DEFAULT_ROWS: &str = "none,blind,thumbnail,\
    hired@0.4,hired@0.2,hired@0.1,hired:compat@0.2,hired:newline=rows@0.2,\
    dpp@0.4,dpp@0.2,dpp@0.1,random@0.4,random@0.2,random@0.1,uniform@0.4,uniform@0.2,uniform@0.1,\
    pyramid,fastv@0.4,fastv@0.2,fastv@0.1,must~0.333,must~0.222,must~0.111";

#[cfg(test)]
mod tests {
    use locket_vision::{drop::Newline, geometry::testing::demo};

    use super::*;

    #[test]
    fn rows_are_read_and_mistakes_are_named() {
        let rows: Result<Vec<Row>, _> = DEFAULT_ROWS.split(',').map(str::parse).collect();
        assert_eq!(rows.unwrap().len(), 24);
        let row: Row = "hired:newline=rows:alpha=0.25@20%".parse().unwrap();
        let Sight::Kept(settings) = row.sight else { panic!("{row:?}") };
        assert_eq!((settings.newline, settings.alpha), (Newline::Rows, 0.25));
        assert_eq!((row.budget(), row.series().as_str()), (Some(0.2), "hired:newline=rows:alpha=0.25"));
        let wrong = |text: &str| text.parse::<Row>().unwrap_err();
        assert!(wrong("best@0.2").starts_with("best@0.2: method: \"best\" is no dropping method"));
        assert!(wrong("hired@2.5").contains("budget: 2.5 is neither"));
        assert!(wrong("must~0.3@0.2").contains("must~0.3@0.2: "));
        assert!(wrong("must@0.3~0.2").contains("a mean is a budget already"));
        assert!(wrong("none~0.2").contains("no budget"));
        assert!(wrong("dpp:compat@0.2").contains("compat: "));
    }

    #[test]
    fn means_become_budgets_of_the_image() {
        let layout = ImageLayout::of(&demo(), 448, 448);
        let row: Row = "hired~0.2".parse().unwrap();
        let settings = row.settings(30, &layout).unwrap().unwrap();
        assert_eq!(settings.budget, Some(Budget::Count(201)));
        let row: Row = "fastv~0.01".parse().unwrap();
        assert!(row.settings(30, &layout).unwrap_err().contains("whatever it keeps"));
        assert_eq!("blind".parse::<Row>().unwrap().settings(30, &layout), Ok(None));
    }
}
