//! The whole image path against transformers' `LlavaNextForConditionalGeneration` and
//! `LlavaForConditionalGeneration`, in every layout of tensor names: tower, projector, packing, and logits of
//! our decoder with the image's rows in place of the placeholder's.
//!
//! Tolerances: ours and theirs are both f32, which orders sums differently; features agree to 2e-5 of their
//! largest, shares of attention to 1e-5, logits to 1e-4.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use locket_model::{
    Batch, BlockId,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
};
use locket_vision::{
    DecodeLimits, EncodedImage, OpenOptions, Place, VisionKind, VisionModel, Wants, decode,
    model::{PatchMerge, TileStates},
};
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llava").join(name)
}

fn read_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

/// Tensor names of a checkpoint, from those of the newer Hugging Face layout.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    Newer,
    Older,
    Original,
}

impl Layout {
    fn name(self, name: &str) -> String {
        let tower = |front: &str, rest: &str| format!("{front}{rest}");
        match self {
            Self::Newer => name.to_owned(),
            Self::Older => {
                let inner = name.strip_prefix("model.").unwrap_or(name);
                if let Some(rest) = inner.strip_prefix("vision_tower.") {
                    tower("vision_tower.vision_model.", rest)
                } else if let Some(rest) = inner.strip_prefix("language_model.") {
                    format!("language_model.model.{rest}")
                } else if name == "lm_head.weight" {
                    "language_model.lm_head.weight".into()
                } else {
                    inner.to_owned()
                }
            }
            Self::Original => {
                let inner = name.strip_prefix("model.").unwrap_or(name);
                if let Some(rest) = inner.strip_prefix("vision_tower.") {
                    tower("model.vision_tower.vision_tower.vision_model.", rest)
                } else if let Some(rest) = inner.strip_prefix("language_model.") {
                    format!("model.{rest}")
                } else if let Some(rest) = inner.strip_prefix("multi_modal_projector.linear_1") {
                    format!("model.mm_projector.0{rest}")
                } else if let Some(rest) = inner.strip_prefix("multi_modal_projector.linear_2") {
                    format!("model.mm_projector.2{rest}")
                } else {
                    name.to_owned()
                }
            }
        }
    }
}

/// A checkpoint's folder in a layout, without the tensors that `leave_out` names.
fn folder(config: &Value, layout: Layout, leave_out: impl Fn(&str) -> bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(golden("../tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let bytes = std::fs::read(golden("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.tensors().into_iter().filter(|(name, _)| !leave_out(name));
    let tensors: Vec<_> = tensors.map(|(name, view)| (layout.name(&name), view)).collect();
    serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

/// The original repository's configuration: the decoder's keys at the top, pinpoints by width.
fn original_config() -> Value {
    let next = read_json("next.json");
    let mut config = next["text_config"].clone();
    for (key, value) in [
        ("model_type", json!("llava_llama")),
        ("mm_vision_select_layer", json!(-2)),
        ("mm_vision_select_feature", json!("patch")),
        ("mm_projector_type", json!("mlp2x_gelu")),
        ("mm_patch_merge_type", json!("spatial_unpad")),
        ("image_aspect_ratio", json!("anyres")),
        ("image_grid_pinpoints", json!([[48, 24], [24, 48], [48, 48], [24, 72], [72, 24]])),
    ] {
        config[key] = value;
    }
    config
}

fn open(path: &Path) -> VisionModel {
    VisionModel::open(path, &OpenOptions { threads: 2, ..OpenOptions::default() }).unwrap()
}

struct Expected(Vec<u8>);

impl Expected {
    fn read() -> Self {
        Self(std::fs::read(golden("expected.safetensors")).unwrap())
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F32);
        view.data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

fn image(name: &str) -> locket_vision::RgbImage {
    let bytes = std::fs::read(golden("images.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    decode(tensors.tensor(&format!("{name}.file")).unwrap().data(), &DecodeLimits::default()).unwrap()
}

fn encode(model: &VisionModel, name: &str) -> EncodedImage {
    model.encode(&image(name), Wants { cls_attention: true, ..Wants::default() }).unwrap()
}

#[track_caller]
fn close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let scale = theirs.iter().fold(0f32, |most, x| most.max(x.abs()));
    let most = ours.iter().zip(theirs).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(most <= tolerance * scale, "{what}: differs by {most}, of at most {scale}");
}

fn compare(model: &VisionModel, name: &str, kind: &str) -> EncodedImage {
    let expected = Expected::read();
    let encoded = encode(model, name);
    let value = |part: &str| expected.numbers(&format!("{name}.{kind}.{part}"));
    close(&format!("{name}.{kind} features"), &encoded.features, &value("features"), 2e-5);
    close(&format!("{name}.{kind} initial"), &encoded.cls_initial, &value("cls_initial"), 1e-5);
    close(&format!("{name}.{kind} final"), &encoded.cls_final, &value("cls_final"), 1e-5);
    encoded
}

/// Logits of the last eight positions with the image's rows in place of the placeholder's.
fn compare_logits(folder: &Path, encoded: &EncodedImage, name: &str, backend: Backend) {
    let expected = Expected::read();
    let ids = expected.ids(&format!("{name}.ids"));
    let checkpoint = Checkpoint::open(folder).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let capacity = 512;
    let cache = CachePlan {
        geometry,
        slot_type: SlotType::F32,
        side: SideArrays::default(),
        classes: vec![BlockClass { capacity, blocks: 1 }],
    };
    let options = BuildOptions { backend, cache, max_batch_rows: 512, threads: 1, side_car: None };
    let mut model = checkpoint.build(&options).unwrap();
    model.open_block(BlockId(0), CacheSettings::full(capacity)).unwrap();
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &ids, false);
    let tokens = encoded.layout.tokens() as u32;
    batch.embed(4..4 + tokens, &encoded.features, 0);
    batch.sample_rows = (ids.len() as u32 - 8..ids.len() as u32).collect();
    let mut logits = Vec::new();
    model.forward(&batch, &mut logits).unwrap();
    // The CPU backend rounds activations of f16 weights in its own way.
    let tolerance = if backend == Backend::Reference { 1e-4 } else { 2e-3 };
    close(&format!("{name} {backend:?}"), &logits, &expected.numbers(&format!("{name}.logits")), tolerance);
}

#[test]
fn llava_next_in_hugging_faces_layouts() {
    for (config, layout) in [
        (read_json("next.json"), Layout::Newer),
        (read_json("next.json"), Layout::Older),
        (read_json("next.old.json"), Layout::Older),
    ] {
        let folder = folder(&config, layout, |_| false);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!((checkpoint.config.num_layers, checkpoint.config.tie_embeddings), (2, false));
        let model = open(folder.path());
        assert_eq!(model.geometry().kind, VisionKind::LlavaNext);
        assert_eq!(
            (model.geometry().feature_layers.as_slice(), model.geometry().image_token_id),
            (&[3][..], Some(57))
        );
        model.check_decoder(checkpoint.config.hidden_size).unwrap();
        assert!(model.check_decoder(33).is_err());
        for name in ["wide", "odd"] {
            let encoded = compare(&model, name, "next");
            for backend in [Backend::Reference, Backend::Cpu] {
                compare_logits(folder.path(), &encoded, &format!("{name}.next"), backend);
            }
        }
    }
}

/// There the tower's configuration is known by its name only, and all of CLIP's heads are 64 wide: this narrow
/// one has a single head, as the same tensors under Hugging Face's names are told.
#[test]
fn llava_next_in_the_original_layout() {
    let original = folder(&original_config(), Layout::Original, |_| false);
    let model = open(original.path());
    let mut config = read_json("next.json");
    config["vision_config"]["num_attention_heads"] = json!(1);
    let newer = folder(&config, Layout::Newer, |_| false);
    let same = open(newer.path());
    assert_eq!(model.geometry().image_token_id, None);
    let image_token_id = same.geometry().image_token_id;
    assert_eq!(
        &locket_vision::VisionGeometry { image_token_id, ..model.geometry().clone() },
        same.geometry()
    );
    for name in ["wide", "odd"] {
        assert_eq!(encode(&model, name), encode(&same, name));
    }
    let two_heads = folder(&read_json("next.json"), Layout::Newer, |_| false);
    let encoded = encode(&open(two_heads.path()), "odd");
    compare_logits(original.path(), &encoded, "odd.next", Backend::Reference);
}

#[test]
fn llava_15() {
    let newline = |name: &str| name == "model.image_newline";
    for layout in [Layout::Newer, Layout::Older] {
        let folder = folder(&read_json("llava.json"), layout, newline);
        let model = open(folder.path());
        assert_eq!(model.geometry().kind, VisionKind::Llava15);
        let encoded = compare(&model, "wide", "llava");
        compare_logits(folder.path(), &encoded, "wide.llava", Backend::Reference);
    }
}

/// candle-transformers 0.11.1 takes the output of the layer behind the one that is meant.
#[test]
fn feature_layer_minus_two_is_the_last_but_one() {
    let config = read_json("next.json");
    // The last layer is not even needed.
    let without = folder(&config, Layout::Newer, |name| name.contains("vision_tower.encoder.layers.3."));
    let features = compare(&open(without.path()), "odd", "next").features;
    let mut last = config;
    last["vision_feature_layer"] = json!(-1);
    let folder = folder(&last, Layout::Newer, |_| false);
    let model = open(folder.path());
    assert_eq!(model.geometry().layers_run(), 4);
    let other = encode(&model, "odd").features;
    let differs = features.iter().zip(other.iter()).any(|(a, b)| (a - b).abs() > 0.1);
    assert!(differs, "the two layers are not the same");
}

/// A file beside a decoder of another format: geometry in its metadata, matrices at 8 bits.
#[test]
fn a_vision_file_of_its_own_at_8_bits() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("vision.safetensors");
    let bytes = std::fs::read(golden("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let half = |pair: &[u8]| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32();
    let mut stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, view) in tensors.tensors() {
        if name.contains("language_model") || name.contains("lm_head") {
            continue;
        }
        let name = name.strip_prefix("model.").unwrap().to_owned();
        let is_matrix = view.shape().len() == 2 && name.ends_with(".weight") && !name.contains("position");
        if !is_matrix {
            stored.push((name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            continue;
        }
        let (rows, cols) = (view.shape()[0], view.shape()[1]);
        let numbers: Vec<f32> = view.data().chunks_exact(2).map(half).collect();
        // One scale per output for some, one per 16 inputs for the others.
        let block = if name.contains("mlp") { cols } else { 16 };
        let (mut levels, mut scales) = (Vec::new(), Vec::new());
        for block in numbers.chunks_exact(block) {
            let scale = block.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            scales.extend(scale.to_le_bytes());
            levels.extend(block.iter().map(|x| ((x / scale).round() as i8).cast_unsigned()));
        }
        let scale_shape = if block == cols { vec![rows] } else { vec![rows, cols / 16] };
        stored.push((format!("{name}.scale"), Dtype::F32, scale_shape, scales));
        stored.push((name, Dtype::I8, vec![rows, cols], levels));
    }
    let views = stored.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let metadata = HashMap::from([("config".to_owned(), read_json("next.json").to_string())]);
    serialize_to_file(views.collect::<Vec<_>>(), Some(metadata), &path).unwrap();
    let model = open(&path);
    assert_eq!((model.geometry().image_token_id, model.geometry().hidden_size), (Some(57), 32));
    let encoded = encode(&model, "odd");
    let theirs = Expected::read().numbers("odd.next.features");
    close("8 bits", &encoded.features, &theirs, 0.05);
}

#[test]
fn what_is_missing_is_named() {
    let options = OpenOptions::default();
    let refusal = |path: &Path| VisionModel::open(path, &options).unwrap_err();
    let config = read_json("next.json");
    let newline = folder(&config, Layout::Newer, |name| name == "model.image_newline");
    assert!(refusal(newline.path()).to_string().contains("image_newline"));
    let layer = folder(&config, Layout::Newer, |name| name.contains("layers.1.mlp.fc2.bias"));
    assert!(refusal(layer.path()).to_string().contains("layers.1.mlp.fc2.bias"));
    let tower = folder(&config, Layout::Newer, |name| name.contains("vision_tower"));
    assert_eq!(refusal(tower.path()).kind(), "no_vision");
    let text = folder(&read_json("next.json")["text_config"], Layout::Newer, |_| false);
    assert_eq!(refusal(text.path()).kind(), "no_vision");
    let mut wide = config;
    wide["vision_config"]["hidden_size"] = json!(64);
    let wide = folder(&wide, Layout::Newer, |_| false);
    assert!(refusal(wide.path()).to_string().contains("shape [32]"));
    assert_eq!(refusal(Path::new("/nonexistent.safetensors")).kind(), "io");
}

/// Merges the first two patches of the first window of every tile, or whatever it is told.
struct Merge(Vec<Vec<u32>>);

impl PatchMerge for Merge {
    fn groups(&self, states: TileStates<'_>) -> Vec<Vec<Vec<u32>>> {
        assert_eq!(states.states.len(), states.tiles * states.side * states.side * states.width);
        vec![self.0.clone(); states.tiles]
    }
}

/// Merged patches take the place of the first; the others are absent, and nothing else moves.
#[test]
fn patches_merge_behind_the_first_layer() {
    let folder = folder(&read_json("next.json"), Layout::Newer, |_| false);
    let model = open(folder.path());
    let image = image("square");
    let encode = |groups: Vec<Vec<u32>>| {
        let merge = Merge(groups);
        let wants =
            Wants { cls_attention: true, patch_features: true, merge: Some(&merge), ..Wants::default() };
        model.encode(&image, wants)
    };
    let whole = model.encode(&image, Wants { cls_attention: true, patch_features: true, ..Wants::default() });
    let whole = whole.unwrap();
    let none = encode(vec![]).unwrap();
    assert_eq!(none.features, whole.features, "no group: no difference");
    assert_eq!(none.present.as_ref().map(Vec::len), Some(whole.layout.tokens()));
    let merged = encode(vec![vec![0, 1, 6, 7], vec![20, 21]]).unwrap();
    let present = merged.present.clone().unwrap();
    let layout = &merged.layout;
    for token in 0..layout.tokens() {
        let place = layout.place(token).unwrap();
        let patch = layout.source(place).map(|(_, patch)| patch);
        let is_present = !matches!(patch, Some(1 | 6 | 7 | 21));
        assert_eq!(present.binary_search(&(token as u32)).is_ok(), is_present, "{place:?}");
        let row = &merged.features[token * 32..][..32];
        assert_eq!(row.iter().any(|&x| x != 0.0), is_present);
        if let Place::Newline { .. } = place {
            assert_eq!(row, &whole.features[token * 32..][..32]);
        }
    }
    assert_eq!(merged.cls_initial, whole.cls_initial);
    assert_eq!((merged.cls_final[1], merged.cls_final.len()), (0.0, whole.cls_final.len()));
    assert_eq!(merged.patch_features.len(), whole.patch_features.len());
    for wrong in [vec![vec![1, 0]], vec![vec![3]], vec![vec![0, 1], vec![1, 2]], vec![vec![0, 36]]] {
        assert_eq!(encode(wrong).unwrap_err().kind(), "invalid_plan");
    }
}

/// Many callers at once get the bits of one, and the base alone is the base of the whole.
#[test]
fn concurrent_and_partial_encodings() {
    let folder = folder(&read_json("next.json"), Layout::Newer, |_| false);
    let model = Arc::new(open(folder.path()));
    let alone = encode(&model, "wide");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let model = Arc::clone(&model);
            std::thread::spawn(move || encode(&model, "wide"))
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), alone);
    }
    let base = model.encode(&image("wide"), Wants { base_only: true, ..Wants::default() }).unwrap();
    assert_eq!(base.layout.tokens(), 36);
    close("base", &base.features, &alone.features[..36 * 32], 1e-5);
}
