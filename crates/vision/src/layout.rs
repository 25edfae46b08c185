//! Which visual tokens an image becomes, from its height and width alone.
//!
//! The order is the one of LLaVA-NeXT's "spatial unpad" packing: the patches of the whole image squashed into
//! one tile ("base"), then the map of the tiles' patches without the rows or columns that show padding, each of
//! its rows ended by a newline token. LLaVA-1.5 has the base alone.

use crate::geometry::{BaseFit, VisionGeometry, VisionKind};

/// A rectangle in pixels of the image as it was decoded (upright), its corners clipped to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rect {
    /// Left edge.
    pub x: f32,
    /// Upper edge.
    pub y: f32,
    /// May be 0 where a patch shows padding only.
    pub width: f32,
    /// May be 0 where a patch shows padding only.
    pub height: f32,
}

/// What a visual token shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A patch of the whole image.
    Base {
        /// Row of patches in the tile.
        row: u32,
        /// Column of patches in the tile.
        col: u32,
    },
    /// A patch of a tile, by its place in the unpadded map.
    Map {
        /// Row in the unpadded map.
        row: u32,
        /// Column in the unpadded map.
        col: u32,
    },
    /// The end of a row of the unpadded map.
    Newline {
        /// Row in the unpadded map.
        row: u32,
    },
}

/// How pixels of the image became pixels of a canvas: resized, then moved by whole pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// `(height, width)` that the image is resized to.
    pub resized: (u32, u32),
    /// `(top, left)`: where the resized image's first pixel lies on the canvas; negative where it is cropped.
    pub offset: (i64, i64),
}

/// The grid of tiles and the map of their patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapLayout {
    /// `(rows, columns)` of tiles.
    pub grid: (u32, u32),
    /// The image on the canvas of all tiles.
    pub fit: Fit,
    /// `(row, column)` of the padded map that is the first one kept.
    pub first: (u32, u32),
    /// `(rows, columns)` of the unpadded map.
    pub size: (u32, u32),
    /// Whether each of its rows ends in a newline token.
    pub has_newlines: bool,
}

/// The visual tokens of an image: a pure function of its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayout {
    /// Pixels of the image.
    pub height: u32,
    /// Pixels of the image.
    pub width: u32,
    /// Pixels of a patch's side.
    pub patch: u32,
    /// Patches along a tile's side.
    pub side: u32,
    /// The image on the first tile.
    pub base: Fit,
    /// The other tiles; absent for LLaVA-1.5 and where only the base was asked for.
    pub map: Option<MapLayout>,
}

impl ImageLayout {
    /// The layout of an image of `height` by `width` pixels, both at least 1.
    pub fn of(geometry: &VisionGeometry, height: u32, width: u32) -> Self {
        let layout = Self::of_base(geometry, height, width);
        if geometry.kind == VisionKind::Llava15 {
            return layout;
        }
        let size = (layout.height, layout.width);
        let resolution = best_resolution(size, &geometry.pinpoints);
        let resized = fit_into(size, resolution);
        let side = geometry.side();
        let grid = (resolution.0 / geometry.tile, resolution.1 / geometry.tile);
        let (first, unpadded) = unpad((grid.0 * side, grid.1 * side), size);
        let offset = (i64::from((resolution.0 - resized.0) / 2), i64::from((resolution.1 - resized.1) / 2));
        let fit = Fit { resized, offset };
        let has_newlines = geometry.has_newline;
        Self { map: Some(MapLayout { grid, fit, first, size: unpadded, has_newlines }), ..layout }
    }

    /// The layout without the tiles of the image's parts: the whole image in one tile.
    pub fn of_base(geometry: &VisionGeometry, height: u32, width: u32) -> Self {
        let (height, width) = (height.max(1), width.max(1));
        let tile = geometry.tile;
        let base = match (geometry.kind, geometry.base_fit) {
            (VisionKind::LlavaNext, _) => Fit { resized: (tile, tile), offset: (0, 0) },
            (VisionKind::Llava15, BaseFit::Crop) => shortest_edge(height, width, tile),
            (VisionKind::Llava15, BaseFit::Pad) => padded_square(height, width, tile),
        };
        Self { height, width, patch: geometry.patch, side: geometry.side(), base, map: None }
    }

    /// Visual tokens of the image: rows of the packed run.
    pub fn tokens(&self) -> usize {
        let of_map = |map: &MapLayout| {
            let (rows, cols) = map.size;
            rows as usize * (cols as usize + usize::from(map.has_newlines))
        };
        self.base_tokens() + self.map.as_ref().map_or(0, of_map)
    }

    /// Tokens of the base: the first of the packed run.
    pub fn base_tokens(&self) -> usize {
        (self.side as usize).pow(2)
    }

    /// Tiles that the tower sees, the base included; it is the first, the others follow row by row.
    pub fn tiles(&self) -> usize {
        1 + self.map.map_or(0, |map| map.grid.0 as usize * map.grid.1 as usize)
    }

    /// What the token at `index` of the packed run shows; `None` behind its end.
    pub fn place(&self, index: usize) -> Option<Place> {
        let side = self.side as usize;
        let Some(index) = index.checked_sub(self.base_tokens()) else {
            return Some(Place::Base { row: (index / side) as u32, col: (index % side) as u32 });
        };
        let map = self.map?;
        let (rows, cols) = (map.size.0 as usize, map.size.1 as usize);
        let stride = cols + usize::from(map.has_newlines);
        if stride == 0 || index / stride >= rows {
            return None;
        }
        let (row, col) = ((index / stride) as u32, index % stride);
        Some(if col == cols { Place::Newline { row } } else { Place::Map { row, col: col as u32 } })
    }

    /// The index of `place` in the packed run; `None` if the layout has no such place.
    pub fn index(&self, place: Place) -> Option<usize> {
        if let Place::Base { row, col } = place {
            let is_inside = row < self.side && col < self.side;
            return is_inside.then_some(row as usize * self.side as usize + col as usize);
        }
        let map = self.map?;
        let stride = map.size.1 as usize + usize::from(map.has_newlines);
        let (row, col) = match place {
            Place::Map { row, col } if col < map.size.1 => (row, col as usize),
            Place::Newline { row } if map.has_newlines => (row, map.size.1 as usize),
            _ => return None,
        };
        (row < map.size.0).then_some(self.base_tokens() + row as usize * stride + col)
    }

    /// Where the tower computes a place: `(tile, patch)`, the tile as [`Self::tiles`] counts them and the patch
    /// row by row; `None` for newlines.
    pub fn source(&self, place: Place) -> Option<(usize, usize)> {
        let side = self.side;
        match place {
            Place::Base { row, col } => Some((0, (row * side + col) as usize)),
            Place::Map { row, col } => {
                let map = self.map?;
                let (row, col) = (row + map.first.0, col + map.first.1);
                let tile = 1 + row / side * map.grid.1 + col / side;
                Some((tile as usize, (row % side * side + col % side) as usize))
            }
            Place::Newline { .. } => None,
        }
    }

    /// The token of a tile's patch; `None` if it was unpadded away or does not exist.
    pub fn index_of_source(&self, tile: usize, patch: usize) -> Option<usize> {
        let side = self.side as usize;
        if patch >= side * side {
            return None;
        }
        let Some(tile) = tile.checked_sub(1) else { return Some(patch) };
        let map = self.map?;
        let (grid_rows, grid_cols) = (map.grid.0 as usize, map.grid.1 as usize);
        if tile >= grid_rows * grid_cols {
            return None;
        }
        let row = (tile / grid_cols * side + patch / side).checked_sub(map.first.0 as usize)?;
        let col = (tile % grid_cols * side + patch % side).checked_sub(map.first.1 as usize)?;
        self.index(Place::Map { row: u32::try_from(row).ok()?, col: u32::try_from(col).ok()? })
    }

    /// The part of the image that a place shows; `None` for newlines.
    pub fn rect(&self, place: Place) -> Option<Rect> {
        let (fit, row, col) = match place {
            Place::Base { row, col } => (self.base, row, col),
            Place::Map { row, col } => {
                let map = self.map?;
                (map.fit, row + map.first.0, col + map.first.1)
            }
            Place::Newline { .. } => return None,
        };
        let span = |at: u32, offset: i64, resized: u32, side: u32| {
            let scale = f64::from(side) / f64::from(resized);
            let edge = |at: u32| {
                let on_resized = (i64::from(at) * i64::from(self.patch) - offset) as f64;
                (on_resized * scale).clamp(0.0, f64::from(side))
            };
            (edge(at) as f32, (edge(at + 1) - edge(at)) as f32)
        };
        let (y, height) = span(row, fit.offset.0, fit.resized.0, self.height);
        let (x, width) = span(col, fit.offset.1, fit.resized.1, self.width);
        Some(Rect { x, y, width, height })
    }
}

/// The resolution in which most of the image's own pixels survive, of equal ones the smallest, of these the
/// first. Sizes are `(height, width)`.
fn best_resolution(size: (u32, u32), pinpoints: &[(u32, u32)]) -> (u32, u32) {
    let (height, width) = (f64::from(size.0), f64::from(size.1));
    let own = u64::from(size.0) * u64::from(size.1);
    let mut best = ((u64::MAX, 0), (0, 0));
    let mut is_first = true;
    for &(grid_height, grid_width) in pinpoints {
        let scale = (f64::from(grid_width) / width).min(f64::from(grid_height) / height);
        // Towards zero, as Python's int.
        let effective = ((width * scale) as u64 * ((height * scale) as u64)).min(own);
        let waste = u64::from(grid_height) * u64::from(grid_width) - effective;
        let is_better = effective > best.0.1 || (effective == best.0.1 && waste < best.0.0);
        if is_first || is_better {
            best = ((waste, effective), (grid_height, grid_width));
            is_first = false;
        }
    }
    best.1
}

/// The size of the image when it fills `target` in one direction and keeps its aspect.
fn fit_into(size: (u32, u32), target: (u32, u32)) -> (u32, u32) {
    let (scale_height, scale_width) =
        (f64::from(target.0) / f64::from(size.0), f64::from(target.1) / f64::from(size.1));
    if scale_width < scale_height {
        (((f64::from(size.0) * scale_width).ceil() as u32).clamp(1, target.0), target.1)
    } else {
        (target.0, ((f64::from(size.1) * scale_height).ceil() as u32).clamp(1, target.1))
    }
}

/// First row and column, and size, of what is left of a map `current` when padding is cut away by the aspect of
/// `original`. An odd gap keeps one padded line.
fn unpad(current: (u32, u32), original: (u32, u32)) -> ((u32, u32), (u32, u32)) {
    let (height, width) = (f64::from(original.0), f64::from(original.1));
    let (rows, cols) = (f64::from(current.0), f64::from(current.1));
    if width / height > cols / rows {
        let kept = rounded(height * (cols / width)).min(current.0);
        let padding = (current.0 - kept) / 2;
        ((padding, 0), (current.0 - 2 * padding, current.1))
    } else {
        let kept = rounded(width * (rows / height)).min(current.1);
        let padding = (current.1 - kept) / 2;
        ((0, padding), (current.0, current.1 - 2 * padding))
    }
}

/// Rounds to seven decimals, half to even by the number's exact value as Python does, then towards zero.
fn rounded(value: f64) -> u32 {
    let text = format!("{value:.7}");
    text.split('.').next().and_then(|whole| whole.parse().ok()).unwrap_or(0)
}

fn shortest_edge(height: u32, width: u32, tile: u32) -> Fit {
    let long = |long: u32, short: u32| (u64::from(tile) * u64::from(long) / u64::from(short)) as u32;
    let resized = if height <= width { (tile, long(width, height)) } else { (long(height, width), tile) };
    let offset = |side: u32| -i64::from((side - tile) / 2);
    Fit { resized, offset: (offset(resized.0), offset(resized.1)) }
}

/// The image inside a square that is then resized to the tile: the size is the image's share of it.
fn padded_square(height: u32, width: u32, tile: u32) -> Fit {
    let long = height.max(width);
    let share = |side: u32| ((u64::from(tile) * u64::from(side)).div_ceil(u64::from(long)) as u32).max(1);
    let offset = |side: u32| (i64::from((long - side) / 2) * i64::from(tile)) / i64::from(long);
    Fit { resized: (share(height), share(width)), offset: (offset(height), offset(width)) }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
