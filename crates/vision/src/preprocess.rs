//! From an image to tiles, and from tiles to the rows that the tower's first product takes.

use crate::{
    ImageLayout, RgbImage, VisionGeometry,
    geometry::{BaseFit, VisionKind},
    layout::MapLayout,
    resize::{Canvas, Window, bicubic},
};

const CHANNELS: usize = 3;

/// The tiles of an image, `[tiles, tile, tile, 3]`, the base first.
pub(crate) fn tiles(geometry: &VisionGeometry, layout: &ImageLayout, image: &RgbImage) -> Vec<u8> {
    let mut tiles = base_tile(geometry, layout, image);
    if let Some(map) = &layout.map {
        tiles.extend(grid_tiles(geometry.tile as usize, map, image));
    }
    tiles
}

fn whole(image: &RgbImage) -> Canvas<'_> {
    let size = (image.height() as usize, image.width() as usize);
    Canvas { pixels: image.pixels(), picture: size, size, offset: (0, 0), fill: [0; CHANNELS] }
}

fn base_tile(geometry: &VisionGeometry, layout: &ImageLayout, image: &RgbImage) -> Vec<u8> {
    let tile = geometry.tile as usize;
    let canvas = whole(image);
    match (geometry.kind, geometry.base_fit) {
        (VisionKind::LlavaNext, _) => bicubic(canvas, Window::all(tile, tile)),
        (VisionKind::Llava15, BaseFit::Crop) => {
            let fit = layout.base;
            let cropped = |offset: i64| usize::try_from(-offset).unwrap_or(0);
            let window = Window {
                whole: (fit.resized.0 as usize, fit.resized.1 as usize),
                offset: (cropped(fit.offset.0), cropped(fit.offset.1)),
                size: (tile, tile),
            };
            bicubic(canvas, window)
        }
        (VisionKind::Llava15, BaseFit::Pad) => {
            let (height, width) = canvas.picture;
            let long = height.max(width);
            let canvas = Canvas {
                size: (long, long),
                offset: ((long - height) / 2, (long - width) / 2),
                // Towards zero, as the original does it.
                fill: geometry.mean.map(|mean| (f64::from(mean) * 255.0) as u8),
                ..canvas
            };
            bicubic(canvas, Window::all(tile, tile))
        }
    }
}

/// The resized image on a black canvas, cut into tiles row by row.
fn grid_tiles(tile: usize, map: &MapLayout, image: &RgbImage) -> Vec<u8> {
    let (height, width) = (map.fit.resized.0 as usize, map.fit.resized.1 as usize);
    let resized = bicubic(whole(image), Window::all(height, width));
    let inside = |offset: i64| usize::try_from(offset).unwrap_or(0);
    let (top, left) = (inside(map.fit.offset.0), inside(map.fit.offset.1));
    let (grid_rows, grid_cols) = (map.grid.0 as usize, map.grid.1 as usize);
    let tile_bytes = tile * tile * CHANNELS;
    let mut tiles = vec![0; grid_rows * grid_cols * tile_bytes];
    for (row, line) in resized.chunks_exact(width * CHANNELS).enumerate() {
        let y = row + top;
        for grid_col in 0..grid_cols {
            let start = (grid_col * tile).max(left);
            let end = ((grid_col + 1) * tile).min(left + width);
            if start >= end {
                continue;
            }
            let at = (y / tile * grid_cols + grid_col) * tile_bytes
                + (y % tile * tile + start - grid_col * tile) * CHANNELS;
            let bytes = (end - start) * CHANNELS;
            tiles[at..][..bytes].copy_from_slice(&line[(start - left) * CHANNELS..][..bytes]);
        }
    }
    tiles
}

/// What each of the 256 values of a channel is for the tower.
///
/// A product in f64 rounded to f32, then a difference and a quotient in f32: the order of roundings is the
/// reference's.
pub(crate) fn normalised_levels(geometry: &VisionGeometry) -> [[f32; 256]; CHANNELS] {
    std::array::from_fn(|channel| {
        std::array::from_fn(|level| {
            let share = (level as f64 * (1.0 / 255.0)) as f32;
            (share - geometry.mean[channel]) / geometry.std[channel]
        })
    })
}

/// `tiles [tiles, tile, tile, 3]` as one row per patch, `[tiles * patches, 3 * patch * patch]`, channel by
/// channel: a convolution whose stride is its width is a product with these rows.
pub(crate) fn patch_rows(geometry: &VisionGeometry, tiles: &[u8]) -> Vec<f32> {
    let levels = normalised_levels(geometry);
    let (tile, patch, side) = (geometry.tile as usize, geometry.patch as usize, geometry.side() as usize);
    let mut rows = Vec::with_capacity(tiles.len());
    for tile_pixels in tiles.chunks_exact(tile * tile * CHANNELS) {
        for at in 0..side * side {
            let (top, left) = (at / side * patch, at % side * patch);
            for (channel, levels) in levels.iter().enumerate() {
                for y in top..top + patch {
                    let line = &tile_pixels[(y * tile + left) * CHANNELS..][..patch * CHANNELS];
                    rows.extend(
                        line.iter().skip(channel).step_by(CHANNELS).map(|&level| levels[usize::from(level)]),
                    );
                }
            }
        }
    }
    rows
}

#[cfg(test)]
#[path = "preprocess_tests.rs"]
mod tests;
