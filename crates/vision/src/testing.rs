//! Vision models with random weights, for tests and measurements of this and other crates.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::json;

pub use crate::geometry::testing::{demo, llava_15_7b, llava_next_7b};
use crate::{VisionGeometry, VisionKind};

/// A tiny LLaVA-NeXT with a demo-like grid, for a decoder of this width: 36 patches of a tile.
pub fn tiny(hidden_size: usize) -> VisionGeometry {
    VisionGeometry {
        tile: 24,
        patch: 4,
        pinpoints: vec![(24, 48), (48, 24), (48, 48), (72, 24), (24, 72)],
        width: 32,
        num_heads: 2,
        mlp_width: 64,
        num_layers: 3,
        feature_layers: vec![2],
        hidden_size,
        ..demo()
    }
}

/// Writes a vision file of its own: the geometry in its metadata, weights from a seed, as f16.
///
/// # Errors
/// What the file system says.
pub fn write_random(path: &Path, geometry: &VisionGeometry, seed: u64) -> std::io::Result<()> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // A sum of three uniform numbers, of variance 1.
    let mut noise = || {
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        2.0 * (uniform() + uniform() + uniform())
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes(geometry)
        .into_iter()
        .map(|(name, shape)| {
            let numbers: usize = shape.iter().product();
            let inputs = (numbers / shape[0]) as f32;
            let (center, spread) = match name.as_str() {
                name if name.contains("norm") && name.ends_with("weight") => (1.0, 0.1),
                _ if shape.len() == 1 => (0.0, 0.1),
                name if name.contains("position") => (0.0, 0.5),
                _ => (0.0, inputs.powf(-0.5)),
            };
            let number = |_| half::f16::from_f32(center + spread * noise()).to_le_bytes();
            (name, shape, (0..numbers).flat_map(number).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        TensorView::new(Dtype::F16, shape.clone(), data).map(|view| (name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(std::io::Error::other)?;
    let metadata = HashMap::from([("config".to_owned(), config(geometry).to_string())]);
    serialize_to_file(views, Some(metadata), path).map_err(std::io::Error::other)
}

fn shapes(geometry: &VisionGeometry) -> Vec<(String, Vec<usize>)> {
    let VisionGeometry { width, mlp_width, hidden_size, .. } = *geometry;
    let patch = geometry.patch as usize;
    let mut shapes = vec![
        ("vision_tower.embeddings.class_embedding".to_owned(), vec![width]),
        ("vision_tower.embeddings.patch_embedding.weight".to_owned(), vec![width, 3, patch, patch]),
        ("vision_tower.embeddings.position_embedding.weight".to_owned(), vec![geometry.patches() + 1, width]),
    ];
    let mut linear = |name: String, outputs: usize, inputs: usize| {
        shapes.push((format!("{name}.weight"), vec![outputs, inputs]));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    };
    for layer in 0..geometry.layers_run() {
        let name = |end: &str| format!("vision_tower.encoder.layers.{layer}.{end}");
        for part in ["q", "k", "v", "out"] {
            linear(name(&format!("self_attn.{part}_proj")), width, width);
        }
        linear(name("mlp.fc1"), mlp_width, width);
        linear(name("mlp.fc2"), width, mlp_width);
    }
    linear("multi_modal_projector.linear_1".into(), hidden_size, width * geometry.feature_layers.len());
    linear("multi_modal_projector.linear_2".into(), hidden_size, hidden_size);
    let norms = (0..geometry.layers_run()).flat_map(|layer| {
        ["layer_norm1", "layer_norm2"].map(|norm| format!("vision_tower.encoder.layers.{layer}.{norm}"))
    });
    for norm in norms.chain(["vision_tower.pre_layrnorm".to_owned()]) {
        shapes.push((format!("{norm}.weight"), vec![width]));
        shapes.push((format!("{norm}.bias"), vec![width]));
    }
    if geometry.has_newline {
        shapes.push(("image_newline".into(), vec![hidden_size]));
    }
    shapes
}

fn config(geometry: &VisionGeometry) -> serde_json::Value {
    json!({
        "model_type": match geometry.kind {
            VisionKind::Llava15 => "llava",
            VisionKind::LlavaNext => "llava_next",
        },
        "image_token_index": geometry.image_token_id,
        "image_grid_pinpoints": geometry.pinpoints,
        "vision_feature_layer": geometry.feature_layers,
        "text_config": {"hidden_size": geometry.hidden_size},
        "vision_config": {
            "hidden_size": geometry.width, "intermediate_size": geometry.mlp_width,
            "num_attention_heads": geometry.num_heads, "num_hidden_layers": geometry.num_layers,
            "image_size": geometry.tile, "patch_size": geometry.patch,
            "layer_norm_eps": geometry.layer_norm_eps,
        },
    })
}
