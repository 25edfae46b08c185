//! Images of a request before they are seen: what they are, and what they will cost.

use std::sync::Arc;

use axum::body::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use locket_vision::{
    ImageLayout,
    drop::{Budget, DropMethod, VisualSettings, method},
};
use sha2::{Digest as _, Sha256};

use super::{Detail, Sight, VisualFields};
use crate::{
    blocking,
    error::ApiError,
    media::{EncodedImage, ImageSource, MediaError},
    recent::Key,
};

/// A reference to an image in a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ImagePart {
    /// Where the reference stands, as errors name it.
    pub(crate) path: String,
    /// The reference.
    pub(crate) source: ImageSource,
    /// How closely to look.
    pub(crate) detail: Detail,
}

/// An image that is here, and whose tokens are known by number.
#[derive(Debug)]
pub(crate) struct Picture {
    /// As in [`ImagePart`].
    pub(crate) path: String,
    /// How closely to look.
    pub(crate) detail: Detail,
    /// Which tokens stay.
    pub(crate) settings: VisualSettings,
    /// All its tokens.
    pub(crate) layout: ImageLayout,
    /// The most tokens that go into the decoder; exact unless [`VisualSettings::compat`].
    pub(crate) planned: usize,
    /// The file.
    pub(super) bytes: Bytes,
    /// What its tokens depend on.
    pub(super) key: Key,
}

/// Images fetched at once for one request.
const FETCHES: usize = 4;

/// Files up to this many bytes are hashed at once.
const SHORT_BYTES: usize = 1 << 16;

impl Sight {
    /// Fetches what stands elsewhere and plans the tokens of all images, in their order.
    ///
    /// # Errors
    /// An image that cannot be fetched, or whose header is broken; all of them together too large.
    pub(crate) async fn collect(
        &self,
        parts: Vec<ImagePart>,
        fields: &VisualFields,
    ) -> Result<Vec<Arc<Picture>>, ApiError> {
        let mut total = 0;
        let fetches = stream::iter(parts).map(|part| self.fetch(part)).buffered(FETCHES);
        let mut fetches = std::pin::pin!(fetches);
        let mut pictures = Vec::new();
        while let Some((part, image)) = fetches.try_next().await? {
            total += image.bytes.len();
            if total > self.max_total_bytes {
                let limit = self.max_total_bytes;
                return Err(MediaError::TooManyBytesInAll { limit }.into_api_error(part.path));
            }
            pictures.push(Arc::new(self.picture(part, image, fields).await?));
        }
        Ok(pictures)
    }

    async fn fetch(&self, part: ImagePart) -> Result<(ImagePart, EncodedImage), ApiError> {
        let fetched = self.fetcher.fetch(part.source.clone()).await;
        match fetched {
            Ok(image) => Ok((part, image)),
            Err(error) => {
                self.metrics.count_refused();
                Err(error.into_api_error(part.path))
            }
        }
    }

    /// What is known of an image by its header.
    async fn picture(
        &self,
        part: ImagePart,
        image: EncodedImage,
        fields: &VisualFields,
    ) -> Result<Picture, ApiError> {
        let ImagePart { path, detail, .. } = part;
        let is_long = image.bytes.len() > SHORT_BYTES;
        let (bytes, limits) = (image.bytes.clone(), self.limits);
        let (size, digest) = blocking::run(is_long, move || {
            (locket_vision::decode::upright_size(&bytes, &limits), Sha256::digest(&bytes).into())
        })
        .await?;
        let (height, width) = size.map_err(|error| self.refused(&error, &path))?;
        let geometry = self.model.geometry();
        let layout = match detail.is_base_only() {
            true => ImageLayout::of_base(geometry, height, width),
            false => ImageLayout::of(geometry, height, width),
        };
        let mut settings = fields.settings(&self.config, detail);
        if let Budget::Count(count) = settings.effective_budget() {
            let most = Budget::Fraction(self.config.max_budget).of(layout.tokens());
            settings.budget = Some(Budget::Count(count.min(most.max(1) as u32)));
        }
        let method = drop_method(&settings)?;
        let planned = method.planned_tokens(&layout);
        let key = key(&digest, &settings, detail);
        Ok(Picture { path, detail, settings, layout, planned, bytes: image.bytes, key })
    }
}

/// The method of settings that were checked.
pub(super) fn drop_method(settings: &VisualSettings) -> Result<Box<dyn DropMethod>, ApiError> {
    method(settings).map_err(|error| ApiError::internal(&error.to_string()))
}

/// The same bytes with the same plan have the same tokens.
fn key(image: &[u8; 32], settings: &VisualSettings, detail: Detail) -> Key {
    let mut digest = Sha256::new();
    digest.update(image);
    digest.update([u8::from(detail.is_base_only())]);
    digest.update(settings.fingerprint());
    digest.finalize().into()
}
