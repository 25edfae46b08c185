//! Where the tokens went: for each image, which parts of it the decoder sees.

use std::sync::Arc;

use locket_vision::{Place, drop::Stage};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use super::{Picture, Seen};

/// What became of the images of a request, shared by all who tell it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct VisualReports(pub(crate) Arc<Vec<VisualReport>>);

impl Serialize for VisualReports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// What became of one image.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct VisualReport {
    /// Path of its reference in the request.
    pub(crate) path: String,
    /// Pixels, upright.
    pub(crate) width: u32,
    /// Pixels, upright.
    pub(crate) height: u32,
    pub(crate) detail: &'static str,
    pub(crate) method: &'static str,
    /// Visual tokens of the image.
    pub(crate) tokens: u32,
    /// Those that went into the decoder.
    pub(crate) kept: u32,
    /// Its visual tokens were kept from an earlier request.
    pub(crate) was_cached: bool,
    /// Newline tokens among those that were kept.
    pub(crate) newlines: u32,
    /// Patches of the whole image, shrunk to one tile.
    pub(crate) base: PatchReport,
    /// Patches of the tiles of its parts; null without such tiles.
    #[schema(required)]
    pub(crate) map: Option<PatchReport>,
    /// Layers of the decoder before which more tokens leave, by the question's attention.
    pub(crate) stages: Vec<StageReport>,
}

/// Patches on a grid.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct PatchReport {
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    /// `[row, column]` of each patch that was kept.
    #[schema(value_type = Vec<Vec<u32>>)]
    pub(crate) kept: Vec<[u32; 2]>,
    /// `[x, y, width, height]` of each of these in pixels of the image.
    #[schema(value_type = Vec<Vec<f32>>)]
    pub(crate) boxes: Vec<[f32; 4]>,
}

/// From this layer on at most so many tokens are left.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct StageReport {
    pub(crate) layer: u32,
    pub(crate) kept: u32,
}

impl PatchReport {
    fn new((rows, columns): (u32, u32)) -> Self {
        Self { rows, columns, kept: Vec::new(), boxes: Vec::new() }
    }

    fn push(&mut self, row: u32, col: u32, seen: &Seen, place: Place) {
        let Some(rect) = seen.layout.rect(place) else { return };
        // A tenth of a pixel is enough to draw.
        let rounded = |length: f32| (length * 10.0).round() / 10.0;
        self.kept.push([row, col]);
        self.boxes.push([rect.x, rect.y, rect.width, rect.height].map(rounded));
    }
}

impl VisualReport {
    fn new(picture: &Picture, seen: &Seen, was_cached: bool) -> Self {
        let (layout, plan) = (&seen.layout, &seen.plan);
        let mut base = PatchReport::new((layout.side, layout.side));
        let mut map = layout.map.map(|map| PatchReport::new(map.size));
        let mut newlines = 0;
        for index in &plan.kept {
            match layout.place(*index as usize) {
                Some(place @ Place::Base { row, col }) => base.push(row, col, seen, place),
                Some(place @ Place::Map { row, col }) => {
                    if let Some(map) = &mut map {
                        map.push(row, col, seen, place);
                    }
                }
                Some(Place::Newline { .. }) => newlines += 1,
                None => {}
            }
        }
        let stage = |stage: Stage| StageReport { layer: stage.layer, kept: stage.keep };
        Self {
            path: picture.path.clone(),
            width: layout.width,
            height: layout.height,
            detail: picture.detail.name(),
            method: seen.method.name(),
            tokens: plan.run,
            kept: plan.kept.len() as u32,
            was_cached,
            newlines,
            base,
            map,
            stages: plan.stages().into_iter().map(stage).collect(),
        }
    }
}

/// One report for each image.
pub(crate) fn reports<'a>(
    images: impl IntoIterator<Item = (&'a Picture, &'a Seen, bool)>,
) -> Vec<VisualReport> {
    let images = images.into_iter();
    images.map(|(picture, seen, was_cached)| VisualReport::new(picture, seen, was_cached)).collect()
}
