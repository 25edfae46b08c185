//! Tokenizers from the vocabulary inside a GGUF file: kinds `gpt2` and `llama`.

use std::collections::HashMap;

use locket_model::load::GgufVocabulary;
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Vocab},
    normalizers::NFC,
};

use crate::{
    Error,
    pre_tokenizer::PreTokenizer,
    sentencepiece,
    token_table::{TokenEntry, byte_level_bytes, hex_byte, sentencepiece_bytes},
    tokenizer::BuiltTokenizer,
};

/// `tokenizer.ggml.token_type`, the values that matter.
pub(crate) mod token_type {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const BYTE: i32 = 6;
}

/// Builds the tokenizer.
///
/// # Errors
/// [`Error::Tokenizer`] for another kind, an unknown pre-tokenizer, lists whose lengths differ,
/// duplicate tokens, merges of unknown tokens, ids out of range.
pub(crate) fn build(vocabulary: &GgufVocabulary) -> Result<BuiltTokenizer, Error> {
    check(vocabulary)?;
    let mut built = match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary)?,
        "llama" => sentencepiece::build(vocabulary)?,
        other => {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.model is '{other}'; known are 'gpt2' (byte-level byte-pair) and 'llama' \
                 (SentencePiece)"
            )));
        }
    };
    // The converter may have marked nothing but the ids.
    let named = [vocabulary.bos_token_id, vocabulary.eos_token_id, vocabulary.unknown_token_id];
    if vocabulary.token_types.is_empty() {
        for id in named.into_iter().flatten() {
            built.entries[id as usize].is_special = true;
        }
    }
    add_tokens(vocabulary, &mut built)?;
    Ok(built)
}

/// The type of a token; files without types have normal tokens only.
pub(crate) fn type_of(vocabulary: &GgufVocabulary, id: usize) -> i32 {
    vocabulary.token_types.get(id).copied().unwrap_or(token_type::NORMAL)
}

/// The vocabulary as a map, and an error for the first duplicate.
pub(crate) fn token_ids(tokens: &[String]) -> Result<Vocab, Error> {
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
    for (id, token) in (0_u32..).zip(tokens) {
        if let Some(first) = ids.insert(token, id) {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.tokens: {first} and {id} are both {token:?}; each token may occur once"
            )));
        }
    }
    Ok(ids.into_iter().map(|(token, id)| (token.to_string(), id)).collect())
}

fn check(vocabulary: &GgufVocabulary) -> Result<(), Error> {
    let num_tokens = vocabulary.tokens.len();
    if num_tokens == 0 || u32::try_from(num_tokens).is_err() {
        return Err(Error::Tokenizer(format!("tokenizer.ggml.tokens has {num_tokens} entries")));
    }
    let lists = [("token_type", vocabulary.token_types.len()), ("scores", vocabulary.scores.len())];
    for (name, len) in lists {
        if len != 0 && len != num_tokens {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.{name} has {len} entries for {num_tokens} tokens; it needs one per token"
            )));
        }
    }
    let ids = [
        ("bos_token_id", vocabulary.bos_token_id),
        ("eos_token_id", vocabulary.eos_token_id),
        ("unknown_token_id", vocabulary.unknown_token_id),
    ];
    for (name, id) in ids {
        if let Some(id) = id.filter(|id| *id as usize >= num_tokens) {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.{name} is {id}, but the vocabulary ends at {}",
                num_tokens - 1
            )));
        }
    }
    Ok(())
}

/// Kind `gpt2`: byte-level byte-pair encoding with ranked merges.
fn byte_level(vocabulary: &GgufVocabulary) -> Result<BuiltTokenizer, Error> {
    let pre_tokenizer = PreTokenizer::named(vocabulary.pre.as_deref())?;
    let ids = token_ids(&vocabulary.tokens)?;
    let merges = merges(vocabulary, &ids)?;
    let bpe = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre_tokenizer.ignore_merges)
        .build()
        .map_err(|error| Error::Tokenizer(error.to_string()))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    if pre_tokenizer.composes {
        tokenizer.with_normalizer(Some(NFC)).map_err(|error| Error::Tokenizer(error.to_string()))?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer.build()?));

    let entries = vocabulary.tokens.iter().enumerate().map(|(id, token)| match type_of(vocabulary, id) {
        token_type::CONTROL | token_type::UNKNOWN => {
            TokenEntry { bytes: token.clone().into_bytes(), is_special: true }
        }
        token_type::USER_DEFINED => TokenEntry { bytes: token.clone().into_bytes(), is_special: false },
        _ => TokenEntry { bytes: byte_level_bytes(token), is_special: false },
    });
    let adds_bos = vocabulary.add_bos_token.unwrap_or(pre_tokenizer.add_bos);
    Ok(BuiltTokenizer {
        entries: entries.collect(),
        before: edge_token("add_bos_token", adds_bos, vocabulary.bos_token_id)?,
        after: edge_token("add_eos_token", vocabulary.add_eos_token == Some(true), vocabulary.eos_token_id)?,
        strips_leading_space: false,
        tokenizer,
    })
}

/// The token to add at an edge of the text.
pub(crate) fn edge_token(flag: &str, is_added: bool, id: Option<u32>) -> Result<Option<u32>, Error> {
    match (is_added, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some(id)),
        (true, None) => Err(Error::Tokenizer(format!(
            "tokenizer.ggml.{flag} asks for a token, but tokenizer.ggml.{} is absent",
            if flag == "add_bos_token" { "bos_token_id" } else { "eos_token_id" }
        ))),
    }
}

/// Pairs to merge, best first. All three tokens of a merge must exist: the library would panic on
/// a result that is longer than every token.
fn merges(vocabulary: &GgufVocabulary, ids: &Vocab) -> Result<Vec<(String, String)>, Error> {
    if vocabulary.merges.is_empty() {
        return Err(Error::Tokenizer("tokenizer.ggml.merges is absent or empty".into()));
    }
    let pairs = vocabulary.merges.iter().enumerate().map(|(rank, merge)| {
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let is_token = |text: &str| ids.contains_key(text);
            is_token(left) && is_token(right) && is_token(&[*left, *right].concat())
        });
        let (left, right) = pair.ok_or_else(|| {
            Error::Tokenizer(format!(
                "tokenizer.ggml.merges: entry {rank} is {merge:?}; it must be two tokens, one space \
                 between them, that form a third"
            ))
        })?;
        Ok((left.to_string(), right.to_string()))
    });
    pairs.collect()
}

/// Control and user-defined tokens are found in the text before it is cut into words.
fn add_tokens(vocabulary: &GgufVocabulary, built: &mut BuiltTokenizer) -> Result<(), Error> {
    let mut added = Vec::new();
    for (id, entry) in built.entries.iter().enumerate() {
        let kind = type_of(vocabulary, id);
        let is_added = entry.is_special || kind == token_type::USER_DEFINED;
        if is_added && let Ok(content) = std::str::from_utf8(&entry.bytes) {
            added.push(AddedToken::from(content, entry.is_special).normalized(false));
        }
    }
    built.tokenizer.add_tokens(added).map_err(|error| Error::Tokenizer(error.to_string()))?;
    Ok(())
}

/// What a token of kind `llama` adds to the text.
pub(crate) fn sentencepiece_entry(vocabulary: &GgufVocabulary, id: usize, token: &str) -> TokenEntry {
    match type_of(vocabulary, id) {
        token_type::CONTROL | token_type::UNKNOWN => {
            TokenEntry { bytes: token.as_bytes().to_vec(), is_special: true }
        }
        token_type::BYTE => TokenEntry {
            bytes: hex_byte(token).map_or_else(|| token.as_bytes().to_vec(), |byte| vec![byte]),
            is_special: false,
        },
        _ => TokenEntry { bytes: sentencepiece_bytes(token), is_special: false },
    }
}
