//! Every request field that the server knows, and what becomes of it. `docs/api.md` shows the same
//! lists; a test compares them.

use crate::{
    error::ApiError,
    fields::{Field, IgnoredFields},
};

/// What becomes of a known field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It has its documented effect.
    Honoured,
    /// Some values have their effect, the others are refused.
    Limited,
    /// Its type is checked; it has no effect here.
    Accepted(Shape),
    /// Always an error; the text says why, or what to use instead.
    Refused(&'static str),
}

impl Treatment {
    /// The word in `docs/api.md`.
    #[cfg(test)]
    fn word(self) -> &'static str {
        match self {
            Self::Honoured => "honoured",
            Self::Limited => "limited",
            Self::Accepted(_) => "accepted",
            Self::Refused(_) => "refused",
        }
    }
}

/// The type of a field that has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `true` or `false`.
    Boolean,
    /// Up to 512 bytes.
    Text,
    /// An object of any content.
    Object,
    /// One of these.
    OneOf(&'static [&'static str]),
}

impl Shape {
    fn check(self, field: &Field<'_, '_>) -> Result<(), ApiError> {
        match self {
            Self::Boolean => field.boolean().map(drop),
            Self::Text => field.bounded_string(512).map(drop),
            Self::Object => field.object().map(drop),
            Self::OneOf(allowed) => field.one_of(allowed).map(drop),
        }
    }
}

type Row = (&'static str, Treatment);

use Treatment::{Accepted, Honoured, Limited, Refused};

const LATER: &str = "it is not built yet";
const OPERATOR: &str = "the operator has not enabled it";

/// Fields that only chat has.
const CHAT: &[Row] = &[
    ("messages", Honoured),
    ("max_completion_tokens", Honoured),
    ("logprobs", Honoured),
    ("top_logprobs", Honoured),
    ("tools", Refused(LATER)),
    ("tool_choice", Limited),
    ("parallel_tool_calls", Accepted(Shape::Boolean)),
    (
        "reasoning_effort",
        Accepted(Shape::OneOf(&["none", "minimal", "low", "medium", "high", "xhigh", "max"])),
    ),
    ("metadata", Honoured),
    ("store", Accepted(Shape::Boolean)),
    ("service_tier", Honoured),
    ("verbosity", Accepted(Shape::OneOf(&["low", "medium", "high"]))),
    ("prediction", Accepted(Shape::Object)),
    ("prompt_cache_options", Accepted(Shape::Object)),
    ("prompt_cache_retention", Accepted(Shape::Text)),
    ("modalities", Limited),
    ("audio", Refused("there is no audio output")),
    ("web_search_options", Refused("there is no web search")),
    ("moderation", Refused("there is no moderation")),
    ("functions", Refused("it was replaced by `tools`")),
    ("function_call", Refused("it was replaced by `tools` and `tool_choice`")),
    ("safety_identifier", Accepted(Shape::Text)),
    ("prompt_cache_key", Accepted(Shape::Text)),
    ("chat_template", Refused(OPERATOR)),
    ("chat_template_kwargs", Honoured),
    ("add_generation_prompt", Honoured),
    ("continue_final_message", Honoured),
    ("documents", Honoured),
    ("echo", Limited),
    ("thinking", Refused(LATER)),
    ("thinking_token_budget", Refused(LATER)),
];

/// Fields that only completions has.
const COMPLETIONS: &[Row] = &[
    ("prompt", Honoured),
    ("logprobs", Honoured),
    ("echo", Limited),
    ("suffix", Refused("this model has no fill-in-the-middle template")),
];

/// Fields of both.
const GENERATION: &[Row] = &[
    ("model", Honoured),
    ("max_tokens", Honoured),
    ("temperature", Honoured),
    ("top_p", Honoured),
    ("n", Honoured),
    ("seed", Honoured),
    ("stop", Honoured),
    ("frequency_penalty", Honoured),
    ("presence_penalty", Honoured),
    ("logit_bias", Honoured),
    ("stream", Honoured),
    ("stream_options", Honoured),
    ("user", Accepted(Shape::Text)),
    ("response_format", Limited),
    ("top_k", Honoured),
    ("min_p", Honoured),
    ("repetition_penalty", Honoured),
    ("min_tokens", Honoured),
    ("ignore_eos", Honoured),
    ("stop_token_ids", Honoured),
    ("include_stop_str_in_output", Honoured),
    ("skip_special_tokens", Honoured),
    ("bad_words", Honoured),
    ("allowed_token_ids", Honoured),
    ("prompt_logprobs", Refused(LATER)),
    ("return_token_ids", Honoured),
    ("return_tokens_as_token_ids", Honoured),
    ("structured_outputs", Refused(LATER)),
    ("guided_json", Refused(LATER)),
    ("guided_regex", Refused(LATER)),
    ("guided_choice", Refused(LATER)),
    ("guided_grammar", Refused(LATER)),
    ("add_special_tokens", Honoured),
    ("truncate_prompt_tokens", Honoured),
    ("priority", Honoured),
    ("request_id", Honoured),
    ("cache_salt", Honoured),
    ("best_of", Limited),
    ("use_beam_search", Limited),
    ("length_penalty", Limited),
    ("mm_processor_kwargs", Refused(OPERATOR)),
    ("media_io_kwargs", Refused(OPERATOR)),
    ("kv_transfer_params", Refused(OPERATOR)),
    ("vllm_xargs", Refused(OPERATOR)),
    ("locket", Honoured),
];

/// Fields of `/tokenize`.
const TOKENIZE: &[Row] = &[
    ("model", Honoured),
    ("prompt", Honoured),
    ("messages", Honoured),
    ("add_special_tokens", Honoured),
    ("return_token_strs", Honoured),
    ("add_generation_prompt", Honoured),
    ("continue_final_message", Honoured),
    ("chat_template", Refused(OPERATOR)),
    ("chat_template_kwargs", Honoured),
    ("documents", Honoured),
    ("tools", Refused(LATER)),
];

/// Fields of `/detokenize`.
const DETOKENIZE: &[Row] = &[("model", Honoured), ("tokens", Honoured)];

/// The routes that take a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/tokenize`
    Tokenize,
    /// `/detokenize`
    Detokenize,
}

impl Route {
    fn lists(self) -> &'static [&'static [Row]] {
        match self {
            Self::Chat => &[CHAT, GENERATION],
            Self::Completions => &[COMPLETIONS, GENERATION],
            Self::Tokenize => &[TOKENIZE],
            Self::Detokenize => &[DETOKENIZE],
        }
    }

    /// Whether the route has a field of this name.
    pub(crate) fn knows(self, name: &str) -> bool {
        self.lists().iter().any(|list| list.iter().any(|row| row.0 == name))
    }

    /// Deals with fields that need no parsing: unknown, accepted and refused ones. `true` means
    /// that the caller has to read the field.
    pub(crate) fn is_to_be_read(
        self,
        name: &str,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        let known = self.lists().iter().flat_map(|list| list.iter()).find(|row| row.0 == name);
        match known.map(|row| row.1) {
            None => {
                ignored.push(field);
                Ok(false)
            }
            Some(Accepted(shape)) => shape.check(field).map(|()| false),
            Some(Refused(reason)) => Err(refuse(name, field, reason)),
            Some(Honoured | Limited) => Ok(true),
        }
    }

    /// Names of the fields that a parser must read.
    #[cfg(test)]
    pub(crate) fn read_fields(self) -> impl Iterator<Item = &'static str> {
        let rows = self.lists().iter().flat_map(|list| list.iter());
        rows.filter(|row| matches!(row.1, Honoured | Limited)).map(|row| row.0)
    }
}

/// The error for a refused field. An empty list of tools is wrong even where tools are offered.
fn refuse(name: &str, field: &Field<'_, '_>, reason: &str) -> ApiError {
    if name == "tools"
        && let Err(error) = field.filled_array(128)
    {
        return error;
    }
    field.unsupported(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the table under `heading` in docs/api.md: field and first word of the treatment.
    fn documented(heading: &str) -> Vec<(String, String)> {
        let text = include_str!("../../../docs/api.md");
        let section = text.split("\n## ").find(|part| part.starts_with(heading)).expect("a section");
        section
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
                let names = cells.next()?;
                let word = cells.next()?.to_owned();
                Some((names.trim_end_matches('`').to_owned(), word))
            })
            .collect()
    }

    /// docs/api.md lists exactly the known fields, in the same order, with the same treatment.
    #[test]
    fn the_documentation_lists_every_field() {
        let sections: [(&str, &[Row]); 5] = [
            ("Fields of chat only", CHAT),
            ("Fields of completions only", COMPLETIONS),
            ("Fields of chat and completions", GENERATION),
            ("Fields of `/tokenize`", TOKENIZE),
            ("Fields of `/detokenize`", DETOKENIZE),
        ];
        for (heading, rows) in sections {
            let wanted: Vec<_> = rows
                .iter()
                .map(|(name, treatment)| ((*name).to_owned(), treatment.word().to_owned()))
                .collect();
            assert_eq!(documented(heading), wanted, "{heading}");
        }
    }

    #[test]
    fn no_field_is_listed_twice() {
        for route in [Route::Chat, Route::Completions, Route::Tokenize, Route::Detokenize] {
            let names: Vec<_> = route.lists().iter().flat_map(|list| list.iter()).map(|row| row.0).collect();
            let unique: std::collections::HashSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len(), "{route:?}");
        }
    }
}
