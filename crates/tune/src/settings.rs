//! What a training run is told.

use std::path::PathBuf;

use candle_core::DType;

use crate::error::{Error, Result};

/// Which side-car is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// The score-once convolution of the cache method `learned`.
    Learned(LearnedSettings),
    /// The mixing convolution of the cache method `lococo`, as published (arXiv 2406.05317).
    Lococo(LococoSettings),
}

impl Method {
    /// The cache method's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Learned(_) => "learned",
            Self::Lococo(_) => "lococo",
        }
    }
}

/// Settings of [`Method::Learned`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnedSettings {
    /// Width of the scorer's hidden layer.
    pub hidden: usize,
    /// Taps of its convolution.
    pub kernel: usize,
    /// Queries after a token whose attention is observed, not predicted: one of these by turns, so that
    /// scores fit tokens of any age.
    pub windows: Vec<usize>,
    /// Factor on the learning rate of the coefficient of observed attention.
    pub coefficient_rate: f64,
    /// Recent tokens that are always kept, in thousandths of the slots: recommended to the server.
    pub recent_permille: u32,
    /// Factor on the coefficient when serving: recommended to the server.
    pub beta: f32,
    /// Share of the free slots that the recall score fills, in thousandths: recommended to the server.
    pub recall_permille: u32,
}

impl Default for LearnedSettings {
    fn default() -> Self {
        Self {
            hidden: 96,
            kernel: 9,
            windows: vec![96, 512, 2048],
            coefficient_rate: 20.0,
            recent_permille: 250,
            beta: 1.0,
            recall_permille: 500,
        }
    }
}

/// Settings of [`Method::Lococo`].
#[derive(Debug, Clone, PartialEq)]
pub struct LococoSettings {
    /// Slots that remain after a compression; half are exact entries, half are mixtures.
    pub slots: usize,
    /// Tokens of a block.
    pub ring: usize,
    /// Taps of the convolution, odd.
    pub kernel: usize,
    /// Standard deviation of the convolution's weights at the start.
    pub deviation: f64,
    /// The gate between exact entries (0) and mixtures (1) at the start.
    pub gate: f64,
    /// Largest norm of all gradients together; `None` (as published) does not bound it.
    pub clip: Option<f64>,
}

impl Default for LococoSettings {
    fn default() -> Self {
        Self { slots: 128, ring: 512, kernel: 21, deviation: 1.0, gate: 0.5, clip: None }
    }
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// Optimiser steps.
    Steps(u64),
    /// Tokens, rounded up to whole steps.
    Tokens(u64),
}

/// Where the tensors are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceKind {
    /// The processor.
    #[default]
    Cpu,
    /// The first CUDA device.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// The number type of the frozen model; what is trained is always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// IEEE single.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

impl Precision {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Everything but the model and the method.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What to train.
    pub method: Method,
    /// Training text: JSONL with a `text` field, or plain text.
    pub data: Vec<PathBuf>,
    /// The side-car to write.
    pub out: PathBuf,
    /// The model's name for the side-car's metadata.
    pub model_name: String,
    /// How long.
    pub budget: Budget,
    /// Sequences per step.
    pub batch: usize,
    /// Sequences that are computed at once; divides the step's memory.
    pub micro_batch: usize,
    /// Tokens per sequence.
    pub sequence: usize,
    /// Peak learning rate.
    pub rate: f64,
    /// Seed of weights, order of text, and planted facts.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceKind,
    /// Number type of the frozen model.
    pub precision: Precision,
    /// Folder of checkpoints and steps between two of them.
    pub checkpoints: Option<(PathBuf, u64)>,
    /// Go on from the folder's checkpoint, if there is one.
    pub resume: bool,
}

impl Settings {
    /// Optimiser steps of the whole run.
    pub fn steps(&self) -> u64 {
        match self.budget {
            Budget::Steps(steps) => steps,
            Budget::Tokens(tokens) => tokens.div_ceil((self.batch * self.sequence) as u64),
        }
    }

    /// Checks the numbers against each other and against a model trained on `max_position` tokens.
    pub(crate) fn check(&self, max_position: usize) -> Result<()> {
        let at_least = |field, value: usize, least: usize| {
            if value >= least {
                return Ok(());
            }
            Err(Error::setting(field, format!("is {value}; it must be at least {least}")))
        };
        at_least("batch", self.batch, 1)?;
        at_least("micro-batch", self.micro_batch, 1)?;
        at_least("steps", usize::try_from(self.steps()).unwrap_or(usize::MAX), 1)?;
        if self.sequence > max_position {
            let reason = format!("is {}; the model was trained on {max_position} tokens", self.sequence);
            return Err(Error::setting("sequence", reason));
        }
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return Err(Error::setting("lr", format!("is {}; it must be above 0", self.rate)));
        }
        if matches!(self.checkpoints, Some((_, 0))) {
            return Err(Error::setting("checkpoint-every", "is 0; it must be at least 1"));
        }
        if self.resume && self.checkpoints.is_none() {
            return Err(Error::setting("resume", "needs --checkpoint-dir"));
        }
        match &self.method {
            Method::Learned(learned) => {
                let longest = learned.windows.iter().copied().max().unwrap_or(0);
                at_least("sequence", self.sequence, 2 * longest)?;
                at_least("window", learned.windows.iter().copied().min().unwrap_or(0), 1)?;
                at_least("hidden", learned.hidden, 1)?;
                at_least("kernel", learned.kernel, 2)
            }
            Method::Lococo(lococo) => {
                at_least("slots", lococo.slots, 2)?;
                at_least("ring", lococo.ring, 1)?;
                at_least("sequence", self.sequence, lococo.slots + 2 * lococo.ring)?;
                if !lococo.slots.is_multiple_of(2) {
                    return Err(Error::setting("slots", format!("is {}; it must be even", lococo.slots)));
                }
                if lococo.kernel.is_multiple_of(2) {
                    return Err(Error::setting("kernel", format!("is {}; it must be odd", lococo.kernel)));
                }
                Ok(())
            }
        }
    }
}
