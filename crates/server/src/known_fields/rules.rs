//! What fields ask of each other, as far as JSON Schema can say it.

use serde_json::{Value, json};

use super::Route;

impl Route {
    /// Schemas that a body must satisfy besides that of its fields.
    pub(crate) fn rules(self) -> Vec<Value> {
        let absent = json!({"type": "null"});
        let stream = needs("stream_options", absent.clone(), "stream", true);
        let prompt =
            needs("continue_final_message", json!({"enum": [false, null]}), "add_generation_prompt", false);
        let unstreamed = json!({"anyOf": [
            {"properties": {"prompt_logprobs": absent}},
            {"properties": {"stream": {"enum": [false, null]}}},
        ]});
        let positive = json!({"not": {"const": 0}});
        match self {
            Self::Chat => {
                let harmless = json!({"type": ["integer", "null"], "maximum": 0});
                let answer = json!({"properties": {"max_tokens": positive}});
                vec![stream, prompt, unstreamed, answer, needs("top_logprobs", harmless, "logprobs", true)]
            }
            Self::Completions => vec![stream, unstreamed, needs("max_tokens", positive, "echo", true)],
            Self::Tokenize => {
                let either = |one: &str, other: &str| json!({"required": [one], "properties": {one: {"not": absent}, other: absent}});
                vec![prompt, json!({"anyOf": [either("prompt", "messages"), either("messages", "prompt")]})]
            }
            Self::Responses => {
                let wanted = json!({"contains": {"const": "message.output_text.logprobs"}});
                let logprobs = json!({"anyOf": [
                    {"properties": {"top_logprobs": {"type": ["integer", "null"], "maximum": 0}}},
                    {"required": ["include"], "properties": {"include": wanted}},
                ]});
                vec![stream, logprobs]
            }
            _ => Vec::new(),
        }
    }
}

/// A `field` of other than `harmless` values asks for `value` in `other`.
fn needs(field: &str, harmless: Value, other: &str, value: bool) -> Value {
    json!({"anyOf": [
        {"properties": {field: harmless}},
        {"required": [other], "properties": {other: {"const": value}}},
    ]})
}
