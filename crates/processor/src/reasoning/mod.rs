//! How a model thinks: the texts around its thoughts, and what its chat template knows of them.
//!
//! Three modes exist, after Su et al., "Dualformer" (arXiv 2410.09918): *fast* answers at once, *slow*
//! thinks first, *auto* lets the model choose. A template that has a switch is given it; for others the
//! first text after the prompt is the switch, and [`ReasoningProfile::prepare`] puts it there.

use std::sync::Arc;

use crate::tools::ToolFormat;

mod counter;
mod scanner;
mod splitter;

pub use counter::ThoughtCounter;
pub(crate) use scanner::Scanner;
pub use scanner::{ThoughtMarkers, ThoughtStart};
pub use splitter::{ReasoningSplitter, TextPart, TextPiece};

/// Longest marker in bytes.
const MAX_MARKER_BYTES: usize = 128;

/// Markers that chat templates are searched for.
const KNOWN: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
];

/// Whether the model thinks before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningMode {
    /// It does not.
    Fast,
    /// It does.
    Slow,
    /// As the model likes.
    Auto,
}

impl ReasoningMode {
    /// `fast`, `slow` or `auto`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Slow => "slow",
            Self::Auto => "auto",
        }
    }
}

/// Variables of a chat template that change what it prints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TemplateSwitches {
    /// `enable_thinking`, true or false.
    pub enable_thinking: bool,
    /// `thinking`, true or false.
    pub thinking: bool,
    /// `reasoning_effort`: `low`, `medium`, `high`, ….
    pub reasoning_effort: bool,
}

impl TemplateSwitches {
    /// The variable that turns thinking on and off.
    pub fn thinking_key(self) -> Option<&'static str> {
        if self.enable_thinking {
            Some("enable_thinking")
        } else if self.thinking {
            Some("thinking")
        } else {
            None
        }
    }
}

/// What the operator says about a model's thoughts; what is absent is found in the chat template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReasoningSettings {
    /// Opens the thought; absent and unknown to the template: the model has no thoughts.
    pub open: Option<String>,
    /// Ends the thought; absent: the counterpart of `open`, else `answer_open`.
    pub close: Option<String>,
    /// Opens an answer without a thought, for models that mark it.
    pub answer_open: Option<String>,
    /// The thought is open where the answer begins, though the prompt does not show it (`true`), or is
    /// not, though it seems so (`false`).
    pub open_in_prompt: Option<bool>,
    /// Put in front of `close` where the budget is used up.
    pub budget_message: String,
}

/// How one model thinks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningProfile {
    markers: ThoughtMarkers,
    open_in_prompt: Option<bool>,
    budget_message: String,
}

impl ReasoningProfile {
    /// The profile of a model with this chat template, or none if it has no thoughts.
    ///
    /// # Errors
    /// A marker that cannot work, or one that is missing; the text names the setting.
    pub fn resolve(settings: &ReasoningSettings, template: Option<&str>) -> Result<Option<Self>, String> {
        let found = template.and_then(|source| {
            KNOWN.into_iter().find(|(open, close)| source.contains(open) || source.contains(close))
        });
        let Some(open) = settings.open.as_deref().or(found.map(|(open, _)| open)) else {
            let is_alone = settings.close.is_some() || settings.answer_open.is_some();
            return if is_alone {
                Err("open: must be given beside the other markers".into())
            } else {
                Ok(None)
            };
        };
        let counterpart = || KNOWN.iter().find(|known| known.0 == open).map(|known| known.1);
        let answer_open = settings.answer_open.as_deref();
        let close = settings.close.as_deref().or_else(|| counterpart().filter(|_| settings.open.is_none()));
        let Some(close) = close.or(answer_open).or_else(counterpart) else {
            return Err(format!("close: must be given, since the counterpart of {open:?} is not known"));
        };
        let checks = [("open", Some(open)), ("close", Some(close)), ("answer-open", answer_open)];
        for (name, marker) in checks.iter().filter_map(|(name, marker)| marker.map(|marker| (name, marker))) {
            if marker.trim().len() != marker.len() || !(1..=MAX_MARKER_BYTES).contains(&marker.len()) {
                return Err(format!(
                    "{name}: must have 1 to {MAX_MARKER_BYTES} bytes and no blank at its ends"
                ));
            }
        }
        if answer_open.is_some_and(|answer| answer.starts_with(open) || open.starts_with(answer)) {
            return Err("answer-open: must not begin like open".into());
        }
        let markers = ThoughtMarkers {
            open: open.into(),
            close: close.into(),
            answer_open: answer_open.map(str::to_owned),
            call_openers: Vec::new(),
        };
        // The thought would end, or seem to, before its end is forced.
        let of_calls = ToolFormat::ALL.into_iter().flat_map(|format| format.markers().iter().copied());
        if let Some(marker) =
            markers.all().chain(of_calls).find(|marker| settings.budget_message.contains(marker))
        {
            return Err(format!("budget-message: must not contain the marker {marker:?}"));
        }
        Ok(Some(Self {
            markers,
            open_in_prompt: settings.open_in_prompt,
            budget_message: settings.budget_message.clone(),
        }))
    }

    /// The markers, with the openers of tool calls that end a thought.
    pub fn markers(&self, call_openers: &[String]) -> Arc<ThoughtMarkers> {
        Arc::new(ThoughtMarkers { call_openers: call_openers.to_vec(), ..self.markers.clone() })
    }

    /// What is put in front of the closing marker where the budget is used up.
    pub fn budget_message(&self) -> &str {
        &self.budget_message
    }

    /// Makes the end of a rendered prompt, whose answer is to begin, say the mode; says what the answer
    /// begins with. `None` leaves the prompt as the template made it, for one that was told already.
    ///
    /// fast = prompt + open, a blank line, close, a blank line (or the answer's opener); slow = prompt +
    /// open; auto = prompt without any of these.
    pub fn prepare(&self, prompt: &mut String, mode: Option<ReasoningMode>) -> ThoughtStart {
        let ThoughtMarkers { open, close, answer_open, .. } = &self.markers;
        let end = prompt.trim_end();
        let open_at = if self.open_in_prompt == Some(false) { None } else { end.strip_suffix(open.as_str()) };
        let open_at = open_at.map(str::len);
        let is_closed = end.ends_with(close.as_str())
            || answer_open.as_deref().is_some_and(|marker| end.ends_with(marker));
        let is_open = open_at.is_some() || (self.open_in_prompt == Some(true) && !is_closed);
        match mode {
            Some(ReasoningMode::Fast) if !is_closed => {
                if let Some(at) = open_at {
                    prompt.truncate(at);
                }
                match answer_open {
                    Some(marker) => prompt.push_str(marker),
                    None => prompt.extend([open.as_str(), "\n\n", close.as_str(), "\n\n"]),
                }
                ThoughtStart::Content
            }
            Some(ReasoningMode::Slow) if !is_open => {
                prompt.push_str(open);
                ThoughtStart::Thought
            }
            Some(ReasoningMode::Auto) if open_at.is_some() => {
                prompt.truncate(open_at.unwrap_or(prompt.len()));
                ThoughtStart::Undecided
            }
            _ if is_closed => ThoughtStart::Content,
            _ if is_open => ThoughtStart::Thought,
            _ => ThoughtStart::Undecided,
        }
    }

    /// What the rest of a message begins with that goes on after this text.
    pub fn after(&self, message: &str) -> ThoughtStart {
        let ThoughtMarkers { open, close, .. } = &self.markers;
        let Some(rest) = message.trim_start().strip_prefix(open.as_str()) else {
            let is_empty = message.trim_start().is_empty();
            return if is_empty { ThoughtStart::Undecided } else { ThoughtStart::Content };
        };
        if rest.contains(close.as_str()) { ThoughtStart::Content } else { ThoughtStart::Thought }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(settings: &ReasoningSettings) -> ReasoningProfile {
        ReasoningProfile::resolve(settings, Some("{{ '<think>' }}")).expect("valid").expect("a profile")
    }

    #[test]
    fn profiles_come_from_the_template_or_the_operator() {
        let resolve =
            |settings: &ReasoningSettings, template| ReasoningProfile::resolve(settings, Some(template));
        let none = ReasoningSettings::default();
        assert_eq!(resolve(&none, "plain"), Ok(None));
        let kimi = resolve(&none, "x ◁/think▷ y").expect("valid").expect("a profile");
        assert_eq!((kimi.markers.open.as_str(), kimi.markers.close.as_str()), ("◁think▷", "◁/think▷"));
        let own = ReasoningSettings {
            open: Some("create".into()),
            answer_open: Some("plan".into()),
            ..ReasoningSettings::default()
        };
        let own = resolve(&own, "<think>").expect("valid").expect("a profile");
        assert_eq!(own.markers.close, "plan");
        let open = |open: &str| ReasoningSettings { open: Some(open.into()), ..ReasoningSettings::default() };
        assert_eq!(
            resolve(&open("<think>"), "plain").expect("valid").expect("one").markers.close,
            "</think>"
        );
        for (settings, name) in [
            (open("<x>"), "close"),
            (open(""), "close"),
            (ReasoningSettings { close: Some("x".into()), ..open(" <x>") }, "open"),
            (ReasoningSettings { answer_open: Some("<x>y".into()), ..open("<x>") }, "answer-open"),
            (ReasoningSettings { close: Some("x".into()), ..ReasoningSettings::default() }, "open"),
        ] {
            let error = resolve(&settings, "plain").expect_err("it cannot work");
            assert!(error.starts_with(name), "{settings:?}: {error}");
        }
    }

    #[test]
    fn a_budget_message_has_no_marker() {
        for (message, is_good) in [
            ("Time is up. </think", true),
            ("So </think>", false),
            ("<think>", false),
            ("\n<tool_call>", false),
        ] {
            let settings = ReasoningSettings { budget_message: message.into(), ..Default::default() };
            let resolved = ReasoningProfile::resolve(&settings, Some("<think>"));
            assert_eq!(resolved.is_ok(), is_good, "{message}");
            assert!(resolved.err().is_none_or(|error| error.starts_with("budget-message: ")));
        }
    }

    #[test]
    fn modes_are_prefixes() {
        use ReasoningMode::{Auto, Fast, Slow};
        use ThoughtStart::{Content, Thought, Undecided};
        let profile = profile(&ReasoningSettings::default());
        let rows = [
            ("Q\nA: ", Some(Fast), "Q\nA: <think>\n\n</think>\n\n", Content),
            ("Q\nA: ", Some(Slow), "Q\nA: <think>", Thought),
            ("Q\nA: ", Some(Auto), "Q\nA: ", Undecided),
            ("Q\nA: ", None, "Q\nA: ", Undecided),
            ("Q\nA: <think>\n", Some(Fast), "Q\nA: <think>\n\n</think>\n\n", Content),
            ("Q\nA: <think>\n", Some(Slow), "Q\nA: <think>\n", Thought),
            ("Q\nA: <think>\n", Some(Auto), "Q\nA: ", Undecided),
            ("Q\nA: <think>\n", None, "Q\nA: <think>\n", Thought),
            ("Q\nA: <think>\n\n</think>\n\n", Some(Fast), "Q\nA: <think>\n\n</think>\n\n", Content),
            ("Q\nA: <think>\n\n</think>\n\n", None, "Q\nA: <think>\n\n</think>\n\n", Content),
        ];
        for (prompt, mode, wanted, start) in rows {
            let mut text = prompt.to_owned();
            assert_eq!(
                (profile.prepare(&mut text, mode), text.as_str()),
                (start, wanted),
                "{prompt:?} {mode:?}"
            );
        }
        let hidden = self::profile(&ReasoningSettings { open_in_prompt: Some(true), ..Default::default() });
        let mut text = "A:".to_owned();
        assert_eq!((hidden.prepare(&mut text, Some(Slow)), text.as_str()), (Thought, "A:"));
    }

    /// The switch of models trained with randomised traces: the first control token after the prompt.
    #[test]
    fn control_tokens_are_prefixes() {
        let profile = profile(&ReasoningSettings {
            open: Some("create".into()),
            answer_open: Some("plan".into()),
            ..ReasoningSettings::default()
        });
        let prepared = |mode| {
            let mut text = "bos ".to_owned();
            (profile.prepare(&mut text, Some(mode)), text)
        };
        assert_eq!(prepared(ReasoningMode::Fast), (ThoughtStart::Content, "bos plan".into()));
        assert_eq!(prepared(ReasoningMode::Slow), (ThoughtStart::Thought, "bos create".into()));
        assert_eq!(prepared(ReasoningMode::Auto), (ThoughtStart::Undecided, "bos ".into()));
    }

    #[test]
    fn messages_go_on_where_they_were() {
        let profile = profile(&ReasoningSettings::default());
        assert_eq!(profile.after("\n<think>a"), ThoughtStart::Thought);
        assert_eq!(profile.after("<think>a</think>"), ThoughtStart::Content);
        assert_eq!(profile.after("a"), ThoughtStart::Content);
        assert_eq!(profile.after(" "), ThoughtStart::Undecided);
    }
}
