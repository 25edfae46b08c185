//! Type and size of an image, by the first bytes of its file. Nothing is decoded: whether an image may
//! be decoded is decided by what this says.

/// Types of images that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MediaType {
    /// `image/png`
    Png,
    /// `image/jpeg`
    Jpeg,
    /// `image/webp`
    WebP,
    /// `image/gif`; its first frame is used.
    Gif,
    /// `image/bmp`
    Bmp,
}

impl MediaType {
    /// By its name, as in a data URI.
    pub fn of_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "image/png" => Some(Self::Png),
            "image/jpeg" | "image/jpg" => Some(Self::Jpeg),
            "image/webp" => Some(Self::WebP),
            "image/gif" => Some(Self::Gif),
            "image/bmp" | "image/x-ms-bmp" => Some(Self::Bmp),
            _ => None,
        }
    }

    /// By the file's signature.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            _ => None,
        }
    }
}

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PixelSize {
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl PixelSize {
    /// Number of pixels.
    pub fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// Reads the header of a file; `None` if it is broken, or the image has no pixel.
    pub fn read(media_type: MediaType, bytes: &[u8]) -> Option<Self> {
        let size = match media_type {
            MediaType::Png => png(bytes),
            MediaType::Jpeg => jpeg(bytes),
            MediaType::WebP => webp(bytes),
            MediaType::Gif => gif(bytes),
            MediaType::Bmp => bmp(bytes),
        };
        size.filter(|size| size.pixels() > 0)
    }
}

/// The `N` bytes at `at`.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn size(width: u32, height: u32) -> Option<PixelSize> {
    Some(PixelSize { width, height })
}

/// The chunk `IHDR` is always the first.
fn png(bytes: &[u8]) -> Option<PixelSize> {
    if array(bytes, 12)? != *b"IHDR" {
        return None;
    }
    // The rest of the chunk must be there too.
    array::<13>(bytes, 16)?;
    size(u32::from_be_bytes(array(bytes, 16)?), u32::from_be_bytes(array(bytes, 20)?))
}

/// The first frame can be larger than the screen that the header names, and is what is decoded.
fn gif(bytes: &[u8]) -> Option<PixelSize> {
    const IMAGE: u8 = 0x2c;
    const EXTENSION: u8 = 0x21;
    let le16 = |at: usize| array(bytes, at).map(u16::from_le_bytes).map(u32::from);
    let color_table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3usize << ((flags & 7) + 1) };
    let (screen_width, screen_height) = (le16(6)?, le16(8)?);
    let mut at = 13 + color_table(*bytes.get(10)?);
    loop {
        match *bytes.get(at)? {
            EXTENSION => {
                // A kind, then blocks with their lengths, up to an empty one.
                at += 2;
                loop {
                    let length = usize::from(*bytes.get(at)?);
                    at += 1 + length;
                    if length == 0 {
                        break;
                    }
                }
            }
            IMAGE => {
                let (left, top) = (le16(at + 1)?, le16(at + 3)?);
                let (width, height) = (le16(at + 5)?, le16(at + 7)?);
                return size(screen_width.max(left + width), screen_height.max(top + height));
            }
            _ => return None,
        }
    }
}

/// The old header has 16-bit numbers; in the others a negative height means from top to bottom.
fn bmp(bytes: &[u8]) -> Option<PixelSize> {
    let header = u32::from_le_bytes(array(bytes, 14)?);
    if header == 12 {
        return size(
            u16::from_le_bytes(array(bytes, 18)?).into(),
            u16::from_le_bytes(array(bytes, 20)?).into(),
        );
    }
    if header < 40 {
        return None;
    }
    let width = i32::from_le_bytes(array(bytes, 18)?);
    let height = i32::from_le_bytes(array(bytes, 22)?);
    size(u32::try_from(width).ok()?, height.unsigned_abs())
}

/// Segments up to the frame header.
fn jpeg(bytes: &[u8]) -> Option<PixelSize> {
    let mut at = 2;
    loop {
        if *bytes.get(at)? != 0xff {
            return None;
        }
        // Any number of fill bytes may stand before a marker.
        while *bytes.get(at)? == 0xff {
            at += 1;
        }
        let marker = *bytes.get(at)?;
        at += 1;
        match marker {
            // Without a length.
            0x01 | 0xd0..=0xd7 => {}
            // All frames but tables (c4, cc) and extensions (c8).
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                let height = u16::from_be_bytes(array(bytes, at + 3)?);
                let width = u16::from_be_bytes(array(bytes, at + 5)?);
                return size(width.into(), height.into());
            }
            // End, or data, before any frame.
            0x00 | 0xd8..=0xda => return None,
            _ => {
                let length = usize::from(u16::from_be_bytes(array(bytes, at)?));
                if length < 2 {
                    return None;
                }
                at += length;
            }
        }
    }
}

/// Lossy, lossless or extended.
fn webp(bytes: &[u8]) -> Option<PixelSize> {
    let le24 = |at: usize| -> Option<u32> {
        let [a, b, c] = array(bytes, at)?;
        Some(u32::from_le_bytes([a, b, c, 0]))
    };
    match &array::<4>(bytes, 12)? {
        b"VP8X" => size(le24(24)? + 1, le24(27)? + 1),
        b"VP8 " => {
            if array(bytes, 23)? != [0x9d, 0x01, 0x2a] {
                return None;
            }
            let side = |at: usize| array(bytes, at).map(|side| u32::from(u16::from_le_bytes(side) & 0x3fff));
            size(side(26)?, side(28)?)
        }
        b"VP8L" => {
            if *bytes.get(20)? != 0x2f {
                return None;
            }
            let word = u32::from_le_bytes(array(bytes, 21)?);
            size((word & 0x3fff) + 1, (word >> 14 & 0x3fff) + 1)
        }
        _ => None,
    }
}

/// The head of a PNG file of this size.
#[cfg(test)]
pub(crate) fn png_of(width: u32, height: u32) -> Vec<u8> {
    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
    [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice(), &sides, &[8, 2, 0, 0, 0, 0, 0, 0, 0]].concat()
}

/// The head of a file of each type, 3 by 2 pixels.
#[cfg(test)]
pub(crate) fn examples() -> Vec<(MediaType, Vec<u8>)> {
    let jpeg = [
        [0xff, 0xd8, 0xff, 0xe0, 0, 4, 1, 2].as_slice(),
        &[0xff, 0xff, 0xc4, 0, 2],
        &[0xff, 0xc2, 0, 8, 8, 0, 2, 0, 3, 1],
    ]
    .concat();
    let riff = |kind: &[u8], rest: &[u8]| [b"RIFF\0\0\0\0WEBP", kind, b"\0\0\0\0", rest].concat();
    let gif = [
        b"GIF89a\x01\0\x01\0\x80\0\0".as_slice(),
        &[0; 6],
        b"\x21\xf9\x02ab\0",
        b"\x2c\x01\0\0\0\x02\0\x02\0\0",
    ];
    let bmp_header =
        |header: u32, rest: &[u8]| [b"BM".as_slice(), &[0; 12], &header.to_le_bytes(), rest].concat();
    vec![
        (MediaType::Png, png_of(3, 2)),
        (MediaType::Jpeg, jpeg),
        (MediaType::WebP, riff(b"VP8X", &[0, 0, 0, 0, 2, 0, 0, 1, 0, 0])),
        (MediaType::WebP, riff(b"VP8 ", &[0, 0, 0, 0x9d, 0x01, 0x2a, 3, 0x40, 2, 0])),
        (MediaType::WebP, riff(b"VP8L", &[0x2f, 0x02, 0x40, 0, 0])),
        (MediaType::Gif, gif.concat()),
        (MediaType::Bmp, bmp_header(40, &[3, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff])),
        (MediaType::Bmp, bmp_header(12, &[3, 0, 2, 0])),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_of_all_types() {
        for (media_type, bytes) in examples() {
            assert_eq!(MediaType::of_bytes(&bytes), Some(media_type));
            assert_eq!(PixelSize::read(media_type, &bytes), size(3, 2), "{media_type:?}");
            for end in 0..bytes.len() {
                // Cut anywhere: the same, or nothing.
                let cut = PixelSize::read(media_type, &bytes[..end]);
                assert!(cut.is_none() || cut == size(3, 2), "{media_type:?} cut at {end}: {cut:?}");
            }
        }
        assert_eq!(PixelSize::read(MediaType::Png, &png_of(0, 2)), None);
        assert_eq!(png_of(u32::MAX, u32::MAX).len(), 33);
        let largest = PixelSize::read(MediaType::Png, &png_of(u32::MAX, u32::MAX)).expect("a size");
        assert_eq!(largest.pixels(), u64::from(u32::MAX) * u64::from(u32::MAX));
    }

    proptest! {
        /// No bytes make the reader fail, whatever they claim to be.
        #[test]
        fn any_bytes(index in 0usize..8, at in 0usize..40, bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let (media_type, mut file) = examples().swap_remove(index);
            file.truncate(at);
            file.extend(&bytes);
            let _ = PixelSize::read(media_type, &file);
            for media_type in [MediaType::Png, MediaType::Jpeg, MediaType::WebP, MediaType::Gif, MediaType::Bmp] {
                let _ = PixelSize::read(media_type, &bytes);
            }
        }
    }
}
