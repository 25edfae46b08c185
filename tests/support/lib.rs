//! Starts the real server on a free port with the default model, and speaks to it.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::Duration,
};

use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use serde_json::Value;

/// The repository's root.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// The `locket` binary of this source tree, built if it is not fresh.
pub fn locket_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "-p", "locket"])
            .current_dir(repository())
            .status()
            .expect("cargo runs");
        assert!(status.success(), "cargo build -p locket failed");
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or(repository().join("target"), PathBuf::from);
        target.join("release/locket")
    })
}

/// The default model's file: `LOCKET_TEST_MODEL`, or where `locket pull` puts it.
pub fn model_path() -> PathBuf {
    let path = std::env::var_os("LOCKET_TEST_MODEL").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("LOCKET_CACHE_DIR")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("locket")))
            .or_else(|| std::env::var_os("HOME").map(|dir| Path::new(&dir).join(".cache/locket")))
            .expect("a home folder");
        cache.join("SmolLM2-135M-Instruct.Q4_1.gguf")
    });
    assert!(path.is_file(), "{} is missing: run `cargo run --release -- pull` first", path.display());
    path
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    url: String,
    client: reqwest::Client,
    // Kept open: a closed pipe would make a late line on stdout an error in the server.
    _stdout: BufReader<std::process::ChildStdout>,
}

impl Server {
    /// Starts `locket serve` with the default model and these further arguments, and waits until
    /// it says where it listens.
    pub fn start(arguments: &[&str]) -> Self {
        // Clients want one, also those that never encrypt. An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut child = Command::new(locket_binary())
            .arg("serve")
            .arg(model_path())
            .args(["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", "0"])
            // Several servers run beside each other in one test run.
            .args(["--memory-budget", "1GiB"])
            .args(arguments)
            .env_remove("LOCKET_CONFIG")
            .env_remove("LOCKET_TEST_MODEL")
            .env("LOCKET_LOG_FILTER", "warn")
            .current_dir(std::env::temp_dir())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("the server's first line");
        let Some(url) = line.trim().strip_prefix("locket listening on ") else {
            let status = child.wait();
            panic!("the server did not start: {line:?}, {status:?}");
        };
        let url = url.to_owned();
        Self { child, url, client: reqwest::Client::new(), _stdout: stdout }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("the URL ends with a port")
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The HTTP client that the methods below use.
    pub fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let status = Command::new("kill").arg(self.pid().to_string()).status().expect("kill runs");
        assert!(status.success());
    }

    /// Sends SIGHUP: keys and certificates are read again.
    pub fn hang_up(&self) {
        let status = Command::new("kill").args(["-HUP", &self.pid().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for the process to end by itself.
    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().expect("the server can be waited for")
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Status and body of a `POST` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response =
            self.client.post(format!("{}{path}", self.url)).json(body).send().await.expect("a response");
        let status = response.status().as_u16();
        (status, response.json().await.expect("a JSON body"))
    }

    /// The body of a `POST` that must succeed.
    pub async fn post_ok(&self, path: &str, body: &Value) -> Value {
        let (status, body) = self.post(path, body).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// Status and text of a `GET`.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.expect("a response");
        (response.status().as_u16(), response.text().await.expect("a body"))
    }

    /// A streamed `POST`, open.
    pub async fn open_stream(&self, path: &str, body: &Value) -> reqwest::Response {
        let response =
            self.client.post(format!("{}{path}", self.url)).json(body).send().await.expect("a response");
        assert_eq!(response.status(), 200);
        response
    }

    /// All events of a streamed `POST`; the last one must be `[DONE]`, which is left out.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = self.open_stream(path, body).await.bytes_stream().eventsource();
        let mut chunks = Vec::new();
        while let Some(event) = events.next().await {
            let event = event.expect("a well-formed event");
            if event.data == "[DONE]" {
                assert!(events.next().await.is_none(), "nothing follows [DONE]");
                return chunks;
            }
            chunks.push(serde_json::from_str(&event.data).expect("JSON data"));
        }
        panic!("the stream ended without [DONE]: {chunks:?}");
    }

    /// The sum of all series of a metric whose line contains every one of `labels`.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let values = self.series(name, labels).await;
        assert!(!values.is_empty(), "no series of {name} with {labels:?}");
        values.iter().sum()
    }

    /// As [`Self::metric`], for series that appear with their first count.
    pub async fn metric_or_zero(&self, name: &str, labels: &[&str]) -> f64 {
        self.series(name, labels).await.iter().sum()
    }

    async fn series(&self, name: &str, labels: &[&str]) -> Vec<f64> {
        let (status, text) = self.get("/metrics").await;
        assert_eq!(status, 200);
        let series = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        series.map(|line| line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number")).collect()
    }

    /// Polls until the metric equals `value`; the bound only ends a test that would hang.
    pub async fn until_metric(&self, name: &str, labels: &[&str], value: f64) {
        let reached = async {
            while self.metric_or_zero(name, labels).await != value {
                tokio::task::yield_now().await;
            }
        };
        let bound = tokio::time::timeout(Duration::from_secs(60), reached).await;
        assert!(bound.is_ok(), "{name} {labels:?} did not reach {value}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended already; then both calls fail, and that is fine.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The text of all chat deltas of choice `index`.
pub fn chat_text(chunks: &[Value], index: u64) -> String {
    choices(chunks, index).filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

/// The finish reason of choice `index`.
pub fn finish_reason(chunks: &[Value], index: u64) -> String {
    let reasons: Vec<&str> =
        choices(chunks, index).filter_map(|choice| choice["finish_reason"].as_str()).collect();
    assert_eq!(reasons.len(), 1, "exactly one finish reason");
    reasons[0].to_owned()
}

fn choices(chunks: &[Value], index: u64) -> impl Iterator<Item = &Value> {
    chunks
        .iter()
        .filter_map(|chunk| chunk["choices"].as_array())
        .flatten()
        .filter(move |choice| choice["index"] == index)
}

/// A Python interpreter with the packages of `requirements` (a file of pinned versions), in a
/// virtual environment under the target folder that is made once.
pub fn python(requirements: &Path) -> PathBuf {
    let pinned = std::fs::read_to_string(requirements).expect("the requirements can be read");
    let name =
        requirements.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned();
    let folder = repository().join("target/python").join(name);
    let (interpreter, stamp) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == pinned) {
        return interpreter;
    }
    let run = |program: &Path, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).status().expect("python runs");
        assert!(status.success(), "{} {arguments:?} failed", program.display());
    };
    run(Path::new("python3"), &["-m", "venv", "--clear", &folder.to_string_lossy()]);
    run(&interpreter, &["-m", "pip", "install", "--quiet", "-r", &requirements.to_string_lossy()]);
    std::fs::write(&stamp, pinned).expect("the stamp can be written");
    interpreter
}

/// A folder with the packages of `project` (a folder with `package.json` and its lock file), installed
/// under the target folder once.
pub fn node_modules(project: &Path) -> PathBuf {
    let read = |name: &str| std::fs::read_to_string(project.join(name)).expect("the project can be read");
    let (manifest, lock) = (read("package.json"), read("package-lock.json"));
    let folder = repository().join("target/node").join(project.file_name().expect("a folder"));
    let stamp = folder.join("installed");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == lock) {
        return folder;
    }
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    std::fs::write(folder.join("package.json"), manifest).expect("the manifest can be written");
    std::fs::write(folder.join("package-lock.json"), &lock).expect("the lock file can be written");
    let status = Command::new("npm")
        .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"])
        .current_dir(&folder)
        .status()
        .expect("npm runs");
    assert!(status.success(), "npm ci failed");
    std::fs::write(&stamp, lock).expect("the stamp can be written");
    folder
}
