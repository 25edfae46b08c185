//! Images that were seen: visual tokens, from the cache or the tower.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use locket_engine::LayerDrops;
use locket_vision::{
    Error, ImageError, ImageLayout, VisionModel, Wants, decode,
    drop::{Method, Positions, VisualPlan},
};
use tokio::sync::OnceCell;

use super::{Picture, Sight, picture::drop_method};
use crate::{
    error::ApiError,
    media::MediaError,
    recent::{Key, Recent},
};

/// The visual tokens of an image.
#[derive(Debug)]
pub(crate) struct Seen {
    /// All its tokens.
    pub(crate) layout: ImageLayout,
    /// Who chose.
    pub(crate) method: Method,
    /// Which positions they have.
    pub(crate) positions: Positions,
    /// What stays.
    pub(crate) plan: VisualPlan,
    /// Embeddings `[kept, hidden_size]`.
    pub(crate) embeddings: Arc<[f32]>,
    /// Names image and plan in keys of snapshots.
    pub(crate) key: u128,
    /// What leaves inside the decoder.
    pub(crate) drops: Option<Arc<LayerDrops>>,
}

impl Seen {
    /// Bytes on the heap, roughly.
    fn bytes(&self) -> usize {
        let plan = &self.plan;
        size_of_val(&*self.embeddings)
            + size_of_val(plan.kept.as_slice())
            + size_of_val(plan.counts.as_slice())
            + size_of::<Self>()
    }
}

/// Images that are being seen, so that the same one asked for twice at once is seen once.
#[derive(Default)]
pub(super) struct InFlight {
    cells: Mutex<HashMap<Key, Arc<OnceCell<Arc<Seen>>>>>,
}

impl InFlight {
    fn cell(&self, key: Key) -> Arc<OnceCell<Arc<Seen>>> {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cells.entry(key).or_default())
    }

    /// Forgets a cell that nobody else waits for.
    fn leave(&self, key: &Key, cell: &Arc<OnceCell<Arc<Seen>>>) {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own, and the one of whoever leaves.
        let is_done = Arc::strong_count(cell) <= 2 || cell.initialized();
        if is_done && cells.get(key).is_some_and(|kept| Arc::ptr_eq(kept, cell)) {
            cells.remove(key);
        }
    }
}

/// Leaves even when the request is given up.
struct Waiting<'a> {
    in_flight: &'a InFlight,
    key: Key,
    cell: Arc<OnceCell<Arc<Seen>>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.in_flight.leave(&self.key, &self.cell);
    }
}

/// Why an image could not be seen.
#[derive(Debug)]
enum Failure {
    Image(ImageError),
    Model(Error),
}

impl Sight {
    /// The tokens of an image; `true` if they were kept from before.
    ///
    /// # Errors
    /// Bytes that cannot be decoded, too many images that wait, an error of the device.
    pub(crate) async fn see(&self, picture: &Arc<Picture>) -> Result<(Arc<Seen>, bool), ApiError> {
        let kept = self.cache().get(&picture.key);
        if let Some(seen) = kept {
            self.metrics.count_image(true);
            return Ok((seen, true));
        }
        let waiting =
            Waiting { in_flight: &self.in_flight, key: picture.key, cell: self.in_flight.cell(picture.key) };
        let seen = waiting.cell.get_or_try_init(|| self.look(picture)).await.cloned()?;
        Ok((seen, false))
    }

    /// Decodes an image and runs it through the tower, on the threads for that.
    async fn look(&self, picture: &Arc<Picture>) -> Result<Arc<Seen>, ApiError> {
        self.metrics.count_image(false);
        let method = drop_method(&picture.settings)?;
        let (model, picture_there) = (Arc::clone(&self.model), Arc::clone(picture));
        let (limits, layers) = (self.limits, self.layers);
        let metrics = self.metrics.clone();
        let result = self
            .tower
            .run(move || {
                let start = Instant::now();
                let seen = look(&model, &picture_there, method.as_ref(), layers, &limits);
                metrics.tower_took(start.elapsed().as_secs_f64());
                seen
            })
            .await?;
        let seen = Arc::new(result.map_err(|failure| match failure {
            Failure::Image(error) => self.refused(&error, &picture.path),
            Failure::Model(error) => ApiError::internal(&error.to_string()),
        })?);
        let mut cache = self.cache();
        cache.insert(picture.key, Arc::clone(&seen), seen.bytes());
        self.metrics.set_cache_bytes(cache.bytes());
        drop(cache);
        Ok(seen)
    }

    fn cache(&self) -> MutexGuard<'_, Recent<Seen>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to an image that cannot be used; counts it.
    pub(super) fn refused(&self, error: &ImageError, path: &str) -> ApiError {
        self.metrics.count_refused();
        MediaError::from(error.clone()).into_api_error(path)
    }
}

fn look(
    model: &VisionModel,
    picture: &Picture,
    method: &dyn locket_vision::drop::DropMethod,
    layers: usize,
    limits: &locket_vision::DecodeLimits,
) -> Result<Seen, Failure> {
    let image = decode(&picture.bytes, limits).map_err(Failure::Image)?;
    let merge = method.merge(&picture.layout);
    let wants = Wants { merge: merge.as_deref(), base_only: picture.detail.is_base_only(), ..method.wants() };
    let encoded = model.encode(&image, wants).map_err(Failure::Model)?;
    if encoded.layout != picture.layout {
        // The header said another size than the pixels have: nothing that was planned holds.
        return Err(Failure::Image(ImageError::Broken {
            format: "image",
            reason: "its header and its pixels have different sizes".into(),
        }));
    }
    drop(image);
    let plan = method.plan(layers, &encoded).map_err(Failure::Model)?;
    let rows = plan.gather(&encoded.features, encoded.hidden_size).map_err(Failure::Model)?;
    let [key, ..] = picture.key.as_chunks::<16>().0 else {
        return Err(Failure::Model(Error::InvalidPlan("a key is 32 bytes".into())));
    };
    Ok(Seen {
        layout: encoded.layout,
        method: picture.settings.method,
        positions: picture.settings.positions,
        embeddings: rows.into(),
        key: u128::from_le_bytes(*key),
        drops: (!plan.drops.boundaries.is_empty()).then(|| Arc::new(plan.drops.clone())),
        plan,
    })
}
