//! Connections over a real socket: silent, idle, too many, and clients that do not read.

use std::time::Duration;

use futures_util::StreamExt as _;
use locket_server::{ServerConfig, config::ConnectionLimits};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tower::ServiceExt as _;

use crate::fake::{TestServer, chat_body, post};

/// Short enough to be waited for.
const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(3600);

fn server(connections: ConnectionLimits) -> TestServer {
    TestServer::with(ServerConfig { connections, ..ServerConfig::default() }, 1)
}

/// Serves in the background, and connects as often as it is called.
async fn listen(server: &TestServer) -> impl AsyncFn() -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(locket_server::serve(listener, server.state.clone(), std::future::pending()));
    async move || TcpStream::connect(address).await.expect("a connection")
}

/// Reads until the text ends with `end`, or the server closes.
async fn read_until(connection: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        if connection.read_buf(&mut bytes).await.expect("bytes") == 0 {
            break;
        }
    }
    String::from_utf8(bytes).expect("UTF-8")
}

async fn get(connection: &mut TcpStream, path: &str, end: &str) -> String {
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    connection.write_all(head.as_bytes()).await.expect("sent");
    read_until(connection, end).await
}

/// Nothing, half a head, half of an HTTP/2 preface: closed without an answer.
#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_are_closed() {
    let server =
        server(ConnectionLimits { header_timeout: SHORT, idle_timeout: LONG, ..ConnectionLimits::default() });
    let connect = listen(&server).await;
    for start in ["", "GET /health HTTP/1.1\r\nhost: x\r\n", "PRI * HTT", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let mut connection = connect().await;
        connection.write_all(start.as_bytes()).await.expect("sent");
        let mut rest = Vec::new();
        // The end is what is waited for; HTTP/2 sends its settings before.
        let _ = connection.read_to_end(&mut rest).await;
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{start:?}");
    }
}

/// A kept connection is used again within the limit, and closed after it; also in the middle of a
/// second head.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_closed() {
    let server =
        server(ConnectionLimits { header_timeout: LONG, idle_timeout: SHORT, ..ConnectionLimits::default() });
    let connect = listen(&server).await;
    for begun in ["", "GET /health HTTP/1.1\r\n"] {
        let mut connection = connect().await;
        for _ in 0..3 {
            let answer = get(&mut connection, "/health", "{\"status\":\"ok\"}").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        connection.write_all(begun.as_bytes()).await.expect("sent");
        assert_eq!(read_until(&mut connection, "never").await, "");
    }
}

/// An HTTP/2 client whose window stays closed gets no answer, and its connection ends.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_not_taken_end_their_connection() {
    let server = server(ConnectionLimits {
        header_timeout: LONG,
        idle_timeout: LONG,
        stall_timeout: SHORT,
        ..ConnectionLimits::default()
    });
    let connect = listen(&server).await;
    let settings: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, /* initial window */ 0, 4, 0, 0, 0, 0];
    let head = b"\x82\x86\x04\x07/health\x01\x01x";
    let frame: &[u8] = &[0, 0, head.len() as u8, 1, /* end of stream and headers */ 5, 0, 0, 0, 1];
    let mut connection = connect().await;
    let sent = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", settings, frame, head].concat();
    connection.write_all(&sent).await.expect("sent");
    let mut received = Vec::new();
    // The end is what is waited for.
    let _ = connection.read_to_end(&mut received).await;
    let body = br#"{"status":"ok"}"#;
    assert!(received.len() > 9 && !received.windows(body.len()).any(|bytes| bytes == body));
}

/// What is beyond the limit is answered as soon as another connection ends.
#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let server = server(ConnectionLimits { max_connections: 1, ..ConnectionLimits::default() });
    let connect = listen(&server).await;
    let mut first = connect().await;
    assert!(get(&mut first, "/health", "}").await.starts_with("HTTP/1.1 200"));
    let mut second = connect().await;
    second.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("locket_http_connections 1\n"), "{metrics}");
    drop(first);
    assert!(read_until(&mut second, "}").await.starts_with("HTTP/1.1 200"));
}

/// A stream that nobody reads ends, counts as 499, and lets go of what it held.
#[tokio::test]
async fn a_reader_that_stops_loses_its_stream() {
    let connections = ConnectionLimits { stall_timeout: SHORT, ..ConnectionLimits::default() };
    let config = ServerConfig { connections, max_concurrent_requests: 1, ..ServerConfig::default() };
    let server = TestServer::with(config, 1);
    let body = chat_body("Hi", json!({"stream": true, "ignore_eos": true}));
    let response = server.router.clone().oneshot(post("/v1/chat/completions", body.to_string())).await;
    let mut events = response.expect("never fails").into_body().into_data_stream();
    assert!(events.next().await.is_some_and(|event| event.is_ok()));
    // Not read on, and not dropped. The only permit comes back when the stream has ended.
    while !server.get("/metrics").await.text.contains("locket_http_stalls_total 1\n") {
        tokio::task::yield_now().await;
    }
    server.chat("Hi", json!({})).await.ok();
    let line = r#"locket_http_requests_total{method="POST",route="/v1/chat/completions",status="499"} 1"#;
    assert!(server.get("/metrics").await.text.contains(line));
    assert!(events.next().await.is_some_and(|event| event.is_err()), "the reader hears of it");
}
