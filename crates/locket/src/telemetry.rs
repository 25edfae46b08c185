//! Log lines on standard error. Standard output carries the one line that says the server is ready.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::LogSettings;

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
