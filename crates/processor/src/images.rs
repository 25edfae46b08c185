//! Images in conversations: what stands for them in the prompt's text and ids.
//!
//! A message has parts `{"type": "image"}`. The chat template prints a placeholder for each, its own
//! if it knows images, else one that is put in their place here; each placeholder is one id, which
//! whoever runs the prompt replaces by the image's visual tokens. What users write is never taken for
//! a placeholder.

use serde_json::{Value, json};

/// What a placeholder is called where neither tokenizer nor template has a name for it.
const USUAL_TEXT: &str = "<image>";

/// The id that stands for an image where the tokenizer has none. No vocabulary is that large.
const FOREIGN_ID: u32 = u32::MAX;

/// Put behind the first character of a placeholder that somebody wrote: a space without width.
const APART: char = '\u{200B}';

/// The placeholder of a model that sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageToken {
    /// In rendered prompts.
    pub text: String,
    /// In prompt ids, before it is replaced by visual tokens.
    pub id: u32,
    /// What clients are told that visual tokens are: the model's own id, in its vocabulary or not.
    pub shown_id: u32,
}

impl ImageToken {
    /// A placeholder for the id that a checkpoint names; `text` is what the tokenizer says for it.
    pub(crate) fn known(id: u32, text: String) -> Self {
        Self { text, id, shown_id: id }
    }

    /// A placeholder that the tokenizer does not know.
    pub(crate) fn foreign(shown_id: Option<u32>) -> Self {
        Self { text: USUAL_TEXT.into(), id: FOREIGN_ID, shown_id: shown_id.unwrap_or(0) }
    }

    /// Whether the tokenizer makes `id` of `text`.
    pub fn is_known(&self) -> bool {
        self.id != FOREIGN_ID
    }

    /// The text that is looked for where a checkpoint names no id.
    pub(crate) fn usual_text() -> &'static str {
        USUAL_TEXT
    }
}

/// What a chat template does with images.
#[derive(Debug, Clone)]
pub(crate) struct ImageForm {
    /// The placeholder.
    text: String,
    /// It prints one for each image.
    is_native: bool,
    /// It prints images and texts in their order; others print a message's images first.
    keeps_order: bool,
}

impl ImageForm {
    /// By what a template prints of two probes.
    pub(crate) fn probe(text: &str, render: impl Fn(Value) -> Option<String>) -> Self {
        let image = || json!({"type": "image"});
        let said = |text: &str| json!({"type": "text", "text": text});
        let printed = render(json!([image(), image(), said("PROBE")]));
        let is_native = printed.is_some_and(|printed| {
            printed.matches(text).count() == 2 && printed.contains("PROBE") && !printed.contains("\"type\"")
        });
        let keeps_order = is_native
            && render(json!([said("BEFORE"), image(), said("BEHIND")])).is_some_and(|printed| {
                let at = |text: &str| printed.find(text);
                at("BEFORE") < at(text) && at(text) < at("BEHIND")
            });
        Self { text: text.to_owned(), is_native, keeps_order }
    }

    /// The parts of a message as one text, if the template would not print them as they stand.
    pub(crate) fn inlined(&self, parts: &[Value]) -> Option<String> {
        let last_image = parts.iter().rposition(is_image)?;
        let are_first = parts[..last_image].iter().all(is_image);
        if self.is_native && (self.keeps_order || are_first) {
            return None;
        }
        let texts = parts.iter().filter_map(|part| match is_image(part) {
            true => Some(self.text.as_str()),
            false => part.get("text").or_else(|| part.get("refusal"))?.as_str(),
        });
        Some(texts.collect::<Vec<_>>().join("\n"))
    }

    /// Tells placeholders that somebody wrote apart from those that stand for images.
    pub(crate) fn defuse(&self, value: &mut Value) {
        match value {
            Value::String(text) if text.contains(&self.text) => {
                let mut letters = self.text.chars();
                let first: String = letters.next().into_iter().collect();
                let apart = format!("{first}{APART}{}", letters.as_str());
                *text = text.replace(&self.text, &apart);
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.defuse(item)),
            Value::Object(entries) => entries.values_mut().for_each(|value| self.defuse(value)),
            _ => {}
        }
    }
}

/// Whether a part of a message's content is an image.
pub fn is_image(part: &Value) -> bool {
    part.get("type").is_some_and(|kind| kind == "image")
}

/// The image parts of a conversation, in their order.
pub fn images(messages: &[Value]) -> impl Iterator<Item = &Value> {
    let parts = messages.iter().filter_map(|message| message.get("content")?.as_array()).flatten();
    parts.filter(|part| is_image(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_write_is_no_placeholder() {
        let form = ImageForm { text: "<image>".into(), is_native: false, keeps_order: false };
        let mut value = json!({"content": [{"type": "text", "text": "a <image> and <image>"}], "n": 1});
        form.defuse(&mut value);
        let text = value["content"][0]["text"].as_str().expect("a text");
        assert_eq!(text, "a <\u{200B}image> and <\u{200B}image>");
        assert_eq!(value["n"], 1);
    }

    #[test]
    fn parts_are_joined_only_where_the_template_cannot() {
        let form = |is_native, keeps_order| ImageForm { text: "<image>".into(), is_native, keeps_order };
        let image = json!({"type": "image", "index": 0});
        let text = |text: &str| json!({"type": "text", "text": text});
        let first = [image.clone(), image.clone(), text("a")];
        let mixed = [text("a"), image.clone(), text("b"), image];
        assert_eq!(form(true, false).inlined(&first), None);
        assert_eq!(form(true, true).inlined(&mixed), None);
        assert_eq!(form(true, false).inlined(&mixed).as_deref(), Some("a\n<image>\nb\n<image>"));
        assert_eq!(form(false, false).inlined(&first).as_deref(), Some("<image>\n<image>\na"));
        assert_eq!(form(false, false).inlined(&[text("a")]), None);
    }
}
