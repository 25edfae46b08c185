//! The result of a visual evaluation, as JSON.
//!
//! Schema `locket-eval-vqa/1`, beside the caller's header:
//!
//! - `inputs`: what was asked, with defaults filled in;
//! - `kinds`: questions by kind of page;
//! - `results`: one entry per row ([`Entry`]): accuracy over all questions and by kind, tokens of an image that
//!   go into the decoder, mean tokens per layer, bytes of their keys and values, times, and each question's
//!   score. An entry that failed has the reason;
//! - `paired`: every row against the rows of the methods asked for, at the same budget or without one
//!   ([`Comparison`]), question by question. Differences are this minus the other.
//!
//! Questions are in one order everywhere, so that anything else can be computed from the file. Questions of
//! one page share its image: standard errors are of questions, not of pages.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use crate::{
    Error,
    picture::{Chart, Point},
    statistics::{Better, Mean, Paired},
    vqa::Row,
};

const MEBIBYTE: f64 = (1u64 << 20) as f64;

/// Everything about one visual evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct VqaReport {
    /// What was asked.
    pub inputs: VqaInputs,
    /// Questions by kind of page.
    pub kinds: BTreeMap<String, usize>,
    /// One entry per row.
    pub results: Vec<Entry>,
    /// Paired comparisons of accuracies.
    pub paired: Vec<Comparison>,
}

/// What was asked, as far as entries do not say it themselves.
#[derive(Debug, Clone, Serialize)]
pub struct VqaInputs {
    /// Fingerprint of the checkpoint.
    pub checkpoint: String,
    /// Most frequent type of its matrices.
    pub quantization: String,
    /// Where the vision model came from.
    pub vision: String,
    /// The adapter of sequences with images, if there is one.
    pub adapter: Option<String>,
    /// The file of pages.
    pub pages: String,
    /// Pages that were read.
    pub num_pages: usize,
    /// Layers of the decoder.
    pub layers: usize,
    /// Number type of the cache's slots.
    pub slot_type: &'static str,
    /// Name of the backend.
    pub backend: String,
    /// Threads, 0 for all physical cores.
    pub threads: usize,
    /// Pages on which times were measured, alone and one after the other.
    pub timed_pages: usize,
    /// Sequences that decoded together when throughput was measured.
    pub decode_batch: u32,
}

/// One row.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// As it was asked for.
    pub name: String,
    /// Its method, or `blind`.
    pub method: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Share of questions whose whole answer is right, its end included.
    pub accuracy: Mean,
    /// Share of an answer's tokens that are right before the first wrong one, mean over questions.
    pub right_tokens: Mean,
    /// Accuracy by kind of page.
    pub by_kind: BTreeMap<String, Mean>,
    /// Tokens of an image that go into the decoder, mean over questions.
    pub tokens_in: f64,
    /// Tokens of an image in a layer, mean over layers and questions.
    pub tokens_per_layer: f64,
    /// Bytes of slots that an image's tokens reserve: as many in each layer as go in.
    pub reserved_bytes: f64,
    /// Bytes of slots that they fill after the prompt.
    pub filled_bytes: f64,
    /// Milliseconds, if times were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
    /// Each question.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub questions: Vec<Answered>,
    #[serde(skip)]
    pub(crate) row: Row,
}

/// How long things took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// Milliseconds of tower, projector and plan.
    pub encode_ms: Mean,
    /// Milliseconds of the prompt in the decoder.
    pub prefill_ms: Mean,
    /// Milliseconds from the image's pixels to the first token: the sum of both, for one request alone.
    pub first_token_ms: Mean,
    /// Tokens per second of several sequences that decode together, if it was measured.
    pub decode_tokens_per_s: Option<f64>,
}

/// One question's score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Answered {
    /// Whether the whole answer is right, its end included.
    pub exact: bool,
    /// Share of its tokens before the first wrong one.
    pub right: f32,
}

/// One row's accuracy against another's.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The row.
    pub name: String,
    /// The other row.
    pub against: String,
    /// The comparison.
    #[serde(flatten)]
    pub paired: Paired,
}

impl Entry {
    /// An entry without results.
    pub(crate) fn new(row: &Row) -> Self {
        let none = Mean { mean: 0.0, standard_error: 0.0 };
        Self {
            name: row.name.clone(),
            method: row.method(),
            failed: None,
            accuracy: none,
            right_tokens: none,
            by_kind: BTreeMap::new(),
            tokens_in: 0.0,
            tokens_per_layer: 0.0,
            reserved_bytes: 0.0,
            filled_bytes: 0.0,
            times: None,
            questions: Vec::new(),
            row: row.clone(),
        }
    }

    /// Summarises the questions, whose kinds are `kinds`.
    pub(crate) fn summarise(&mut self, kinds: &[String]) {
        let exact = |answered: &Answered| f64::from(u8::from(answered.exact));
        self.accuracy = Mean::of(self.questions.iter().map(exact));
        self.right_tokens = Mean::of(self.questions.iter().map(|answered| f64::from(answered.right)));
        let mut by_kind: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (kind, answered) in kinds.iter().zip(&self.questions) {
            by_kind.entry(kind.clone()).or_default().push(exact(answered));
        }
        self.by_kind = by_kind.into_iter().map(|(kind, values)| (kind, Mean::of(values))).collect();
    }

    pub(crate) fn has_run(&self) -> bool {
        self.failed.is_none() && !self.questions.is_empty()
    }
}

/// Compares every row with those of the methods `against`: of the same budget where both have one.
pub(crate) fn compare(entries: &[Entry], against: &[String]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    let values = |entry: &Entry| -> Vec<f64> {
        entry.questions.iter().map(|answered| f64::from(u8::from(answered.exact))).collect()
    };
    for other in against {
        for entry in entries.iter().filter(|entry| entry.has_run()) {
            let is_partner = |candidate: &&Entry| {
                let budgets = (candidate.row.budget(), entry.row.budget());
                let fits = match budgets {
                    (Some(theirs), Some(ours)) => theirs == ours,
                    (None, _) => true,
                    (Some(_), None) => false,
                };
                candidate.method == other && candidate.name != entry.name && candidate.has_run() && fits
            };
            // The plain form of a method, if there are several.
            let partner = entries.iter().filter(is_partner).min_by_key(|candidate| candidate.name.len());
            let Some(partner) = partner else { continue };
            let paired = Paired::of(&values(entry), &values(partner), Better::Higher);
            comparisons.extend(paired.map(|paired| Comparison {
                name: entry.name.clone(),
                against: partner.name.clone(),
                paired,
            }));
        }
    }
    comparisons
}

impl fmt::Display for VqaReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let questions: usize = self.kinds.values().sum();
        writeln!(
            out,
            "{questions} questions about {} pages; right is a greedy answer that is right as a \
             whole, its end included",
            self.inputs.num_pages
        )?;
        let names = self.results.iter().map(|entry| entry.name.len()).max().unwrap_or(0).max(6);
        write!(
            out,
            "\n{:<names$}{:>7}{:>7}{:>8}{:>8}{:>10}{:>10}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "row",
            "right",
            "error",
            "tokens",
            "in",
            "per layer",
            "MiB kept",
            "filled",
            "tower",
            "prefill",
            "first ms",
            "tok/s"
        )?;
        for kind in self.kinds.keys() {
            write!(out, "{kind:>9}")?;
        }
        writeln!(out)?;
        for entry in &self.results {
            if let Some(reason) = &entry.failed {
                writeln!(out, "{:<names$}    failed: {reason}", entry.name)?;
                continue;
            }
            write!(
                out,
                "{:<names$}{:>7.3}{:>7.3}{:>8.3}{:>8.0}{:>10.1}{:>10.2}{:>10.2}",
                entry.name,
                entry.accuracy.mean,
                entry.accuracy.standard_error,
                entry.right_tokens.mean,
                entry.tokens_in,
                entry.tokens_per_layer,
                entry.reserved_bytes / MEBIBYTE,
                entry.filled_bytes / MEBIBYTE,
            )?;
            match &entry.times {
                Some(times) => {
                    let rate =
                        times.decode_tokens_per_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
                    let Times { encode_ms, prefill_ms, first_token_ms, .. } = times;
                    let (encode, prefill, first) = (encode_ms.mean, prefill_ms.mean, first_token_ms.mean);
                    write!(out, "{encode:>9.1}{prefill:>9.1}{first:>9.1}{rate:>9}")?;
                }
                None => write!(out, "{:>9}{:>9}{:>9}{:>9}", "-", "-", "-", "-")?,
            }
            for kind in self.kinds.keys() {
                write!(out, "{:>9.3}", entry.by_kind.get(kind).map_or(f64::NAN, |mean| mean.mean))?;
            }
            writeln!(out)?;
        }
        write_paired(out, &self.paired, names)
    }
}

fn write_paired(out: &mut fmt::Formatter<'_>, paired: &[Comparison], names: usize) -> fmt::Result {
    if paired.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\npaired, question by question: mean of (row - other), its standard error, wins : losses"
    )?;
    for Comparison { name, against, paired } in paired {
        let (wins, p_t) = (paired.tally(), paired.p_t_shown());
        writeln!(
            out,
            "{name:<names$}  {against:<names$}{:>9.4}{:>8.4}{wins:>14}{p_t:>10}{:>10.1e}",
            paired.mean_difference, paired.standard_error, paired.p_sign
        )?;
    }
    Ok(())
}

/// Draws accuracy, time to the first token and memory over tokens as an SVG document.
///
/// # Errors
/// [`Error::Picture`] if nothing has run, or the drawing library's reason.
pub fn draw(report: &VqaReport) -> Result<String, Error> {
    let entries: Vec<&Entry> = report.results.iter().filter(|entry| entry.has_run()).collect();
    type Value = fn(&Entry) -> Option<f64>;
    let first_token: Value = |entry| Some(entry.times?.first_token_ms.mean);
    let charts: [(&str, &'static str, Value, Value); 4] = [
        (
            "right answers",
            "tokens of the image that go in",
            |entry| Some(entry.accuracy.mean),
            |entry| Some(entry.tokens_in),
        ),
        (
            "right answers",
            "tokens per layer",
            |entry| Some(entry.accuracy.mean),
            |entry| Some(entry.tokens_per_layer),
        ),
        ("ms to the first token", "tokens per layer", first_token, |entry| Some(entry.tokens_per_layer)),
        (
            "MiB of slots filled",
            "tokens of the image that go in",
            |entry| Some(entry.filled_bytes / MEBIBYTE),
            |entry| Some(entry.tokens_in),
        ),
    ];
    let chart = |(title, x_label, y, x): (&str, &'static str, Value, Value)| Chart {
        title: title.to_owned(),
        x_label,
        points: entries
            .iter()
            .filter_map(|entry| {
                Some(Point { series: entry.row.series(), x: x(entry)?.max(1.0), y: y(entry)? })
            })
            .collect(),
    };
    let charts: Vec<Chart> = charts.into_iter().map(chart).filter(|chart| !chart.points.is_empty()).collect();
    crate::picture::draw_charts(&charts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, right: [bool; 4], tokens: f64) -> Entry {
        let mut entry = Entry::new(&name.parse().unwrap());
        entry.questions = right.map(|exact| Answered { exact, right: f32::from(u8::from(exact)) }).to_vec();
        entry.tokens_in = tokens;
        entry.tokens_per_layer = tokens;
        entry.summarise(&["form", "form", "sign", "sign"].map(str::to_owned));
        entry
    }

    fn report() -> VqaReport {
        let results = vec![
            entry("none", [true, true, true, false], 1008.0),
            entry("hired@0.2", [true, false, true, false], 201.0),
            entry("hired:compat@0.2", [true, false, false, false], 196.0),
            entry("random@0.2", [false, false, true, false], 201.0),
            entry("random@0.1", [false, false, false, false], 100.0),
        ];
        let paired = compare(&results, &["none".into(), "random".into()]);
        VqaReport {
            inputs: VqaInputs {
                checkpoint: String::new(),
                quantization: String::new(),
                vision: String::new(),
                adapter: None,
                pages: String::new(),
                num_pages: 2,
                layers: 30,
                slot_type: "f16",
                backend: String::new(),
                threads: 0,
                timed_pages: 0,
                decode_batch: 1,
            },
            kinds: [("form".to_owned(), 2), ("sign".to_owned(), 2)].into(),
            results,
            paired,
        }
    }

    #[test]
    fn rows_are_compared_at_their_budget() {
        let report = report();
        let pairs: Vec<(&str, &str, f64)> = report
            .paired
            .iter()
            .map(|one| (one.name.as_str(), one.against.as_str(), one.paired.mean_difference))
            .collect();
        assert!(pairs.contains(&("hired@0.2", "none", -0.25)));
        assert!(pairs.contains(&("hired@0.2", "random@0.2", 0.25)));
        assert!(pairs.contains(&("random@0.1", "none", -0.75)));
        assert!(
            !pairs.iter().any(|pair| pair.1 == "random@0.1" || (pair.0, pair.1) == ("none", "random@0.2"))
        );
    }

    #[test]
    fn every_row_is_shown_and_drawn() {
        let report = report();
        let text = report.to_string();
        for needle in ["4 questions about 2 pages", "hired@0.2", "form", "sign", "0:2/4", "1008"] {
            assert!(text.contains(needle), "{needle}: {text}");
        }
        let svg = draw(&report).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("hired:compat") && svg.contains("right answers"));
        assert!(!svg.contains("ms to the first token"));
        assert!((report.results[0].by_kind["sign"].mean - 0.5).abs() < 1e-9);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["results"][1]["questions"][0]["exact"], true);
    }
}
