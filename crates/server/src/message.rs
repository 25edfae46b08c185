//! The assistant's message: a choice's text, sorted into thoughts, content and calls of tools.
//!
//! Every route that answers with messages, streamed or not, reads them here, so the two cannot differ.

use crate::{
    choice::{Delta, ReleasedToken},
    openai::FinishReason,
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

/// How the messages of a request are read.
#[derive(Debug, Clone, Default)]
pub(crate) struct MessagePlan {}

impl MessagePlan {
    /// A reader for one choice.
    pub(crate) fn reader(&self) -> MessageReader {
        MessageReader::default()
    }
}

/// Reads one choice.
#[derive(Debug, Default)]
pub(crate) struct MessageReader {
    reasoning_tokens: u32,
}

impl MessageReader {
    /// Takes in what the choice released.
    pub(crate) fn push(&mut self, delta: Delta) -> Vec<MessagePart> {
        vec![MessagePart { delta: MessageDelta::Content(delta.text), tokens: delta.tokens }]
    }

    /// The text has ended for `reason`: what was held back, and the reason that the client is told.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> (Vec<MessagePart>, FinishReason) {
        (Vec::new(), reason)
    }

    /// Tokens of the thoughts so far, markers not counted.
    pub(crate) fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
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
