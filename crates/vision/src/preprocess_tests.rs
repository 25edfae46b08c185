//! Tiles against those of transformers' Pillow processors: every byte of them.

use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::{DecodeLimits, decode, geometry::testing};

fn geometry(kind: VisionKind, base_fit: BaseFit) -> VisionGeometry {
    VisionGeometry {
        kind,
        base_fit,
        tile: 24,
        patch: 4,
        pinpoints: vec![(24, 48), (48, 24), (48, 48), (72, 24), (24, 72)],
        ..testing::llava_next_7b()
    }
}

fn fixture() -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llava");
    std::fs::read(folder.join("images.safetensors")).unwrap()
}

#[test]
fn tiles_are_bit_equal() {
    let bytes = fixture();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (kind, geometry) in [
        ("next", geometry(VisionKind::LlavaNext, BaseFit::Crop)),
        ("crop", geometry(VisionKind::Llava15, BaseFit::Crop)),
        ("pad", geometry(VisionKind::Llava15, BaseFit::Pad)),
    ] {
        for name in ["square", "wide", "high", "tiny", "odd", "strip"] {
            let file = tensors.tensor(&format!("{name}.file")).unwrap();
            let image = decode(file.data(), &DecodeLimits::default()).unwrap();
            let layout = ImageLayout::of(&geometry, image.height(), image.width());
            let expected = tensors.tensor(&format!("{name}.{kind}")).unwrap();
            assert_eq!(expected.shape(), [layout.tiles(), 24, 24, 3], "{name}.{kind}");
            let ours = tiles(&geometry, &layout, &image);
            let differing = ours.iter().zip(expected.data()).filter(|(a, b)| a != b).count();
            assert_eq!(differing, 0, "{name}.{kind}: bytes of {}", ours.len());
            compared += 1;
        }
    }
    assert_eq!(compared, 18);
}

/// From levels to the tower's input, bit for bit.
#[test]
fn levels_are_normalised_with_the_references_roundings() {
    let bytes = fixture();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let expected = tensors.tensor("levels").unwrap();
    let expected = expected.data().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    let ours = normalised_levels(&testing::llava_next_7b());
    let ours = ours.iter().flatten().map(|level| level.to_bits());
    assert_eq!(ours.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}

#[test]
fn a_row_is_one_patch_channel_by_channel() {
    let geometry = geometry(VisionKind::Llava15, BaseFit::Crop);
    let tile: Vec<u8> = (0..24 * 24 * 3).map(|i| (i % 251) as u8).collect();
    let rows = patch_rows(&geometry, &tile);
    assert_eq!(rows.len(), tile.len());
    let levels = normalised_levels(&geometry);
    // Patch 7 is row 1, column 1; its channel 2, line 3, column 1 is pixel (7, 5).
    assert_eq!(rows[7 * 48 + 2 * 16 + 3 * 4 + 1], levels[2][usize::from(tile[(7 * 24 + 5) * 3 + 2])]);
}

/// An image that no aspect makes expensive: what would be 6.7 million pixels wide is never made.
#[test]
fn a_very_long_strip_is_cheap() {
    let image = RgbImage::new(20_000, 1, vec![77; 60_000]).unwrap();
    for (geometry, tiles_expected) in [
        (testing::llava_15_7b(), 1),
        (VisionGeometry { base_fit: BaseFit::Pad, ..testing::llava_15_7b() }, 1),
        (testing::llava_next_7b(), 3),
    ] {
        let layout = ImageLayout::of(&geometry, 1, 20_000);
        assert!(layout.tiles() >= tiles_expected);
        let tiles = tiles(&geometry, &layout, &image);
        assert_eq!(tiles.len(), layout.tiles() * 336 * 336 * 3);
    }
}

proptest! {
    /// A picture of one colour stays one, whatever the sizes; a resize to the same size changes nothing.
    #[test]
    fn resizes(
        (height, width) in (1usize..60, 1usize..60), (to_height, to_width) in (1usize..60, 1usize..60),
        color: [u8; 3], seed: u8,
    ) {
        let flat = color.repeat(height * width);
        let canvas = |pixels| Canvas {
            pixels, picture: (height, width), size: (height, width), offset: (0, 0), fill: [0; 3],
        };
        let resized = bicubic(canvas(&flat), Window::all(to_height, to_width));
        prop_assert_eq!(resized, color.repeat(to_height * to_width));
        let noise: Vec<u8> = (0..height * width * 3).map(|i| (i as u8).wrapping_mul(seed)).collect();
        prop_assert_eq!(bicubic(canvas(&noise), Window::all(height, width)), &noise[..]);
        // A window is a part of the whole.
        let whole = bicubic(canvas(&noise), Window::all(to_height, to_width));
        let window = Window { whole: (to_height, to_width), offset: (to_height / 2, to_width / 3), size: (
            to_height - to_height / 2, to_width - to_width / 3,
        ) };
        let part = bicubic(canvas(&noise), window);
        for (row, line) in part.chunks_exact(window.size.1 * 3).enumerate() {
            let start = ((row + window.offset.0) * to_width + window.offset.1) * 3;
            prop_assert_eq!(line, &whole[start..][..line.len()]);
        }
    }
}
