//! Peak memory of the server under load.

use std::time::Duration;

use serde::Serialize;

use super::client::Target;

/// Where the server's memory is read.
#[derive(Debug)]
pub(super) enum MemorySource {
    /// The kernel's high-water mark of a process on this machine.
    Process(u32),
    /// The largest `process_resident_memory_bytes` seen in `/metrics` during the run.
    Metrics,
}

/// A peak and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct PeakMemory {
    /// Resident bytes at their highest.
    pub peak_bytes: u64,
    /// `VmHWM` (whole life of the process) or `process_resident_memory_bytes` (this run).
    pub source: &'static str,
}

/// Seconds between two looks at `/metrics`.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(1);

impl MemorySource {
    /// Runs `work` and returns the peak beside its result; `None` where nothing could be read.
    pub(super) async fn watch<T>(
        &self,
        target: &Target,
        work: impl Future<Output = T>,
    ) -> (T, Option<PeakMemory>) {
        match *self {
            Self::Process(pid) => {
                let output = work.await;
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                let peak = high_water_bytes(&status);
                (output, peak.map(|peak_bytes| PeakMemory { peak_bytes, source: "VmHWM" }))
            }
            Self::Metrics => {
                let mut peak = None;
                let scrape = async {
                    let mut ticks = tokio::time::interval(SCRAPE_INTERVAL);
                    loop {
                        ticks.tick().await;
                        peak = peak.max(scrape_resident_bytes(target).await);
                    }
                };
                // Losing an unfinished scrape loses nothing but that sample.
                let output = tokio::select! {
                    output = work => output,
                    never = scrape => never,
                };
                let peak = peak.max(scrape_resident_bytes(target).await);
                let source = "process_resident_memory_bytes";
                (output, peak.map(|peak_bytes| PeakMemory { peak_bytes, source }))
            }
        }
    }
}

async fn scrape_resident_bytes(target: &Target) -> Option<u64> {
    let request = target.request(reqwest::Method::GET, "/metrics").send();
    let response = tokio::time::timeout(SCRAPE_INTERVAL, request).await.ok()?.ok()?;
    resident_bytes(&response.error_for_status().ok()?.text().await.ok()?)
}

/// `VmHWM` of `/proc/PID/status`, which is in KiB.
fn high_water_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// `process_resident_memory_bytes` of a Prometheus page; written as a float by most servers.
fn resident_bytes(page: &str) -> Option<u64> {
    let line = page.lines().find(|line| line.starts_with("process_resident_memory_bytes"))?;
    let value: f64 = line.split_whitespace().last()?.parse().ok()?;
    (value > 0.0).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_read_in_bytes() {
        assert_eq!(high_water_bytes("VmPeak:\t 9 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 1 kB\n"), Some(1234 * 1024));
        assert_eq!(high_water_bytes("VmRSS:\t 1 kB\n"), None);
        let page = "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes 3.2e+07\n";
        assert_eq!(resident_bytes(page), Some(32_000_000));
        assert_eq!(resident_bytes("other 1\n"), None);
    }
}
