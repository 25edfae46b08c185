//! What operators see. Each name is explained in `docs/metrics.md`; a test keeps that true.
//!
//! The `vllm:` series have vLLM's names, labels and bucket bounds, so that dashboards and
//! autoscalers made for it work here. Counts are by sequence: `n: 3` counts three, its prompt
//! once.

use std::time::Duration;

use locket_model::MemoryUse;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Registry,
};

use crate::{
    EngineConfig, EngineFacts, FinishReason,
    block_pool::BlockPool,
    sequence::{End, Sequence},
};

mod maker;
mod memory;
mod snapshots;
mod steering;
mod vllm;
mod waiting;

use maker::{Made, Maker, one_two_five};
use memory::MemoryMetrics;
pub(crate) use snapshots::SnapshotMetrics;
pub(crate) use steering::SteeringMetrics;
use vllm::VllmMetrics;
pub(crate) use waiting::Queue;
use waiting::WaitingMetrics;

const TIME_TO_FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const INTER_TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_TIME: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const STEP_TIME: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0];

/// What kind of rows a step had.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepFacts {
    /// Rows of prompts.
    pub prefill_rows: usize,
    /// Sequences that decoded.
    pub decode_rows: usize,
    /// Tokens sampled.
    pub sampled: usize,
    /// Duration of model and sampler.
    pub took: Duration,
}

/// All series of the engine. Clones share them.
#[derive(Clone)]
pub(crate) struct EngineMetrics {
    num_running: Gauge,
    cache_usage: Gauge,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    time_per_output_token: Histogram,
    e2e: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_tokens: Histogram,
    iteration_tokens: Histogram,
    success: IntCounterVec,
    slots: IntGaugeVec,
    blocks: IntGaugeVec,
    step_seconds: HistogramVec,
    batch_rows: Histogram,
    rejections: IntCounterVec,
    non_finite: IntCounter,
    step_failures: IntCounter,
    folded_tokens: IntCounter,
    exact: IntCounterVec,
    memory: MemoryMetrics,
    waiting: WaitingMetrics,
    vllm: VllmMetrics,
    snapshots: SnapshotMetrics,
    steering: SteeringMetrics,
}

impl EngineMetrics {
    /// Registers all series; those with a fixed set of label values appear at once, as zeros.
    pub(crate) fn register(registry: &Registry, config: &EngineConfig, facts: &EngineFacts) -> Made<Self> {
        let labels = [("model_name", config.model_name.as_str()), ("engine", "0")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let make = Maker::new(registry, labels);
        let tokens = one_two_five(facts.model.max_position);
        register_pools(&make, facts.memory)?;
        let step_options = HistogramOpts {
            common_opts: make.options("locket_step_seconds", "Duration of a step."),
            buckets: STEP_TIME.into(),
        };
        let step_seconds = make.register(HistogramVec::new(step_options, &["kind"]))?;
        ["prefill", "decode", "mixed"].iter().for_each(|kind| drop(step_seconds.with_label_values(&[kind])));
        Ok(Self {
            num_running: make.gauge("vllm:num_requests_running", "Sequences that own a block.")?,
            cache_usage: make.gauge("vllm:kv_cache_usage_perc", "Share of slots taken, 0 to 1.")?,
            prompt_tokens: make
                .counter("vllm:prompt_tokens_total", "Prompt tokens, cached ones included.")?,
            generation_tokens: make.counter("vllm:generation_tokens_total", "Tokens generated.")?,
            time_to_first_token: make.histogram(
                "vllm:time_to_first_token_seconds",
                "From submission to the first token.",
                &TIME_TO_FIRST_TOKEN,
            )?,
            inter_token: make.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a sequence.",
                &INTER_TOKEN,
            )?,
            time_per_output_token: make.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first, by sequence.",
                &INTER_TOKEN,
            )?,
            e2e: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "From submission to the end.",
                &REQUEST_TIME,
            )?,
            queue_time: make.histogram(
                "vllm:request_queue_time_seconds",
                "From submission to the first step.",
                &REQUEST_TIME,
            )?,
            prefill_time: make.histogram(
                "vllm:request_prefill_time_seconds",
                "From the first step to the first token.",
                &REQUEST_TIME,
            )?,
            decode_time: make.histogram(
                "vllm:request_decode_time_seconds",
                "From the first token to the last.",
                &REQUEST_TIME,
            )?,
            inference_time: make.histogram(
                "vllm:request_inference_time_seconds",
                "From the first step to the last token.",
                &REQUEST_TIME,
            )?,
            request_prompt_tokens: make.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens by sequence.",
                &tokens,
            )?,
            request_generation_tokens: make.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens by sequence.",
                &tokens,
            )?,
            request_max_tokens: make.histogram(
                "vllm:request_params_max_tokens",
                "The parameter max_tokens by sequence.",
                &tokens,
            )?,
            iteration_tokens: make.histogram(
                "vllm:iteration_tokens_total",
                "Prompt and generated tokens of a step.",
                &STEP_TOKENS,
            )?,
            success: make.counters(
                "vllm:request_success_total",
                "Sequences that ended, by reason.",
                "finished_reason",
                &["stop", "length", "abort", "error"],
            )?,
            slots: make.register(IntGaugeVec::new(
                make.options("locket_slots", "Slots per layer and head: all, in owned blocks, filled."),
                &["state"],
            ))?,
            blocks: make.register(IntGaugeVec::new(
                make.options("locket_blocks", "Blocks by class (slots per block) and state."),
                &["class", "state"],
            ))?,
            step_seconds,
            batch_rows: make.histogram("locket_batch_rows", "Rows of a step.", &STEP_TOKENS)?,
            rejections: make.counters(
                "locket_rejections_total",
                "Requests that were not accepted, by reason.",
                "reason",
                &["queue_full", "does_not_fit", "not_exact", "shutting_down", "dead"],
            )?,
            non_finite: make
                .counter("locket_non_finite_logits_total", "Sequences ended by NaN or infinity.")?,
            step_failures: make
                .counter("locket_step_failures_total", "Steps that ended in an internal error.")?,
            folded_tokens: make
                .counter("locket_folded_tokens_total", "Tokens that some layer folded, when they end.")?,
            exact: make.counters(
                "locket_exact_sequences_total",
                "Sequences with a result, by whether nothing of them was folded.",
                "exact",
                &["true", "false"],
            )?,
            memory: MemoryMetrics::register(&make, &facts.cache)?,
            waiting: WaitingMetrics::register(&make, config)?,
            vllm: VllmMetrics::register(&make, config, facts, &tokens)?,
            snapshots: SnapshotMetrics::register(&make)?,
            steering: SteeringMetrics::register(&make)?,
        })
    }

    /// Those of the snapshots.
    pub(crate) fn snapshots(&self) -> &SnapshotMetrics {
        &self.snapshots
    }

    /// Those of the steering.
    pub(crate) fn steering(&self) -> &SteeringMetrics {
        &self.steering
    }

    /// A request was refused.
    pub(crate) fn rejected(&self, reason: &str) {
        self.rejections.with_label_values(&[reason]).inc();
    }

    /// A step was refused by the model or panicked.
    pub(crate) fn step_failed(&self) {
        self.step_failures.inc();
    }

    /// A sequence's logits were not finite.
    pub(crate) fn non_finite_logits(&self) {
        self.non_finite.inc();
    }

    /// A prompt is in its block, `cached_tokens` of it by a snapshot, the rest by being run.
    pub(crate) fn prefilled(&self, prompt_tokens: usize, cached_tokens: u32) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.vllm.prefilled(prompt_tokens, cached_tokens);
    }

    /// A sequence was worked on for the first time.
    pub(crate) fn started(&self, queue_time: Duration) {
        self.queue_time.observe(queue_time.as_secs_f64());
    }

    /// A token was sampled for `sequence`, whose times are those before it.
    pub(crate) fn sampled(&self, sequence: &Sequence, now: Duration) {
        self.generation_tokens.inc();
        match sequence.times.last_token {
            Some(last) => self.inter_token.observe(now.saturating_sub(last).as_secs_f64()),
            None => {
                let waited = now.saturating_sub(sequence.times.arrived);
                self.time_to_first_token.observe(waited.as_secs_f64());
            }
        }
    }

    /// A step is over.
    pub(crate) fn step(&self, step: StepFacts) {
        let kind = match (step.prefill_rows, step.decode_rows) {
            (_, 0) => "prefill",
            (0, _) => "decode",
            _ => "mixed",
        };
        self.step_seconds.with_label_values(&[kind]).observe(step.took.as_secs_f64());
        self.batch_rows.observe((step.prefill_rows + step.decode_rows) as f64);
        self.iteration_tokens.observe((step.prefill_rows + step.sampled) as f64);
    }

    /// A running sequence has ended.
    pub(crate) fn ended(&self, sequence: &Sequence, end: End, now: Duration) {
        self.ended_waiting(end);
        let times = sequence.times;
        let num_generated = sequence.output_ids.len() + usize::from(is_stop(end));
        self.e2e.observe(now.saturating_sub(times.arrived).as_secs_f64());
        self.request_prompt_tokens.observe(f64::from(sequence.prompt_len()));
        self.request_generation_tokens.observe(num_generated as f64);
        self.request_max_tokens.observe(f64::from(sequence.request.max_tokens));
        self.vllm.ended(sequence, num_generated);
        self.memory.ended(sequence);
        self.folded_tokens.inc_by(u64::from(sequence.folded_tokens.saturating_sub(sequence.folded_before)));
        if matches!(end, End::Finished(_) | End::Satisfied) {
            let is_exact = if sequence.folded_tokens == 0 { "true" } else { "false" };
            self.exact.with_label_values(&[is_exact]).inc();
        }
        if let (Some(started), Some(first), Some(last)) = (times.started, times.first_token, times.last_token)
        {
            let decode = last.saturating_sub(first).as_secs_f64();
            self.prefill_time.observe(first.saturating_sub(started).as_secs_f64());
            self.decode_time.observe(decode);
            self.inference_time.observe(last.saturating_sub(started).as_secs_f64());
            if num_generated > 1 {
                self.time_per_output_token.observe(decode / (num_generated - 1) as f64);
            }
        }
    }

    /// A sequence has ended; used alone for one that never ran.
    pub(crate) fn ended_waiting(&self, end: End) {
        let reason = match end {
            End::Finished(FinishReason::Stop { .. } | FinishReason::Complete) | End::Satisfied => "stop",
            End::Finished(FinishReason::Length) => "length",
            End::Aborted => "abort",
            End::Failed(_) => "error",
        };
        self.success.with_label_values(&[reason]).inc();
    }

    /// Sets the gauges to the state between two steps.
    pub(crate) fn set_state(&self, running: &[Sequence], queue: &Queue<'_>, pool: &BlockPool) {
        self.num_running.set(running.len() as f64);
        self.waiting.set(queue);
        self.cache_usage.set(usage(pool));
        self.steering.set_waiting(running.iter().filter(|sequence| sequence.awaits_guide()).count());
        let filled: u64 = running
            .iter()
            .map(|sequence| u64::from(sequence.num_cached.min(sequence.request.cache.capacity())))
            .sum();
        self.memory.set_state(running, filled, pool);
        self.slots.with_label_values(&["total"]).set(pool.slots_total() as i64);
        self.slots.with_label_values(&["reserved"]).set(pool.slots_taken() as i64);
        self.slots.with_label_values(&["used"]).set(filled as i64);
        for (capacity, blocks, free) in pool.classes() {
            let class = capacity.to_string();
            self.blocks.with_label_values(&[class.as_str(), "free"]).set(i64::from(free));
            self.blocks.with_label_values(&[class.as_str(), "used"]).set(i64::from(blocks - free));
        }
    }
}

/// What was allocated at start.
fn register_pools(make: &Maker<'_>, memory: MemoryUse) -> Made<()> {
    let bytes = make.register(GaugeVec::new(
        make.options("locket_memory_bytes", "Bytes that the model holds, by pool."),
        &["pool"],
    ))?;
    for (pool, held) in
        [("weights", memory.weights), ("workspace", memory.workspace), ("cache", memory.cache)]
    {
        bytes.with_label_values(&[pool]).set(held as f64);
    }
    Ok(())
}

fn is_stop(end: End) -> bool {
    matches!(end, End::Finished(FinishReason::Stop { .. }))
}

/// Share of slots in owned blocks, 0 to 1.
pub(crate) fn usage(pool: &BlockPool) -> f64 {
    pool.slots_taken() as f64 / pool.slots_total().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_model::FakeModel;
    use locket_model::Model;

    #[test]
    fn every_series_is_in_the_documentation() {
        let registry = Registry::new();
        let model = FakeModel::new(&[(64, 2)], 64);
        let config = EngineConfig { model_name: "tiny".into(), ..EngineConfig::default() };
        let metrics = EngineMetrics::register(&registry, &config, &EngineFacts::of(&model)).unwrap();
        let queue = Queue { waiting: &[], num_waiting: 0, is_crowded: false, now: Duration::ZERO };
        metrics.set_state(&[], &queue, &BlockPool::new(model.cache_plan()));
        let documentation = include_str!("../../../docs/metrics.md");
        let families = registry.gather();
        assert_eq!(families.len(), 59);
        for family in families {
            let entry = format!("| `{}` |", family.name());
            assert!(documentation.contains(&entry), "{} is not in docs/metrics.md", family.name());
            for metric in family.get_metric() {
                let label = |name| metric.get_label().iter().find(|l| l.name() == name).map(|l| l.value());
                assert_eq!((label("model_name"), label("engine")), (Some("tiny"), Some("0")));
            }
        }
    }
}
