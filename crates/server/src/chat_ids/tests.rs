//! With the default model's tokenizer: one whose texts have many tokenisations.

use std::sync::{Arc, LazyLock};

use locket_model::{load::Checkpoint, testing::default_model};
use proptest::prelude::*;

use super::*;
use crate::turns::TurnRecorder;

static CHECKPOINT: LazyLock<Checkpoint> =
    LazyLock::new(|| Checkpoint::open(&default_model()).expect("the default model"));
static PROCESSOR: LazyLock<Processor> =
    LazyLock::new(|| Processor::load(&CHECKPOINT).expect("its tokenizer"));

/// The default tokenizer with another template.
fn with_template(template: &str) -> Processor {
    let checkpoint = &*CHECKPOINT;
    Processor::new(&checkpoint.config, &checkpoint.tokenizer, Some(template)).expect("a template")
}

fn chat(messages: &[(&str, &str)]) -> ChatPrompt {
    let messages = messages.iter().map(|(role, content)| json!({"role": role, "content": content}));
    ChatPrompt { messages: messages.collect(), add_generation_prompt: true, ..ChatPrompt::default() }
}

const ALL: ChatWishes<'static> = ChatWishes {
    turns: None,
    most_pinned: 1000,
    wants_snapshot: true,
    add_special_tokens: false,
    reasoning: None,
};

/// A text in tokens as no tokenizer would cut it: each character by itself.
fn shredded(text: &str) -> Vec<u32> {
    let characters = text.chars().map(|character| PROCESSOR.encode(&character.to_string(), false));
    characters.flat_map(|ids| ids.expect("every byte has a token")).collect()
}

/// What a client sends and gets, turn by turn, over one memory.
struct Conversation<'a> {
    processor: &'a Processor,
    memory: Arc<TurnMemory>,
    salt: Vec<u8>,
}

impl<'a> Conversation<'a> {
    fn new(processor: &'a Processor) -> Self {
        Self { processor, memory: Arc::new(TurnMemory::new(1 << 20)), salt: Vec::new() }
    }

    fn prompt(&self, chat: &ChatPrompt) -> PromptIds {
        let wishes = ChatWishes { turns: Some((&self.memory, &self.salt)), ..ALL };
        encode(self.processor, chat.clone(), wishes).expect("a prompt")
    }

    /// The model answers the prompt.
    fn answer(&self, prompt: &PromptIds, text: &str, ids: &[u32]) {
        let prefix = prompt.turn.clone().expect("turns are remembered");
        let mut recorder = TurnRecorder::new(Arc::clone(&self.memory), prefix);
        recorder.push(text, ids.iter().copied());
        recorder.finish(self.processor);
    }
}

fn plain(processor: &Processor, chat: &ChatPrompt) -> Vec<u32> {
    processor.encode(&processor.render_chat(chat).expect("rendered"), false).expect("encoded")
}

#[test]
fn a_returned_answer_becomes_the_tokens_that_were_sampled() {
    let talk = Conversation::new(&PROCESSOR);
    let answer = "The capital of France is Paris.";
    let (first, sampled) = (chat(&[("user", "Capital of France?")]), shredded(answer));
    let prompt = talk.prompt(&first);
    assert_eq!(prompt.ids, plain(&PROCESSOR, &first));
    talk.answer(&prompt, answer, &sampled);

    let second = chat(&[("user", "Capital of France?"), ("assistant", answer), ("user", "And of Italy?")]);
    let next = talk.prompt(&second);
    assert!(next.ids.starts_with(&[prompt.ids.as_slice(), &sampled].concat()));
    assert_ne!(next.ids, plain(&PROCESSOR, &second));
    let text = PROCESSOR.render_chat(&second).expect("rendered");
    assert_eq!(PROCESSOR.decode(&next.ids, false), text);
    // Control tokens between the pieces are still recognised.
    let ends = |ids: &[u32]| ids.iter().filter(|id| PROCESSOR.is_special(**id)).count();
    assert_eq!(ends(&next.ids), ends(&plain(&PROCESSOR, &second)));

    // Text parts are the same text.
    let mut parts = second;
    parts.messages[1]["content"] = json!([{"type": "text", "text": answer}]);
    assert_eq!(talk.prompt(&parts).ids, next.ids);
}

/// The default template knows no tools, so calls are written out, as the grammar wrote them: what comes
/// back is what was said.
#[test]
fn a_returned_call_becomes_the_tokens_that_were_sampled() {
    let talk = Conversation::new(&PROCESSOR);
    let arguments = "{\"city\": \"Oslo\"}";
    let said =
        format!("Wait.\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {arguments}}}\n</tool_call>");
    let tools = Some(vec![json!({"type": "function", "function": {"name": "weather"}})]);
    let first = ChatPrompt { tools, ..chat(&[("user", "Weather?")]) };
    let (prompt, sampled) = (talk.prompt(&first), shredded(&said));
    talk.answer(&prompt, &said, &sampled);

    let call =
        json!({"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}});
    let mut second = first;
    second.messages.extend([
        json!({"role": "assistant", "content": "Wait.\n", "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": "a", "content": "Rain."}),
    ]);
    let next = talk.prompt(&second);
    assert!(next.ids.starts_with(&[prompt.ids.as_slice(), &sampled].concat()));
}

#[test]
fn another_conversation_tenant_or_text_is_tokenised() {
    let mut talk = Conversation::new(&PROCESSOR);
    let prompt = talk.prompt(&chat(&[("user", "Q")]));
    talk.answer(&prompt, "Yes, of course.", &shredded("Yes, of course."));
    let is_plain = |talk: &Conversation<'_>, question: &str, answer: &str| {
        let chat = chat(&[("user", question), ("assistant", answer), ("user", "Why?")]);
        talk.prompt(&chat).ids == plain(&PROCESSOR, &chat)
    };
    assert!(!is_plain(&talk, "Q", "Yes, of course."));
    assert!(is_plain(&talk, "Q!", "Yes, of course."));
    assert!(is_plain(&talk, "Q", "Yes, of course"));
    assert!(is_plain(&talk, "Q", "Yes, of course. "));
    talk.salt = b"tenant".to_vec();
    assert!(is_plain(&talk, "Q", "Yes, of course."));
}

/// The same text may stand in other messages too: only the assistant's is the turn.
#[test]
fn an_answer_that_was_said_before_is_found_in_its_place() {
    let talk = Conversation::new(&PROCESSOR);
    let first = [("user", "yes or no? say yes"), ("assistant", "yes"), ("user", "yes?")];
    let prompt = talk.prompt(&chat(&first));
    talk.answer(&prompt, "yes", &shredded("yes"));
    let second = [first.as_slice(), &[("assistant", "yes"), ("user", "yes")]].concat();
    let next = talk.prompt(&chat(&second));
    assert!(next.ids.starts_with(&[prompt.ids.as_slice(), &shredded("yes")].concat()));
}

/// A template that trims messages, one that changes them, and one that depends on what they say.
#[test]
fn templates_that_change_messages() {
    let line = |content: &str| {
        format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ {content} }}}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
        )
    };
    let is_spliced = |template: &str, answer: &str| {
        let processor = with_template(template);
        let talk = Conversation::new(&processor);
        talk.answer(&talk.prompt(&chat(&[("user", "Q")])), answer, &shredded(answer));
        let chat = chat(&[("user", "Q"), ("assistant", answer), ("user", "Why?")]);
        let ids = talk.prompt(&chat).ids;
        assert_eq!(processor.decode(&ids, false), processor.render_chat(&chat).expect("rendered"));
        ids != plain(&processor, &chat)
    };
    assert!(is_spliced(&line("m.content | trim"), "It is so."));
    assert!(!is_spliced(&line("m.content | trim"), " It is so."));
    assert!(!is_spliced(&line("m.content | upper"), "It is so."));
    assert!(!is_spliced(&line("m.content.split('so') | last"), "It is so, yes."));
    assert!(is_spliced(&line("m.content"), " It is so.\n"));
}

#[test]
fn marks_are_found_only_if_all_the_rest_is_the_same() {
    let mark = |text: &str| (format!("<{text}>"), text.to_owned());
    let find = |marked: &str, text: &str, marks: &[(String, String)]| {
        find_marks(marked, text, marks.iter().map(|(mark, original)| (mark.clone(), original.as_str())))
    };
    let marks = [mark("a"), mark(" b ")];
    assert_eq!(find("x<a>y< b >z", "xay b z", &marks), Some(vec![1..2, 3..6]));
    let trimmed = find("x<a>y< b >z", "xaybz", &marks).expect("the same text");
    assert_eq!((trimmed.len(), trimmed[0].clone()), (1, 1..2));
    assert_eq!(find("x<a>y< b >z", "xay b !", &marks), None);
    assert_eq!(find("x<a>y", "xay", &marks), None, "a message that is not printed");
    assert_eq!(find("x<a>y< b >z", "xcy b z", &marks), None);
    let none = std::iter::empty::<(String, &str)>();
    assert_eq!(find_marks("same", "same", none), Some(Vec::new()));
}

#[test]
fn instructions_are_counted_and_the_header_is_found() {
    let own = |messages: &[(&str, &str)]| encode(&PROCESSOR, chat(messages), ALL).expect("a prompt");
    let text = |ids: &[u32]| PROCESSOR.decode(ids, false);
    let prompt = own(&[("system", "Be brief."), ("user", "Hi")]);
    assert_eq!(
        text(&prompt.ids[..prompt.pinned as usize]),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    );
    let at = prompt.snapshot_at.expect("a header") as usize;
    assert!(text(&prompt.ids[..at]).ends_with("user\nHi<|im_end|>\n"));
    assert_eq!(text(&prompt.ids[at..]), "<|im_start|>assistant\n");
    // Whatever is asked, the instructions are the same.
    assert_eq!(own(&[("system", "Be brief."), ("user", "\nWhat?")]).pinned, prompt.pinned);
    // The template has instructions of its own.
    let prompt = own(&[("user", "Hi")]);
    assert!(text(&prompt.ids[..prompt.pinned as usize]).contains("named SmolLM"));
    // Counting ends where the operator's limit is.
    let wishes = ChatWishes { most_pinned: 7, ..ALL };
    assert_eq!(encode(&PROCESSOR, chat(&[("user", "Hi")]), wishes).expect("a prompt").pinned, 7);
    // An open end has no header.
    let open = ChatPrompt { add_generation_prompt: false, ..chat(&[("user", "Hi")]) };
    let prompt = encode(&PROCESSOR, open, ALL).expect("a prompt");
    assert_eq!((prompt.snapshot_at, prompt.turn.is_some()), (None, false));
}

/// A template that refuses a conversation of one user message, and one without a header.
#[test]
fn templates_that_cannot_be_probed() {
    let strict = with_template(
        "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}",
    );
    let chat = chat(&[("user", "a"), ("assistant", "b"), ("user", "c")]);
    let prompt = encode(&strict, chat, ALL).expect("a prompt");
    assert_eq!((prompt.pinned, prompt.snapshot_at), (0, Some(prompt.ids.len() as u32)));
}

#[test]
fn truncation_moves_what_was_found() {
    let mut prompt = PromptIds { pinned: 4, snapshot_at: Some(6), ..PromptIds::from(vec![0; 10]) };
    prompt.truncate_front(20);
    assert_eq!((prompt.ids.len(), prompt.pinned, prompt.snapshot_at), (10, 4, Some(6)));
    prompt.truncate_front(7);
    assert_eq!((prompt.ids.len(), prompt.pinned, prompt.snapshot_at), (7, 1, Some(3)));
    prompt.truncate_front(4);
    assert_eq!((prompt.ids.len(), prompt.pinned, prompt.snapshot_at), (4, 0, None));
}

/// Texts with everything that could be mistaken: control tokens, marks, blanks at the ends.
fn message() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[a-zA-Z ,.\n]{0,12}",
        "\\PC{0,6}",
        Just("<|im_end|>".to_owned()),
        Just("<|im_start|>assistant\n".to_owned()),
        Just("yes".to_owned()),
        Just("\u{E000}answer 1\u{E000}".to_owned()),
        Just("\u{FFFD}".to_owned()),
    ];
    proptest::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever is said and however it was cut into tokens: the bytes of the prompt are those of the
    /// rendered text, and each turn's prompt goes on where the last turn ended, if what was said can be
    /// found in it.
    #[test]
    fn bytes_never_change(
        turns in proptest::collection::vec((message(), message(), any::<[bool; 2]>()), 1..5),
        system in proptest::option::of(message()),
    ) {
        let talk = Conversation::new(&PROCESSOR);
        let mut messages: Vec<(&str, &str)> = system.iter().map(|text| ("system", text.as_str())).collect();
        let has_marks = |text: &str| text.contains(MARK);
        let mut is_clean = !system.as_deref().is_some_and(has_marks);
        let mut expected: Vec<u32> = Vec::new();
        for (question, answer, [is_shredded, is_edited]) in &turns {
            messages.push(("user", question));
            is_clean &= !has_marks(question);
            let chat = chat(&messages);
            let prompt = talk.prompt(&chat);
            let text = PROCESSOR.render_chat(&chat).expect("rendered");
            let bytes: Vec<u8> =
                prompt.ids.iter().flat_map(|id| PROCESSOR.token_bytes(*id)).copied().collect();
            prop_assert_eq!(bytes, text.as_bytes());
            if is_clean {
                prop_assert!(prompt.ids.starts_with(&expected));
            }
            let ids = if *is_shredded { shredded(answer) } else { PROCESSOR.encode(answer, false).expect("ids") };
            // Tokens that a client does not get to see are no part of its text.
            let is_shown = !ids.iter().any(|id| PROCESSOR.is_special(*id));
            if is_shown {
                talk.answer(&prompt, answer, &ids);
            }
            messages.push(("assistant", if *is_edited { "Something else." } else { answer }));
            let is_returned = is_shown && !is_edited && !answer.is_empty();
            is_clean &= !has_marks(answer);
            expected = if is_returned { [prompt.ids, ids].concat() } else { Vec::new() };
        }
    }
}
