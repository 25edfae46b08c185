//! The load generator against a small server whose every answer is known. Its tokens are words.

use std::{collections::HashSet, rc::Rc, sync::Mutex};

use clap::Parser;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::bench::BenchArgs;

/// Tokens that the fake template adds to every prompt.
const TEMPLATE_TOKENS: usize = 5;

#[derive(Debug, Default)]
struct FakeServer {
    /// Whether it has `/tokenize`.
    tokenizes: bool,
    /// Every how many streams the answer is 503; 0 is never.
    refuse_every: usize,
    /// Every how many streams the answer ends without `[DONE]`; 0 is never.
    cut_every: usize,
    /// Prompts of streamed requests, in order of arrival.
    prompts: Mutex<Vec<String>>,
}

impl FakeServer {
    /// Status and body for one request.
    fn answer(&self, path: &str, body: &str) -> (u16, String) {
        let body: Value = serde_json::from_str(body).unwrap_or_default();
        match path {
            "/v1/models" => (200, json!({"data": [{"id": "fake"}]}).to_string()),
            "/tokenize" if self.tokenizes => {
                let count = body["prompt"].as_str().unwrap_or_default().split_whitespace().count();
                (200, json!({"count": count, "tokens": vec![1; count]}).to_string())
            }
            "/metrics" => (200, "process_resident_memory_bytes 5.0e+06\n".into()),
            "/v1/chat/completions" => {
                self.complete(body["messages"][0]["content"].as_str().unwrap(), "delta", &body)
            }
            "/v1/completions" => self.complete(body["prompt"].as_str().unwrap(), "text", &body),
            _ => (404, json!({"error": {"message": "no such route"}}).to_string()),
        }
    }

    fn complete(&self, prompt: &str, field: &str, body: &Value) -> (u16, String) {
        assert_eq!(body["ignore_eos"], true);
        let max_tokens = body["max_tokens"].as_u64().unwrap();
        let prompt_tokens = TEMPLATE_TOKENS + prompt.split_whitespace().count();
        let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens});
        if body["stream"] != true {
            return (200, json!({"choices": [], "usage": usage}).to_string());
        }
        let mut prompts = self.prompts.lock().unwrap();
        prompts.push(prompt.to_owned());
        let due = |every: usize| every > 0 && prompts.len().is_multiple_of(every);
        if due(self.refuse_every) {
            return (503, json!({"error": {"message": "too busy"}}).to_string());
        }
        let mut stream = String::new();
        for token in 0..max_tokens {
            let text = if field == "text" { json!("w ") } else { json!({"content": "w "}) };
            let finish = if token + 1 == max_tokens { json!("length") } else { Value::Null };
            let chunk = json!({"choices": [{field: text, "finish_reason": finish}], "usage": null});
            stream += &format!("data: {chunk}\n\n");
        }
        if !due(self.cut_every) {
            stream += &format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage}));
        }
        (200, stream)
    }

    /// Reads one request, answers it and hangs up.
    async fn serve(&self, mut socket: TcpStream) -> std::io::Result<()> {
        let mut received = Vec::new();
        loop {
            if socket.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&received);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head
                .lines()
                .filter_map(|line| {
                    line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok()
                })
                .next();
            if body.len() < length.unwrap_or(0usize) {
                continue;
            }
            let path = head.split(' ').nth(1).unwrap_or_default();
            let (status, answer) = self.answer(path, body);
            let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n\r\n");
            socket.write_all(head.as_bytes()).await?;
            // In two writes, so that events arrive in pieces.
            let (first, second) = answer.as_bytes().split_at(answer.len() / 2);
            socket.write_all(first).await?;
            socket.flush().await?;
            socket.write_all(second).await?;
            return socket.shutdown().await;
        }
    }
}

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    bench: BenchArgs,
}

/// Runs `locket bench` with these arguments against `server`.
fn bench(server: FakeServer, arguments: &str) -> (Rc<FakeServer>, anyhow::Result<LoadReport>) {
    let server = Rc::new(server);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let report = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap());
        let arguments = ["bench", "--url", &url].into_iter().chain(arguments.split_whitespace());
        let cli = Cli::try_parse_from(arguments).unwrap();
        let tasks = tokio::task::LocalSet::new();
        let serving = Rc::clone(&server);
        tasks.spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let server = Rc::clone(&serving);
                tokio::task::spawn_local(async move { server.serve(socket).await });
            }
        });
        tasks.run_until(run(&cli.bench.load, cli.bench.seed)).await
    });
    (server, report)
}

#[test]
fn closed_loop_counts_every_token_and_repeats_no_prompt() {
    let server = FakeServer { tokenizes: true, ..FakeServer::default() };
    let arguments = "--concurrency 4 --num-requests 12 --prompt-tokens 20:40 --output-tokens 7 --warmup 2";
    let (server, report) = bench(server, arguments);
    let LoadReport { inputs, results, .. } = report.unwrap();
    let prompts = server.prompts.lock().unwrap();
    assert_eq!(prompts.len(), 14);
    assert_eq!(prompts.iter().collect::<HashSet<_>>().len(), 14);
    let measured = &prompts[2..];
    let tokens: usize =
        measured.iter().map(|prompt| prompt.split_whitespace().count() + TEMPLATE_TOKENS).sum();
    assert_eq!((results.requests_ok, results.requests_failed), (12, 0));
    assert_eq!((results.prompt_tokens, results.output_tokens), (tokens, 12 * 7));
    assert_eq!(results.checks, Checks::default());
    assert_eq!(results.time_to_first_token_ms.unwrap().count, 12);
    assert_eq!(results.chunk_gap_ms.unwrap().count, 12 * 6);
    assert_eq!(results.peak_memory.unwrap().peak_bytes, 5_000_000);
    assert_eq!((inputs.model.as_str(), inputs.arrivals), ("fake", "closed"));
    assert_eq!(inputs.prompt_tokens_counted_by, "the server's /tokenize");
}

#[test]
fn open_loop_without_tokenize_is_calibrated_by_usage() {
    let arguments =
        "--rate 2000 --num-requests 10 --prompt-tokens 64 --output-tokens 3 --endpoint completions --seed 5";
    let (server, report) = bench(FakeServer::default(), arguments);
    let LoadReport { inputs, results, .. } = report.unwrap();
    assert_eq!(server.prompts.lock().unwrap().len(), 11);
    assert_eq!(results.prompt_tokens, 640);
    assert_eq!(results.checks, Checks::default());
    assert_eq!((inputs.arrivals, inputs.requests_per_s, inputs.concurrency), ("open", Some(2000.0), None));
}

#[test]
fn failures_are_counted_by_kind() {
    let server = FakeServer { refuse_every: 5, cut_every: 4, ..FakeServer::default() };
    let arguments = "--concurrency 3 --num-requests 20 --warmup 0 --output-tokens 2";
    let (_, report) = bench(server, arguments);
    let results = report.unwrap().results;
    // Of 20 streams 4 are refused; 5 would be cut, but the 20th is refused before.
    assert_eq!((results.requests_ok, results.requests_failed), (12, 8));
    assert_eq!((results.errors["http_503"].count, results.errors["cut_off"].count), (4, 4));
    assert_eq!(results.errors["http_503"].example, "too busy");
}

#[test]
fn a_prompt_must_be_longer_than_the_template() {
    let server = FakeServer { tokenizes: true, ..FakeServer::default() };
    let (_, report) = bench(server, "--prompt-tokens 5");
    let message = report.unwrap_err().to_string();
    assert!(message.contains("--prompt-tokens 5") && message.contains("adds 5 tokens"), "{message}");
}

#[test]
fn json_has_inputs_machine_and_results() {
    let (_, report) = bench(FakeServer::default(), "--num-requests 3 --output-tokens 4");
    let report = report.unwrap();
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((json["schema"].as_str(), json["kind"].as_str()), (Some("locket-bench/1"), Some("load")));
    assert!(json["machine"]["cores"].as_u64().unwrap() >= 1);
    assert_eq!(json["inputs"]["prompt_tokens"], "200");
    assert_eq!(json["inputs"]["extra_body"], json!({"ignore_eos": true}));
    assert_eq!(json["results"]["output_tokens"], 12);
    for quantity in ["time_to_first_token_ms", "chunk_gap_ms", "time_per_output_token_ms", "end_to_end_ms"] {
        for figure in ["count", "mean", "median", "p90", "p99", "min", "max"] {
            assert!(json["results"][quantity][figure].is_number(), "{quantity}.{figure}");
        }
    }
    let table = report.to_string();
    assert!(table.contains("time per output token") && table.contains("3 ok, 0 failed"), "{table}");
}

#[test]
fn arguments_of_the_two_kinds_do_not_mix() {
    let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.bench);
    assert!(parse("bench --offline --batch-sizes 1,2 model.gguf").is_ok_and(|args| args.offline));
    assert!(parse("bench --offline --rate 2").is_err());
    assert!(parse("bench --batch-sizes 1").is_err());
    assert!(parse("bench model.gguf").is_err());
    assert!(parse("bench --rate 2 --concurrency 2").is_err());
}
