//! The same request gives the same tokens alone and in a full batch, whatever runs beside it.

use futures_util::future::join_all;
use locket_tests::Server;
use serde_json::{Value, json};

fn request(number: usize) -> Value {
    let topic = ["rivers", "bread", "the moon", "trains", "music", "snow", "bees", "maps"][number % 8];
    // Prompts of very different lengths, so that chunks and decode rows share steps.
    let padding = "Please be precise. ".repeat(number % 7 * 9);
    json!({
        "model": "smollm2",
        "messages": [{"role": "user", "content": format!("{padding}Write about {topic}, number {number}.")}],
        "max_tokens": 16 + number % 5 * 8,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.8 },
        "seed": number,
    })
}

async fn text(server: &Server, number: usize) -> String {
    let response = server.post_ok("/v1/chat/completions", &request(number)).await;
    response["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn alone_equals_in_a_batch_of_32() {
    for cache in [
        &["--cache-method", "full"][..],
        &["--cache-method", "window", "--cache-slots", "64", "--cache-ring", "32"],
    ] {
        let server = Server::start(cache);
        let mut alone = Vec::new();
        for number in 0..32 {
            alone.push(text(&server, number).await);
        }
        let together = join_all((0..32).map(|number| text(&server, number))).await;
        for (number, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert_eq!(alone, together, "request {number}");
        }
    }
}
