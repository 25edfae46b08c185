//! Images: from parts of messages to rows of the prompt, through a tiny tower with random weights.

use std::sync::Arc;

use axum::http::StatusCode;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use locket_server::{ServerConfig, visual::VisualConfig};
use locket_vision::{
    ImageLayout, VisionModel,
    drop::{Budget, Method, VisualSettings},
    model::OpenOptions,
    testing,
};
use serde_json::{Value, json};

use crate::fake::{Answer, HIDDEN_SIZE, TestServer, merged};

/// A server whose model sees, with room for two images' tokens in the cache.
fn seeing(visual: VisualConfig) -> TestServer {
    seeing_with(ServerConfig { visual, ..ServerConfig::default() })
}

fn seeing_with(config: ServerConfig) -> TestServer {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vision.safetensors");
    testing::write_random(&path, &geometry(), 7).expect("a file");
    let vision = VisionModel::open(&path, &OpenOptions::default()).expect("a vision model");
    TestServer::seeing(config, 8, Arc::new(vision))
}

fn geometry() -> locket_vision::VisionGeometry {
    testing::tiny(HIDDEN_SIZE)
}

/// Tokens of an image of this size.
fn tokens(width: u32, height: u32) -> usize {
    ImageLayout::of(&geometry(), height, width).tokens()
}

/// A picture of one colour that depends on `shade`, as a data URI.
fn picture(width: u32, height: u32, shade: u8) -> String {
    let pixels = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([shade, x as u8, y as u8]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels.write_to(&mut bytes, image::ImageFormat::Png).expect("a PNG");
    data_uri(bytes.get_ref())
}

fn data_uri(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

fn part(url: &str) -> Value {
    json!({"type": "image_url", "image_url": {"url": url}})
}

fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

async fn ask(server: &TestServer, parts: Value, fields: Value) -> Answer {
    let messages = json!([{"role": "user", "content": parts}]);
    let base = json!({"messages": messages, "temperature": 0, "max_tokens": 3});
    server.post("/v1/chat/completions", &merged(base, fields)).await
}

async fn metric(server: &TestServer, line: &str) -> f64 {
    let text = server.get("/metrics").await.text;
    let value = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
    value.unwrap_or(0.0)
}

/// Prompt tokens of the same conversation without its images.
async fn text_tokens(server: &TestServer, content: &str) -> u64 {
    let body = json!({"messages": [{"role": "user", "content": content}]});
    server.post("/tokenize", &body).await.ok()["count"].as_u64().expect("a count")
}

#[tokio::test(flavor = "multi_thread")]
async fn images_become_rows_and_usage_counts_what_was_dropped() {
    let server = seeing(VisualConfig::default());
    let parts = json!([text("a"), part(&picture(30, 20, 1)), text("b"), part(&picture(24, 24, 2))]);
    let answer = ask(&server, parts.clone(), json!({})).await.ok();
    let (first, second) = (tokens(30, 20), tokens(24, 24));
    let kept = |tokens: usize| Budget::Fraction(0.4).of(tokens) as u64;
    let details = &answer["usage"]["prompt_tokens_details"];
    assert_eq!(details["image_tokens"], (first + second) as u64);
    assert_eq!(details["image_tokens_kept"], kept(first) + kept(second));
    // Joined by lines, as this template takes text only.
    let text = text_tokens(&server, "a\n\nb\n").await;
    assert_eq!(answer["usage"]["prompt_tokens"], text + (first + second) as u64);
    let counted = json!({"messages": [{"role": "user", "content": parts}]});
    assert_eq!(server.post("/tokenize", &counted).await.ok()["count"], answer["usage"]["prompt_tokens"]);
    assert_eq!(
        metric(&server, "locket_visual_tokens_total{method=\"hired\",stage=\"kept\"}").await,
        (kept(first) + kept(second)) as f64
    );
    assert_eq!(
        metric(&server, "locket_visual_tokens_total{method=\"hired\",stage=\"in\"}").await,
        (first + second) as f64
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn details_and_requests_choose_how_much_stays() {
    let server = seeing(VisualConfig::default());
    let url = picture(40, 40, 3);
    let kept = async |detail: &str, visual: Value| {
        let image = json!({"type": "image_url", "image_url": {"url": url, "detail": detail}});
        let answer = ask(&server, json!([image]), json!({"locket": {"visual": visual}})).await.ok();
        let details = &answer["usage"]["prompt_tokens_details"];
        (details["image_tokens"].as_u64().unwrap(), details["image_tokens_kept"].as_u64().unwrap())
    };
    let (all, base) = (tokens(40, 40) as u64, geometry().patches() as u64);
    assert_eq!(kept("high", json!({})).await, (all, all));
    assert_eq!(kept("low", json!({})).await, (base, base / 2));
    assert_eq!(kept("auto", json!({"budget": 7})).await, (all, 7));
    assert_eq!(kept("auto", json!({"method": "uniform", "budget": "25%"})).await, (all, all / 4));
    assert_eq!(kept("auto", json!({"method": "none"})).await, (all, all));
    let bad = ask(&server, json!([part(&url)]), json!({"locket": {"visual": {"method": "best"}}})).await;
    assert_eq!(bad.is_error(400, "invalid_value")["param"], "locket.visual.method");
}

/// The same file with the same settings is seen once, whoever asks and whenever.
#[tokio::test(flavor = "multi_thread")]
async fn images_that_come_again_are_not_seen_again() {
    let server = seeing(VisualConfig::default());
    let parts = json!([part(&picture(30, 20, 1)), text("Hi")]);
    let first = ask(&server, parts.clone(), json!({})).await.ok();
    let again = ask(&server, parts.clone(), json!({"locket": {"visual": {"report": true}}})).await.ok();
    assert_eq!(first["choices"], again["choices"]);
    assert_eq!(again["usage"]["locket"]["visual"][0]["was_cached"], true);
    assert_eq!(metric(&server, "locket_visual_images_total{result=\"hit\"}").await, 1.0);
    assert_eq!(metric(&server, "locket_visual_tower_seconds_count").await, 1.0);
    ask(&server, parts, json!({"locket": {"visual": {"budget": 0.2}}})).await.ok();
    assert_eq!(metric(&server, "locket_visual_tower_seconds_count").await, 2.0, "another plan");
    let other = json!([part(&picture(30, 20, 2)), text("Hi")]);
    let (one, two) = tokio::join!(ask(&server, other.clone(), json!({})), ask(&server, other, json!({})));
    assert_eq!((one.status, two.status), (StatusCode::OK, StatusCode::OK));
    assert_eq!(metric(&server, "locket_visual_tower_seconds_count").await, 3.0, "asked for twice at once");
    assert!(metric(&server, "locket_visual_cache_bytes").await > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_say_where_the_tokens_went() {
    let server = seeing(VisualConfig::default());
    let messages = json!([{"role": "user", "content": [part(&picture(48, 24, 9)), text("?")]}]);
    let body = json!({"messages": messages, "locket": {"visual": {"budget": 10}}});
    let answer = server.post("/visual_tokens", &body).await.ok();
    let report = &answer["data"][0];
    assert_eq!(answer["object"], "list");
    assert_eq!(report["path"], "messages[0].content[0].image_url.url");
    assert_eq!((&report["width"], &report["height"]), (&json!(48), &json!(24)));
    assert_eq!((&report["method"], &report["kept"]), (&json!("hired"), &json!(10)));
    assert_eq!(report["tokens"], tokens(48, 24) as u64);
    let count = |part: &Value| part["kept"].as_array().map_or(0, Vec::len);
    assert_eq!(count(&report["base"]) + count(&report["map"]), 10);
    for grid in [&report["base"], &report["map"]] {
        assert_eq!(count(grid), grid["boxes"].as_array().expect("boxes").len());
        for place in grid["boxes"].as_array().expect("boxes") {
            let [x, y, width, height] = [0, 1, 2, 3].map(|at| place[at].as_f64().expect("a number"));
            assert!(x >= 0.0 && y >= 0.0 && x + width <= 48.1 && y + height <= 24.1, "{place}");
        }
    }
    // The same in the last chunk of a stream, and nowhere before.
    let fields = json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true},
                        "locket": {"visual": {"budget": 10, "report": true}}});
    let chunks = ask(&server, json!([part(&picture(48, 24, 9))]), fields).await.chunks();
    let (last, before) = chunks.split_last().expect("chunks");
    assert_eq!(last["usage"]["locket"]["visual"][0]["base"], report["base"]);
    assert!(before.iter().all(|chunk| chunk["usage"]["locket"]["visual"].is_null()));
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_take_images_too() {
    let server = seeing(VisualConfig::default());
    let image = json!({"type": "input_image", "image_url": picture(30, 20, 1), "detail": "high"});
    let content = json!([image, {"type": "input_text", "text": "What is it?"}]);
    let body = json!({"input": [{"role": "user", "content": content}], "max_output_tokens": 3});
    let answer = server.post("/v1/responses", &body).await.ok();
    let details = &answer["usage"]["input_tokens_details"];
    assert_eq!(details["image_tokens"], tokens(30, 20) as u64);
    assert_eq!(details["image_tokens_kept"], tokens(30, 20) as u64);
}

/// A prompt whose images cannot fit is refused before anything is seen.
#[tokio::test(flavor = "multi_thread")]
async fn lengths_are_known_before_images_are_seen() {
    let server = seeing(VisualConfig::default());
    let images: Vec<Value> = (0..8).map(|shade| part(&picture(48, 48, shade))).collect();
    let answer = ask(&server, images.clone().into(), json!({})).await;
    let error = answer.is_error(400, "context_length_exceeded");
    let all = (8 * tokens(48, 48)).to_string();
    assert!(all.parse::<usize>().unwrap() > 512 && error["param"] == "messages", "{error}");
    assert_eq!(metric(&server, "locket_visual_tower_seconds_count").await, 0.0);
    // Without gaps between positions they do fit.
    let fields = json!({"locket": {"visual": {"positions": "compact", "budget": 20}}});
    let answer = ask(&server, images.into(), fields).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["image_tokens_kept"], 160);
    for name in ["truncate_prompt_tokens", "prompt_logprobs"] {
        let answer = ask(&server, json!([part(&picture(9, 9, 1))]), json!({ name: 1 })).await;
        assert_eq!(answer.is_error(400, "invalid_value")["param"], name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_get_the_contracts_errors() {
    let server = seeing(VisualConfig::default());
    let url = "messages[0].content[0].image_url.url";
    let png = |uri: String| STANDARD.decode(uri.split_once(',').expect("a data URI").1).expect("base64");
    let good = png(picture(30, 20, 1));
    let bomb = {
        // A header of 100,000 x 100,000 pixels in front of nothing.
        let mut bytes = good.clone();
        bytes[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
        bytes
    };
    let lying = {
        let mut bytes = good.clone();
        bytes[16..24].copy_from_slice(&[0, 0, 0, 40, 0, 0, 0, 50]);
        bytes
    };
    let rows: [(&str, String, u16, &str); 8] = [
        ("truncated", data_uri(&good[..good.len() / 2]), 422, "image_parse_error"),
        ("another type", data_uri(b"%PDF-1.4 and more"), 422, "image_parse_error"),
        ("a bomb", data_uri(&bomb), 413, "image_too_large"),
        ("a header that lies", data_uri(&lying), 422, "image_parse_error"),
        ("no bytes", "data:image/png;base64,".into(), 400, "invalid_base64"),
        ("20,000 x 1", picture(20_000, 1, 1), 422, "image_parse_error"),
        ("a host that is not allowed", "https://images.example/a.png".into(), 400, "invalid_image_url"),
        ("bare base64", STANDARD.encode(&good), 400, "invalid_image_url"),
    ];
    for (name, image, status, code) in rows {
        let answer = ask(&server, json!([part(&image), text("?")]), json!({})).await;
        assert_eq!(answer.is_error(status, code)["param"], url, "{name}");
    }
    let one = ask(&server, json!([part(&picture(1, 1, 1))]), json!({})).await.ok();
    assert_eq!(one["usage"]["prompt_tokens_details"]["image_tokens"], tokens(1, 1) as u64);
    let system = json!({"messages": [{"role": "system", "content": [part(&picture(9, 9, 1))]}]});
    let answer = server.post("/v1/chat/completions", &system).await;
    assert_eq!(answer.is_error(400, "unsupported_value")["param"], "messages[0].content");
    assert!(metric(&server, "locket_visual_images_total{result=\"refused\"}").await >= 2.0);
}

/// What users write is never a placeholder, and text goes as it always did.
#[tokio::test(flavor = "multi_thread")]
async fn placeholders_in_texts_are_texts() {
    let server = seeing(VisualConfig::default());
    let answer =
        ask(&server, json!([part(&picture(9, 9, 1)), text("what is <image>?")]), json!({})).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["image_tokens"], tokens(9, 9) as u64);
    let plain = TestServer::start().chat("an <image> in text", json!({"max_tokens": 3})).await.ok();
    let seen = server.chat("an <image> in text", json!({"max_tokens": 3})).await.ok();
    assert_eq!((&plain["choices"], &plain["usage"]), (&seen["choices"], &seen["usage"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_models_card_says_what_images_get() {
    let auto = VisualSettings::of(Method::Dpp).with_budget(Budget::Count(30));
    let server = seeing(VisualConfig { auto, methods: vec![Method::Dpp], ..VisualConfig::default() });
    let card = server.get("/v1/models/tiny").await.ok()["locket"]["visual"].clone();
    assert_eq!(
        (&card["method"], &card["budget"], &card["methods"]),
        (&json!("dpp"), &json!(30.0), &json!(["dpp"]))
    );
    assert_eq!(card["max_tokens"], geometry().max_tokens() as u64);
    let text_only = TestServer::start();
    assert!(text_only.get("/v1/models/tiny").await.ok()["locket"]["visual"].is_null());
    let answer = ask(&text_only, json!([part(&picture(9, 9, 1))]), json!({})).await;
    assert_eq!(answer.is_error(400, "unsupported_value")["param"], "messages[0].content[0].type");
    let answer = ask(&text_only, json!("Hi"), json!({"locket": {"visual": {}}})).await;
    assert_eq!(answer.is_error(400, "unsupported_parameter")["param"], "locket.visual");
}
