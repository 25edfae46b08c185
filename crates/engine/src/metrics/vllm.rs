//! Series that vLLM's own boards read and that say little new here.

use prometheus::{Histogram, IntCounter, IntCounterVec, Opts};

use crate::{EngineConfig, EngineFacts, sequence::Sequence};

use super::{Made, Maker};

/// Bounds of the histogram of `n`.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Counters and histograms. Clones share them.
#[derive(Clone)]
pub(super) struct VllmMetrics {
    prompt_by_source: IntCounterVec,
    prompt_cached: IntCounter,
    max_generation: Histogram,
    choices: Histogram,
    computed: Histogram,
}

impl VllmMetrics {
    /// `tokens` are the bounds of token counts.
    pub(super) fn register(
        make: &Maker<'_>,
        config: &EngineConfig,
        facts: &EngineFacts,
        tokens: &[f64],
    ) -> Made<Self> {
        register_constants(make, config, facts)?;
        Ok(Self {
            prompt_by_source: make.counters(
                "vllm:prompt_tokens_by_source_total",
                "Prompt tokens by where their keys and values came from.",
                "source",
                &["local_compute", "local_cache_hit", "external_kv_transfer"],
            )?,
            prompt_cached: make
                .counter("vllm:prompt_tokens_cached_total", "Prompt tokens whose prefill was skipped.")?,
            max_generation: make.histogram(
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of the longest continuation; here, of each.",
                tokens,
            )?,
            choices: make.histogram("vllm:request_params_n", "The parameter n by request.", &CHOICES)?,
            computed: make.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens that were run and not taken from a snapshot, by sequence.",
                tokens,
            )?,
        })
    }

    /// A prompt is in its block.
    pub(super) fn prefilled(&self, prompt_tokens: usize, cached_tokens: u32) {
        let cached = u64::from(cached_tokens);
        let computed = (prompt_tokens as u64).saturating_sub(cached);
        self.prompt_by_source.with_label_values(&["local_compute"]).inc_by(computed);
        self.prompt_by_source.with_label_values(&["local_cache_hit"]).inc_by(cached);
        self.prompt_cached.inc_by(cached);
    }

    /// A sequence with so many generated tokens has ended.
    pub(super) fn ended(&self, sequence: &Sequence, num_generated: usize) {
        self.max_generation.observe(num_generated as f64);
        self.computed.observe(f64::from(sequence.prompt_len().saturating_sub(sequence.cached_tokens)));
        if sequence.choice == 0 {
            self.choices.observe(f64::from(sequence.request.n));
        }
    }
}

/// Series that never move after start.
fn register_constants(make: &Maker<'_>, config: &EngineConfig, facts: &EngineFacts) -> Made<()> {
    // Nothing is ever preempted; dashboards read this name.
    make.counter("vllm:num_preemptions_total", "Always 0: nothing is preempted.")?;
    let state = |name: &str, value| {
        let options = make.options("vllm:engine_sleep_state", "Always awake: there is no sleep mode.");
        make.gauge_of(options.const_label("sleep_state", name)).map(|gauge| gauge.set(value))
    };
    state("awake", 1.0)?;
    state("weights_offloaded", 0.0)?;
    state("discard_all", 0.0)?;
    make.gauge_of(cache_config(make, config, facts))?.set(1.0);
    Ok(())
}

/// Slots as vLLM tells them: blocks of the largest size whose product is the number of all slots, rounded
/// down.
fn cache_config(make: &Maker<'_>, config: &EngineConfig, facts: &EngineFacts) -> Opts {
    let classes = &facts.cache.classes;
    let largest = classes.last().map_or(1, |class| class.capacity);
    let slots: u64 = classes.iter().map(|class| u64::from(class.capacity) * u64::from(class.blocks)).sum();
    let has_snapshots = config.snapshot_memory_bytes > 0;
    make.options("vllm:cache_config_info", "Settings of the cache in vLLM's words; the value is 1.")
        .const_label("block_size", largest.to_string())
        .const_label("num_gpu_blocks", (slots / u64::from(largest.max(1))).to_string())
        .const_label("cache_dtype", facts.cache.slot_type.name())
        .const_label("enable_prefix_caching", if has_snapshots { "True" } else { "False" })
}
