//! Grammars, triggers and preludes as the engine sees them: what is allowed, what ends an answer, and
//! which sources are refused.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/sampler.rs"]
mod sampler;
mod support;

use std::sync::{Arc, LazyLock};

use locket_engine::steering::{Guide, SharedPlan};
use locket_model::load::GgufVocabulary;
use locket_processor::{
    Processor,
    steering::{
        AnswerSpec, Ending, GrammarError, GrammarSource, Prelude, PreludePlan, SteeringSpec, Trigger,
        check_schema,
    },
};
use rand::{SeedableRng as _, rngs::StdRng};
use sampler::Sampler;
use serde_json::{Value, json};

/// Bytes, a few merges, the control token `<call>`, and more rows than tokens.
static PROCESSOR: LazyLock<Arc<Processor>> = LazyLock::new(|| {
    let mut vocabulary = support::byte_level_vocabulary("llama-bpe");
    vocabulary.tokens.push("<call>".into());
    vocabulary.token_types.push(3);
    let rows = vocabulary.tokens.len() + 7;
    let source = locket_model::load::TokenizerSource::Gguf(vocabulary);
    Arc::new(support::load(&source, rows, None).unwrap())
});

const END: u32 = 2;

fn compile(source: &GrammarSource) -> Result<SharedPlan, GrammarError> {
    let grammar = PROCESSOR.grammars().unwrap().compile(source)?;
    let spec = SteeringSpec { answer: AnswerSpec::Grammar(grammar), thinking: None };
    Ok(spec.plan(&PROCESSOR).unwrap())
}

fn plan(source: &GrammarSource) -> SharedPlan {
    compile(source).unwrap()
}

/// Whether a text can be written byte by byte and the answer may end there.
fn matches(source: &GrammarSource, text: &str) -> bool {
    let mut sampler = Sampler::new(&PROCESSOR, &plan(source));
    for byte in text.bytes() {
        // The bytes follow `<unk>`, `<s>` and `</s>`.
        let id = u32::from(byte) + 3;
        if !sampler.allows(id) {
            return false;
        }
        sampler.take(id);
    }
    sampler.allows(END) || *sampler.guide() == Guide::Complete
}

fn text(text: &str) -> GrammarSource {
    GrammarSource::Text(text.into())
}

#[test]
fn choices_are_exact() {
    let source =
        GrammarSource::Choice(["yes", "no", "not sure", "ja \"genau\" 😀\n"].map(String::from).to_vec());
    for good in ["yes", "no", "not sure", "ja \"genau\" 😀\n"] {
        assert!(matches(&source, good), "{good}");
    }
    for bad in ["", "y", "not", "yes ", "maybe"] {
        assert!(!matches(&source, bad), "{bad}");
    }
    // Where nothing can follow, the answer is complete without an end token.
    let mut sampler = Sampler::new(&PROCESSOR, &plan(&source));
    sampler.write("yes");
    assert_eq!(*sampler.guide(), Guide::Complete);
    // Where the model may go on or end, the end token is among the allowed.
    let mut sampler = Sampler::new(&PROCESSOR, &plan(&source));
    sampler.write("no");
    assert!(sampler.allows(END) && sampler.allows(u32::from(b't') + 3));
    sampler.take(END);
    assert_eq!(*sampler.guide(), Guide::Complete);
}

#[test]
fn regular_expressions_match_the_whole_answer() {
    let regex = |text: &str| GrammarSource::Regex(text.into());
    for (pattern, good, bad) in [
        ("[0-9]{2}", "42", "423"),
        ("^a|b$", "b", "ab"),
        (r"^\$\d+$", "$5", "5"),
        (r"x\$", "x$", "x"),
        ("a/b", "a/b", "a"),
        (r"(?i)ja+", "JAaa", "j"),
        (".*\n", "äö\n", "ä"),
        ("^$", "", "a"),
    ] {
        assert!(matches(&regex(pattern), good), "{pattern} {good:?}");
        assert!(!matches(&regex(pattern), bad), "{pattern} {bad:?}");
    }
}

#[test]
fn grammars_of_both_kinds() {
    let lark = GrammarSource::Lark("start: sum\nsum: NUMBER (\"+\" NUMBER)*\nNUMBER: /[0-9]+/\n".into());
    let gbnf = GrammarSource::Lark(
        "# a sum\nroot ::= term-A (\"+\" term-A)*\nterm-A ::= [0-9]+ |\n  \"[\" [^\\]/]{1,2} \"]\"\n".into(),
    );
    for good in ["1", "12+3+4"] {
        assert!(matches(&lark, good) && matches(&gbnf, good), "{good}");
    }
    for bad in ["", "1+", "+1", "1 + 2"] {
        assert!(!matches(&lark, bad) && !matches(&gbnf, bad), "{bad}");
    }
    assert!(matches(&gbnf, "1+[ä]+[x:]") && !matches(&gbnf, "[/]"));
}

#[test]
fn json_has_bounded_white_space() {
    let object = GrammarSource::JsonObject;
    for good in ["{}", "{\"a\": 1}", "{\n  \"a\":[1, {\"b\":null}]\n}", "{\"a\":\"é\\n\\u001f\"}"] {
        assert!(matches(&object, good), "{good}");
    }
    for bad in ["[]", "1", "{} ", "{}{}", " {}", "{  }", "{\n\n}", "{\"a\":1,}", "{\"a\":\"\n\"}"] {
        assert!(!matches(&object, bad), "{bad:?}");
    }
    let mut sampler = Sampler::new(&PROCESSOR, &plan(&object));
    sampler.write("{}");
    assert_eq!(*sampler.guide(), Guide::Complete);
}

#[test]
fn only_text_tokens_and_ends_are_ever_allowed() {
    // Any text at all, so everything that may be allowed is.
    let anything = plan(&GrammarSource::Regex("(?s:.*)".into()));
    let sampler = Sampler::new(&PROCESSOR, &anything);
    let choices = sampler.choices();
    for id in 0..PROCESSOR.vocab_size() as u32 {
        let is_text = !PROCESSOR.is_special(id) && !PROCESSOR.token_bytes(id).is_empty();
        // Bytes that begin no character, or continue one, are no beginning of a text.
        let begins =
            PROCESSOR.token_bytes(id).first().is_some_and(|byte| matches!(byte, ..0x80 | 0xC2..=0xF4));
        assert_eq!(choices.contains(&id), is_text && begins || id == END, "{id}");
    }
}

#[test]
fn sentencepiece_tokens_spell_too() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "▁\"a", "\":", "{", "}", "1", "▁1", "a"].map(String::from));
    let mut token_types = vec![1; tokens.len()];
    token_types[..3].copy_from_slice(&[2, 3, 3]);
    token_types[3..259].fill(6);
    let vocabulary = GgufVocabulary {
        model: "llama".into(),
        scores: (0..tokens.len()).map(|id| -(id as f32)).collect(),
        tokens,
        token_types,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        unknown_token_id: Some(0),
        ..GgufVocabulary::default()
    };
    let processor = Arc::new(support::processor(vocabulary, None));
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "enum": [1]}},
                        "required": ["a"], "additionalProperties": false});
    let grammar = processor.grammars().unwrap().compile(&GrammarSource::JsonSchema(schema)).unwrap();
    let spec = SteeringSpec { answer: AnswerSpec::Grammar(grammar), thinking: None };
    let plan = spec.plan(&processor).unwrap();
    let id = |token: &str| (0..).find(|id| processor.token_text(*id) == token).unwrap();
    let mut sampler = Sampler::new(&processor, &plan);
    // A piece and the byte that spells it are both allowed.
    assert!(sampler.allows(id("{")) && sampler.allows(u32::from(b'{') + 3));
    for token in ["{", " \"a", "\":", " 1", "}"] {
        sampler.take(id(token));
    }
    assert_eq!((sampler.text().as_str(), sampler.guide()), ("{ \"a\": 1}", &Guide::Complete));
    for seed in 0..50 {
        let text = Sampler::new(&processor, &plan).run(&mut StdRng::seed_from_u64(seed), 100).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json!({"a": 1}));
    }
}

#[test]
fn compositions() {
    let schema =
        GrammarSource::JsonSchema(json!({"type": "object", "properties": {"x": {"type": "integer"}},
        "required": ["x"], "additionalProperties": false}));
    let call = GrammarSource::Sequence(vec![text("<c>"), schema.clone(), text("</c>")]);
    let either = GrammarSource::AnyOf(vec![schema, GrammarSource::OneOrMore(Box::new(call))]);
    for good in ["{\"x\":1}", "<c>{\"x\": 1}</c>", "<c>{\"x\":1}</c><c>{\"x\":2}</c>"] {
        assert!(matches(&either, good), "{good}");
    }
    for bad in ["", "<c>", "{\"x\":1}<c>{\"x\":1}</c>", "<c>{}</c>"] {
        assert!(!matches(&either, bad), "{bad}");
    }
    // A marker is the control token of that text, where there is one.
    let marked = GrammarSource::Sequence(vec![GrammarSource::Marker("<call>".into()), text("x")]);
    let mut sampler = Sampler::new(&PROCESSOR, &plan(&marked));
    let control = (0..).find(|id| PROCESSOR.token_text(*id) == "<call>").unwrap();
    assert_eq!(sampler.choices(), [control]);
    sampler.take(control);
    sampler.write("x");
    assert_eq!(*sampler.guide(), Guide::Complete);
    assert!(matches(&GrammarSource::Marker("<none>".into()), "<none>"));
}

/// What cannot be a grammar is refused, with the path into a schema.
#[test]
fn refusals_name_the_place() {
    let within =
        |inner: Value| json!({"type": "object", "properties": {"a": {"type": "array", "items": inner}}});
    let deep = "(".repeat(101);
    for (schema, path) in [
        (within(json!({"not": {}})), ".properties.a.items.not"),
        (within(json!({"type": "array", "uniqueItems": true})), ".properties.a.items.uniqueItems"),
        (within(json!({"type": "strange"})), ".properties.a.items"),
        (within(json!({"type": "string", "format": "color"})), ".properties.a.items"),
        (within(json!({"type": "string", "pattern": "("})), ".properties.a.items"),
        (within(json!({"$ref": "#/$defs/absent"})), ".properties.a.items"),
        (within(json!({"$ref": "https://example.com/schema"})), ".properties.a.items"),
        (within(json!({"anyOf": [{"type": "null"}, {"type": 3}]})), ".properties.a.items.anyOf[1]"),
        (json!({"$defs": {"x": {"if": {}}}, "$ref": "#/$defs/x"}), ".$defs.x.if"),
        (
            json!({"patternProperties": {"^a": {}, (deep.as_str()): {}}}),
            &*format!(".patternProperties.{deep}"),
        ),
        (json!({"patternProperties": {"^a": {}, "b": {"not": {}}}}), ".patternProperties.b.not"),
        (json!({"$defs": {"x": {"type": "y"}}, "$ref": "#/$defs/x"}), ".$defs.x"),
        (json!({"type": "integer", "minimum": 5, "maximum": 4}), ""),
        (json!(false), ""),
        (json!({"type": "object", "required": 3}), ""),
    ] {
        let compiled = compile(&GrammarSource::JsonSchema(schema.clone()));
        assert!(compiled.is_err(), "{schema}");
        let error = compiled.unwrap_err();
        assert_eq!(error.path, path, "{schema}: {error}");
        assert_eq!(check_schema(&schema), Err(error.clone()), "{schema}");
        assert!(!error.reason.is_empty() && error.reason.len() < 2000, "{error}");
    }
    for source in [
        GrammarSource::Regex("(".into()),
        GrammarSource::Regex("(?=a)b".into()),
        GrammarSource::Choice(vec![]),
        GrammarSource::Lark("sum: \"a\"".into()),
        GrammarSource::Lark("start: (".into()),
        GrammarSource::Lark("rule ::= \"a\"".into()),
        GrammarSource::Lark("root ::= \"a".into()),
        GrammarSource::Lark("start: @elsewhere".into()),
        GrammarSource::AnyOf(vec![]),
    ] {
        assert!(compile(&source).is_err(), "{source:?}");
    }
}

/// Annotations and keywords that say nothing are no reason to refuse.
#[test]
fn annotations_are_ignored() {
    let schema = json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T",
        "type": "object", "deprecated": true, "x-vendor": 1, "discriminator": {"propertyName": "a"},
        "properties": {"a": {"type": "array", "items": {"const": 1}, "uniqueItems": false, "default": [],
                             "maxItems": 1, "x-guidance": {"lenient": true}}},
        "required": ["a"], "additionalProperties": false});
    assert!(matches(&GrammarSource::JsonSchema(schema), "{\"a\":[1]}"));
}

/// `oneOf` is exact where no value can be of two branches, and refused where it might be.
#[test]
fn one_of_needs_branches_that_exclude_each_other() {
    let branch = |kind: &str| {
        json!({"type": "object", "properties": {"kind": {"const": kind}, "n": {"type": "integer"}},
               "required": ["kind", "n"], "additionalProperties": false})
    };
    let union = GrammarSource::JsonSchema(json!({"oneOf": [branch("a"), branch("b")]}));
    assert!(matches(&union, "{\"kind\":\"b\",\"n\":1}") && !matches(&union, "{\"kind\":\"c\",\"n\":1}"));
    let overlap = json!({"properties": {"x": {"oneOf": [{"type": "integer"}, {"minimum": 1}]}}});
    assert_eq!(compile(&GrammarSource::JsonSchema(overlap)).unwrap_err().path, ".properties.x");
}

#[test]
fn times_have_sixty_seconds() {
    let time = |rest: Value| {
        let mut schema = json!({"type": "string", "format": "time"});
        schema.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        GrammarSource::JsonSchema(schema)
    };
    for source in
        [time(json!({})), time(json!({"pattern": "Z$"})), time(json!({"pattern": "Z", "allOf": [{}]}))]
    {
        assert!(matches(&source, "\"12:04:59Z\""), "{source:?}");
        assert!(!matches(&source, "\"12:04:60Z\""), "{source:?}");
    }
    let moment = GrammarSource::JsonSchema(json!({"format": "date-time", "type": "string"}));
    assert!(
        matches(&moment, "\"2026-01-31T00:00:00+01:00\"") && !matches(&moment, "\"2026-01-31T00:00:60Z\"")
    );
}

/// Sources made to exhaust a compiler end in an error or in a grammar, and neither in a crash.
#[test]
fn hostile_sources_end() {
    let mut deep = json!({"type": "integer"});
    for _ in 0..200 {
        deep = json!({"type": "array", "items": deep});
    }
    let wide: Vec<Value> =
        (0..40).map(|i| json!({"anyOf": [{"multipleOf": i + 2}, {"minimum": i}]})).collect();
    let rules: String = (0..4000).map(|i| format!("r{i}: r{} \"a\"\n", i + 1)).collect();
    let definitions: serde_json::Map<String, Value> = (0..2000)
        .map(|i| (format!("d{i}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", (i + 1) % 2000)}]})))
        .collect();
    let sources = [
        GrammarSource::JsonSchema(deep),
        GrammarSource::JsonSchema(json!({ "allOf": wide })),
        GrammarSource::JsonSchema(json!({"$defs": definitions, "$ref": "#/$defs/d0"})),
        GrammarSource::JsonSchema(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        GrammarSource::JsonSchema(
            json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000_000}),
        ),
        GrammarSource::JsonSchema(json!({"type": "array", "minItems": 1_000_000_000})),
        GrammarSource::JsonSchema(json!({"type": "string", "pattern": "(a{1,1000}){1,1000}".repeat(20)})),
        GrammarSource::JsonSchema(json!({"enum": (0..20_000).collect::<Vec<i32>>()})),
        GrammarSource::Regex("(".repeat(16_000)),
        GrammarSource::Regex("a?".repeat(4000) + &"a".repeat(4000)),
        GrammarSource::Regex("((a|b|ab)*c){500}.{1000}".into()),
        GrammarSource::Regex("x".repeat(100_000)),
        GrammarSource::Choice((0..5000).map(|i| i.to_string()).collect()),
        GrammarSource::Choice(vec!["x".repeat(300_000)]),
        GrammarSource::Lark(format!("start: {}", "(".repeat(60_000))),
        GrammarSource::Lark(format!("start: r0\n{rules}r4000: \"b\"\n")),
        GrammarSource::Lark("start: start start | \"a\"?".into()),
    ];
    for source in sources {
        let Ok(plan) = compile(&source) else { continue };
        let mut rng = StdRng::seed_from_u64(1);
        let mut sampler = Sampler::new(&PROCESSOR, &plan);
        for _ in 0..30 {
            use rand::seq::IndexedRandom as _;
            if matches!(sampler.guide(), Guide::Complete | Guide::Failed(_)) {
                break;
            }
            let id = *sampler.choices().choose(&mut rng).unwrap();
            sampler.take(id);
        }
    }
}

fn trigger(markers: &[&str], grammar: &GrammarSource, change: impl FnOnce(&mut Trigger)) -> SharedPlan {
    let mut trigger = Trigger {
        markers: markers.iter().map(|marker| (*marker).into()).collect(),
        grammar_has_marker: false,
        grammar: PROCESSOR.grammars().unwrap().compile(grammar).unwrap(),
        max_calls: None,
    };
    change(&mut trigger);
    let spec = SteeringSpec { answer: AnswerSpec::Trigger(Arc::new(trigger)), thinking: None };
    spec.plan(&PROCESSOR).unwrap()
}

#[test]
fn a_marker_starts_the_grammar_wherever_tokens_end() {
    let body = GrammarSource::Sequence(vec![GrammarSource::Regex("[0-9]+".into()), text(";")]);
    let plan = trigger(&["<tool>", "hello:", "<call>"], &body, |_| {});
    for opening in ["text <tool>", "<<tool>", "he hello:", "say  hello:", "a<call>"] {
        let mut sampler = Sampler::new(&PROCESSOR, &plan);
        sampler.write(opening);
        assert_eq!(*sampler.guide(), Guide::Allowed, "{opening}");
        assert!(sampler.allows(u32::from(b'7') + 3) && !sampler.allows(u32::from(b';') + 3));
        sampler.write("12;");
        // Free again, and waiting again.
        assert_eq!(*sampler.guide(), Guide::Free, "{opening}");
        sampler.write(" and <tool>");
        assert_eq!(*sampler.guide(), Guide::Allowed, "{opening}");
    }
    let mut sampler = Sampler::new(&PROCESSOR, &plan);
    sampler.write("no <tool and hello; nor <tol>");
    assert_eq!(*sampler.guide(), Guide::Free);
}

#[test]
fn what_a_token_says_after_the_marker_counts() {
    let after = |first: &str| {
        let body = GrammarSource::Sequence(vec![text(first), GrammarSource::Regex("[0-9]".into())]);
        // The token `hello` ends the marker and goes on.
        let mut sampler = Sampler::new(&PROCESSOR, &trigger(&["> he"], &body, |_| {}));
        sampler.write("> hello");
        sampler.guide().clone()
    };
    assert_eq!(after("llo"), Guide::Allowed);
    // It is no call's beginning, so it was no call.
    assert_eq!(after("x"), Guide::Free);
}

#[test]
fn calls_are_counted() {
    let body = text("x;");
    let plan = trigger(&["<tool>"], &body, |trigger| trigger.max_calls = Some(2));
    let mut sampler = Sampler::new(&PROCESSOR, &plan);
    sampler.write("<tool>x; <tool>x;");
    assert_eq!(*sampler.guide(), Guide::Complete);
}

#[test]
fn a_grammar_may_begin_with_its_marker() {
    let body = GrammarSource::Sequence(vec![text("{\"name\""), GrammarSource::Regex("[0-9]".into())]);
    let plan = trigger(&["{\"na", "<tool>"], &body, |trigger| {
        trigger.grammar_has_marker = true;
        trigger.max_calls = Some(1);
    });
    for before in [" \n", "x ", "{{\"n"] {
        let mut sampler = Sampler::new(&PROCESSOR, &plan);
        sampler.write(before);
        assert_eq!(*sampler.guide(), Guide::Free);
        sampler.write("{\"na");
        assert_eq!(*sampler.guide(), Guide::Allowed);
        sampler.write("me\"5");
        assert_eq!(*sampler.guide(), Guide::Complete);
    }
}

/// A thought that `.` ends.
#[derive(Debug, Clone)]
struct UntilDot;

impl PreludePlan for UntilDot {
    fn start(&self, choice: u32) -> Option<Box<dyn Prelude>> {
        (choice == 0).then(|| Box::new(self.clone()) as Box<dyn Prelude>)
    }
}

impl Prelude for UntilDot {
    fn guide(&self) -> Guide {
        Guide::Free
    }

    fn opener(&self) -> Option<u32> {
        None
    }

    fn open(&mut self) {}

    fn advance(&mut self, _id: u32, bytes: &[u8]) -> Option<Vec<u8>> {
        let end = bytes.iter().position(|byte| *byte == b'.')?;
        Some(bytes[end + 1..].to_vec())
    }
}

#[test]
fn the_grammar_waits_for_the_answer() {
    let grammar = PROCESSOR.grammars().unwrap().compile(&text("ok")).unwrap();
    let answer = AnswerSpec::Grammar(grammar);
    let spec = SteeringSpec { thinking: Some(Arc::new(UntilDot)), answer };
    let plan = spec.plan(&PROCESSOR).unwrap();
    let mut sampler = Sampler::new(&PROCESSOR, &plan);
    assert_eq!(*sampler.guide(), Guide::Free);
    sampler.write("hm ok.");
    assert_eq!(sampler.choices(), [u32::from(b'o') + 3]);
    sampler.write("ok");
    assert_eq!(*sampler.guide(), Guide::Complete);
    // Nothing to steer, no plan.
    assert!(SteeringSpec::default().plan(&PROCESSOR).is_none());
}

/// Ends with the first token; the answer has begun with these bytes.
#[derive(Debug, Clone)]
struct Begun(&'static str);

impl PreludePlan for Begun {
    fn start(&self, _: u32) -> Option<Box<dyn Prelude>> {
        Some(Box::new(self.clone()))
    }
}

impl Prelude for Begun {
    fn guide(&self) -> Guide {
        Guide::Free
    }

    fn opener(&self) -> Option<u32> {
        None
    }

    fn open(&mut self) {}

    /// `he` ends it as well.
    fn endings(&self) -> Vec<Ending> {
        let may_have_blanks = self.0.is_empty();
        vec![Ending { rest: b"he".to_vec(), may_have_blanks }]
    }

    fn advance(&mut self, _id: u32, _bytes: &[u8]) -> Option<Vec<u8>> {
        Some(self.0.as_bytes().to_vec())
    }
}

fn begun(source: &GrammarSource, first: &'static str) -> SharedPlan {
    let answer = AnswerSpec::Grammar(PROCESSOR.grammars().unwrap().compile(source).unwrap());
    SteeringSpec { thinking: Some(Arc::new(Begun(first))), answer }.plan(&PROCESSOR).unwrap()
}

/// What came with the token that ended the thought is matched: as text, or as the control token that the
/// grammar has for it. What the grammar cannot begin with was markup.
#[test]
fn an_answer_may_have_begun() {
    let call = GrammarSource::Sequence(vec![GrammarSource::Marker("<call>".into()), text("x;")]);
    let spelled = GrammarSource::Sequence(vec![text("hello"), text("x;")]);
    for (source, first, rest) in [
        (&spelled, "", "hellox;"),
        (&spelled, "he", "llox;"),
        (
            &spelled, "
 he", "llox;",
        ),
        (&call, "<call>", "x;"),
        (&call, "<call>x", ";"),
        (&spelled, "<call>", "hellox;"),
        (&call, "no", "<call>x;"),
    ] {
        let mut sampler = Sampler::new(&PROCESSOR, &begun(source, first));
        sampler.write(".");
        assert_eq!(*sampler.guide(), Guide::Allowed, "{first}");
        sampler.write(rest);
        assert_eq!(*sampler.guide(), Guide::Complete, "{first}");
    }
}

/// The grammar has no say in what a token has behind the end of a thought, so there is nothing.
#[test]
fn no_token_ends_the_thought_and_goes_on() {
    let sampler = Sampler::new(&PROCESSOR, &begun(&text("ok"), ""));
    let choices = sampler.choices();
    let excluded = (0..PROCESSOR.vocab_size() as u32).filter(|id| !choices.contains(id));
    let excluded: Vec<_> = excluded.map(|id| PROCESSOR.token_text(id).into_owned()).collect();
    assert_eq!(excluded, ["hell", "hello"]);
    // Without a grammar nothing is masked.
    let spec = SteeringSpec { thinking: Some(Arc::new(Begun(""))), answer: AnswerSpec::Free };
    assert_eq!(*Sampler::new(&PROCESSOR, &spec.plan(&PROCESSOR).unwrap()).guide(), Guide::Free);
}
