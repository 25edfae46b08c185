//! The specification's sizes, and what holds for all sizes.

use proptest::prelude::*;

use super::*;
use crate::geometry::testing;

fn of(height: u32, width: u32) -> ImageLayout {
    ImageLayout::of(&testing::llava_next_7b(), height, width)
}

#[test]
fn the_vectors_of_the_specification() {
    // (h, w), resolution, resized, unpadded map, tokens
    let vectors = [
        ((336, 336), (336, 672), (336, 336), (24, 24), 1176),
        ((100, 100), (336, 672), (336, 336), (24, 24), 1176),
        ((480, 640), (672, 672), (504, 672), (36, 48), 2340),
        ((640, 480), (672, 672), (672, 504), (48, 36), 2352),
        ((427, 640), (672, 672), (449, 672), (32, 48), 2144),
        ((1080, 1920), (672, 672), (378, 672), (28, 48), 1948),
        ((672, 672), (672, 672), (672, 672), (48, 48), 2928),
        ((1000, 300), (1008, 336), (1008, 303), (72, 22), 2232),
        ((300, 1000), (336, 1008), (303, 1008), (22, 72), 2182),
        ((1344, 336), (1008, 336), (1008, 252), (72, 18), 1944),
    ];
    for ((height, width), resolution, resized, map_size, tokens) in vectors {
        let layout = of(height, width);
        let map = layout.map.unwrap();
        assert_eq!((map.grid.0 * 336, map.grid.1 * 336), resolution, "{height}x{width}");
        assert_eq!((map.fit.resized, map.size), (resized, map_size), "{height}x{width}");
        assert_eq!(layout.tokens(), tokens, "{height}x{width}");
    }
    let demo = |height, width| ImageLayout::of(&testing::demo(), height, width).tokens();
    assert_eq!([demo(448, 448), demo(224, 448), demo(300, 500), demo(620, 210)], [1008, 602, 660, 826]);
    assert_eq!(ImageLayout::of(&testing::llava_15_7b(), 480, 640).tokens(), 576);
    assert_eq!(ImageLayout::of_base(&testing::llava_next_7b(), 480, 640).tokens(), 576);
}

/// candle-transformers 0.11.1 ends the row slice at the map's *width* less the padding: a wide image would
/// lose rows or keep padded ones.
#[test]
fn rows_are_unpadded_by_the_maps_height() {
    let map = of(300, 1000).map.unwrap();
    assert_eq!((map.first, map.size), ((1, 0), (22, 72)), "rows 1 to 23 of 24, not to 71");
    let map = of(1080, 1920).map.unwrap();
    assert_eq!((map.first, map.size), ((10, 0), (28, 48)));
}

/// candle-transformers 0.11.1 caps the effective area by the *grid's*, so that small images go to the largest
/// grid, and reads pinpoints as (width, height).
#[test]
fn small_images_take_the_smallest_grid_and_pinpoints_are_height_first() {
    assert_eq!(of(100, 100).map.unwrap().grid, (1, 2));
    assert_eq!(of(50, 300).map.unwrap().grid, (1, 2), "wide");
    assert_eq!(of(300, 50).map.unwrap().grid, (1, 2), "all of it fits: the first listed");
    assert_eq!(of(600, 200).map.unwrap().grid, (2, 1), "high");
    assert_eq!(of(900, 200).map.unwrap().grid, (3, 1));
}

#[test]
fn rounding_is_pythons() {
    assert_eq!(
        [rounded(23.999_999_96), rounded(23.999_999_94), rounded(24.0), rounded(0.2)],
        [24, 23, 24, 0]
    );
}

#[test]
fn llava_15_cuts_out_the_middle_or_pads() {
    let geometry = testing::llava_15_7b();
    let layout = ImageLayout::of(&geometry, 480, 640);
    assert_eq!(layout.base, Fit { resized: (336, 448), offset: (0, -56) });
    let rect = layout.rect(Place::Base { row: 0, col: 0 }).unwrap();
    assert_eq!((rect.x, rect.y, rect.width, rect.height), (80.0, 0.0, 20.0, 20.0));
    let geometry = VisionGeometry { base_fit: BaseFit::Pad, ..geometry };
    let layout = ImageLayout::of(&geometry, 336, 672);
    assert_eq!(layout.base, Fit { resized: (168, 336), offset: (84, 0) });
    assert_eq!(layout.rect(Place::Base { row: 0, col: 0 }).unwrap().height, 0.0, "padding");
    let rect = layout.rect(Place::Base { row: 6, col: 1 }).unwrap();
    assert_eq!((rect.x, rect.y, rect.width, rect.height), (28.0, 0.0, 28.0, 28.0));
}

#[test]
fn rectangles_lie_where_the_patches_look() {
    let layout = of(672, 672);
    let last = layout.rect(Place::Map { row: 47, col: 47 }).unwrap();
    assert_eq!((last.x, last.y, last.width, last.height), (658.0, 658.0, 14.0, 14.0));
    let base = layout.rect(Place::Base { row: 1, col: 2 }).unwrap();
    assert_eq!((base.x, base.y, base.width, base.height), (56.0, 28.0, 28.0, 28.0));
    assert_eq!(layout.rect(Place::Newline { row: 0 }), None);
}

proptest! {
    /// Counts add up, every token has one place and every place one token, each patch of a tile is named once,
    /// and rectangles lie inside of the image and cover it.
    #[test]
    fn any_size(height in 1u32..5000, width in 1u32..5000, kind in 0usize..4) {
        let geometry = match kind {
            0 => testing::llava_next_7b(),
            1 => testing::demo(),
            2 => testing::llava_15_7b(),
            _ => VisionGeometry { base_fit: BaseFit::Pad, ..testing::llava_15_7b() },
        };
        let layout = ImageLayout::of(&geometry, height, width);
        prop_assert!(layout.tokens() <= geometry.max_tokens());
        prop_assert!(layout.tiles() <= geometry.max_tiles());
        prop_assert_eq!(layout.place(layout.tokens()), None);
        let mut seen = vec![false; layout.tiles() * geometry.patches()];
        let (mut newlines, mut bottom, mut right) = (0, 0f32, 0f32);
        for index in 0..layout.tokens() {
            let place = layout.place(index).unwrap();
            prop_assert_eq!(layout.index(place), Some(index));
            let Some((tile, patch)) = layout.source(place) else { newlines += 1; continue };
            prop_assert_eq!(layout.index_of_source(tile, patch), Some(index));
            prop_assert!(!std::mem::replace(&mut seen[tile * geometry.patches() + patch], true));
            let rect = layout.rect(place).unwrap();
            prop_assert!(rect.x >= 0.0 && rect.y >= 0.0 && rect.width >= 0.0 && rect.height >= 0.0);
            prop_assert!(rect.x + rect.width <= width as f32 * 1.0001);
            prop_assert!(rect.y + rect.height <= height as f32 * 1.0001);
            bottom = bottom.max(rect.y + rect.height);
            right = right.max(rect.x + rect.width);
        }
        prop_assert_eq!(newlines, layout.map.map_or(0, |map| map.size.0));
        if kind != 2 {
            prop_assert!(bottom >= height as f32 * 0.999 && right >= width as f32 * 0.999);
        }
        // Nothing that shows the image is unpadded away: only whole lines of padding are.
        if let Some(map) = layout.map {
            let (rows, cols) = (map.grid.0 * layout.side, map.grid.1 * layout.side);
            prop_assert!(map.size.0 == rows || map.size.1 == cols);
        }
    }
}
