//! Opening a GGUF file: geometry, vocabulary and template from its metadata.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::{Checkpoint, Fingerprint, GenerationDefaults, GgufVocabulary, TokenizerSource};
use crate::{
    Error,
    config::gguf::{TensorFacts, read, set_special_tokens},
    weights::{
        MappedFile, StoredType, TensorInfo, WeightFiles,
        gguf::{Header, Metadata, parse},
        names::Naming,
    },
};

const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Texts that end a turn or a document wherever they are control tokens. The metadata names one end
/// token, two at best, but chat models stop on others as well: Llama 3 on `<|eot_id|>`, ChatML
/// models on `<|im_end|>`, and all on the document separator that they were pre-trained with.
const END_TEXTS: [&str; 6] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"];

/// `tokenizer.ggml.token_type` of control tokens.
const CONTROL: i32 = 3;

/// Opens `file`, which was found at `path` (itself, or the folder that it is in).
pub(super) fn open(path: &Path, file: MappedFile) -> Result<Checkpoint, Error> {
    let Header { metadata, tensors, header_bytes } =
        parse(file.bytes()).map_err(|reason| file.broken("GGUF", reason))?;
    let vocabulary = vocabulary(&metadata)?;
    let has = |name: &str| tensors.contains_key(name);
    let facts = TensorFacts {
        vocab_size: vocab_size(&metadata, tensors.get("token_embd.weight"), &vocabulary)?,
        has_head: has("output.weight"),
        qkv_bias: has("blk.0.attn_q.bias"),
        output_bias: has("blk.0.attn_output.bias"),
        mlp_bias: has("blk.0.ffn_gate.bias"),
        rope_factors: tensors.get(ROPE_FACTORS).map(|info| rope_factors(&file, info)).transpose()?,
    };
    let mut config = read(&metadata, facts)?;
    let eos = end_tokens(&metadata, &vocabulary)?;
    set_special_tokens(&mut config, eos, vocabulary.bos_token_id);
    let mut fingerprint = Fingerprint::new();
    fingerprint.add_file(file.bytes(), header_bytes);
    let chat_template = metadata.str("tokenizer.chat_template")?.map(str::to_owned);
    let tokenizer = tokenizer(&file, vocabulary)?;
    let weights = WeightFiles::new(vec![file], tensors);
    Ok(Checkpoint {
        path: path.to_owned(),
        config,
        tokenizer,
        chat_template,
        generation: GenerationDefaults::default(),
        quantization: weights.most_frequent_type().to_owned(),
        weight_bytes: weights.total_bytes(),
        fingerprint: fingerprint.hex(),
        weights,
        naming: Naming::Gguf,
    })
}

/// The vocabulary in the file, or a `tokenizer.json` beside a file without one.
fn tokenizer(file: &MappedFile, vocabulary: GgufVocabulary) -> Result<TokenizerSource, Error> {
    if !vocabulary.tokens.is_empty() {
        return Ok(TokenizerSource::Gguf(vocabulary));
    }
    let json = file.path().with_file_name("tokenizer.json");
    if json.is_file() {
        return Ok(TokenizerSource::Json(json));
    }
    Err(Error::Config {
        field: "tokenizer.ggml.tokens".into(),
        reason: "is absent, and there is no tokenizer.json beside the file".into(),
    })
}

fn vocabulary(metadata: &Metadata<'_>) -> Result<GgufVocabulary, Error> {
    const TYPES: &str = "tokenizer.ggml.token_type";
    const SCORES: &str = "tokenizer.ggml.scores";
    let strings = |key: &str| metadata.array(key)?.map_or(Ok(Vec::new()), |array| array.strings(key));
    let tokens = strings("tokenizer.ggml.tokens")?;
    let token_types = match metadata.array(TYPES)? {
        None => Vec::new(),
        Some(array) => {
            let types = array.whole_numbers(TYPES)?;
            types.into_iter().map(|kind| i32::try_from(kind).unwrap_or(0)).collect()
        }
    };
    let scores = metadata.array(SCORES)?.map_or(Ok(Vec::new()), |array| array.floats(SCORES))?;
    for (key, len) in [(TYPES, token_types.len()), (SCORES, scores.len())] {
        if len != 0 && len != tokens.len() {
            let reason = format!("has {len} entries for {} tokens", tokens.len());
            return Err(Error::Config { field: key.into(), reason });
        }
    }
    let id = |name: &str| -> Result<Option<u32>, Error> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = metadata.u32(&key)?;
        match id {
            // Converters write -1, as an unsigned number, for "none".
            None | Some(u32::MAX) => Ok(None),
            Some(id) if (id as usize) < tokens.len() || tokens.is_empty() => Ok(Some(id)),
            Some(id) => {
                let reason = format!("is {id}, outside of the {} tokens", tokens.len());
                Err(Error::Config { field: key, reason })
            }
        }
    };
    Ok(GgufVocabulary {
        model: metadata.str("tokenizer.ggml.model")?.unwrap_or_default().to_owned(),
        pre: metadata.str("tokenizer.ggml.pre")?.map(str::to_owned),
        merges: strings("tokenizer.ggml.merges")?,
        bos_token_id: id("bos")?,
        eos_token_id: id("eos")?,
        unknown_token_id: id("unknown")?,
        add_bos_token: metadata.bool("tokenizer.ggml.add_bos_token")?,
        add_eos_token: metadata.bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
        tokens,
        token_types,
        scores,
    })
}

/// Rows of the embedding; the metadata must not contradict them.
fn vocab_size(
    metadata: &Metadata<'_>,
    embedding: Option<&TensorInfo>,
    vocabulary: &GgufVocabulary,
) -> Result<usize, Error> {
    let missing = || Error::Tensor {
        name: "token_embd.weight".into(),
        reason: "is missing; its shape [vocabulary, width] gives the vocabulary's size".into(),
    };
    let rows = *embedding.and_then(|info| info.shape.first()).ok_or_else(missing)?;
    if vocabulary.tokens.len() > rows {
        return Err(Error::Config {
            field: "tokenizer.ggml.tokens".into(),
            reason: format!(
                "has {} entries, but token_embd.weight only {rows} rows",
                vocabulary.tokens.len()
            ),
        });
    }
    if let Some(architecture) = metadata.str("general.architecture")? {
        let key = format!("{architecture}.vocab_size");
        if let Some(stated) = metadata.usize(&key)?.filter(|&stated| stated != rows) {
            let reason = format!("is {stated}, but token_embd.weight has {rows} rows");
            return Err(Error::Config { field: key, reason });
        }
    }
    Ok(rows)
}

/// `eos_token_id`, then `eot_token_id` and `eom_token_id`, then the control tokens of
/// [`END_TEXTS`]; duplicates are dropped by the caller.
fn end_tokens(metadata: &Metadata<'_>, vocabulary: &GgufVocabulary) -> Result<Vec<u32>, Error> {
    let mut ids: Vec<u32> = vocabulary.eos_token_id.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(metadata.u32(key)?.filter(|&id| id != u32::MAX));
    }
    let is_control = |id: usize| vocabulary.token_types.get(id) == Some(&CONTROL);
    let known = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, text)| is_control(*id) && END_TEXTS.contains(&text.as_str()));
    ids.extend(known.filter_map(|(id, _)| u32::try_from(id).ok()));
    Ok(ids)
}

fn rope_factors(file: &MappedFile, info: &TensorInfo) -> Result<Vec<f32>, Error> {
    let wrong = |reason: String| Error::Tensor { name: ROPE_FACTORS.into(), reason };
    if info.stored != StoredType::F32 || info.shape.len() != 1 {
        return Err(wrong(format!(
            "has shape {:?} of {}; one dimension of f32 is expected",
            info.shape,
            info.stored.name()
        )));
    }
    let bytes = file.bytes().get(info.start..info.start + info.len);
    let bytes = bytes.ok_or_else(|| wrong("lies outside of the file".into()))?;
    let tensor = Tensor::from_raw_buffer(bytes, candle_core::DType::F32, &info.shape, &Device::Cpu)?;
    Ok(tensor.to_vec1()?)
}
