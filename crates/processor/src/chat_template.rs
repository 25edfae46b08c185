//! Conversations to prompt text, by the template that a checkpoint ships.
//!
//! The Jinja dialect and its environment are those of transformers, through `hf-chat-template`.
//! A template comes from the operator's checkpoint, never from a request: its size of output is
//! bounded here, its running time is not.

use serde_json::{Map, Value, json};

use crate::{
    ChatPrompt, Error,
    images::{self, ImageForm},
    reasoning::TemplateSwitches,
    tools::{self, ToolFormat},
};

/// The largest prompt text that a template may produce.
const MAX_PROMPT_BYTES: usize = 8 << 20;

/// Stands at the end of a message that is to be continued, so that its end is found in the prompt.
/// If the blank behind it is lost, the template trims messages.
const OPEN_END: &str = "\u{E000}the message goes on here\u{E000} ";

/// Variables that a request's own (`chat_template_kwargs`) may not replace.
const RESERVED: [&str; 7] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
];

/// A compiled template and what it was found to understand.
pub(crate) struct ChatTemplate {
    template: hf_chat_template::ChatTemplate,
    source: String,
    /// `bos_token` and the like, as the template's variables.
    special_tokens: Map<String, Value>,
    takes_text: bool,
    takes_parts: bool,
    knows_developer: bool,
    switches: TemplateSwitches,
    /// It prints tools.
    takes_tools: bool,
    /// It prints the arguments of calls that are objects, not texts.
    takes_objects: bool,
    tool_format: Option<ToolFormat>,
    /// What it does with images, if the model sees them.
    images: Option<ImageForm>,
}

impl ChatTemplate {
    /// Compiles a template and probes which form of content it prints.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not compile.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, Error> {
        let template =
            hf_chat_template::ChatTemplate::from_str(source).map_err(|error| template_error(&error))?;
        let mut this = Self {
            template,
            source: source.to_owned(),
            special_tokens,
            takes_text: true,
            takes_parts: false,
            knows_developer: source.contains("developer"),
            switches: TemplateSwitches::default(),
            takes_tools: false,
            takes_objects: false,
            tool_format: ToolFormat::detect(source),
            images: None,
        };
        let probe = |content: Value| {
            let messages = vec![json!({"role": "user", "content": content})];
            this.render_messages(messages, &ChatPrompt::default(), true).unwrap_or_default()
        };
        let text = probe(json!("PROBE"));
        let parts = probe(json!([{"type": "text", "text": "PROBE"}]));
        // A template that prints the list itself shows its keys.
        let takes_parts = parts.contains("PROBE") && !parts.contains("text");
        let takes_text = text.contains("PROBE") || !takes_parts;
        (this.takes_text, this.takes_parts) = (takes_text, takes_parts);
        this.takes_tools = source.contains("tools") && this.probe_tools();
        this.takes_objects = this.takes_tools && this.probe_arguments();
        this.switches = this.probe_switches();
        Ok(this)
    }

    fn probe_switches(&self) -> TemplateSwitches {
        let on_off = || [true.into(), false.into()];
        TemplateSwitches {
            enable_thinking: self.is_switch("enable_thinking", on_off()),
            thinking: self.is_switch("thinking", on_off()),
            reasoning_effort: self.is_switch("reasoning_effort", ["low".into(), "high".into()]),
        }
    }

    /// Whether a variable's value changes what is printed.
    fn is_switch(&self, name: &str, values: [Value; 2]) -> bool {
        if !self.source.contains(name) {
            return false;
        }
        let [first, second] = values.map(|value| {
            let kwargs = Map::from_iter([(name.to_owned(), value)]);
            let messages = vec![json!({"role": "user", "content": "PROBE"})];
            self.render(&ChatPrompt {
                messages,
                kwargs,
                add_generation_prompt: true,
                ..ChatPrompt::default()
            })
        });
        matches!((first, second), (Ok(first), Ok(second)) if first != second)
    }

    /// Finds out what it does with images, for which `placeholder` stands.
    pub fn see_images(&mut self, placeholder: &str) {
        let render = |content: Value| {
            let messages = vec![json!({"role": "user", "content": content})];
            self.render_messages(messages, &ChatPrompt::default(), true).ok()
        };
        self.images = Some(ImageForm::probe(placeholder, render));
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Which variables about thoughts it knows.
    pub fn switches(&self) -> TemplateSwitches {
        self.switches
    }

    /// Whether a tool is printed.
    fn probe_tools(&self) -> bool {
        let function = json!({"name": "PROBE", "description": "PROBE", "parameters": {"type": "object", "properties": {}}});
        let tools = Some(vec![json!({"type": "function", "function": function})]);
        let chat = ChatPrompt { tools, ..ChatPrompt::default() };
        let message = self.message(0, &json!({"role": "user", "content": "Hi"}));
        let text = message.and_then(|message| self.render_messages(vec![message], &chat, true));
        text.is_ok_and(|text| text.contains("PROBE"))
    }

    /// Whether arguments are printed as JSON if they are an object. Some templates join them to text,
    /// which fails; others print a text as a JSON string, quotes and backslashes included.
    fn probe_arguments(&self) -> bool {
        let function = json!({"name": "f", "arguments": {"PROBE": 1}});
        let call = json!({"id": "call12345", "type": "function", "function": function});
        let messages = [
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        ];
        let messages = messages.iter().map(|message| self.message(0, message)).collect::<Result<_, _>>();
        let text =
            messages.and_then(|messages| self.render_messages(messages, &ChatPrompt::default(), false));
        text.is_ok_and(|text| text.contains("PROBE"))
    }

    /// The format of calls that the template teaches.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format.filter(|_| self.takes_tools)
    }

    /// Writes tools, calls and results out as text, if the template knows no tools.
    pub fn write_out_tools(&self, chat: &mut ChatPrompt) {
        if !self.takes_tools {
            let format = chat.tool_format;
            tools::write_out(chat, format);
        }
    }

    /// Messages to prompt text.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own message, or naming the field that is wrong;
    /// [`Error::PromptTooLong`].
    pub fn render(&self, chat: &ChatPrompt) -> Result<String, Error> {
        if let Some(key) = RESERVED.iter().find(|key| chat.kwargs.contains_key(**key)) {
            return Err(Error::Template(format!("chat_template_kwargs may not set '{key}'")));
        }
        if chat.continue_final_message && chat.add_generation_prompt {
            return Err(Error::Template(
                "continue_final_message and add_generation_prompt exclude each other; set one of them".into(),
            ));
        }
        let defused = self.defused(chat);
        let chat = defused.as_ref().unwrap_or(chat);
        let messages = chat.messages.iter().enumerate().map(|(idx, message)| self.message(idx, message));
        let mut messages = messages.collect::<Result<Vec<Value>, Error>>()?;
        if !chat.continue_final_message {
            return self.render_messages(messages, chat, chat.add_generation_prompt);
        }
        leave_open(&mut messages)?;
        let mut prompt = self.render_messages(messages, chat, false)?;
        let end = prompt.rfind(OPEN_END.trim_end()).ok_or_else(|| {
            Error::Template(
                "continue_final_message: the template does not print the last message, so it cannot go on"
                    .into(),
            )
        })?;
        let is_trimmed = !prompt[end..].starts_with(OPEN_END);
        prompt.truncate(end);
        // The message itself would have lost its last blanks, had it ended there.
        if is_trimmed {
            prompt.truncate(prompt.trim_end().len());
        }
        Ok(prompt)
    }

    /// The conversation without placeholders of images in its texts, if it has images.
    fn defused(&self, chat: &ChatPrompt) -> Option<ChatPrompt> {
        let form = self.images.as_ref()?;
        images::images(&chat.messages).next()?;
        let mut chat = chat.clone();
        let lists = chat.documents.iter_mut().chain(&mut chat.tools).flatten();
        let values = chat.messages.iter_mut().chain(lists).chain(chat.kwargs.values_mut());
        values.for_each(|value| form.defuse(value));
        Some(chat)
    }

    /// One message in the form that the template understands.
    fn message(&self, idx: usize, message: &Value) -> Result<Value, Error> {
        let mut message = message.clone();
        let Some(fields) = message.as_object_mut() else {
            return Err(Error::Template(format!("messages[{idx}] must be an object")));
        };
        if !self.knows_developer && fields.get("role").and_then(Value::as_str) == Some("developer") {
            fields.insert("role".into(), "system".into());
        }
        if self.takes_objects {
            tools::arguments_as_objects(fields);
        }
        let inlined = match (fields.get("content"), &self.images) {
            (Some(Value::Array(parts)), Some(form)) => form.inlined(parts),
            _ => None,
        };
        let as_parts = |text: &str| json!([{"type": "text", "text": text}]);
        let content = match (fields.get("content"), inlined) {
            (_, Some(text)) if self.takes_text => Value::String(text),
            (_, Some(text)) => as_parts(&text),
            (Some(Value::Array(parts)), None) if !self.takes_parts && !self.prints_images(parts) => {
                Value::String(joined_text(idx, parts)?)
            }
            (Some(Value::String(text)), None) if !self.takes_text => as_parts(text),
            _ => return Ok(message),
        };
        fields.insert("content".into(), content);
        Ok(message)
    }

    /// Whether it prints these parts itself, of which some are images.
    fn prints_images(&self, parts: &[Value]) -> bool {
        self.images.is_some() && parts.iter().any(images::is_image)
    }

    fn render_messages(
        &self,
        messages: Vec<Value>,
        chat: &ChatPrompt,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let mut variables = self.special_tokens.clone();
        variables.extend(chat.kwargs.clone());
        variables.insert("messages".into(), Value::Array(messages));
        // Absent lists are null rather than undefined, as in transformers: some templates ask.
        let list = |list: &Option<Vec<Value>>| list.clone().map_or(Value::Null, Value::Array);
        variables.insert("tools".into(), list(&chat.tools));
        variables.insert("documents".into(), list(&chat.documents));
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let prompt = self.template.render_context(&variables).map_err(|error| template_error(&error))?;
        if prompt.len() > MAX_PROMPT_BYTES {
            return Err(Error::PromptTooLong { bytes: prompt.len(), limit: MAX_PROMPT_BYTES });
        }
        Ok(prompt)
    }
}

/// The texts of content parts, one per line.
fn joined_text(idx: usize, parts: &[Value]) -> Result<String, Error> {
    let texts = parts.iter().enumerate().map(|(part_idx, part)| {
        let text = part.get("text").or_else(|| part.get("refusal")).unwrap_or(part);
        text.as_str().ok_or_else(|| {
            Error::Template(format!(
                "messages[{idx}].content[{part_idx}] has no text, and this model's template takes text only"
            ))
        })
    });
    Ok(texts.collect::<Result<Vec<&str>, Error>>()?.join("\n"))
}

/// Marks the end of the last message's content.
fn leave_open(messages: &mut [Value]) -> Result<(), Error> {
    let content = messages.last_mut().and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        other => other,
    };
    match text {
        Some(Value::String(text)) => {
            text.push_str(OPEN_END);
            Ok(())
        }
        _ => Err(Error::Template("continue_final_message needs a last message with text content".into())),
    }
}

fn template_error(error: &hf_chat_template::Error) -> Error {
    Error::Template(match error {
        hf_chat_template::Error::TemplateRaised { message } => message.clone(),
        other => other.to_string(),
    })
}
