//! The token table as the grammar library sees it.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use super::limits::MAX_TOKEN_BYTES;
use crate::Processor;

/// Builds the tree of all tokens.
///
/// Control and end tokens carry a mark that no text contains, so no grammar over text allows them; end
/// tokens come in where a grammar may end. Ids without bytes (rows that the tokenizer does not know)
/// are never allowed, nor are bytes that occur in no text.
pub(super) fn token_env(processor: &Processor) -> TokEnv {
    let vocab_size = u32::try_from(processor.vocab_size()).unwrap_or(u32::MAX);
    let end_tokens: Vec<u32> =
        processor.eos_token_ids().iter().copied().filter(|id| *id < vocab_size).collect();
    let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| word(processor, id, &end_tokens)).collect();
    let info = TokRxInfo::new(vocab_size, end_tokens.first().copied().unwrap_or(INVALID_TOKEN));
    let mut trie = TokTrie::from(&info, &words);
    if !end_tokens.is_empty() {
        trie = trie.with_eos_tokens(&end_tokens);
    }
    Arc::new(ApproximateTokEnv::new(trie))
}

fn word(processor: &Processor, id: u32, end_tokens: &[u32]) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = processor.token_bytes(id);
    if bytes.len() > MAX_TOKEN_BYTES {
        return Vec::new();
    }
    if processor.is_special(id) || end_tokens.contains(&id) {
        return [&[MARK], bytes].concat();
    }
    if bytes.contains(&MARK) { Vec::new() } else { bytes.to_vec() }
}
