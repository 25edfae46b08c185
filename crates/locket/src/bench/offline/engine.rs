//! The engine alone: closed-loop clients in this process, no tokenizer and no HTTP.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::future::try_join_all;
use locket_engine::{
    EngineConfig, EngineHandle, FinishReason, GenerationRequest, SamplingParams, SequenceEvent,
};
use locket_model::{Model, kv_cache::CacheSettings};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use super::super::stats::quantile;
use crate::config::EngineSettings;

/// Requests that each client sends one after the other: the second is prefilled while others decode.
const REQUESTS_PER_CLIENT: u32 = 2;

/// What every client asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Random ids per prompt.
    pub prompt_tokens: u32,
    /// Tokens per answer; no token ends it earlier.
    pub output_tokens: u32,
    /// Seed of the prompts.
    pub seed: u64,
}

/// One number of clients.
#[derive(Debug, Serialize)]
pub(in crate::bench) struct Engine {
    pub clients: u32,
    pub requests: u32,
    pub output_tokens_per_s: f64,
    /// From submission to the first token.
    pub time_to_first_token_ms_median: f64,
    /// Between neighbouring tokens of one answer.
    pub token_gap_ms_median: Option<f64>,
}

/// When the tokens of one answer came.
#[derive(Debug)]
struct Answer {
    submitted: Instant,
    tokens: Vec<Instant>,
}

/// Starts the engine over `model` with the limits of `settings` and loads it with each number of
/// clients in turn. Every block of `model` must be closed and hold prompt and answer.
pub(super) fn measure(
    model: Box<dyn Model>,
    settings: &EngineSettings,
    clients: &[u32],
    load: Load,
) -> anyhow::Result<Vec<Engine>> {
    let vocab = u32::try_from(model.config().vocab_size).unwrap_or(u32::MAX).max(1);
    let most = clients.iter().copied().max().unwrap_or(1) as usize;
    let config = EngineConfig {
        max_batch_rows: settings.max_batch_rows,
        prefill_chunk: settings.prefill_chunk,
        target_step: settings.target_step,
        max_waiting: most,
        max_running: most,
        queue_timeout: Duration::ZERO,
        ..EngineConfig::default()
    };
    let (engine, thread) = locket_engine::start(model, config, &prometheus::Registry::new())?;
    // One thread for all clients, so that they take little from the engine's.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .context("cannot start the clients' event loop")?;
    let results = clients
        .iter()
        .map(|&clients| {
            let start = Instant::now();
            let work = (0..clients).map(|number| client(&engine, load, vocab, number));
            let answers = runtime.block_on(try_join_all(work))?;
            let duration = start.elapsed();
            Engine::of(clients, &answers.into_iter().flatten().collect::<Vec<_>>(), duration)
        })
        .collect::<anyhow::Result<_>>();
    // Without a handle the engine stops.
    drop(engine);
    thread.join()?;
    results
}

/// One client's requests, each sent when the one before has ended.
async fn client(engine: &EngineHandle, load: Load, vocab: u32, number: u32) -> anyhow::Result<Vec<Answer>> {
    let mut rng = StdRng::seed_from_u64(load.seed ^ (u64::from(number) << 32));
    let mut answers = Vec::new();
    for _ in 0..REQUESTS_PER_CLIENT {
        let prompt_ids = (0..load.prompt_tokens).map(|_| rng.random_range(0..vocab)).collect();
        answers.push(generate(engine, prompt_ids, load.output_tokens).await?);
    }
    Ok(answers)
}

/// Submits one greedy request that nothing but its length ends, and reads its tokens.
async fn generate(engine: &EngineHandle, prompt_ids: Vec<u32>, max_tokens: u32) -> anyhow::Result<Answer> {
    let capacity = u32::try_from(prompt_ids.len()).unwrap_or(u32::MAX).saturating_add(max_tokens);
    let request = GenerationRequest {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerationRequest::new("bench", prompt_ids, max_tokens, CacheSettings::full(capacity))
    };
    let submitted = Instant::now();
    let mut stream = engine.submit(request)?.pop().context("the engine gave no stream")?;
    let mut tokens = Vec::with_capacity(max_tokens as usize);
    while let Some(event) = stream.next().await {
        match event {
            SequenceEvent::Started { .. } | SequenceEvent::Finished { reason: FinishReason::Length, .. } => {}
            SequenceEvent::Token(_) => tokens.push(Instant::now()),
            other => bail!("the engine ended a sequence early: {other:?}"),
        }
    }
    Ok(Answer { submitted, tokens })
}

impl Engine {
    fn of(clients: u32, answers: &[Answer], duration: Duration) -> anyhow::Result<Self> {
        let num_tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
        let firsts = answers.iter().filter_map(|answer| Some(*answer.tokens.first()? - answer.submitted));
        let gaps = answers.iter().flat_map(|answer| answer.tokens.windows(2).map(|pair| pair[1] - pair[0]));
        Ok(Self {
            clients,
            requests: u32::try_from(answers.len()).unwrap_or(u32::MAX),
            output_tokens_per_s: num_tokens as f64 / duration.as_secs_f64(),
            time_to_first_token_ms_median: median_ms(firsts).context("the engine generated nothing")?,
            token_gap_ms_median: median_ms(gaps),
        })
    }
}

fn median_ms(durations: impl Iterator<Item = Duration>) -> Option<f64> {
    let mut values: Vec<f64> = durations.map(|duration| duration.as_secs_f64() * 1e3).collect();
    values.sort_unstable_by(f64::total_cmp);
    quantile(&values, 0.5)
}

/// The table for people.
pub(super) fn write_table(
    out: &mut fmt::Formatter<'_>,
    rows: &[Engine],
    prompt_tokens: u32,
    output_tokens: u32,
) -> fmt::Result {
    writeln!(
        out,
        "\nthe engine alone, closed loop: {prompt_tokens} prompt and {output_tokens} output tokens, medians"
    )?;
    writeln!(out, "{:>8}{:>10}{:>12}{:>12}{:>12}", "clients", "requests", "out tok/s", "TTFT ms", "gap ms")?;
    for Engine {
        clients,
        requests,
        output_tokens_per_s,
        time_to_first_token_ms_median,
        token_gap_ms_median,
    } in rows
    {
        let gap = token_gap_ms_median.map_or_else(|| "-".into(), |ms| format!("{ms:.3}"));
        writeln!(
            out,
            "{clients:>8}{requests:>10}{output_tokens_per_s:>12.1}{time_to_first_token_ms_median:>12.2}{gap:>12}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_clock() {
        let ms = Duration::from_millis;
        let submitted = Instant::now();
        let answer =
            |at: &[u64]| Answer { submitted, tokens: at.iter().map(|&at| submitted + ms(at)).collect() };
        let row = Engine::of(2, &[answer(&[10, 14, 20]), answer(&[30, 35])], ms(500)).unwrap();
        assert_eq!((row.clients, row.requests), (2, 2));
        assert!((row.output_tokens_per_s - 10.0).abs() < 1e-9);
        assert!((row.time_to_first_token_ms_median - 20.0).abs() < 1e-9);
        assert!((row.token_gap_ms_median.unwrap() - 5.0).abs() < 1e-9);
        let single = Engine::of(1, &[answer(&[10])], ms(10)).unwrap();
        assert_eq!(single.token_gap_ms_median, None);
        assert!(Engine::of(1, &[], ms(10)).is_err());
    }
}
