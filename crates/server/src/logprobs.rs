//! Log-probabilities in the two forms of the API.

use std::fmt::Write as _;

use locket_engine::{PromptLogprobs, PromptToken, TokenLogprob};

use crate::{
    choice::{ReleasedToken, TokenTable},
    echo::{CharCounter, EchoedPrompt},
    openai::{
        ChatLogprob, ChatLogprobs, CompletionLogprobs, LogprobMap, PromptLogprob, PromptLogprobMap,
        TopLogprob,
    },
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

/// Completions: appends to `out`. `counter` counts the characters of text before the first token, and
/// goes on to the last one. A character counts where its first byte is.
pub(crate) fn completions(
    released: &[ReleasedToken],
    tokens: &dyn TokenTable,
    style: TokenStyle,
    counter: &mut CharCounter,
    out: &mut CompletionLogprobs,
) {
    for token in released {
        let chosen = &token.sampled;
        let logprob = finite(chosen.logprob.unwrap_or(f32::NEG_INFINITY));
        let text = style.exact(tokens, chosen.id);
        let chosen = TokenLogprob { id: chosen.id, logprob };
        out.top_logprobs.push(Some(top_map(chosen, &text, &token.sampled.top_logprobs, tokens, style)));
        out.tokens.push(text);
        out.token_logprobs.push(Some(logprob));
        out.text_offset.push(counter.chars());
        counter.count(shown_bytes(token, tokens));
    }
}

/// The most likely tokens and the chosen one. Two tokens of equal text keep both values: the
/// less likely one is written as bytes, or by its id if even the bytes are equal.
fn top_map(
    chosen: TokenLogprob,
    chosen_text: &str,
    alternatives: &[TokenLogprob],
    tokens: &dyn TokenTable,
    style: TokenStyle,
) -> LogprobMap {
    let mut map: Vec<(String, f32)> = Vec::with_capacity(alternatives.len() + 1);
    for top in alternatives {
        let is_chosen = top.id == chosen.id;
        let text = style.exact(tokens, top.id);
        let is_free = |text: &str| is_chosen || (text != chosen_text && !contains(&map, text));
        let key = [text, escaped(tokens.token_bytes(top.id))]
            .into_iter()
            .find(|text| is_free(text))
            .unwrap_or_else(|| format!("token_id:{}", top.id));
        map.push((key, finite(top.logprob)));
    }
    if !contains(&map, chosen_text) {
        map.push((chosen_text.to_owned(), finite(chosen.logprob)));
    }
    LogprobMap(map)
}

fn contains(map: &[(String, f32)], text: &str) -> bool {
    map.iter().any(|(key, _)| key == text)
}

/// Completions: the arrays of an echoed prompt with `count` alternatives per token. The first token
/// has no values.
pub(crate) fn echoed(
    echo: &EchoedPrompt,
    scores: &PromptLogprobs,
    count: u32,
    tokens: &dyn TokenTable,
    style: TokenStyle,
) -> CompletionLogprobs {
    let values = scores.iter().map(|(token, top)| {
        let text = style.exact(tokens, token.id);
        let chosen = TokenLogprob { id: token.id, logprob: token.logprob };
        (finite(token.logprob), top_map(chosen, &text, first(top, count), tokens, style))
    });
    let (token_logprobs, top_logprobs): (Vec<_>, Vec<_>) =
        values.map(|(logprob, top)| (Some(logprob), Some(top))).unzip();
    CompletionLogprobs {
        tokens: echo.ids.iter().map(|&id| style.exact(tokens, id)).collect(),
        token_logprobs: [None].into_iter().chain(token_logprobs).collect(),
        top_logprobs: [None].into_iter().chain(top_logprobs).collect(),
        text_offset: echo.offsets.clone(),
    }
}

/// `prompt_logprobs`: null, then for each further token itself and the `count` likeliest ones.
pub(crate) fn prompt(
    scores: &PromptLogprobs,
    count: u32,
    tokens: &dyn TokenTable,
) -> Vec<Option<PromptLogprobMap>> {
    let entry = |id: u32, logprob: f32, rank: u32| {
        let decoded_token = TokenStyle::Text.lossy(tokens, id);
        (id.to_string(), PromptLogprob { logprob: finite(logprob), rank, decoded_token })
    };
    let maps = scores.iter().map(|(PromptToken { id, logprob, rank }, top)| {
        let own = [entry(id, logprob, rank)];
        let top = (1..).zip(first(top, count)).filter(|(_, top)| top.id != id);
        Some(PromptLogprobMap(
            own.into_iter().chain(top.map(|(rank, top)| entry(top.id, top.logprob, rank))).collect(),
        ))
    });
    [None].into_iter().chain(maps).collect()
}

/// The likeliest `count`: other fields of the request may have asked for more.
fn first(top: &[TokenLogprob], count: u32) -> &[TokenLogprob] {
    &top[..top.len().min(count as usize)]
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

    fn keys(logprobs: &CompletionLogprobs) -> impl Iterator<Item = &str> {
        logprobs.top_logprobs[0].iter().flat_map(|map| &map.0).map(|(text, _)| text.as_str())
    }

    /// `ab` where `b` was the second choice.
    fn scored() -> PromptLogprobs {
        let mut scores = PromptLogprobs::default();
        let top = [(99, -0.1), (98, -2.5), (100, -3.0)].map(|(id, logprob)| TokenLogprob { id, logprob });
        scores.push(PromptToken { id: 98, logprob: -2.5, rank: 2 }, &top);
        scores
    }

    #[test]
    fn an_echoed_prompt_has_values_from_its_second_token() {
        let echo = EchoedPrompt::new(&Bytes::new(), Some("ab".into()), &[97, 98]);
        let json = |count| {
            let arrays = echoed(&echo, &scored(), count, &Bytes::new(), TokenStyle::Text);
            serde_json::to_value(arrays).expect("plain data")
        };
        assert_eq!(
            json(1),
            serde_json::json!({"tokens": ["a", "b"], "token_logprobs": [null, -2.5],
                "top_logprobs": [null, {"c": -0.1f32, "b": -2.5}], "text_offset": [0, 1]})
        );
        assert_eq!(json(0)["top_logprobs"], serde_json::json!([null, {"b": -2.5}]));
        assert_eq!(json(3)["top_logprobs"][1].as_object().map(serde_json::Map::len), Some(3));
    }

    #[test]
    fn prompt_logprobs_have_ids_ranks_and_texts() {
        let json = |count| serde_json::to_value(prompt(&scored(), count, &Bytes::new())).expect("plain data");
        let own = serde_json::json!({"logprob": -2.5, "rank": 2, "decoded_token": "b"});
        let best = serde_json::json!({"logprob": -0.1f32, "rank": 1, "decoded_token": "c"});
        assert_eq!(json(0), serde_json::json!([null, {"98": own}]));
        assert_eq!(json(2), serde_json::json!([null, {"98": own, "99": best}]));
        assert_eq!(json(3)[1]["100"]["rank"], 3);
    }

    /// Offsets count characters, tokens inside a character included, hidden tokens not.
    #[test]
    fn offsets_count_characters() {
        let text: Vec<_> = "aé€b".bytes().map(|byte| released(u32::from(byte), -0.5, &[])).collect();
        let mut out = CompletionLogprobs::default();
        let mut offset = CharCounter::default();
        completions(&text[..2], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        completions(&text[2..], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        assert_eq!(out.text_offset, [0, 1, 2, 2, 3, 3, 3]);
        assert_eq!(offset.chars(), 4);
        assert_eq!(out.tokens[0], "a");
        assert_eq!(out.tokens[1], "bytes:\\xc3");
        completions(&[released(256, -1.0, &[])], &Bytes::new(), TokenStyle::Text, &mut offset, &mut out);
        assert_eq!((offset.chars(), out.text_offset.last()), (4, Some(&4)));
        let lengths =
            [out.tokens.len(), out.token_logprobs.len(), out.top_logprobs.len(), out.text_offset.len()];
        assert_eq!(lengths, [8; 4]);
    }

    /// Clients compare the two as texts or as numbers: they are equal either way.
    #[test]
    fn equal_values_are_written_alike() {
        let token = released(97, -0.1, &[(97, -0.1), (98, -3.3)]);
        let mut out = CompletionLogprobs::default();
        completions(&[token], &Bytes::new(), TokenStyle::Text, &mut CharCounter::default(), &mut out);
        let json = serde_json::to_string(&out).expect("plain data");
        assert!(json.contains(r#""token_logprobs":[-0.1],"top_logprobs":[{"a":-0.1,"b":-3.3}]"#), "{json}");
    }

    #[test]
    fn the_chosen_token_is_always_among_the_alternatives() {
        let token = released(97, -3.0, &[(98, -0.1), (0xC3, -1.0), (0xC4, -2.0)]);
        let mut out = CompletionLogprobs::default();
        completions(&[token], &Bytes::new(), TokenStyle::Text, &mut CharCounter::default(), &mut out);
        let keys: Vec<_> = keys(&out).collect();
        assert_eq!(keys, ["b", "bytes:\\xc3", "bytes:\\xc4", "a"]);
    }

    #[test]
    fn equal_texts_keep_both_values() {
        // Both control tokens have the text `<end>`.
        let token = released(257, -0.1, &[(257, -0.1), (258, -3.0), (259, -4.0)]);
        let mut out = CompletionLogprobs::default();
        completions(&[token], &Bytes::new(), TokenStyle::Text, &mut CharCounter::default(), &mut out);
        let keys: Vec<_> = keys(&out).collect();
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
