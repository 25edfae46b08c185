//! Every request field that the server knows, what it may hold and what becomes of it. `docs/api.md`
//! shows the same tables, and `/openapi.json` is rendered from them; tests compare all three.

mod objects;
mod responses;
mod rows;
mod rules;

use crate::{
    error::ApiError,
    fields::{Field, IgnoredFields},
    schema::{Property, Schema},
};

use responses::RESPONSES;
use rows::{
    CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, GENERATION, LOAD_ADAPTER, TOKENIZE, UNLOAD_ADAPTER,
    VISUAL_TOKENS,
};

/// What becomes of a known field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It has its documented effect.
    Honoured,
    /// Some values have their effect, the others are refused.
    Limited,
    /// Its type is checked; it has no effect here.
    Accepted,
    /// Always an error; [`Row::about`] says why, or what to use instead.
    Refused,
}

use Treatment::{Accepted, Honoured, Limited, Refused};

impl Treatment {
    /// The word in `docs/api.md`.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Honoured => "honoured",
            Self::Limited => "limited",
            Self::Accepted => "accepted",
            Self::Refused => "refused",
        }
    }
}

/// One field of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) treatment: Treatment,
    /// Its values; `null` is allowed besides, and the same as absent.
    pub(crate) schema: Schema,
    /// The third column of `docs/api.md`, and the description in `/openapi.json`.
    pub(crate) about: &'static str,
}

const fn honoured(name: &'static str, schema: Schema, about: &'static str) -> Row {
    Row { name, treatment: Honoured, schema, about }
}

const fn limited(name: &'static str, schema: Schema, about: &'static str) -> Row {
    Row { name, treatment: Limited, schema, about }
}

const fn accepted(name: &'static str, schema: Schema, about: &'static str) -> Row {
    Row { name, treatment: Accepted, schema, about }
}

const fn refused(name: &'static str, why: &'static str) -> Row {
    Row { name, treatment: Refused, schema: Schema::Absent, about: why }
}

/// The routes that take a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/embeddings`
    Embeddings,
    /// `/tokenize`
    Tokenize,
    /// `/detokenize`
    Detokenize,
    /// `/visual_tokens`
    VisualTokens,
    /// `/v1/load_lora_adapter`
    LoadAdapter,
    /// `/v1/unload_lora_adapter`
    UnloadAdapter,
}

impl Route {
    fn lists(self) -> &'static [&'static [Row]] {
        match self {
            Self::Chat => &[CHAT, GENERATION],
            Self::Completions => &[COMPLETIONS, GENERATION],
            Self::Responses => &[RESPONSES],
            Self::Embeddings => &[EMBEDDINGS],
            Self::Tokenize => &[TOKENIZE],
            Self::Detokenize => &[DETOKENIZE],
            Self::VisualTokens => &[VISUAL_TOKENS],
            Self::LoadAdapter => &[LOAD_ADAPTER],
            Self::UnloadAdapter => &[UNLOAD_ADAPTER],
        }
    }

    /// Every field of the route.
    pub(crate) fn rows(self) -> impl Iterator<Item = &'static Row> {
        self.lists().iter().flat_map(|list| list.iter())
    }

    /// Fields without which there is no request.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Chat | Self::VisualTokens => &["messages"],
            Self::Completions => &["prompt"],
            Self::Responses | Self::Embeddings => &["input"],
            Self::Tokenize => &[],
            Self::Detokenize => &["tokens"],
            Self::LoadAdapter => &["lora_name", "lora_path"],
            Self::UnloadAdapter => &["lora_name"],
        }
    }

    /// The keys of the body, as its schema has them.
    pub(crate) fn properties(self) -> impl Iterator<Item = Property> {
        self.rows().map(move |row| Property {
            name: row.name,
            schema: row.schema,
            is_required: self.required().contains(&row.name),
            about: row.about,
        })
    }

    /// Whether the route has a field of this name.
    pub(crate) fn knows(self, name: &str) -> bool {
        self.rows().any(|row| row.name == name)
    }

    /// Deals with fields that need no parsing: unknown, accepted and refused ones. `true` means
    /// that the caller has to read the field.
    pub(crate) fn is_to_be_read(
        self,
        name: &str,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        let Some(row) = self.rows().find(|row| row.name == name) else {
            ignored.push(field);
            return Ok(false);
        };
        match row.treatment {
            Accepted => row.schema.check(field).map(|()| false),
            Refused => Err(refuse(name, field, row.about)),
            Honoured | Limited => Ok(true),
        }
    }

    /// Names of the fields that a parser must read.
    #[cfg(test)]
    pub(crate) fn read_fields(self) -> impl Iterator<Item = &'static str> {
        self.rows().filter(|row| matches!(row.treatment, Honoured | Limited)).map(|row| row.name)
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

    /// The lines of the table under `heading` in docs/api.md.
    fn documented(heading: &str) -> Vec<&'static str> {
        let text = include_str!("../../../docs/api.md");
        let section = text.split("\n## ").find(|part| part.starts_with(heading)).expect("a section");
        section.lines().filter(|line| line.starts_with("| `")).collect()
    }

    /// docs/api.md lists exactly the known fields, in the same order, with the same words.
    #[test]
    fn the_documentation_lists_every_field() {
        let sections: [(&str, &[Row]); 10] = [
            ("Fields of chat only", CHAT),
            ("Fields of completions only", COMPLETIONS),
            ("Fields of chat and completions", GENERATION),
            ("Fields of `/v1/responses`", RESPONSES),
            ("Fields of `/v1/embeddings`", EMBEDDINGS),
            ("Fields of `/tokenize`", TOKENIZE),
            ("Fields of `/detokenize`", DETOKENIZE),
            ("Fields of `/visual_tokens`", VISUAL_TOKENS),
            ("Fields of `/v1/load_lora_adapter`", LOAD_ADAPTER),
            ("Fields of `/v1/unload_lora_adapter`", UNLOAD_ADAPTER),
        ];
        for (heading, rows) in sections {
            let line = |row: &Row| format!("| `{}` | {} | {} |", row.name, row.treatment.word(), row.about);
            let wanted: Vec<_> = rows.iter().map(|row| line(row).replace("|  |", "| |")).collect();
            assert_eq!(
                documented(heading),
                wanted,
                "the table of {heading:?} in docs/api.md should be\n{}",
                wanted.join("\n")
            );
        }
    }

    #[test]
    fn no_field_is_listed_twice() {
        for route in [
            Route::Chat,
            Route::Completions,
            Route::Responses,
            Route::Embeddings,
            Route::Tokenize,
            Route::Detokenize,
            Route::VisualTokens,
            Route::LoadAdapter,
            Route::UnloadAdapter,
        ] {
            let names: Vec<_> = route.rows().map(|row| row.name).collect();
            let unique: std::collections::HashSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len(), "{route:?}");
        }
    }

    /// A field without effect is checked by its schema, so that must be of a kind that can be.
    #[test]
    fn accepted_fields_can_be_checked() {
        let number = serde_json::json!(3);
        let rows = [Route::Chat, Route::Completions, Route::Responses].into_iter().flat_map(Route::rows);
        for row in rows.filter(|row| row.treatment == Accepted) {
            let error = row.schema.check(&Field::root(&number)).expect_err("a number");
            assert_eq!(error.kind, crate::error::ErrorKind::InvalidType, "{}", row.name);
        }
    }
}
