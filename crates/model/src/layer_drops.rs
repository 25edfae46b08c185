//! Which of an image's tokens leave inside the decoder, and when.
//!
//! A boundary lies before a layer: the tokens that are there are ranked, the worst visual ones leave, and
//! this layer and those behind it go on with fewer (PyramidDrop, arXiv 2410.17247; MustDrop, arXiv
//! 2411.10803). Text never leaves.

use std::sync::Arc;

use crate::Error;

/// Where one image's tokens leave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerDrops {
    /// Boundaries; layers ascend.
    pub boundaries: Vec<Boundary>,
    /// Whether tokens behind a dropped one move up by one position, in the layers that miss it, as
    /// PyramidDrop's release has it. Otherwise every token keeps its position in all layers.
    pub compact: bool,
    /// Whether, once the prompt has run, also the layers between the first boundary and the last lose what
    /// the last one has dropped: MustDrop's third stage. With `n` the last boundary's layer and `f` the
    /// first's, these are layers `f - 1` to `n - 1`: the first ranking has used the attention of layer
    /// `f - 1`. A layer that has folded by then stays as it is.
    pub cut: bool,
}

/// Layers of the decoder from `layer` on go on with fewer tokens of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Boundary {
    /// The first layer that has fewer; at least 1 and below the decoder's depth.
    pub layer: u32,
    /// Which leave.
    pub keep: Keep,
    /// How those that are there are ranked.
    pub rank: Rank,
}

/// How many of an image's tokens pass a boundary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// So many, or all if there are fewer: the best ones; ties go to the earlier token.
    Exactly(u32),
    /// All but those outside the key set whose attention summed over the ranking rows is below `global` of
    /// the sum over all the image's tokens, and below `individual` in every single row.
    Above {
        /// Share of all attention on the image.
        global: f32,
        /// Attention in a row.
        individual: f32,
    },
}

/// What ranks an image's tokens at a boundary: the attention that they receive, softmax over all tokens that
/// are there and not behind the ranking row, averaged over query heads.
#[derive(Debug, Clone, PartialEq)]
pub enum Rank {
    /// From the last prompt token, by the projections of layer [`Boundary::layer`], before that layer runs.
    LastToken,
    /// From the prompt's tokens behind the image that are not an image's, in layer [`Boundary::layer`]` - 1`:
    /// by its sum over these rows, then by its largest.
    TextRows {
        /// Tokens that stay whatever the attention, ascending: indices into the image's rows.
        key_set: Arc<[u32]>,
    },
}

impl LayerDrops {
    /// Checks the plan of an image of `rows` rows for a decoder of `num_layers` layers.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] naming what is wrong.
    pub fn check(&self, rows: usize, num_layers: usize) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::InvalidBatch(reason));
        if !self.boundaries.is_sorted_by(|a, b| a.layer < b.layer) {
            return invalid("layers of boundaries must ascend".into());
        }
        for Boundary { layer, keep, rank } in &self.boundaries {
            if *layer == 0 || *layer as usize >= num_layers {
                return invalid(format!("a boundary before layer {layer} of {num_layers}; 1 is the first"));
            }
            let key_set = match rank {
                Rank::TextRows { key_set } => &key_set[..],
                Rank::LastToken => &[],
            };
            if !key_set.is_sorted_by(|a, b| a < b) || key_set.last().is_some_and(|&key| key as usize >= rows)
            {
                return invalid(format!("a key set must ascend below the image's {rows} rows"));
            }
            match *keep {
                Keep::Exactly(keep) if (keep as usize) < key_set.len() => {
                    return invalid(format!(
                        "a boundary keeps {keep}, fewer than its key set of {}",
                        key_set.len()
                    ));
                }
                Keep::Above { global, individual } if !global.is_finite() || !individual.is_finite() => {
                    return invalid("thresholds must be numbers".into());
                }
                _ => {}
            }
        }
        Ok(())
    }
}
