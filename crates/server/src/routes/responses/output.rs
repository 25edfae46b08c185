//! The answer's items, put together piece by piece. Streamed and unstreamed answers are both made
//! here, so they cannot differ: the one hears of every step, the other takes the result.

use serde::Serialize;
use utoipa::ToSchema;

use super::events::Event;
use crate::{
    message::MessageDelta,
    openai::{ChatLogprob, new_item_id},
};

/// How far an item or a response has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = ResponseStatus)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

/// Something that never has elements.
type Never = [u8; 0];

/// One item of `output`.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(as = ResponseItem)]
pub(super) enum Item {
    /// Thoughts.
    Reasoning {
        id: String,
        #[schema(value_type = Vec<Object>)]
        summary: Never,
        content: Vec<ReasoningText>,
        status: Status,
    },
    /// What is said.
    Message { id: String, role: &'static str, status: Status, content: Vec<OutputText> },
    /// A call of a tool.
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
}

/// The one part of thoughts.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename = "reasoning_text")]
pub(super) struct ReasoningText {
    text: String,
}

/// The one part of a message.
#[derive(Debug, Default, Serialize, ToSchema)]
#[serde(tag = "type", rename = "output_text")]
pub(super) struct OutputText {
    text: String,
    #[schema(value_type = Vec<Object>)]
    annotations: Never,
    logprobs: Vec<ChatLogprob>,
}

impl Item {
    fn reasoning() -> Self {
        let (id, status) = (new_item_id("rs"), Status::InProgress);
        Self::Reasoning { id, summary: [], content: Vec::new(), status }
    }

    fn message() -> Self {
        let (id, status) = (new_item_id("msg"), Status::InProgress);
        Self::Message { id, role: "assistant", status, content: Vec::new() }
    }

    fn call(call_id: String, name: String) -> Self {
        let (id, status) = (new_item_id("fc"), Status::InProgress);
        Self::FunctionCall { id, call_id, name, arguments: String::new(), status }
    }

    fn status_mut(&mut self) -> &mut Status {
        match self {
            Self::Reasoning { status, .. }
            | Self::Message { status, .. }
            | Self::FunctionCall { status, .. } => status,
        }
    }
}

/// Who hears of every step.
pub(super) trait Listener {
    /// The next event.
    fn event(&mut self, event: &Event<'_>);
}

/// Nobody.
impl Listener for () {
    fn event(&mut self, _: &Event<'_>) {}
}

/// The items so far. Only the last one may be in progress.
#[derive(Debug, Default)]
pub(super) struct Output {
    items: Vec<Item>,
    is_open: bool,
}

impl Output {
    /// The items, in order.
    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Takes in a piece of the message. `logprobs` are those of its tokens; pieces of content only
    /// have some.
    pub(super) fn push(&mut self, delta: MessageDelta, logprobs: Vec<ChatLogprob>, to: &mut impl Listener) {
        match delta {
            MessageDelta::Reasoning(text) if !text.is_empty() => self.push_reasoning(&text, to),
            MessageDelta::Content(text) if !text.is_empty() || !logprobs.is_empty() => {
                self.push_content(&text, logprobs, to);
            }
            MessageDelta::ToolCall { id, name, .. } => self.open(Item::call(id, name), to),
            MessageDelta::ToolArguments { text, .. } => self.push_arguments(&text, to),
            MessageDelta::Reasoning(_) | MessageDelta::Content(_) | MessageDelta::Markup => {}
        }
    }

    /// The end; what was cut off is incomplete. An answer of nothing is an empty message.
    pub(super) fn finish(&mut self, is_cut: bool, to: &mut impl Listener) {
        if self.items.is_empty() {
            self.push_content("", Vec::new(), to);
        }
        self.close(if is_cut { Status::Incomplete } else { Status::Completed }, to);
    }

    /// The end of an answer that failed: nobody hears of its last item any more.
    pub(super) fn abandon(&mut self) {
        self.close(Status::Incomplete, &mut ());
    }

    fn push_reasoning(&mut self, piece: &str, to: &mut impl Listener) {
        if !(self.is_open && matches!(self.items.last(), Some(Item::Reasoning { .. }))) {
            self.open(Item::reasoning(), to);
        }
        let output_index = self.items.len().saturating_sub(1);
        let Some(Item::Reasoning { id, content, .. }) = self.items.last_mut() else { return };
        match content.last_mut() {
            Some(part) => part.text.push_str(piece),
            None => content.push(ReasoningText { text: piece.to_owned() }),
        }
        to.event(&Event::ReasoningDelta { item_id: id, output_index, content_index: 0, delta: piece });
    }

    fn push_content(&mut self, piece: &str, logprobs: Vec<ChatLogprob>, to: &mut impl Listener) {
        if !(self.is_open && matches!(self.items.last(), Some(Item::Message { .. }))) {
            self.open(Item::message(), to);
        }
        let output_index = self.items.len().saturating_sub(1);
        let Some(Item::Message { id, content, .. }) = self.items.last_mut() else { return };
        if content.is_empty() {
            let part = OutputText::default();
            to.event(&Event::PartAdded { item_id: id, output_index, content_index: 0, part: &part });
            content.push(part);
        }
        let Some(part) = content.last_mut() else { return };
        if !piece.is_empty() || !logprobs.is_empty() {
            to.event(&Event::TextDelta {
                item_id: id,
                output_index,
                content_index: 0,
                delta: piece,
                logprobs: &logprobs,
            });
        }
        part.text.push_str(piece);
        part.logprobs.extend(logprobs);
    }

    fn push_arguments(&mut self, piece: &str, to: &mut impl Listener) {
        let output_index = self.items.len().saturating_sub(1);
        let Some(Item::FunctionCall { id, arguments, .. }) = self.items.last_mut() else { return };
        arguments.push_str(piece);
        to.event(&Event::ArgumentsDelta { item_id: id, output_index, delta: piece });
    }

    /// Begins an item; the one before it is complete.
    fn open(&mut self, item: Item, to: &mut impl Listener) {
        self.close(Status::Completed, to);
        to.event(&Event::ItemAdded { output_index: self.items.len(), item: &item });
        self.items.push(item);
        self.is_open = true;
    }

    /// Ends the item in progress, if there is one.
    fn close(&mut self, status: Status, to: &mut impl Listener) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let output_index = self.items.len().saturating_sub(1);
        let Some(item) = self.items.last_mut() else { return };
        *item.status_mut() = status;
        match item {
            Item::Reasoning { id: item_id, content, .. } => {
                let text = content.first().map_or("", |part| part.text.as_str());
                to.event(&Event::ReasoningDone { item_id, output_index, content_index: 0, text });
            }
            Item::Message { id: item_id, content, .. } => {
                for part in content {
                    let (text, logprobs) = (part.text.as_str(), part.logprobs.as_slice());
                    to.event(&Event::TextDone { item_id, output_index, content_index: 0, text, logprobs });
                    to.event(&Event::PartDone { item_id, output_index, content_index: 0, part });
                }
            }
            Item::FunctionCall { id: item_id, name, arguments, .. } => {
                to.event(&Event::ArgumentsDone { item_id, output_index, arguments, name });
            }
        }
        to.event(&Event::ItemDone { output_index, item });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{routes::responses::events::EventWriter, stream::Frames};

    /// A part of a message, whole.
    #[derive(Debug, Clone)]
    enum Block {
        Thought(String),
        Text(String),
        Call(String, String),
    }

    fn blocks() -> impl Strategy<Value = Vec<Block>> {
        let text = || "[a\u{e9}\u{1f600}\n\"{} ]{1,12}";
        let block = prop_oneof![
            text().prop_map(Block::Thought),
            text().prop_map(Block::Text),
            ("[a-z]{1,8}", text()).prop_map(|(name, arguments)| Block::Call(name, arguments)),
        ];
        proptest::collection::vec(block, 0..6)
    }

    /// The blocks in pieces; `cuts` says how long each is. Pieces of nothing stand between them.
    fn pieces(blocks: &[Block], cuts: &[usize]) -> Vec<MessageDelta> {
        let mut cuts = cuts.iter().cycle();
        let mut cut = |text: &str| {
            let (mut pieces, mut rest) = (Vec::new(), text);
            while !rest.is_empty() {
                let length = cuts.next().copied().unwrap_or(1);
                let end = rest.char_indices().nth(length).map_or(rest.len(), |(at, _)| at);
                pieces.push(rest[..end].to_owned());
                rest = &rest[end..];
            }
            pieces
        };
        let mut all = vec![MessageDelta::Content(String::new()), MessageDelta::Reasoning(String::new())];
        let mut calls = 0;
        for block in blocks {
            all.push(MessageDelta::Markup);
            match block {
                Block::Thought(text) => all.extend(cut(text).into_iter().map(MessageDelta::Reasoning)),
                Block::Text(text) => all.extend(cut(text).into_iter().map(MessageDelta::Content)),
                Block::Call(name, arguments) => {
                    let id = format!("call_{calls}");
                    all.push(MessageDelta::ToolCall { index: calls, id, name: name.clone() });
                    let texts = cut(arguments).into_iter();
                    all.extend(texts.map(|text| MessageDelta::ToolArguments { index: calls, text }));
                    calls += 1;
                }
            }
        }
        all
    }

    /// All items, without their random ids.
    fn anonymous(items: &[Item]) -> Value {
        let mut items = json!(items);
        for item in items.as_array_mut().expect("an array") {
            item["id"] = Value::Null;
        }
        items
    }

    fn told(pieces: Vec<MessageDelta>, is_cut: bool) -> (Vec<Value>, Output) {
        let (mut frames, mut sequence_number, mut output) = (Frames::default(), 0, Output::default());
        let mut writer = EventWriter { sequence_number: &mut sequence_number, frames: &mut frames };
        for piece in pieces {
            output.push(piece, Vec::new(), &mut writer);
        }
        output.finish(is_cut, &mut writer);
        let bytes = frames.take();
        let text = str::from_utf8(&bytes).expect("text").to_owned();
        let events = text.split_terminator("\n\n").map(|event| {
            let (name, data) = event.split_once('\n').expect("two lines");
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            data
        });
        (events.collect(), output)
    }

    /// Follows the events of one item from its start, checks their order, and returns it as it ends.
    fn item<'e>(events: &mut impl Iterator<Item = &'e Value>, index: usize) -> Option<Value> {
        let added = events.next()?;
        assert_eq!(
            (&added["type"], &added["output_index"]),
            (&json!("response.output_item.added"), &json!(index))
        );
        assert_eq!(added["item"]["status"], "in_progress");
        let (id, kind) = (added["item"]["id"].clone(), added["item"]["type"].as_str().expect("a type"));
        let (delta, done, key) = match kind {
            "message" => ("response.output_text.delta", "response.output_text.done", "text"),
            "reasoning" => ("response.reasoning_text.delta", "response.reasoning_text.done", "text"),
            _ => (
                "response.function_call_arguments.delta",
                "response.function_call_arguments.done",
                "arguments",
            ),
        };
        let mut next = || {
            let event = events.next().expect("the item goes on");
            assert_eq!(event["output_index"], index);
            event
        };
        let belongs = |event: &Value| {
            assert_eq!(event["item_id"], id);
            assert_eq!(event["content_index"], if kind == "function_call" { Value::Null } else { json!(0) });
        };
        if kind == "message" {
            let part = next();
            belongs(part);
            assert_eq!(part["type"], "response.content_part.added");
            assert_eq!(
                part["part"],
                json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            );
        }
        let mut joined = String::new();
        let end = loop {
            let event = next();
            belongs(event);
            if event["type"] != delta {
                break event;
            }
            assert_eq!(event.get("logprobs").is_some(), kind == "message");
            joined.push_str(event["delta"].as_str().expect("text"));
        };
        assert_eq!((&end["type"], end[key].as_str()), (&json!(done), Some(joined.as_str())));
        if kind == "message" {
            let part = next();
            belongs(part);
            assert_eq!(
                (&part["type"], &part["part"]["text"]),
                (&json!("response.content_part.done"), &json!(joined))
            );
        }
        let done = next();
        assert_eq!((&done["type"], &done["item"]["id"]), (&json!("response.output_item.done"), &id));
        Some(done["item"].clone())
    }

    proptest! {
        /// However a message is cut into pieces: the events are numbered without gaps, each item's
        /// stand together in order, deltas join to what is done, and the result is that of the
        /// unstreamed answer.
        #[test]
        fn streams_follow_the_grammar(
            blocks in blocks(),
            cuts in proptest::collection::vec(1usize..5, 1..8),
            is_cut: bool,
        ) {
            let (events, output) = told(pieces(&blocks, &cuts), is_cut);
            for (number, event) in events.iter().enumerate() {
                prop_assert_eq!(&event["sequence_number"], number);
            }
            let mut rest = events.iter();
            let items: Vec<Value> = (0..).map_while(|index| item(&mut rest, index)).collect();
            prop_assert_eq!(json!(items), json!(output.items()));
            let mut unstreamed = Output::default();
            for piece in pieces(&blocks, &[usize::MAX]) {
                unstreamed.push(piece, Vec::new(), &mut ());
            }
            unstreamed.finish(is_cut, &mut ());
            prop_assert_eq!(anonymous(output.items()), anonymous(unstreamed.items()));
            let (last, before) = items.split_last().expect("an item");
            prop_assert_eq!(&last["status"], if is_cut { "incomplete" } else { "completed" });
            prop_assert!(before.iter().all(|item| item["status"] == "completed"));
            prop_assert_eq!(items.iter().filter(|item| item["type"] == "function_call").count(),
                blocks.iter().filter(|block| matches!(block, Block::Call(..))).count());
        }
    }

    #[test]
    fn an_answer_of_nothing_is_an_empty_message() {
        let (events, output) = told(Vec::new(), false);
        assert_eq!(events.len(), 5, "added, part added, text done, part done, done");
        let wanted = json!([{"type": "message", "id": null, "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]}]);
        assert_eq!(anonymous(output.items()), wanted);
    }

    /// The engine gave up in the middle: what there is stays, and is marked.
    #[test]
    fn an_abandoned_item_is_incomplete() {
        let mut output = Output::default();
        output.push(MessageDelta::Reasoning("hm".into()), Vec::new(), &mut ());
        output.push(MessageDelta::Content("I thi".into()), Vec::new(), &mut ());
        output.abandon();
        let statuses = anonymous(output.items());
        assert_eq!(
            (&statuses[0]["status"], &statuses[1]["status"]),
            (&json!("completed"), &json!("incomplete"))
        );
        assert_eq!(statuses[0]["content"], json!([{"type": "reasoning_text", "text": "hm"}]));
    }
}
