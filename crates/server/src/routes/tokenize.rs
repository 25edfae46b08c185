//! `POST /tokenize` and `POST /detokenize`, with exactly the tokens that generation would see.

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use locket_processor::ChatPrompt;
use serde_json::{Value, json};

use super::chat::{Conversation, TemplateFields, read_messages, read_rendered_tools};
use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::{Bounds, GenerationFields, PromptSource},
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    prompt::{self, ChatNeeds},
    run::with_ignored_fields,
    state::AppState,
    visual,
};

/// A checked request.
#[derive(Debug, Default)]
struct TokenizeRequest {
    prompt: Option<String>,
    messages: Option<Conversation>,
    add_special_tokens: Option<bool>,
    return_token_strs: bool,
    template: TemplateFields,
    tools: Option<Vec<Value>>,
}

impl TokenizeRequest {
    fn read(body: &Field<'_, '_>, bounds: &Bounds, ignored: &mut IgnoredFields) -> Result<Self, ApiError> {
        let mut request = Self::default();
        body.entries(|name, field| {
            if !Route::Tokenize.is_to_be_read(name, &field, ignored)?
                || request.template.read(name, &field)?
            {
                return Ok(());
            }
            match name {
                "model" => drop(bounds.model(&field)?),
                "prompt" => request.prompt = Some(field.string()?.to_owned()),
                "messages" => request.messages = Some(read_messages(&field, bounds, ignored)?),
                "add_special_tokens" => request.add_special_tokens = Some(field.boolean()?),
                "tools" => request.tools = Some(read_rendered_tools(&field, ignored)?),
                "return_token_strs" => request.return_token_strs = field.boolean()?,
                _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
            }
            Ok(())
        })?;
        match (&request.prompt, &request.messages) {
            (None, None) => Err(body.missing("prompt")),
            (Some(_), Some(_)) => {
                let message = "`prompt` and `messages` cannot both be given.";
                Err(ApiError::field(ErrorKind::InvalidValue, "messages", message))
            }
            _ => request.template.check_together().map(|()| request),
        }
    }
}

/// `POST /tokenize`
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Tokenize, request).await?;
    let Read { fields: request, ignored, permit: _permit } =
        admitted.read(&state, TokenizeRequest::read).await?;
    let tokens = match (request.messages, request.prompt) {
        (Some(Conversation { messages, images }), _) => {
            let pictures = visual::collect(&state, images, &GenerationFields::default()).await?;
            let chat = ChatPrompt {
                messages,
                tools: request.tools,
                tool_format: state.tool_format().unwrap_or_default(),
                ..request.template.into_prompt()
            };
            let needs = ChatNeeds {
                add_special_tokens: request.add_special_tokens.unwrap_or(false),
                ..ChatNeeds::default()
            };
            let prompt = prompt::encode_chat(&state, PromptSource::Messages, chat, needs, &pictures).await?;
            let shown_id = state.processor().image_token().map_or(0, |token| token.shown_id);
            prompt.counted_ids(shown_id)
        }
        (None, text) => {
            let text = text.unwrap_or_default();
            prompt::encode_text(&state, text, request.add_special_tokens.unwrap_or(true)).await?
        }
    };
    let (tokens, token_strs) = if request.return_token_strs {
        let (tokens, texts) = prompt::token_texts(&state, tokens).await?;
        (tokens, Some(texts))
    } else {
        (tokens, None)
    };
    let answer = json!({
        "count": tokens.len(),
        "max_model_len": state.config().max_model_len,
        "tokens": tokens,
        "token_strs": token_strs,
    });
    Ok(with_ignored_fields(Json(answer).into_response(), &ignored))
}

/// Ids of a checked `/detokenize` request.
fn read_detokenize(
    body: &Field<'_, '_>,
    bounds: &Bounds,
    ignored: &mut IgnoredFields,
) -> Result<Vec<u32>, ApiError> {
    let mut tokens = None;
    body.entries(|name, field| {
        if Route::Detokenize.is_to_be_read(name, &field, ignored)? {
            match name {
                "model" => drop(bounds.model(&field)?),
                "tokens" => tokens = Some(field.token_ids(usize::MAX, bounds.vocab_size)?),
                _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
            }
        }
        Ok(())
    })?;
    tokens.ok_or_else(|| body.missing("tokens"))
}

/// `POST /detokenize`
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::Detokenize, request).await?;
    let Read { fields: tokens, ignored, permit: _permit } = admitted.read(&state, read_detokenize).await?;
    let text = prompt::decode(&state, tokens).await?;
    Ok(with_ignored_fields(Json(json!({ "prompt": text })).into_response(), &ignored))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{generation::test_bounds, schema::agreement::assert_agreement};

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let rows = [
            (json!({}), MissingRequiredParameter, "prompt"),
            (json!({"prompt": 3}), InvalidType, "prompt"),
            (
                json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
                InvalidValue,
                "messages",
            ),
            (json!({"prompt": "x", "model": "other"}), ModelNotFound, "model"),
            (json!({"prompt": "x", "return_token_strs": 1}), InvalidType, "return_token_strs"),
            (json!({"prompt": "x", "tools": [1]}), InvalidType, "tools[0]"),
            (json!({"prompt": "x", "chat_template": "x"}), UnsupportedParameter, "chat_template"),
        ];
        for (body, kind, param) in rows {
            let error =
                TokenizeRequest::read(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default())
                    .expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
        let rows = [
            (json!({}), MissingRequiredParameter, "tokens"),
            (json!({"tokens": "x"}), InvalidType, "tokens"),
            (json!({"tokens": [300]}), IntegerAboveMaxValue, "tokens[0]"),
        ];
        for (body, kind, param) in rows {
            let error = read_detokenize(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default())
                .expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }

    #[test]
    fn schema_and_parser_agree() {
        assert_agreement(Route::Tokenize, &json!({"prompt": "x"}), &["messages", "tools"], |body, bounds| {
            TokenizeRequest::read(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
        });
        assert_agreement(Route::Detokenize, &json!({"tokens": [1]}), &[], |body, bounds| {
            read_detokenize(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
        });
    }

    #[test]
    fn no_field_is_forgotten() {
        for name in Route::Tokenize.read_fields() {
            let body = json!({ name: [[{}]] });
            let error =
                TokenizeRequest::read(&Field::root(&body), &test_bounds(), &mut IgnoredFields::default())
                    .expect_err("wrong type");
            assert!(error.param.as_deref().is_some_and(|param| param.starts_with(name)), "{name}: {error:?}");
        }
    }
}
