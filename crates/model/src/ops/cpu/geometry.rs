//! What follows from a model's geometry: the registers' widths, and how much memory a step needs.

use locket_kernels::cpu::{
    QUANT_BLOCK, QuantRows,
    attention::{Attention, AttentionShape},
    kv::SlotNumber,
};

use crate::{Error, ModelConfig, ops::Reg};

/// Registers, by [`Reg`].
pub(super) const REGISTERS: [Reg; 6] = [Reg::H, Reg::X, Reg::Qkv, Reg::Attn, Reg::GateUp, Reg::Act];

pub(super) fn attention_shape(model: &ModelConfig, number: SlotNumber) -> AttentionShape {
    AttentionShape {
        heads: model.num_heads,
        kv_heads: model.num_kv_heads,
        head_dim: model.head_dim,
        scale: 1.0 / (model.head_dim as f32).sqrt(),
        number,
    }
}

/// Bytes of [`MemoryUse::workspace`](crate::MemoryUse::workspace) for `rows` rows and a team of `threads`, with products that need
/// `scratch_width` numbers of scratch per row; `None` if the kernels cannot run this geometry.
pub(crate) fn workspace_bytes(
    model: &ModelConfig,
    rows: usize,
    threads: usize,
    scratch_width: usize,
) -> Option<usize> {
    check_geometry(model).ok()?;
    let row = |width: usize, is_input: bool| {
        let quant = is_input && width.is_multiple_of(QUANT_BLOCK);
        4 * width + if quant { QuantRows::row_bytes(width) } else { 0 }
    };
    let registers: usize = REGISTERS.iter().map(|&reg| row(width_of(model, reg), is_input(reg))).sum();
    let head = row(model.hidden_size, true) + 4 * model.hidden_size;
    let angles = 4 * model.rope.rotary_dim;
    // Scratch is f32 whatever the slots are.
    let attention = Attention::bytes_for(attention_shape(model, SlotNumber::F32), threads);
    Some(rows * (registers + head + angles + 4 * scratch_width) + attention)
}

/// Whether products read the register.
pub(super) fn is_input(reg: Reg) -> bool {
    matches!(reg, Reg::X | Reg::Attn | Reg::Act)
}

pub(super) fn width_of(model: &ModelConfig, reg: Reg) -> usize {
    match reg {
        Reg::H | Reg::X => model.hidden_size,
        Reg::Qkv => model.qkv_dim(),
        Reg::Attn => model.q_dim(),
        Reg::GateUp => 2 * model.intermediate_size,
        Reg::Act => model.intermediate_size,
    }
}

pub(super) fn check_geometry(model: &ModelConfig) -> Result<(), Error> {
    let wrong = |field: &str, reason: String| Err(Error::Config { field: field.into(), reason });
    if model.head_dim == 0 || !model.head_dim.is_multiple_of(8) {
        return wrong(
            "head_dim",
            format!("{} is not a multiple of 8, as the CPU kernels ask", model.head_dim),
        );
    }
    if model.num_kv_heads == 0 || !model.num_heads.is_multiple_of(model.num_kv_heads) {
        let reason = format!("{} does not divide {} query heads", model.num_kv_heads, model.num_heads);
        return wrong("num_key_value_heads", reason);
    }
    let rotary = model.rope.rotary_dim;
    if rotary > model.head_dim || !rotary.is_multiple_of(2) {
        return wrong("rotary_dim", format!("{rotary} must be even and at most {}", model.head_dim));
    }
    if model.sliding_window.len() != model.num_layers {
        let reason = format!("{} entries for {} layers", model.sliding_window.len(), model.num_layers);
        return wrong("sliding_window", reason);
    }
    Ok(())
}
