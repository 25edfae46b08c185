//! The vision tower: CLIP's transformer up to the last feature layer, and the projector.
//!
//! Plain candle operations in f32 on any device. Attention is computed whole, so that the class token's row
//! costs nothing more. Layers behind the last feature layer do not exist here.

use candle_core::{D, Tensor};
use candle_nn::ops;

use crate::{
    Error, VisionGeometry,
    model::{PatchMerge, TileStates},
    weights::{Layer, Norm, Weights},
};

/// What the tower computes of a batch of tiles.
pub(crate) struct TowerOutput {
    /// `[tiles, kept patches, width * feature layers]`
    pub features: Tensor,
    /// `[tiles, kept patches]`, summed over heads: layer 0 (all patches) and the last layer.
    pub cls: Option<(Vec<f32>, Vec<f32>)>,
    /// For each tile the patches that were kept, ascending, if any were merged.
    pub kept: Option<Vec<Vec<u32>>>,
}

/// `rows [tiles * patches, 3 * patch * patch]` through the tower.
pub(crate) fn forward(
    geometry: &VisionGeometry,
    weights: &Weights,
    rows: &Tensor,
    wants_cls: bool,
    merge: Option<&dyn PatchMerge>,
) -> Result<TowerOutput, Error> {
    let (patches, width) = (geometry.patches(), geometry.width);
    let tiles = rows.dim(0)? / patches;
    let embedded = weights.patches.forward(rows)?.reshape((tiles, patches, width))?;
    let embedded = embedded.broadcast_add(&weights.positions)?;
    let class = weights.class.broadcast_as((tiles, 1, width))?;
    let mut x = norm(&Tensor::cat(&[&class, &embedded], 1)?, &weights.pre_norm, geometry)?;
    if merge.is_some() && geometry.feature_layers.contains(&0) {
        return Err(Error::InvalidPlan(
            "patches cannot be merged behind layer 0 if its input is a feature".into(),
        ));
    }
    let last = weights.layers.len() - 1;
    let (mut initial, mut fin, mut kept) = (Vec::new(), Vec::new(), None);
    let mut states: Vec<(usize, Tensor)> = Vec::new();
    if geometry.feature_layers.contains(&0) {
        states.push((0, x.clone()));
    }
    for (layer, layer_weights) in weights.layers.iter().enumerate() {
        let attended = attention(geometry, layer_weights, &x, wants_cls && (layer == 0 || layer == last))?;
        if let Some(row) = attended.class_row {
            if layer == last {
                fin.clone_from(&row);
            }
            if layer == 0 {
                initial = row;
            }
        }
        x = (x + attended.output)?;
        x = (&x + mlp(geometry, layer_weights, &x)?)?;
        if let (0, Some(merge)) = (layer, merge) {
            let (merged, survivors) = merge_patches(geometry, &x, merge)?;
            x = merged;
            kept = Some(survivors);
        }
        if geometry.feature_layers.contains(&(layer + 1)) {
            states.push((layer + 1, x.clone()));
        }
    }
    let of_layer = |index: &usize| {
        let found = states.iter().find(|(layer, _)| layer == index).map(|(_, state)| state);
        let state = found.ok_or_else(|| Error::InvalidPlan(format!("feature layer {index} did not run")))?;
        Ok::<_, Error>(state.narrow(1, 1, state.dim(1)? - 1)?)
    };
    let features = geometry.feature_layers.iter().map(of_layer).collect::<Result<Vec<_>, _>>()?;
    let features = Tensor::cat(&features, D::Minus1)?.contiguous()?;
    Ok(TowerOutput { features, cls: wants_cls.then_some((initial, fin)), kept })
}

/// `features [rows, width * feature layers]` as visual tokens `[rows, hidden_size]`.
pub(crate) fn project(weights: &Weights, features: &Tensor) -> Result<Tensor, Error> {
    let [first, second] = &weights.projector;
    second.forward(&first.forward(features)?.gelu_erf()?)
}

fn norm(x: &Tensor, weights: &Norm, geometry: &VisionGeometry) -> Result<Tensor, Error> {
    Ok(ops::layer_norm(&x.contiguous()?, &weights.0, &weights.1, geometry.layer_norm_eps as f32)?)
}

struct Attended {
    /// `[tiles, tokens, width]`
    output: Tensor,
    /// `[tiles, tokens - 1]`, flat.
    class_row: Option<Vec<f32>>,
}

fn attention(
    geometry: &VisionGeometry,
    weights: &Layer,
    x: &Tensor,
    wants_row: bool,
) -> Result<Attended, Error> {
    let (tiles, tokens, width) = x.dims3()?;
    let (heads, head_dim) = (geometry.num_heads, width / geometry.num_heads);
    let normed = norm(x, &weights.norm_1, geometry)?.reshape((tiles * tokens, width))?;
    let qkv = weights.qkv.forward(&normed)?.reshape((tiles, tokens, 3, heads, head_dim))?;
    // [tiles, heads, tokens, head_dim]
    let part = |index: usize| qkv.narrow(2, index, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = ((part(0)? * (head_dim as f64).powf(-0.5))?, part(1)?, part(2)?);
    let shares = ops::softmax_last_dim(&q.matmul(&k.t()?)?)?;
    let class_row = if wants_row {
        let row = shares.narrow(2, 0, 1)?.sum(1)?.narrow(2, 1, tokens - 1)?;
        Some(row.contiguous()?.flatten_all()?.to_vec1()?)
    } else {
        None
    };
    let mixed = shares.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((tiles * tokens, width))?;
    Ok(Attended { output: weights.output.forward(&mixed)?.reshape((tiles, tokens, width))?, class_row })
}

fn mlp(geometry: &VisionGeometry, weights: &Layer, x: &Tensor) -> Result<Tensor, Error> {
    let (tiles, tokens, width) = x.dims3()?;
    let normed = norm(x, &weights.norm_2, geometry)?.reshape((tiles * tokens, width))?;
    let wide = weights.fc_1.forward(&normed)?;
    let wide = (&wide * ops::sigmoid(&(&wide * 1.702)?)?)?;
    Ok(weights.fc_2.forward(&wide)?.reshape((tiles, tokens, width))?)
}

/// Replaces groups of patches by their means. Returns the shorter states and, for each tile, the patches that
/// are left.
fn merge_patches(
    geometry: &VisionGeometry,
    x: &Tensor,
    merge: &dyn PatchMerge,
) -> Result<(Tensor, Vec<Vec<u32>>), Error> {
    let (tiles, tokens, width) = x.dims3()?;
    let patches = tokens - 1;
    let states: Vec<f32> = x.narrow(1, 1, patches)?.contiguous()?.flatten_all()?.to_vec1()?;
    let side = geometry.side() as usize;
    let groups = merge.groups(TileStates { tiles, side, width, states: &states });
    if groups.len() != tiles {
        return Err(Error::InvalidPlan(format!("groups of {} tiles for {tiles}", groups.len())));
    }
    let mut rows = Vec::with_capacity(states.len());
    let mut kept = Vec::with_capacity(tiles);
    for (groups, states) in groups.iter().zip(states.chunks_exact(patches * width)) {
        kept.push(merge_tile(groups, states, width, &mut rows)?);
    }
    let count = kept.first().map_or(0, Vec::len);
    if kept.iter().any(|kept| kept.len() != count) {
        return Err(Error::InvalidPlan("tiles of a batch must lose equally many patches".into()));
    }
    let merged = Tensor::from_vec(rows, (tiles, count, width), x.device())?;
    Ok((Tensor::cat(&[&x.narrow(1, 0, 1)?.contiguous()?, &merged], 1)?, kept))
}

/// Appends the states of the patches that are left, and returns these.
fn merge_tile(
    groups: &[Vec<u32>],
    states: &[f32],
    width: usize,
    rows: &mut Vec<f32>,
) -> Result<Vec<u32>, Error> {
    /// Which group a patch is in.
    const ALONE: usize = usize::MAX;
    let patches = states.len() / width;
    let mut group_of = vec![ALONE; patches];
    for (index, group) in groups.iter().enumerate() {
        let is_ascending = group.windows(2).all(|pair| pair[0] < pair[1]);
        let is_free = group.iter().all(|&patch| group_of.get(patch as usize) == Some(&ALONE));
        if !is_ascending || !is_free || group.len() < 2 {
            return Err(Error::InvalidPlan(format!("group {index} must be ascending patches of its own")));
        }
        for &patch in group {
            group_of[patch as usize] = index;
        }
    }
    let state = |patch: usize| &states[patch * width..][..width];
    let mut kept = Vec::with_capacity(patches);
    for (patch, &group) in group_of.iter().enumerate() {
        let members = if group == ALONE { &[patch as u32][..] } else { &groups[group] };
        if members[0] as usize != patch {
            continue;
        }
        kept.push(patch as u32);
        let start = rows.len();
        rows.extend_from_slice(state(patch));
        for &member in &members[1..] {
            for (sum, &value) in rows[start..].iter_mut().zip(state(member as usize)) {
                *sum += value;
            }
        }
        if members.len() > 1 {
            let count = members.len() as f32;
            rows[start..].iter_mut().for_each(|sum| *sum /= count);
        }
    }
    Ok(kept)
}
