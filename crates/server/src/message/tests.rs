//! Streams of calls keep the rules of the contract, wherever the tokens are cut.

use std::{collections::VecDeque, sync::Arc};

use locket_engine::{FinishReason as EngineFinish, SequenceEvent};
use locket_processor::tools::{ToolFormat, ToolSpec};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    choice::{ChoiceEvent, ChoiceText, TokenTable, tests::token},
    generation::GenerationFields,
    routes::chat::tools::wanted,
};

/// Tokens are any bytes; those that are empty are hidden control tokens.
struct Pieces(Vec<Vec<u8>>);

impl TokenTable for Pieces {
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.get(id as usize).map_or(&[], |bytes| bytes)
    }

    fn is_special(&self, id: u32) -> bool {
        self.token_bytes(id).is_empty()
    }
}

fn plan(format: ToolFormat, is_parallel: bool) -> MessagePlan {
    let tool = |name: &str| ToolSpec { name: name.into(), ..ToolSpec::default() };
    let mut plan = MessagePlan::default();
    plan.set_tools(Arc::new(ToolSyntax { format, tools: vec![tool("weather"), tool("time")], is_parallel }));
    plan
}

fn with_thoughts(mut plan: MessagePlan) -> MessagePlan {
    let markers = ThoughtMarkers {
        open: "<think>".into(),
        close: "</think>".into(),
        answer_open: None,
        call_openers: vec!["<tool_call>".into()],
    };
    plan.set_thoughts(Arc::new(markers), ThoughtStart::Undecided);
    plan
}

/// Cuts bytes at any places, characters included.
fn cut(text: &str, cuts: &[prop::sample::Index]) -> Vec<Vec<u8>> {
    let bytes = text.as_bytes();
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends.clone()).map(|(start, end)| bytes[start..end].to_vec()).collect()
}

/// What the engine's tokens become, as the stream and the whole answer get it.
struct Run {
    parts: Vec<MessagePart>,
    reason: FinishReason,
    whole: (Message, FinishReason),
}

fn run(plan: &MessagePlan, pieces: Vec<Vec<u8>>, end: EngineFinish) -> Run {
    run_with(&GenerationFields::default(), plan, pieces, end)
}

fn run_with(fields: &GenerationFields, plan: &MessagePlan, pieces: Vec<Vec<u8>>, end: EngineFinish) -> Run {
    let ids = 0..pieces.len() as u32;
    let mut text = ChoiceText::new(Arc::new(Pieces(pieces)), fields);
    let mut events = VecDeque::new();
    let finished = SequenceEvent::Finished { reason: end, folded_tokens: 0 };
    for event in ids.map(|id| SequenceEvent::Token(token(id))).chain([finished]) {
        if !text.advance(Some(event), 0, &mut events) {
            break;
        }
    }
    let mut reader = plan.reader();
    let (mut parts, mut joined, mut tokens) = (Vec::new(), String::new(), Vec::new());
    for event in events {
        match event {
            ChoiceEvent::Delta(delta) => {
                joined.push_str(&delta.text);
                tokens.extend(delta.tokens.clone());
                parts.extend(reader.push(delta));
            }
            ChoiceEvent::Finished(finish) => {
                let (rest, reason) = reader.finish(finish.reason);
                parts.extend(rest);
                let ids = |tokens: &[ReleasedToken]| {
                    tokens.iter().map(|token| token.sampled.id).collect::<Vec<_>>()
                };
                let all: Vec<u32> = parts.iter().flat_map(|part| ids(&part.tokens)).collect();
                assert_eq!(all, ids(&tokens), "every token is in one part, in order");
                let whole = Message::read(plan, joined, tokens, finish.reason);
                assert_eq!(whole.0.reasoning_tokens, reader.reasoning_tokens());
                return Run { parts, reason, whole };
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("an end");
}

/// Rules 1 to 3 of section 5.1 of the contract, and that the stream joins to the whole answer.
fn check(run: Run) -> (Message, FinishReason) {
    let (mut calls, mut ids) = (0, std::collections::HashSet::new());
    let mut message = Message::default();
    for part in run.parts {
        match &part.delta {
            MessageDelta::ToolCall { index, id, name } => {
                assert_eq!(*index, calls, "indices count up without gaps");
                calls += 1;
                assert!(id.len() >= 5 + 24 && id.starts_with("call_") && ids.insert(id.clone()), "{id}");
                assert!(["weather", "time"].contains(&name.as_str()), "the name is whole: {name}");
            }
            MessageDelta::ToolArguments { index, text } => {
                assert!(*index + 1 == calls && !text.is_empty(), "fragments of the latest call only");
            }
            _ => {}
        }
        message.add(part);
    }
    let without_ids = |mut message: Message| {
        message.tool_calls.iter_mut().for_each(|call| call.id.clear());
        message.content.get_or_insert_default();
        message
    };
    let (mut whole, reason) = run.whole;
    assert_eq!(whole.content.is_none(), message.content.is_none() && !message.tool_calls.is_empty());
    message.reasoning_tokens = whole.reasoning_tokens;
    whole = without_ids(whole);
    message = without_ids(message);
    assert_eq!((&message, run.reason), (&whole, reason), "streamed and whole are the same");
    (message, reason)
}

/// Arguments with everything that is hard to cut.
fn arguments() -> Map<String, Value> {
    let hard =
        json!({"city": "Zürich 🦀 \"x\" \\ \n</tool_call>", "days": [1, -2.5e3, {"a": null}], "é": true});
    hard.as_object().cloned().expect("an object")
}

fn python(value: &Value) -> String {
    value.to_string().replace("null", "None").replace("true", "True")
}

/// A call of `weather` with hard arguments, then one of `time` without any, as each format writes them.
fn calls_text(format: ToolFormat) -> String {
    let arguments = arguments();
    let json = Value::from(arguments.clone()).to_string();
    match format {
        ToolFormat::Hermes => format!(
            "<tool_call>\n{{\"name\": \"weather\", \"arguments\": {json}}}\n</tool_call>\n\
             <tool_call>\n{{\"name\": \"time\", \"arguments\": {{}}}}\n</tool_call>"
        ),
        ToolFormat::LlamaJson => format!(
            "{{\"name\": \"weather\", \"parameters\": {json}}}; {{\"name\": \"time\", \"parameters\": {{}}}}"
        ),
        ToolFormat::Pythonic => {
            let arguments: Vec<String> =
                arguments.iter().map(|(name, value)| format!("{name}={}", python(value))).collect();
            format!("[weather({}), time()]", arguments.join(", "))
        }
    }
}

/// Fields with stop strings, and the calls of a plan.
fn fields_with(
    plan: &MessagePlan,
    stop: Vec<String>,
    include_stop: bool,
    is_required: bool,
) -> GenerationFields {
    let syntax = Arc::clone(plan.tools.as_ref().expect("tools"));
    let mut fields = GenerationFields { stop, include_stop, ..GenerationFields::default() };
    fields.wanted.calls = Some(wanted(&syntax, is_required, Vec::new()));
    fields
}

fn stop() -> EngineFinish {
    EngineFinish::Stop { token_id: u32::MAX }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Rules 1 to 5, and the same whether streamed or not.
    #[test]
    fn rules_of_the_contract(
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        before in prop::sample::select(vec!["", "I look. 🦀é", "a < b { c [d", "\n\n", "<tool_", "Thus {\"name\": "]),
        between in prop::sample::select(vec!["", "And <then> [now] {\"name\" 🦀"]),
        thinks in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let thought = if thinks { "<think>Hm 🦀</think>" } else { "" };
        let text = format!("{thought}{before}{}{between}{}", calls_text(format), calls_text(format));
        let (message, reason) = check(run(&with_thoughts(plan(format, true)), cut(&text, &cuts), stop()));
        prop_assert_eq!(reason, FinishReason::ToolCalls);
        prop_assert_eq!(message.reasoning.as_deref(), thinks.then_some("Hm 🦀"));
        // Blanks between a thought or the beginning and a call are nobody's.
        let content = format!("{}{between}", if before.trim().is_empty() { "" } else { before });
        prop_assert_eq!(message.content.as_deref(), Some(content.as_str()));
        prop_assert_eq!(message.tool_calls.len(), 4);
        for pair in message.tool_calls.chunks(2) {
            let object = |call: &ToolCall| serde_json::from_str::<Map<String, Value>>(&call.arguments).expect("JSON");
            prop_assert_eq!((pair[0].name.as_str(), object(&pair[0])), ("weather", arguments()));
            prop_assert_eq!((pair[1].name.as_str(), pair[1].arguments.as_str()), ("time", "{}"));
        }
    }

    /// Stop strings count in the content: those that stand in calls only change nothing, and one behind a
    /// call ends the answer there.
    #[test]
    fn stop_strings_leave_calls_alone(
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        before in prop::sample::select(vec!["", "I look. 🦀é", "a < b", "<tool_", "Thus {name"]),
        inside in prop::sample::subsequence(vec!["}", "]", ")", "\"", "\n", "city", "; ", "<tool_call>", "</"], 1..5),
        has_stop in any::<bool>(),
        include_stop in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let behind = if has_stop { "And STOP then" } else { "And then" };
        let text = format!("{before}{}{behind}{}", calls_text(format), calls_text(format));
        let mut stop: Vec<String> = inside.into_iter().map(str::to_owned).collect();
        stop.push("STOP".into());
        let plan = plan(format, true);
        let fields = fields_with(&plan, stop, include_stop, false);
        let (message, reason) = check(run_with(&fields, &plan, cut(&text, &cuts), super::tests::stop()));
        prop_assert_eq!(reason, FinishReason::ToolCalls);
        let kept = match (has_stop, include_stop) {
            (false, _) => "And then",
            (true, false) => "And ",
            (true, true) => "And STOP",
        };
        prop_assert_eq!(message.content, Some(format!("{before}{kept}")));
        let calls: Vec<(&str, bool)> = message.tool_calls.iter().map(|call| {
            (call.name.as_str(), serde_json::from_str::<Map<String, Value>>(&call.arguments).is_ok_and(|given| {
                given == if call.name == "time" { Map::new() } else { arguments() }
            }))
        }).collect();
        let pair = [("weather", true), ("time", true)];
        prop_assert_eq!(calls, if has_stop { pair.to_vec() } else { [pair, pair].concat() });
    }

    /// Where all of the answer must be calls, nothing of it is content.
    #[test]
    fn required_calls_know_no_stop_strings(
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        end in any::<prop::sample::Index>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let text = calls_text(format);
        let text = &text[..text.floor_char_boundary(end.index(text.len() + 1))];
        let plan = plan(format, true);
        let stop = ["}", "{", "\n", "[", "<", "a"].map(str::to_owned).to_vec();
        let fields = fields_with(&plan, stop, false, true);
        let with = run_with(&fields, &plan, cut(text, &cuts), EngineFinish::Length);
        let without = run(&plan, cut(text, &cuts), EngineFinish::Length);
        let ((mut with, reason), (mut without, other)) = (check(with), check(without));
        with.tool_calls.iter_mut().chain(&mut without.tool_calls).for_each(|call| call.id.clear());
        prop_assert_eq!((with, reason), (without, other));
    }

    /// Cut off at any place: at a limit the last call may be open, otherwise every call is valid.
    #[test]
    fn ends_anywhere(
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        end in any::<prop::sample::Index>(),
        is_length in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let text = calls_text(format);
        let text = &text[..text.floor_char_boundary(end.index(text.len() + 1))];
        let finish = if is_length { EngineFinish::Length } else { stop() };
        let (message, reason) = check(run(&plan(format, true), cut(text, &cuts), finish));
        let valid = |call: &ToolCall| serde_json::from_str::<Map<String, Value>>(&call.arguments).is_ok();
        if is_length {
            prop_assert_eq!(reason, FinishReason::Length);
            let sure = message.tool_calls.len().saturating_sub(1);
            prop_assert!(message.tool_calls[..sure].iter().all(valid));
        } else {
            prop_assert!(message.tool_calls.iter().all(valid), "{:?}", message);
            prop_assert!(reason != FinishReason::ToolCalls || !message.tool_calls.is_empty());
        }
    }

    /// Text without calls is content, all of it, and its tokens are the content's.
    #[test]
    fn plain_text_is_content(
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        text in "[a-z<>{}\\[\\]\"\\n 🦀é]{0,40}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let (message, reason) = check(run(&plan(format, true), cut(&text, &cuts), stop()));
        prop_assert_eq!(message.content.as_deref(), Some(text.as_str()));
        prop_assert_eq!(reason, FinishReason::Stop);
        let bytes: usize = message.content_tokens.iter().map(|token| token.bytes).sum();
        prop_assert_eq!(bytes, text.len());
    }
}

/// Log-probabilities are those of the content: a token counts where it begins.
#[test]
fn tokens_belong_to_the_part_they_begin_in() {
    let texts = [
        "I look. ",
        "🦀",
        "<tool_call>",
        "{\"name\": \"time\"",
        ", \"arguments\": {",
        "}",
        "}</tool_call> D",
        "one",
    ];
    let pieces = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let (message, _) = check(run(&plan(ToolFormat::Hermes, true), pieces, stop()));
    let ids: Vec<u32> = message.content_tokens.iter().map(|token| token.sampled.id).collect();
    assert_eq!(ids, [0, 1, 7]);
    assert_eq!(message.content.as_deref(), Some("I look. 🦀 Done"));
}

/// Thought tokens are counted, those of the markers are not.
#[test]
fn thought_tokens() {
    let texts = ["<think>", "a", "🦀", "</think>", "b"];
    let pieces = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let (message, reason) = check(run(&with_thoughts(MessagePlan::default()), pieces, stop()));
    assert_eq!((message.reasoning.as_deref(), message.content.as_deref()), (Some("a🦀"), Some("b")));
    assert_eq!((message.reasoning_tokens, reason), (2, FinishReason::Stop));
}

#[test]
fn without_parallel_calls_the_second_is_content() {
    let call = "<tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>";
    let text = format!("{call}{call}");
    let (message, reason) = check(run(&plan(ToolFormat::Hermes, false), cut(&text, &[]), stop()));
    assert_eq!((message.tool_calls.len(), message.content.as_deref()), (1, Some(call)));
    assert_eq!(reason, FinishReason::ToolCalls);
}
