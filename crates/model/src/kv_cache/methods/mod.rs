//! The methods: who survives a fold.
//!
//! One driver folds for all of them ([`super::fold`]); a file here says what one method must
//! observe and how it ranks.

mod expected;
mod full;
mod h2o;
mod key_diff;
mod learned;
pub(super) mod lococo;
mod observed;
mod tova;
mod window;

use super::{CacheGeometry, LayerView, SideCar, fold::Scores};
use crate::Error;

/// Which tokens a full block keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheMethod {
    /// Everything: the block is as long as the sequence may become.
    #[default]
    Full,
    /// The first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453).
    Window,
    /// The largest sums of received attention, and the recent half (H2O, arXiv 2306.14048).
    H2o,
    /// What the latest query attends to most, heads averaged (TOVA, arXiv 2401.06104).
    Tova,
    /// What a Gaussian model of coming queries is expected to attend to, times the value's norm
    /// (Expected Attention, arXiv 2510.00636).
    Expected,
    /// Keys least like the mean key (KeyDiff, arXiv 2504.15364).
    KeyDiff,
    /// The largest mean of received attention per query that could see the token.
    Observed,
    /// Heavy hitters and mixtures by a trained convolution (LoCoCo, arXiv 2406.05317), as published.
    Lococo,
    /// Scores by a trained causal convolution, once per token, beside the observed attention.
    Learned,
}

/// What attention must report of the weights that each slot received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Add every row's weights, summed over the query heads of the group.
    Sum,
    /// Only those of the latest row, replacing older ones.
    Last,
}

/// Memory that a method keeps beside keys, values and positions, in f32 numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SideArrays {
    /// Per slot and KV head.
    pub columns: usize,
    /// Per layer: the tail of a convolution's input, or the latest queries.
    pub per_layer: usize,
    /// Whether a number is kept per slot and KV head for sequences that fold and whose positions have
    /// gaps, because visual tokens were dropped. No method's matter: the caller's.
    pub gaps: bool,
}

impl SideArrays {
    /// What blocks need that serve any of `methods`.
    pub fn of(methods: &[CacheMethod], geometry: CacheGeometry, side_car: Option<&SideCar>) -> Self {
        methods.iter().fold(Self::default(), |sum, method| {
            let one = method.side_arrays(geometry, side_car);
            Self {
                columns: sum.columns.max(one.columns),
                per_layer: sum.per_layer.max(one.per_layer),
                gaps: false,
            }
        })
    }

    /// The same for sequences that fold and whose positions have gaps.
    #[must_use]
    pub fn with_gaps(self) -> Self {
        Self { gaps: true, ..self }
    }

    /// Whether `needed` fits in here.
    pub fn holds(&self, needed: Self) -> bool {
        self.columns >= needed.columns && self.per_layer >= needed.per_layer
    }
}

impl CacheMethod {
    /// Every method, in the order in which documentation lists them.
    pub const ALL: [Self; 9] = [
        Self::Full,
        Self::Window,
        Self::H2o,
        Self::Tova,
        Self::Expected,
        Self::KeyDiff,
        Self::Observed,
        Self::Lococo,
        Self::Learned,
    ];

    /// The name used in configuration, requests and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window => "window",
            Self::H2o => "h2o",
            Self::Tova => "tova",
            Self::Expected => "expected",
            Self::KeyDiff => "keydiff",
            Self::Observed => "observed",
            Self::Lococo => "lococo",
            Self::Learned => "learned",
        }
    }

    /// What attention must report, if anything, into the first column.
    pub fn received(self) -> Option<Received> {
        match self {
            Self::H2o | Self::Observed | Self::Lococo | Self::Learned => Some(Received::Sum),
            Self::Tova => Some(Received::Last),
            _ => None,
        }
    }

    /// Whether the method scores every row from its key and value before they are rotated.
    pub fn scores_rows(self) -> bool {
        self == Self::Learned
    }

    /// Whether the method keeps queries from before they are rotated.
    pub fn keeps_queries(self) -> bool {
        self == Self::Expected
    }

    /// Whether the method reads stored keys and values when it folds.
    pub fn reads_slots(self) -> bool {
        matches!(self, Self::Expected | Self::KeyDiff | Self::Lococo)
    }

    /// Whether the method needs trained weights.
    pub fn needs_side_car(self) -> bool {
        matches!(self, Self::Lococo | Self::Learned)
    }

    /// Whether layers may have budgets of their own under the method: those whose ranking is ours, not a
    /// publication's.
    pub fn shares_layers(self) -> bool {
        matches!(self, Self::Observed | Self::Learned)
    }

    /// Whether the method rewrites slots with mixtures of several tokens, so that slots must be
    /// of a floating-point type.
    pub fn mixes(self) -> bool {
        self == Self::Lococo
    }

    /// Memory beside keys, values and positions.
    pub fn side_arrays(self, geometry: CacheGeometry, side_car: Option<&SideCar>) -> SideArrays {
        match self {
            Self::Full | Self::Window | Self::KeyDiff => SideArrays::default(),
            Self::H2o | Self::Tova | Self::Observed | Self::Lococo => {
                SideArrays { columns: 1, ..SideArrays::default() }
            }
            Self::Expected => {
                SideArrays { per_layer: expected::num_numbers(geometry), ..SideArrays::default() }
            }
            Self::Learned => {
                let tail = side_car.and_then(|side_car| side_car.learned.as_ref());
                let per_layer = tail.map_or(0, |weights| weights.tail_len());
                SideArrays { columns: 3, per_layer, ..SideArrays::default() }
            }
        }
    }

    /// The implementation.
    pub(super) fn fold_method(self) -> &'static dyn FoldMethod {
        match self {
            Self::Full => &full::Full,
            Self::Window => &window::Window,
            Self::H2o => &h2o::H2o,
            Self::Tova => &tova::Tova,
            Self::Expected => &expected::Expected,
            Self::KeyDiff => &key_diff::KeyDiff,
            Self::Observed => &observed::Observed,
            Self::Lococo => &lococo::Lococo,
            Self::Learned => &learned::Learned,
        }
    }
}

impl std::str::FromStr for CacheMethod {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|method| method.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|method| method.name()).collect();
            format!("unknown cache method {name:?}; known are {}", known.join(", "))
        })
    }
}

/// Ranks slots. One driver folds for all methods; a method only says what is worth keeping.
pub(crate) trait FoldMethod: Send + Sync {
    /// Writes a score per slot into `scores.first [kv_heads, len]`; higher survives. A method with two
    /// rankings fills `scores.second` as well.
    ///
    /// # Errors
    /// The backend's, if keys or values must be read; [`Error::InvalidBatch`] if the side-car's
    /// weights are not there.
    fn rank(&self, view: &LayerView<'_>, scores: &mut Scores) -> Result<(), Error>;

    /// What a running value of the first column becomes when the age of its slot changes from `old` to
    /// `new` by a compaction.
    fn rescale(&self, received: f32, _old_age: u32, _new_age: u32) -> f32 {
        received
    }

    /// Where among the layer's numbers the un-rotated queries `[heads, head_dim]` of the layer's `token`-th
    /// row are kept, if they are.
    fn query_place(&self, _geometry: CacheGeometry, _token: u32) -> Option<std::ops::Range<usize>> {
        None
    }
}
