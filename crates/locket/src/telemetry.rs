//! Log lines on standard error, and spans to a collector. Standard output carries the one line that says
//! the server is ready.

use std::{io::IsTerminal as _, time::Duration};

use anyhow::Context as _;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracerProvider},
};
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{LogSettings, TraceSettings};

/// A collector that does not answer holds up nothing but its own spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// What is left at the end may take this long.
const LAST_EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
const TRACES_PATH: &str = "/v1/traces";

/// Installs the process's subscriber; a second call changes nothing.
pub fn start(settings: &LogSettings) {
    let filter = EnvFilter::try_new(&settings.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed = if settings.json {
        lines.json().flatten_event(true).try_init()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
    if let Err(error) = installed {
        tracing::debug!("the subscriber was installed before: {error}");
    }
}

/// Spans on their way to the collector; the last ones leave when this is dropped.
pub struct Tracing(SdkTracerProvider);

impl Drop for Tracing {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST_EXPORT_TIMEOUT) {
            tracing::warn!("the last spans did not reach the collector: {error}");
        }
    }
}

/// Takes part in callers' traces, and sends spans if an endpoint is set. Not to be called on an event
/// loop: the exporter's client is a blocking one, with a thread of its own.
///
/// # Errors
/// An endpoint that is no URL, or one that is encrypted where this build cannot.
pub fn start_tracing(settings: &TraceSettings) -> anyhow::Result<Option<Tracing>> {
    global::set_text_map_propagator(TraceContextPropagator::new());
    let Some(endpoint) = &settings.endpoint else { return Ok(None) };
    let url = traces_url(endpoint)?;
    // The process has one provider of encryption. An error says that it is chosen already.
    #[cfg(feature = "tls")]
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::blocking::Client::builder()
        .timeout(EXPORT_TIMEOUT)
        .build()
        .context("cannot make a client for the collector of traces")?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_http_client(client)
        .with_endpoint(url.as_str())
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .with_context(|| format!("cannot send traces to {url}"))?;
    // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
    let resource = Resource::builder()
        .with_attributes(
            std::env::var_os("OTEL_SERVICE_NAME").is_none().then(|| KeyValue::new("service.name", "locket")),
        )
        .with_attribute(KeyValue::new("service.version", crate::VERSION))
        .build();
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.share))))
        .with_resource(resource)
        .build();
    global::set_tracer_provider(provider.clone());
    tracing::info!("traces to {url}");
    Ok(Some(Tracing(provider)))
}

/// The address of a collector's route for traces.
fn traces_url(endpoint: &str) -> anyhow::Result<reqwest::Url> {
    let endpoint = endpoint.trim_end_matches('/');
    let endpoint = endpoint.strip_suffix(TRACES_PATH).unwrap_or(endpoint);
    let url = reqwest::Url::parse(&format!("{endpoint}{TRACES_PATH}"))
        .with_context(|| format!("trace.endpoint: {endpoint:?} is no URL"))?;
    let schemes: &[&str] = if cfg!(feature = "tls") { &["http", "https"] } else { &["http"] };
    anyhow::ensure!(
        schemes.contains(&url.scheme()),
        "trace.endpoint: {endpoint:?} must begin with {}://",
        schemes.join(":// or ")
    );
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_with_and_without_their_path() {
        for endpoint in ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"] {
            assert_eq!(traces_url(endpoint).expect("a URL").as_str(), "http://c:4318/v1/traces");
        }
        for endpoint in ["c:4318", "collector", "grpc://c:4317"] {
            let error = format!("{:#}", traces_url(endpoint).expect_err("no URL"));
            assert!(error.contains("trace.endpoint"), "{error}");
        }
    }
}
