//! Full queues, clients that vanish, readers that do not read: nothing is lost but what is theirs.

use std::{io::Write, net::TcpStream};

use futures_util::{StreamExt, future::join_all};
use locket_tests::Server;
use serde_json::{Value, json};

fn endless(number: usize) -> Value {
    json!({
        "model": "smollm2", "stream": true, "max_tokens": 4000, "ignore_eos": true,
        "messages": [{"role": "user", "content": format!("Tell me story number {number}.")}],
    })
}

#[tokio::test]
async fn sixty_four_vanished_clients_free_their_slots() {
    let server = Server::start(&["--max-model-len", "4096", "--max-running", "64", "--max-waiting", "128"]);
    let mut streams = join_all((0..64).map(|number| {
        let server = &server;
        async move {
            let response = server.open_stream("/v1/chat/completions", &endless(number)).await;
            let mut bytes = response.bytes_stream();
            bytes.next().await.expect("a first event").expect("bytes");
            bytes
        }
    }))
    .await;
    assert!(server.metric("locket_slots", &["state=\"used\""]).await > 0.0);
    let aborted = server.metric_or_zero("vllm:request_success_total", &["abort"]).await;
    let steps_before = steps(&server).await;
    streams.clear();
    server.until_metric("vllm:num_requests_running", &[], 0.0).await;
    server.until_metric("vllm:num_requests_waiting", &[], 0.0).await;
    server.until_metric("locket_slots", &["state=\"used\""], 0.0).await;
    server.until_metric("vllm:request_success_total", &["abort"], aborted + 64.0).await;
    // The 64 connections do not close in the same instant, so some steps run in between; each
    // sequence ends within one step of its own close, far from the 4,000 tokens it asked for.
    assert!(steps(&server).await - steps_before < 200.0);
    // And the server serves on.
    let mut short = endless(0);
    (short["stream"], short["max_tokens"]) = (json!(false), json!(2));
    server.post_ok("/v1/chat/completions", &short).await;
}

async fn steps(server: &Server) -> f64 {
    server.metric("locket_step_seconds_count", &[]).await
}

#[tokio::test]
async fn a_full_queue_is_told_with_retry_after() {
    let server = Server::start(&["--max-running", "1", "--max-waiting", "1"]);
    let running = server.open_stream("/v1/chat/completions", &endless(0)).await;
    let mut running = running.bytes_stream();
    running.next().await.expect("a first event").expect("bytes");
    let url = format!("{}/v1/chat/completions", server.url());
    // Gauges are set between steps: first see that they no longer show the first request waiting.
    server.until_metric("vllm:num_requests_running", &[], 1.0).await;
    server.until_metric("vllm:num_requests_waiting", &[], 0.0).await;
    let waiting = tokio::spawn(server.client().post(&url).json(&endless(1)).send());
    server.until_metric("vllm:num_requests_waiting", &[], 1.0).await;
    let response = server.client().post(&url).json(&endless(2)).send().await.unwrap();
    assert_eq!(response.status(), 503);
    let retry: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=120).contains(&retry));
    assert_eq!(response.headers()["retry-after-ms"].to_str().unwrap(), (retry * 1000).to_string());
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "server_overloaded");
    assert_eq!(body["error"]["type"], "server_error");
    drop(running);
    let mut admitted = waiting.await.unwrap().unwrap().bytes_stream();
    admitted.next().await.expect("the waiting request runs now").expect("bytes");
    assert_eq!(server.metric("locket_rejections_total", &[]).await, 1.0);
}

#[tokio::test]
async fn a_reader_who_does_not_read_holds_up_nobody() {
    let server = Server::start(&[]);
    let body = endless(0).to_string();
    let mut socket = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: locket\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(body.as_bytes()).unwrap();
    server.until_metric("vllm:num_requests_running", &[], 1.0).await;
    let mut short = endless(1);
    (short["stream"], short["max_tokens"]) = (json!(false), json!(20));
    let answers = join_all((0..8).map(|_| server.post_ok("/v1/chat/completions", &short))).await;
    assert_eq!(answers.len(), 8);
    drop(socket);
    server.until_metric("vllm:num_requests_running", &[], 0.0).await;
}
