//! Text to token ids and back: tokenizer, chat template, incremental detokenizing, stop strings.
//!
//! "Processor" is used in the Hugging Face sense. It is immutable and shared by all requests.

use locket_model::load::Checkpoint;

pub mod error;
pub mod text_stream;

pub use error::Error;
pub use text_stream::{TextDelta, TextOptions, TextStream};

/// A conversation to be rendered by the chat template.
#[derive(Debug, Clone, Default)]
pub struct ChatPrompt {
    /// Messages as the template sees them: objects with `role`, `content` (text or parts), …
    pub messages: Vec<serde_json::Value>,
    /// Tools as the template sees them.
    pub tools: Option<Vec<serde_json::Value>>,
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
    _private: (),
}

#[allow(unused_variables, clippy::todo, reason = "replaced by the processor's author")]
impl Processor {
    /// Reads tokenizer and template of a checkpoint.
    ///
    /// # Errors
    /// An unknown pre-tokenizer, a broken vocabulary, a template that does not compile.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, Error> {
        Err(Error::Tokenizer("not built yet".into()))
    }

    /// Text to ids. `add_special_tokens` adds what the model's tokenizer adds (start token, …).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        todo!()
    }

    /// Ids to text, invalid UTF-8 replaced.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        todo!()
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_chat_template(&self) -> bool {
        todo!()
    }

    /// Messages to prompt text.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own message (`raise_exception`), [`Error::NoTemplate`].
    pub fn render_chat(&self, chat: &ChatPrompt) -> Result<String, Error> {
        todo!()
    }

    /// The exact bytes of a token; joining them gives the text. Empty for ids out of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        todo!()
    }

    /// Whether `id` is a control token that `skip_special_tokens` hides.
    pub fn is_special(&self, id: u32) -> bool {
        todo!()
    }

    /// Number of ids that the model knows (rows of the embedding).
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// Tokens that end a turn.
    pub fn eos_token_ids(&self) -> &[u32] {
        todo!()
    }

    /// The start token, if the model has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        todo!()
    }

    /// A detokenizer for one continuation. It is given token bytes, so it needs no processor.
    pub fn text_stream(&self, options: TextOptions) -> TextStream {
        TextStream::new(options)
    }
}
