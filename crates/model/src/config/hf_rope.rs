//! Rotary settings of a Hugging Face `config.json`.
//!
//! Three generations of spelling are read: `rope_theta` beside `rope_scaling.type`, then
//! `rope_scaling.rope_type`, then one `rope_parameters` object that holds both. Formulas are those
//! of transformers' `modeling_rope_utils.py`.

use super::{RopeConfig, RopeScaling, RopeStyle, hf::Fields, invalid, missing};
use crate::Error;

/// The rotary settings and the context length that they lead to.
pub(super) struct Rope {
    pub rope: RopeConfig,
    pub max_position: usize,
}

/// Reads theta and scaling; `max_position` is the file's `max_position_embeddings`.
pub(super) fn read(config: Fields<'_>, head_dim: usize, max_position: usize) -> Result<Rope, Error> {
    if let Some(share) = config.f32("partial_rotary_factor")?
        && (share - 1.0).abs() > 1e-6
    {
        return Err(invalid(
            "partial_rotary_factor",
            format!("is {share}; these architectures rotate whole heads (1.0)"),
        ));
    }
    let parameters = config.object("rope_parameters")?;
    let scaling = parameters.or(config.object("rope_scaling")?);
    let theta = match parameters.map(|parameters| parameters.f32("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => config.f32("rope_theta")?.unwrap_or(10_000.0),
    };
    let mut max_position = max_position;
    let scaling = match scaling {
        None => RopeScaling::None,
        Some(fields) => scaling_of(config, fields, max_position)?,
    };
    if let RopeScaling::Yarn { factor, original_max_position, .. } = scaling {
        // Published YaRN configs differ in whether `max_position_embeddings` is already extended.
        let extended = factor * original_max_position as f32;
        if extended.is_finite() && extended > 0.0 {
            max_position = max_position.max(extended as usize);
        }
    }
    let rope = RopeConfig { theta, rotary_dim: head_dim, style: RopeStyle::HalfSplit, scaling };
    Ok(Rope { rope, max_position })
}

fn scaling_of(config: Fields<'_>, scaling: Fields<'_>, max_position: usize) -> Result<RopeScaling, Error> {
    let kind = match scaling.str("rope_type")? {
        Some(kind) => kind,
        None => match scaling.str("type")? {
            Some(kind) => kind,
            None if scaling.is_flat() => "default",
            None => return Err(invalid("rope_parameters", "differ by layer type, which is not supported")),
        },
    };
    let factor = || scaling.f32("factor")?.ok_or_else(|| missing("rope_scaling.factor"));
    let original = || -> Result<Option<usize>, Error> {
        match scaling.usize("original_max_position_embeddings")? {
            Some(original) => Ok(Some(original)),
            None => config.usize("original_max_position_embeddings"),
        }
    };
    match kind {
        "default" | "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: required(scaling, "low_freq_factor")?,
            high_freq_factor: required(scaling, "high_freq_factor")?,
            original_max_position: original()?
                .ok_or_else(|| missing("rope_scaling.original_max_position_embeddings"))?,
        }),
        "yarn" => yarn(scaling, factor()?, original()?.unwrap_or(max_position)),
        other => Err(invalid(
            "rope_scaling.rope_type",
            format!("{other:?} is not supported; supported are default, linear, llama3, yarn"),
        )),
    }
}

fn required(scaling: Fields<'_>, key: &str) -> Result<f32, Error> {
    scaling.f32(key)?.ok_or_else(|| missing(&format!("rope_scaling.{key}")))
}

fn yarn(scaling: Fields<'_>, factor: f32, original_max_position: usize) -> Result<RopeScaling, Error> {
    if scaling.bool("truncate")? == Some(false) {
        return Err(invalid("rope_scaling.truncate", "false is not supported; the ramp's ends are rounded"));
    }
    let attention_factor = match scaling.f32("attention_factor")? {
        Some(attention_factor) => Some(attention_factor),
        None => match (scaling.f32("mscale")?, scaling.f32("mscale_all_dim")?) {
            (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                Some(temperature(factor, mscale) / temperature(factor, all))
            }
            _ => None,
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast: scaling.f32("beta_fast")?.unwrap_or(32.0),
        beta_slow: scaling.f32("beta_slow")?.unwrap_or(1.0),
        attention_factor,
    })
}

fn temperature(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
