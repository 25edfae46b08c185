//! How many rows a step may have, from how long rows have taken.

use std::time::Duration;

use crate::config::CHUNK_ROWS;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

/// Bounds the inter-token gap: while something decodes, a step gets as many rows as fit into the
/// target time at the measured speed.
#[derive(Debug)]
pub(crate) struct RowBudget {
    target_s: f64,
    max_rows: usize,
    seconds_per_row: Option<f64>,
}

impl RowBudget {
    pub(crate) fn new(target: Duration, max_rows: usize) -> Self {
        Self { target_s: target.as_secs_f64(), max_rows, seconds_per_row: None }
    }

    /// Learns from a finished step. Steps of fewer than 16 rows say little about the cost of a
    /// row (reading the weights costs the same for one row as for several) and are left out.
    pub(crate) fn observe(&mut self, rows: usize, took: Duration) {
        if rows < CHUNK_ROWS {
            return;
        }
        let newest = took.as_secs_f64() / rows as f64;
        self.seconds_per_row = Some(match self.seconds_per_row {
            Some(average) => average + NEWEST * (newest - average),
            None => newest,
        });
    }

    /// Rows of the next step, decode rows included: all when nothing decodes, otherwise what fits
    /// into the target, between 16 and the maximum.
    pub(crate) fn rows(&self, decode_rows: usize) -> usize {
        match self.seconds_per_row {
            Some(seconds) if decode_rows > 0 && seconds > 0.0 => {
                ((self.target_s / seconds) as usize).clamp(CHUNK_ROWS.min(self.max_rows), self.max_rows)
            }
            _ => self.max_rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_measured_time() {
        let mut budget = RowBudget::new(Duration::from_millis(50), 512);
        assert_eq!(budget.rows(4), 512, "nothing measured");
        budget.observe(100, Duration::from_millis(100));
        assert_eq!(budget.rows(4), 50);
        assert_eq!(budget.rows(0), 512, "nobody waits for a token");
        budget.observe(1, Duration::from_secs(1));
        assert_eq!(budget.rows(4), 50, "a single row says nothing");
        for _ in 0..100 {
            budget.observe(64, Duration::from_secs(10));
        }
        assert_eq!(budget.rows(4), 16, "never below one chunk");
        for _ in 0..100 {
            budget.observe(64, Duration::from_micros(1));
        }
        assert_eq!(budget.rows(4), 512);
    }
}
