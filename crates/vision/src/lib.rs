//! Images: bytes in, visual tokens out.
//!
//! [`decode()`] turns a file into pixels; [`layout`] tells from height and width alone how many visual
//! tokens they become; [`VisionModel`] cuts them into tiles, runs the vision tower and the projector, and
//! packs the features in the order in which the decoder reads them. Nothing here knows of requests, text
//! or the engine: whoever calls replaces the embeddings of the prompt's image ids by the packed rows.
//!
//! The models are LLaVA-1.5 and LLaVA-NeXT; what is computed equals transformers' classes of these names.

mod config;
pub mod decode;
pub mod drop;
pub mod error;
pub mod geometry;
pub mod layout;
pub mod model;
mod open;
mod preprocess;
mod resize;
#[doc(hidden)]
pub mod testing;
mod tower;
mod weights;

pub use decode::{DecodeLimits, RgbImage, decode, upright_size};
pub use error::{Error, ImageError};
pub use geometry::{VisionGeometry, VisionKind};
pub use layout::{ImageLayout, Place, Rect};
pub use model::{EncodedImage, OpenOptions, VisionModel, Wants};
