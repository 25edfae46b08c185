//! Text to token ids and back: tokenizer, chat template, incremental detokenizing, stop strings.
//!
//! "Processor" is used in the Hugging Face sense. It is immutable and shared by all requests.

use std::{borrow::Cow, path::Path, sync::OnceLock};

use locket_model::{
    config::ModelConfig,
    load::{Checkpoint, TokenizerSource},
};
use serde_json::{Map, Value};

mod chat_template;
mod content_stops;
pub mod error;
mod gguf_tokenizer;
pub mod images;
mod pre_tokenizer;
pub mod reasoning;
mod sentencepiece;
pub mod steering;
mod stop_strings;
pub mod text_stream;
mod token_table;
mod tokenizer;
pub mod tools;

pub use error::Error;
pub use text_stream::{TextDelta, TextOptions, TextStream};

use crate::{
    chat_template::ChatTemplate,
    images::ImageToken,
    reasoning::{ReasoningProfile, ReasoningSettings, TemplateSwitches},
    steering::{GrammarError, Grammars},
    tokenizer::Tokenizer,
    tools::ToolFormat,
};

/// A conversation to be rendered by the chat template.
#[derive(Debug, Clone, Default)]
pub struct ChatPrompt {
    /// Messages as the template sees them: objects with `role`, `content` (text or parts), …
    /// Images are parts `{"type": "image"}`, for a processor that sees ([`Processor::see_images`]).
    /// Parts are joined, one per line, for a template that takes text only; the role `developer`
    /// becomes `system` for a template that does not mention it.
    pub messages: Vec<serde_json::Value>,
    /// Tools as the template sees them.
    pub tools: Option<Vec<serde_json::Value>>,
    /// How calls are written where the template knows no tools and they are written into the messages.
    pub tool_format: ToolFormat,
    /// Documents as the template sees them.
    pub documents: Option<Vec<serde_json::Value>>,
    /// End with the assistant's header.
    pub add_generation_prompt: bool,
    /// Leave the last message open so that the model continues it.
    pub continue_final_message: bool,
    /// Extra variables (`chat_template_kwargs`).
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

/// Tokenizer, template and token table of one model.
pub struct Processor {
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    eos_token_ids: Vec<u32>,
    bos_token_id: Option<u32>,
    image_token: Option<ImageToken>,
    /// Built when it is first asked for.
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Processor {
    /// Reads tokenizer and template of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: an unknown pre-tokenizer or kind, a broken vocabulary;
    /// [`Error::Template`]: a template that does not compile.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, Error> {
        Self::new(&checkpoint.config, &checkpoint.tokenizer, checkpoint.chat_template.as_deref())
    }

    /// Builds a processor from a checkpoint's parts; of `config` the vocabulary's size and the start
    /// and end tokens are used.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn new(
        config: &ModelConfig,
        source: &TokenizerSource,
        chat_template: Option<&str>,
    ) -> Result<Self, Error> {
        let tokenizer = Tokenizer::load(source, config.vocab_size)?;
        let mut eos_token_ids = config.eos_token_ids.clone();
        let mut bos_token_id = config.bos_token_id;
        if let TokenizerSource::Gguf(vocabulary) = source {
            bos_token_id = vocabulary.bos_token_id.or(bos_token_id);
            eos_token_ids.extend(vocabulary.eos_token_id.filter(|id| !config.eos_token_ids.contains(id)));
        }
        let mut processor = Self {
            tokenizer,
            chat_template: None,
            eos_token_ids,
            bos_token_id,
            image_token: None,
            grammars: OnceLock::new(),
        };
        if let Some(template) = chat_template {
            let special_tokens = processor.special_tokens(source);
            processor.chat_template = Some(ChatTemplate::new(template, special_tokens)?);
        }
        Ok(processor)
    }

    /// Text to ids. `add_special_tokens` adds what the model's tokenizer adds (start token, …).
    /// Chat templates print the start token themselves, so rendered chats are encoded without.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] if the text needs a token that the model has no row for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        self.tokenizer.encode(text, add_special_tokens)
    }

    /// Takes images in conversations from now on. `token_id` is the id that the checkpoint has for
    /// them; one that the tokenizer does not know, or none, has a placeholder all the same.
    pub fn see_images(&mut self, token_id: Option<u32>) {
        let usual = || match self.encode(ImageToken::usual_text(), false).ok()?.as_slice() {
            [id] => Some(*id),
            _ => None,
        };
        let known = token_id.or_else(usual).and_then(|id| {
            let text = self.token_text(id).into_owned();
            let is_one = !text.is_empty() && self.encode(&text, false).is_ok_and(|ids| ids == [id]);
            is_one.then(|| ImageToken::known(id, text))
        });
        let token = known.unwrap_or_else(|| ImageToken::foreign(token_id));
        if let Some(template) = &mut self.chat_template {
            template.see_images(&token.text);
        }
        self.image_token = Some(token);
    }

    /// What stands for an image in prompts; `None`: the model takes text only.
    pub fn image_token(&self) -> Option<&ImageToken> {
        self.image_token.as_ref()
    }

    /// A rendered conversation to ids, as [`Self::encode`]; each placeholder of an image is one id,
    /// that of [`Self::image_token`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let Some(token) = self.image_token.as_ref().filter(|token| !token.is_known()) else {
            return self.encode(text, add_special_tokens);
        };
        let mut ids = Vec::new();
        for (index, piece) in text.split(&token.text).enumerate() {
            ids.extend((index > 0).then_some(token.id));
            ids.extend(self.encode(piece, add_special_tokens && index == 0)?);
        }
        Ok(ids)
    }

    /// Ids to text, invalid UTF-8 replaced.
    ///
    /// The ids are taken as a text from its start: where the tokenizer puts a space in front of
    /// every text (SentencePiece), one leading space is dropped. The tail of a text is decoded
    /// with [`Self::token_bytes`], which keeps it.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        self.tokenizer.decode(ids, skip_special_tokens)
    }

    /// Messages to prompt text.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own message (`raise_exception`),
    /// [`Error::PromptTooLong`], [`Error::NoTemplate`].
    pub fn render_chat(&self, chat: &ChatPrompt) -> Result<String, Error> {
        self.chat_template.as_ref().ok_or(Error::NoTemplate)?.render(chat)
    }

    /// The format of calls that the chat template teaches; `None` if it does not say.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.chat_template.as_ref()?.tool_format()
    }

    /// Makes a conversation one that the template can print: where it knows no tools, these are told
    /// in the system message, calls become text of the assistant, and results messages of the user.
    /// To be done before [`Self::render_chat`]; the conversation stays as it is otherwise.
    pub fn write_out_tools(&self, chat: &mut ChatPrompt) {
        if let Some(template) = &self.chat_template {
            template.write_out_tools(chat);
        }
    }

    /// How the model thinks: what `settings` say, else what its chat template shows.
    ///
    /// # Errors
    /// As [`ReasoningProfile::resolve`].
    pub fn reasoning_profile(
        &self,
        settings: &ReasoningSettings,
    ) -> Result<Option<ReasoningProfile>, String> {
        let source = self.chat_template.as_ref().map(ChatTemplate::source);
        ReasoningProfile::resolve(settings, source)
    }

    /// Variables about thoughts that the chat template knows.
    pub fn template_switches(&self) -> TemplateSwitches {
        self.chat_template.as_ref().map(ChatTemplate::switches).unwrap_or_default()
    }

    /// The exact bytes of a token; joining them gives the text. Empty for ids out of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match &self.image_token {
            Some(token) if token.id == id => token.text.as_bytes(),
            _ => self.tokenizer.table.bytes(id),
        }
    }

    /// The text of a token, invalid UTF-8 (a part of a character) replaced.
    pub fn token_text(&self, id: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.token_bytes(id))
    }

    /// Whether `id` is a control token that `skip_special_tokens` hides.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokenizer.table.is_special(id)
    }

    /// Number of ids that the model knows (rows of the embedding). The tokenizer may know fewer.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.table.len()
    }

    /// Tokens that end a turn.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The start token, if the model has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// The compiler of grammars over this model's tokens. The first call sorts the tokens: a tenth of a
    /// second for 50,000, so call it on a thread that may block.
    ///
    /// # Errors
    /// A vocabulary that the grammar library cannot sort.
    pub fn grammars(&self) -> Result<&Grammars, GrammarError> {
        self.grammars.get_or_init(|| Grammars::new(self)).as_ref().map_err(Clone::clone)
    }

    /// Token sequences that spell the given words, each at the start of a text and, where that is
    /// as long but begins differently, after a space: vLLM's `bad_words`.
    ///
    /// # Errors
    /// As [`Self::encode`]; [`Error::Tokenizer`] for a word of blanks only.
    pub fn bad_word_sequences(&self, words: &[String]) -> Result<Vec<Vec<u32>>, Error> {
        let mut sequences = Vec::with_capacity(words.len() * 2);
        for word in words {
            let word = word.trim_start();
            let plain = self.encode(word, false)?;
            if plain.is_empty() {
                return Err(Error::Tokenizer("bad_words: a word is empty or of blanks only".into()));
            }
            let spaced = self.encode(&format!(" {word}"), false)?;
            let is_other = spaced.len() == plain.len() && spaced.first() != plain.first();
            sequences.push(plain);
            sequences.extend(is_other.then_some(spaced));
        }
        Ok(sequences)
    }

    /// `bos_token` and the like, as variables of the chat template.
    fn special_tokens(&self, source: &TokenizerSource) -> Map<String, Value> {
        let mut tokens = Map::new();
        let mut insert = |name: &str, id: Option<u32>| {
            if let Some(text) = id.map(|id| self.token_text(id)).filter(|text| !text.is_empty()) {
                tokens.insert(name.into(), text.into());
            }
        };
        insert("bos_token", self.bos_token_id);
        match source {
            TokenizerSource::Gguf(vocabulary) => {
                insert("eos_token", vocabulary.eos_token_id.or(self.eos_token_ids.first().copied()));
                insert("unk_token", vocabulary.unknown_token_id);
            }
            TokenizerSource::Json(path) => {
                insert("eos_token", self.eos_token_ids.first().copied());
                tokens.extend(configured_tokens(path));
            }
        }
        tokens
    }
}

/// Special tokens that `tokenizer_config.json`, beside a `tokenizer.json`, names: as text or as an
/// object with `content`. An absent or unreadable file names none.
fn configured_tokens(tokenizer: &Path) -> Vec<(String, Value)> {
    let config = std::fs::read(tokenizer.with_file_name("tokenizer_config.json")).unwrap_or_default();
    let config: Map<String, Value> = serde_json::from_slice(&config).unwrap_or_default();
    let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    let tokens = names.iter().filter_map(|name| {
        let token = config.get(*name)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(((*name).to_string(), text.into()))
    });
    tokens.collect()
}
