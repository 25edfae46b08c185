//! Log-probabilities in the two forms of the API.

use std::fmt::Write as _;

use locket_engine::TokenLogprob;
use serde_json::{Map, Value};

use crate::{
    choice::{ReleasedToken, TokenTable},
    openai::{ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob},
};

/// What stands for minus infinity, which JSON cannot express.
const MINUS_INFINITY: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(MINUS_INFINITY) } else { MINUS_INFINITY }
}

/// How tokens are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenStyle {
    /// As text.
    Text,
    /// As `token_id:<id>`.
    Id,
}

impl TokenStyle {
    /// Chat: lossy text.
    fn lossy(self, tokens: &dyn TokenTable, id: u32) -> String {
        match self {
            Self::Text => String::from_utf8_lossy(tokens.token_bytes(id)).into_owned(),
            Self::Id => format!("token_id:{id}"),
        }
    }

    /// Completions: bytes that are no text stay distinct, because texts are keys there.
    fn exact(self, tokens: &dyn TokenTable, id: u32) -> String {
        match self {
            Self::Text => {
                let bytes = tokens.token_bytes(id);
                str::from_utf8(bytes).map_or_else(|_| escaped(bytes), str::to_owned)
            }
            Self::Id => format!("token_id:{id}"),
        }
    }
}

/// `bytes:\xNN…`
fn escaped(bytes: &[u8]) -> String {
    bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
        text
    })
}

/// Chat: one entry per token. The joined `bytes` are the content, so a hidden token has none.
pub(crate) fn chat(released: &[ReleasedToken], tokens: &dyn TokenTable, style: TokenStyle) -> ChatLogprobs {
    let content = released
        .iter()
        .map(|token| ChatLogprob {
            token: style.lossy(tokens, token.sampled.id),
            logprob: finite(token.sampled.logprob.unwrap_or(f32::NEG_INFINITY)),
            bytes: shown_bytes(token, tokens).to_vec(),
            top_logprobs: token
                .sampled
                .top_logprobs
                .iter()
                .map(|top| alternative(top, tokens, style))
                .collect(),
        })
        .collect();
    ChatLogprobs { content, refusal: None }
}

fn shown_bytes<'t>(token: &ReleasedToken, tokens: &'t dyn TokenTable) -> &'t [u8] {
    if token.is_hidden { &[] } else { tokens.token_bytes(token.sampled.id) }
}

fn alternative(top: &TokenLogprob, tokens: &dyn TokenTable, style: TokenStyle) -> TopLogprob {
    TopLogprob {
        token: style.lossy(tokens, top.id),
        logprob: finite(top.logprob),
        bytes: tokens.token_bytes(top.id).to_vec(),
    }
}

/// Completions: appends to `out`. `offset` is the number of characters of text before the first
/// token, and is moved behind the last one. A character counts where its first byte is.
pub(crate) fn completions(
    released: &[ReleasedToken],
    tokens: &dyn TokenTable,
    style: TokenStyle,
    offset: &mut usize,
    out: &mut CompletionLogprobs,
) {
    for token in released {
        let chosen = &token.sampled;
        let logprob = finite(chosen.logprob.unwrap_or(f32::NEG_INFINITY));
        let text = style.exact(tokens, chosen.id);
        out.top_logprobs.push(top_map(token, &text, logprob, tokens, style));
        out.tokens.push(text);
        out.token_logprobs.push(logprob);
        out.text_offset.push(*offset);
        *offset += shown_bytes(token, tokens).iter().filter(|byte| **byte & 0xC0 != 0x80).count();
    }
}

/// The most likely tokens and the chosen one. Two tokens of equal text keep both values: the
/// less likely one is written as bytes, or by its id if even the bytes are equal.
fn top_map(
    token: &ReleasedToken,
    chosen_text: &str,
    logprob: f32,
    tokens: &dyn TokenTable,
    style: TokenStyle,
) -> Map<String, Value> {
    let mut map = Map::new();
    for top in &token.sampled.top_logprobs {
        let is_chosen = top.id == token.sampled.id;
        let text = style.exact(tokens, top.id);
        let is_free = |text: &str| is_chosen || (!map.contains_key(text) && text != chosen_text);
        let key = [text, escaped(tokens.token_bytes(top.id))]
            .into_iter()
            .find(|text| is_free(text))
            .unwrap_or_else(|| format!("token_id:{}", top.id));
        map.insert(key, finite(top.logprob).into());
    }
    if !map.contains_key(chosen_text) {
        map.insert(chosen_text.to_owned(), logprob.into());
    }
    map
}

#[cfg(test)]
mod tests {
    use locket_engine::SampledToken;

    use super::*;
    use crate::choice::tests::Bytes;

    fn released(id: u32, logprob: f32, top: &[(u32, f32)]) -> ReleasedToken {
        let top_logprobs =
            top.iter().map(|(id, logprob)| TokenLogprob { id: *id, logprob: *logprob }).collect();
        ReleasedToken {
            sampled: SampledToken { id, logprob: Some(logprob), top_logprobs, is_forced: false },
            is_hidden: id >= 256,
            bytes: usize::from(id < 256),
        }
    }

    /// Offsets count characters, tokens inside a character included, hidden tokens not.
    #[test]
    fn offsets_count_characters() {
        let text: Vec<_> = "aé€b".bytes().map(|byte| released(u32::from(byte), -0.5, &[])).collect();
        let mut out = CompletionLogprobs::default();
        let mut offset = 0;
        completions(&text[..2], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        completions(&text[2..], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        assert_eq!(out.text_offset, [0, 1, 2, 2, 3, 3, 3]);
        assert_eq!(offset, 4);
        assert_eq!(out.tokens[0], "a");
        assert_eq!(out.tokens[1], "bytes:\\xc3");
        completions(&[released(256, -1.0, &[])], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        assert_eq!((offset, out.text_offset.last()), (4, Some(&4)));
        let lengths =
            [out.tokens.len(), out.token_logprobs.len(), out.top_logprobs.len(), out.text_offset.len()];
        assert_eq!(lengths, [8; 4]);
    }

    #[test]
    fn the_chosen_token_is_always_among_the_alternatives() {
        let token = released(97, -3.0, &[(98, -0.1), (0xC3, -1.0), (0xC4, -2.0)]);
        let mut out = CompletionLogprobs::default();
        completions(&[token], &Bytes::new(), TokenStyle::Text, &mut 0, &mut out);
        let keys: Vec<_> = out.top_logprobs[0].keys().map(String::as_str).collect();
        assert_eq!(keys, ["b", "bytes:\\xc3", "bytes:\\xc4", "a"]);
    }

    #[test]
    fn equal_texts_keep_both_values() {
        // Both control tokens have the text `<end>`.
        let token = released(257, -0.1, &[(257, -0.1), (258, -3.0), (259, -4.0)]);
        let mut out = CompletionLogprobs::default();
        completions(&[token], &Bytes::new(), TokenStyle::Text, &mut 0, &mut out);
        let keys: Vec<_> = out.top_logprobs[0].keys().map(String::as_str).collect();
        assert_eq!(keys, ["<end>", "bytes:\\x3c\\x65\\x6e\\x64\\x3e", "token_id:259"]);
    }

    #[test]
    fn chat_entries() {
        let entries = chat(
            &[released(97, f32::NEG_INFINITY, &[(98, -0.25)]), released(256, f32::NAN, &[])],
            &Bytes::new(),
            TokenStyle::Text,
        );
        let json = serde_json::to_value(&entries).expect("plain data");
        assert_eq!(
            json,
            serde_json::json!({"content": [
                {"token": "a", "logprob": -9999.0, "bytes": [97],
                 "top_logprobs": [{"token": "b", "logprob": -0.25, "bytes": [98]}]},
                {"token": "<end>", "logprob": -9999.0, "bytes": [], "top_logprobs": []}
            ], "refusal": null})
        );
        let ids = chat(&[released(97, -1.0, &[])], &Bytes::new(), TokenStyle::Id);
        assert_eq!(ids.content[0].token, "token_id:97");
    }
}
