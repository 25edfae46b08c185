//! `locket health`: asks the server of this machine whether it takes requests, for health checks in
//! images that have no HTTP client.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use crate::config::{Config, SettingFlags, Sources};

/// A probe that takes longer has failed. Supervisors usually give three seconds, of which starting
/// this process takes some.
const TIMEOUT: Duration = Duration::from_millis(2_500);

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Ask only whether the process works, not whether it takes new requests.
    #[arg(long)]
    live: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

/// Asks the server that the settings `host`, `port` and `tls-cert` describe; returns its answer.
///
/// # Errors
/// No answer in time, or another one than 200: the process then ends with code 1.
pub fn run(args: HealthArgs) -> anyhow::Result<String> {
    let config = Config::load(&Sources::of_process(args.flags)?)?;
    let url = url(&config, args.live)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let response =
            client(&config)?.get(&url).send().await.with_context(|| format!("no answer of {url}"))?;
        let status = response.status();
        let body = response.text().await.unwrap_or_default();
        ensure!(status == reqwest::StatusCode::OK, "{url}: {status} {body}");
        Ok(format!("{body}\n"))
    })
}

/// Where this machine reaches its own server.
fn url(config: &Config, live: bool) -> anyhow::Result<String> {
    if config.port == 0 {
        bail!("port is 0, so the server's port is known only to itself: set it, for the server too");
    }
    let scheme = if config.api.tls.is_some() { "https" } else { "http" };
    let path = if live { "/health/live" } else { "/ready" };
    Ok(format!("{scheme}://{}:{}{path}", reachable(&config.host), config.port))
}

/// A host to connect to for a host to listen on: loopback for every network, IPv6 in brackets.
fn reachable(host: &str) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) if address.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
        Ok(IpAddr::V6(address)) if address.is_unspecified() => format!("[{}]", Ipv6Addr::LOCALHOST),
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => host.to_owned(),
    }
}

fn client(config: &Config) -> anyhow::Result<reqwest::Client> {
    locket_server::serve::install_provider();
    let builder = reqwest::Client::builder().timeout(TIMEOUT).no_proxy();
    // The certificate names the server's public host, not this machine's loopback address; and a
    // probe sends nothing that must be kept from others.
    #[cfg(feature = "tls")]
    let builder = builder.tls_danger_accept_invalid_certs(config.api.tls.is_some());
    #[cfg(not(feature = "tls"))]
    let _ = config;
    builder.build().context("cannot make an HTTP client")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_network_is_reached_over_loopback() {
        for (host, expected) in [
            ("0.0.0.0", "127.0.0.1"),
            ("::", "[::1]"),
            ("::1", "[::1]"),
            ("10.1.2.3", "10.1.2.3"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(reachable(host), expected);
        }
    }

    #[test]
    fn the_url_follows_the_settings() {
        let mut config = Config::load(&Sources::default()).unwrap();
        assert_eq!(url(&config, false).unwrap(), "http://127.0.0.1:8080/ready");
        assert_eq!(url(&config, true).unwrap(), "http://127.0.0.1:8080/health/live");
        config.port = 0;
        assert!(url(&config, false).unwrap_err().to_string().contains("port is 0"));
    }
}
