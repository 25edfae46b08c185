//! A continuation inside a grammar.

use std::{fmt, sync::Arc};

use llguidance::{Matcher, api::StopReason};
use locket_engine::steering::{Guide, TokenSet};

use super::CompiledGrammar;

/// Where a continuation stands in its grammar. Tokens are noted when they come and matched when the
/// next mask is computed, off the engine's thread.
pub(super) struct GrammarState {
    grammar: Arc<CompiledGrammar>,
    /// Made when it is first needed, since that is not for the engine's thread either.
    matcher: Option<Matcher>,
    /// The answer's first bytes, not matched yet.
    first: Vec<u8>,
    /// Tokens not matched yet.
    pending: Vec<u32>,
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("GrammarState").field("grammar", &self.grammar).finish_non_exhaustive()
    }
}

impl GrammarState {
    /// The start of the grammar.
    pub(super) fn new(grammar: Arc<CompiledGrammar>) -> Self {
        Self { grammar, matcher: None, first: Vec::new(), pending: Vec::new() }
    }

    /// Notes the first bytes of the answer, which came with a token that began before it. Blanks
    /// between thought and answer belong to neither. If the grammar cannot begin with the bytes, they are
    /// markup, such as a control token in front of calls, and the grammar begins behind them.
    pub(super) fn begin(&mut self, bytes: &[u8]) {
        self.first.extend_from_slice(bytes.trim_ascii_start());
    }

    /// Notes a token.
    pub(super) fn take(&mut self, id: u32) {
        self.pending.push(id);
    }

    /// Matches what was noted and fills the set of tokens that may follow. With nothing but an end
    /// left, that is [`Guide::Complete`].
    pub(super) fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        if !self.first.is_empty() {
            self.matcher = Some(behind(&self.grammar, &std::mem::take(&mut self.first)));
        }
        let matcher = self.matcher.get_or_insert_with(|| self.grammar.matcher());
        if !matcher.is_stopped()
            && let Err(error) = matcher.consume_tokens(&self.pending)
        {
            return failed(&error.to_string());
        }
        self.pending.clear();
        if matcher.is_stopped() {
            return match matcher.stop_reason() {
                StopReason::EndOfSentence | StopReason::NoExtension => Guide::Complete,
                reason => failed(&reason.to_string()),
            };
        }
        let mask = match matcher.compute_mask() {
            Ok(mask) => mask,
            Err(error) => return failed(&error.to_string()),
        };
        allowed.copy_from_words(mask.as_slice());
        if self.grammar.is_end_only(allowed) { Guide::Complete } else { Guide::Allowed }
    }

    /// Matches bytes at the start; `false` if no text of the grammar begins with them.
    pub(super) fn opens_with(&mut self, bytes: &[u8]) -> bool {
        let tokens = self.grammar.spell(bytes);
        let matcher = self.matcher.get_or_insert_with(|| self.grammar.matcher());
        matcher.try_consume_tokens(&tokens).is_ok_and(|count| count == tokens.len())
    }
}

/// A matcher behind these bytes, or at the start if the grammar cannot begin with them.
fn behind(grammar: &CompiledGrammar, bytes: &[u8]) -> Matcher {
    // Matching knows only bytes, so any tokens that spell them do; but what is a control token's text
    // can be that token in the grammar, however the model wrote it.
    let as_control = grammar.control_prefix(bytes).map(|(id, length)| {
        let mut tokens = vec![id];
        tokens.extend(grammar.spell(&bytes[length..]));
        tokens
    });
    for tokens in as_control.into_iter().chain([grammar.spell(bytes)]) {
        let mut matcher = grammar.matcher();
        if matcher.try_consume_tokens(&tokens).is_ok_and(|count| count == tokens.len()) {
            return matcher;
        }
    }
    grammar.matcher()
}

fn failed(reason: &str) -> Guide {
    const MAX_CHARS: usize = 300;
    let line = reason.lines().next().unwrap_or_default();
    Guide::Failed(format!("grammar: {}", line.chars().take(MAX_CHARS).collect::<String>()))
}
