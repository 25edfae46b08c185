//! Images that requests refer to: from the reference to bytes whose type and size are known.
//!
//! A reference is a data URI, which is decoded at once, or an `http(s)` URL, which is fetched only if
//! the operator allows its host, and never from an address that is not public.

mod address;
mod fetch;
mod hosts;
mod resolve;
mod size;
mod source;

use std::time::Duration;

use axum::body::Bytes;
use locket_vision::ImageError;

pub use fetch::{Fetcher, FetcherError};
pub use hosts::{HostList, HostListError};
pub use size::{MediaType, PixelSize};
pub use source::ImageSource;

use crate::error::{ApiError, ErrorKind};

/// What images may be, and where they may come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSettings {
    /// Most images of a request.
    pub max_images: u32,
    /// Most pixels of an image, checked before it is decoded.
    pub max_pixels: u64,
    /// Most bytes of an image as it is sent.
    pub max_bytes: usize,
    /// Hosts that images may be fetched from; empty: none is fetched.
    pub url_hosts: HostList,
    /// Longest time for one image, redirects included.
    pub url_timeout: Duration,
}

impl Default for ImageSettings {
    fn default() -> Self {
        Self {
            max_images: 16,
            max_pixels: 40_000_000,
            max_bytes: 20 << 20,
            url_hosts: HostList::default(),
            url_timeout: Duration::from_secs(10),
        }
    }
}

/// An image in the form in which it was sent, not decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedImage {
    /// The file.
    pub bytes: Bytes,
    /// By its first bytes, whatever its sender says.
    pub media_type: MediaType,
    /// By its header.
    pub size: PixelSize,
}

impl EncodedImage {
    /// Looks at the header of an image file.
    ///
    /// # Errors
    /// Too many bytes or pixels, another type, or no image at all.
    pub fn inspect(bytes: Bytes, settings: &ImageSettings) -> Result<Self, MediaError> {
        if bytes.len() > settings.max_bytes {
            return Err(MediaError::TooManyBytes { limit: settings.max_bytes });
        }
        let media_type = MediaType::of_bytes(&bytes).ok_or(MediaError::NotAnImage)?;
        let size = PixelSize::read(media_type, &bytes).ok_or(MediaError::NotAnImage)?;
        if size.pixels() > settings.max_pixels {
            return Err(MediaError::TooManyPixels { size, limit: settings.max_pixels });
        }
        Ok(Self { bytes, media_type, size })
    }
}

/// Why a reference cannot be turned into an image. No text of it names an address that was looked up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MediaError {
    /// Neither a data URI nor an `http(s)` URL, or one that is not allowed.
    #[error("{0}")]
    Url(String),
    /// The data of a data URI.
    #[error("is a data URI whose data is not base64")]
    Base64,
    /// A media type that is known not to be readable.
    #[error("has the media type {0:?}; PNG, JPEG, WebP, GIF and BMP can be read")]
    MediaType(String),
    /// The bytes are something else, or broken.
    #[error("is not a PNG, JPEG, WebP, GIF or BMP image that can be read")]
    NotAnImage,
    /// More bytes than allowed.
    #[error("is larger than the limit of {limit} bytes")]
    TooManyBytes {
        /// Most bytes.
        limit: usize,
    },
    /// More pixels than allowed.
    #[error("has {} x {} pixels, but may have at most {limit}", size.width, size.height)]
    TooManyPixels {
        /// What the header says.
        size: PixelSize,
        /// Most pixels.
        limit: u64,
    },
    /// All images of a request together have more bytes than allowed.
    #[error("makes the request's images larger than {limit} bytes in all")]
    TooManyBytesInAll {
        /// Most bytes.
        limit: usize,
    },
    /// It has a good header, and cannot be used all the same; a predicate of it.
    #[error("{0}")]
    Unusable(String),
    /// Decoding it takes too much.
    #[error("{0}")]
    TooLarge(String),
    /// The other server did not give it.
    #[error("could not be downloaded: {0}")]
    Download(String),
}

impl From<ImageError> for MediaError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::TooManyPixels { .. } | ImageError::TooMuchMemory { .. } => {
                Self::TooLarge(error.to_string())
            }
            ImageError::Empty
            | ImageError::UnknownType
            | ImageError::TooNarrow { .. }
            | ImageError::Broken { .. } => Self::Unusable(error.to_string()),
        }
    }
}

impl MediaError {
    /// The answer to the client; `param` is the path of the reference.
    pub fn into_api_error(self, param: impl Into<String>) -> ApiError {
        let kind = match self {
            Self::Url(_) => ErrorKind::InvalidImageUrl,
            Self::Base64 => ErrorKind::InvalidBase64,
            Self::MediaType(_) => ErrorKind::UnsupportedImageMediaType,
            Self::NotAnImage | Self::Unusable(_) => ErrorKind::ImageParseError,
            Self::TooManyBytes { .. }
            | Self::TooManyBytesInAll { .. }
            | Self::TooManyPixels { .. }
            | Self::TooLarge(_) => ErrorKind::ImageTooLarge,
            Self::Download(_) => ErrorKind::FailedToDownloadImage,
        };
        let param = param.into();
        let message = format!("`{param}` {self}.");
        ApiError::field(kind, param, message)
    }
}
