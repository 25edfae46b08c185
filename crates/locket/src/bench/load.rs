//! The load: which requests are sent when, and what became of them.

use std::{
    cell::Cell,
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::future::join_all;
use rand::{SeedableRng, rngs::StdRng};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    arrivals,
    client::{Completed, Endpoint, Failure, Target},
    memory::{MemorySource, PeakMemory},
    prompts::{Lengths, PromptMaker},
    report::{self, Header},
    stats::Summary,
};

/// Arguments of the load generator.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// Server to load, with or without /v1 at the end. Plain HTTP only.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Served model name; without it the first one of /v1/models.
    #[arg(long)]
    model: Option<String>,
    /// Key sent as a bearer token.
    #[arg(long)]
    api_key: Option<String>,
    /// Route to load.
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    endpoint: Endpoint,
    /// Closed loop: this many clients, each sending its next request when the last one ended.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// Open loop: requests per second, with the random gaps of a Poisson process, however slow the
    /// server answers.
    #[arg(long, conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Requests that are measured.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    num_requests: u32,
    /// Requests before these, of the same kind, that are not measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    warmup: u32,
    /// Tokens of the rendered prompt, the template's included: a number, or MIN:MAX drawn uniformly.
    #[arg(long, default_value = "200", value_name = "N|MIN:MAX")]
    prompt_tokens: Lengths,
    /// Tokens to generate: a number, or MIN:MAX drawn uniformly.
    #[arg(long, default_value = "128", value_name = "N|MIN:MAX")]
    output_tokens: Lengths,
    /// Do not send `ignore_eos`. For servers that refuse the field; answers may then end early.
    #[arg(long)]
    no_ignore_eos: bool,
    /// JSON object whose fields are added to every request.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    extra_body: String,
    /// Model file or folder whose tokenizer counts prompt tokens, for servers without /tokenize.
    #[arg(long, value_name = "PATH")]
    tokenizer_model: Option<PathBuf>,
    /// A request fails after this many seconds.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout_s: u64,
    /// Process id of a server on this machine, whose peak memory is read from the kernel; without it
    /// memory is read from /metrics, if there.
    #[arg(long)]
    pid: Option<u32>,
}

/// One request to be sent.
#[derive(Debug)]
struct Planned {
    prompt: String,
    prompt_tokens: usize,
    output_tokens: usize,
}

type Outcome<'p> = (&'p Planned, Result<Completed, Failure>);

/// What was asked.
#[derive(Debug, Serialize)]
pub(super) struct Inputs {
    pub url: String,
    pub model: String,
    pub endpoint: Endpoint,
    /// `closed` or `open`.
    pub arrivals: &'static str,
    /// Clients of the closed loop.
    pub concurrency: Option<u32>,
    /// Rate of the open loop.
    pub requests_per_s: Option<f64>,
    pub num_requests: u32,
    pub warmup: u32,
    pub prompt_tokens: String,
    pub output_tokens: String,
    pub ignore_eos: bool,
    pub extra_body: Map<String, Value>,
    pub timeout_s: u64,
    pub seed: u64,
    /// How prompts got their length.
    pub prompt_tokens_counted_by: &'static str,
}

/// What was measured. Times are in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    /// From the first request to the end of the last one.
    pub duration_s: f64,
    pub requests_ok: usize,
    pub requests_failed: usize,
    pub errors: BTreeMap<String, ErrorCount>,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub requests_per_s: f64,
    pub output_tokens_per_s: f64,
    pub total_tokens_per_s: f64,
    /// From sending a request to its first text.
    pub time_to_first_token_ms: Option<Summary>,
    /// Gaps between neighbouring chunks, of all requests together.
    pub chunk_gap_ms: Option<Summary>,
    /// Per request: time from first to last text, divided by its tokens but one.
    pub time_per_output_token_ms: Option<Summary>,
    pub end_to_end_ms: Option<Summary>,
    pub peak_memory: Option<PeakMemory>,
    pub checks: Checks,
}

/// Failed requests of one kind.
#[derive(Debug, Default, Serialize)]
pub(super) struct ErrorCount {
    pub count: usize,
    /// The first one's message.
    pub example: String,
}

/// Where the server's counts and ours differ. All are numbers of requests.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Checks {
    /// No usage was sent; chunks were counted as tokens.
    pub without_usage: usize,
    /// The prompt was not as long as asked.
    pub prompt_length_differs: usize,
    /// The answer was not as long as asked.
    pub output_length_differs: usize,
    /// More chunks with text than tokens in the usage: one of them is wrong.
    pub more_chunks_than_tokens: usize,
}

/// Everything about one run.
#[derive(Debug, Serialize)]
pub(super) struct LoadReport {
    #[serde(flatten)]
    pub header: Header,
    pub inputs: Inputs,
    pub results: Results,
}

/// Sends the load and measures it.
pub(super) async fn run(args: &LoadArgs, seed: u64) -> anyhow::Result<LoadReport> {
    if let Some(rate) = args.rate {
        ensure!(rate.is_finite() && rate > 0.0, "--rate is {rate}, but must be above 0");
    }
    let target = connect(args).await?;
    let mut maker = PromptMaker::calibrate(&target, args.tokenizer_model.as_deref()).await?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut planned = Vec::new();
    for _ in 0..args.warmup + args.num_requests {
        let prompt_tokens = args.prompt_tokens.sample(&mut rng);
        let prompt = maker.make(&mut rng, prompt_tokens).await?;
        planned.push(Planned { prompt, prompt_tokens, output_tokens: args.output_tokens.sample(&mut rng) });
    }
    let (warmup, measured) = planned.split_at(args.warmup as usize);
    closed_loop(&target, warmup, args.concurrency as usize).await;

    let memory = args.pid.map_or(MemorySource::Metrics, MemorySource::Process);
    let start = Instant::now();
    let work = async {
        let outcomes = match args.rate {
            Some(rate) => open_loop(&target, measured, rate, seed).await,
            None => closed_loop(&target, measured, args.concurrency as usize).await,
        };
        (outcomes, start.elapsed())
    };
    let ((outcomes, duration), peak_memory) = memory.watch(&target, work).await;
    Ok(LoadReport {
        header: report::header("load"),
        results: summarise(&outcomes, duration, peak_memory),
        inputs: inputs(args, &target, seed, maker.counted_by()),
    })
}

fn inputs(args: &LoadArgs, target: &Target, seed: u64, prompt_tokens_counted_by: &'static str) -> Inputs {
    Inputs {
        url: target.base_url.clone(),
        model: target.model.clone(),
        endpoint: args.endpoint,
        arrivals: if args.rate.is_some() { "open" } else { "closed" },
        concurrency: args.rate.is_none().then_some(args.concurrency),
        requests_per_s: args.rate,
        num_requests: args.num_requests,
        warmup: args.warmup,
        prompt_tokens: args.prompt_tokens.to_string(),
        output_tokens: args.output_tokens.to_string(),
        ignore_eos: !args.no_ignore_eos,
        extra_body: target.extra_body.clone(),
        timeout_s: args.timeout_s,
        seed,
        prompt_tokens_counted_by,
    }
}

/// Builds the client and asks the server for its model unless one was named.
async fn connect(args: &LoadArgs) -> anyhow::Result<Target> {
    let url = args.url.trim_end_matches('/');
    let base_url = url.strip_suffix("/v1").unwrap_or(url);
    ensure!(base_url.starts_with("http://"), "--url is {url}, but must start with http:// (no TLS here)");
    let mut extra_body: Map<String, Value> = serde_json::from_str(&args.extra_body)
        .with_context(|| format!("--extra-body is {}, but must be a JSON object", args.extra_body))?;
    if !args.no_ignore_eos {
        extra_body.entry("ignore_eos").or_insert(Value::Bool(true));
    }
    locket_server::serve::install_provider();
    let mut target = Target {
        // A proxy between the ruler and what it measures would be measured too. Connections are not
        // kept, because servers close idle ones at will, which would be counted as failures.
        http: reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(0).build()?,
        base_url: base_url.to_owned(),
        api_key: args.api_key.clone(),
        model: args.model.clone().unwrap_or_default(),
        endpoint: args.endpoint,
        extra_body,
        timeout: Duration::from_secs(args.timeout_s),
    };
    if args.model.is_none() {
        target.model = first_model(&target).await?;
    }
    Ok(target)
}

async fn first_model(target: &Target) -> anyhow::Result<String> {
    let asking = || format!("asking {}/v1/models for a model; --model names one", target.base_url);
    let response = target.request(reqwest::Method::GET, "/v1/models").send().await.with_context(asking)?;
    let models: Value =
        response.error_for_status().with_context(asking)?.json().await.with_context(asking)?;
    match models["data"][0]["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => bail!("{}: the list is empty", asking()),
    }
}

/// Each of `concurrency` clients sends the next request as soon as its last one ended.
async fn closed_loop<'p>(target: &Target, planned: &'p [Planned], concurrency: usize) -> Vec<Outcome<'p>> {
    let next = Cell::new(0);
    let client = || async {
        let mut outcomes = Vec::new();
        while let Some(plan) = planned.get(next.replace(next.get() + 1)) {
            outcomes.push((plan, target.stream(&plan.prompt, plan.output_tokens).await));
        }
        outcomes
    };
    join_all((0..concurrency.min(planned.len())).map(|_| client())).await.into_iter().flatten().collect()
}

/// Requests leave at the times of a Poisson process, whatever became of the earlier ones.
async fn open_loop<'p>(target: &Target, planned: &'p [Planned], rate: f64, seed: u64) -> Vec<Outcome<'p>> {
    let start = tokio::time::Instant::now();
    let times = arrivals::poisson(rate, planned.len(), seed);
    join_all(planned.iter().zip(times).map(|(plan, at)| async move {
        tokio::time::sleep_until(start + at).await;
        (plan, target.stream(&plan.prompt, plan.output_tokens).await)
    }))
    .await
}

fn summarise(outcomes: &[Outcome<'_>], duration: Duration, peak_memory: Option<PeakMemory>) -> Results {
    let mut errors: BTreeMap<String, ErrorCount> = BTreeMap::new();
    let mut checks = Checks::default();
    let (mut prompt_tokens, mut output_tokens, mut requests_ok) = (0, 0, 0);
    let (mut first, mut gaps, mut per_token, mut end_to_end) = (vec![], vec![], vec![], vec![]);
    for (plan, outcome) in outcomes {
        let completed = match outcome {
            Ok(completed) => completed,
            Err(failure) => {
                let entry = errors.entry(failure.kind.clone()).or_default();
                if entry.count == 0 {
                    entry.example.clone_from(&failure.message);
                }
                entry.count += 1;
                continue;
            }
        };
        requests_ok += 1;
        let tokens = match completed.usage {
            Some(usage) => {
                checks.prompt_length_differs += usize::from(usage.prompt_tokens != plan.prompt_tokens);
                checks.more_chunks_than_tokens += usize::from(completed.chunks > usage.completion_tokens);
                prompt_tokens += usage.prompt_tokens;
                usage.completion_tokens
            }
            None => {
                checks.without_usage += 1;
                prompt_tokens += plan.prompt_tokens;
                completed.chunks
            }
        };
        checks.output_length_differs += usize::from(tokens != plan.output_tokens);
        output_tokens += tokens;
        first.push(millis(completed.first_token));
        end_to_end.push(millis(completed.end_to_end));
        gaps.extend(completed.chunk_gaps.iter().copied().map(millis));
        if tokens > 1 {
            per_token.push(millis(completed.decode) / (tokens - 1) as f64);
        }
    }
    let duration_s = duration.as_secs_f64();
    Results {
        duration_s,
        requests_ok,
        requests_failed: outcomes.len() - requests_ok,
        errors,
        prompt_tokens,
        output_tokens,
        requests_per_s: requests_ok as f64 / duration_s,
        output_tokens_per_s: output_tokens as f64 / duration_s,
        total_tokens_per_s: (prompt_tokens + output_tokens) as f64 / duration_s,
        time_to_first_token_ms: Summary::of(first),
        chunk_gap_ms: Summary::of(gaps),
        time_per_output_token_ms: Summary::of(per_token),
        end_to_end_ms: Summary::of(end_to_end),
        peak_memory,
        checks,
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests;
