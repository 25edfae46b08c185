//! A model for tests: its logits are a hash of everything a block has seen, so that a wrong row,
//! block or order changes the text; it checks each batch and takes virtual time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use locket_model::{
    Adapter, AdapterId, Batch, BatchSequence, BlockId, Error, Extras, HeldProgress, HeldPrompt, MemoryUse,
    Model, ModelConfig, TokenScore,
    config::{RopeConfig, RopeScaling, RopeStyle},
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
};

use crate::{GenerationRequest, clock::Clock, visual};

/// Ids from here on are never likely.
pub(crate) const FIRST_RARE_ID: u32 = 40;
/// A row with this id makes the step panic.
pub(crate) const PANIC_ID: u32 = 40;
/// A row with this id makes the model refuse the batch.
pub(crate) const INVALID_ID: u32 = 41;
/// A row with this id breaks the device.
pub(crate) const DEVICE_ID: u32 = 42;
/// A block that has seen this id gives NaN.
pub(crate) const NAN_ID: u32 = 43;
pub(crate) const VOCAB_SIZE: usize = 48;
/// Numbers of an embedding.
pub(crate) const WIDTH: usize = 2;

/// Time that moves when it is told to.
#[derive(Debug, Default)]
pub(crate) struct VirtualClock(AtomicU64);

impl VirtualClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

/// What one forward call looked like.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepRecord {
    /// `(block, first position, rows)` by sequence.
    pub parts: Vec<(u32, u32, u32)>,
}

/// What a test sees of the model while the engine owns it.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub steps: Vec<StepRecord>,
    pub open_blocks: usize,
    /// States taken and put back.
    pub exports: usize,
    pub imports: usize,
    /// Broken rules; must stay empty.
    pub violations: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    settings: CacheSettings,
    len: u32,
    /// Positions left out so far.
    gaps: u32,
    hash: u64,
    /// The last chunk ended off the grid of 16 rows: only single rows may follow.
    is_sealed: bool,
    has_nan: bool,
}

pub(crate) struct FakeModel {
    config: ModelConfig,
    plan: CachePlan,
    max_batch_rows: usize,
    blocks: Vec<Option<Block>>,
    /// What the block of each row of the latest step had seen up to it: its hash, and whether NaN follows.
    latest: Vec<(u64, bool)>,
    /// Whether chunks may end off the grid, as they do where snapshots are taken.
    may_leave_grid: bool,
    clock: Arc<VirtualClock>,
    seen: Arc<Mutex<Seen>>,
    extras: Extras,
    adapters: Vec<bool>,
    /// A held prompt and the rows that it has left to run, counted once per layer.
    held: Option<(HeldPrompt, usize)>,
}

/// Bytes of an image per token, so that longer states are larger.
pub(crate) const BYTES_PER_TOKEN: usize = 8;
const IMAGE_MAGIC: u64 = 0x4641_4B45;

fn mix(hash: u64, value: u64) -> u64 {
    let mixed = (hash ^ value.wrapping_add(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 29)
}

/// The state of a block that has seen `ids`.
pub(crate) fn hash_of(ids: &[u32]) -> u64 {
    ids.iter().fold(0, |hash, &id| mix(hash, u64::from(id)))
}

/// What a row adds to the state of a block: its token, or its embedding, positions left out before it, and
/// its adapter.
fn word(id: u32, embedding: Option<&[f32]>, gap: u32, adapter: Option<AdapterId>) -> u64 {
    let content = embedding.map_or(u64::from(id), |numbers| {
        numbers.iter().fold(1, |hash, number| mix(hash, number.to_bits().into())) << 20
    });
    content ^ (u64::from(gap) << 40) ^ adapter.map_or(0, |id| u64::from(id.0 + 1) << 56)
}

/// The state of a block that has seen the first `len` tokens of a prompt and its answer.
pub(crate) fn state_after(request: &GenerationRequest, output: &[u32], len: usize) -> u64 {
    let (mut hash, mut next) = (0, 0);
    for (at, &id) in (0..).zip(request.prompt_ids.iter().chain(output).take(len)) {
        let position = request.position(at);
        let embedding = visual::overlapping(&request.visual, at..at + 1).next().map(|(rows, span)| {
            let row = (rows.start - span.rows.start) as usize;
            &span.embeddings[row * WIDTH..(row + 1) * WIDTH]
        });
        hash = mix(hash, word(id, embedding, position - next, request.adapter));
        next = position + 1;
        if request.loses_tokens() && at as usize + 1 == request.prompt_ids.len() {
            hash = mix(hash, LOSS);
        }
    }
    hash
}

/// Added to the state of a block whose prompt has lost tokens.
const LOSS: u64 = 0x1055;

/// Logits `[VOCAB_SIZE]` after a block came to `hash`.
pub(crate) fn logits_of(hash: u64) -> impl Iterator<Item = f32> {
    (0..VOCAB_SIZE as u32).map(move |id| {
        let noise = (mix(hash, u64::from(id) + 1000) >> 40) as f32 / (1u64 << 24) as f32;
        if id < FIRST_RARE_ID { noise * 8.0 - 4.0 } else { -1e4 }
    })
}

/// Hidden state after a block came to `hash`.
pub(crate) fn state_of(hash: u64) -> [f32; 2] {
    [7, 8].map(|salt| (mix(hash, salt) >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
}

impl FakeModel {
    /// A model with `(capacity, blocks)` classes.
    pub(crate) fn new(classes: &[(u32, u32)], max_batch_rows: usize) -> Self {
        let geometry = CacheGeometry::of(&config());
        let classes: Vec<_> =
            classes.iter().map(|&(capacity, blocks)| BlockClass { capacity, blocks }).collect();
        let plan = CachePlan { geometry, slot_type: SlotType::F32, side: SideArrays::default(), classes };
        Self {
            config: config(),
            blocks: vec![None; plan.num_blocks() as usize],
            plan,
            latest: Vec::new(),
            max_batch_rows,
            may_leave_grid: false,
            clock: Arc::default(),
            seen: Arc::default(),
            extras: Extras::default(),
            adapters: Vec::new(),
            held: None,
        }
    }

    /// The same, for engines that take snapshots.
    pub(crate) fn leaving_grid(mut self) -> Self {
        self.may_leave_grid = true;
        self
    }

    pub(crate) fn clock(&self) -> Arc<VirtualClock> {
        Arc::clone(&self.clock)
    }

    pub(crate) fn seen(&self) -> Arc<Mutex<Seen>> {
        Arc::clone(&self.seen)
    }

    fn refuse(&self, reason: String) -> Error {
        self.seen.lock().unwrap().violations.push(reason.clone());
        Error::InvalidBatch(reason)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        for &id in ids {
            match id {
                PANIC_ID => panic!("the fake model was told to panic"),
                INVALID_ID => return Err(Error::InvalidBatch("told to refuse".into())),
                DEVICE_ID => return Err(Error::Device("told to break".into())),
                _ => {}
            }
        }
        Ok(())
    }

    /// Appends the rows of one sequence and returns its block's state.
    fn append(&mut self, batch: &Batch, sequence: &BatchSequence) -> Result<Block, Error> {
        let (id, rows) = (sequence.block, sequence.rows.start as usize..sequence.rows.end as usize);
        if sequence.adapter.is_some_and(|id| self.adapters.get(id.0 as usize) != Some(&true)) {
            return Err(self.refuse(format!("adapter {:?} is not loaded", sequence.adapter)));
        }
        if self.held.as_ref().is_some_and(|(held, _)| held.batch.sequences[0].block == id) {
            return Err(self.refuse(format!("block {} runs while its prompt is held", id.0)));
        }
        let ids = &batch.ids[rows.clone()];
        let Some(mut block) = self.blocks.get(id.0 as usize).copied().flatten() else {
            return Err(self.refuse(format!("block {} is not open", id.0)));
        };
        if ids.len() > 1 && !self.may_leave_grid && (block.is_sealed || block.len % 16 != 0) {
            return Err(self.refuse(format!("a chunk of {} rows begins at {}", ids.len(), block.len)));
        }
        if ids.len() as u32 > block.settings.rows_to_border(block.len) {
            return Err(self.refuse(format!("{} rows from {} cross the border", ids.len(), block.len)));
        }
        for (row, (&id, &position)) in rows.clone().zip(ids.iter().zip(&batch.positions[rows])) {
            let Some(gap) = position.checked_sub(block.len + block.gaps) else {
                return Err(self.refuse(format!("position {position} after {} tokens", block.len)));
            };
            let embedded = batch.embedded.iter().find(|part| part.rows.contains(&(row as u32)));
            let embedding = embedded.map(|part| {
                let at = part.first as usize + row - part.rows.start as usize;
                &part.embeddings[at * WIDTH..(at + 1) * WIDTH]
            });
            block.hash = mix(block.hash, word(id, embedding, gap, sequence.adapter));
            block.has_nan |= id == NAN_ID;
            block.gaps += gap;
            block.len += 1;
            self.latest.push((block.hash, block.has_nan));
        }
        block.is_sealed |= block.len % 16 != 0;
        let room = block.settings.capacity().min(self.plan.capacity(id).unwrap_or(0));
        let can_fold = block.settings.ring > 0 && room == block.settings.capacity();
        if !can_fold && block.len > room {
            return Err(self.refuse(format!("{} tokens in {room} slots", block.len)));
        }
        self.blocks[id.0 as usize] = Some(block);
        Ok(block)
    }
}

impl Model for FakeModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn cache_plan(&self) -> &CachePlan {
        &self.plan
    }

    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), Error> {
        let rows = batch.num_rows();
        if rows == 0 || rows > self.max_batch_rows {
            return Err(self.refuse(format!("{rows} rows")));
        }
        // A row costs 100 µs, a step 1 ms.
        self.clock.advance(Duration::from_micros(1000 + 100 * rows as u64));
        self.check_ids(&batch.ids)?;
        logits.clear();
        self.latest.clear();
        let mut record = StepRecord::default();
        let mut next_row = 0;
        for sequence in &batch.sequences {
            let range = sequence.rows.start as usize..sequence.rows.end as usize;
            if range.start != next_row || range.is_empty() {
                return Err(self.refuse(format!("rows {range:?} after row {next_row}")));
            }
            next_row = range.end;
            record.parts.push((sequence.block.0, batch.positions[range.start], range.len() as u32));
            let block = self.append(batch, sequence)?;
            if batch.sample_rows.contains(&(range.end as u32 - 1)) {
                logits.extend(logits_of(block.hash));
                if block.has_nan {
                    let last = logits.len() - 1;
                    logits[last] = f32::NAN;
                }
            }
        }
        self.seen.lock().unwrap().steps.push(record);
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        let Some(capacity) = self.plan.capacity(block) else {
            return Err(self.refuse(format!("no block {}", block.0)));
        };
        if (settings.ring == 0 && capacity < settings.slots) || self.blocks[block.0 as usize].is_some() {
            return Err(self.refuse(format!("block {} cannot be opened", block.0)));
        }
        self.seen.lock().unwrap().open_blocks += 1;
        self.blocks[block.0 as usize] =
            Some(Block { settings, len: 0, gaps: 0, hash: 0, is_sealed: false, has_nan: false });
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let Some(source) = self.blocks[from.0 as usize] else {
            return Err(self.refuse(format!("copy from closed block {}", from.0)));
        };
        let has_room = self.plan.capacity(to) >= Some(source.len.min(source.settings.capacity()));
        if self.blocks[to.0 as usize].is_some() || !has_room {
            return Err(self.refuse(format!("copy to block {}", to.0)));
        }
        self.seen.lock().unwrap().open_blocks += 1;
        self.blocks[to.0 as usize] = Some(source);
        Ok(())
    }

    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        let Some(block) = self.blocks[block.0 as usize] else {
            return Err(self.refuse(format!("export of closed block {}", block.0)));
        };
        self.seen.lock().unwrap().exports += 1;
        let CacheSettings { method, slots, ring, sinks, layer_budgets, .. } = block.settings;
        let method = u64::from(method == CacheMethod::Window) + 2 * u64::from(layer_budgets);
        let fields = [method, slots.into(), ring.into(), sinks.into(), block.len.into(), block.gaps.into()];
        let flags = [block.hash, block.is_sealed.into(), block.has_nan.into()];
        let check = fields.iter().chain(&flags).fold(IMAGE_MAGIC, |check, &field| mix(check, field));
        let words = fields.into_iter().chain(flags).chain([check]);
        let mut image: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        image.resize(image.len() + BYTES_PER_TOKEN * block.len as usize, 0);
        Ok(image)
    }

    fn import_block(&mut self, id: BlockId, image: &[u8]) -> Result<(), Error> {
        let words: Vec<u64> =
            image.as_chunks::<8>().0.iter().take(10).map(|word| u64::from_le_bytes(*word)).collect();
        let broken = || Error::InvalidBatch("a broken image".into());
        let [method, slots, ring, sinks, len, gaps, hash, is_sealed, has_nan, check] = words[..] else {
            return Err(broken());
        };
        if words[..9].iter().fold(IMAGE_MAGIC, |check, &field| mix(check, field)) != check {
            return Err(broken());
        }
        let mut settings = CacheSettings::full(slots as u32);
        if method % 2 == 1 {
            (settings.method, settings.ring, settings.sinks) =
                (CacheMethod::Window, ring as u32, sinks as u32);
            settings.layer_budgets = method == 3;
        }
        self.open_block(id, settings)?;
        self.seen.lock().unwrap().imports += 1;
        let (len, gaps, is_sealed, has_nan) = (len as u32, gaps as u32, is_sealed == 1, has_nan == 1);
        self.blocks[id.0 as usize] = Some(Block { settings, len, gaps, hash, is_sealed, has_nan });
        Ok(())
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        let Some(Block { settings, len, .. }) = self.blocks[block.0 as usize] else { return 0 };
        let is_folded = settings.ring > 0 && len > settings.capacity();
        if is_folded { len - settings.slots } else { 0 }
    }

    fn score_tokens(
        &mut self,
        batch: &Batch,
        targets: &[u32],
        out: &mut Vec<TokenScore>,
    ) -> Result<(), Error> {
        let mut logits = Vec::new();
        self.forward(batch, &mut logits)?;
        let rows = logits.chunks_exact(VOCAB_SIZE).zip(targets);
        out.clear();
        out.extend(rows.map(|(row, &target)| TokenScore::of(row, target)));
        Ok(())
    }

    fn row_logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), Error> {
        logits.clear();
        for &row in rows {
            let Some(&(hash, has_nan)) = self.latest.get(row as usize) else {
                return Err(self.refuse(format!("no row {row}")));
            };
            logits.extend(logits_of(hash));
            if has_nan {
                let last = logits.len() - 1;
                logits[last] = f32::NAN;
            }
        }
        Ok(())
    }

    fn row_states(&mut self, rows: &[u32], states: &mut Vec<f32>) -> Result<(), Error> {
        states.clear();
        for &row in rows {
            let Some(&(hash, has_nan)) = self.latest.get(row as usize) else {
                return Err(self.refuse(format!("no row {row}")));
            };
            states.extend(if has_nan { [f32::NAN; 2] } else { state_of(hash) });
        }
        Ok(())
    }

    fn close_block(&mut self, block: BlockId) {
        if self.blocks[block.0 as usize].take().is_some() {
            self.seen.lock().unwrap().open_blocks -= 1;
        }
    }

    fn reserve(&mut self, extras: &Extras) -> Result<(), Error> {
        self.extras = *extras;
        Ok(())
    }

    fn extras(&self) -> Extras {
        self.extras
    }

    fn load_adapter(&mut self, _adapter: &Adapter) -> Result<AdapterId, Error> {
        if self.adapters.iter().filter(|is_loaded| **is_loaded).count() >= self.extras.adapters {
            return Err(Error::Plan("no room for an adapter".into()));
        }
        self.adapters.push(true);
        Ok(AdapterId(self.adapters.len() as u32 - 1))
    }

    fn unload_adapter(&mut self, adapter: AdapterId) -> Result<(), Error> {
        match self.adapters.get_mut(adapter.0 as usize) {
            Some(is_loaded) if *is_loaded => *is_loaded = false,
            _ => return Err(self.refuse(format!("{adapter:?} cannot be unloaded"))),
        }
        Ok(())
    }

    fn hold(&mut self, prompt: &HeldPrompt) -> Result<(), Error> {
        let rows = prompt.batch.num_rows();
        let block = prompt.batch.sequences[0].block;
        let is_empty = self.blocks[block.0 as usize].is_some_and(|block| block.len == 0);
        if self.held.is_some() || rows > self.extras.held_rows || !is_empty {
            return Err(self.refuse(format!("a prompt of {rows} rows in block {} cannot be held", block.0)));
        }
        self.held = Some((prompt.clone(), 2 * rows));
        Ok(())
    }

    fn advance_held(&mut self, max_rows: usize, logits: &mut Vec<f32>) -> Result<HeldProgress, Error> {
        let Some((prompt, left)) = self.held.take() else {
            return Err(self.refuse("nothing is held".into()));
        };
        let rows = left.min(max_rows);
        self.clock.advance(Duration::from_micros(50 * rows as u64));
        self.latest.clear();
        if left > rows {
            self.held = Some((prompt, left - rows));
            return Ok(HeldProgress::Working { rows });
        }
        self.check_ids(&prompt.batch.ids)?;
        let sequence = &prompt.batch.sequences[0];
        let mut block = self.append(&prompt.batch, sequence)?;
        block.hash = mix(block.hash, LOSS);
        self.blocks[sequence.block.0 as usize] = Some(block);
        logits.clear();
        logits.extend(logits_of(block.hash));
        if block.has_nan {
            logits[0] = f32::NAN;
        }
        Ok(HeldProgress::Done { rows })
    }

    fn release_held(&mut self) {
        self.held = None;
    }

    fn max_batch_rows(&self) -> usize {
        self.max_batch_rows
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { weights: 1, workspace: 2, cache: self.plan.total_bytes() }
    }
}

fn config() -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab_size: VOCAB_SIZE,
        hidden_size: WIDTH,
        intermediate_size: 2,
        num_layers: 2,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 2,
        max_position: 8192,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            rotary_dim: 2,
            style: RopeStyle::HalfSplit,
            scaling: RopeScaling::None,
        },
        tie_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: vec![None; 2],
        eos_token_ids: vec![0],
        bos_token_id: None,
    }
}
