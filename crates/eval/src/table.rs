//! A report for people: tables of plain text.

use std::fmt;

use crate::{
    Task,
    report::{Comparison, Entry, Recall, Report},
};

const MEBIBYTE: f64 = (1u64 << 20) as f64;

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inputs, corpus, .. } = self;
        writeln!(
            out,
            "{} documents read, {} too short; {} of {} tokens for perplexity, {} for haystacks of {} tokens",
            corpus.read,
            corpus.too_short,
            corpus.names.len(),
            inputs.context,
            corpus.haystacks,
            inputs.probe_context,
        )?;
        writeln!(
            out,
            "ring {}, {} probes per task, seed {}; accuracies are of answer tokens under teacher forcing",
            inputs.ring, inputs.probes, inputs.seed
        )?;
        let entries: Vec<&Entry> = self.results.iter().collect();
        writeln!(out, "\nby method")?;
        write_entries(out, &entries)?;
        let mut slot_types: Vec<&str> = entries.iter().map(|entry| entry.slot_type).collect();
        slot_types.dedup();
        if slot_types.len() > 1 {
            let mut by_bytes = entries;
            by_bytes.sort_by_key(|entry| entry.bytes_per_sequence);
            writeln!(out, "\nby bytes per sequence")?;
            write_entries(out, &by_bytes)?;
        }
        write_paired(out, &self.paired)
    }
}

fn write_entries(out: &mut fmt::Formatter<'_>, entries: &[&Entry]) -> fmt::Result {
    let Some(first) = entries.iter().find(|entry| entry.has_run()) else {
        return entries.iter().try_for_each(|entry| write_skipped(out, entry));
    };
    write!(out, "{:<10}{:>7} {:<5}{:>9}", "method", "slots", "type", "MiB")?;
    if let Some(perplexity) = &first.perplexity {
        write!(out, "{:>9}", "ppl")?;
        for bucket in &perplexity.buckets {
            write!(out, "{:>9}", format!("{}-{}", thousands(bucket.from), thousands(bucket.to)))?;
        }
    }
    for Recall { task, .. } in &first.recall {
        write!(out, "{:>11}{:>7}{:>7}", task.name(), "exact", "nll")?;
    }
    writeln!(out)?;
    for entry in entries {
        if !entry.has_run() {
            write_skipped(out, entry)?;
            continue;
        }
        write_name(out, entry)?;
        write!(out, "{:>9.2}", entry.bytes_per_sequence as f64 / MEBIBYTE)?;
        if let Some(perplexity) = &entry.perplexity {
            write!(out, "{:>9.3}", perplexity.perplexity)?;
            perplexity.buckets.iter().try_for_each(|bucket| write!(out, "{:>9.3}", bucket.perplexity))?;
        }
        for Recall { accuracy, exact, nll, .. } in &entry.recall {
            write!(out, "{:>11.3}{:>7.3}{:>7.3}", accuracy.mean, exact.mean, nll.mean)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_name(out: &mut fmt::Formatter<'_>, entry: &Entry) -> fmt::Result {
    write!(out, "{:<10}{:>7} {:<5}", entry.method, entry.slots, entry.slot_type)
}

fn write_skipped(out: &mut fmt::Formatter<'_>, entry: &Entry) -> fmt::Result {
    write_name(out, entry)?;
    match (&entry.skipped, &entry.failed) {
        (Some(reason), _) => writeln!(out, "    not run: {reason}"),
        (None, reason) => writeln!(out, "    failed: {}", reason.as_deref().unwrap_or_default()),
    }
}

fn write_paired(out: &mut fmt::Formatter<'_>, comparisons: &[Comparison]) -> fmt::Result {
    if comparisons.is_empty() {
        return Ok(());
    }
    writeln!(out, "\npaired, sample by sample: mean of (method - other), its standard error, wins : losses")?;
    writeln!(
        out,
        "{:<22}{:<10}{:>7} {:<5} {:<10}{:>9}{:>8}{:>12}{:>10}{:>10}",
        "metric", "method", "slots", "type", "other", "mean", "error", "wins", "p (t)", "p (sign)"
    )?;
    for Comparison { metric, method, slots, slot_type, against, paired } in comparisons {
        let (wins, p_t) = (paired.tally(), paired.p_t_shown());
        writeln!(
            out,
            "{metric:<22}{method:<10}{slots:>7} {slot_type:<5} {against:<10}{:>9.4}{:>8.4}{wins:>12}{p_t:>10}{:>10.1e}",
            paired.mean_difference, paired.standard_error, paired.p_sign
        )?;
    }
    Ok(())
}

/// 8191 is 8K to a reader.
fn thousands(positions: usize) -> String {
    match positions {
        0..1024 => positions.to_string(),
        _ => format!("{}K", (positions + 1) / 1024),
    }
}

impl fmt::Display for Task {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_rounded_for_reading() {
        assert_eq!([0, 100, 1024, 4096, 8191].map(thousands), ["0", "100", "1K", "4K", "8K"]);
    }
}
