//! What dropping visual tokens costs: questions about held-out pages, every method at every budget.
//!
//! [`VqaEvaluation`] asks the same questions in every [`Row`] and compares question by question. Answers are
//! greedy and right only as a whole, their end included. It knows pages, plans and scores; who sees and who
//! answers are given as [`Eyes`] and [`Decoder`], so that what is measured is the product's own path.

mod evaluation;
pub mod pages;
pub mod report;
mod rows;

pub use evaluation::{VqaEvaluation, VqaOptions};
pub use report::{VqaReport, draw};
pub use rows::{DEFAULT_ROWS, Row, Sight};

use std::{sync::Arc, time::Duration};

use locket_model::LayerDrops;
use locket_vision::{EncodedImage, ImageLayout, RgbImage, VisionModel, Wants};

use crate::Error;

/// Who sees.
pub trait Eyes {
    /// The visual tokens of an image of this size.
    fn layout(&self, height: u32, width: u32) -> ImageLayout;

    /// Encodes an image.
    ///
    /// # Errors
    /// As [`VisionModel::encode`].
    fn encode(&self, image: &RgbImage, wants: Wants<'_>) -> Result<EncodedImage, locket_vision::Error>;
}

impl Eyes for VisionModel {
    fn layout(&self, height: u32, width: u32) -> ImageLayout {
        Self::layout(self, height, width)
    }

    fn encode(&self, image: &RgbImage, wants: Wants<'_>) -> Result<EncodedImage, locket_vision::Error> {
        Self::encode(self, image, wants)
    }
}

/// Who answers.
pub trait Decoder {
    /// Greedily continues each prompt by exactly [`Prompt::tokens`] tokens, all prompts at once.
    ///
    /// # Errors
    /// Why it cannot: the row that asks fails, the others go on.
    fn answer(&mut self, prompts: &[Prompt]) -> Result<Vec<Answer>, Error>;
}

/// A prompt with or without an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Token ids; those of the image's rows mean nothing.
    pub ids: Vec<u32>,
    /// The image.
    pub image: Option<PromptImage>,
    /// Tokens to generate, whatever they are.
    pub tokens: u32,
}

/// The rows of a prompt that are an image.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptImage {
    /// The first row.
    pub first: u32,
    /// Embeddings `[rows, hidden_size]`.
    pub embeddings: Arc<[f32]>,
    /// Position of each row, counted from the image's first.
    pub offsets: Arc<[u32]>,
    /// Positions that the image takes.
    pub span: u32,
    /// Names image and plan.
    pub key: u128,
    /// What leaves inside the decoder.
    pub drops: Option<Arc<LayerDrops>>,
}

/// How a prompt was continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// [`Prompt::tokens`] ids.
    pub ids: Vec<u32>,
    /// When each came, after all prompts were handed over.
    pub times: Vec<Duration>,
}
