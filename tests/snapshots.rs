//! A conversation that comes back runs only what is new, says the same as without snapshots, and goes
//! on after a kill -9; a corrupted file is refused and costs a prefill, nothing else.

use std::path::Path;

use locket_tests::Server;
use serde_json::{Value, json};

const TURNS: usize = 20;
/// The chat folds from the third turn or so on. All its snapshots fit into RAM.
const SLOTS: &str = "128";
/// Tokens of the longest question with its header, and of the end of the answer before it.
const NEW_TOKENS: u64 = 40;

fn question(turn: usize) -> String {
    let topics = ["rivers", "bread", "clocks", "the moon", "bees", "paper", "glass"];
    format!("Question {turn}: tell me one thing about {}.", topics[turn % topics.len()])
}

/// One client's chat: what was said so far, and what the server counted.
struct Chat {
    messages: Vec<Value>,
    answers: Vec<String>,
}

/// Tokens of a turn.
#[derive(Debug)]
struct Usage {
    prompt: u64,
    cached: u64,
    folded: u64,
}

impl Chat {
    fn new() -> Self {
        let system = json!({"role": "system", "content": "You answer in one short sentence."});
        Self { messages: vec![system], answers: Vec::new() }
    }

    async fn turn(&mut self, server: &Server) -> Usage {
        self.messages.push(json!({"role": "user", "content": question(self.answers.len())}));
        let body = json!({
            "model": "smollm2", "messages": self.messages, "temperature": 0, "max_tokens": 24,
        });
        let answer = server.post_ok("/v1/chat/completions", &body).await;
        let text = answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
        self.messages.push(json!({"role": "assistant", "content": text}));
        self.answers.push(text);
        let usage = &answer["usage"];
        let number = |value: &Value| value.as_u64().expect("a count");
        Usage {
            prompt: number(&usage["prompt_tokens"]),
            cached: number(&usage["prompt_tokens_details"]["cached_tokens"]),
            folded: number(&usage["locket"]["folded_tokens"]),
        }
    }
}

fn start(more: &[&str]) -> Server {
    Server::start(&[&["--cache-slots", SLOTS], more].concat())
}

/// Waits until all that a server without earlier files has taken is on disk.
async fn until_written(server: &Server) {
    let in_ram = server.metric("locket_snapshots", &["tier=\"ram\""]).await;
    server.until_metric("locket_snapshots", &["tier=\"disk\""], in_ram).await;
}

fn snapshot_files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the snapshots' folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    // Beside them lie the folder's lock and the turns' journal.
    paths.filter(|path| path.metadata().is_ok_and(|file| file.len() > 1 << 20)).collect()
}

#[tokio::test]
async fn a_chat_runs_only_new_tokens_and_survives_a_kill() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("snapshots");
    let options = ["--snapshots-dir", dir.to_str().expect("a path"), "--snapshots-memory", "256MiB"];
    let mut server = start(&options);
    let mut chat = Chat::new();
    let (mut cached, mut has_folded) = (0, false);
    for turn in 0..TURNS {
        if turn == TURNS / 2 {
            until_written(&server).await;
            // Dropping a server kills it with SIGKILL.
            drop(server);
            server = start(&options);
            cached = 0;
        }
        let usage = chat.turn(&server).await;
        cached += usage.cached;
        has_folded |= usage.folded > 0;
        if turn > 0 {
            assert!(usage.prompt - usage.cached <= NEW_TOKENS, "turn {turn}: {usage:?}");
        }
        let hits = server.metric("vllm:prefix_cache_hits_total", &[]).await;
        assert_eq!(hits as u64, cached, "the metric counts what usage says");
    }
    assert!(has_folded, "the chat outgrew its slots");

    let plain = start(&["--snapshots-memory", "0"]);
    let mut same = Chat::new();
    for _ in 0..TURNS {
        assert_eq!(same.turn(&plain).await.cached, 0);
    }
    assert_eq!(same.answers, chat.answers, "snapshots change no text");
    drop(plain);

    drop(server);
    let files = snapshot_files(&dir);
    assert!(!files.is_empty());
    for path in &files {
        let mut bytes = std::fs::read(path).expect("a snapshot");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        std::fs::write(path, bytes).expect("a snapshot can be written");
    }
    let server = start(&options);
    let mut again = Chat { messages: chat.messages.clone(), answers: chat.answers.clone() };
    let usage = again.turn(&server).await;
    assert_eq!(usage.cached, 0, "nothing corrupted is used");
    assert!(server.metric("locket_snapshots_refused_total", &["corrupt"]).await >= 1.0);
}
