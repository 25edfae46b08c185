//! How far an evaluation is, on standard error.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// A bar over the rows of all steps; log lines where standard error is not a terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    what: String,
    logged: Instant,
    started: Instant,
}

impl Progress {
    /// Begins to report `rows` in all.
    pub(crate) fn new(rows: u64) -> Self {
        let bar = ProgressBar::new(rows);
        let style = "{msg} [{wide_bar}] {human_pos}/{human_len} rows, {per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, what: String::new(), logged: Instant::now(), started: Instant::now() }
    }

    /// Says what is running now.
    pub(crate) fn start(&mut self, what: String) {
        self.bar.set_message(what.clone());
        self.what = what;
    }

    /// Reports `rows` more.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.bar.inc(rows as u64);
        if self.bar.is_hidden() && self.logged.elapsed() > LOG_INTERVAL {
            self.logged = Instant::now();
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let rate = done as f64 / self.started.elapsed().as_secs_f64();
            tracing::info!("{}: {done} of {all} rows, {rate:.0} rows/s", self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
