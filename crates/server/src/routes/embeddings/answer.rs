//! The answer, in both encodings.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use utoipa::ToSchema;

/// Answer of `/v1/embeddings`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingList<'a> {
    object: &'static str,
    model: &'a str,
    /// In the order of the inputs.
    data: Vec<Embedding>,
    usage: EmbeddingUsage,
}

#[derive(Debug, Serialize, ToSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// Of length 1.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    /// 32-bit numbers, little-endian.
    Base64(String),
}

#[derive(Debug, Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

pub(super) fn respond(model: &str, vectors: Vec<Vec<f32>>, is_base64: bool, prompt_tokens: u64) -> Response {
    let encode =
        |vector: Vec<f32>| if is_base64 { Vector::Base64(base64(&vector)) } else { Vector::Float(vector) };
    let data = vectors.into_iter().enumerate();
    let data =
        data.map(|(index, vector)| Embedding { object: "embedding", index, embedding: encode(vector) });
    let usage = EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens };
    Json(EmbeddingList { object: "list", model, data: data.collect(), usage }).into_response()
}

fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_the_bytes_of_the_numbers() {
        assert_eq!(base64(&[1.0, -0.5]), "AACAPwAAAL8=");
        assert_eq!(base64(&[0.1]), "zczMPQ==");
    }
}
