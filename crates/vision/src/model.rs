//! A vision model: pixels in, packed visual tokens out.

use std::{path::Path, sync::Arc};

use crate::{Error, ImageLayout, RgbImage, VisionGeometry};

/// What an encoding is to contain besides the features.
#[derive(Clone, Copy, Default)]
pub struct Wants<'a> {
    /// The class token's attention in the first and the last layer that run.
    pub cls_attention: bool,
    /// The tower's features of all patches, before the projector.
    pub patch_features: bool,
    /// Only the whole image in one tile, without the tiles of its parts.
    pub base_only: bool,
    /// Merges patches of a tile behind the tower's first layer.
    pub merge: Option<&'a dyn PatchMerge>,
}

/// Patches of all tiles behind the tower's first layer.
#[derive(Debug, Clone, Copy)]
pub struct TileStates<'a> {
    /// Tiles.
    pub tiles: usize,
    /// Patches along a tile's side.
    pub side: usize,
    /// Numbers of a patch.
    pub width: usize,
    /// `[tiles, side * side, width]`, the class token left out.
    pub states: &'a [f32],
}

/// Decides which patches become one. Each group is replaced by its mean, at the place of its first patch.
pub trait PatchMerge: Send + Sync {
    /// For each tile its groups of at least two patches, ascending within a group, no patch in two of them.
    /// Every tile must lose the same number of patches, because the tiles are one batch.
    fn groups(&self, states: TileStates<'_>) -> Vec<Vec<Vec<u32>>>;
}

/// An image as visual tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedImage {
    /// What each token shows.
    pub layout: ImageLayout,
    /// Width of a visual token.
    pub hidden_size: usize,
    /// The packed run `[layout.tokens(), hidden_size]`: base, then the map's rows with their newlines. Rows of
    /// tokens that are not `present` are zero.
    pub features: Arc<[f32]>,
    /// Tokens that were not merged away, ascending; `None`: all.
    pub present: Option<Vec<u32>>,
    /// Attention of the class token to each patch in layer 0, summed over heads, `[tiles, patches]`; the class
    /// token's to itself is left out of the sum over keys. Empty if not wanted.
    pub cls_initial: Vec<f32>,
    /// The same of the last layer that ran. Patches that were merged away have 0.
    pub cls_final: Vec<f32>,
    /// The tower's features `[tiles, patches, width of the projector's input]`. Empty if not wanted.
    pub patch_features: Vec<f32>,
}

/// How to load a vision model.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Where the tower runs.
    pub device: candle_core::Device,
    /// CPU threads that one encoding may use; at least 1.
    pub threads: usize,
    /// How LLaVA-1.5 makes its tile.
    pub base_fit: crate::geometry::BaseFit,
}

/// Tower, projector and newline of a LLaVA model. One image is encoded at a time; others wait.
#[derive(Debug)]
pub struct VisionModel {
    geometry: VisionGeometry,
}

impl VisionModel {
    /// Opens the vision part of a Hugging Face folder, or a safetensors file with a vision model of its own.
    ///
    /// # Errors
    /// [`Error::NoVision`] if there is none, else what is wrong with it.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let _ = options;
        Err(Error::NoVision { path: path.to_owned(), reason: "this build cannot open any yet".into() })
    }

    /// Everything but the weights.
    pub fn geometry(&self) -> &VisionGeometry {
        &self.geometry
    }

    /// The visual tokens of an image of this size.
    pub fn layout(&self, height: u32, width: u32) -> ImageLayout {
        ImageLayout::of(&self.geometry, height, width)
    }

    /// Runs the tower and the projector over the tiles of `image`.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] for a merge that contradicts the image, and [`Error::Device`].
    pub fn encode(&self, image: &RgbImage, wants: Wants<'_>) -> Result<EncodedImage, Error> {
        let _ = wants;
        Err(Error::InvalidPlan(format!(
            "a {} x {} image cannot be encoded yet",
            image.width(),
            image.height()
        )))
    }
}
