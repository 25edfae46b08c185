//! Published forms of configurations, and what is refused.

use serde_json::json;

use super::*;
use crate::geometry::testing;

fn shapes() -> TowerShapes {
    TowerShapes { width: 1024, patch: 14, positions: 577, mlp_width: 4096, num_layers: 24, hidden_size: 4096 }
}

#[test]
fn llava_next_as_published() {
    let config = json!({
        "model_type": "llava_next", "image_token_index": 32000, "vision_feature_layer": -2,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "text_config": {}, "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14}
    });
    let preprocessor = json!({
        "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 0.00392156862745098
    });
    let geometry = read(&config, Some(&preprocessor), shapes()).unwrap();
    assert_eq!(geometry, testing::llava_next_7b());
    assert_eq!((geometry.max_tokens(), geometry.max_tiles(), geometry.layers_run()), (2928, 5, 23));
}

#[test]
fn absent_keys_mean_the_defaults_of_the_class() {
    let config = json!({"model_type": "llava", "text_config": {}});
    let geometry = read(&config, None, shapes()).unwrap();
    assert_eq!(geometry, testing::llava_15_7b());
    let pad = read(&config, Some(&json!({"do_pad": true})), shapes()).unwrap();
    assert_eq!(pad.base_fit, BaseFit::Pad);
}

#[test]
fn the_original_repository_goes_by_shapes_and_by_width_first() {
    let config = json!({
        "model_type": "llava_llama", "mm_vision_select_layer": -2, "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
        "image_grid_pinpoints": [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
    });
    let geometry = read(&config, None, shapes()).unwrap();
    assert_eq!(geometry, VisionGeometry { image_token_id: None, ..testing::llava_next_7b() });
    let config = json!({"model_type": "llava_llama", "image_aspect_ratio": "pad"});
    assert_eq!(read(&config, None, shapes()).unwrap().base_fit, BaseFit::Pad);
}

#[test]
fn several_feature_layers() {
    let config = json!({"model_type": "llava", "text_config": {}, "vision_feature_layer": [-2, -5, 8, 6]});
    let geometry = read(&config, None, shapes()).unwrap();
    assert_eq!((geometry.feature_layers.as_slice(), geometry.layers_run()), (&[23, 20, 8, 6][..], 23));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let refuse = |key: &str, value: Value, field: &str| {
        let mut config = json!({"model_type": "llava_next", "text_config": {}, "vision_config": {
            "hidden_size": 1024, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24,
            "num_attention_heads": 16}});
        match key.split_once('.') {
            Some((outer, inner)) => config[outer][inner] = value,
            None => config[key] = value,
        }
        let error = read(&config, None, shapes()).unwrap_err().to_string();
        assert!(error.contains(field), "{error} should mention {field}");
    };
    refuse("vision_feature_select_strategy", json!("full"), "vision_feature_select_strategy");
    refuse("vision_feature_layer", json!(-26), "vision_feature_layer");
    refuse("vision_feature_layer", json!(0), "vision_feature_layer");
    refuse("vision_feature_layer", json!("last"), "vision_feature_layer");
    refuse("projector_hidden_act", json!("relu"), "projector_hidden_act");
    refuse("image_grid_pinpoints", json!([[336, 500]]), "image_grid_pinpoints");
    refuse("image_grid_pinpoints", json!([[336]]), "image_grid_pinpoints");
    refuse("image_grid_pinpoints", json!([]), "image_grid_pinpoints");
    refuse("vision_config.model_type", json!("siglip_vision_model"), "siglip_vision_model");
    refuse("vision_config.patch_size", json!(13), "patch_size");
    refuse("vision_config.patch_size", json!(0), "patch_size");
    refuse("vision_config.image_size", json!(4_000_000_000u32), "image_size");
    refuse("vision_config.num_attention_heads", json!(7), "num_attention_heads");
    let config = json!({"model_type": "llava", "text_config": {}});
    for (preprocessor, field) in [
        (json!({"resample": 2}), "resample"),
        (json!({"do_normalize": false}), "do_normalize"),
        (json!({"size": {"shortest_edge": 224}}), "size"),
        (json!({"image_std": [0, 1, 1]}), "image_std"),
        (json!({"image_mean": [0, 1]}), "image_mean"),
    ] {
        let error = read(&config, Some(&preprocessor), shapes()).unwrap_err().to_string();
        assert!(error.contains(field), "{error} should mention {field}");
    }
}
