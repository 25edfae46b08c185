//! SIGTERM drains: running streams finish, new requests are refused, the exit code is zero.

use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use locket_tests::Server;
use serde_json::json;

#[tokio::test]
async fn a_running_stream_finishes_and_new_requests_are_refused() {
    let server = Server::start(&[]);
    let body = json!({
        "model": "smollm2", "stream": true, "temperature": 0, "max_tokens": 400, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Tell me a long story."}],
    });
    let mut events = server.open_stream("/v1/chat/completions", &body).await.bytes_stream().eventsource();
    events.next().await.expect("the role chunk").expect("a well-formed event");
    // A second connection that is open before the listener closes.
    server.terminate();
    let refused = async {
        loop {
            let response = server.client().get(format!("{}/ready", server.url())).send().await;
            match response {
                // Either the listener is gone, or it says so: both are a refusal.
                Err(_) => return,
                Ok(response) if response.status() == 503 => return,
                Ok(_) => tokio::task::yield_now().await,
            }
        }
    };
    refused.await;
    if let Ok(response) =
        server.client().post(format!("{}/v1/chat/completions", server.url())).json(&body).send().await
    {
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
    }
    let mut last = String::new();
    while let Some(event) = events.next().await {
        last = event.expect("a well-formed event").data;
    }
    assert_eq!(last, "[DONE]", "the stream finished");
    assert!(server.wait().success());
}

#[tokio::test]
async fn an_idle_server_ends_at_once() {
    let server = Server::start(&[]);
    server.terminate();
    assert!(server.wait().success());
}
