//! Images in prompts: fetched, planned, seen by the tower, and put into the prompt as visual tokens.
//!
//! What an image costs is known from its header ([`Picture`]), so a prompt that is too long is refused
//! before the tower runs. The tower has threads of its own ([`tower`]), its results are kept for
//! images that come again, and the decoder gets rows in place of the prompt's placeholders
//! ([`prompt`]).

mod choice;
mod config;
mod metrics;
mod picture;
mod prompt;
mod report;
mod seen;
mod tower;

use std::sync::{Arc, Mutex};

use locket_vision::{DecodeLimits, VisionModel};
use prometheus::Registry;

pub(crate) use choice::VisualFields;
pub(crate) use config::Detail;
pub use config::VisualConfig;
pub(crate) use picture::{ImagePart, Picture};
pub(crate) use prompt::{PromptImages, collect, report, see};
pub(crate) use report::{VisualReport, VisualReports, reports};
pub(crate) use seen::Seen;

use crate::{config::ServerConfig, media::Fetcher, recent::Recent, state::SetupError};
use metrics::VisualMetrics;
use seen::InFlight;
use tower::TowerThreads;

/// The eyes of a model that sees.
pub(crate) struct Sight {
    model: Arc<VisionModel>,
    /// Of the decoder.
    layers: usize,
    config: VisualConfig,
    limits: DecodeLimits,
    /// Most bytes of all images of a request: as many as may come with it.
    max_total_bytes: usize,
    fetcher: Fetcher,
    /// Images that were seen, by the digest of file and plan.
    cache: Mutex<Recent<Seen>>,
    in_flight: InFlight,
    tower: TowerThreads,
    metrics: VisualMetrics,
}

impl Sight {
    /// Starts the tower's threads. `layers` are the decoder's.
    ///
    /// # Errors
    /// Metrics that are registered already; no threads; no certificates to trust.
    pub(crate) fn new(
        model: Arc<VisionModel>,
        layers: usize,
        config: &ServerConfig,
        registry: &Registry,
    ) -> Result<Self, SetupError> {
        let metrics = VisualMetrics::register(registry)?;
        let tower = TowerThreads::start(config.visual.max_waiting, metrics.waiting().clone())
            .map_err(SetupError::TowerThreads)?;
        let limits = DecodeLimits { max_pixels: config.images.max_pixels, ..DecodeLimits::default() };
        Ok(Self {
            model,
            layers,
            config: config.visual.clone(),
            limits,
            max_total_bytes: config.max_body_bytes.max(config.images.max_bytes),
            fetcher: Fetcher::new(config.images.clone())?,
            cache: Mutex::new(Recent::new(config.visual.cache_bytes)),
            in_flight: InFlight::default(),
            tower,
            metrics,
        })
    }

    /// The most visual tokens that an image can have.
    pub(crate) fn max_tokens(&self) -> usize {
        self.model.geometry().max_tokens()
    }
}
