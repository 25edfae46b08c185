//! Prompts whose images lose tokens inside the decoder.
//!
//! Such a prompt is split by layers, not by rows: all its rows run through the layers up to a boundary,
//! chunk by chunk, then the worst visual tokens leave, and the others go on ([`LayerDrops`]). Between two
//! chunks other sequences may run, so its hidden rows wait in a buffer of its own. There is room for one
//! prompt at a time ([`Extras::held_rows`](crate::Extras::held_rows)).
//!
//! What ranks comes from the hidden rows, never from the cache, which may have folded. So the prompt begins
//! with the sequence: nothing of it may be in the block before.

mod ranking;

use std::{ops::Range, sync::Arc};

use crate::{
    Batch, BatchSequence, BlockId, Error, LayerDrops, ModelConfig, Rank,
    adapter::{AdaptedRows, LayerLora, Loaded},
    llama::{LlamaWeights, attend_layer, project_layer},
    ops::{Ops, Reg},
};
use ranking::{Attention, Heads};

/// A whole prompt, and what its images lose.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeldPrompt {
    /// All rows of one sequence that has no tokens yet; there may be more than a step takes, but not more
    /// than [`Extras::held_rows`](crate::Extras::held_rows). Its last row is sampled; sample rows and
    /// [`Batch::first_layer`] are not looked at.
    pub batch: Batch,
    /// The images that lose tokens, in order: their rows and what leaves.
    pub images: Vec<(Range<u32>, Arc<LayerDrops>)>,
    /// Rows of all images, in order, these and those that lose nothing.
    pub visual: Vec<Range<u32>>,
}

/// How far a held prompt has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldProgress {
    /// So many rows were run through some layers; more are to come.
    Working {
        /// The rows.
        rows: usize,
    },
    /// The whole prompt is in the block.
    Done {
        /// The rows that were run last.
        rows: usize,
    },
}

/// An image that loses tokens.
struct Image {
    /// Rows of the prompt.
    rows: Range<u32>,
    drops: Arc<LayerDrops>,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Rows from `next` on run through layers `from..to`.
    Run { from: usize, to: usize, next: usize },
    /// Keys of rows from `next` on by the projections of the layer at which a boundary lies.
    Rank { layer: usize, next: usize },
}

/// The prompt that is held.
pub(crate) struct Held {
    block: BlockId,
    adapter: Option<crate::AdapterId>,
    prompt: Batch,
    images: Vec<Image>,
    /// Whether a row of the prompt is an image's.
    is_visual: Vec<bool>,
    /// Rows of the prompt that are still there, ascending, and their positions in the layers to come.
    rows: Vec<u32>,
    positions: Vec<u32>,
    /// Hidden rows `[rows, hidden]` between two groups of layers.
    hidden: Vec<f32>,
    /// Keys `[rows, kv_dim]`, and queries of ranking rows, of the layer that ranks.
    keys: Vec<f32>,
    queries: Vec<(usize, Vec<f32>)>,
    /// Layers that have run, and the rows that they have seen, if some are cut in the end.
    groups: Vec<(Range<usize>, Vec<u32>)>,
    phase: Phase,
}

impl Held {
    /// Takes a prompt in.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] naming what is wrong with it.
    pub(crate) fn new(prompt: &HeldPrompt, held_rows: usize, config: &ModelConfig) -> Result<Self, Error> {
        let invalid = |reason: String| Err(Error::InvalidBatch(reason));
        let HeldPrompt { batch, images, visual } = prompt;
        let rows = batch.num_rows();
        if rows > held_rows {
            return invalid(format!(
                "a prompt of {rows} rows loses tokens inside the decoder; there is room for {held_rows}"
            ));
        }
        batch.check(held_rows, config.vocab_size, config.hidden_size)?;
        let [BatchSequence { block, adapter, .. }] = batch.sequences[..] else {
            return invalid("one prompt is held at a time".into());
        };
        let mut is_visual = vec![false; rows];
        let in_order = |ranges: &[&Range<u32>]| {
            let ends = ranges.iter().all(|range| range.start < range.end && range.end as usize <= rows);
            ends && ranges.is_sorted_by(|a, b| a.end <= b.start)
        };
        let losing: Vec<&Range<u32>> = images.iter().map(|(range, _)| range).collect();
        if !in_order(&losing) || !in_order(&visual.iter().collect::<Vec<_>>()) {
            return invalid(format!("images must lie in order in the prompt's {rows} rows"));
        }
        for range in losing.into_iter().chain(visual) {
            is_visual[range.start as usize..range.end as usize].fill(true);
        }
        if is_visual.last() == Some(&true) {
            return invalid(
                "a prompt must not end with an image that loses tokens: its text ranks them".into(),
            );
        }
        for (range, drops) in images {
            drops.check(range.len(), config.num_layers)?;
        }
        let mut held = Self {
            block,
            adapter,
            images: images
                .iter()
                .map(|(rows, drops)| Image { rows: rows.clone(), drops: drops.clone() })
                .collect(),
            is_visual,
            rows: (0..rows as u32).collect(),
            positions: batch.positions.clone(),
            hidden: vec![0.0; rows * config.hidden_size],
            keys: Vec::with_capacity(rows * config.kv_dim()),
            queries: Vec::new(),
            groups: Vec::new(),
            prompt: batch.clone(),
            phase: Phase::Run { from: 0, to: 0, next: 0 },
        };
        held.phase = held.run_from(0, config.num_layers);
        Ok(held)
    }

    /// The block that it fills.
    pub(crate) fn block(&self) -> BlockId {
        self.block
    }

    /// The group of layers that begins with `from`.
    fn run_from(&self, from: usize, num_layers: usize) -> Phase {
        let layers = self.images.iter().flat_map(|image| &image.drops.boundaries);
        let next = layers.map(|boundary| boundary.layer as usize).filter(|&layer| layer > from).min();
        Phase::Run { from, to: next.unwrap_or(num_layers), next: 0 }
    }

    /// Boundaries before `layer`, and their images.
    fn boundaries_at(&self, layer: usize) -> impl Iterator<Item = (&Image, &crate::Boundary)> {
        self.images.iter().flat_map(move |image| {
            let here = image.drops.boundaries.iter().filter(move |boundary| boundary.layer as usize == layer);
            here.map(move |boundary| (image, boundary))
        })
    }

    /// Whether boundaries before `layer` rank by the last token, or by text.
    fn ranks_at(&self, layer: usize) -> [bool; 2] {
        [false, true].map(|by_text| {
            self.boundaries_at(layer)
                .any(|(_, boundary)| matches!(boundary.rank, Rank::TextRows { .. }) == by_text)
        })
    }

    /// The next chunk as a batch for layers from `layer` on.
    fn chunk(&self, rows: Range<usize>, layer: usize, is_last: bool) -> Batch {
        let mut batch = Batch::default();
        let ids: Vec<u32> =
            self.rows[rows.clone()].iter().map(|&row| self.prompt.ids[row as usize]).collect();
        batch.push_at(self.block, self.positions[rows.clone()].iter().copied(), &ids, is_last);
        batch.set_adapter(self.adapter);
        batch.first_layer = layer as u32;
        if layer == 0 {
            // All rows are there still, so rows of the prompt are rows of the buffer.
            for part in &self.prompt.embedded {
                let from = (part.rows.start as usize).max(rows.start);
                let to = (part.rows.end as usize).min(rows.end);
                if from < to {
                    let in_batch = (from - rows.start) as u32..(to - rows.start) as u32;
                    batch.embed(in_batch, &part.embeddings, part.first + from as u32 - part.rows.start);
                }
            }
        }
        batch
    }

    /// Keeps keys of a chunk's rows, and the queries of those that rank, from `qkv [rows, qkv_dim]`.
    fn keep(&mut self, rows: Range<usize>, qkv: &[f32], by_text: bool, config: &ModelConfig) {
        let (q_dim, kv_dim, width) = (config.q_dim(), config.kv_dim(), config.qkv_dim());
        let first_image = self.images.first().map_or(0, |image| image.rows.start);
        for (at, row) in rows.zip(qkv.chunks_exact(width)) {
            self.keys.extend_from_slice(&row[q_dim..q_dim + kv_dim]);
            let original = self.rows[at];
            let is_text_behind = !self.is_visual[original as usize] && original > first_image;
            let ranks = if by_text { is_text_behind } else { at + 1 == self.rows.len() };
            if ranks {
                self.queries.push((at, row[..q_dim].to_vec()));
            }
        }
    }

    /// Ranks the images whose boundaries before `layer` ask for it by text or by the last token; returns which
    /// rows of the buffer stay.
    fn rank(&mut self, layer: usize, by_text: bool, config: &ModelConfig) -> Vec<bool> {
        let kv_dim = config.kv_dim();
        let heads = Heads { queries: config.num_heads, keys: config.num_kv_heads, dim: config.head_dim };
        let mut stays = vec![true; self.rows.len()];
        let ranked: Vec<_> = self
            .boundaries_at(layer)
            .filter(|(_, boundary)| matches!(boundary.rank, Rank::TextRows { .. }) == by_text)
            .collect();
        let places: Vec<Range<usize>> = ranked.iter().map(|(image, _)| self.places(&image.rows)).collect();
        let mut attention: Vec<Attention> =
            places.iter().map(|places| Attention::new(places.len())).collect();
        for (at, query) in &self.queries {
            let weights = ranking::weights(query, &self.keys[..(at + 1) * kv_dim], heads);
            for (attention, places) in attention.iter_mut().zip(&places) {
                if *at >= places.end {
                    attention.add(&weights, &places.clone().collect::<Vec<_>>());
                }
            }
        }
        for (((image, boundary), places), attention) in ranked.into_iter().zip(places).zip(attention) {
            let originals: Vec<u32> =
                self.rows[places.clone()].iter().map(|row| row - image.rows.start).collect();
            let passes = ranking::survivors(boundary, &originals, &attention);
            stays[places].copy_from_slice(&passes);
        }
        self.keys.clear();
        self.queries.clear();
        stays
    }

    /// Where in the buffer the rows of an image are that are still there.
    fn places(&self, rows: &Range<u32>) -> Range<usize> {
        self.rows.partition_point(|row| *row < rows.start)..self.rows.partition_point(|row| *row < rows.end)
    }

    /// Lets the rows go that do not stay.
    fn gather(&mut self, stays: &[bool], width: usize) {
        let (mut to, mut moved_up) = (0, 0);
        for (at, &stays) in stays.iter().enumerate() {
            let row = self.rows[at];
            if !stays {
                let image = self.images.iter().find(|image| image.rows.contains(&row));
                moved_up += u32::from(image.is_some_and(|image| image.drops.compact));
                continue;
            }
            self.rows[to] = row;
            self.positions[to] = self.positions[at] - moved_up;
            self.hidden.copy_within(at * width..(at + 1) * width, to * width);
            to += 1;
        }
        self.rows.truncate(to);
        self.positions.truncate(to);
        self.hidden.truncate(to * width);
    }

    /// Runs up to `max_rows` rows through a group of layers, or to where a boundary is decided. Logits of the
    /// last row are written when all is done.
    pub(crate) fn advance<O: Ops>(
        &mut self,
        ops: &mut O,
        weights: &LlamaWeights<O::Weight>,
        adapters: &Loaded<O::Lora>,
        max_rows: usize,
        logits: &mut Vec<f32>,
    ) -> Result<HeldProgress, Error> {
        let config = ops.config().model.clone();
        let max_rows = max_rows.clamp(1, ops.config().max_batch_rows);
        let layers = self.adapter.map(|id| adapters.layers(id)).transpose()?;
        match self.phase {
            Phase::Run { from, to, next } => {
                let rows = next..self.rows.len().min(next + max_rows);
                let is_end = rows.end == self.rows.len();
                let is_last = is_end && to == config.num_layers;
                let step = ops.upload(&self.chunk(rows.clone(), from, is_last))?;
                let adapted = adapted(layers, rows.len());
                self.run_chunk(ops, weights, (&step, &adapted), rows.clone(), from..to, &config)?;
                if is_end && self.images.iter().any(|image| image.drops.cut) {
                    self.groups.push((from..to, self.rows.clone()));
                }
                if is_last {
                    ops.logits(&step, &weights.norm, weights.head(), Reg::H, Reg::X, logits)?;
                    self.finish(ops)?;
                    return Ok(HeldProgress::Done { rows: rows.len() });
                }
                self.phase = match is_end {
                    false => Phase::Run { from, to, next: rows.end },
                    true => self.cross(to, &config),
                };
                Ok(HeldProgress::Working { rows: rows.len() })
            }
            Phase::Rank { layer, next } => {
                let rows = next..self.rows.len().min(next + max_rows);
                let step = ops.upload(&self.chunk(rows.clone(), layer, false))?;
                self.write(ops, &step, rows.clone(), &config)?;
                project_layer(ops, &step, &weights.layers[layer], layer, &adapted(layers, rows.len()))?;
                ops.rope(&step, layer)?;
                let mut qkv = Vec::new();
                ops.read_rows(&step, Reg::Qkv, &mut qkv)?;
                self.keep(rows.clone(), &qkv, false, &config);
                self.phase = if rows.end == self.rows.len() {
                    let stays = self.rank(layer, false, &config);
                    self.gather(&stays, config.hidden_size);
                    self.run_from(layer, config.num_layers)
                } else {
                    Phase::Rank { layer, next: rows.end }
                };
                Ok(HeldProgress::Working { rows: rows.len() })
            }
        }
    }

    /// All rows have come to the boundary before `layer`.
    fn cross(&mut self, layer: usize, config: &ModelConfig) -> Phase {
        let [by_last_token, by_text] = self.ranks_at(layer);
        if by_text {
            let stays = self.rank(layer, true, config);
            self.gather(&stays, config.hidden_size);
        }
        if by_last_token {
            return Phase::Rank { layer, next: 0 };
        }
        self.run_from(layer, config.num_layers)
    }

    fn run_chunk<O: Ops>(
        &mut self,
        ops: &mut O,
        weights: &LlamaWeights<O::Weight>,
        (step, adapted): (&O::Step, &[AdaptedRows<'_, O::Lora>]),
        rows: Range<usize>,
        layers: Range<usize>,
        config: &ModelConfig,
    ) -> Result<(), Error> {
        if layers.start == 0 {
            ops.embed(step, &weights.embedding, Reg::H)?;
        } else {
            self.write(ops, step, rows.clone(), config)?;
        }
        let [_, by_text] = self.ranks_at(layers.end);
        for layer in layers.clone() {
            project_layer(ops, step, &weights.layers[layer], layer, adapted)?;
            ops.observe(step, layer)?;
            ops.rope(step, layer)?;
            if by_text && layer + 1 == layers.end {
                let mut qkv = Vec::new();
                ops.read_rows(step, Reg::Qkv, &mut qkv)?;
                self.keep(rows.clone(), &qkv, true, config);
            }
            attend_layer(ops, step, &weights.layers[layer], layer, adapted)?;
        }
        if layers.end < config.num_layers {
            let mut delta = Vec::new();
            let mut sum = Vec::new();
            ops.read_rows(step, Reg::H, &mut sum)?;
            ops.read_rows(step, Reg::X, &mut delta)?;
            sum.iter_mut().zip(&delta).for_each(|(sum, delta)| *sum += delta);
            let width = config.hidden_size;
            self.hidden[rows.start * width..rows.end * width].copy_from_slice(&sum);
        }
        Ok(())
    }

    fn write<O: Ops>(
        &self,
        ops: &mut O,
        step: &O::Step,
        rows: Range<usize>,
        config: &ModelConfig,
    ) -> Result<(), Error> {
        let width = config.hidden_size;
        ops.write_rows(step, &self.hidden[rows.start * width..rows.end * width])
    }

    /// Whether a layer that has seen a row, of which later layers have seen nothing, is to lose it too.
    fn is_cut(&self, layer: usize, row: u32) -> bool {
        let image = self.images.iter().find(|image| image.rows.contains(&row) && image.drops.cut);
        let layers = image.and_then(|image| {
            let (first, last) = (image.drops.boundaries.first()?, image.drops.boundaries.last()?);
            Some(first.layer as usize - 1..last.layer as usize)
        });
        layers.is_some_and(|layers| layers.contains(&layer))
    }

    /// Layers meet again: what comes next has one position in the sequence, and its own in each layer.
    fn finish<O: Ops>(&self, ops: &mut O) -> Result<(), Error> {
        for (layers, rows) in &self.groups {
            for layer in layers.clone() {
                let gone: Vec<u32> = (0..)
                    .zip(rows)
                    .filter(|&(_, &row)| self.is_cut(layer, row) && self.rows.binary_search(&row).is_err())
                    .map(|(slot, _)| slot)
                    .collect();
                ops.remove_slots(self.block, layer, &gone)?;
            }
        }
        let next = self.prompt.positions.last().map_or(0, |last| last + 1);
        ops.settle_block(self.block, next)
    }
}

/// All rows of a chunk go through one adapter.
fn adapted<L>(adapter: Option<&[LayerLora<L>]>, rows: usize) -> Vec<AdaptedRows<'_, L>> {
    adapter.into_iter().map(|layers| AdaptedRows { rows: (0..rows as u32).collect(), layers }).collect()
}
