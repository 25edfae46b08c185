//! What successful operations send: schemas derived from the types that are serialised, or written
//! down where an answer is too small for a type.

use serde_json::{Map, Value, json};
use utoipa::{ToSchema, openapi::RefOr};

use crate::{
    openai::{ChatChunk, ChatCompletion, Completion, ModelCard, ModelList},
    routes::{
        embeddings::EmbeddingList,
        responses::{ResponseEvent, ResponseObject},
        visual_tokens::VisualTokenList,
    },
    schema::{Property, Renderer, Schema, TOKEN, integer, optional, required},
};

/// A successful answer.
#[derive(Clone, Copy)]
pub(super) struct Answer {
    pub(super) about: &'static str,
    /// Media type and schema of each form.
    pub(super) forms: &'static [(&'static str, Form)],
}

/// The schema of one form.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// Derived from a type.
    Derived(fn(&mut Map<String, Value>) -> Value),
    /// Written down.
    Written(Schema),
    /// Written down: an object of these keys.
    Object(&'static [Property]),
    /// Server-sent events whose data are of a type.
    Events(fn(&mut Map<String, Value>) -> Value),
}

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";

pub(super) const CHAT: Answer = Answer {
    about: "The answer, or its chunks.",
    forms: &[
        (JSON, Form::Derived(derived::<ChatCompletion<'static>>)),
        (EVENTS, Form::Events(derived::<ChatChunk<'static>>)),
    ],
};

pub(super) const COMPLETION: Answer = Answer {
    about: "The answer, or its chunks.",
    forms: &[
        (JSON, Form::Derived(derived::<Completion<'static>>)),
        (EVENTS, Form::Events(derived::<Completion<'static>>)),
    ],
};

pub(super) const RESPONSE: Answer = Answer {
    about: "The response, or its events.",
    forms: &[
        (JSON, Form::Derived(derived::<ResponseObject<'static>>)),
        (EVENTS, Form::Events(derived::<ResponseEvent<'static, 'static>>)),
    ],
};

pub(super) const EMBEDDINGS: Answer =
    Answer { about: "The vectors.", forms: &[(JSON, Form::Derived(derived::<EmbeddingList<'static>>))] };

pub(super) const MODELS: Answer =
    Answer { about: "All served names.", forms: &[(JSON, Form::Derived(derived::<ModelList<'static>>))] };

pub(super) const MODEL: Answer =
    Answer { about: "The model.", forms: &[(JSON, Form::Derived(derived::<ModelCard<'static>>))] };

pub(super) const VISUAL_TOKENS: Answer = Answer {
    about: "One report for each image.",
    forms: &[(JSON, Form::Derived(derived::<VisualTokenList>))],
};

pub(super) const TOKENS: Answer = Answer {
    about: "The ids, with their texts if they were asked for.",
    forms: &[(
        JSON,
        Form::Object(&[
            required("count", integer(0, u32::MAX as i64), ""),
            required("max_model_len", integer(1, u32::MAX as i64), "Longest prompt plus answer."),
            required("tokens", Schema::Array(&TOKEN, 0, usize::MAX), ""),
            optional("token_strs", Schema::Array(&Schema::AnyText, 0, usize::MAX), ""),
        ]),
    )],
};

pub(super) const DETOKENIZED: Answer =
    Answer { about: "The text.", forms: &[(JSON, Form::Object(&[required("prompt", Schema::AnyText, "")]))] };

pub(super) const HEALTH: Answer = Answer {
    about: "The process works.",
    forms: &[(JSON, Form::Object(&[required("status", Schema::OneOf(&["ok"]), "")]))],
};

pub(super) const READY: Answer = Answer {
    about: "New requests are taken.",
    forms: &[(JSON, Form::Object(&[required("status", Schema::OneOf(&["ready"]), "")]))],
};

pub(super) const VERSION: Answer = Answer {
    about: "The version.",
    forms: &[(JSON, Form::Object(&[required("version", Schema::AnyText, "")]))],
};

pub(super) const DOCUMENT: Answer = Answer {
    about: "OpenAPI 3.1.",
    forms: &[(JSON, Form::Object(&[required("openapi", Schema::OneOf(&[super::VERSION]), "")]))],
};

pub(super) const TEXT: Answer =
    Answer { about: "Prometheus text.", forms: &[("text/plain", Form::Written(Schema::AnyText))] };

pub(super) const DONE: Answer =
    Answer { about: "What was done.", forms: &[("text/plain", Form::Written(Schema::AnyText))] };

pub(super) const PAGE: Answer =
    Answer { about: "A page.", forms: &[("text/html", Form::Written(Schema::AnyText))] };

impl Answer {
    /// `content` of the answer.
    pub(super) fn content(self, renderer: &mut Renderer<'_>, named: &mut Map<String, Value>) -> Value {
        let forms = self.forms.iter().map(|(media_type, form)| {
            let media = match form {
                Form::Derived(schema) => json!({"schema": schema(named)}),
                Form::Written(schema) => json!({"schema": renderer.render(*schema)}),
                Form::Object(properties) => json!({"schema": renderer.object(properties.iter().copied())}),
                // OpenAPI 3.1 has no schema for the items of a stream.
                Form::Events(schema) => json!({"x-event-data": schema(named)}),
            };
            ((*media_type).to_owned(), media)
        });
        Value::Object(forms.collect())
    }
}

/// A reference to the schema of `T`, which is put beside those that it needs into `named`.
fn derived<T: ToSchema>(named: &mut Map<String, Value>) -> Value {
    let mut all = vec![(T::name().into_owned(), T::schema())];
    T::schemas(&mut all);
    for (name, schema) in all {
        named.entry(name).or_insert_with(|| json_of(&schema));
    }
    json!({"$ref": format!("#/components/schemas/{}", T::name())})
}

fn json_of(schema: &RefOr<utoipa::openapi::Schema>) -> Value {
    // Schemas are plain data; nothing in them can fail to be written.
    serde_json::to_value(schema).unwrap_or_default()
}
