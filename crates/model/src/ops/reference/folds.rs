//! Folds of the reference backend: all blocks that are due in a layer together.
//!
//! Ranking is work for the processor and is spread over its threads; what the device has to do is one
//! gather per run of neighbouring blocks, not one per block, because launches are what it waits for.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::{cache::Blocks, slots::Slots};
use crate::{
    Error,
    kv_cache::{BlockState, Fold, FoldContext, FoldScratch, SlotMove, SlotReader},
};

/// What a fold left to do to keys and values.
enum Folded {
    Moves(Vec<SlotMove>),
    Rewrite { slots: usize, keys: Vec<f32>, values: Vec<f32> },
}

/// Neighbouring blocks of one class with equally many filled slots.
struct Run {
    first: usize,
    count: usize,
    class: usize,
    /// Index in its class of the first block.
    index: usize,
    len: usize,
}

impl Blocks {
    /// Folds `layer` of the blocks `due`, each named once.
    pub(super) fn fold_all(
        &mut self,
        due: &[usize],
        layer: usize,
        context: &FoldContext,
    ) -> Result<(), Error> {
        for run in self.runs(due, layer) {
            let memory = &self.classes[run.class];
            let states = &mut self.states[run.first..run.first + run.count];
            let copy =
                if states.iter().any(reads_slots) { Some(HostCopy::of(memory, &run, layer)?) } else { None };
            let fold = |scratch: &mut FoldScratch, (i, state): (usize, &mut BlockState)| {
                let reader = Reader { copy: copy.as_ref(), index: i };
                Ok(match state.fold(layer, &reader, context, scratch)? {
                    Fold::Moves(moves) => Folded::Moves(moves.to_vec()),
                    Fold::Rewrite { slots, keys, values } => {
                        Folded::Rewrite { slots, keys: keys.to_vec(), values: values.to_vec() }
                    }
                })
            };
            let folded: Vec<Folded> = states
                .par_iter_mut()
                .enumerate()
                .map_init(FoldScratch::default, fold)
                .collect::<Result<_, Error>>()?;
            apply(memory, &run, layer, &folded)?;
        }
        Ok(())
    }

    fn runs(&self, due: &[usize], layer: usize) -> Vec<Run> {
        let mut due = due.to_vec();
        due.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for first in due {
            let ((class, index), len) = (self.places[first], self.states[first].len(layer));
            match runs.last_mut() {
                Some(run) if (run.first + run.count, run.class, run.len) == (first, class, len) => {
                    run.count += 1;
                }
                _ => runs.push(Run { first, count: 1, class, index, len }),
            }
        }
        runs
    }
}

fn reads_slots(state: &BlockState) -> bool {
    state.settings().is_some_and(|settings| settings.method.reads_slots())
}

fn apply(memory: &Slots, run: &Run, layer: usize, folded: &[Folded]) -> Result<(), Error> {
    let mut moves: Vec<&[SlotMove]> = Vec::with_capacity(folded.len());
    for (i, folded) in folded.iter().enumerate() {
        match folded {
            Folded::Moves(of_block) => moves.push(of_block),
            Folded::Rewrite { slots, keys, values } => {
                memory.write(run.index + i, layer, *slots, keys, values)?;
                moves.push(&[]);
            }
        }
    }
    memory.apply_moves(run.index, layer, run.len, &moves)
}

/// Filled keys and values of a run, `[blocks, kv_heads, len, head_dim]` in f32.
struct HostCopy {
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Numbers of a block.
    stride: usize,
}

impl HostCopy {
    fn of(memory: &Slots, run: &Run, layer: usize) -> Result<Self, Error> {
        let [keys, values] = memory.filled(run.index, run.count, layer, run.len)?;
        let download = |part: &Tensor| -> Result<Vec<f32>, Error> {
            Ok(part.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
        };
        Ok(Self { keys: download(&keys)?, values: download(&values)?, stride: keys.elem_count() / run.count })
    }
}

/// One block's part of a copy.
struct Reader<'a> {
    copy: Option<&'a HostCopy>,
    index: usize,
}

impl SlotReader for Reader<'_> {
    fn read(&self, head: usize, keys: &mut [f32], values: &mut [f32]) -> Result<(), Error> {
        let Some(copy) = self.copy else {
            return Err(Error::InvalidBatch("a method reads keys and values that it did not ask for".into()));
        };
        let at = self.index * copy.stride + head * keys.len();
        keys.copy_from_slice(&copy.keys[at..at + keys.len()]);
        values.copy_from_slice(&copy.values[at..at + values.len()]);
        Ok(())
    }
}
