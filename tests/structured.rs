//! Constrained answers of the real model over a real socket: whatever ends by itself is what was asked
//! for, streamed or not, and what cannot be promised is refused with the path to the reason.

#[path = "../crates/processor/tests/support/schemas.rs"]
mod schemas;

use futures_util::{StreamExt, stream};
use locket_tests::{Server, chat_text, finish_reason};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

fn chat(prompt: &str, fields: Value) -> Value {
    let mut body = json!({"model": "smollm2", "messages": [{"role": "user", "content": prompt}],
                          "max_tokens": 40, "temperature": 0});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// Text and finish reason of choice 0.
fn answer(body: &Value) -> (&str, &str) {
    let choice = &body["choices"][0];
    let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap();
    (text, choice["finish_reason"].as_str().unwrap())
}

fn with_schema(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})
}

#[tokio::test]
async fn answers_follow_random_schemas() {
    const REQUESTS: u64 = 30;
    let server = Server::start(&[]);
    let ask = async |seed: u64| {
        let schema = schemas::random_schema(&mut StdRng::seed_from_u64(seed));
        let fields = json!({"response_format": with_schema(&schema), "temperature": 1, "seed": seed});
        let body = server.post_ok("/v1/chat/completions", &chat("Give me an example.", fields)).await;
        let (text, finish) = answer(&body);
        if finish == "length" {
            return false;
        }
        assert_eq!(finish, "stop");
        let is_valid = schemas::is_valid(&schema, text);
        assert_ne!(is_valid, Some(false), "{text} is not of {schema}");
        true
    };
    let ended: Vec<bool> = stream::iter(0..REQUESTS).map(ask).buffer_unordered(6).collect().await;
    let ended = ended.into_iter().filter(|ended| *ended).count();
    assert!(ended * 3 > REQUESTS as usize, "{ended} of {REQUESTS} ended");
}

#[tokio::test]
async fn every_kind_streamed_and_not() {
    let server = Server::start(&[]);
    let person = json!({"type": "object", "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "hobbies": {"type": "array", "items": {"enum": ["chess", "music"]}, "maxItems": 2}},
        "required": ["name", "age"], "additionalProperties": false});
    let lark = "start: greeting \" \" NAME\ngreeting: \"Hello\" | \"Bye\"\nNAME: /[A-Z][a-z]{2,6}/";
    let gbnf = "root ::= (\"red\" | \"blue\") \"-\" [0-9]+ \"!\"";
    let date = |text: &str| text.len() == 10 && text.as_bytes()[4] == b'-';
    let is_person = |text: &str| schemas::is_valid(&person, text) == Some(true);
    type Check<'a> = &'a dyn Fn(&str) -> bool;
    let rows: [(Value, Check<'_>); 8] = [
        (json!({"response_format": with_schema(&person)}), &is_person),
        (json!({"structured_outputs": {"json": person}}), &is_person),
        (json!({"guided_json": person.to_string()}), &is_person),
        (json!({"structured_outputs": {"choice": ["positive", "negative"]}}), &|text| {
            ["positive", "negative"].contains(&text)
        }),
        (json!({"guided_choice": ["1", "10", "100"]}), &|text| ["1", "10", "100"].contains(&text)),
        (json!({"guided_regex": "^(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]$"}), &date),
        (json!({"guided_grammar": lark}), &|text| text.starts_with("Hello ") || text.starts_with("Bye ")),
        (json!({"structured_outputs": {"grammar": gbnf}}), &|text| {
            (text.starts_with("red-") || text.starts_with("blue-")) && text.ends_with('!')
        }),
    ];
    for (fields, is_right) in rows {
        let whole = server.post_ok("/v1/chat/completions", &chat("Say something.", fields.clone())).await;
        let (text, finish) = answer(&whole);
        if finish == "stop" {
            assert!(is_right(text), "{fields}: {text}");
        }
        let mut streamed = chat("Say something.", fields.clone());
        streamed["stream"] = json!(true);
        let chunks = server.stream("/v1/chat/completions", &streamed).await;
        assert_eq!((chat_text(&chunks, 0).as_str(), finish_reason(&chunks, 0).as_str()), (text, finish));
        // Completions constrain in the same way.
        let mut plain = fields.clone();
        for (name, value) in
            [("model", json!("smollm2")), ("prompt", json!("It is")), ("max_tokens", json!(40))]
        {
            plain[name] = value;
        }
        let completion = server.post_ok("/v1/completions", &plain).await;
        let (text, finish) = answer(&completion);
        assert!(finish == "length" || is_right(text), "{fields}: {text}");
    }
}

#[tokio::test]
async fn json_object_is_one_whole_object() {
    let server = Server::start(&[]);
    let fields = json!({"response_format": {"type": "json_object"}, "n": 4, "temperature": 1, "seed": 1,
                        "max_tokens": 120, "logprobs": true});
    let body = server.post_ok("/v1/chat/completions", &chat("Describe a cat as JSON.", fields)).await;
    for choice in body["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        match choice["finish_reason"].as_str().unwrap() {
            "stop" => assert!(serde_json::from_str::<serde_json::Map<_, _>>(text).is_ok(), "{text}"),
            finish => assert_eq!(finish, "length"),
        }
        // Log-probabilities are the model's own, whatever the grammar left to choose from.
        assert!(!choice["logprobs"]["content"].as_array().unwrap().is_empty());
    }
}

/// The constraint holds although the client asks to go on after the end, and stop strings and budgets
/// still count.
#[tokio::test]
async fn other_fields_keep_their_meaning() {
    let server = Server::start(&[]);
    let choice = json!(["alpha beta", "alpha gamma"]);
    let ask = async |fields: Value| {
        let body = server.post_ok("/v1/chat/completions", &chat("Choose.", fields)).await;
        let (text, finish) = answer(&body);
        (text.to_owned(), finish.to_owned())
    };
    let (text, finish) = ask(json!({"guided_choice": choice, "ignore_eos": true})).await;
    assert!(choice.as_array().unwrap().contains(&json!(text)), "{text}");
    assert_eq!(finish, "stop");
    let (text, finish) = ask(json!({"guided_choice": choice, "stop": " "})).await;
    assert_eq!((text.as_str(), finish.as_str()), ("alpha", "stop"));
    let (text, finish) = ask(json!({"guided_choice": choice, "max_tokens": 1})).await;
    assert!("alpha".starts_with(&text), "{text}");
    assert_eq!(finish, "length");
}

#[tokio::test]
async fn what_cannot_constrain_is_refused_with_its_path() {
    let server = Server::start(&[]);
    let nested = |inner: Value| with_schema(&json!({"type": "object", "properties": {"x": inner}}));
    let path = "response_format.json_schema.schema";
    let rows = [
        (
            json!({"response_format": nested(json!({"not": {}}))}),
            "invalid_json_schema",
            format!("{path}.properties.x.not"),
        ),
        (
            json!({"response_format": nested(json!({"type": "text"}))}),
            "invalid_json_schema",
            format!("{path}.properties.x"),
        ),
        (
            json!({"response_format": nested(json!({"anyOf": [{"type": "null"}, {"pattern": "(", "type": "string"}]}))}),
            "invalid_json_schema",
            format!("{path}.properties.x.anyOf[1]"),
        ),
        (
            json!({"structured_outputs": {"json": {"type": 1}}}),
            "invalid_json_schema",
            "structured_outputs.json".into(),
        ),
        (json!({"guided_regex": "a(?!b)"}), "invalid_grammar", "guided_regex".into()),
        (json!({"guided_grammar": "no grammar"}), "invalid_grammar", "guided_grammar".into()),
        (
            json!({"structured_outputs": {"grammar": "start: absent"}}),
            "invalid_grammar",
            "structured_outputs.grammar".into(),
        ),
    ];
    for (fields, code, param) in rows {
        for (route, mut body) in [
            ("/v1/chat/completions", chat("Hi", fields.clone())),
            ("/v1/completions", json!({"model": "smollm2", "prompt": "Hi"})),
        ] {
            for (name, value) in fields.as_object().unwrap() {
                body[name] = value.clone();
            }
            let (status, answer) = server.post(route, &body).await;
            let error = &answer["error"];
            assert_eq!((status, &error["code"]), (422, &json!(code)), "{route} {fields}: {answer}");
            assert_eq!(error["param"], json!(param), "{route}: {answer}");
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
}
