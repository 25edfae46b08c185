//! Fetching images that stand elsewhere.
//!
//! Whoever sends a request chooses the URL, so a fetch must not become a way into the operator's
//! network: hosts are on a list, every address that a name has must be public, the connection goes to
//! the addresses that were checked, and each redirect is checked like a first URL. Neither cookies nor
//! credentials nor proxies from the environment are used.

use std::{error::Error as _, net::IpAddr, sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    http::{HeaderValue, header},
};
use futures_util::StreamExt as _;
use reqwest::{Client, Response, redirect};
use url::{Host, Url};

use super::{
    EncodedImage, ImageSettings, ImageSource, MediaError,
    resolve::{CheckedNames, NotPublic},
    source::check_url,
};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;

/// Turns references into images.
pub struct Fetcher {
    settings: ImageSettings,
    names: Arc<CheckedNames>,
    client: Client,
}

/// The client for other servers cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the client that fetches images: {0}")]
pub struct FetcherError(#[from] reqwest::Error);

impl Fetcher {
    /// A fetcher for these settings.
    ///
    /// # Errors
    /// The machine has no certificates to trust.
    pub fn new(settings: ImageSettings) -> Result<Self, FetcherError> {
        Self::with_names(settings, CheckedNames::of_system())
    }

    fn with_names(settings: ImageSettings, names: CheckedNames) -> Result<Self, FetcherError> {
        crate::serve::install_provider();
        let names = Arc::new(names);
        let client = Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .referer(false)
            .dns_resolver(Arc::clone(&names))
            // Each image looks its host up anew.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("locket/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self { settings, names, client })
    }

    /// The image behind a reference.
    ///
    /// # Errors
    /// It could not be downloaded within the limits, or is no image that can be read.
    pub async fn fetch(&self, source: ImageSource) -> Result<EncodedImage, MediaError> {
        let url = match source {
            ImageSource::Inline(image) => return Ok(image),
            ImageSource::Remote(url) => url,
        };
        let limit = self.settings.url_timeout;
        let download = tokio::time::timeout(limit, self.download(url)).await;
        let bytes = download
            .map_err(|_| MediaError::Download(format!("it took longer than {}", seconds(limit))))??;
        EncodedImage::inspect(bytes, &self.settings)
    }

    /// Follows redirects to the bytes.
    async fn download(&self, mut url: Url) -> Result<Bytes, MediaError> {
        for _ in 0..=MAX_REDIRECTS {
            self.check_address(&url)?;
            let request =
                self.client.get(url.clone()).header(header::ACCEPT, HeaderValue::from_static("image/*"));
            let response = request.send().await.map_err(|error| failure(&error))?;
            if response.status().is_redirection() {
                url = self.redirected(&url, &response)?;
                continue;
            }
            if response.status() != 200 {
                let status = response.status().as_u16();
                return Err(MediaError::Download(format!("its server answers with status {status}")));
            }
            return self.read(response).await;
        }
        Err(MediaError::Download(format!("there are more than {MAX_REDIRECTS} redirects")))
    }

    /// Names are checked when they are looked up; addresses are not looked up.
    fn check_address(&self, url: &Url) -> Result<(), MediaError> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self.names.allows(address) { Ok(()) } else { Err(not_public()) }
    }

    fn redirected(&self, from: &Url, response: &Response) -> Result<Url, MediaError> {
        let wrong = |reason: &str| MediaError::Download(reason.into());
        let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| wrong("its server redirects without saying where to"))?;
        let to = from.join(location).map_err(|_| wrong("its server redirects to what is no URL"))?;
        if from.scheme() == "https" && to.scheme() != "https" {
            return Err(wrong("its server redirects from https to http"));
        }
        check_url(to.as_str(), &self.settings.url_hosts)
            .map_err(|_| wrong("its server redirects to a URL that is not allowed"))
    }

    /// The body, as far as it may be read.
    async fn read(&self, response: Response) -> Result<Bytes, MediaError> {
        let limit = self.settings.max_bytes;
        let too_many = MediaError::TooManyBytes { limit };
        if response.content_length().is_some_and(|length| length > limit as u64) {
            return Err(too_many);
        }
        let (mut bytes, mut chunks) = (Vec::new(), response.bytes_stream());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| failure(&error))?;
            if bytes.len() + chunk.len() > limit {
                return Err(too_many);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }
}

fn seconds(duration: Duration) -> String {
    format!("{} seconds", duration.as_secs_f64())
}

/// As for a host that is not there, so that nobody can map the network by what the errors say.
fn not_public() -> MediaError {
    MediaError::Download("its host cannot be reached".into())
}

/// What may be said of a failed transfer: neither names nor addresses.
fn failure(error: &reqwest::Error) -> MediaError {
    tracing::info!(error = error as &dyn std::error::Error, "an image could not be fetched");
    let mut cause = error.source();
    while let Some(inner) = cause {
        if inner.is::<NotPublic>() {
            return not_public();
        }
        cause = inner.source();
    }
    if error.is_connect() {
        not_public()
    } else {
        MediaError::Download("its server does not answer well".into())
    }
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
