//! Calls of tools: how a model writes them, how they are read while they are written, and the grammar
//! that makes them well-formed.
//!
//! Three ways of writing are known, one file each. A call of `weather` in the city of Oslo:
//!
//! | format | text |
//! | --- | --- |
//! | [`ToolFormat::Hermes`] | `<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>` |
//! | [`ToolFormat::LlamaJson`] | `{"name": "weather", "parameters": {"city": "Oslo"}}` |
//! | [`ToolFormat::Pythonic`] | `[weather(city="Oslo")]` |

mod call_object;
mod cursor;
mod grammar;
mod hermes;
mod json_text;
mod llama_json;
mod parser;
#[cfg(test)]
mod parser_tests;
mod prompt;
mod python_grammar;
mod python_string;
mod python_text;
mod pythonic;

pub use grammar::{CallTrigger, ToolSpec, ToolSyntax, argument_schemas, object_schema};
pub use parser::{ToolDelta, ToolParser, ToolPiece};
pub(crate) use prompt::{arguments_as_objects, write_out};

/// How a model writes calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ToolFormat {
    /// A JSON object between tags: Hermes, Qwen and many others.
    #[default]
    Hermes,
    /// A bare JSON object: Llama 3.1 and later.
    LlamaJson,
    /// A list of calls as in Python: Llama 3.2 and 4, and others.
    Pythonic,
}

impl ToolFormat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Hermes, Self::LlamaJson, Self::Pythonic];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::LlamaJson => "llama-json",
            Self::Pythonic => "pythonic",
        }
    }

    /// The format that a chat template teaches its model; `None` if it does not say.
    pub fn detect(template: &str) -> Option<Self> {
        if template.contains(hermes::OPEN) {
            return Some(Self::Hermes);
        }
        // Llama's pythonic templates show a list of calls, those for JSON an object with parameters.
        let shows_list =
            ["[func_name", "[func1(", "<|python_start|>"].iter().any(|text| template.contains(text));
        if shows_list {
            return Some(Self::Pythonic);
        }
        let shows_object = template.contains("\"parameters\"") && template.contains("\"name\"");
        (template.contains(llama_json::TAG) || shows_object).then_some(Self::LlamaJson)
    }

    /// Texts that may stand in front of a call and belong to it: control tokens of some models.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[hermes::OPEN, hermes::CLOSE],
            Self::LlamaJson => &[llama_json::TAG],
            Self::Pythonic => &[pythonic::START, pythonic::END],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_the_format() {
        let rows = [
            ("{{ '<tool_call>\\n' }}", Some(ToolFormat::Hermes)),
            (
                "{{ '<|python_tag|>' }} {\"name\": function name, \"parameters\": {}}",
                Some(ToolFormat::LlamaJson),
            ),
            (
                r#"{{- 'Respond in the format {"name": function name, "parameters": ...}' }}"#,
                Some(ToolFormat::LlamaJson),
            ),
            ("[func_name1(params_name1=params_value1), func_name2(params)]", Some(ToolFormat::Pythonic)),
            ("{{ message.content }}", None),
        ];
        for (template, format) in rows {
            assert_eq!(ToolFormat::detect(template), format, "{template}");
        }
    }
}
