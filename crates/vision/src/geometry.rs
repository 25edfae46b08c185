//! The typed geometry of a vision model: tiles, tower, projector.

use crate::Error;

/// How an image becomes tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionKind {
    /// LLaVA-1.5: one tile.
    Llava15,
    /// LLaVA-NeXT: one tile of the whole image and a grid of tiles of its parts ("anyres").
    LlavaNext,
}

/// How an image becomes the one tile of LLaVA-1.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BaseFit {
    /// The shorter side is resized to the tile's, and the middle is cut out: Hugging Face's way.
    #[default]
    Crop,
    /// Padded to a square with the mean colour, then resized: the original repository's way.
    Pad,
}

/// Everything about a vision model but its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionGeometry {
    /// Which of the models.
    pub kind: VisionKind,
    /// Pixels of a tile's side.
    pub tile: u32,
    /// Pixels of a patch's side; divides `tile`.
    pub patch: u32,
    /// Resolutions `(height, width)` that a grid of tiles may have, multiples of `tile`; empty for LLaVA-1.5.
    pub pinpoints: Vec<(u32, u32)>,
    /// How LLaVA-1.5 makes its tile.
    pub base_fit: BaseFit,
    /// Mean of each channel, for pixels from 0 to 1.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
    /// Width of the tower.
    pub width: usize,
    /// Attention heads of the tower.
    pub num_heads: usize,
    /// Width of the tower's MLP.
    pub mlp_width: usize,
    /// Layers of the tower that the configuration names; those behind the last feature layer never run.
    pub num_layers: usize,
    /// Added to variances by the tower's layer norms.
    pub layer_norm_eps: f64,
    /// What the features are: indices into the list [input of layer 0, output of layer 0, output of layer 1, …],
    /// concatenated if there are several.
    pub feature_layers: Vec<usize>,
    /// Whether a learned row ends each row of the map (LLaVA-NeXT).
    pub has_newline: bool,
    /// Width of a visual token: the decoder's.
    pub hidden_size: usize,
    /// The id that stands for visual tokens in a prompt, if the files say so.
    pub image_token_id: Option<u32>,
}

impl VisionGeometry {
    /// Patches along a tile's side.
    pub fn side(&self) -> u32 {
        self.tile / self.patch
    }

    /// Patches of a tile: visual tokens before anything is dropped.
    pub fn patches(&self) -> usize {
        (self.side() as usize).pow(2)
    }

    /// Layers of the tower that run: up to the last feature layer.
    pub fn layers_run(&self) -> usize {
        self.feature_layers.iter().copied().max().unwrap_or(0)
    }

    /// The most visual tokens that an image can become.
    pub fn max_tokens(&self) -> usize {
        let side = self.side();
        let of_grid = |&(height, width): &(u32, u32)| {
            let (rows, cols) = (height / self.tile * side, width / self.tile * side);
            rows as usize * (cols as usize + usize::from(self.has_newline))
        };
        self.patches() + self.pinpoints.iter().map(of_grid).max().unwrap_or(0)
    }

    /// The most tiles that an image can become, the one of the whole image included.
    pub fn max_tiles(&self) -> usize {
        let tiles = |&(height, width): &(u32, u32)| (height / self.tile * (width / self.tile)) as usize;
        1 + self.pinpoints.iter().map(tiles).max().unwrap_or(0)
    }

    /// Holds every number to a range in which nothing here overflows.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first field that is wrong.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        bounded("image_size", self.tile as usize, 1 << 12)?;
        bounded("patch_size", self.patch as usize, 1 << 10)?;
        bounded("hidden_size", self.width, 1 << 14)?;
        bounded("num_attention_heads", self.num_heads, 1 << 10)?;
        bounded("intermediate_size", self.mlp_width, 1 << 16)?;
        bounded("num_hidden_layers", self.num_layers, 256)?;
        bounded("text_config.hidden_size", self.hidden_size, 1 << 20)?;
        if !self.tile.is_multiple_of(self.patch) {
            return Err(invalid(
                "patch_size",
                format!("is {}, which does not divide the tile's {} pixels", self.patch, self.tile),
            ));
        }
        if self.patches() > 1 << 14 {
            return Err(invalid("patch_size", format!("{} patches of a tile are too many", self.patches())));
        }
        if !self.width.is_multiple_of(self.num_heads) {
            return Err(invalid(
                "num_attention_heads",
                format!("is {}, which does not divide the width {}", self.num_heads, self.width),
            ));
        }
        if self.feature_layers.is_empty() || self.feature_layers.len() > 32 {
            return Err(invalid("vision_feature_layer", "must be one layer or a list of 1 to 32"));
        }
        if self.layers_run() > self.num_layers || self.layers_run() == 0 {
            return Err(invalid(
                "vision_feature_layer",
                format!("must lie behind one of the tower's {} layers", self.num_layers),
            ));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0) {
            return Err(invalid("layer_norm_eps", "must be a finite number above 0"));
        }
        if self.std.iter().chain(&self.mean).any(|x| !x.is_finite()) || self.std.iter().any(|&x| x <= 0.0) {
            return Err(invalid("image_std", "and image_mean must be finite, and image_std above 0"));
        }
        self.validate_pinpoints()
    }

    fn validate_pinpoints(&self) -> Result<(), Error> {
        match self.kind {
            VisionKind::Llava15 => return Ok(()),
            VisionKind::LlavaNext => bounded("image_grid_pinpoints", self.pinpoints.len(), 256)?,
        }
        for &(height, width) in &self.pinpoints {
            let is_grid = |side: u32| side > 0 && side.is_multiple_of(self.tile) && side / self.tile <= 64;
            if !is_grid(height) || !is_grid(width) || height / self.tile * (width / self.tile) > 64 {
                return Err(invalid(
                    "image_grid_pinpoints",
                    format!(
                        "[{height}, {width}] must be made of 1 to 64 tiles of {0} x {0} pixels",
                        self.tile
                    ),
                ));
            }
        }
        Ok(())
    }
}

pub(crate) fn invalid(field: &str, reason: impl Into<String>) -> Error {
    Error::Config { field: field.to_owned(), reason: reason.into() }
}

fn bounded(field: &str, value: usize, max: usize) -> Result<(), Error> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(invalid(field, format!("is {value}; it must be between 1 and {max}")))
    }
}

/// Geometries for tests of other crates and of this one.
#[doc(hidden)]
pub mod testing {
    use super::{BaseFit, VisionGeometry, VisionKind};

    /// CLIP ViT-L/14 at 336 pixels under a 7B decoder, LLaVA-NeXT's grids.
    pub fn llava_next_7b() -> VisionGeometry {
        VisionGeometry {
            kind: VisionKind::LlavaNext,
            tile: 336,
            patch: 14,
            pinpoints: vec![(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)],
            base_fit: BaseFit::Crop,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            width: 1024,
            num_heads: 16,
            mlp_width: 4096,
            num_layers: 24,
            layer_norm_eps: 1e-5,
            feature_layers: vec![23],
            has_newline: true,
            hidden_size: 4096,
            image_token_id: Some(32_000),
        }
    }

    /// LLaVA-1.5's tower.
    pub fn llava_15_7b() -> VisionGeometry {
        let next = llava_next_7b();
        VisionGeometry { kind: VisionKind::Llava15, pinpoints: Vec::new(), has_newline: false, ..next }
    }

    /// The demo model's: tiles of 224 pixels, patches of 16.
    pub fn demo() -> VisionGeometry {
        VisionGeometry {
            tile: 224,
            patch: 16,
            pinpoints: vec![(224, 448), (448, 224), (448, 448), (672, 224), (224, 672)],
            width: 384,
            num_heads: 6,
            mlp_width: 1536,
            num_layers: 10,
            feature_layers: vec![9],
            hidden_size: 576,
            image_token_id: Some(16),
            ..llava_next_7b()
        }
    }
}
