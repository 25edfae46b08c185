//! Which visual tokens stay.
//!
//! A [`DropMethod`] has two hooks. [`DropMethod::before_llm`] chooses among the tokens of an encoded image
//! before the decoder sees them: `hired`, `dpp` and the baselines work here, depend on the image alone, and
//! save memory in every layer. [`DropMethod::boundaries`] names the layers of the decoder before which more
//! tokens leave, and the rule by which they are ranked there: `pyramid`, `must` and `fastv`, which depend on
//! the question and save time.
//!
//! Counts are known before an image is encoded ([`DropMethod::planned_tokens`], [`DropMethod::stages`]), so
//! that admission reserves what will be there and never everything. They are exact, except with `compat`,
//! where they are upper bounds. A budget of 1.0 keeps everything, in order, newlines included; only
//! `thumbnail` has no more to give than the whole, shrunk image. Ties go to the lower index, and nothing
//! depends on anything but the image, the settings and the decoder's depth.

mod choice;
mod dpp;
mod hired;
mod in_llm;
mod must;
mod rank;
mod sampling;
pub mod settings;
#[cfg(test)]
mod tests;

pub use settings::{Budget, FieldValue, Method, Newline, Positions, SettingError, VisualSettings};

use locket_model::{Boundary, Keep, LayerDrops};

use crate::{EncodedImage, Error, ImageLayout, RgbImage, VisionModel, Wants, model::PatchMerge};

/// What stays of one image.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VisualPlan {
    /// Tokens that go into the decoder: ascending indices into the packed run.
    pub kept: Vec<u32>,
    /// How many patches each of `kept` stands for; empty if each is one token of the run.
    pub counts: Vec<u32>,
    /// Tokens of the whole run.
    pub run: u32,
    /// Where in the decoder more of them leave.
    pub drops: LayerDrops,
}

/// What is known of a boundary from the image's size alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The first layer that has fewer tokens.
    pub layer: u32,
    /// The most that pass; with [`Keep::Exactly`] exactly so many.
    pub keep: u32,
}

/// Chooses visual tokens; as it stands, all of them go in and none leaves.
pub trait DropMethod: Send + Sync {
    /// The settings it was made from.
    fn settings(&self) -> &VisualSettings;

    /// Tokens that will go into the decoder, from the image's size alone; exact unless
    /// [`VisualSettings::compat`].
    fn planned_tokens(&self, layout: &ImageLayout) -> usize {
        layout.tokens()
    }

    /// What the encoding has to contain.
    fn wants(&self) -> Wants<'static> {
        Wants::default()
    }

    /// Which patches the tower merges, if any; to be put into [`Wants::merge`].
    fn merge(&self, _layout: &ImageLayout) -> Option<Box<dyn PatchMerge>> {
        None
    }

    /// Chooses the tokens that go into the decoder.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if the image was not encoded with what [`Self::wants`] asks for.
    fn before_llm(&self, image: &EncodedImage) -> Result<Vec<u32>, Error> {
        Ok(everything(image))
    }

    /// Where in a decoder of `layers` layers how many tokens will leave, from the image's size alone.
    fn stages(&self, _layers: usize, _layout: &ImageLayout) -> Vec<Stage> {
        Vec::new()
    }

    /// The boundaries for an image of which `kept` went into the decoder: what its rows are to be given as
    /// drops. Indices of a key set are indices into `kept`.
    ///
    /// # Errors
    /// As [`Self::before_llm`].
    fn boundaries(
        &self,
        _layers: usize,
        _image: &EncodedImage,
        _kept: &[u32],
    ) -> Result<Vec<Boundary>, Error> {
        Ok(Vec::new())
    }

    /// Whether the layers between the boundaries lose after the prompt what the last boundary dropped.
    fn cuts(&self) -> bool {
        false
    }

    /// How many patches each of `kept` stands for; empty if each is one.
    fn counts(&self, _image: &EncodedImage, _kept: &[u32]) -> Vec<u32> {
        Vec::new()
    }

    /// Both hooks.
    ///
    /// # Errors
    /// As [`Self::before_llm`].
    fn plan(&self, layers: usize, image: &EncodedImage) -> Result<VisualPlan, Error> {
        check_encoding(image)?;
        let kept = self.before_llm(image)?;
        let boundaries = self.boundaries(layers, image, &kept)?;
        let counts = self.counts(image, &kept);
        let drops = LayerDrops {
            cut: self.cuts() && !boundaries.is_empty(),
            compact: self.settings().positions == Positions::Compact && !boundaries.is_empty(),
            boundaries,
        };
        Ok(VisualPlan { kept, counts, run: image.layout.tokens() as u32, drops })
    }
}

/// The method that `settings` name.
///
/// # Errors
/// [`SettingError`] as [`VisualSettings::check`].
pub fn method(settings: &VisualSettings) -> Result<Box<dyn DropMethod>, SettingError> {
    settings.check()?;
    let settings = *settings;
    Ok(match settings.method {
        Method::None => Box::new(sampling::Everything(settings)),
        Method::Hired => Box::new(hired::Hired(settings)),
        Method::Pyramid => Box::new(in_llm::Pyramid(settings)),
        Method::Must => Box::new(must::Must(settings)),
        Method::Fastv => Box::new(in_llm::FastV(settings)),
        Method::Dpp => Box::new(dpp::Dpp(settings)),
        Method::Random => Box::new(sampling::Random(settings)),
        Method::Uniform => Box::new(sampling::Uniform(settings)),
        Method::Thumbnail => Box::new(sampling::Thumbnail(settings)),
    })
}

/// Encodes `image` with what `method` needs, and plans for a decoder of `layers` layers.
///
/// # Errors
/// As [`VisionModel::encode`].
pub fn encode_and_plan(
    model: &VisionModel,
    method: &dyn DropMethod,
    layers: usize,
    image: &RgbImage,
) -> Result<(EncodedImage, VisualPlan), Error> {
    let wants = method.wants();
    let merge = method.merge(&model.layout(image.height(), image.width()));
    let encoded = model.encode(image, Wants { merge: merge.as_deref(), ..wants })?;
    let plan = method.plan(layers, &encoded)?;
    Ok((encoded, plan))
}

impl VisualPlan {
    /// Rows of `features [run, width]` that stay, `[kept, width]`.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if the features are not those of this plan's run.
    pub fn gather(&self, features: &[f32], width: usize) -> Result<Vec<f32>, Error> {
        if features.len() != self.run as usize * width {
            let reason = format!("{} numbers are not {} rows of {width}", features.len(), self.run);
            return Err(Error::InvalidPlan(reason));
        }
        let mut rows = Vec::with_capacity(self.kept.len() * width);
        for &idx in &self.kept {
            let row = idx as usize * width..(idx as usize + 1) * width;
            let outside = || Error::InvalidPlan(format!("token {idx} of {}", self.run));
            rows.extend_from_slice(features.get(row).ok_or_else(outside)?);
        }
        Ok(rows)
    }

    /// Position of each row that stays, counted from the run's first token: gaps stay with
    /// [`Positions::Original`].
    pub fn offsets(&self, positions: Positions) -> Vec<u32> {
        match positions {
            Positions::Original => self.kept.clone(),
            Positions::Compact => (0..self.kept.len() as u32).collect(),
        }
    }

    /// Positions that the run takes: text goes on behind them.
    pub fn span(&self, positions: Positions) -> u32 {
        match positions {
            Positions::Original => self.run,
            Positions::Compact => self.kept.len() as u32,
        }
    }

    /// Whether everything stays everywhere.
    pub fn is_complete(&self) -> bool {
        self.kept.len() == self.run as usize && self.drops.boundaries.is_empty()
    }

    /// Exact numbers of tokens by boundary; a threshold counts as if it dropped nothing.
    pub fn stages(&self) -> Vec<Stage> {
        let mut here = self.kept.len() as u32;
        let stage = |boundary: &Boundary| {
            if let Keep::Exactly(keep) = boundary.keep {
                here = here.min(keep);
            }
            Stage { layer: boundary.layer, keep: here }
        };
        self.drops.boundaries.iter().map(stage).collect()
    }
}

/// Tokens of the image in each of `layers` layers.
pub fn tokens_by_layer(layers: usize, into: usize, stages: &[Stage]) -> Vec<u32> {
    let mut tokens = vec![into as u32; layers];
    for stage in stages {
        for tokens in tokens.iter_mut().skip(stage.layer as usize) {
            *tokens = (*tokens).min(stage.keep);
        }
    }
    tokens
}

/// Mean of [`tokens_by_layer`].
pub fn mean_tokens(layers: usize, into: usize, stages: &[Stage]) -> f64 {
    let sum: u64 = tokens_by_layer(layers, into, stages).into_iter().map(u64::from).sum();
    sum as f64 / layers.max(1) as f64
}

/// The largest budget with which `settings` keep at most `mean` tokens of the image per layer, averaged over
/// the decoder's layers; `None` if not even one token at the end is little enough, or the method has no
/// budget. For comparing methods before the decoder with methods inside it.
pub fn budget_for_mean(
    settings: &VisualSettings,
    layers: usize,
    layout: &ImageLayout,
    mean: f64,
) -> Option<Budget> {
    let fits = |count: usize| {
        let method = method(&settings.with_budget(Budget::Count(count as u32))).ok()?;
        let into = method.planned_tokens(layout);
        Some(mean_tokens(layers, into, &method.stages(layers, layout)) <= mean)
    };
    let (mut low, mut high) = (0, layout.tokens());
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle)? { low = middle } else { high = middle - 1 }
    }
    (low > 0).then_some(Budget::Count(low as u32))
}

/// Holds what the methods index to the layout.
fn check_encoding(image: &EncodedImage) -> Result<(), Error> {
    let tokens = image.layout.tokens();
    if image.features.len() != tokens * image.hidden_size {
        let reason = format!("{} numbers are not {tokens} tokens", image.features.len());
        return Err(Error::InvalidPlan(reason));
    }
    let is_inside = |present: &Vec<u32>| {
        present.is_sorted_by(|a, b| a < b) && present.last().is_none_or(|&last| (last as usize) < tokens)
    };
    if !image.present.as_ref().is_none_or(is_inside) {
        return Err(Error::InvalidPlan("tokens that are present do not ascend below the run's end".into()));
    }
    Ok(())
}

/// The class token's attention `[tiles, patches]`.
///
/// # Errors
/// [`Error::InvalidPlan`] if it was not asked for.
fn attention<'a>(image: &EncodedImage, attention: &'a [f32]) -> Result<Vec<&'a [f32]>, Error> {
    let patches = image.layout.base_tokens();
    if attention.len() != image.layout.tiles() * patches {
        let reason =
            format!("{} class-token scores for {} tiles of {patches}", attention.len(), image.layout.tiles());
        return Err(Error::InvalidPlan(reason));
    }
    Ok(attention.chunks_exact(patches).collect())
}

/// Every token that is there.
fn everything(image: &EncodedImage) -> Vec<u32> {
    image.present.clone().unwrap_or_else(|| (0..image.layout.tokens() as u32).collect())
}
