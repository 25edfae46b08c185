//! Negative log likelihood of held-out text, by document and by position.
//!
//! The position of a prediction is that of the row that makes it: row `p` predicts token `p + 1`.
//! Early rows are the same for every cache, so what is compared is [`Perplexity::nll`], the mean from
//! position [`late_from`] on.

use locket_model::TokenScore;
use serde::Serialize;

use crate::statistics::Mean;

/// Positions per entry of [`DocumentNll::by_position`].
pub const BIN: usize = 1024;

/// Position from which predictions count: 1,024, and in texts below 8,192 tokens an eighth of them.
pub fn late_from(context: usize) -> usize {
    (context / 8).min(1024)
}

/// Means over one document.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DocumentNll {
    /// Over the positions from [`late_from`] on, in nats per token.
    pub nll: f64,
    /// Over positions 0 to 1,023, 1,024 to 2,047, …; the last bin may be shorter.
    pub by_position: Vec<f64>,
}

/// A stretch of positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// First position.
    pub from: usize,
    /// One past the last position.
    pub to: usize,
    /// Mean over all documents, in nats per token.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
}

/// Perplexity of one method over all documents.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean over all documents from position [`Self::late_from`] on, in nats per token.
    pub nll: f64,
    /// Standard error of that mean over documents. It is dominated by how documents differ; methods
    /// are compared by the paired differences.
    pub nll_standard_error: f64,
    /// See [`late_from`].
    pub late_from: usize,
    /// Positions 0 to 1K, 1K to 2K, 2K to 4K, 4K to 8K, … up to the context.
    pub buckets: Vec<Bucket>,
    /// Each document, in the order of the report's documents.
    pub documents: Vec<DocumentNll>,
}

impl Perplexity {
    /// From the scores of every token but the first of each document; all are equally long.
    pub fn of(documents: &[Vec<TokenScore>]) -> Self {
        let rows = documents.first().map_or(0, Vec::len);
        let late_from = late_from(rows + 1);
        let per_document: Vec<DocumentNll> = documents
            .iter()
            .map(|scores| DocumentNll {
                nll: mean(scores.get(late_from..).unwrap_or_default()),
                by_position: scores.chunks(BIN).map(mean).collect(),
            })
            .collect();
        let late = Mean::of(per_document.iter().map(|document| document.nll));
        let bucket = |(from, to): (usize, usize)| {
            let of_document = |scores: &Vec<TokenScore>| mean(scores.get(from..to).unwrap_or_default());
            let nll = Mean::of(documents.iter().map(of_document)).mean;
            Bucket { from, to, nll, perplexity: nll.exp() }
        };
        Self {
            perplexity: late.mean.exp(),
            nll: late.mean,
            nll_standard_error: late.standard_error,
            late_from,
            buckets: bounds(rows).into_iter().map(bucket).collect(),
            documents: per_document,
        }
    }
}

fn mean(scores: &[TokenScore]) -> f64 {
    scores.iter().map(|score| f64::from(score.nll)).sum::<f64>() / scores.len() as f64
}

/// 0 to 1K, then doubling, the last cut at `rows`.
fn bounds(rows: usize) -> Vec<(usize, usize)> {
    let mut bounds = Vec::new();
    let (mut from, mut to) = (0, BIN);
    while from < rows {
        bounds.push((from, to.min(rows)));
        (from, to) = (to, 2 * to);
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(nlls: impl IntoIterator<Item = f32>) -> Vec<TokenScore> {
        nlls.into_iter().map(|nll| TokenScore { nll, best: 0 }).collect()
    }

    #[test]
    fn buckets_double() {
        assert_eq!(bounds(8191), [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8191)]);
        assert_eq!(bounds(1024), [(0, 1024)]);
        assert_eq!(bounds(1025), [(0, 1024), (1024, 1025)]);
        assert_eq!(bounds(100), [(0, 100)]);
        assert_eq!(
            [late_from(32_768), late_from(8192), late_from(4096), late_from(80)],
            [1024, 1024, 512, 10]
        );
    }

    /// By hand: 4,096 tokens have 4,095 predictions; 1 nat below position 1,024 and 3 nats from there
    /// on. Of the late ones (from 512 on) 512 are 1 and 3,071 are 3.
    #[test]
    fn means_by_hand() {
        let step = || scores((0..4095).map(|row| if row < 1024 { 1.0 } else { 3.0 }));
        let flat = scores(std::iter::repeat_n(2.0, 4095));
        let perplexity = Perplexity::of(&[step(), flat]);
        let late = (512.0 + 3.0 * 3071.0) / 3583.0;
        assert!((perplexity.documents[0].nll - late).abs() < 1e-12);
        assert!((perplexity.nll - (late + 2.0) / 2.0).abs() < 1e-12);
        assert!((perplexity.perplexity - perplexity.nll.exp()).abs() < 1e-12);
        assert_eq!(perplexity.documents[0].by_position, [1.0, 3.0, 3.0, 3.0]);
        let buckets: Vec<_> = perplexity.buckets.iter().map(|b| (b.from, b.to, b.nll)).collect();
        assert_eq!(buckets, [(0, 1024, 1.5), (1024, 2048, 2.5), (2048, 4095, 2.5)]);
    }
}
