//! Images in a prompt: rows whose embeddings are given, at positions of their own.
//!
//! The engine knows nothing of pixels. An image is a range of the prompt's rows; what was dropped before
//! the decoder is no row and takes no slot, but leaves a gap between positions.

use std::{ops::Range, sync::Arc};

use locket_model::{LayerDrops, ModelConfig};

use crate::GenerationRequest;

/// Rows of a prompt that are one image's.
#[derive(Debug, Clone, PartialEq)]
pub struct VisualSpan {
    /// Rows of the prompt, at least one. Their ids are not looked up, but must be in the vocabulary.
    pub rows: Range<u32>,
    /// Embeddings `[rows, hidden_size]`.
    pub embeddings: Arc<[f32]>,
    /// Position of each row, ascending, counted from that of the image's first.
    pub offsets: Arc<[u32]>,
    /// Positions that the image takes: what comes next is so many behind its first.
    pub run: u32,
    /// Names what the rows are: image, plan and whatever else embeddings and offsets depend on. Two spans of
    /// one key must be the same. [`Self::drops`] need not be in it.
    pub key: u128,
    /// What leaves inside the decoder; `None`: nothing.
    pub drops: Option<Arc<LayerDrops>>,
}

/// Position of the token that is number `at` of a sequence that begins with a prompt with these images.
pub(crate) fn position(spans: &[VisualSpan], at: u32) -> u32 {
    let mut position = at;
    for span in spans.iter().take_while(|span| span.rows.start <= at) {
        match span.offsets.get((at - span.rows.start) as usize) {
            Some(&offset) if at < span.rows.end => position = position - (at - span.rows.start) + offset,
            _ => position += span.run - span.rows.len() as u32,
        }
    }
    position
}

/// The parts of `rows` of a prompt that are images', and their images.
pub(crate) fn overlapping(
    spans: &[VisualSpan],
    rows: Range<u32>,
) -> impl Iterator<Item = (Range<u32>, &VisualSpan)> {
    spans.iter().filter_map(move |span| {
        let part = span.rows.start.max(rows.start)..span.rows.end.min(rows.end);
        (!part.is_empty()).then_some((part, span))
    })
}

/// Checks the images of a request; returns how many positions its prompt takes.
pub(crate) fn check(request: &GenerationRequest, model: &ModelConfig) -> Result<u32, String> {
    let prompt = request.prompt_ids.len();
    let (mut next, mut gaps) = (0, 0u64);
    for (idx, span) in request.visual.iter().enumerate() {
        let VisualSpan { rows, embeddings, offsets, run, .. } = span;
        let refuse = |reason: String| Err(format!("image {idx} of the prompt {reason}"));
        if rows.is_empty() || rows.start < next || rows.end as usize > prompt {
            return refuse(format!(
                "has rows {}..{}, expected from {next} to {prompt}",
                rows.start, rows.end
            ));
        }
        if embeddings.len() != rows.len() * model.hidden_size {
            let width = model.hidden_size;
            return refuse(format!("has {} numbers for {} rows of {width}", embeddings.len(), rows.len()));
        }
        let in_order = offsets.is_sorted_by(|a, b| a < b) && offsets.last().is_some_and(|last| last < run);
        if offsets.len() != rows.len() || !in_order {
            return refuse(format!("has offsets that do not ascend below {run}, one for each of its rows"));
        }
        if let Some(drops) = &span.drops
            && let Err(error) = drops.check(rows.len(), model.num_layers)
        {
            return refuse(format!("cannot be: {error}"));
        }
        next = rows.end;
        gaps += u64::from(*run) - rows.len() as u64;
    }
    u32::try_from(prompt as u64 + gaps)
        .ok()
        .filter(|&span| span < u32::MAX - 1)
        .ok_or_else(|| format!("the prompt takes {} positions", prompt as u64 + gaps))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An image of which the rows at `offsets` of `run` were kept; its numbers follow from `key`.
    pub(crate) fn span(start: u32, offsets: &[u32], run: u32, key: u128, hidden_size: usize) -> VisualSpan {
        let rows = start..start + offsets.len() as u32;
        let numbers = (0..rows.len() * hidden_size).map(|i| (key as usize * 31 + i) as f32 * 0.001);
        let embeddings = numbers.collect::<Vec<f32>>().into();
        VisualSpan { rows, embeddings, offsets: offsets.into(), run, key, drops: None }
    }

    #[test]
    fn positions_leave_out_what_was_dropped() {
        let spans = [span(2, &[0, 3, 7], 9, 1, 2), span(6, &[1, 2], 4, 2, 2)];
        let positions: Vec<u32> = (0..11).map(|at| position(&spans, at)).collect();
        assert_eq!(positions, [0, 1, 2, 5, 9, 11, 13, 14, 16, 17, 18]);
        let parts: Vec<Range<u32>> = overlapping(&spans, 3..7).map(|(rows, _)| rows).collect();
        assert_eq!(parts, [3..5, 6..7]);
        assert_eq!(position(&[], 5), 5);
    }
}
