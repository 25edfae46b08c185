//! Spans at a collector: what a request was doing, in its caller's trace, without its text.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::Duration,
};

use locket_tests::Server;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value,
    trace::v1::{Span, status::StatusCode},
};
use prost::Message as _;
use serde_json::json;

/// A word that is in no span.
const SECRET: &str = "xylophone";

/// Takes what is sent by OTLP over HTTP and hands on the bodies.
struct Collector {
    url: String,
    bodies: mpsc::Receiver<Vec<u8>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (sender, bodies) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let sender = sender.clone();
                std::thread::spawn(move || take(&stream, &sender));
            }
        });
        Self { url, bodies }
    }

    /// The spans of everything that has arrived.
    fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for body in self.bodies.try_iter() {
            assert!(!String::from_utf8_lossy(&body).contains(SECRET), "text of a prompt was sent");
            let request = ExportTraceServiceRequest::decode(body.as_slice()).expect("OTLP");
            let scopes = request.resource_spans.into_iter().flat_map(|resource| {
                let attributes = resource.resource.expect("a resource").attributes;
                assert!(attributes.iter().any(|a| a.key == "service.name"), "{attributes:?}");
                resource.scope_spans
            });
            spans.extend(scopes.flat_map(|scope| scope.spans));
        }
        spans
    }
}

/// Answers the requests of one connection.
fn take(stream: &TcpStream, bodies: &mpsc::Sender<Vec<u8>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut line, mut length) = (String::new(), 0);
        if !reader.read_line(&mut line).is_ok_and(|read| read > 0) {
            return;
        }
        assert!(line.starts_with("POST /v1/traces "), "{line}");
        while line.trim_end() != "" {
            line.clear();
            reader.read_line(&mut line).expect("a header");
            let (name, value) = line.split_once(':').unwrap_or_default();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        bodies.send(body).expect("the test waits");
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        (&mut &*stream).write_all(answer.as_bytes()).expect("answered");
    }
}

fn number(span: &Span, key: &str) -> i64 {
    let value = span.attributes.iter().find(|attribute| attribute.key == key);
    match value.and_then(|attribute| attribute.value.as_ref()?.value.clone()) {
        Some(Value::IntValue(number)) => number,
        other => panic!("{key} of {}: {other:?}", span.name),
    }
}

fn text(span: &Span, key: &str) -> String {
    let value = span.attributes.iter().find(|attribute| attribute.key == key);
    match value.and_then(|attribute| attribute.value.as_ref()?.value.clone()) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} of {}: {other:?}", span.name),
    }
}

fn seconds(span: &Span) -> Duration {
    Duration::from_nanos(
        span.end_time_unix_nano.checked_sub(span.start_time_unix_nano).expect("an end after the start"),
    )
}

#[tokio::test]
async fn a_request_is_spans_in_its_callers_trace() {
    let collector = Collector::start();
    let server = Server::start(&["--trace-endpoint", &collector.url, "--cache-ring", "16"]);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let body = json!({
        "model": "smollm2", "messages": [{"role": "user", "content": format!("A story of a {SECRET}.")}],
        "max_tokens": 120, "ignore_eos": true, "temperature": 0, "stream": true,
        "locket": {"kv_cache": {"method": "window", "slots": 64}},
    });
    let answer = server
        .client()
        .post(format!("{}/v1/chat/completions", server.url()))
        .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
        .header("x-request-id", "a-request")
        .json(&body)
        .send()
        .await
        .expect("an answer");
    let named = answer.headers()["traceresponse"].to_str().expect("text").to_owned();
    assert!(named.starts_with(&format!("00-{trace}-")) && named.ends_with("-01"), "{named}");
    answer.text().await.expect("a body");
    // Not sampled by its caller; probes never are.
    let unsampled = server
        .client()
        .post(format!("{}/tokenize", server.url()))
        .header("traceparent", "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
        .json(&json!({"prompt": "x"}))
        .send()
        .await
        .expect("an answer");
    assert!(unsampled.headers()["traceresponse"].to_str().expect("text").ends_with("-00"));
    let (status, _) = server.post("/v1/chat/completions", &json!({"messages": []})).await;
    assert_eq!(status, 400);
    // The last spans leave with the process.
    server.terminate();
    assert!(server.wait().success());

    let spans = collector.spans();
    let mine: Vec<&Span> = spans.iter().filter(|span| hex(&span.trace_id) == trace).collect();
    let [request] =
        mine.iter().filter(|span| span.name == "POST /v1/chat/completions").collect::<Vec<_>>()[..]
    else {
        panic!("not one span of the request: {mine:?}")
    };
    assert_eq!(hex(&request.parent_span_id), "b7ad6b7169203331");
    assert_eq!(named.split('-').nth(2), Some(hex(&request.span_id).as_str()));
    assert_eq!(text(request, "locket.request_id"), "a-request");
    assert_eq!(number(request, "http.response.status_code"), 200);
    let phase = |name: &str| {
        let found: Vec<_> = mine.iter().filter(|span| span.name == name).collect();
        assert!(found.iter().all(|span| span.parent_span_id == request.span_id), "{name}");
        found
    };
    let [queue] = phase("queue")[..] else { panic!("queue") };
    let [prefill] = phase("prefill")[..] else { panic!("prefill") };
    let [decode] = phase("decode")[..] else { panic!("decode") };
    assert_eq!(queue.end_time_unix_nano, prefill.start_time_unix_nano);
    assert_eq!(prefill.end_time_unix_nano, decode.start_time_unix_nano);
    assert!(seconds(prefill) > Duration::ZERO && seconds(decode) > seconds(queue));
    assert!(decode.end_time_unix_nano <= request.end_time_unix_nano);
    assert_eq!(number(decode, "locket.generated_tokens"), 120);
    assert_eq!(text(decode, "locket.finish"), "length");
    let folds = phase("fold");
    assert!(!folds.is_empty());
    let folded: i64 = folds.iter().map(|span| number(span, "locket.tokens")).sum();
    assert_eq!(number(prefill, "locket.folded_tokens") + folded, number(decode, "locket.folded_tokens"));

    assert!(!spans.iter().any(|span| hex(&span.trace_id).starts_with("1af")), "its caller said no");
    let refused = spans.iter().find(|span| hex(&span.trace_id) != trace).expect("a trace of its own");
    assert!(refused.parent_span_id.is_empty() && refused.name == "POST /v1/chat/completions");
    assert_eq!(number(refused, "http.response.status_code"), 400);
    let code = refused.status.as_ref().map_or(0, |status| status.code);
    assert_ne!(code, StatusCode::Error as i32, "a wrong request is no fault of the server");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
