//! The assistant's message: a choice's text, sorted into thoughts, content and calls of tools.
//!
//! Every route that answers with messages, streamed or not, reads them here, so the two cannot differ.

use std::{collections::VecDeque, sync::Arc};

use locket_processor::{
    reasoning::{ReasoningSplitter, TextPart, TextPiece, ThoughtMarkers, ThoughtStart},
    tools::{ToolDelta, ToolParser, ToolPiece, ToolSyntax},
};

use crate::{
    choice::{Delta, ReleasedToken},
    openai::{FinishReason, new_item_id},
};

/// A piece of a message, in the order of section 5 of the contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MessageDelta {
    /// More of the thoughts.
    Reasoning(String),
    /// More of the content. Text in front of a call comes before the call.
    Content(String),
    /// A call begins. `index` counts from 0; the name is whole; the call before it is complete.
    ToolCall {
        /// Which call.
        index: u32,
        /// `call_…`
        id: String,
        /// Name of the function.
        name: String,
    },
    /// More of the JSON text of the arguments of call `index`; never empty.
    ToolArguments {
        /// Which call.
        index: u32,
        /// A piece of the JSON text.
        text: String,
    },
    /// Nothing that a client sees: tokens of the markup around thoughts and calls.
    Markup,
}

impl MessageDelta {
    /// Whether a client sees anything of it.
    pub(crate) fn is_visible(&self) -> bool {
        match self {
            Self::Reasoning(text) | Self::Content(text) => !text.is_empty(),
            Self::ToolCall { .. } | Self::ToolArguments { .. } => true,
            Self::Markup => false,
        }
    }
}

/// A piece and the tokens that begin in it. The text may be empty where tokens are not.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MessagePart {
    /// What it is.
    pub(crate) delta: MessageDelta,
    /// Its tokens; log-probabilities are those of [`MessageDelta::Content`] only.
    pub(crate) tokens: Vec<ReleasedToken>,
}

/// How the messages of a request are read; by default, all text is content.
#[derive(Debug, Clone, Default)]
pub(crate) struct MessagePlan {
    thoughts: Option<(Arc<ThoughtMarkers>, ThoughtStart)>,
    tools: Option<Arc<ToolSyntax>>,
}

impl MessagePlan {
    /// Tells thoughts apart; what the prompt left the answer to begin with is `start`.
    pub(crate) fn set_thoughts(&mut self, markers: Arc<ThoughtMarkers>, start: ThoughtStart) {
        self.thoughts = Some((markers, start));
    }

    /// Tells calls apart.
    pub(crate) fn set_tools(&mut self, tools: Arc<ToolSyntax>) {
        self.tools = Some(tools);
    }

    /// A reader for one choice.
    pub(crate) fn reader(&self) -> MessageReader {
        let thoughts = self.thoughts.as_ref();
        let tools = self.tools.as_deref();
        MessageReader {
            splitter: thoughts.map(|(markers, start)| ReasoningSplitter::new(Arc::clone(markers), *start)),
            parser: tools.map(|tools| ToolParser::new(tools.format, tools.names(), tools.max_calls())),
            tokens: TokenPlaces::default(),
            calls: 0,
            reasoning_tokens: 0,
        }
    }
}

/// Reads one choice.
#[derive(Debug)]
pub(crate) struct MessageReader {
    splitter: Option<ReasoningSplitter>,
    parser: Option<ToolParser>,
    tokens: TokenPlaces,
    calls: u32,
    reasoning_tokens: u32,
}

impl MessageReader {
    /// Takes in what the choice released.
    pub(crate) fn push(&mut self, delta: Delta) -> Vec<MessagePart> {
        if self.splitter.is_none() && self.parser.is_none() {
            return vec![MessagePart { delta: MessageDelta::Content(delta.text), tokens: delta.tokens }];
        }
        let mut parts = self.tokens.push(delta.tokens);
        match &mut self.splitter {
            Some(splitter) => {
                for piece in splitter.push(&delta.text) {
                    self.add_piece(piece, &mut parts);
                }
            }
            None => self.add_content(&delta.text, &mut parts),
        }
        self.count(parts)
    }

    /// The text has ended for `reason`: what was held back, and the reason that the client is told.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> (Vec<MessagePart>, FinishReason) {
        let mut parts = Vec::new();
        for piece in self.splitter.as_mut().map(ReasoningSplitter::finish).unwrap_or_default() {
            self.add_piece(piece, &mut parts);
        }
        let was_cut = reason == FinishReason::Length;
        let pieces = self.parser.as_mut().map(|parser| parser.finish(was_cut)).unwrap_or_default();
        pieces.into_iter().for_each(|piece| self.add_tool_piece(piece, &mut parts));
        parts.extend(self.tokens.finish());
        let has_calls = self.parser.as_ref().is_some_and(|parser| parser.complete_calls() > 0);
        let reason = if has_calls && !was_cut { FinishReason::ToolCalls } else { reason };
        (self.count(parts), reason)
    }

    /// Tokens of the thoughts so far, markers not counted.
    pub(crate) fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    fn add_piece(&mut self, piece: TextPiece, parts: &mut Vec<MessagePart>) {
        let bytes = piece.text.len();
        match piece.part {
            TextPart::Markup => self.tokens.pass(bytes, MessageDelta::Markup, parts),
            TextPart::Reasoning => self.tokens.pass(bytes, MessageDelta::Reasoning(piece.text), parts),
            TextPart::Content => self.add_content(&piece.text, parts),
        }
    }

    fn add_content(&mut self, text: &str, parts: &mut Vec<MessagePart>) {
        match &mut self.parser {
            None => self.tokens.pass(text.len(), MessageDelta::Content(text.to_owned()), parts),
            Some(parser) => {
                for piece in parser.push(text) {
                    self.add_tool_piece(piece, parts);
                }
            }
        }
    }

    fn add_tool_piece(&mut self, piece: ToolPiece, parts: &mut Vec<MessagePart>) {
        let delta = match piece.delta {
            ToolDelta::Content(text) => MessageDelta::Content(text),
            ToolDelta::Call(name) => {
                self.calls += 1;
                MessageDelta::ToolCall { index: self.calls - 1, id: new_item_id("call"), name }
            }
            ToolDelta::Arguments(text) => {
                MessageDelta::ToolArguments { index: self.calls.saturating_sub(1), text }
            }
            ToolDelta::Markup => MessageDelta::Markup,
        };
        self.tokens.pass(piece.bytes, delta, parts);
    }

    /// Counts thought tokens, and leaves out what has nothing in it.
    fn count(&mut self, mut parts: Vec<MessagePart>) -> Vec<MessagePart> {
        for part in &parts {
            if let MessageDelta::Reasoning(_) = part.delta {
                let count = u32::try_from(part.tokens.len()).unwrap_or(u32::MAX);
                self.reasoning_tokens = self.reasoning_tokens.saturating_add(count);
            }
        }
        parts.retain(|part| part.delta.is_visible() || !part.tokens.is_empty());
        parts
    }
}

/// Which tokens belong to which part of the text: a token belongs where its first byte is.
#[derive(Debug, Default)]
struct TokenPlaces {
    /// Tokens that no part has yet, with the places of their first bytes in the text.
    waiting: VecDeque<(usize, ReleasedToken)>,
    /// Where the next token begins.
    next: usize,
    /// Parts whose tokens may still come: what they are, without text, and where they end.
    passed: VecDeque<(usize, MessageDelta)>,
    /// Where the next part begins.
    position: usize,
}

impl TokenPlaces {
    /// Takes in tokens; those of parts that are known already come back as parts without text.
    fn push(&mut self, tokens: Vec<ReleasedToken>) -> Vec<MessagePart> {
        let mut parts: Vec<MessagePart> = Vec::new();
        for token in tokens {
            let start = self.next;
            self.next += token.bytes;
            while self.passed.front().is_some_and(|(end, _)| *end <= start) {
                self.passed.pop_front();
            }
            match (self.passed.front(), parts.last_mut()) {
                (Some((_, delta)), Some(last)) if last.delta == *delta => last.tokens.push(token),
                (Some((_, delta)), _) => {
                    parts.push(MessagePart { delta: delta.clone(), tokens: vec![token] });
                }
                (None, _) => self.waiting.push_back((start, token)),
            }
        }
        parts
    }

    /// The next `bytes` of the text are `delta`.
    fn pass(&mut self, bytes: usize, delta: MessageDelta, parts: &mut Vec<MessagePart>) {
        self.position += bytes;
        let mut tokens = Vec::new();
        while let Some((start, token)) = self.waiting.pop_front() {
            if start >= self.position {
                self.waiting.push_front((start, token));
                break;
            }
            tokens.push(token);
        }
        if self.next < self.position {
            let kind = match delta {
                MessageDelta::Content(_) => MessageDelta::Content(String::new()),
                MessageDelta::Reasoning(_) => MessageDelta::Reasoning(String::new()),
                _ => MessageDelta::Markup,
            };
            match self.passed.back_mut() {
                Some((end, last)) if *last == kind => *end = self.position,
                _ => self.passed.push_back((self.position, kind)),
            }
        }
        parts.push(MessagePart { delta, tokens });
    }

    /// Tokens without text at the end are content: end tokens that are to be seen, say.
    fn finish(&mut self) -> Option<MessagePart> {
        let tokens: Vec<_> = self.waiting.drain(..).map(|(_, token)| token).collect();
        let delta = MessageDelta::Content(String::new());
        (!tokens.is_empty()).then_some(MessagePart { delta, tokens })
    }
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// `call_…`
    pub(crate) id: String,
    /// Name of the function.
    pub(crate) name: String,
    /// JSON text of an object; it may be cut off if the finish reason is `length`.
    pub(crate) arguments: String,
}

/// A whole message.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Message {
    /// Thoughts, if there are any.
    pub(crate) reasoning: Option<String>,
    /// `None` if the message is calls only.
    pub(crate) content: Option<String>,
    /// Tokens of the content.
    pub(crate) content_tokens: Vec<ReleasedToken>,
    /// Calls in order.
    pub(crate) tool_calls: Vec<ToolCall>,
    /// Tokens of the thoughts.
    pub(crate) reasoning_tokens: u32,
}

impl Message {
    /// Reads a whole text that ended for `reason`, and says the reason that the client is told.
    pub(crate) fn read(
        plan: &MessagePlan,
        text: String,
        tokens: Vec<ReleasedToken>,
        reason: FinishReason,
    ) -> (Self, FinishReason) {
        let mut reader = plan.reader();
        let mut message = Self::default();
        reader
            .push(Delta { text, tokens, ..Delta::default() })
            .into_iter()
            .for_each(|part| message.add(part));
        let (parts, reason) = reader.finish(reason);
        parts.into_iter().for_each(|part| message.add(part));
        message.reasoning_tokens = reader.reasoning_tokens();
        if message.content.is_none() && message.tool_calls.is_empty() {
            message.content = Some(String::new());
        }
        (message, reason)
    }

    /// Appends a piece.
    pub(crate) fn add(&mut self, part: MessagePart) {
        match part.delta {
            MessageDelta::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            MessageDelta::Content(text) => {
                if !text.is_empty() {
                    self.content.get_or_insert_default().push_str(&text);
                }
                self.content_tokens.extend(part.tokens);
            }
            MessageDelta::ToolCall { id, name, .. } => {
                self.tool_calls.push(ToolCall { id, name, arguments: String::new() });
            }
            MessageDelta::ToolArguments { text, .. } => {
                if let Some(call) = self.tool_calls.last_mut() {
                    call.arguments.push_str(&text);
                }
            }
            MessageDelta::Markup => {}
        }
    }
}

#[cfg(test)]
mod tests;
