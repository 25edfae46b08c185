//! SentencePiece vocabularies (GGUF kind `llama`) as merges.
//!
//! SentencePiece's byte-pair mode merges, again and again, the neighbours whose joined piece has
//! the best score, the leftmost first. Each way to split a piece into two pieces is therefore a
//! merge, ranked by the piece's score. This is the conversion of Hugging Face's LLaMA tokenizer:
//! equal scores are ordered by the longer left half, then the longer right half.
//!
//! Spaces are written as U+2581, and one is put in front of the text and of the text after each
//! special token (`add_space_prefix`). That first space belongs to no one: decoding from the start
//! removes it again. Characters outside the vocabulary become byte tokens `<0xNN>`.

use locket_model::load::GgufVocabulary;
use tokenizers::{
    models::bpe::{BPE, Vocab},
    normalizers::{NormalizerWrapper, Prepend, Replace, Sequence},
};

use crate::{
    Error,
    gguf_tokenizer::{edge_token, sentencepiece_entry, token_ids, token_type, type_of},
    token_table::SPACE_LETTER,
    tokenizer::BuiltTokenizer,
};

/// Longer pieces are refused: the number of splits to try grows with the square of the length.
const MAX_PIECE_BYTES: usize = 1024;

/// Builds the tokenizer of kind `llama`; the lists' lengths were checked.
///
/// # Errors
/// [`Error::Tokenizer`] for missing or unordered scores, duplicates, an overlong piece.
pub(crate) fn build(vocabulary: &GgufVocabulary) -> Result<BuiltTokenizer, Error> {
    if vocabulary.scores.is_empty() {
        return Err(Error::Tokenizer(
            "tokenizer.ggml.scores is absent; kind 'llama' needs one per token".into(),
        ));
    }
    let ids = token_ids(&written_tokens(vocabulary))?;
    let merges = merges(vocabulary)?;
    let has_all_bytes = (0..=u8::MAX).all(|byte| ids.contains_key(&format!("<0x{byte:02X}>")));
    let mut bpe = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(has_all_bytes).fuse_unk(true);
    if let Some(id) = vocabulary.unknown_token_id {
        bpe = bpe.unk_token(vocabulary.tokens[id as usize].clone());
    } else if !has_all_bytes {
        return Err(Error::Tokenizer(
            "the vocabulary has neither all byte tokens <0x00>..<0xFF> nor tokenizer.ggml.unknown_token_id"
                .into(),
        ));
    }
    let bpe = bpe.build().map_err(|error| Error::Tokenizer(error.to_string()))?;
    let has_prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer
        .with_normalizer(Some(normalizer(has_prefix)?))
        .map_err(|error| Error::Tokenizer(error.to_string()))?;

    let entries = vocabulary.tokens.iter().enumerate();
    let adds_bos = vocabulary.add_bos_token.unwrap_or(true);
    Ok(BuiltTokenizer {
        entries: entries.map(|(id, token)| sentencepiece_entry(vocabulary, id, token)).collect(),
        before: edge_token("add_bos_token", adds_bos, vocabulary.bos_token_id)?,
        after: edge_token("add_eos_token", vocabulary.add_eos_token == Some(true), vocabulary.eos_token_id)?,
        strips_leading_space: has_prefix,
        tokenizer,
    })
}

fn normalizer(has_prefix: bool) -> Result<NormalizerWrapper, Error> {
    let letter = SPACE_LETTER.to_string();
    let replace = Replace::new(" ", letter.clone()).map_err(|error| Error::Tokenizer(error.to_string()))?;
    let mut steps: Vec<NormalizerWrapper> = vec![replace.into()];
    if has_prefix {
        steps.insert(0, Prepend::new(letter).into());
    }
    Ok(Sequence::new(steps).into())
}

/// Tokens as they occur in text: user-defined ones are found before spaces are rewritten.
fn written_tokens(vocabulary: &GgufVocabulary) -> Vec<String> {
    let tokens = vocabulary.tokens.iter().enumerate();
    let written = tokens.map(|(id, token)| match type_of(vocabulary, id) {
        token_type::USER_DEFINED => token.replace(SPACE_LETTER, " "),
        _ => token.clone(),
    });
    written.collect()
}

/// One way to split a piece.
struct Merge<'a> {
    score: f32,
    left: &'a str,
    right: &'a str,
    left_chars: usize,
    right_chars: usize,
}

/// All splits of all normal pieces, best first.
fn merges(vocabulary: &GgufVocabulary) -> Result<Vec<(String, String)>, Error> {
    let pieces = || {
        let tokens = vocabulary.tokens.iter().enumerate();
        tokens.filter(|(id, _)| type_of(vocabulary, *id) == token_type::NORMAL)
    };
    let ids: Vocab =
        pieces().map(|(id, piece)| (piece.clone(), u32::try_from(id).unwrap_or(u32::MAX))).collect();
    let mut merges = Vec::new();
    for (id, piece) in pieces() {
        let score = vocabulary.scores[id];
        if score.is_nan() {
            return Err(Error::Tokenizer(format!("tokenizer.ggml.scores: entry {id} is not a number")));
        }
        if piece.len() > MAX_PIECE_BYTES {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.tokens: entry {id} has {} bytes; the limit is {MAX_PIECE_BYTES}",
                piece.len()
            )));
        }
        merges.extend(splits(piece, score, &ids));
    }
    let key = |merge: &Merge<'_>| (merge.left_chars, merge.right_chars);
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| key(b).cmp(&key(a))));
    Ok(merges.into_iter().map(|merge| (merge.left.to_string(), merge.right.to_string())).collect())
}

/// The splits of one piece whose halves are pieces, in the order of the halves' ids.
fn splits<'a>(piece: &'a str, score: f32, ids: &Vocab) -> Vec<Merge<'a>> {
    let num_chars = piece.chars().count();
    let mut found: Vec<(u32, u32, Merge<'a>)> = Vec::new();
    for (left_chars, (at, _)) in piece.char_indices().enumerate().skip(1) {
        let (left, right) = piece.split_at(at);
        if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
            let right_chars = num_chars - left_chars;
            found.push((left_id, right_id, Merge { score, left, right, left_chars, right_chars }));
        }
    }
    found.sort_by_key(|(left_id, right_id, _)| (*left_id, *right_id));
    found.into_iter().map(|(_, _, merge)| merge).collect()
}
