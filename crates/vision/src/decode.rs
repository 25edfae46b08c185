//! From the bytes of a file to upright pixels without transparency, within limits.
//!
//! Colours are those that Pillow gives: 16-bit channels lose their lower byte, transparent pixels lie on
//! white (transformers' `convert_to_rgb`), and the first frame stands for an animation. JPEG files may differ
//! by a few levels, because decoders are free to round.

use std::{io::Cursor, panic::AssertUnwindSafe};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, metadata::Orientation};

use crate::ImageError;

/// What a file may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most pixels, by the header, before anything is decoded.
    pub max_pixels: u64,
    /// Most bytes that decoded pixels, and each buffer of the decoder, may have.
    pub max_bytes: u64,
    /// How many times the longer side may be as long as the shorter.
    pub max_ratio: u32,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_pixels: 40_000_000, max_bytes: 512 << 20, max_ratio: 200 }
    }
}

impl DecodeLimits {
    /// Whether an image of this size may be decoded at all.
    ///
    /// # Errors
    /// [`ImageError::TooManyPixels`], [`ImageError::TooNarrow`].
    pub fn check(&self, width: u32, height: u32) -> Result<(), ImageError> {
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(ImageError::TooManyPixels { width, height, max_pixels: self.max_pixels });
        }
        let (short, long) = (width.min(height), width.max(height));
        if u64::from(long) > u64::from(short) * u64::from(self.max_ratio) {
            return Err(ImageError::TooNarrow { width, height, max_ratio: self.max_ratio });
        }
        Ok(())
    }
}

/// Pixels of an image, upright, without transparency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl RgbImage {
    /// From `pixels [height, width, 3]`; `None` if there are not as many, or none.
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Option<Self> {
        let numbers = u64::from(width) * u64::from(height) * 3;
        (numbers > 0 && numbers == pixels.len() as u64).then_some(Self { width, height, pixels })
    }

    /// Pixels of a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}

/// Decodes a PNG, JPEG, WebP, GIF (its first frame) or BMP file.
///
/// # Errors
/// See [`ImageError`]; never a panic, and never more memory than a small multiple of what `limits` allow.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let (format, name) = format_of(bytes)?;
    // The decoders are other people's and meet bytes of strangers: a bug in one costs its image only.
    let decoded = std::panic::catch_unwind(AssertUnwindSafe(|| decode_as(bytes, format, name, limits)));
    decoded.unwrap_or_else(|_| Err(broken(name, "the decoder failed")))
}

/// Pixels that the file becomes when it is upright, `(height, width)`, by its header: decides how many visual
/// tokens the image costs before it is decoded.
///
/// # Errors
/// As [`decode`].
pub fn upright_size(bytes: &[u8], limits: &DecodeLimits) -> Result<(u32, u32), ImageError> {
    let (format, name) = format_of(bytes)?;
    let size = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut decoder = decoder(bytes, format, name, limits)?;
        let (width, height) = decoder.dimensions();
        Ok(if is_turned(orientation(&mut decoder)) { (width, height) } else { (height, width) })
    }));
    size.unwrap_or_else(|_| Err(broken(name, "the decoder failed")))
}

fn format_of(bytes: &[u8]) -> Result<(ImageFormat, &'static str), ImageError> {
    match bytes {
        [] => Err(ImageError::Empty),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Ok((ImageFormat::Png, "PNG")),
        [0xff, 0xd8, 0xff, ..] => Ok((ImageFormat::Jpeg, "JPEG")),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok((ImageFormat::WebP, "WebP")),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok((ImageFormat::Gif, "GIF")),
        [b'B', b'M', ..] => Ok((ImageFormat::Bmp, "BMP")),
        _ => Err(ImageError::UnknownType),
    }
}

/// A decoder that has read the header, its size checked.
fn decoder<'a>(
    bytes: &'a [u8],
    format: ImageFormat,
    name: &'static str,
    limits: &DecodeLimits,
) -> Result<impl ImageDecoder + 'a, ImageError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut library = image::Limits::no_limits();
    library.max_alloc = Some(limits.max_bytes);
    reader.limits(library);
    let decoder = reader.into_decoder().map_err(|error| failed(name, &error, limits))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(broken(name, "it has no pixels"));
    }
    limits.check(width, height)?;
    if decoder.total_bytes() > limits.max_bytes {
        return Err(ImageError::TooMuchMemory { max_bytes: limits.max_bytes });
    }
    Ok(decoder)
}

/// Upright unless the file says otherwise in a way that can be read: what is wrong with EXIF data is no reason
/// to refuse the pixels.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

fn is_turned(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

fn decode_as(
    bytes: &[u8],
    format: ImageFormat,
    name: &'static str,
    limits: &DecodeLimits,
) -> Result<RgbImage, ImageError> {
    let mut decoder = decoder(bytes, format, name, limits)?;
    if format == ImageFormat::Jpeg && !jpeg_has_an_end(bytes) {
        return Err(broken(name, "it ends before its end marker"));
    }
    let orientation = orientation(&mut decoder);
    let image = DynamicImage::from_decoder(decoder).map_err(|error| failed(name, &error, limits))?;
    let mut image = DynamicImage::ImageRgb8(opaque(image));
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    let (width, height) = image.dimensions();
    RgbImage::new(width, height, image.into_raw()).ok_or_else(|| broken(name, "it has no pixels"))
}

/// Whether the end marker follows the first scan. The decoder fills what is missing with grey, which no one
/// wants described. Inside of a scan every byte `ff` is marked as data, so a marker is one.
fn jpeg_has_an_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        match marker {
            0xff => at += 1,
            0x01 | 0xd0..=0xd8 => at += 2,
            0xda => return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]),
            _ => match bytes.get(at + 2..).and_then(|rest| rest.first_chunk()) {
                Some(&length) => at += 2 + usize::from(u16::from_be_bytes(length)),
                None => return false,
            },
        }
    }
    // No scan where one belongs: the decoder finds its own words.
    true
}

/// 8 bits per channel, on white.
fn opaque(image: DynamicImage) -> image::RgbImage {
    let high = |value: u16| (value >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image,
        DynamicImage::ImageLuma8(_) => image.into_rgb8(),
        DynamicImage::ImageLuma16(image) => map(&image, |&[level]: &[u16; 1]| [high(level); 3]),
        DynamicImage::ImageRgb16(image) => map(&image, |pixel: &[u16; 3]| pixel.map(high)),
        DynamicImage::ImageLumaA8(image) => map(&image, |&[l, a]: &[u8; 2]| on_white([l, l, l, a])),
        DynamicImage::ImageRgba8(image) => map(&image, |&pixel: &[u8; 4]| on_white(pixel)),
        DynamicImage::ImageLumaA16(image) => map(&image, |pixel: &[u16; 2]| {
            let [l, a] = pixel.map(high);
            on_white([l, l, l, a])
        }),
        DynamicImage::ImageRgba16(image) => map(&image, |pixel: &[u16; 4]| on_white(pixel.map(high))),
        other => other.into_rgb8(),
    }
}

fn map<P: image::Pixel, const N: usize>(
    image: &image::ImageBuffer<P, Vec<P::Subpixel>>,
    convert: impl Fn(&[P::Subpixel; N]) -> [u8; 3],
) -> image::RgbImage {
    let mut out = image::RgbImage::new(image.width(), image.height());
    for (out, pixel) in out.pixels_mut().zip(image.pixels()) {
        if let Some(pixel) = pixel.channels().first_chunk() {
            out.0 = convert(pixel);
        }
    }
    out
}

/// A pixel over white, with the fixed-point rounding of Pillow's `alpha_composite`.
fn on_white([r, g, b, alpha]: [u8; 4]) -> [u8; 3] {
    const BITS: u32 = 7;
    let alpha = u32::from(alpha);
    [r, g, b].map(|value| {
        let sum = ((u32::from(value) * alpha + 255 * (255 - alpha)) << BITS) + (0x80 << BITS);
        ((((sum >> 8) + sum) >> 8) >> BITS) as u8
    })
}

fn broken(format: &'static str, reason: impl Into<String>) -> ImageError {
    ImageError::Broken { format, reason: reason.into() }
}

fn failed(format: &'static str, error: &image::ImageError, limits: &DecodeLimits) -> ImageError {
    /// Characters of a decoder's message that are repeated.
    const MAX_REASON: usize = 200;
    if let image::ImageError::Limits(_) = error {
        return ImageError::TooMuchMemory { max_bytes: limits.max_bytes };
    }
    broken(format, error.to_string().chars().take(MAX_REASON).collect::<String>())
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
