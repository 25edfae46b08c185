//! The conversation as a prompt; its oldest items are dropped if it is too long and may be cut.

use std::{collections::HashSet, sync::Arc};

use locket_processor::ChatPrompt;
use serde_json::{Value, json};

use super::ResponsesRequest;
use crate::{
    chat_ids::PromptIds,
    error::{ApiError, ErrorKind},
    generation::PromptSource,
    prompt::{self, ChatNeeds},
    run::Job,
    state::AppState,
    visual::{self, Picture},
};

/// Renders instructions and items, and tokenises them.
///
/// # Errors
/// As [`prompt::encode_chat`]. A conversation of which not even the last item fits is returned as
/// that item, for the check of lengths to refuse it with all numbers.
pub(super) async fn encode(state: &AppState, request: &mut ResponsesRequest) -> Result<PromptIds, ApiError> {
    let messages = std::mem::take(&mut request.messages);
    let template = ChatPrompt {
        tools: request.tools.rendered(),
        tool_format: state.tool_format().unwrap_or_default(),
        ..std::mem::take(&mut request.template).into_prompt()
    };
    let images = std::mem::take(&mut request.images);
    let pictures = visual::collect(state, images, &request.generation).await?;
    let conversation = Conversation { state, request, template, pictures };
    if !request.truncates {
        return conversation.encode(messages).await;
    }
    let room = Job::plan(state, &request.generation, PromptSource::Input).room() as usize;
    let starts = starts(&messages);
    // Usually everything fits; else the longest that does is looked for by halves.
    let (mut low, mut high, mut probe) = (0, starts.len().saturating_sub(1), 0);
    let mut kept = None;
    while low <= high
        && let Some(start) = starts.get(probe)
    {
        let is_shortest = probe + 1 == starts.len();
        let prompt = match conversation.encode(tail(&messages, *start)).await {
            Err(error) if error.kind == ErrorKind::ContextLengthExceeded && !is_shortest => None,
            prompt => Some(prompt?),
        };
        match prompt.filter(|prompt| is_shortest || prompt.planned_length().positions <= room) {
            Some(prompt) => {
                kept = Some(prompt);
                if probe == 0 {
                    break;
                }
                high = probe - 1;
            }
            None => low = probe + 1,
        }
        probe = low.midpoint(high);
    }
    kept.ok_or_else(|| ApiError::internal("a conversation without a start"))
}

struct Conversation<'a> {
    state: &'a AppState,
    request: &'a ResponsesRequest,
    /// Without messages.
    template: ChatPrompt,
    /// All images, those of messages that are dropped too.
    pictures: Vec<Arc<Picture>>,
}

impl Conversation<'_> {
    async fn encode(&self, messages: Vec<Value>) -> Result<PromptIds, ApiError> {
        let instructions = self.request.echo.instructions.as_deref();
        let instructions = instructions.map(|text| json!({"role": "system", "content": text}));
        let messages = instructions.into_iter().chain(messages).collect();
        let fields = &self.request.generation;
        let needs = ChatNeeds::of(self.state, fields);
        let prompt = ChatPrompt { messages, ..self.template.clone() };
        prompt::encode_chat(self.state, PromptSource::Input, prompt, needs, &self.pictures).await
    }
}

/// Where a shortened conversation may begin, in ascending order: at the start, then where somebody
/// asks, then at answers to the last question. Most templates want a question first.
fn starts(messages: &[Value]) -> Vec<usize> {
    let positions = |wanted: fn(&Value) -> bool| {
        messages.iter().enumerate().filter(move |(_, message)| wanted(message)).map(|(index, _)| index)
    };
    let mut starts = vec![0];
    starts.extend(positions(|message| message["role"] != "assistant" && message["role"] != "tool"));
    let last = starts.last().copied().unwrap_or(0);
    starts.extend(positions(|message| message["role"] == "assistant").filter(|index| *index > last));
    starts.dedup();
    starts
}

/// The messages from `start` on, without the results of calls that stand before it.
fn tail(messages: &[Value], start: usize) -> Vec<Value> {
    let kept = messages.get(start..).unwrap_or_default();
    let calls = kept.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
    let ids: HashSet<&str> = calls.filter_map(|call| call["id"].as_str()).collect();
    let belongs = |message: &&Value| message["tool_call_id"].as_str().is_none_or(|id| ids.contains(id));
    kept.iter().filter(belongs).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_are_cut_where_templates_can_begin() {
        let message = |role: &str| json!({"role": role, "content": "x"});
        let call = json!({"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]});
        let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": "x"});
        let messages = [
            message("assistant"),
            message("user"),
            call.clone(),
            message("user"),
            result("a"),
            message("assistant"),
            call.clone(),
            result("a"),
        ];
        assert_eq!(starts(&messages), [0, 1, 3, 5, 6]);
        assert_eq!(starts(&messages[1..2]), [0]);
        assert_eq!(tail(&messages[..5], 3), [message("user")], "the call is gone, so its result goes");
        assert_eq!(tail(&messages, 6), [call, result("a")]);
        assert_eq!(tail(&messages, 1).len(), 7);
    }
}
