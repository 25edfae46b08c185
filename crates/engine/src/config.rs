//! What the operator may set about the engine.

use std::{path::PathBuf, time::Duration};

use locket_model::Extras;

use crate::Error;

/// Chunk borders lie at multiples of this many rows from the start of a sequence, so that
/// attention tiles and column sums are the same for every way to cut a prompt.
pub(crate) const CHUNK_ROWS: usize = 16;

/// The longest event burst of one step: `PromptLogprobs`, `Started`, `Token` or `Embedding`,
/// `Finished`.
pub(crate) const MAX_EVENTS_PER_STEP: usize = 4;

/// Longest wait before a request goes first, whatever its priority.
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings of the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Most rows (tokens) of one step, at least 32; cut down to what the model's workspace holds.
    pub max_batch_rows: usize,
    /// Most rows of one prompt in one step; a multiple of 16.
    pub prefill_chunk: usize,
    /// How long a step may take while something decodes: the inter-token gap that prefill of
    /// other requests may cause. The row budget follows from measured step times.
    pub target_step: Duration,
    /// Most sequences that may wait for a block; further ones are refused.
    pub max_waiting: usize,
    /// Most sequences that may run at once; blocks limit it too.
    pub max_running: usize,
    /// A sequence that has waited this long ends with `QueueTimeout`. Zero: no limit.
    pub queue_timeout: Duration,
    /// After [`EngineHandle::drain`](crate::EngineHandle::drain) what is still there after this
    /// long ends with `ShuttingDown`.
    pub drain_timeout: Duration,
    /// Events that a reader may lag behind before its sequence pauses, at least 4.
    pub event_buffer: usize,
    /// Threads that sample rows of one step, the engine's own included; 0: up to 4, by the
    /// processors that may be used.
    pub sampler_threads: usize,
    /// Base of the seeds of requests without a seed; `None`: from the operating system.
    pub seed: Option<u64>,
    /// Label `model_name` of the metrics.
    pub model_name: String,
    /// Most bytes of RAM for snapshots (states of blocks, kept so that a prompt that begins like an
    /// earlier one need not be run again); 0 turns them off. One state more is held while it is
    /// taken. A state has the size of its sequence's filled slots.
    pub snapshot_memory_bytes: u64,
    /// A snapshot is taken every so many tokens from the start of a sequence; a multiple of 16.
    pub snapshot_interval: u32,
    /// Directory in which snapshots outlive the process; `None`: RAM only. They hold conversations
    /// in clear: files have mode 0600, the directory, if it is made, 0700. One process at a time
    /// may use it. Needs [`Self::snapshot_memory_bytes`] and [`Self::model_fingerprint`].
    pub snapshot_dir: Option<PathBuf>,
    /// Most bytes of files in [`Self::snapshot_dir`]; those used least recently go first. Files of
    /// other models are not touched and not counted.
    pub snapshot_disk_bytes: u64,
    /// Digest of all that makes the model's states and that the engine cannot see: weights, backend,
    /// side-car. Snapshots on disk are of use to the same fingerprint only. Zeros: unknown.
    pub model_fingerprint: [u8; 32],
    /// What the model makes room for: adapters, and prompts whose images lose tokens inside the decoder
    /// ([`Extras::planned_bytes`]). Nothing: what it has been told to make room for before.
    pub extras: Extras,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_rows: 512,
            prefill_chunk: 512,
            target_step: Duration::from_millis(100),
            max_waiting: 256,
            max_running: 256,
            queue_timeout: Duration::from_secs(300),
            drain_timeout: Duration::from_secs(30),
            event_buffer: 64,
            sampler_threads: 0,
            seed: None,
            model_name: "default".into(),
            snapshot_memory_bytes: 0,
            snapshot_interval: 1024,
            snapshot_dir: None,
            snapshot_disk_bytes: 8 << 30,
            model_fingerprint: [0; 32],
            extras: Extras::default(),
        }
    }
}

impl EngineConfig {
    /// How long a request waits before its priority no longer matters. Well before it would fail.
    pub(crate) fn patience(&self) -> Duration {
        if self.queue_timeout.is_zero() { PATIENCE } else { PATIENCE.min(self.queue_timeout / 2) }
    }

    /// Refuses values that the engine cannot work with.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let refuse = |field, reason: String| Err(Error::Config { field, reason });
        if self.max_batch_rows < 2 * CHUNK_ROWS {
            return refuse("max_batch_rows", format!("is {}, must be at least 32", self.max_batch_rows));
        }
        if self.prefill_chunk == 0 || !self.prefill_chunk.is_multiple_of(CHUNK_ROWS) {
            return refuse("prefill_chunk", format!("is {}, must be a multiple of 16", self.prefill_chunk));
        }
        if self.target_step.is_zero() {
            return refuse("target_step", "is 0, must be positive (try 100 ms)".into());
        }
        if self.max_waiting == 0 || self.max_waiting > 1 << 20 {
            return refuse("max_waiting", format!("is {}, must be 1 to 1048576", self.max_waiting));
        }
        if self.max_running == 0 {
            return refuse("max_running", "is 0, must be at least 1".into());
        }
        if self.event_buffer < MAX_EVENTS_PER_STEP || self.event_buffer > 1 << 16 {
            return refuse("event_buffer", format!("is {}, must be 4 to 65536", self.event_buffer));
        }
        self.validate_snapshots()
    }

    fn validate_snapshots(&self) -> Result<(), Error> {
        let refuse = |field, reason: String| Err(Error::Config { field, reason });
        let interval = self.snapshot_interval;
        if interval == 0 || !interval.is_multiple_of(CHUNK_ROWS as u32) {
            return refuse("snapshot_interval", format!("is {interval}, must be a multiple of 16"));
        }
        if self.snapshot_dir.is_none() {
            return Ok(());
        }
        if self.snapshot_memory_bytes == 0 {
            let reason = "is 0, must be positive with snapshot_dir: files are read into it";
            return refuse("snapshot_memory_bytes", reason.into());
        }
        if self.snapshot_disk_bytes == 0 {
            return refuse("snapshot_disk_bytes", "is 0, must be positive with snapshot_dir".into());
        }
        if self.model_fingerprint == [0; 32] {
            let reason = "is not given; files could be taken for those of another model";
            return refuse("model_fingerprint", reason.into());
        }
        Ok(())
    }

    /// [`Self::sampler_threads`] with its default filled in.
    pub(crate) fn effective_sampler_threads(&self) -> usize {
        match self.sampler_threads {
            0 => std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4)),
            threads => threads,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_nonsense_is_refused_by_name() {
        EngineConfig::default().validate().unwrap();
        let bad = EngineConfig { prefill_chunk: 100, ..EngineConfig::default() };
        assert!(bad.validate().unwrap_err().to_string().contains("prefill_chunk"));
        let bad = EngineConfig { max_batch_rows: 16, ..EngineConfig::default() };
        assert!(bad.validate().unwrap_err().to_string().contains("max_batch_rows"));
        let bad = EngineConfig { event_buffer: 3, ..EngineConfig::default() };
        assert!(bad.validate().unwrap_err().to_string().contains("event_buffer"));
        let bad = EngineConfig { snapshot_interval: 1000, ..EngineConfig::default() };
        assert!(bad.validate().unwrap_err().to_string().contains("snapshot_interval"));
    }

    #[test]
    fn files_need_memory_a_bound_and_a_fingerprint() {
        let good = EngineConfig {
            snapshot_memory_bytes: 1,
            snapshot_dir: Some("snapshots".into()),
            model_fingerprint: [1; 32],
            ..EngineConfig::default()
        };
        good.validate().unwrap();
        let refused = |bad: EngineConfig, field: &str| {
            assert!(bad.validate().unwrap_err().to_string().contains(field));
        };
        refused(EngineConfig { snapshot_memory_bytes: 0, ..good.clone() }, "snapshot_memory_bytes");
        refused(EngineConfig { snapshot_disk_bytes: 0, ..good.clone() }, "snapshot_disk_bytes");
        refused(EngineConfig { model_fingerprint: [0; 32], ..good }, "model_fingerprint");
    }
}
