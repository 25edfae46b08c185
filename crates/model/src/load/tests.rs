//! Opening whole checkpoints: tiny written ones, broken ones, and the default model.

use std::path::PathBuf;

use candle_core::quantized::GgmlDType;

use super::*;
use crate::{
    config::{RopeScaling, RopeStyle},
    kv_cache::{BlockClass, CacheGeometry, SideArrays, SlotType},
    testing::{
        TinyLlama,
        gguf::{GgufFile, Item},
    },
};

fn folder_with(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn open_gguf(file: &GgufFile) -> Result<Checkpoint, Error> {
    let (_folder, path) = folder_with("m.gguf", &file.bytes());
    Checkpoint::open(&path)
}

fn tiny_folder(tiny: &TinyLlama) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny.write(folder.path()).unwrap();
    folder
}

/// The message of an error, which must be about `part`.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T, Error>, kind: &str, part: &str) {
    let error = result.expect_err("it must be refused");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(part), "{error} should mention {part}");
}

fn build_options(checkpoint: &Checkpoint, backend: Backend) -> BuildOptions {
    let cache = CachePlan {
        geometry: CacheGeometry::of(&checkpoint.config),
        slot_type: SlotType::F32,
        side: SideArrays::default(),
        classes: vec![BlockClass { capacity: 32, blocks: 1 }],
    };
    BuildOptions { backend, cache, max_batch_rows: 8, threads: 1, side_car: None }
}

#[test]
fn a_gguf_file_opens_with_its_vocabulary_template_and_end_tokens() {
    let checkpoint = open_gguf(&GgufFile::tiny(GgmlDType::Q4_1)).unwrap();
    let config = &checkpoint.config;
    assert_eq!((config.vocab_size, config.hidden_size, config.num_layers), (40, 64, 2));
    assert_eq!(config.rope.style, RopeStyle::Interleaved);
    assert!(!config.tie_embeddings);
    assert_eq!(config.eos_token_ids, [2, 0], "the named end token first, then known control tokens");
    assert_eq!(checkpoint.quantization, "Q4_1");
    assert_eq!(checkpoint.chat_template.as_deref(), Some("{{ messages }}"));
    let TokenizerSource::Gguf(vocabulary) = &checkpoint.tokenizer else { panic!("vocabulary expected") };
    assert_eq!(vocabulary.tokens.len(), 40);
    assert_eq!(vocabulary.token_types[..4], [3, 3, 3, 1]);
    assert_eq!(vocabulary.merges, ["t 3"]);
    assert_eq!((vocabulary.pre.as_deref(), vocabulary.eos_token_id), (Some("smollm"), Some(2)));
}

#[test]
fn all_types_and_versions_open_and_build() {
    use GgmlDType::{BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    for kind in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
        for version in 1..=3 {
            let mut file = GgufFile::tiny(kind);
            file.version = version;
            let checkpoint = open_gguf(&file).unwrap();
            for backend in [Backend::Reference, Backend::Cpu] {
                let model = checkpoint.build(&build_options(&checkpoint, backend)).unwrap();
                assert_eq!(model.config(), &checkpoint.config);
            }
        }
    }
}

#[test]
fn a_tied_gguf_needs_no_head() {
    let mut file = GgufFile::tiny(GgmlDType::Q8_0);
    file.tensors.retain(|entry| entry.name != "output.weight");
    assert!(open_gguf(&file).unwrap().config.tie_embeddings);
}

#[test]
fn rope_factors_come_from_their_tensor() {
    let mut file = GgufFile::tiny(GgmlDType::F32);
    let factors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
    file.push_numbers("rope_freqs.weight", &[8], &factors, GgmlDType::F32);
    assert_eq!(open_gguf(&file).unwrap().config.rope.scaling, RopeScaling::Factors(factors));
    let both = file.clone().set("llama.rope.scaling.type", "linear").set("llama.rope.scaling.factor", 2.0);
    refusal(open_gguf(&both), "config", "rope_freqs.weight");
    file.tensor("rope_freqs.weight").dims = vec![7];
    refusal(open_gguf(&file), "config", "8 are needed");
}

#[test]
fn missing_and_misshapen_tensors_are_named_with_the_expected_shape() {
    let mut file = GgufFile::tiny(GgmlDType::F32);
    file.tensor("blk.1.attn_k.weight").dims = vec![32, 64];
    refusal(open_gguf(&file), "tensor", "blk.1.attn_k.weight: has shape [64, 32]");
    refusal(open_gguf(&file), "tensor", "[32, 64]");
    file.tensors.retain(|entry| entry.name != "blk.0.ffn_norm.weight");
    refusal(
        open_gguf(&file),
        "tensor",
        "blk.0.ffn_norm.weight: is missing; the configuration asks for shape [64]",
    );
    let mut file = GgufFile::tiny(GgmlDType::F32);
    let norm = file.tensor("output_norm.weight");
    (norm.kind, norm.data) = (8, vec![0; 68]);
    refusal(open_gguf(&file), "tensor", "output_norm.weight: is stored as Q8_0");
    let mut file = GgufFile::tiny(GgmlDType::F32);
    file.tensors.retain(|entry| entry.name != "token_embd.weight");
    refusal(open_gguf(&file), "tensor", "token_embd.weight");
}

#[test]
fn unused_tensors_are_no_error() {
    let mut file = GgufFile::tiny(GgmlDType::F32);
    file.push_numbers("blk.0.extra.weight", &[2], &[0.0, 1.0], GgmlDType::F32);
    open_gguf(&file).unwrap();
}

#[test]
fn vocabularies_that_contradict_themselves_are_refused() {
    let tiny = || GgufFile::tiny(GgmlDType::F32);
    let types = tiny().set("tokenizer.ggml.token_type", Item::I32s(vec![1; 39]));
    refusal(open_gguf(&types), "config", "39 entries for 40 tokens");
    let eos = tiny().set("tokenizer.ggml.eos_token_id", 40);
    refusal(open_gguf(&eos), "config", "tokenizer.ggml.eos_token_id");
    let long = tiny().set("tokenizer.ggml.tokens", Item::Texts(vec!["a".into(); 41]));
    refusal(open_gguf(&long.without("tokenizer.ggml.token_type")), "config", "only 40 rows");
    let stated = tiny().set("llama.vocab_size", 41);
    refusal(open_gguf(&stated), "config", "llama.vocab_size");
    refusal(
        open_gguf(
            &tiny()
                .without("tokenizer.ggml.tokens")
                .without("tokenizer.ggml.token_type")
                .without("tokenizer.ggml.eos_token_id"),
        ),
        "config",
        "tokenizer.json",
    );
    let mut not_utf8 = 8u32.to_le_bytes().to_vec();
    not_utf8.extend(1u64.to_le_bytes());
    not_utf8.extend(1u64.to_le_bytes());
    not_utf8.push(0xff);
    refusal(open_gguf(&tiny().set("tokenizer.ggml.tokens", Item::Raw(9, not_utf8))), "config", "UTF-8");
    let none = open_gguf(&tiny().set("tokenizer.ggml.bos_token_id", u32::MAX)).unwrap();
    assert_eq!(none.config.bos_token_id, None);
}

#[test]
fn a_folder_opens_single_and_sharded_with_the_same_weights() {
    let tiny = TinyLlama::default();
    let single = tiny_folder(&tiny);
    let sharded = tiny_folder(&TinyLlama { shard_bytes: Some(60_000), ..tiny });
    let single = Checkpoint::open(single.path()).unwrap();
    let sharded = Checkpoint::open(sharded.path()).unwrap();
    assert!(sharded.weights.files().len() > 2);
    assert_eq!(single.config, sharded.config);
    assert_eq!(single.weight_bytes, sharded.weight_bytes);
    assert_ne!(single.fingerprint, sharded.fingerprint);
    assert_eq!(single.config.rope.style, RopeStyle::HalfSplit);
    assert_eq!(single.quantization, "f32");
    assert_eq!(single.config.eos_token_ids, [257]);
    assert!(single.chat_template.unwrap().contains("<|im_start|>assistant"));
    for name in ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"] {
        let [a, b] = [&single.weights, &sharded.weights].map(|weights| match weights.load(name).unwrap() {
            crate::ops::RawTensor::Dense(tensor) => tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            crate::ops::RawTensor::Quantized(_) => panic!("f32 expected"),
        });
        assert_eq!(a, b);
    }
    sharded.build(&build_options(&sharded, Backend::Reference)).unwrap();
}

#[test]
fn every_geometry_option_is_written_checked_and_built() {
    let qwen3 = TinyLlama::default().with("model_type", "qwen3").with("head_dim", 32);
    let qwen2 = TinyLlama::default().with("model_type", "qwen2").with("tie_word_embeddings", true);
    let biased = TinyLlama::default().with("attention_bias", true).with("mlp_bias", true);
    let mistral = TinyLlama::default().with("model_type", "mistral").with("sliding_window", 16);
    for tiny in [qwen3, qwen2, biased, mistral] {
        let folder = tiny_folder(&tiny);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        for backend in [Backend::Reference, Backend::Cpu] {
            checkpoint.build(&build_options(&checkpoint, backend)).unwrap();
        }
    }
}

#[test]
fn broken_indexes_and_shards_are_refused() {
    let tiny = TinyLlama { shard_bytes: Some(60_000), ..TinyLlama::default() };
    let with_index = |edit: &dyn Fn(&str) -> String| {
        let folder = tiny_folder(&tiny);
        let path = folder.path().join("model.safetensors.index.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, edit(&text)).unwrap();
        Checkpoint::open(folder.path())
    };
    let outside = with_index(&|text| text.replacen("\"model-00001", "\"../model-00001", 1));
    refusal(outside, "broken_file", "not the name of a .safetensors file");
    let absolute = with_index(&|text| text.replacen("\"model-00001", "\"/etc/model-00001", 1));
    refusal(absolute, "broken_file", "not the name of a .safetensors file");
    let absent = with_index(&|text| text.replacen("model-00001-of", "model-99999-of", 1));
    refusal(absent, "io", "model-99999");
    let moved = with_index(&|text| text.replacen("model-00001-of", "model-00002-of", 1));
    refusal(moved, "tensor", "it is not there");
    refusal(with_index(&|_| "{".into()), "broken_file", "model.safetensors.index.json");
    refusal(with_index(&|_| "{\"weight_map\": {}}".into()), "broken_file", "lists 0 files");

    let folder = tiny_folder(&tiny);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let [first, second] = [0, 1].map(|idx| checkpoint.weights.files()[idx].path().to_owned());
    std::fs::copy(first, second).unwrap();
    refusal(Checkpoint::open(folder.path()), "broken_file", "also in another shard");
}

#[test]
fn truncated_and_wrong_safetensors_are_refused() {
    let folder = tiny_folder(&TinyLlama::default());
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        refusal(Checkpoint::open(folder.path()), "broken_file", "safetensors");
    }
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, huge).unwrap();
    refusal(Checkpoint::open(folder.path()), "broken_file", "safetensors");
    std::fs::write(&path, whole).unwrap();
    Checkpoint::open(folder.path()).unwrap();
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    refusal(Checkpoint::open(folder.path()), "broken_file", "tokenizer.json");
}

#[test]
fn integer_weights_are_refused_by_name() {
    let folder = tiny_folder(&TinyLlama::default());
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(7).position(|window| window == b"\"dtype\"").unwrap();
    let value = at + bytes[at..].windows(3).position(|window| window == b"F32").unwrap();
    bytes[value] = b'I';
    std::fs::write(&path, bytes).unwrap();
    refusal(Checkpoint::open(folder.path()), "tensor", "supported are f32, f16, bf16");
}

#[test]
fn templates_are_found_in_each_place() {
    let folder = tiny_folder(&TinyLlama::default());
    let tokenizer_config = folder.path().join("tokenizer_config.json");
    let template = || Checkpoint::open(folder.path()).map(|checkpoint| checkpoint.chat_template);
    std::fs::write(
        &tokenizer_config,
        r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#,
    )
    .unwrap();
    assert_eq!(template().unwrap().as_deref(), Some("D"));
    std::fs::write(&tokenizer_config, r#"{"chat_template": [{"name": "x", "template": "T"}]}"#).unwrap();
    refusal(template(), "config", "default");
    std::fs::write(&tokenizer_config, r#"{"chat_template": 3}"#).unwrap();
    refusal(template(), "config", "chat_template");
    std::fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
    assert_eq!(template().unwrap().as_deref(), Some("J"));
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    std::fs::remove_file(&tokenizer_config).unwrap();
    assert_eq!(template().unwrap(), None);
}

#[test]
fn generation_config_gives_defaults_and_more_end_tokens() {
    let folder = tiny_folder(&TinyLlama::default());
    let path = folder.path().join("generation_config.json");
    std::fs::write(&path, r#"{"eos_token_id": [258, 257], "temperature": 0.6, "top_p": 0.9, "top_k": 20}"#)
        .unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config.eos_token_ids, [257, 258]);
    let expected = GenerationDefaults {
        temperature: Some(0.6),
        top_p: Some(0.9),
        top_k: Some(20),
        repetition_penalty: None,
    };
    assert_eq!(checkpoint.generation, expected);
    std::fs::write(&path, r#"{"top_k": -1}"#).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().generation.top_k, Some(0));
    std::fs::write(&path, r#"{"repetition_penalty": 0}"#).unwrap();
    refusal(Checkpoint::open(folder.path()), "config", "repetition_penalty");
}

#[test]
fn a_folder_with_one_gguf_opens_and_with_several_asks_which() {
    let bytes = GgufFile::tiny(GgmlDType::Q8_0).bytes();
    let (folder, _) = folder_with("a.gguf", &bytes);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().quantization, "Q8_0");
    std::fs::write(folder.path().join("b.gguf"), &bytes).unwrap();
    refusal(Checkpoint::open(folder.path()), "broken_file", "a.gguf, b.gguf");
    let empty = tempfile::tempdir().unwrap();
    refusal(Checkpoint::open(empty.path()), "broken_file", "config.json");
    refusal(Checkpoint::open(&empty.path().join("absent")), "io", "absent");
    let (_folder, not_gguf) = folder_with("x.gguf", b"hello");
    refusal(Checkpoint::open(&not_gguf), "broken_file", "GGUF");
    let (_folder, nothing) = folder_with("y.gguf", b"");
    assert!(Checkpoint::open(&nothing).is_err());
}

#[test]
fn a_plan_for_another_model_is_refused() {
    let checkpoint = open_gguf(&GgufFile::tiny(GgmlDType::F32)).unwrap();
    let mut options = build_options(&checkpoint, Backend::Reference);
    options.cache.geometry.num_layers = 3;
    refusal(checkpoint.build(&options).map(|_| ()), "plan", "planned for");
    let options = BuildOptions { max_batch_rows: 0, ..build_options(&checkpoint, Backend::Reference) };
    refusal(checkpoint.build(&options).map(|_| ()), "plan", "max_batch_rows");
}

#[test]
fn the_default_model_opens_with_its_known_geometry() {
    let checkpoint = Checkpoint::open(&crate::testing::default_model()).unwrap();
    let config = &checkpoint.config;
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (49152, 576, 1536));
    assert_eq!((config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim), (30, 9, 3, 64));
    assert_eq!((config.max_position, config.rope.theta, config.rope.rotary_dim), (8192, 100_000.0, 64));
    assert!(config.tie_embeddings && !config.qkv_bias && !config.qk_norm);
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[2, 0][..], Some(1)));
    assert_eq!(checkpoint.quantization, "Q4_1");
    let TokenizerSource::Gguf(vocabulary) = &checkpoint.tokenizer else { panic!("vocabulary expected") };
    assert_eq!((vocabulary.tokens.len(), vocabulary.merges.len()), (49152, 48900));
    assert!(checkpoint.chat_template.is_some());
}

#[test]
fn the_planned_bytes_of_the_default_model_are_within_3_percent_of_what_is_held() {
    let checkpoint = Checkpoint::open(&crate::testing::default_model()).unwrap();
    for backend in [Backend::Cpu, Backend::Reference] {
        let options = BuildOptions { max_batch_rows: 64, ..build_options(&checkpoint, backend) };
        let held = checkpoint.build(&options).unwrap().memory();
        let held = held.weights + held.workspace;
        let logits = 64 * 4 * checkpoint.config.vocab_size as u64;
        let planned = checkpoint.planned_bytes(backend, 64) - logits;
        assert!(planned.abs_diff(held) * 100 < held * 3, "{backend:?}: planned {planned}, held {held}");
    }
}

#[test]
fn scratch_for_stacked_matrices_without_a_kernel_is_planned() {
    // 64 columns, so no K types: Q5_1 has no kernel either.
    let mut mixed = GgufFile::tiny(GgmlDType::Q8_0);
    let others = GgufFile::tiny(GgmlDType::Q5_1);
    for name in ["blk.1.attn_q.weight", "blk.1.ffn_up.weight"] {
        *mixed.tensor(name) = others.tensors.iter().find(|entry| entry.name == name).unwrap().clone();
    }
    for (file, scratch) in [(mixed, 96), (others, 0)] {
        let checkpoint = open_gguf(&file).unwrap();
        assert_eq!(build::scratch_width(&checkpoint), scratch);
        // Another batch size changes what is held as planned, logits apart.
        let bytes = |rows: usize| {
            let options = BuildOptions { max_batch_rows: rows, ..build_options(&checkpoint, Backend::Cpu) };
            let logits = rows * 4 * checkpoint.config.vocab_size;
            let planned = checkpoint.planned_bytes(Backend::Cpu, rows) - logits as u64;
            (checkpoint.build(&options).unwrap().memory().workspace, planned)
        };
        let ((held, planned), (more_held, more_planned)) = (bytes(8), bytes(40));
        assert_eq!(more_held - held, more_planned - planned);
    }
}
