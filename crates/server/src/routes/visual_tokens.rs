//! `POST /visual_tokens`: which visual tokens of a conversation's images the decoder would see.

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::chat::{Conversation, read_messages};
use crate::{
    error::ApiError,
    fields::{Field, IgnoredFields},
    generation::{Bounds, LocketFields},
    known_fields::Route,
    layers::RequestContext,
    limits::{self, Read},
    run::with_ignored_fields,
    state::AppState,
    visual::{self, VisualReports},
};

/// A checked request.
#[derive(Debug, Default)]
struct VisualTokensRequest {
    conversation: Option<Conversation>,
    locket: LocketFields,
}

impl VisualTokensRequest {
    fn read(body: &Field<'_, '_>, bounds: &Bounds, ignored: &mut IgnoredFields) -> Result<Self, ApiError> {
        let mut request = Self::default();
        body.entries(|name, field| {
            if Route::VisualTokens.is_to_be_read(name, &field, ignored)? {
                match name {
                    "model" => drop(bounds.model(&field)?),
                    "messages" => request.conversation = Some(read_messages(&field, bounds, ignored)?),
                    "locket" => request.locket = LocketFields::read(&field, bounds)?,
                    _ => return Err(ApiError::internal(&format!("nobody reads the field {name}"))),
                }
            }
            Ok(())
        })?;
        if request.conversation.is_none() {
            return Err(body.missing("messages"));
        }
        Ok(request)
    }
}

/// The answer: one report for each image, in the order of the conversation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VisualTokenList {
    object: &'static str,
    #[schema(value_type = Vec<visual::VisualReport>)]
    data: VisualReports,
}

/// `POST /visual_tokens`
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = limits::admit(&state, &context, Route::VisualTokens, request).await?;
    let Read { fields: request, ignored, permit: _permit } =
        admitted.read(&state, VisualTokensRequest::read).await?;
    let images = request.conversation.unwrap_or_default().images;
    let data = visual::report(&state, images, request.locket.visual.as_ref()).await?;
    let answer = VisualTokenList { object: "list", data };
    Ok(with_ignored_fields(Json(answer).into_response(), &ignored))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{error::ErrorKind, generation::test_bounds, schema::agreement::assert_agreement};

    fn read(body: &serde_json::Value, bounds: &Bounds) -> Result<(), ApiError> {
        VisualTokensRequest::read(&Field::root(body), bounds, &mut IgnoredFields::default()).map(drop)
    }

    #[test]
    fn schema_and_parser_agree() {
        let base = json!({"messages": [{"role": "user", "content": "Hi"}]});
        assert_agreement(Route::VisualTokens, &base, &["messages", "locket"], read);
    }

    #[test]
    fn no_field_is_forgotten() {
        for name in Route::VisualTokens.read_fields() {
            let error = read(&json!({ name: [[{}]] }), &test_bounds()).expect_err("wrong type");
            assert_ne!(error.kind, ErrorKind::InternalError, "{name}");
        }
        let error = read(&json!({}), &test_bounds()).expect_err("no messages");
        assert_eq!(error.param.as_deref(), Some("messages"));
    }
}
