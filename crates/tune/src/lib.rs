//! Trains side-car weights for the cache methods that have any, from text files, the model frozen.
//!
//! * `learned`: a small causal convolution judges each token once, when it arrives: how much attention
//!   will it get from far-away text, and when somebody asks for it. It regresses attention of ordinary
//!   forward passes, so nothing is propagated through the model.
//! * `lococo`: the published mixing convolution (arXiv 2406.05317), trained by next-token loss block by
//!   block.
//!
//! A run is seeded and resumable, reads its text as a stream, and works on a CPU or a CUDA device. The
//! result is a safetensors file whose metadata says what it was made of.

mod corpus;
mod decoder;
pub mod error;
mod facts;
mod gradients;
mod learned;
mod lococo;
mod mixture;
mod parameters;
mod recipe;
mod saved_run;
mod scorer;
pub mod settings;
mod side_car;
mod teacher;
#[cfg(test)]
mod testing;
mod training;
mod windows;
mod words;

use std::collections::BTreeMap;

use candle_core::Device;
use locket_model::load::Checkpoint;
use locket_processor::Processor;
use serde_json::json;

pub use error::{Error, Result};
pub use settings::{Budget, DeviceKind, LearnedSettings, LococoSettings, Method, Precision, Settings};
pub use side_car::write_layer_shares;

use crate::{
    decoder::Decoder,
    learned::LearnedTrainer,
    lococo::LococoTrainer,
    recipe::Recipe,
    saved_run::Identity,
    training::{Run, Trainer},
};

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Optimiser steps.
    pub steps: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Mean of the last losses per kind of sequence, in nats.
    pub losses: BTreeMap<&'static str, f32>,
}

/// Trains as `settings` say and writes the side-car.
///
/// # Errors
/// See [`Error`]: settings that contradict the model, unusable text, a device without room, a loss that
/// is no longer finite. A checkpoint that was written before stays.
pub fn run(settings: &Settings, checkpoint: &Checkpoint, processor: &Processor) -> Result<Summary> {
    settings.check(checkpoint.config.max_position)?;
    let device = device(settings.device)?;
    let data_hash = corpus::hash(&settings.data)?;
    let identity = identity(settings, checkpoint, &data_hash);
    let decoder = Decoder::load(checkpoint, &device, settings.precision.dtype())?;
    let trainer: Box<dyn Trainer + '_> = match &settings.method {
        Method::Learned(learned) => {
            Box::new(LearnedTrainer::new(&decoder, learned.clone(), settings.micro_batch))
        }
        Method::Lococo(lococo) => {
            Box::new(LococoTrainer::new(&decoder, lococo.clone(), settings.micro_batch)?)
        }
    };
    let mut run = Run::start(trainer.as_ref(), settings, &identity, &device)?;
    let mut recipe =
        Recipe::new(&settings.data, processor, settings.batch, settings.sequence, settings.seed)?;
    if run.step > 0 {
        recipe.resume(run.windows.clone());
    }
    run.train(trainer.as_ref(), settings, &identity, recipe)?;
    let summary = Summary {
        steps: run.step,
        tokens: run.step * (settings.batch * settings.sequence) as u64,
        seconds: run.seconds,
        losses: run.history.means(),
    };
    let metadata = metadata(settings, checkpoint, &data_hash, &summary);
    side_car::write(&settings.out, &run.parameters, metadata, run.step)?;
    Ok(summary)
}

fn device(kind: DeviceKind) -> Result<Device> {
    match kind {
        DeviceKind::Cpu => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Device::new_cuda(0)?),
    }
}

/// Everything that decides what a step computes, by the flag's name.
fn identity(settings: &Settings, checkpoint: &Checkpoint, data_hash: &str) -> Identity {
    let method = match &settings.method {
        Method::Learned(learned) => format!("{learned:?}"),
        Method::Lococo(lococo) => format!("{lococo:?}"),
    };
    let pairs = [
        ("model", checkpoint.fingerprint.clone()),
        ("data", data_hash.to_owned()),
        ("method", method),
        ("steps", settings.steps().to_string()),
        ("batch", settings.batch.to_string()),
        ("micro-batch", settings.micro_batch.to_string()),
        ("sequence", settings.sequence.to_string()),
        ("lr", settings.rate.to_string()),
        ("seed", settings.seed.to_string()),
        ("dtype", settings.precision.name().to_owned()),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn metadata(
    settings: &Settings,
    checkpoint: &Checkpoint,
    data_hash: &str,
    summary: &Summary,
) -> BTreeMap<String, String> {
    let config = &checkpoint.config;
    let geometry =
        json!({ "layers": config.num_layers, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim });
    let recipe = json!({
        "steps": summary.steps,
        "tokens": summary.tokens,
        "batch": settings.batch,
        "sequence": settings.sequence,
        "learning_rate": settings.rate,
        "precision": settings.precision.name(),
        "method": format!("{:?}", settings.method),
    });
    // f32 written as f64 would show digits that it has not.
    let losses: BTreeMap<_, _> =
        summary.losses.iter().map(|(kind, loss)| (*kind, format!("{loss:.4}"))).collect();
    let metrics = json!({ "loss": losses, "seconds": summary.seconds.round() });
    let mut metadata = BTreeMap::from([
        ("kind", settings.method.name().to_owned()),
        ("format_version", side_car::FORMAT_VERSION.to_owned()),
        ("model", settings.model_name.clone()),
        ("geometry", geometry.to_string()),
        ("layers", config.num_layers.to_string()),
        ("kv_heads", config.num_kv_heads.to_string()),
        ("head_dim", config.head_dim.to_string()),
        ("model_hash", checkpoint.fingerprint.clone()),
        ("recipe", recipe.to_string()),
        ("data_hash", data_hash.to_owned()),
        ("metrics", metrics.to_string()),
        ("seed", settings.seed.to_string()),
        ("locket_version", env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    match &settings.method {
        Method::Learned(learned) => metadata.extend([
            ("recent_permille", learned.recent_permille.to_string()),
            ("beta", learned.beta.to_string()),
            ("recall_permille", learned.recall_permille.to_string()),
        ]),
        Method::Lococo(lococo) => {
            metadata.extend([("slots", lococo.slots.to_string()), ("ring", lococo.ring.to_string())]);
        }
    }
    metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
