//! Adapters: models of their own to clients, loaded while the server runs.

use std::path::Path;

use locket_server::ServerConfig;
use serde_json::{Value, json};

use crate::fake::{HIDDEN_SIZE, TestServer};

/// Writes a PEFT folder: rank 2 on the first layer's queries.
fn write_adapter(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder");
    let settings = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]});
    std::fs::write(folder.join("adapter_config.json"), settings.to_string()).expect("a file");
    let name = |side: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight");
    let bytes = 2 * HIDDEN_SIZE * 4;
    let header = json!({
        name("A"): {"dtype": "F32", "shape": [2, HIDDEN_SIZE], "data_offsets": [0, bytes]},
        name("B"): {"dtype": "F32", "shape": [HIDDEN_SIZE, 2], "data_offsets": [bytes, 2 * bytes]},
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + 2 * bytes, 0);
    std::fs::write(folder.join("adapter_model.safetensors"), file).expect("a file");
}

fn server(dir: Option<&Path>) -> TestServer {
    let config =
        ServerConfig { adapter_dir: dir.map(Path::to_owned), max_adapters: 2, ..ServerConfig::default() };
    TestServer::with(config, 8)
}

async fn load(server: &TestServer, name: &str, path: &str) -> crate::fake::Answer {
    server.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).await
}

async fn text(server: &TestServer, model: &str) -> Value {
    let answer = server.chat("Hi", json!({"model": model, "max_tokens": 5})).await.ok();
    assert_eq!(answer["model"], model);
    answer["choices"][0]["message"]["content"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_loaded_listed_asked_for_and_unloaded() {
    let folder = tempfile::tempdir().expect("a folder");
    write_adapter(&folder.path().join("poet"));
    let server = server(Some(folder.path()));
    let plain = text(&server, "tiny").await;
    assert_eq!(server.chat("Hi", json!({"model": "mine"})).await.status, 404);
    let loaded = load(&server, "mine", "poet").await;
    assert_eq!(
        (loaded.status.as_u16(), loaded.text.as_str()),
        (200, "Success: LoRA adapter 'mine' added successfully.")
    );
    let cards = server.get("/v1/models").await.ok();
    let card = cards["data"].as_array().expect("cards").last().expect("a card").clone();
    assert_eq!(
        (&card["id"], &card["parent"], &card["root"]),
        (&json!("mine"), &json!("tiny"), &json!("poet"))
    );
    assert_eq!(server.get("/v1/models/mine").await.ok()["parent"], "tiny");
    assert_ne!(text(&server, "mine").await, plain);
    assert_eq!(text(&server, "tiny").await, plain, "the model itself is unchanged");
    assert_eq!(load(&server, "mine", "poet").await.is_error(400, "invalid_value")["param"], "lora_name");
    assert_eq!(load(&server, "tiny", "poet").await.is_error(400, "invalid_value")["param"], "lora_name");
    // An absolute path is good if it lies inside.
    let inside = folder.path().join("poet");
    load(&server, "second", inside.to_str().expect("UTF-8")).await.ok_status();
    assert_eq!(load(&server, "third", "poet").await.is_error(400, "invalid_value")["param"], "lora_name");
    let unload = json!({"lora_name": "mine"});
    server.post("/v1/unload_lora_adapter", &unload).await.ok_status();
    assert_eq!(server.chat("Hi", json!({"model": "mine"})).await.status, 404);
    let answer = server.post("/v1/unload_lora_adapter", &unload).await;
    assert_eq!(answer.is_error(404, "model_not_found")["param"], "lora_name");
}

/// Only what lies inside of the operator's folder, and only if there is one.
#[tokio::test(flavor = "multi_thread")]
async fn other_folders_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let inside = folder.path().join("inside");
    write_adapter(&folder.path().join("outside"));
    std::fs::create_dir(&inside).expect("a folder");
    std::fs::create_dir(inside.join("empty")).expect("a folder");
    std::os::unix::fs::symlink(folder.path().join("outside"), inside.join("link")).expect("a link");
    let server = server(Some(&inside));
    let absolute = folder.path().join("outside");
    for path in ["../outside", "link", absolute.to_str().expect("UTF-8"), "nowhere", "empty"] {
        let error = load(&server, "mine", path).await.is_error(400, "invalid_value");
        assert_eq!(error["param"], "lora_path", "{path}");
    }
    let closed = TestServer::start();
    load(&closed, "mine", "poet").await.is_error(404, "not_found");
    closed.post("/v1/unload_lora_adapter", &json!({"lora_name": "mine"})).await.is_error(404, "not_found");
}
