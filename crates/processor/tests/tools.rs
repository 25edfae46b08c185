//! Grammars of calls, answered at random among the allowed tokens: whatever comes out is read back as
//! calls of the tools, with arguments that their schemas allow.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/sampler.rs"]
mod sampler;
mod support;

use std::sync::Arc;

use locket_processor::{
    Processor,
    steering::{
        AnswerSpec, ForbiddenTexts, GrammarError, GrammarSource, SteeringSpec, Trigger, check_schema,
        is_grammar,
    },
    tools::{ToolDelta, ToolFormat, ToolParser, ToolSpec, ToolSyntax},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use sampler::Sampler;
use serde_json::{Map, Value, json};

fn processor() -> Arc<Processor> {
    let mut vocabulary = support::byte_level_vocabulary("llama-bpe");
    for token in
        ["{\"", "\":", "\"}", "}}", "Ġ\"", "tool", "_call", ">Ċ", "Ċ</", "name", "\",", "weather", "(", ")]"]
    {
        if !vocabulary.tokens.iter().any(|known| known == token) {
            vocabulary.tokens.push(token.into());
            vocabulary.token_types.push(1);
        }
    }
    Arc::new(support::processor(vocabulary, None))
}

fn tools() -> Vec<ToolSpec> {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["c", "f"]},
            "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
            "place": {"$ref": "#/$defs/place"}
        },
        "required": ["city", "unit"],
        "additionalProperties": false,
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}, "additionalProperties": false}}
    });
    let options = json!({
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
        "additionalProperties": false
    });
    let tool =
        |name: &str, parameters: Option<Value>| ToolSpec { name: name.into(), parameters, is_strict: true };
    vec![tool("weather", Some(weather)), tool("options-2", Some(options)), tool("time", None)]
}

fn syntax(format: ToolFormat, is_parallel: bool) -> ToolSyntax {
    ToolSyntax { format, tools: tools(), is_parallel }
}

/// Content and calls of an answer.
fn read(syntax: &ToolSyntax, text: &str) -> (String, Vec<(String, String)>) {
    let mut parser = ToolParser::new(syntax.format, syntax.names(), syntax.max_calls());
    let mut pieces = parser.push(text);
    pieces.extend(parser.finish(false));
    let (mut content, mut calls) = (String::new(), Vec::new());
    for piece in pieces {
        match piece.delta {
            ToolDelta::Content(text) => content.push_str(&text),
            ToolDelta::Call(name) => calls.push((name, String::new())),
            ToolDelta::Arguments(text) => calls.last_mut().unwrap().1.push_str(&text),
            ToolDelta::Markup => {}
        }
    }
    assert_eq!(calls.len(), parser.complete_calls() as usize, "{text}");
    (content, calls)
}

fn assert_valid(calls: &[(String, String)], text: &str) {
    for (name, arguments) in calls {
        let tool = tools().into_iter().find(|tool| tool.name == *name).unwrap();
        let value: Map<String, Value> = serde_json::from_str(arguments).unwrap();
        let schema = tool.parameters.unwrap_or(json!({"maxProperties": 0}));
        let validator = jsonschema::validator_for(&schema).unwrap();
        assert!(validator.is_valid(&value.into()), "{arguments} of {name} in {text}");
    }
}

fn answers(processor: &Arc<Processor>, answer: &AnswerSpec, begin: &str, seeds: u64) -> Vec<String> {
    let spec = SteeringSpec { answer: answer.clone(), ..SteeringSpec::default() };
    let plan = spec.plan(processor).unwrap();
    let run = |seed| {
        let mut sampler = Sampler::new(processor, &plan);
        sampler.write(begin);
        sampler.run(&mut StdRng::seed_from_u64(seed), 900)
    };
    (0..seeds).filter_map(run).collect()
}

#[test]
fn required_calls_are_calls_and_nothing_else() {
    let processor = processor();
    for format in ToolFormat::ALL {
        for is_parallel in [false, true] {
            let syntax = syntax(format, is_parallel);
            let grammar = processor.grammars().unwrap().compile(&syntax.calls()).unwrap();
            let texts = answers(&processor, &AnswerSpec::Grammar(grammar), "", 40);
            assert!(texts.len() >= 20, "{format:?}: {} of 40 ended", texts.len());
            let mut most = 0;
            for text in &texts {
                let (content, calls) = read(&syntax, text);
                assert_eq!(content, "", "{text}");
                assert!(!calls.is_empty());
                assert_valid(&calls, text);
                most = most.max(calls.len());
            }
            assert!(if is_parallel { most > 1 } else { most == 1 }, "{format:?}: {most} calls");
        }
    }
}

#[test]
fn calls_that_begin_in_free_text_end_well() {
    let processor = processor();
    let begins = [
        (ToolFormat::Hermes, "Let me see. <tool_call>"),
        (ToolFormat::Hermes, "Let me see. <tool_call>\n{\"name\": \"weather"),
        (ToolFormat::LlamaJson, "Let me see. {\"name\": \"weather\""),
        (ToolFormat::LlamaJson, "Let me see. {\"name\":\"time\", \"para"),
        (ToolFormat::Pythonic, "Let me see. [weather("),
    ];
    for (format, begin) in begins {
        let syntax = syntax(format, false);
        let trigger = syntax.trigger();
        let grammar = processor.grammars().unwrap().compile(&trigger.grammar).unwrap();
        let answer = AnswerSpec::Trigger(Arc::new(Trigger {
            markers: trigger.markers,
            grammar_has_marker: trigger.grammar_has_marker,
            grammar,
            max_calls: syntax.max_calls(),
        }));
        let texts = answers(&processor, &answer, begin, 20);
        assert!(texts.len() >= 10, "{format:?}: {} of 20 ended", texts.len());
        for text in &texts {
            let (content, calls) = read(&syntax, text);
            assert_eq!((content.as_str(), calls.len()), ("Let me see. ", 1), "{text}");
            assert_valid(&calls, text);
        }
    }
}

#[test]
fn what_is_not_strict_is_relaxed() {
    let parameters = Some(json!({"type": "object", "not": {"required": ["a"]}}));
    let tool =
        |name: &str, is_strict| ToolSpec { name: name.into(), parameters: parameters.clone(), is_strict };
    let mut syntax = ToolSyntax {
        format: ToolFormat::Hermes,
        tools: vec![tool("a", false), tool("b", true)],
        is_parallel: true,
    };
    relax(&mut syntax);
    assert_eq!(syntax.tools[0].parameters, Some(json!({"type": "object"})));
    assert_eq!(syntax.tools[1].parameters, parameters);
    let processor = processor();
    let grammars = processor.grammars().unwrap();
    assert!(grammars.compile(&syntax.calls()).is_err());
    syntax.tools.pop();
    assert!(grammars.compile(&GrammarSource::AnyOf(vec![GrammarSource::JsonObject, syntax.calls()])).is_ok());
}

fn relax(syntax: &mut ToolSyntax) {
    let are_grammars: Vec<bool> = syntax.lenient_schemas().iter().map(is_grammar).collect();
    syntax.relax(&are_grammars);
}

/// The longest chains of references that fit into a schema, on a test's small stack.
#[test]
fn long_chains_of_references_need_no_stack_of_the_caller() {
    let chain = |links: usize, link: &dyn Fn(Value) -> Value| {
        let entry = |number: usize| {
            let next = format!("#/$defs/{:x}", number + 1);
            let inner =
                if number + 1 == links { json!({"type": "null"}) } else { link(json!({"$ref": next})) };
            (format!("{number:x}"), inner)
        };
        let definitions: Map<String, Value> = (0..links).map(entry).collect();
        json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": definitions})
    };
    let all_of = |inner: Value| json!({"allOf": [inner], "type": "null"});
    let schemas = [
        chain(7_000, &|inner| inner),
        chain(4_500, &|inner| json!({"anyOf": [inner]})),
        chain(3_000, &all_of),
        chain(4_000, &|inner| json!({"items": inner})),
    ];
    for schema in schemas {
        let bytes = schema.to_string().len();
        assert!((150_000..=256 << 10).contains(&bytes), "{bytes} bytes");
        let tool = ToolSpec { name: "a".into(), parameters: Some(schema.clone()), is_strict: false };
        let mut syntax = ToolSyntax { format: ToolFormat::Hermes, tools: vec![tool], is_parallel: true };
        relax(&mut syntax);
        let parameters = syntax.tools[0].parameters.clone();
        let checked = check_schema(&schema);
        let is_too_large = |error: &GrammarError| error.reason.contains("bytes");
        assert!(!checked.as_ref().is_err_and(is_too_large), "it was compiled: {checked:?}");
        let is_kept = checked.is_ok();
        assert_eq!(parameters, Some(if is_kept { schema } else { json!({"type": "object"}) }));
    }
}

/// Whoever may not call writes no call, however much of one is written and however it is spelled.
#[test]
fn forbidden_calls_are_never_written() {
    let processor = processor();
    let blank = processor.encode(" ", false).unwrap()[0];
    for format in ToolFormat::ALL {
        let syntax = syntax(format, true);
        let texts = Arc::new(ForbiddenTexts::new(&syntax.call_texts()));
        let spec = SteeringSpec { answer: AnswerSpec::Without(texts), ..SteeringSpec::default() };
        let plan = spec.plan(&processor).unwrap();
        let begins = match format {
            ToolFormat::Hermes => ["<tool_call>", "</tool_call>", "<tool_call"],
            ToolFormat::LlamaJson => ["{\"name\": \"weather\"", "{\"name\" :\"time\"", "<|python_tag|>"],
            ToolFormat::Pythonic => ["[weather(", "[ options-2(", "<|python_start|>"],
        };
        let mut refused = 0;
        for seed in 0..150 {
            let rng = &mut StdRng::seed_from_u64(seed);
            let mut sampler = Sampler::new(&processor, &plan);
            for _ in 0..4 {
                // Any spelling of what begins a call, as far as it may be written.
                let begin = begins.choose(rng).unwrap();
                let mut rest = begin.as_bytes();
                while !rest.is_empty() {
                    let spells = |id: &u32| {
                        let bytes = processor.token_bytes(*id);
                        !bytes.is_empty() && rest.starts_with(bytes)
                    };
                    let ids: Vec<u32> = (0..processor.vocab_size() as u32).filter(spells).collect();
                    let id = *ids.choose(rng).unwrap();
                    if !sampler.allows(id) {
                        refused += 1;
                        break;
                    }
                    sampler.take(id);
                    rest = &rest[processor.token_bytes(id).len()..];
                }
                assert!(*begin == "<tool_call" || !rest.is_empty(), "{}", sampler.text());
                if rng.random_bool(0.5) {
                    sampler.take(blank);
                }
            }
            let text = sampler.text();
            assert_eq!(read(&syntax, &text), (text.clone(), Vec::new()));
            assert!(format.markers().iter().all(|marker| !text.contains(marker)), "{text}");
        }
        assert!(refused > 300, "{format:?}: {refused}");
        // What is no call is free.
        let mut sampler = Sampler::new(&processor, &plan);
        sampler.write("a < b [c](d) {\"name\": \"other\"} weather(x)");
    }
}

/// What JSON can say and a call in Python cannot is relaxed; the rest is read back.
#[test]
fn calls_in_python_are_relaxed_where_they_must_be() {
    let processor = processor();
    let empty = json!({"type": "object"});
    let rows = [
        (json!({"properties": {"a": {"type": "null"}, "first name": {}}, "required": ["a"]}), true),
        (json!({"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "null"}}}), true),
        (json!({"properties": {"a": false, "b": {"type": "null"}}, "required": ["b"]}), true),
        (json!({"properties": {}, "additionalProperties": false}), true),
        (json!({"additionalProperties": {"type": "boolean"}}), true),
        (json!({"properties": {"first name": {}}, "required": ["first name"]}), false),
        (json!({"properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}}), false),
        (json!({"properties": {"a": false}, "required": ["a"]}), false),
        (json!({"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}), false),
        (json!({"$ref": "#/$defs/o", "$defs": {"o": {"type": "object"}}}), false),
        (json!({"type": "object", "minProperties": 1}), false),
    ];
    for (parameters, is_kept) in rows {
        let tool = ToolSpec { name: "f".into(), parameters: Some(parameters.clone()), is_strict: false };
        let mut syntax = ToolSyntax { format: ToolFormat::Pythonic, tools: vec![tool], is_parallel: false };
        relax(&mut syntax);
        let relaxed = syntax.tools[0].parameters.clone().unwrap();
        assert_eq!(relaxed, if is_kept { parameters.clone() } else { empty.clone() });
        let grammar = processor.grammars().unwrap().compile(&syntax.calls());
        let grammar = grammar.unwrap_or_else(|error| panic!("{parameters}: {error}"));
        if !is_kept {
            continue;
        }
        let texts = answers(&processor, &AnswerSpec::Grammar(grammar), "", 20);
        assert!(texts.len() >= 5, "{parameters}: {} of 20 ended", texts.len());
        for text in texts {
            let (content, calls) = read(&syntax, &text);
            assert_eq!((content.as_str(), calls.len()), ("", 1), "{parameters}: {text}");
            let value: Value = serde_json::from_str(&calls[0].1).unwrap();
            let validator = jsonschema::validator_for(&relaxed).unwrap();
            assert!(validator.is_valid(&value), "{value} against {relaxed} in {text}");
        }
    }
    // Strict, the same is an error rather than less than what was asked for.
    let parameters = Some(json!({"type": "object", "minProperties": 1}));
    let tools = vec![ToolSpec { name: "f".into(), parameters, is_strict: true }];
    let syntax = ToolSyntax { format: ToolFormat::Pythonic, tools, is_parallel: false };
    assert!(processor.grammars().unwrap().compile(&syntax.calls()).is_err());
}
