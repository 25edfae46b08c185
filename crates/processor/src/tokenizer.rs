//! Text to ids and ids to bytes, for any source of the tokenizer.

use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use locket_model::load::TokenizerSource;
use serde_json::Value;
use tokenizers::ModelWrapper;

use crate::{
    Error, gguf_tokenizer,
    token_table::{TokenEntry, TokenTable, byte_level_bytes, hex_byte, sentencepiece_bytes},
};

/// The largest `tokenizer.json` that is read; the largest known is about 35 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Words whose merges are remembered, per thread that encodes and per model: at most about half a
/// megabyte each, since a server may encode on hundreds of threads.
const WORD_CACHE_ENTRIES: usize = 2048;

/// What a source was made into.
pub(crate) struct BuiltTokenizer {
    pub tokenizer: tokenizers::Tokenizer,
    /// One entry per id of the vocabulary.
    pub entries: Vec<TokenEntry>,
    /// Token put before the text where special tokens are wanted.
    pub before: Option<u32>,
    /// Token put after the text where special tokens are wanted.
    pub after: Option<u32>,
    /// Decoding from the start drops one space.
    pub strips_leading_space: bool,
}

/// A tokenizer and its table of bytes.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    before: Option<u32>,
    after: Option<u32>,
    strips_leading_space: bool,
    pub table: TokenTable,
}

impl Tokenizer {
    /// Builds the tokenizer of a model with `vocab_size` embedding rows.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming the field.
    pub fn load(source: &TokenizerSource, vocab_size: usize) -> Result<Self, Error> {
        let mut built = match source {
            TokenizerSource::Gguf(vocabulary) => gguf_tokenizer::build(vocabulary)?,
            TokenizerSource::Json(path) => from_json(&read_bounded(path)?, vocab_size)
                .map_err(|reason| Error::Tokenizer(format!("{}: {reason}", path.display())))?,
        };
        if built.entries.len() > vocab_size {
            tracing::warn!(
                tokens = built.entries.len(),
                vocab_size,
                "the tokenizer has more tokens than the model; prompts that need the surplus are refused"
            );
        }
        if let ModelWrapper::BPE(bpe) = built.tokenizer.get_model() {
            let mut bpe = bpe.clone();
            bpe.resize_cache(WORD_CACHE_ENTRIES);
            built.tokenizer.with_model(bpe);
        }
        Ok(Self {
            inner: built.tokenizer,
            before: built.before,
            after: built.after,
            strips_leading_space: built.strips_leading_space,
            table: TokenTable::new(vocab_size, built.entries),
        })
    }

    /// Text to ids.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] if the text needs a token that the model has no row for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        let (before, after) = if add_special_tokens { (self.before, self.after) } else { (None, None) };
        let ids: Vec<u32> =
            before.into_iter().chain(encoding.get_ids().iter().copied()).chain(after).collect();
        match ids.iter().find(|id| **id as usize >= self.table.len()) {
            None => Ok(ids),
            Some(&id) => Err(Error::UnknownToken {
                token: self.inner.id_to_token(id).unwrap_or_default(),
                id,
                last: self.table.len().saturating_sub(1),
            }),
        }
    }

    /// Ids to text, invalid UTF-8 replaced; see [`crate::Processor::decode`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let shown = ids.iter().filter(|id| !(skip_special_tokens && self.table.is_special(**id)));
        let bytes: Vec<u8> = shown.flat_map(|id| self.table.bytes(*id)).copied().collect();
        let bytes = match bytes.strip_prefix(b" ") {
            Some(rest) if self.strips_leading_space => rest,
            _ => &bytes,
        };
        String::from_utf8_lossy(bytes).into_owned()
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, Error> {
    let fail = |error: std::io::Error| Error::Tokenizer(format!("cannot read {}: {error}", path.display()));
    let mut bytes = Vec::new();
    File::open(path).map_err(fail)?.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(Error::Tokenizer(format!("{} is larger than {MAX_JSON_BYTES} bytes", path.display())));
    }
    Ok(bytes)
}

/// How a `tokenizer.json` writes bytes in its tokens, told by its decoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Spelling {
    is_byte_level: bool,
    has_space_letter: bool,
    has_hex_bytes: bool,
    strips_leading_space: bool,
}

impl Spelling {
    fn of(decoder: &Value) -> Result<Self, String> {
        let mut spelling = Self::default();
        spelling.read(decoder)?;
        if spelling.is_byte_level || spelling.has_space_letter {
            return Ok(spelling);
        }
        Err("its decoder is neither byte-level nor SentencePiece, the kinds that LLaMA models use".into())
    }

    fn read(&mut self, decoder: &Value) -> Result<(), String> {
        match decoder["type"].as_str().unwrap_or("absent") {
            "Sequence" => {
                for step in decoder["decoders"].as_array().into_iter().flatten() {
                    self.read(step)?;
                }
            }
            "ByteLevel" => self.is_byte_level = true,
            "ByteFallback" => self.has_hex_bytes = true,
            "Replace" => self.has_space_letter = true,
            "Metaspace" => {
                self.has_space_letter = true;
                self.strips_leading_space |= decoder["prepend_scheme"] != "never";
            }
            "Strip" => self.strips_leading_space |= decoder["start"].as_u64() > Some(0),
            "Fuse" => {}
            other => return Err(format!("its decoder '{other}' is not known here")),
        }
        Ok(())
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        if self.is_byte_level {
            return byte_level_bytes(token);
        }
        match hex_byte(token) {
            Some(byte) if self.has_hex_bytes => vec![byte],
            _ => sentencepiece_bytes(token),
        }
    }
}

/// Builds from the text of a `tokenizer.json`. Its post-processor adds the special tokens.
fn from_json(json: &[u8], vocab_size: usize) -> Result<BuiltTokenizer, String> {
    // The library indexes with a file's lengths in places, so a hostile file may panic.
    let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json)));
    let mut tokenizer = parsed
        .map_err(|_| "its lists contradict each other".to_string())?
        .map_err(|error| error.to_string())?;
    // Cutting or padding a prompt is never wanted.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;

    let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|error| error.to_string())?;
    let spelling = Spelling::of(&decoder)?;
    let added = tokenizer.get_added_tokens_decoder();
    let mut texts: HashMap<u32, (Vec<u8>, bool)> = tokenizer
        .get_vocab(false)
        .into_iter()
        .map(|(token, id)| (id, (spelling.bytes(&token), false)))
        .collect();
    for (id, token) in &added {
        texts.insert(*id, (token.content.clone().into_bytes(), token.special));
    }
    let surplus = texts.keys().filter(|id| **id as usize >= vocab_size).count();
    let entries = (0..u32::try_from(vocab_size).unwrap_or(u32::MAX)).map(|id| match texts.remove(&id) {
        Some((bytes, is_special)) => TokenEntry { bytes, is_special },
        None => TokenEntry::default(),
    });
    let mut entries: Vec<TokenEntry> = entries.collect();
    entries.extend(std::iter::repeat_with(TokenEntry::default).take(surplus));
    Ok(BuiltTokenizer {
        entries,
        before: None,
        after: None,
        strips_leading_space: spelling.strips_leading_space,
        tokenizer,
    })
}
