//! `/metrics` tells what happened: exact counts after known requests, vLLM's names and ours.

use locket_tests::Server;
use serde_json::json;

#[tokio::test]
async fn counters_add_up() {
    let server = Server::start(&[]);
    let body = json!({
        "model": "smollm2", "max_tokens": 5, "ignore_eos": true, "temperature": 0,
        "messages": [{"role": "user", "content": "Hello there"}],
    });
    let mut prompt_tokens = 0.0;
    for _ in 0..3 {
        let response = server.post_ok("/v1/chat/completions", &body).await;
        prompt_tokens += response["usage"]["prompt_tokens"].as_f64().unwrap();
    }
    let model = "model_name=\"smollm2\"";
    assert_eq!(server.metric("vllm:prompt_tokens_total", &[model]).await, prompt_tokens);
    assert_eq!(server.metric("vllm:generation_tokens_total", &[model]).await, 15.0);
    assert_eq!(server.metric("vllm:request_success_total", &["finished_reason=\"length\""]).await, 3.0);
    for histogram in [
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
    ] {
        assert_eq!(server.metric(&format!("{histogram}_count"), &[model]).await, 3.0, "{histogram}");
    }
    assert_eq!(server.metric("vllm:inter_token_latency_seconds_count", &[model]).await, 12.0);
    assert_eq!(server.metric("vllm:num_requests_running", &[model]).await, 0.0);
    assert_eq!(server.metric("vllm:num_requests_waiting", &[model]).await, 0.0);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc", &[model]).await, 0.0);
    assert_eq!(server.metric("locket_slots", &["state=\"used\""]).await, 0.0);
    assert!(server.metric("locket_slots", &["state=\"total\""]).await > 0.0);
    assert!(server.metric("locket_memory_bytes", &["pool=\"weights\""]).await > 5e7);
    assert!(server.metric("locket_step_seconds_count", &[]).await >= 15.0);
    assert!(server.metric("process_resident_memory_bytes", &[]).await > 0.0);
    // 30 layers, 3 heads, a key and a value of 64 halves and a position; each last token is not run.
    let full_cache = (prompt_tokens + 12.0) * 23_400.0;
    assert_eq!(server.metric("locket_sequence_full_cache_bytes_sum", &[model]).await, full_cache);
    assert_eq!(server.metric("locket_sequence_cache_bytes_count", &[model]).await, 3.0);
    assert_eq!(server.metric("vllm:request_params_n_sum", &[model]).await, 3.0);
    // Counted when an answer has left, which its reader may see before.
    server.until_metric("http_requests_total", &["method=\"POST\"", "status=\"2xx\""], 3.0).await;
    server.until_metric("locket_http_in_flight", &[], 0.0).await;
}

#[tokio::test]
async fn settings_in_force_and_the_plan_are_told() {
    let server =
        Server::start(&["--cache-method", "window", "--cache-slots", "512", "--cache-require-exact"]);
    let labels = [
        "model_name=\"smollm2\"",
        "cache_method=\"window\"",
        "cache_slots=\"512\"",
        "cache_dtype=\"f16\"",
        "require_exact=\"true\"",
        "quantization=\"Q4_1\"",
    ];
    assert_eq!(server.metric("locket_settings_info", &labels).await, 1.0);
    let planned = server.metric("locket_memory_plan_bytes", &[]).await;
    let budget = server.metric("locket_memory_budget_bytes", &[]).await;
    assert_eq!(budget, f64::from(1 << 30));
    assert!(planned <= budget && planned > budget / 2.0, "{planned}");
    assert_eq!(server.metric("locket_ready", &[]).await, 1.0);
    assert_eq!(server.metric("locket_build_info", &["version="]).await, 1.0);
}

/// A client that sends an answer back finds it, and the series say so.
#[tokio::test]
async fn returning_answers_are_counted() {
    let server = Server::start(&[]);
    let mut messages = vec![json!({"role": "user", "content": "Name a colour."})];
    for (found, missed) in [(0.0, 0.0), (1.0, 0.0)] {
        let body = json!({"model": "smollm2", "max_tokens": 8, "temperature": 0, "messages": messages});
        let answer = server.post_ok("/v1/chat/completions", &body).await;
        let text = answer["choices"][0]["message"]["content"].clone();
        messages.push(json!({"role": "assistant", "content": text}));
        messages.push(json!({"role": "user", "content": "And another?"}));
        assert_eq!(server.metric("locket_turn_lookups_total", &["found"]).await, found);
        assert_eq!(server.metric("locket_turn_lookups_total", &["missed"]).await, missed);
    }
    server.until_metric("locket_turns", &[], 2.0).await;
    assert!(server.metric("locket_turn_bytes", &[]).await > 0.0);
}

#[tokio::test]
async fn an_answer_ended_by_a_stop_string_is_no_abort() {
    let server = Server::start(&[]);
    let body = json!({
        "model": "smollm2", "max_tokens": 200, "ignore_eos": true, "temperature": 0, "stop": [" "],
        "messages": [{"role": "user", "content": "Hello there"}],
    });
    server.post_ok("/v1/chat/completions", &body).await;
    server.until_metric("vllm:request_success_total", &["finished_reason=\"stop\""], 1.0).await;
    assert_eq!(
        server.metric_or_zero("vllm:request_success_total", &["finished_reason=\"abort\""]).await,
        0.0
    );
}

#[tokio::test]
async fn probes_and_version() {
    let server = Server::start(&[]);
    for path in ["/health", "/health/live", "/ping", "/ready", "/health/ready", "/version"] {
        assert_eq!(server.get(path).await.0, 200, "{path}");
    }
    let version: serde_json::Value = serde_json::from_str(&server.get("/version").await.1).unwrap();
    assert!(version["version"].as_str().unwrap().starts_with("0."));
}
