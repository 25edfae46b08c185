//! What the results look like: the machine they were measured on, and tables for people.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::{load::LoadReport, stats::Summary};
use crate::config::value::about_bytes;

/// Where and when a report was made.
#[derive(Debug, Serialize)]
pub(crate) struct Header {
    /// Name and version of the JSON's form.
    pub schema: &'static str,
    /// `load`, `offline` or `eval`.
    pub kind: &'static str,
    /// UTC, ISO 8601.
    pub date: String,
    /// Version of this program.
    pub locket_version: &'static str,
    /// Its commit.
    pub commit: &'static str,
    /// The machine that ran this program.
    pub machine: Machine,
}

/// The machine that ran this program.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// The processor's own name for itself.
    pub cpu: String,
    /// Processors that this program may use.
    pub cores: usize,
    /// Main memory.
    pub memory_bytes: u64,
    /// Operating system and architecture.
    pub platform: String,
}

/// The header of a report made now.
pub(crate) fn header(kind: &'static str) -> Header {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let kinds = RefreshKind::nothing()
        .with_cpu(CpuRefreshKind::nothing())
        .with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kinds);
    Header {
        schema: "locket-bench/1",
        kind,
        date: utc_date(now_s),
        locket_version: env!("CARGO_PKG_VERSION"),
        commit: env!("BUILD_COMMIT"),
        machine: Machine {
            cpu: system.cpus().first().map_or_else(String::new, |cpu| cpu.brand().trim().to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: system.total_memory(),
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        },
    }
}

/// Seconds since 1970 as `2026-01-31T23:59:59Z`. Days to date after Howard Hinnant's
/// `civil_from_days`, for years from 1970 on.
fn utc_date(seconds: u64) -> String {
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

impl fmt::Display for Header {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, memory_bytes, .. } = &self.machine;
        let memory = about_bytes(*memory_bytes);
        writeln!(
            out,
            "locket {} ({}) bench, {}, {cpu}, {cores} cores, {memory}",
            self.locket_version, self.commit, self.date
        )
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { header, inputs, results } = self;
        write!(out, "{header}")?;
        writeln!(out, "{} at {}{}", inputs.model, inputs.url, inputs.endpoint.path())?;
        match (inputs.requests_per_s, inputs.concurrency) {
            (Some(rate), _) => write!(out, "open loop, {rate} requests/s: ")?,
            (None, concurrency) => write!(out, "closed loop, concurrency {}: ", concurrency.unwrap_or(1))?,
        }
        writeln!(
            out,
            "{} requests of {} prompt and {} output tokens, seed {}\nprompt tokens counted by {}",
            inputs.num_requests,
            inputs.prompt_tokens,
            inputs.output_tokens,
            inputs.seed,
            inputs.prompt_tokens_counted_by,
        )?;
        writeln!(
            out,
            "\n{:.2} s, {} ok, {} failed",
            results.duration_s, results.requests_ok, results.requests_failed
        )?;
        writeln!(
            out,
            "{:.2} requests/s   {:.1} output tokens/s   {:.1} total tokens/s",
            results.requests_per_s, results.output_tokens_per_s, results.total_tokens_per_s
        )?;
        writeln!(out, "\n{:<24}{:>10}{:>10}{:>10}{:>10}{:>10}", "ms", "mean", "median", "p90", "p99", "max")?;
        let rows = [
            ("time to first token", results.time_to_first_token_ms),
            ("gap between chunks", results.chunk_gap_ms),
            ("time per output token", results.time_per_output_token_ms),
            ("end to end", results.end_to_end_ms),
        ];
        for (name, summary) in rows {
            if let Some(Summary { mean, median, p90, p99, max, .. }) = summary {
                writeln!(out, "{name:<24}{mean:>10.2}{median:>10.2}{p90:>10.2}{p99:>10.2}{max:>10.2}")?;
            }
        }
        if let Some(memory) = results.peak_memory {
            writeln!(out, "\npeak memory {} ({})", about_bytes(memory.peak_bytes), memory.source)?;
        }
        for (kind, error) in &results.errors {
            writeln!(out, "error {kind}: {} times, first: {}", error.count, error.example)?;
        }
        write_checks(out, self)
    }
}

/// One line for each disagreement between the server's counts and ours.
fn write_checks(out: &mut fmt::Formatter<'_>, report: &LoadReport) -> fmt::Result {
    let checks = &report.results.checks;
    let lines = [
        (checks.without_usage, "requests came without usage; their chunks were counted as tokens"),
        (checks.prompt_length_differs, "prompts were not as long as asked"),
        (checks.output_length_differs, "answers were not as long as asked"),
        (checks.more_chunks_than_tokens, "answers had more chunks than tokens in their usage"),
    ];
    for (count, text) in lines.into_iter().filter(|(count, _)| *count > 0) {
        writeln!(out, "note: {count} of {} {text}", report.results.requests_ok)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc_date(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc_date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc_date(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(utc_date(4_102_444_799), "2099-12-31T23:59:59Z");
    }
}
