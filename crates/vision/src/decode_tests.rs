//! Files of many kinds against Pillow's pixels, and files that are not what they say.

use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;

fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llava");
    std::fs::read(folder.join(name)).unwrap()
}

/// Calls `visit` with name, file, expected size (height, width) and pixels of every kind.
fn for_each_kind(mut visit: impl FnMut(&str, &[u8], (u32, u32), &[u8])) {
    let bytes = fixture("formats.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for name in tensors.names() {
        let Some(kind) = name.strip_suffix(".file") else { continue };
        let pixels = tensors.tensor(&format!("{kind}.rgb")).unwrap();
        let [height, width, 3] = pixels.shape() else { panic!("shape of {kind}") };
        let file = tensors.tensor(name).unwrap();
        visit(kind, file.data(), (*height as u32, *width as u32), pixels.data());
    }
}

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn every_kind_has_pillows_pixels_and_is_upright() {
    let limits = DecodeLimits::default();
    for_each_kind(|kind, file, size, pixels| {
        let image = decode(file, &limits).unwrap_or_else(|error| panic!("{kind} {error}"));
        assert_eq!((image.height(), image.width()), size, "{kind}");
        assert_eq!(upright_size(file, &limits), Ok(size), "{kind}");
        let differences = image.pixels().iter().zip(pixels).map(|(&ours, &theirs)| ours.abs_diff(theirs));
        let (most, sum) = differences.fold((0, 0u32), |(most, sum), d| (most.max(d), sum + u32::from(d)));
        let mean = f64::from(sum) / pixels.len() as f64;
        // Lossy decoders may round, and widen chroma, in their own way.
        let (max_most, max_mean) = match kind {
            "plain.jpeg" => (60, 8.0),
            "cmyk.jpeg" => (8, 3.0),
            _ if kind.ends_with(".jpeg") => (4, 1.0),
            "lossy.webp" => (40, 4.0),
            _ => (0, 0.0),
        };
        assert!(most <= max_most && mean <= max_mean, "{kind}: at most {most}, mean {mean:.2}");
    });
}

#[test]
fn a_16_bit_channel_loses_its_lower_byte() {
    let levels: Vec<u16> = (0..12).map(|i| i * 5461).collect();
    let grey = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(4, 3, levels.clone()).unwrap();
    let image = decode(&encode(&grey.into(), ImageFormat::Png), &DecodeLimits::default()).unwrap();
    let high: Vec<u8> = levels.iter().flat_map(|level| [(level >> 8) as u8; 3]).collect();
    assert_eq!(image.pixels(), high);
    let color = image::ImageBuffer::<image::Rgb<u16>, _>::from_raw(2, 2, levels).unwrap();
    let image = decode(&encode(&color.into(), ImageFormat::Png), &DecodeLimits::default()).unwrap();
    assert_eq!(image.pixels()[..6], [0, 21, 42, 63, 85, 106]);
    let clear = vec![0xffff, 0x1234, 0, 0, 0, 0, 0, 0xffff];
    let clear = image::ImageBuffer::<image::Rgba<u16>, _>::from_raw(2, 1, clear).unwrap();
    let image = decode(&encode(&clear.into(), ImageFormat::Png), &DecodeLimits::default()).unwrap();
    assert_eq!(image.pixels(), [255, 255, 255, 0, 0, 0]);
}

#[test]
fn no_bytes_other_bytes_and_one_pixel() {
    let limits = DecodeLimits::default();
    assert_eq!(decode(b"", &limits), Err(ImageError::Empty));
    for bytes in [b"\0".as_slice(), b"hello, this is text", b"<svg></svg>", b"%PDF-1.4"] {
        assert_eq!(decode(bytes, &limits), Err(ImageError::UnknownType));
    }
    let dot = DynamicImage::ImageRgb8(image::RgbImage::from_pixel(1, 1, image::Rgb([1, 2, 3])));
    assert_eq!(decode(&encode(&dot, ImageFormat::Png), &limits).unwrap().pixels(), [1, 2, 3]);
}

#[test]
fn bombs_are_refused_by_their_header() {
    let limits = DecodeLimits::default();
    let png = |width: u32, height: u32| {
        let mut bytes = encode(&DynamicImage::new_rgb8(2, 2), ImageFormat::Png);
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        bytes
    };
    let kind = |bytes: &[u8], limits: &DecodeLimits| decode(bytes, limits).map_err(|error| error.kind());
    assert_eq!(kind(&png(30_000, 30_000), &limits), Err("too_many_pixels"));
    // Here the decoder itself refuses first.
    assert_eq!(kind(&png(i32::MAX as u32, i32::MAX as u32), &limits), Err("too_much_memory"));
    assert_eq!(kind(&png(20_000, 1), &limits), Err("too_narrow"));
    assert_eq!(kind(&png(1, 20_000), &limits), Err("too_narrow"));
    assert_eq!(kind(&png(0, 5), &limits), Err("broken"));
    // More than the file holds: an error of the decoder, not pixels out of nothing.
    assert_eq!(kind(&png(6000, 6000), &limits), Err("broken"));
    assert_eq!(
        kind(&png(6000, 6000), &DecodeLimits { max_bytes: 1 << 20, ..limits }),
        Err("too_much_memory")
    );
    let error = decode(&png(20_000, 1), &limits).unwrap_err().to_string();
    assert_eq!(error, "has 20000 x 1 pixels; the longer side may be at most 200 times the shorter");
    let mut gif = encode(&DynamicImage::new_rgb8(2, 2), ImageFormat::Gif);
    gif[6..10].fill(0xff);
    assert_eq!(kind(&gif, &limits), Err("too_many_pixels"));
    let mut bmp = encode(&DynamicImage::new_rgb8(2, 2), ImageFormat::Bmp);
    bmp[18..22].copy_from_slice(&30_000u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&30_000u32.to_le_bytes());
    assert_eq!(kind(&bmp, &limits), Err("too_many_pixels"));
}

/// The checksum of a PNG chunk.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn truncated_files_are_broken_wherever_they_end() {
    let limits = DecodeLimits::default();
    for_each_kind(|kind, file, _, _| {
        // The last bytes may be an end marker that no pixel depends on.
        for end in (1..file.len() * 9 / 10).step_by(7) {
            // The second frame of an animation may be cut off.
            if kind.starts_with("animated") && end > file.len() / 3 {
                continue;
            }
            let result = decode(&file[..end], &limits);
            assert!(result.is_err(), "{kind} cut at {end} of {}", file.len());
        }
    });
}

#[test]
fn hostile_exif_costs_nothing_but_the_orientation() {
    let limits = DecodeLimits::default();
    let image = image::RgbImage::from_fn(8, 4, |x, y| image::Rgb([(x * 30) as u8, (y * 60) as u8, 0]));
    let plain = encode(&DynamicImage::ImageRgb8(image), ImageFormat::Jpeg);
    let with_exif = |exif: &[u8]| {
        let length = (exif.len() as u16 + 8).to_be_bytes();
        [&plain[..2], &[0xff, 0xe1], &length, b"Exif\0\0", exif, &plain[2..]].concat()
    };
    let entry = |tag: u16, kind: u16, count: u32, value: u32| {
        [&tag.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let header = b"II*\0\x08\0\0\0";
    let turned = [header.as_slice(), &[1, 0], &entry(0x0112, 3, 1, 6), &[0; 4]].concat();
    let sound = decode(&with_exif(&turned), &limits).unwrap();
    assert_eq!((sound.width(), sound.height()), (4, 8));
    let hostile: Vec<Vec<u8>> = vec![
        vec![],
        b"II*\0".to_vec(),
        b"II*\0\xff\xff\xff\xff".to_vec(),
        [header.as_slice(), &[0xff, 0xff]].concat(),
        [header.as_slice(), &[1, 0], &entry(0x0112, 3, u32::MAX, u32::MAX), &[0; 4]].concat(),
        [header.as_slice(), &[1, 0], &entry(0x0112, 3, 1, 77), &[0; 4]].concat(),
        // A directory whose next one is itself.
        [header.as_slice(), &[1, 0], &entry(0x8769, 4, 1, 8), &8u32.to_le_bytes()].concat(),
        vec![0xff; 60_000],
    ];
    for exif in hostile {
        let decoded = decode(&with_exif(&exif), &limits).unwrap();
        assert_eq!((decoded.width(), decoded.height()), (8, 4));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Damage anywhere gives pixels or an error, and never more pixels than allowed.
    #[test]
    fn damaged_files(kind in 0usize..64, damage in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..6)) {
        let limits = DecodeLimits { max_pixels: 100_000, max_bytes: 4 << 20, max_ratio: 200 };
        let mut files = Vec::new();
        for_each_kind(|_, file, _, _| files.push(file.to_vec()));
        let mut file = files.swap_remove(kind % files.len());
        for (at, byte) in damage {
            let at = at as usize % file.len();
            file[at] = byte;
        }
        if let Ok(image) = decode(&file, &limits) {
            prop_assert!(u64::from(image.width()) * u64::from(image.height()) <= limits.max_pixels);
        }
    }

    /// Neither do bytes of any kind behind a signature.
    #[test]
    fn any_bytes(kind in 0usize..5, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let signatures: [&[u8]; 5] =
            [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x20\0\0\0WEBP", b"GIF89a", b"BM"];
        let file = [signatures[kind], &bytes].concat();
        let limits = DecodeLimits { max_pixels: 100_000, max_bytes: 4 << 20, max_ratio: 200 };
        let _ = decode(&file, &limits);
        let _ = upright_size(&file, &limits);
    }
}
