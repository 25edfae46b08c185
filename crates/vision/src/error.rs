//! What can go wrong with an image, and with a vision model.

use std::path::PathBuf;

/// An image that cannot be used: its sender's mistake.
///
/// Texts are predicates, to be put behind the path of the image in the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// No bytes at all.
    #[error("is empty; a PNG, JPEG, WebP, GIF or BMP file is needed")]
    Empty,
    /// The first bytes are of no type that is read.
    #[error("is not a PNG, JPEG, WebP, GIF or BMP file")]
    UnknownType,
    /// The header says that it has more pixels than allowed; nothing was decoded.
    #[error("has {width} x {height} pixels; at most {max_pixels} are allowed")]
    TooManyPixels {
        /// By the header.
        width: u32,
        /// By the header.
        height: u32,
        /// The limit.
        max_pixels: u64,
    },
    /// Decoding would take more memory than allowed.
    #[error("takes more than {max_bytes} bytes to decode")]
    TooMuchMemory {
        /// The limit.
        max_bytes: u64,
    },
    /// One side is so much longer than the other that nothing of it would be seen.
    #[error("has {width} x {height} pixels; the longer side may be at most {max_ratio} times the shorter")]
    TooNarrow {
        /// By the header, or after turning it upright.
        width: u32,
        /// By the header, or after turning it upright.
        height: u32,
        /// The limit.
        max_ratio: u32,
    },
    /// Truncated or damaged.
    #[error("is a {format} file that cannot be decoded: {reason}")]
    Broken {
        /// `PNG`, `JPEG`, `WebP`, `GIF`, `BMP`.
        format: &'static str,
        /// The decoder's words, bounded.
        reason: String,
    },
}

impl ImageError {
    /// A stable snake-case name for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::UnknownType => "unknown_type",
            Self::TooManyPixels { .. } => "too_many_pixels",
            Self::TooMuchMemory { .. } => "too_much_memory",
            Self::TooNarrow { .. } => "too_narrow",
            Self::Broken { .. } => "broken",
        }
    }
}

/// Errors of opening and running a vision model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files: see the variant inside.
    #[error(transparent)]
    Model(#[from] locket_model::Error),
    /// A folder or file without a vision model.
    #[error("{path} has no vision model: {reason}")]
    NoVision {
        /// What was opened.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A key of the configuration that is absent, wrong or asks for what is not supported.
    #[error("vision configuration: {field}: {reason}")]
    Config {
        /// The key, as the file spells it.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A caller's mistake: a plan that contradicts the image.
    #[error("invalid plan: {0}")]
    InvalidPlan(String),
    /// The device or the tensor library failed.
    #[error("device: {0}")]
    Device(String),
}

impl Error {
    /// A stable snake-case name for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Model(error) => error.kind(),
            Self::NoVision { .. } => "no_vision",
            Self::Config { .. } => "config",
            Self::InvalidPlan(_) => "invalid_plan",
            Self::Device(_) => "device",
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Device(error.to_string())
    }
}
