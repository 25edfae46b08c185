//! The guard against silent drift: the likelihood of a short text under every method, slot type,
//! chunk and neighbourhood.
//!
//! Folds depend on the sequence alone. So on the CPU the bits of every score are the same for every
//! chunk (a multiple of 16 rows) and for a sequence alone or among others, whose methods differ; and
//! backends agree to a thousandth of a nat.

use std::sync::Arc;

use locket_model::{
    Batch, BlockId, Model, TokenScore,
    kv_cache::{
        BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SideCar, SlotType,
    },
    load::{Backend, BuildOptions, Checkpoint},
    stable_hash::Fnv1a,
};
use serde::Serialize;

use crate::Error;

/// A text for fingerprints, of some 1,200 tokens. A change of it changes every recorded figure.
pub const TEXT: &str = include_str!("fingerprint.txt");

/// Tokens of the text.
pub const TOKENS: usize = 1024;
/// Slots, `M`.
pub const SLOTS: u32 = 64;
/// Ring, `B`.
pub const RING: u32 = 64;
/// Rows per step; the last is the whole text.
pub const CHUNKS: [usize; 3] = [16, 112, TOKENS];

/// Neighbours of a sequence that is not alone.
const NEIGHBOURS: u32 = 2;
/// Rows of a neighbour per step, at most.
const NEIGHBOUR_ROWS: usize = 48;

/// What is measured, on what.
#[derive(Debug, Clone)]
pub struct FingerprintOptions {
    /// Methods; those that need weights which are not there, or slots of another type, are left out.
    pub methods: Vec<CacheMethod>,
    /// Number types of the slots.
    pub slot_types: Vec<SlotType>,
    /// Rows per step.
    pub chunks: Vec<usize>,
    /// Whether to run among neighbours as well as alone.
    pub with_neighbours: bool,
    /// Who computes.
    pub backend: Backend,
    /// CPU threads, 0 for all physical cores.
    pub threads: usize,
}

/// One run of the text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Print {
    /// Name of the method.
    pub method: &'static str,
    /// Name of the slot type.
    pub slot_type: &'static str,
    /// Rows per step.
    pub chunk: usize,
    /// Whether two other sequences were in every step.
    pub batched: bool,
    /// Mean negative log likelihood, in nats per token.
    pub nll: f64,
    /// FNV-1a over the bits of every score: equal only if all are.
    pub bits: String,
}

/// Runs the first [`TOKENS`] of `ids` in every way that `options` asks for.
///
/// # Errors
/// [`Error::Options`] if `ids` are too few; the model's errors.
pub fn fingerprint(
    checkpoint: &Checkpoint,
    ids: &[u32],
    side_car: Option<&Arc<SideCar>>,
    options: &FingerprintOptions,
) -> Result<Vec<Print>, Error> {
    let ids = ids.get(..TOKENS).ok_or_else(|| {
        Error::options("text", format!("a fingerprint needs {TOKENS} tokens, the text has {}", ids.len()))
    })?;
    let mut prints = Vec::new();
    for &slot_type in &options.slot_types {
        let mut methods = options.methods.clone();
        methods.retain(|method| {
            let has_weights = !method.needs_side_car() || side_car.is_some_and(|car| car.serves(*method));
            let fits = side_car.and_then(|car| car.lococo.as_ref()).is_none_or(|car| car.slots == SLOTS);
            has_weights && (!method.mixes() || (fits && slot_type.is_float()))
        });
        let mut model = build(checkpoint, &methods, slot_type, side_car, options)?;
        for &method in &methods {
            for &chunk in &options.chunks {
                for batched in [false, true] {
                    if batched && !options.with_neighbours {
                        continue;
                    }
                    let settings = settings(method);
                    let scores = scores(&mut *model, settings, ids, chunk, batched)?;
                    prints.push(Print::of(method, slot_type, chunk, batched, &scores)?);
                }
            }
        }
    }
    Ok(prints)
}

fn settings(method: CacheMethod) -> CacheSettings {
    match method {
        CacheMethod::Full => CacheSettings::full(TOKENS as u32),
        method => CacheSettings::of(method, SLOTS, RING),
    }
}

impl Print {
    fn of(
        method: CacheMethod,
        slot_type: SlotType,
        chunk: usize,
        batched: bool,
        scores: &[TokenScore],
    ) -> Result<Self, Error> {
        let mut bits = Fnv1a::new();
        let mut sum = 0.0;
        for (row, score) in scores.iter().enumerate() {
            if !score.nll.is_finite() {
                let what = format!("{} in {} slots", method.name(), slot_type.name());
                return Err(Error::NotFinite { what, row: row as u32 });
            }
            sum += f64::from(score.nll);
            bits.add(&score.nll.to_bits().to_le_bytes());
        }
        Ok(Self {
            method: method.name(),
            slot_type: slot_type.name(),
            chunk,
            batched,
            nll: sum / scores.len() as f64,
            bits: format!("{:016x}", bits.value()),
        })
    }
}

fn build(
    checkpoint: &Checkpoint,
    methods: &[CacheMethod],
    slot_type: SlotType,
    side_car: Option<&Arc<SideCar>>,
    options: &FingerprintOptions,
) -> Result<Box<dyn Model>, Error> {
    let geometry = CacheGeometry::of(&checkpoint.config);
    // Neighbours have methods of their own.
    let methods = [methods, &NEIGHBOUR_METHODS].concat();
    let classes = vec![BlockClass { capacity: TOKENS as u32, blocks: 1 + NEIGHBOURS }];
    let side = SideArrays::of(&methods, geometry, side_car.map(|car| &**car));
    let largest = options.chunks.iter().copied().max().unwrap_or(1).min(TOKENS);
    let build = BuildOptions {
        backend: options.backend,
        cache: CachePlan { geometry, slot_type, side, classes },
        max_batch_rows: largest + NEIGHBOURS as usize * NEIGHBOUR_ROWS,
        threads: options.threads,
        side_car: side_car.cloned(),
    };
    Ok(checkpoint.build(&build)?)
}

const NEIGHBOUR_METHODS: [CacheMethod; NEIGHBOURS as usize] = [CacheMethod::Window, CacheMethod::Observed];

/// Scores of every token of `ids` but the first, `chunk` rows per step.
fn scores(
    model: &mut dyn Model,
    settings: CacheSettings,
    ids: &[u32],
    chunk: usize,
    batched: bool,
) -> Result<Vec<TokenScore>, Error> {
    let own = BlockId(NEIGHBOURS);
    model.open_block(own, settings)?;
    let neighbours = if batched { NEIGHBOURS } else { 0 };
    for number in 0..neighbours {
        let method = NEIGHBOUR_METHODS[number as usize];
        model.open_block(BlockId(number), CacheSettings::of(method, SLOTS, RING))?;
    }
    let (mut scores, mut step_scores) = (Vec::with_capacity(ids.len()), Vec::new());
    let mut batch = Batch::default();
    let mut neighbour_done = 0;
    let last = ids.len() - 1;
    for start in (0..last).step_by(chunk.max(1)) {
        let end = (start + chunk).min(last);
        batch.clear();
        let neighbour_end = (neighbour_done + chunk.min(NEIGHBOUR_ROWS)).min(ids.len());
        for number in (0..neighbours).filter(|_| neighbour_end > neighbour_done) {
            // The text from its end, so that neighbours read something else.
            let reversed: Vec<u32> = ids.iter().rev().copied().collect();
            let rows = &reversed[neighbour_done..neighbour_end];
            batch.push(BlockId(number), neighbour_done as u32, rows, false);
        }
        neighbour_done = neighbour_end;
        let first = batch.num_rows() as u32;
        batch.push(own, start as u32, &ids[start..end], false);
        batch.sample_rows.extend(first..first + (end - start) as u32);
        model.score_tokens(&batch, &ids[start + 1..=end], &mut step_scores)?;
        scores.extend_from_slice(&step_scores);
    }
    (0..neighbours).map(BlockId).chain([own]).for_each(|block| model.close_block(block));
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use locket_model::testing::TinyLlama;

    use super::*;
    use crate::test_model::random_ids;

    fn tiny() -> Checkpoint {
        let folder = tempfile::tempdir().unwrap();
        TinyLlama::default().with("max_position_embeddings", 2048).write(folder.path()).unwrap();
        // Files stay mapped after the folder is gone.
        Checkpoint::open(folder.path()).unwrap()
    }

    fn options(slot_types: &[SlotType], backend: Backend) -> FingerprintOptions {
        FingerprintOptions {
            methods: CacheMethod::ALL.to_vec(),
            slot_types: slot_types.to_vec(),
            chunks: CHUNKS.to_vec(),
            with_neighbours: true,
            backend,
            threads: 2,
        }
    }

    #[test]
    fn a_text_that_is_too_short_is_refused() {
        let error =
            fingerprint(&tiny(), &[1; 100], None, &options(&[SlotType::F16], Backend::Cpu)).unwrap_err();
        assert!(error.to_string().contains("needs 1024 tokens, the text has 100"), "{error}");
    }

    #[test]
    fn the_cpus_bits_depend_on_neither_chunk_nor_neighbours() {
        let types = [SlotType::F16, SlotType::F32, SlotType::I8];
        let ids = random_ids(5, TOKENS, 320);
        let prints = fingerprint(&tiny(), &ids, None, &options(&types, Backend::Cpu)).unwrap();
        assert_eq!(prints.len(), types.len() * 7 * CHUNKS.len() * 2);
        let mut seen = Vec::new();
        for of_method in prints.chunk_by(|a, b| (a.method, a.slot_type) == (b.method, b.slot_type)) {
            assert_eq!(of_method.len(), CHUNKS.len() * 2);
            for print in of_method {
                assert_eq!(print.bits, of_method[0].bits, "{print:?} against {:?}", of_method[0]);
            }
            seen.push(of_method[0].bits.clone());
        }
        let all = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), all, "two methods or slot types agree to the bit");
    }

    #[test]
    fn backends_agree() {
        let ids = random_ids(6, TOKENS, 320);
        let [cpu, reference] = [Backend::Cpu, Backend::Reference].map(|backend| {
            let types = [SlotType::F16, SlotType::F32];
            let options =
                FingerprintOptions { chunks: vec![112], with_neighbours: false, ..options(&types, backend) };
            fingerprint(&tiny(), &ids, None, &options).unwrap()
        });
        for (cpu, reference) in cpu.iter().zip(&reference) {
            assert!((cpu.nll - reference.nll).abs() <= 1e-3, "{cpu:?} and {reference:?}");
        }
    }
}
