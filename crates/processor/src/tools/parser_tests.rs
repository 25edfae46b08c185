//! The parser against known outputs of models, and against any text in any chunks.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{ToolDelta, ToolFormat, ToolParser, json_text::tests::any_object, python_text::tests::python};

/// What a client would have.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    content: String,
    calls: Vec<(String, String)>,
    complete: u32,
}

fn names() -> Vec<String> {
    ["weather", "weather_now", "f"].map(str::to_owned).into()
}

/// Reads a text in chunks and checks what must hold of the pieces.
fn read(format: ToolFormat, chunks: &[&str], was_cut: bool) -> Answer {
    let mut parser = ToolParser::new(format, names(), None);
    let mut pieces: Vec<_> = chunks.iter().flat_map(|chunk| parser.push(chunk)).collect();
    pieces.extend(parser.finish(was_cut));
    let bytes: usize = pieces.iter().map(|piece| piece.bytes).sum();
    assert_eq!(bytes, chunks.iter().map(|chunk| chunk.len()).sum::<usize>(), "the pieces are the text");
    let mut answer = Answer { complete: parser.complete_calls(), ..Answer::default() };
    let mut is_in_call = false;
    for piece in pieces {
        match piece.delta {
            ToolDelta::Content(text) => {
                assert!(!text.is_empty() && text.len() == piece.bytes);
                answer.content.push_str(&text);
                is_in_call = false;
            }
            ToolDelta::Call(name) => {
                assert!(names().contains(&name), "whole names only");
                answer.calls.push((name, String::new()));
                is_in_call = true;
            }
            ToolDelta::Arguments(text) => {
                assert!(is_in_call && !text.is_empty(), "arguments belong to the last call");
                answer.calls.last_mut().expect("a call").1.push_str(&text);
            }
            ToolDelta::Markup => {}
        }
    }
    answer
}

fn whole(format: ToolFormat, text: &str) -> (String, Vec<(String, Value)>) {
    let every_char: Vec<&str> = text.split_inclusive(|_: char| true).collect();
    let answer = read(format, &[text], false);
    assert_eq!(answer, read(format, &every_char, false), "{text}");
    let value = |text: &str| serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    (answer.content, answer.calls.iter().map(|(name, text)| (name.clone(), value(text))).collect())
}

#[test]
fn hermes() {
    let oslo = || ("weather".to_owned(), json!({"city": "Oslo"}));
    let none = || ("f".to_owned(), json!({}));
    let rows = [
        (
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>",
            "",
            vec![oslo()],
        ),
        (
            "I look.\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"arguments\": {\"city\": \"Oslo\"}, \"name\": \"weather\"}\n</tool_call>\n",
            "I look.\n",
            vec![none(), oslo()],
        ),
        ("<tool_call>{\"name\": \"f\"}</tool_call> Done.", " Done.", vec![none()]),
        ("<tool_call>{\"id\": 1, \"name\": \"f\", \"arguments\": null}</tool_call>", "", vec![none()]),
        (
            "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": \\\"Oslo\\\"}\"}</tool_call>",
            "",
            vec![oslo()],
        ),
        (
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}</tool_call>",
            "",
            vec![oslo()],
        ),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {}, \"x\": [1]}</tool_call>", "", vec![none()]),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {}}", "", vec![none()]),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_", "", vec![none()]),
        // No calls.
        (
            "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>",
            vec![],
        ),
        ("<tool_call>f()</tool_call>", "<tool_call>f()</tool_call>", vec![]),
        ("a < b <tool> <tool_call", "a < b <tool> <tool_call", vec![]),
        (" \n", " \n", vec![]),
        ("", "", vec![]),
    ];
    for (text, content, calls) in rows {
        assert_eq!(whole(ToolFormat::Hermes, text), (content.to_owned(), calls), "{text}");
    }
}

#[test]
fn llama_json() {
    let oslo = || ("weather".to_owned(), json!({"city": "Oslo"}));
    let rows = [
        ("{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}", "", vec![oslo()]),
        ("<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}", "", vec![oslo()]),
        (
            "{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}",
            "",
            vec![oslo()],
        ),
        (
            "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}; {\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}",
            "",
            vec![oslo(), oslo()],
        ),
        (
            "\n{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}\n{\"name\": \"f\", \"parameters\": {}}",
            "",
            vec![oslo(), ("f".to_owned(), json!({}))],
        ),
        (
            "Look: {\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}; ok",
            "Look: ; ok",
            vec![oslo()],
        ),
        // No calls.
        ("{\"name\": \"weather\"}", "{\"name\": \"weather\"}", vec![]),
        ("{\"name\": \"Bob\", \"age\": 3}", "{\"name\": \"Bob\", \"age\": 3}", vec![]),
        ("{\"city\": {\"name\": \"f\"}}", "{\"city\": {\"name\": \"f\"}}", vec![]),
        ("fn main() { x }", "fn main() { x }", vec![]),
    ];
    for (text, content, calls) in rows {
        assert_eq!(whole(ToolFormat::LlamaJson, text), (content.to_owned(), calls), "{text}");
    }
}

#[test]
fn pythonic() {
    let oslo = || ("weather".to_owned(), json!({"city": "Oslo", "days": 2}));
    let none = || ("f".to_owned(), json!({}));
    let rows = [
        ("[weather(city='Oslo', days=2)]", "", vec![oslo()]),
        ("[weather(city=\"Oslo\", days=2), f()]", "", vec![oslo(), none()]),
        (
            "<|python_start|>[f( ), weather_now(a = [True, None]),]<|python_end|>",
            "",
            vec![none(), ("weather_now".to_owned(), json!({"a": [true, null]}))],
        ),
        ("I look. [f()] Done.", "I look.  Done.", vec![none()]),
        ("[f()", "", vec![none()]),
        ("[f(), g()]", ", g()]", vec![none()]),
        // No calls.
        ("[weather('Oslo')]", "[weather('Oslo')]", vec![]),
        ("[f(a == 1)]", "[f(a == 1)]", vec![]),
        ("[1, 2] and [g()] and [f", "[1, 2] and [g()] and [f", vec![]),
    ];
    for (text, content, calls) in rows {
        assert_eq!(whole(ToolFormat::Pythonic, text), (content.to_owned(), calls), "{text}");
    }
}

#[test]
fn names_are_whole_and_arguments_come_as_they_do() {
    let mut parser = ToolParser::new(ToolFormat::Hermes, names(), None);
    let mut push = |text| parser.push(text).into_iter().map(|piece| piece.delta).collect::<Vec<_>>();
    assert_eq!(push("Hm <tool_"), [ToolDelta::Content("Hm ".into())]);
    assert_eq!(push("call>\n{\"name\": \"weather"), []);
    assert_eq!(push("\", \"arguments\": "), []);
    assert_eq!(push("{\"ci"), [ToolDelta::Call("weather".into()), ToolDelta::Arguments("{\"ci".into())]);
    assert_eq!(push("ty\": \"\\"), [ToolDelta::Arguments("ty\": \"".into())]);
    assert_eq!(push("n\"}"), [ToolDelta::Arguments("\\n\"}".into())]);
    assert_eq!(push("}\n</tool_call>"), [ToolDelta::Markup]);
}

#[test]
fn the_end_comes_too_early() {
    let rows = [
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x"),
        (ToolFormat::LlamaJson, "{\"name\": \"f\", \"parameters\": {\"a\": [1, \"x"),
        (ToolFormat::Pythonic, "[f(a=[1, 'x"),
    ];
    for (format, text) in rows {
        let cut = read(format, &[text], true);
        assert_eq!((cut.calls[0].1.as_str(), cut.complete), ("{\"a\": [1, \"x", 0), "{text}");
        let ended = read(format, &[text], false);
        assert_eq!((ended.calls[0].1.as_str(), ended.complete), ("{\"a\": [1, \"x\"]}", 0), "{text}");
    }
}

#[test]
fn broken_arguments_are_completed_and_nothing_is_lost() {
    let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": oops}}</tool_call>";
    let (content, calls) = whole(ToolFormat::Hermes, text);
    assert_eq!(calls, [("f".to_owned(), json!({"a": null}))]);
    assert_eq!(content, "oops}}</tool_call>");
    let (content, calls) = whole(ToolFormat::Pythonic, "[f(a=1, b)]");
    assert_eq!((content.as_str(), &calls[0].1), (")]", &json!({"a": 1})));
}

#[test]
fn at_most_so_many_calls() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let mut parser = ToolParser::new(ToolFormat::Hermes, names(), Some(1));
    let mut pieces = parser.push(&format!("{call}{call}"));
    pieces.extend(parser.finish(false));
    assert_eq!(pieces.last().map(|piece| &piece.delta), Some(&ToolDelta::Content(call.into())));
    let mut parser = ToolParser::new(ToolFormat::Pythonic, names(), Some(1));
    let pieces = parser.push("[f(), f()]");
    assert_eq!(pieces.last().map(|piece| &piece.delta), Some(&ToolDelta::Content(", f()]".into())));
}

/// What is no call cannot be held back without end.
#[test]
fn what_is_held_back_is_bounded() {
    let mut parser = ToolParser::new(ToolFormat::Hermes, names(), None);
    let mut given = 0;
    parser.push("<tool_call>").iter().for_each(|piece| given += piece.bytes);
    for _ in 0..200 {
        parser.push(&" ".repeat(100)).iter().for_each(|piece| given += piece.bytes);
    }
    assert!(given > 0);
}

fn any_format() -> impl Strategy<Value = ToolFormat> {
    proptest::sample::select(ToolFormat::ALL.to_vec())
}

/// Text beside calls that has their beginnings in it.
fn any_content() -> impl Strategy<Value = String> {
    let bits = [
        "a",
        "Hm. ",
        "\n",
        " ",
        "é",
        "🦀",
        "<",
        "<tool",
        "<tool_call>",
        "{",
        "{\"name\": ",
        "\"weather\"",
        "[",
        "[f",
        "(x",
        "]",
        ";",
        "</tool_call>",
        "<|python",
        "\\",
        "{\"name\": \"f\", \"parameters\": 3",
    ];
    proptest::collection::vec(proptest::sample::select(bits.to_vec()), 0..6).prop_map(|bits| {
        let text = bits.concat();
        // Something that is no blank at both ends, so that blanks around calls are not its own.
        if text.is_empty() { text } else { format!(".{text}.") }
    })
}

fn call_text(format: ToolFormat, name: &str, arguments: &Map<String, Value>, style: u8) -> String {
    let json = match style % 3 {
        0 => serde_json::to_string(arguments).expect("plain data"),
        1 => serde_json::to_string_pretty(arguments).expect("plain data"),
        _ => Value::from(arguments.clone())
            .to_string()
            .chars()
            .map(|next| {
                if next.is_ascii() {
                    next.to_string()
                } else {
                    next.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                }
            })
            .collect(),
    };
    match format {
        ToolFormat::Hermes if style.is_multiple_of(2) => {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {json}}}\n</tool_call>")
        }
        ToolFormat::Hermes => format!("<tool_call>{{\"arguments\":{json},\"name\":\"{name}\"}}</tool_call>"),
        ToolFormat::LlamaJson if style.is_multiple_of(2) => {
            format!("{{\"name\": \"{name}\", \"parameters\": {json}}}")
        }
        ToolFormat::LlamaJson => format!("<|python_tag|>{{\"name\":\"{name}\",\"arguments\":{json}}}"),
        ToolFormat::Pythonic => {
            let arguments =
                arguments.iter().enumerate().map(|(index, (_, value))| format!("a{index}={}", python(value)));
            format!("[{name}({})]", arguments.collect::<Vec<_>>().join(", "))
        }
    }
}

fn chunks_of<'t>(text: &'t str, cuts: &[proptest::sample::Index]) -> Vec<&'t str> {
    let mut ends: Vec<usize> =
        cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
    ends.push(text.len());
    ends.sort_unstable();
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends.clone()).map(|(start, end)| &text[start..end]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Content and calls in any order, cut anywhere: they are what was written.
    #[test]
    fn chunks_do_not_matter(
        format in any_format(),
        parts in proptest::collection::vec((any_content(), proptest::option::of((0usize..3, any_object(), any::<u8>()))), 0..4),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
    ) {
        let (mut text, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        for (before, call) in parts {
            text.push_str(&before);
            content.push_str(&before);
            let Some((name, arguments, style)) = call else { continue };
            let name = names()[name].clone();
            text.push_str(&call_text(format, &name, &arguments, style));
            let wanted = match format {
                ToolFormat::Pythonic => arguments.into_iter().enumerate().map(|(index, (_, value))| (format!("a{index}"), value)).collect(),
                _ => arguments,
            };
            calls.push((name, Value::from(wanted)));
        }
        let answer = read(format, &chunks_of(&text, &cuts), false);
        prop_assert_eq!(&answer.content, &content, "{}", text);
        prop_assert_eq!(answer.complete as usize, calls.len());
        let read: Vec<(String, Value)> =
            answer.calls.iter().map(|(name, text)| (name.clone(), serde_json::from_str(text).expect("JSON"))).collect();
        prop_assert_eq!(read, calls, "{}", text);
    }

    /// Any text at all: the same in any chunks, every call's arguments are an object, nothing panics.
    #[test]
    fn any_text(
        format in any_format(),
        bits in proptest::collection::vec(prop_oneof![
            proptest::sample::select(vec!["<tool_call>", "</tool_call>", "{\"name\": \"f\", ", "\"arguments\": ", "\"parameters\": ", "{", "}", "[f(", "a=", ")", "]", ",", ";", "\"", "'", "\\", "\\u", "d83d", " ", "1", "-", "tr", "ue", ":"]).prop_map(str::to_owned),
            ".{0,3}",
        ], 0..24),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
        was_cut in any::<bool>(),
    ) {
        let text = bits.concat();
        let answer = read(format, &chunks_of(&text, &cuts), was_cut);
        prop_assert_eq!(&answer, &read(format, &[&text], was_cut));
        let valid = |text: &str| serde_json::from_str::<Map<String, Value>>(text).is_ok();
        let sure = if was_cut { answer.complete as usize } else { answer.calls.len() };
        for (_, arguments) in &answer.calls[..sure] {
            prop_assert!(valid(arguments), "{} of {}", arguments, text);
        }
    }
}
