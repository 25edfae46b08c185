//! The fold driver: from scores to moves.

use super::{
    BlockState, CacheMethod, CacheSettings, Rotation, SideCar, SlotType, compaction::Frame, methods::lococo,
};
use crate::Error;

/// A survivor's new place: copy key, value and side arrays of `head` from slot `from` to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotMove {
    /// Key/value head.
    pub head: u32,
    /// Source slot, at or above the number of surviving slots.
    pub from: u32,
    /// Destination slot, below it.
    pub to: u32,
}

/// What a fold did to a layer; the backend brings its keys and values in line.
#[derive(Debug)]
pub enum Fold<'s> {
    /// Survivors move into evicted slots, at most `B` per head.
    Moves(&'s [SlotMove]),
    /// All slots that are left have new contents.
    Rewrite {
        /// Slots per head.
        slots: usize,
        /// `[kv_heads, slots, head_dim]`, rotated.
        keys: &'s [f32],
        /// `[kv_heads, slots, head_dim]`.
        values: &'s [f32],
    },
}

/// Where a method reads keys and values of the layer that folds.
pub trait SlotReader {
    /// Writes the filled slots of `head` as attention sees them, both `[len, head_dim]`; keys are
    /// rotated.
    ///
    /// # Errors
    /// The device's.
    fn read(&self, head: usize, keys: &mut [f32], values: &mut [f32]) -> Result<(), Error>;
}

/// What all folds of a model share.
#[derive(Debug, Clone)]
pub struct FoldContext {
    /// The model's rotary embedding.
    pub rotation: Rotation,
    /// Trained weights, if there are some.
    pub side_car: Option<std::sync::Arc<SideCar>>,
    /// Number type of the slots.
    pub slot_type: SlotType,
}

/// What a method sees of one layer of one block when it ranks.
pub struct LayerView<'a> {
    /// The layer.
    pub layer: usize,
    /// Filled slots of each head.
    pub len: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Rows that the layer has seen.
    pub seen: u32,
    /// Position, in the block's frame, of the row that comes next.
    pub next_position: u32,
    /// How the sequence uses its block.
    pub settings: CacheSettings,
    /// Position in the block's frame of the token in each slot `[kv_heads, stride]`.
    pub positions: &'a [u32],
    /// Positions without a token before the next row's.
    pub num_gaps: u32,
    /// Of these, how many lie before each slot's token `[kv_heads, stride]`; empty: none do.
    pub gaps: &'a [u32],
    /// Side arrays `[columns, kv_heads, stride]`.
    pub columns: &'a [f32],
    /// The layer's other numbers, as the method laid them out.
    pub kept: &'a [f32],
    /// Slots between two heads.
    pub stride: usize,
    /// Keys and values.
    pub slots: &'a dyn SlotReader,
    /// Rotation and trained weights.
    pub context: &'a FoldContext,
}

impl LayerView<'_> {
    /// Position of a slot.
    pub fn position(&self, head: usize, slot: usize) -> u32 {
        self.positions[head * self.stride + slot]
    }

    /// Rows that could see a slot: its own and all later ones.
    pub fn age(&self, head: usize, slot: usize) -> u32 {
        let gaps = self.gaps.get(head * self.stride + slot).copied().unwrap_or(0);
        age(self.next_position - self.position(head, slot).min(self.next_position), self.num_gaps, gaps)
            .max(1)
    }

    /// A side array of a head `[len]`.
    pub fn column(&self, column: usize, head: usize) -> &[f32] {
        &self.columns[(column * self.num_kv_heads + head) * self.stride..][..self.len]
    }

    /// Attention that a slot received per query that could see it, if the first column sums it.
    pub fn mean_received(&self, head: usize, slot: usize) -> f32 {
        let queries = (self.num_heads / self.num_kv_heads) as f32 * self.age(head, slot) as f32;
        self.column(0, head)[slot] / queries
    }
}

/// Rows since a token `distance` positions ago, its own included, with `num_gaps` positions without a
/// token so far of which `before` lie before it.
pub(super) fn age(distance: u32, num_gaps: u32, before: u32) -> u32 {
    // A compaction may leave more gaps behind a token than there are positions; see `compact`.
    (u64::from(distance) + u64::from(before)).saturating_sub(num_gaps.into()) as u32
}

/// Rankings `[kv_heads, len]`; higher survives.
#[derive(Debug, Default)]
pub struct Scores {
    /// The ranking that most slots are kept by.
    pub first: Vec<f32>,
    /// The ranking of a share of the slots; empty if the method has one ranking.
    pub second: Vec<f32>,
}

impl Scores {
    /// Fills the first ranking.
    pub fn fill(&mut self, view: &LayerView<'_>, score: impl Fn(usize, usize) -> f32) {
        fill(&mut self.first, view, score);
    }

    /// Fills the second ranking.
    pub fn fill_second(&mut self, view: &LayerView<'_>, score: impl Fn(usize, usize) -> f32) {
        fill(&mut self.second, view, score);
    }
}

fn fill(scores: &mut Vec<f32>, view: &LayerView<'_>, score: impl Fn(usize, usize) -> f32) {
    scores.clear();
    for head in 0..view.num_kv_heads {
        scores.extend((0..view.len).map(|slot| score(head, slot)));
    }
}

/// Buffers of the fold driver, shared by all blocks.
#[derive(Debug, Default)]
pub struct FoldScratch {
    scores: Scores,
    order: Vec<u32>,
    keep: Vec<bool>,
    moves: Vec<SlotMove>,
    turns: Vec<Turn>,
    pub(super) mixture: lococo::Mixture,
}

impl FoldScratch {
    pub(super) fn moves_mut(&mut self) -> &mut Vec<SlotMove> {
        &mut self.moves
    }
}

/// A key that a compaction turns on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Key/value head.
    pub head: u32,
    /// Its slot.
    pub slot: u32,
    /// By how many positions.
    pub by: i64,
}

impl BlockState {
    /// Shrinks `layer` to `M` slots and says what the backend must do to keys and values. Ties keep
    /// the older token.
    ///
    /// # Errors
    /// The backend's if keys or values cannot be read, [`Error::InvalidBatch`] if a method's weights
    /// are missing.
    ///
    /// # Panics
    /// If the block was not opened.
    pub fn fold<'s>(
        &mut self,
        layer: usize,
        slots: &dyn SlotReader,
        context: &FoldContext,
        scratch: &'s mut FoldScratch,
    ) -> Result<Fold<'s>, Error> {
        let settings = self.layer_settings(layer, self.settings().expect("the block is open"));
        let view = self.view(layer, settings, slots, context);
        if settings.method == CacheMethod::Lococo {
            lococo::mix(&view, &mut scratch.mixture)?;
            self.take_mixture(layer, &scratch.mixture);
            let lococo::Mixture { keys, values, .. } = &scratch.mixture;
            return Ok(Fold::Rewrite { slots: settings.slots as usize, keys, values });
        }
        scratch.scores.second.clear();
        settings.method.fold_method().rank(&view, &mut scratch.scores)?;
        let (len, heads) = (view.len, view.num_kv_heads);
        let now = Now {
            next_position: view.next_position,
            num_gaps: view.num_gaps,
            sink_end: self.progress[layer].sink_end,
        };
        let target = (settings.slots as usize).min(len);
        scratch.moves.clear();
        for head in 0..heads {
            let positions = &self.positions_of(layer, head)[..len];
            let part = head * len..(head + 1) * len;
            let slots = (positions, self.gaps_of(layer, head));
            let forced = protect(&mut scratch.scores.first[part.clone()], slots, settings, now);
            scratch.keep.clear();
            scratch.keep.resize(len, false);
            let second = scratch.scores.second.get(part.clone()).unwrap_or_default();
            let by_second = match second {
                [] => 0,
                _ => recall_slots(settings, target).min(target.saturating_sub(forced)),
            };
            let first = &scratch.scores.first[part];
            keep_best(first, positions, target - by_second, &mut scratch.order, &mut scratch.keep);
            keep_best(second, positions, by_second, &mut scratch.order, &mut scratch.keep);
            fill_holes(head, target, &mut scratch.keep, &mut scratch.moves);
        }
        self.apply(layer, &scratch.moves, target);
        Ok(Fold::Moves(&scratch.moves))
    }

    /// Brings the positions of `layer` closer together, as `borders` compactions would, and returns the
    /// keys that the backend must turn; see [`super::compaction`].
    ///
    /// # Panics
    /// If the block was not opened.
    pub fn compact<'s>(&mut self, layer: usize, borders: u32, scratch: &'s mut FoldScratch) -> &'s [Turn] {
        let settings = self.settings().expect("the block is open");
        let (frame, progress): (Frame, _) = (self.frame(), self.progress[layer]);
        let (len, step) = (self.len(layer), frame.step().saturating_mul(borders));
        // The frame has not moved yet: the next row would be at its end.
        let old_next = frame.position(progress.next.saturating_sub(1)) + 1;
        scratch.turns.clear();
        for head in 0..self.geometry().num_kv_heads {
            scratch.order.clear();
            scratch.order.extend(0..len as u32);
            let positions = self.positions_of_mut(layer, head);
            scratch.order.sort_unstable_by_key(|&slot| (positions[slot as usize], slot));
            for (rank, &slot) in (0u32..).zip(&scratch.order) {
                let old = positions[slot as usize];
                let new = old.saturating_sub(step).max(rank).min(old);
                positions[slot as usize] = new;
                scratch.turns.push(Turn { head: head as u32, slot, by: i64::from(new) - i64::from(old) });
            }
        }
        self.progress[layer].compact(step, settings.sinks);
        if progress.gaps() > 0 {
            // Ages stay as they are: what a token moved less than the next one is taken from its gaps.
            for turn in &scratch.turns {
                if let Some(gaps) = self.gaps_of_mut(layer, turn.head as usize).get_mut(turn.slot as usize) {
                    *gaps = (i64::from(*gaps) + i64::from(step) + turn.by) as u32;
                }
            }
        } else if settings.method.received().is_some() {
            let (method, new_next) = (settings.method.fold_method(), old_next.saturating_sub(step));
            for turn in &scratch.turns {
                let new = self.positions_of(layer, turn.head as usize)[turn.slot as usize];
                let old = (i64::from(new) - turn.by) as u32;
                let received = &mut self.column_mut(layer, 0, turn.head as usize)[turn.slot as usize];
                *received = method.rescale(*received, old_next - old, new_next.saturating_sub(new));
            }
        }
        scratch.turns.retain(|turn| turn.by != 0);
        &scratch.turns
    }
}

/// Where a layer is when it folds.
#[derive(Debug, Clone, Copy)]
struct Now {
    next_position: u32,
    num_gaps: u32,
    sink_end: u32,
}

/// Puts sinks and recent tokens on top and says how many they are. A score that is no number
/// comes last.
fn protect(
    scores: &mut [f32],
    (positions, gaps): (&[u32], &[u32]),
    settings: CacheSettings,
    now: Now,
) -> usize {
    let mut forced = 0;
    for (slot, (score, &position)) in scores.iter_mut().zip(positions).enumerate() {
        let distance = now.next_position.saturating_sub(position);
        if position < now.sink_end {
            *score = f32::INFINITY;
        } else if age(distance, now.num_gaps, gaps.get(slot).copied().unwrap_or(0)) <= settings.recent {
            *score = f32::MAX;
        } else {
            if score.is_nan() {
                *score = f32::NEG_INFINITY;
            }
            continue;
        }
        forced += 1;
    }
    forced
}

/// Slots that the second ranking fills.
fn recall_slots(settings: CacheSettings, target: usize) -> usize {
    target.saturating_sub(settings.recent as usize) * usize::from(settings.recall_permille) / 1000
}

/// Marks the `count` best slots among those that are not marked; ties prefer the older token.
fn keep_best(scores: &[f32], positions: &[u32], count: usize, order: &mut Vec<u32>, keep: &mut [bool]) {
    if count == 0 {
        return;
    }
    order.clear();
    order.extend((0..keep.len() as u32).filter(|&slot| !keep[slot as usize]));
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, |&a, &b| {
            let (a, b) = (a as usize, b as usize);
            let order = scores[b].total_cmp(&scores[a]);
            order.then(positions[a].cmp(&positions[b])).then(a.cmp(&b))
        });
        order.truncate(count);
    }
    order.iter().for_each(|&slot| keep[slot as usize] = true);
}

/// Survivors beyond the first `target` slots move into the evicted ones, in order.
fn fill_holes(head: usize, target: usize, keep: &mut [bool], moves: &mut Vec<SlotMove>) {
    let mut hole = 0;
    for from in target..keep.len() {
        if !keep[from] {
            continue;
        }
        while keep[hole] {
            hole += 1;
        }
        keep[hole] = true;
        moves.push(SlotMove { head: head as u32, from: from as u32, to: hole as u32 });
    }
}

#[cfg(test)]
mod tests;
