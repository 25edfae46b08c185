//! A download's progress: a bar on a terminal, else a log line every few seconds.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::config::value::about_bytes;

const LOG_INTERVAL: Duration = Duration::from_secs(3);

/// Progress of one file.
#[derive(Debug)]
pub struct Progress {
    what: String,
    total: u64,
    done: u64,
    logged: Instant,
    bar: ProgressBar,
}

impl Progress {
    /// Begins to report `total` bytes of `what`.
    pub fn new(what: &str, total: u64) -> Self {
        // Draws on standard error, and nothing if that is not a terminal.
        let bar = ProgressBar::new(total);
        let style = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { what: what.to_owned(), total, done: 0, logged: Instant::now(), bar }
    }

    /// Reports `bytes` more.
    pub fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.bar.set_position(self.done);
        if self.bar.is_hidden() && self.logged.elapsed() > LOG_INTERVAL {
            self.logged = Instant::now();
            tracing::info!("{}: {} of {}", self.what, about_bytes(self.done), about_bytes(self.total));
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(feature = "hub")]
impl hf_hub::api::Progress for Progress {
    fn init(&mut self, size: usize, filename: &str) {
        // The client begins twice per file; the second time it knows what was there already.
        *self = Self::new(filename, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.advance(size as u64);
    }

    fn finish(&mut self) {
        self.end();
    }
}
