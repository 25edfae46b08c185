//! The result of an evaluation, as JSON.
//!
//! Schema `locket-eval/1`, beside the caller's header:
//!
//! - `inputs`: what was asked, with defaults filled in;
//! - `corpus`: documents read, too short, used, and the `names` of those whose perplexity is measured;
//! - `probes`: per task the depth of each probe's needle, as a share of the text;
//! - `results`: one entry per method, slots and slot type ([`Entry`]): settings, `bytes_per_sequence`,
//!   `perplexity` with buckets by position and one value per document, and per task the accuracy and
//!   likelihood of each probe. An entry that could not run has only `skipped` or `failed`;
//! - `paired`: one entry per metric and pair ([`Comparison`]). Differences are this minus the other;
//!   for likelihoods (`nll`, nats per token) less is better, for accuracies more.
//!
//! Values of documents and probes are in one order everywhere, so that anything else can be computed
//! from the file.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    Configuration, Task,
    perplexity::Perplexity,
    probes::ProbeScore,
    statistics::{Better, Mean, Paired},
};
use locket_model::kv_cache::CacheMethod;

/// Everything about one evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked.
    pub inputs: Inputs,
    /// The text.
    pub corpus: CorpusSummary,
    /// Depth of each probe's needle by task, as a share of the text.
    pub probes: BTreeMap<&'static str, Vec<f32>>,
    /// One entry per configuration.
    pub results: Vec<Entry>,
    /// Paired comparisons.
    pub paired: Vec<Comparison>,
}

/// What was asked, as far as entries do not say it themselves.
#[derive(Debug, Clone, Serialize)]
pub struct Inputs {
    /// Fingerprint of the checkpoint.
    pub checkpoint: String,
    /// Most frequent type of its matrices.
    pub quantization: String,
    /// What describes the side-car, if there is one.
    pub side_car: Option<BTreeMap<String, String>>,
    /// Files of text.
    pub text: Vec<String>,
    /// Tokens of the texts whose perplexity is measured.
    pub context: usize,
    /// Tokens of the probes.
    pub probe_context: usize,
    /// Slots filled between folds.
    pub ring: u32,
    /// What was measured.
    pub tasks: Vec<Task>,
    /// Probes per task.
    pub probes: usize,
    /// Seed of windows and probes.
    pub seed: u64,
}

/// What was read.
#[derive(Debug, Clone, Serialize)]
pub struct CorpusSummary {
    /// Documents in all files.
    pub read: usize,
    /// Documents that were found too short.
    pub too_short: usize,
    /// Documents that haystacks come from.
    pub haystacks: usize,
    /// Documents whose perplexity was measured.
    pub names: Vec<String>,
}

/// One method with one number of slots in one slot type.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Name of the method.
    pub method: &'static str,
    /// `M`; of `full` the longest sequence.
    pub slots: u32,
    /// `B`; 0 for `full`.
    pub ring: u32,
    /// First tokens that always survive.
    pub sinks: u32,
    /// Latest tokens that always survive.
    pub recent: u32,
    /// Share of the recall score, in thousandths.
    pub recall_permille: u16,
    /// Whether layers have shares of their own.
    pub layer_budgets: bool,
    /// Name of the slot type.
    pub slot_type: &'static str,
    /// Name of the backend.
    pub backend: String,
    /// Bytes of one sequence's block: `M + B` slots, keys, values and side arrays.
    pub bytes_per_sequence: u64,
    /// Why it was not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Why it failed while it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Seconds that it took.
    pub seconds: f64,
    /// Perplexity, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    /// Recall by task.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub recall: Vec<Recall>,
}

/// One task of one configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Recall {
    /// The task.
    pub task: Task,
    /// Share of right answer tokens, mean over probes.
    pub accuracy: Mean,
    /// Share of probes whose answer tokens are all right.
    pub exact: Mean,
    /// Nats per answer token, mean over probes.
    pub nll: Mean,
    /// Each probe.
    pub probes: Vec<ProbeScore>,
}

impl Recall {
    /// Summarises the probes of `task`.
    pub fn of(task: Task, probes: Vec<ProbeScore>) -> Self {
        Self {
            task,
            accuracy: Mean::of(probes.iter().map(|probe| f64::from(probe.accuracy))),
            exact: Mean::of(probes.iter().map(|probe| f64::from(u8::from(probe.exact)))),
            nll: Mean::of(probes.iter().map(|probe| f64::from(probe.nll))),
            probes,
        }
    }
}

/// One metric of one configuration against another.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// `perplexity nll`, `passkey accuracy`, `passkey nll`, …
    pub metric: String,
    /// Name of the method.
    pub method: &'static str,
    /// Its slots.
    pub slots: u32,
    /// Its slot type.
    pub slot_type: &'static str,
    /// Name of the other method, at the same slots (unless it is `full`) and slot type.
    pub against: &'static str,
    /// The comparison.
    #[serde(flatten)]
    pub paired: Paired,
}

impl Entry {
    /// An entry without results.
    pub(crate) fn new(configuration: &Configuration, bytes_per_sequence: u64) -> Self {
        let settings = configuration.settings;
        Self {
            method: settings.method.name(),
            slots: settings.slots,
            ring: settings.ring,
            sinks: settings.sinks,
            recent: settings.recent,
            recall_permille: settings.recall_permille,
            layer_budgets: settings.layer_budgets,
            slot_type: configuration.slot_type.name(),
            backend: format!("{:?}", configuration.backend).to_lowercase(),
            bytes_per_sequence,
            skipped: configuration.skipped.clone(),
            failed: None,
            seconds: 0.0,
            perplexity: None,
            recall: Vec::new(),
        }
    }

    /// Whether there are results.
    pub fn has_run(&self) -> bool {
        self.skipped.is_none() && self.failed.is_none()
    }

    /// Whether the entry is of `full`.
    pub(crate) fn is_full(&self) -> bool {
        self.method == CacheMethod::Full.name()
    }

    /// Every metric that is compared: name, value per sample, what is better.
    fn metrics(&self) -> Vec<(String, Vec<f64>, Better)> {
        let mut metrics = Vec::new();
        if let Some(perplexity) = &self.perplexity {
            let values = perplexity.documents.iter().map(|document| document.nll).collect();
            metrics.push(("perplexity nll".to_owned(), values, Better::Lower));
        }
        for Recall { task, probes, .. } in &self.recall {
            let values =
                |of: fn(&ProbeScore) -> f32| probes.iter().map(|probe| f64::from(of(probe))).collect();
            let name = task.name();
            metrics.push((format!("{name} accuracy"), values(|probe| probe.accuracy), Better::Higher));
            metrics.push((format!("{name} nll"), values(|probe| probe.nll), Better::Lower));
        }
        metrics
    }
}

/// Compares every entry with those of the methods `against` at the same slots and slot type.
pub(crate) fn compare(entries: &[Entry], against: &[CacheMethod]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for other in against.iter().map(|method| method.name()) {
        for entry in entries.iter().filter(|entry| entry.method != other) {
            let is_partner = |candidate: &&Entry| {
                candidate.method == other
                    && candidate.slot_type == entry.slot_type
                    && (candidate.slots == entry.slots || candidate.is_full())
            };
            let Some(partner) = entries.iter().find(is_partner) else { continue };
            if entry.is_full() || !entry.has_run() || !partner.has_run() {
                continue;
            }
            for ((metric, these, better), (_, others, _)) in
                entry.metrics().into_iter().zip(partner.metrics())
            {
                comparisons.extend(Paired::of(&these, &others, better).map(|paired| Comparison {
                    metric,
                    method: entry.method,
                    slots: entry.slots,
                    slot_type: entry.slot_type,
                    against: other,
                    paired,
                }));
            }
        }
    }
    comparisons
}
