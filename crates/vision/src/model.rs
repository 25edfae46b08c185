//! A vision model: pixels in, packed visual tokens out.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{Device, Tensor};
use locket_model::weights::TensorFiles;

use crate::{
    Error, ImageLayout, Place, RgbImage, VisionGeometry,
    geometry::BaseFit,
    open, preprocess,
    tower::{self, TowerOutput},
    weights::{self, Weights},
};

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
    pub device: Device,
    /// CPU threads that one encoding may use; at least 1.
    pub threads: usize,
    /// How LLaVA-1.5 makes its tile; `None`: as the files say.
    pub base_fit: Option<BaseFit>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, threads: 1, base_fit: None }
    }
}

/// Tower, projector and newline of a LLaVA model. One image is encoded at a time; others wait, so that memory
/// does not grow with the number of callers.
pub struct VisionModel {
    geometry: VisionGeometry,
    weights: Weights,
    device: Device,
    fingerprint: String,
    /// Bounds the threads of candle's operations, which run in the pool that calls them.
    pool: rayon::ThreadPool,
    turn: Mutex<()>,
}

impl std::fmt::Debug for VisionModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VisionModel").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl VisionModel {
    /// Opens the vision part of a Hugging Face folder (or the original repository's), or a safetensors file with
    /// a vision model of its own, whose metadata has the texts `config` (as `config.json`) and, if need be,
    /// `preprocessor_config`.
    ///
    /// # Errors
    /// [`Error::NoVision`] if there is none, else what is wrong with it.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let opened = open::open(path, options.base_fit)?;
        Self::load(&opened.files, opened.geometry, options)
    }

    fn load(files: &TensorFiles, geometry: VisionGeometry, options: &OpenOptions) -> Result<Self, Error> {
        let parts = weights::Parts::find(files);
        let parts = parts.map_err(|reason| crate::geometry::invalid("tensors", reason))?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads.max(1))
            .thread_name(|index| format!("vision-{index}"))
            .build()
            .map_err(|error| Error::Device(error.to_string()))?;
        Ok(Self {
            weights: parts.load(&geometry, &options.device)?,
            geometry,
            device: options.device.clone(),
            fingerprint: files.fingerprint().to_owned(),
            pool,
            turn: Mutex::new(()),
        })
    }

    /// Whether the visual tokens fit a decoder of this width.
    ///
    /// # Errors
    /// [`Error::Config`] with both widths.
    pub fn check_decoder(&self, hidden_size: usize) -> Result<(), Error> {
        weights::check_width(&self.geometry, hidden_size)
    }

    /// Everything but the weights.
    pub fn geometry(&self) -> &VisionGeometry {
        &self.geometry
    }

    /// Names the weights: part of the keys under which encoded images are kept.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Bytes of weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Bytes that one encoding takes at most beside the image and its result: an estimate for the memory plan.
    pub fn workspace_bytes(&self) -> u64 {
        let geometry = &self.geometry;
        let (tiles, tokens) = (geometry.max_tiles() as u64, geometry.patches() as u64 + 1);
        let pixels = 3 * u64::from(geometry.tile).pow(2);
        // Logits and shares of attention, or the MLP before and behind its activation, beside the stream.
        let attention = 2 * geometry.num_heads as u64 * tokens * tokens;
        let mlp = 3 * tokens * geometry.mlp_width as u64;
        let stream = tokens * (8 * geometry.width + 3 * geometry.hidden_size) as u64;
        4 * tiles * (2 * pixels + attention.max(mlp) + stream)
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
        // Nothing is left half-done by a panic of another caller.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.pool.install(|| self.encode_now(image, wants))
    }

    fn encode_now(&self, image: &RgbImage, wants: Wants<'_>) -> Result<EncodedImage, Error> {
        let geometry = &self.geometry;
        let of = if wants.base_only { ImageLayout::of_base } else { ImageLayout::of };
        let layout = of(geometry, image.height(), image.width());
        let pixels = preprocess::tiles(geometry, &layout, image);
        let rows = preprocess::patch_rows(geometry, &pixels);
        drop(pixels);
        let (patches, inputs) = (geometry.patches(), 3 * (geometry.patch as usize).pow(2));
        let rows = Tensor::from_vec(rows, (layout.tiles() * patches, inputs), &self.device)?;
        let output = tower::forward(geometry, &self.weights, &rows, wants.cls_attention, wants.merge)?;
        drop(rows);
        self.pack(layout, &output, wants)
    }

    fn pack(
        &self,
        layout: ImageLayout,
        output: &TowerOutput,
        wants: Wants<'_>,
    ) -> Result<EncodedImage, Error> {
        let (tiles, kept, width) = output.features.dims3()?;
        let features = output.features.reshape((tiles * kept, width))?;
        let projected: Vec<f32> = tower::project(&self.weights, &features)?.flatten_all()?.to_vec1()?;
        let rows = RowsOfPatches::new(output.kept.as_deref(), tiles, self.geometry.patches());
        let (packed, present) = self.packed_run(&layout, &projected, &rows);
        let (cls_initial, cls_final) = output.cls.clone().unwrap_or_default();
        let patch_features = if wants.patch_features {
            rows.spread(&features.flatten_all()?.to_vec1()?, width)
        } else {
            Vec::new()
        };
        Ok(EncodedImage {
            layout,
            hidden_size: self.geometry.hidden_size,
            features: packed.into(),
            present: output.kept.is_some().then_some(present),
            cls_initial,
            cls_final: rows.spread(&cls_final, 1),
            patch_features,
        })
    }

    /// The run `[tokens, hidden_size]`, and the tokens that have a feature.
    fn packed_run(
        &self,
        layout: &ImageLayout,
        projected: &[f32],
        rows: &RowsOfPatches,
    ) -> (Vec<f32>, Vec<u32>) {
        let hidden = self.geometry.hidden_size;
        let mut packed = vec![0.0; layout.tokens() * hidden];
        let mut present = Vec::with_capacity(layout.tokens());
        for (token, out) in packed.chunks_exact_mut(hidden).enumerate() {
            let feature = match layout.place(token) {
                Some(Place::Newline { .. }) => self.weights.newline.get(..hidden),
                Some(place) => layout
                    .source(place)
                    .and_then(|(tile, patch)| rows.of(tile, patch))
                    .and_then(|row| projected.get(row * hidden..(row + 1) * hidden)),
                None => None,
            };
            if let Some(feature) = feature {
                out.copy_from_slice(feature);
                present.push(token as u32);
            }
        }
        (packed, present)
    }
}

/// In which row of the tower's output a patch is.
struct RowsOfPatches {
    /// `[tiles, patches]`
    rows: Vec<Option<usize>>,
    patches: usize,
    is_whole: bool,
}

impl RowsOfPatches {
    fn new(kept: Option<&[Vec<u32>]>, tiles: usize, patches: usize) -> Self {
        let Some(kept) = kept else {
            return Self { rows: (0..tiles * patches).map(Some).collect(), patches, is_whole: true };
        };
        let mut rows = vec![None; tiles * patches];
        let places = kept.iter().enumerate();
        let places = places.flat_map(|(tile, kept)| kept.iter().map(move |&patch| (tile, patch as usize)));
        for (row, (tile, patch)) in places.enumerate() {
            rows[tile * patches + patch] = Some(row);
        }
        Self { rows, patches, is_whole: false }
    }

    fn of(&self, tile: usize, patch: usize) -> Option<usize> {
        self.rows.get(tile * self.patches + patch).copied().flatten()
    }

    /// `numbers [kept rows, width]` as `[tiles, patches, width]`, zeros where patches were merged away.
    fn spread(&self, numbers: &[f32], width: usize) -> Vec<f32> {
        if self.is_whole || numbers.is_empty() {
            return numbers.to_vec();
        }
        let zeros = vec![0.0; width];
        let number = |row: Option<usize>| row.and_then(|row| numbers.get(row * width..(row + 1) * width));
        self.rows.iter().flat_map(|&row| number(row).unwrap_or(&zeros)).copied().collect()
    }
}
