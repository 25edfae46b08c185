//! A conversation to prompt ids: instructions are counted, answers that the model gave itself become
//! the tokens that it gave.

use std::{ops::Range, sync::Arc};

use locket_processor::{
    ChatPrompt, Error, Processor,
    images::images,
    reasoning::{ReasoningMode, ReasoningProfile, ThoughtStart},
};
use serde_json::{Value, json};

use crate::{
    turns::{TurnMemory, TurnPrefix},
    visual::{Picture, PromptImages},
};

/// A prompt as ids, and what the cache wants to know about it.
#[derive(Debug, Clone, Default)]
pub(crate) struct PromptIds {
    /// Token ids.
    pub(crate) ids: Vec<u32>,
    /// First tokens that are instructions: system messages, and what the template says of itself.
    pub(crate) pinned: u32,
    /// Tokens in front of the answer's header.
    pub(crate) snapshot_at: Option<u32>,
    /// The prompt as the prefix of the turn that follows, if that is to be remembered.
    pub(crate) turn: Option<TurnPrefix>,
    /// What the answer begins with, if the model has thoughts.
    pub(crate) thought: Option<ThoughtStart>,
    /// Where among the ids placeholders of images stand, ascending.
    pub(crate) placeholders: Vec<u32>,
    /// The images that they stand for.
    pub(crate) pictures: Vec<Arc<Picture>>,
    /// What has been put in their place.
    pub(crate) images: PromptImages,
}

impl From<Vec<u32>> for PromptIds {
    fn from(ids: Vec<u32>) -> Self {
        Self { ids, ..Self::default() }
    }
}

impl PromptIds {
    /// Finds the placeholders of images among the ids. Where the tokenizer has no id for them, they get
    /// one that the model knows: rows take their place, so it is never looked up.
    fn find_placeholders(&mut self, processor: &Processor) {
        let Some(token) = processor.image_token() else { return };
        let places = (0u32..).zip(&self.ids).filter(|(_, id)| **id == token.id);
        self.placeholders = places.map(|(place, _)| place).collect();
        if !token.is_known() {
            self.placeholders.iter().for_each(|place| self.ids[*place as usize] = 0);
        }
    }

    /// Keeps the last `keep` tokens.
    pub(crate) fn truncate_front(&mut self, keep: usize) {
        let cut = self.ids.len().saturating_sub(keep);
        self.ids.drain(..cut);
        let cut = u32::try_from(cut).unwrap_or(u32::MAX);
        self.pinned = self.pinned.saturating_sub(cut);
        self.snapshot_at = self.snapshot_at.and_then(|at| at.checked_sub(cut)).filter(|at| *at > 0);
    }
}

/// What is wanted of a conversation beside its ids.
#[derive(Clone, Copy, Default)]
pub(crate) struct ChatWishes<'a> {
    /// What the model said, and whose turns may be used.
    pub(crate) turns: Option<(&'a TurnMemory, &'a [u8])>,
    /// Count at most so many tokens of instructions.
    pub(crate) most_pinned: u32,
    /// Find the place in front of the answer's header.
    pub(crate) wants_snapshot: bool,
    /// The tokenizer's own additions (start token, …).
    pub(crate) add_special_tokens: bool,
    /// How thoughts are marked, and what the prompt's end is to say about thinking.
    pub(crate) reasoning: Option<(&'a ReasoningProfile, Option<ReasoningMode>)>,
}

/// Stands for a text that is looked for in a prompt. Private-use characters, which no message has,
/// or else nothing is looked for.
const MARK: char = '\u{E000}';

/// Text to ids, with the tokenizer's own additions or without.
type Encode<'a> = dyn Fn(&str, bool) -> Result<Vec<u32>, Error> + 'a;

/// Renders and tokenises.
///
/// # Errors
/// The template's and the tokenizer's.
pub(crate) fn encode(
    processor: &Processor,
    mut chat: ChatPrompt,
    wishes: ChatWishes<'_>,
) -> Result<PromptIds, Error> {
    let has_images = images(&chat.messages).next().is_some();
    processor.write_out_tools(&mut chat);
    let rendered = processor.render_chat(&chat)?;
    let mut text = rendered.clone();
    let thought = wishes.reasoning.map(|(profile, mode)| begin_answer(profile, mode, &chat, &mut text));
    // Where there are no images, a text has no placeholders either.
    let encode: &Encode<'_> = match has_images {
        true => &|text, add| processor.encode_prompt(text, add),
        false => &|text, add| processor.encode(text, add),
    };
    let mut spliced = None;
    // Added tokens would stand in every piece.
    if let Some((memory, salt)) = wishes.turns.filter(|_| !wishes.add_special_tokens) {
        let spans = if memory.is_empty() { Vec::new() } else { answers(processor, &mut chat, &rendered) };
        spliced = Some(splice(processor, encode, &text, &spans, memory, salt)?);
    }
    let (ids, turn) = match spliced {
        Some((Some(ids), turn)) => (ids, Some(turn)),
        Some((None, turn)) => (encode(&text, false)?, Some(turn)),
        None => (encode(&text, wishes.add_special_tokens)?, None),
    };
    let pinned = match wishes.most_pinned {
        0 => 0,
        most => instructions(processor, &chat, &text, &ids, most),
    };
    let has_header = chat.add_generation_prompt;
    let snapshot_at = if wishes.wants_snapshot && has_header {
        before_header(processor, &mut chat, &text, &ids)
    } else {
        None
    };
    // An answer without its header, or one that was begun, does not come back as it is.
    let turn = turn.filter(|_| has_header);
    let mut prompt = PromptIds { ids, pinned, snapshot_at, turn, thought, ..PromptIds::default() };
    if has_images {
        prompt.find_placeholders(processor);
    }
    Ok(prompt)
}

/// Makes the end of the prompt say whether to think, and says what the answer begins with. A message
/// that goes on, or an answer without a header, is left as it is.
fn begin_answer(
    profile: &ReasoningProfile,
    mode: Option<ReasoningMode>,
    chat: &ChatPrompt,
    text: &mut String,
) -> ThoughtStart {
    if chat.add_generation_prompt {
        return profile.prepare(text, mode);
    }
    let last = chat.messages.last().filter(|_| chat.continue_final_message).cloned();
    let said = last.and_then(|mut message| text_of(&mut message).map(std::mem::take));
    said.map_or(ThoughtStart::Undecided, |said| profile.after(&said))
}

/// The text of a message whose content is text only, or one part of text.
fn text_of(message: &mut Value) -> Option<&mut String> {
    match message.get_mut("content")? {
        Value::String(text) => Some(text),
        Value::Array(parts) => match parts.as_mut_slice() {
            [Value::Object(part)] => match part.get_mut("text")? {
                Value::String(text) => Some(text),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// Where in the rendered `text` the assistant's messages stand, word for word, in order.
fn answers(processor: &Processor, chat: &mut ChatPrompt, text: &str) -> Vec<Range<usize>> {
    if chat.continue_final_message || text.contains(MARK) {
        return Vec::new();
    }
    let mark = |index: usize| format!("{MARK}answer {index}{MARK}");
    let mut originals: Vec<(usize, String)> = Vec::new();
    for (index, message) in chat.messages.iter_mut().enumerate() {
        if message["role"] == "assistant"
            && let Some(content) = text_of(message).filter(|content| !content.is_empty())
        {
            originals.push((index, std::mem::replace(content, mark(index))));
        }
    }
    let marked = if originals.is_empty() { None } else { processor.render_chat(chat).ok() };
    for (index, original) in &originals {
        if let Some(content) = chat.messages.get_mut(*index).and_then(text_of) {
            content.clone_from(original);
        }
    }
    let marks = originals.iter().map(|(index, original)| (mark(*index), original.as_str()));
    marked.and_then(|marked| find_marks(&marked, text, marks)).unwrap_or_default()
}

/// The places of marked texts, if `text` is `marked` with those in place of their marks. A template
/// may trim a text: then it has no place, since it is not what was said.
fn find_marks<'a>(
    marked: &str,
    text: &str,
    marks: impl Iterator<Item = (String, &'a str)>,
) -> Option<Vec<Range<usize>>> {
    let (mut marked, mut at) = (marked, 0);
    let mut places = Vec::new();
    for (mark, original) in marks {
        let (before, after) = marked.split_once(&mark)?;
        marked = after;
        at += text[at..].strip_prefix(before).map(|_| before.len())?;
        if text[at..].starts_with(original) {
            places.push(at..at + original.len());
            at += original.len();
        } else {
            at += text[at..].strip_prefix(original.trim()).map(|_| original.trim().len())?;
        }
    }
    (&text[at..] == marked).then_some(places)
}

/// The ids of `text` with remembered turns in the places where they stand, or none if there are none;
/// and the prefix that the whole is.
fn splice(
    processor: &Processor,
    encode: &Encode<'_>,
    text: &str,
    spans: &[Range<usize>],
    memory: &TurnMemory,
    salt: &[u8],
) -> Result<(Option<Vec<u32>>, TurnPrefix), Error> {
    let mut prefix = TurnPrefix::new(salt);
    let mut ids = Vec::new();
    // Up to here the text is in `ids`, and up to there in `prefix`.
    let (mut encoded, mut hashed) = (0, 0);
    for span in spans {
        prefix.push_text(&text[hashed..span.start]);
        hashed = span.start;
        if let Some(turn) = memory.find(&prefix, &text[span.clone()]) {
            // Encoded by itself, as it was when the turn was generated after it.
            ids.extend(encode(&text[encoded..span.start], false)?);
            ids.extend_from_slice(&turn);
            prefix.push_turn(&turn);
            (encoded, hashed) = (span.end, span.end);
        }
    }
    prefix.push_text(&text[hashed..]);
    if encoded == 0 {
        return Ok((None, prefix));
    }
    ids.extend(encode(&text[encoded..], false)?);
    // A tokenizer that adds to each text that it gets (a space, say) cannot take them piece by piece.
    if processor.decode(&ids, false) == text {
        return Ok((Some(ids), prefix));
    }
    let mut plain = TurnPrefix::new(salt);
    plain.push_text(text);
    Ok((None, plain))
}

/// How many of the first `ids` are instructions, at most `most`: what does not change when the
/// first message that is none does.
fn instructions(processor: &Processor, chat: &ChatPrompt, text: &str, ids: &[u32], most: u32) -> u32 {
    let is_instruction = |message: &&Value| message["role"] == "system" || message["role"] == "developer";
    let mut messages: Vec<Value> = chat.messages.iter().take_while(is_instruction).cloned().collect();
    messages.push(json!({"role": "user", "content": MARK.to_string()}));
    let probe = ChatPrompt {
        messages,
        tools: chat.tools.clone(),
        documents: chat.documents.clone(),
        kwargs: chat.kwargs.clone(),
        ..ChatPrompt::default()
    };
    let Ok(probe) = processor.render_chat(&probe) else { return 0 };
    let same = text.chars().zip(probe.chars()).take_while(|(ours, theirs)| ours == theirs);
    let shared: usize = same.map(|(character, _)| character.len_utf8()).sum();
    // A tokenizer that puts a space in front of every text shows it in the first token.
    let starts_with_space = ids.first().is_some_and(|id| processor.token_bytes(*id).starts_with(b" "));
    let mut end = 0;
    let room = shared + usize::from(starts_with_space && !text.starts_with(' '));
    let whole = ids.iter().take(most as usize).take_while(|id| {
        end += processor.token_bytes(**id).len();
        end <= room
    });
    // At most `most`.
    whole.count() as u32
}

/// Tokens in front of the answer's header, if it is at the end of the text.
fn before_header(processor: &Processor, chat: &mut ChatPrompt, text: &str, ids: &[u32]) -> Option<u32> {
    chat.add_generation_prompt = false;
    let without = processor.render_chat(chat);
    chat.add_generation_prompt = true;
    let header = text.strip_prefix(without.ok()?.as_str())?;
    let mut left = header.len();
    let mut count = ids.len();
    // A token that is partly the header's belongs to it.
    while left > 0 {
        count = count.checked_sub(1)?;
        left = left.saturating_sub(processor.token_bytes(ids[count]).len());
    }
    u32::try_from(count).ok().filter(|count| *count > 0)
}

#[cfg(test)]
mod tests;
