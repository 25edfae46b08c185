//! From a schema, expression or grammar to something that tokens can be matched against.
//!
//! The library underneath is llguidance. It never allows a text outside the grammar, at the price of
//! its own dialects: JSON Schema without the keywords that look at a value as a whole
//! (`uniqueItems`, `not`, …), regular expressions without look-around, and Lark with extensions.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use llguidance::{
    Matcher, ParserFactory, TokenParser,
    api::{GrammarWithLexer, TopLevelGrammar},
    earley::SlicedBiasComputer,
    regex_to_lark,
    toktrie::{InferenceCapabilities, TokEnv, TokTrie},
};
use locket_engine::steering::TokenSet;
use serde_json::Value;

use super::{json_schema, lark_text, limits, token_env::token_env};
use crate::Processor;

/// What an answer may be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GrammarSource {
    /// A JSON text that a schema allows.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar: llguidance's Lark, or the EBNF of llama.cpp (GBNF), told by its `::=`.
    Lark(String),
    /// Exactly this text.
    Text(String),
    /// Exactly this text; if it is the text of a control token, that token. The one way to let a
    /// control token into a composed grammar.
    Marker(String),
    /// What one of these allows.
    AnyOf(Vec<GrammarSource>),
    /// What these allow, one after the other.
    Sequence(Vec<GrammarSource>),
    /// What this allows, once or several times.
    OneOrMore(Box<GrammarSource>),
}

impl GrammarSource {
    /// Roughly the bytes of the source; its compiled form has a multiple of that.
    pub fn size(&self) -> usize {
        match self {
            Self::JsonSchema(schema) => json_schema::size(schema),
            Self::JsonObject => 16,
            Self::Regex(text) | Self::Lark(text) | Self::Text(text) | Self::Marker(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
            Self::AnyOf(parts) | Self::Sequence(parts) => parts.iter().map(Self::size).sum(),
            Self::OneOrMore(part) => part.size(),
        }
    }
}

/// Why a source is no usable grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct GrammarError {
    /// Where in the source, written so that it can follow the source's own path: `.properties.x`,
    /// `[2]`, or nothing.
    pub path: String,
    /// What is wrong, as a clause without a full stop.
    pub reason: String,
}

impl GrammarError {
    /// An error of the source as a whole.
    pub(super) fn whole(reason: impl Into<String>) -> Self {
        Self { path: String::new(), reason: reason.into() }
    }
}

/// Compiles grammars for one model's tokens.
pub struct Grammars {
    factory: ParserFactory,
    token_env: TokEnv,
    /// Bits of the end tokens, as in a [`TokenSet`].
    end_words: Arc<[u32]>,
    /// Control tokens that do not end a turn.
    control_tokens: Vec<(String, u32)>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// Sorts the tokens of a model: a tenth of a second for 50,000.
    ///
    /// # Errors
    /// A vocabulary that the library cannot sort.
    pub fn new(processor: &Processor) -> Result<Self, GrammarError> {
        let token_env = token_env(processor);
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&token_env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::whole(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits::parser_limits();

        let vocab_size = u32::try_from(processor.vocab_size()).unwrap_or(u32::MAX);
        let mut ends = TokenSet::new(vocab_size);
        processor.eos_token_ids().iter().for_each(|id| ends.insert(*id));
        let control = (0..vocab_size).filter(|id| processor.is_special(*id) && !ends.contains(*id));
        let control_tokens = control.map(|id| (processor.token_text(id).into_owned(), id)).collect();
        Ok(Self { factory, token_env, end_words: ends.words().into(), control_tokens })
    }

    /// Compiles a source. Takes from a fraction of a millisecond to some tenths of a second: call it
    /// on a thread that may block.
    ///
    /// # Errors
    /// A source that is not in its language, is beyond a limit, or that no text satisfies.
    pub fn compile(&self, source: &GrammarSource) -> Result<Arc<CompiledGrammar>, GrammarError> {
        on_compiler_thread(|| self.compile_here(source))
    }

    fn compile_here(&self, source: &GrammarSource) -> Result<Arc<CompiledGrammar>, GrammarError> {
        let parser = match source {
            // Alone, so that an error can be traced to its place.
            GrammarSource::JsonSchema(schema) => {
                let prepared = json_schema::prepare(schema)?;
                let grammar = GrammarWithLexer::from_json_schema(prepared.clone());
                let parser = self.parser(TopLevelGrammar::from_grammar(grammar));
                parser.map_err(|reason| json_schema::located(&prepared, reason))?
            }
            _ => self.parser(self.composed(source)?).map_err(GrammarError::whole)?,
        };
        let mut matcher = Matcher::new(Ok(parser));
        // The first mask shows whether the tokens can spell a beginning at all, and fills the caches.
        matcher.compute_mask_or_eos().map_err(|error| GrammarError::whole(first_line(&error)))?;
        Ok(Arc::new(CompiledGrammar {
            prototype: Mutex::new(matcher),
            token_env: Arc::clone(&self.token_env),
            end_words: Arc::clone(&self.end_words),
        }))
    }

    fn parser(&self, grammar: TopLevelGrammar) -> Result<TokenParser, String> {
        self.factory.create_parser(grammar).map_err(|error| first_line(&error))
    }

    /// One Lark grammar that refers to the parts.
    fn composed(&self, source: &GrammarSource) -> Result<TopLevelGrammar, GrammarError> {
        let mut parts = Vec::new();
        let expression = self.expression(source, &mut parts)?;
        let mut grammars = vec![GrammarWithLexer::from_lark(format!("start: {expression}\n"))];
        grammars.append(&mut parts);
        Ok(TopLevelGrammar { grammars, max_tokens: None })
    }

    /// A source as a Lark expression; what needs a grammar of its own is put into `parts`.
    fn expression(
        &self,
        source: &GrammarSource,
        parts: &mut Vec<GrammarWithLexer>,
    ) -> Result<String, GrammarError> {
        let mut refer = |part: GrammarWithLexer| {
            let name = format!("part{}", parts.len());
            parts.push(GrammarWithLexer { name: Some(name.clone()), ..part });
            format!("@{name}")
        };
        Ok(match source {
            GrammarSource::JsonSchema(schema) => {
                refer(GrammarWithLexer::from_json_schema(json_schema::prepare(schema)?))
            }
            GrammarSource::JsonObject => {
                let schema = serde_json::json!({"type": "object"});
                refer(GrammarWithLexer::from_json_schema(json_schema::prepare(&schema)?))
            }
            GrammarSource::Lark(text) => refer(GrammarWithLexer::from_lark(lark_text::prepare(text)?)),
            GrammarSource::Regex(text) => regex(text)?,
            GrammarSource::Choice(texts) => choice(texts)?,
            GrammarSource::Text(text) => quoted(text),
            GrammarSource::Marker(text) => {
                match self.control_tokens.iter().find(|(token, _)| token == text) {
                    Some((_, id)) => format!("<[{id}]>"),
                    None => quoted(text),
                }
            }
            GrammarSource::AnyOf(sources) => self.joined(sources, " | ", parts)?,
            GrammarSource::Sequence(sources) => self.joined(sources, " ", parts)?,
            GrammarSource::OneOrMore(part) => format!("({})+", self.expression(part, parts)?),
        })
    }

    fn joined(
        &self,
        sources: &[GrammarSource],
        with: &str,
        parts: &mut Vec<GrammarWithLexer>,
    ) -> Result<String, GrammarError> {
        if sources.is_empty() || sources.len() > limits::MAX_CHOICES {
            let reason =
                format!("it must have 1 to {} parts, but has {}", limits::MAX_CHOICES, sources.len());
            return Err(GrammarError::whole(reason));
        }
        let expressions: Result<Vec<String>, _> =
            sources.iter().map(|source| self.expression(source, parts)).collect();
        Ok(format!("({})", expressions?.join(with)))
    }
}

/// Runs a compilation. The compiler recurses over the source, so it gets a stack for the deepest that is
/// allowed: nested, or a chain of references.
pub(super) fn on_compiler_thread<T: Send>(
    work: impl FnOnce() -> Result<T, GrammarError> + Send,
) -> Result<T, GrammarError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("grammar".into())
            .stack_size(limits::COMPILER_STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| GrammarError::whole(format!("no thread to compile it: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(GrammarError::whole("the compiler failed on it")))
    })
}

/// A regular expression as a Lark terminal.
fn regex(text: &str) -> Result<String, GrammarError> {
    if text.len() > limits::MAX_REGEX_BYTES {
        let reason = format!("it has {} bytes, but may have at most {}", text.len(), limits::MAX_REGEX_BYTES);
        return Err(GrammarError::whole(reason));
    }
    lark_text::check_brackets(text)?;
    // It matches as a whole anyway, so anchors at its ends say nothing.
    let body = text.strip_prefix('^').unwrap_or(text);
    let body = match body.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 0 => rest,
        _ => body,
    };
    if body.is_empty() {
        return Ok("\"\"".into());
    }
    Ok(format!("/{}/", regex_to_lark(body, "")))
}

/// Alternatives of literal texts.
fn choice(texts: &[String]) -> Result<String, GrammarError> {
    let bytes: usize = texts.iter().map(String::len).sum();
    if texts.is_empty() || texts.len() > limits::MAX_CHOICES || bytes > limits::MAX_CHOICE_BYTES {
        return Err(GrammarError::whole(format!(
            "it must have 1 to {} texts of up to {} bytes together, but has {} of {bytes}",
            limits::MAX_CHOICES,
            limits::MAX_CHOICE_BYTES,
            texts.len(),
        )));
    }
    Ok(format!("({})", texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" | ")))
}

/// A literal of Lark is written as in JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The message without what the library adds about itself.
pub(super) fn first_line(error: &impl std::fmt::Display) -> String {
    const MAX_CHARS: usize = 300;
    let text = error.to_string();
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it does not compile");
    line.chars().take(MAX_CHARS).collect()
}

/// A grammar for one model's tokens; immutable and shared.
pub struct CompiledGrammar {
    /// Never advanced; copied for each continuation.
    prototype: Mutex<Matcher>,
    token_env: TokEnv,
    end_words: Arc<[u32]>,
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}

impl CompiledGrammar {
    /// A matcher at the grammar's start, with caches of its own: what one answer needs of them is
    /// given back with it.
    pub(super) fn matcher(&self) -> Matcher {
        // Nothing that can panic changes the prototype.
        self.prototype.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }

    /// Tokens whose bytes are these.
    pub(super) fn spell(&self, bytes: &[u8]) -> Vec<u32> {
        self.token_env.tok_trie().greedy_tokenize(bytes)
    }

    /// The longest control or end token whose text these bytes begin with, and the text's length.
    pub(super) fn control_prefix(&self, bytes: &[u8]) -> Option<(u32, usize)> {
        let marked = [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
        let (id, length) = self.token_env.tok_trie().prefix_token_id(&marked);
        (length > 1).then(|| (id, length - 1))
    }

    /// Whether a set has end tokens and no others.
    pub(super) fn is_end_only(&self, allowed: &TokenSet) -> bool {
        let mut words = allowed.words().iter().zip(self.end_words.iter());
        allowed.words().iter().any(|word| *word != 0) && words.all(|(word, ends)| word & !ends == 0)
    }
}
