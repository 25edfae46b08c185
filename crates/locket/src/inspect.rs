//! `locket inspect`: what a checkpoint is and what serving it would take.

use std::fmt::Write as _;

use locket_model::{ModelConfig, config::RopeScaling, kv_cache::CacheMethod, load::Checkpoint};

use crate::{
    adapters,
    config::{Config, value::about_bytes},
    memory::{Beside, MemoryPlan, free_memory},
    model_source,
    side_car::{self, FoundSideCar},
    vision::{self, FoundVision},
};

/// Opens the configured model and describes it.
///
/// # Errors
/// A model or side-car that cannot be found or opened. A plan that does not fit is part of the
/// description.
pub fn describe(config: &Config) -> anyhow::Result<String> {
    let model = model_source::locate(config)?;
    let checkpoint = Checkpoint::open(&model.path)?;
    let found = side_car::find(config, &checkpoint)?;
    let free = free_memory();
    let vision = vision::find(config, &checkpoint)?;
    let extras = adapters::find(config, &checkpoint, vision.as_ref())?.extras;
    let mut text = String::new();
    let _ = writeln!(text, "{}\n", checkpoint.path.display());
    for (name, value) in geometry(&checkpoint) {
        let _ = writeln!(text, "{name:<16} {value}");
    }
    let _ = writeln!(text, "{:<16} {}", "side-car", describe_side_car(found.as_ref()));
    let eyes = vision.as_ref().map_or_else(|| "none: text only".into(), FoundVision::describe);
    let _ = writeln!(text, "{:<16} {eyes}", "vision");
    text.push_str("\nMemory plan\n");
    let beside = Beside { vision: vision.as_ref(), extras };
    match MemoryPlan::make(config, &checkpoint, found.as_ref(), beside, &free) {
        Ok(plan) => plan.describe().iter().for_each(|line| {
            let _ = writeln!(text, "{line}");
        }),
        Err(error) => {
            let _ = writeln!(text, "does not fit: {error}");
        }
    }
    Ok(text)
}

fn geometry(checkpoint: &Checkpoint) -> Vec<(&'static str, String)> {
    let config = &checkpoint.config;
    vec![
        ("architecture", config.architecture.clone()),
        ("weights", format!("{}, mostly {}", about_bytes(checkpoint.weight_bytes), checkpoint.quantization)),
        ("fingerprint", checkpoint.fingerprint.clone()),
        ("layers", config.num_layers.to_string()),
        ("hidden", format!("{}, MLP {}", config.hidden_size, config.intermediate_size)),
        (
            "attention",
            format!(
                "{} heads of {}, {} key/value heads",
                config.num_heads, config.head_dim, config.num_kv_heads
            ),
        ),
        ("vocabulary", config.vocab_size.to_string()),
        ("context", format!("{} tokens", config.max_position)),
        ("rope", rope(config)),
        ("sliding window", window(config)),
        ("extras", extras(config)),
        ("end tokens", format!("{:?}, start token {:?}", config.eos_token_ids, config.bos_token_id)),
        ("chat template", if checkpoint.chat_template.is_some() { "yes" } else { "none" }.into()),
    ]
}

fn describe_side_car(found: Option<&FoundSideCar>) -> String {
    let Some(FoundSideCar { weights, origin, .. }) = found else { return "none".into() };
    let methods =
        CacheMethod::ALL.into_iter().filter(|method| method.needs_side_car() && weights.serves(*method));
    let methods: Vec<&str> = methods.map(CacheMethod::name).collect();
    format!("{origin}, for {}", methods.join(", "))
}

fn rope(config: &ModelConfig) -> String {
    let scaling = match &config.rope.scaling {
        RopeScaling::None => "no scaling".into(),
        RopeScaling::Linear { factor } => format!("linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, original_max_position, .. } => {
            format!("llama3 scaling by {factor} from {original_max_position}")
        }
        RopeScaling::Yarn { factor, original_max_position, .. } => {
            format!("yarn scaling by {factor} from {original_max_position}")
        }
        RopeScaling::Factors(factors) => format!("{} factors of its own", factors.len()),
    };
    format!("theta {}, {} dimensions, {scaling}", config.rope.theta, config.rope.rotary_dim)
}

fn window(config: &ModelConfig) -> String {
    let layers = config.sliding_window.iter().flatten().count();
    match config.sliding_window.iter().flatten().next() {
        None => "none".into(),
        Some(window) => format!("{window} tokens in {layers} of {} layers", config.num_layers),
    }
}

fn extras(config: &ModelConfig) -> String {
    let all = [
        (config.tie_embeddings, "head is the embedding"),
        (config.qkv_bias, "q/k/v biases"),
        (config.output_bias, "output bias"),
        (config.mlp_bias, "MLP biases"),
        (config.qk_norm, "query/key norms"),
    ];
    let present: Vec<_> = all.iter().filter(|(is, _)| *is).map(|&(_, name)| name).collect();
    if present.is_empty() { "none".into() } else { present.join(", ") }
}
