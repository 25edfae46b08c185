//! Images over the socket: the default model with a small vision tower of random weights beside it.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::join_all;
use locket_tests::Server;
use locket_vision::testing::{tiny, write_random};
use serde_json::{Value, json};

/// Width of the default model.
const HIDDEN_SIZE: usize = 576;

/// A server that sees; the folder holds its tower.
fn seeing(arguments: &[&str]) -> Server {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tower.safetensors");
    write_random(&path, &tiny(HIDDEN_SIZE), 5).expect("a file");
    let path = path.to_str().expect("UTF-8");
    // Read at start, so the folder may go.
    Server::start(&[&["--visual-model", path, "--max-image-pixels", "1000000"], arguments].concat())
}

fn picture(width: u32, height: u32, shade: u8) -> Value {
    let pixels =
        image::RgbImage::from_fn(width, height, |x, y| image::Rgb([shade, 5 * x as u8, 7 * y as u8]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels.write_to(&mut bytes, image::ImageFormat::Png).expect("a PNG");
    let url = format!("data:image/png;base64,{}", STANDARD.encode(bytes.get_ref()));
    json!({"type": "image_url", "image_url": {"url": url}})
}

fn chat(content: impl Into<Value>, visual: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": content.into()}], "temperature": 0,
                          "max_tokens": 12, "logprobs": true, "ignore_eos": true});
    if visual != Value::Null {
        body["locket"] = json!({ "visual": visual });
    }
    body
}

async fn ask(server: &Server, body: &Value) -> Value {
    server.post_ok("/v1/chat/completions", body).await["choices"][0].clone()
}

/// Text is answered as by a model that takes text only; a budget of everything is no dropping; and whatever
/// runs beside it, an answer stays the same.
#[tokio::test]
async fn text_and_images_in_one_batch() {
    let server = seeing(&[]);
    let blind = Server::start(&[]);
    let text = chat("Say hello.", Value::Null);
    assert_eq!(ask(&server, &text).await, ask(&blind, &text).await);
    let question = json!({"type": "text", "text": "What is it?"});
    let parts = json!([picture(48, 40, 1), question, picture(24, 60, 2)]);
    let bodies = [
        text,
        chat(parts.clone(), json!({"method": "none"})),
        chat(parts.clone(), json!({"method": "hired", "budget": 1.0})),
        chat(parts.clone(), json!({"method": "hired", "budget": 0.2})),
        chat(parts.clone(), json!({"method": "uniform", "budget": 9, "positions": "compact"})),
        chat(json!([question, picture(9, 9, 3)]), Value::Null),
    ];
    let mut alone = Vec::new();
    for body in &bodies {
        alone.push(ask(&server, body).await);
    }
    assert_eq!(alone[1], alone[2], "everything stays");
    assert_ne!(alone[1]["logprobs"], alone[3]["logprobs"], "images are seen");
    let together = join_all(bodies.iter().map(|body| ask(&server, body))).await;
    assert_eq!(together, alone);
}

/// A conversation goes on: its images are not seen again, and its prefix comes from a snapshot.
#[tokio::test]
async fn a_conversation_with_an_image_goes_on() {
    let server = seeing(&[]);
    let mut messages = vec![json!({"role": "user", "content": [picture(48, 48, 1),
        {"type": "text", "text": "What is it?"}]})];
    let body = |messages: &[Value]| json!({"messages": messages, "temperature": 0, "max_tokens": 8});
    let first = server.post_ok("/v1/chat/completions", &body(&messages)).await;
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": "And its colour?"}));
    let second = server.post_ok("/v1/chat/completions", &body(&messages)).await;
    let details = &second["usage"]["prompt_tokens_details"];
    let of_first = &first["usage"]["prompt_tokens_details"];
    assert_eq!(details["image_tokens"], of_first["image_tokens"]);
    assert!(details["cached_tokens"].as_u64() > of_first["image_tokens_kept"].as_u64(), "{details}");
    // Another image in its place shares nothing.
    messages[0]["content"][0] = picture(48, 48, 2);
    let other = server.post_ok("/v1/chat/completions", &body(&messages)).await;
    let cached = other["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached < of_first["image_tokens_kept"].as_u64(), "{}", other["usage"]);
}
