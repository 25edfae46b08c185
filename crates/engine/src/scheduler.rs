//! Who runs in this step. Pure: no tensors, no clock, no channels but the question for room.
//!
//! **Admission.** Waiting requests are looked at in the order of their arrival, each class of
//! priority being worth some seconds; whoever has waited for long goes first, whatever the classes.
//! So no stream of urgent requests holds the others back for ever. A request that finds its blocks
//! starts. One that does not *reserves* every class of blocks that it could use: those after it may
//! only take smaller blocks, which are of no use to it. So a request for a large block waits at most
//! until enough of the blocks now taken are given back, however many small requests arrive; and
//! small requests still use small blocks meanwhile.
//!
//! **Rows.** Decode rows come first, least recently run first if there are too many. Prefill
//! shares the rest of the budget, least remaining first, so that a short prompt does not wait for
//! a long one. Ageing: a quarter of the prefill rows that others get is credited to the oldest
//! prompt, which spends whole chunks of credit before anybody else is served. So the oldest
//! prompt gets at least a quarter of the prefill rows (less one chunk), and no prompt starves.
//!
//! **Prompts that are split by layers**, because their images lose tokens inside the decoder, run one at a
//! time, the oldest first; half of the prefill rows are theirs while other prompts want some.
//!
//! **Snapshots.** A prompt's chunk ends where a snapshot is to be taken, also off the grid of 16
//! rows; the next one then ends on the grid again.

use std::time::Duration;

use locket_model::BlockId;

use crate::{
    block_pool::BlockPool,
    config::{CHUNK_ROWS, MAX_EVENTS_PER_STEP},
    sequence::{Sequence, SequenceId, WaitingRequest},
};

/// A request goes before those with a priority one higher that came up to this long before it, and after
/// those that came still earlier.
const CLASS_WORTH: Duration = Duration::from_secs(5);

/// The oldest prompt is owed one row for this many that others got.
const AGEING_SHARE: usize = 4;

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlannedRows {
    /// Place in [`Scheduler::running`].
    pub index: usize,
    /// How many of its next tokens.
    pub rows: u32,
    /// Whether the last row's logits are wanted.
    pub sample: bool,
}

/// What a step computes: decode rows first, then prefill chunks.
#[derive(Debug, Default)]
pub(crate) struct StepPlan {
    /// Rows by sequence; no sequence appears twice.
    pub parts: Vec<PlannedRows>,
    /// Sequences that decode.
    pub decode_rows: usize,
    /// Rows of prompts.
    pub prefill_rows: usize,
    /// Rows of a prompt that is split by layers, run behind the others.
    pub held: Option<PlannedRows>,
}

impl StepPlan {
    /// All rows of the step.
    pub(crate) fn num_rows(&self) -> usize {
        self.decode_rows + self.prefill_rows
    }

    /// Whether nothing is to be run.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.held.is_none()
    }

    pub(crate) fn clear(&mut self) {
        self.held = None;
        self.parts.clear();
        self.decode_rows = 0;
        self.prefill_rows = 0;
    }
}

/// The scheduler's bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most rows of one prompt in a step, a multiple of 16.
    pub prefill_chunk: usize,
    /// Most running sequences.
    pub max_running: usize,
    /// Tokens between two snapshots of a sequence.
    pub snapshot_interval: u32,
    /// A request that has waited this long is overdue.
    pub patience: Duration,
}

/// A prompt that wants rows.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    index: usize,
    remaining: usize,
    /// Rows that it may have in this step: up to the next snapshot.
    wanted: usize,
    /// Rows since the last border of 16.
    offset: usize,
    priority: i32,
    id: SequenceId,
    granted: usize,
}

/// Queue, running sequences, blocks.
#[derive(Debug)]
pub(crate) struct Scheduler {
    /// Requests that wait for blocks, in the order in which they are looked at.
    pub waiting: Vec<WaitingRequest>,
    /// Sequences that own a block.
    pub running: Vec<Sequence>,
    /// The blocks.
    pub pool: BlockPool,
    limits: Limits,
    /// Rows owed to the oldest prompt, and whose they are.
    credit: (SequenceId, usize),
    /// Reused between steps.
    decoding: Vec<usize>,
    candidates: Vec<Candidate>,
    /// Prompts that are split by layers.
    losing: Vec<usize>,
    /// The block of the one that is under way.
    holding: Option<BlockId>,
}

impl Scheduler {
    pub(crate) fn new(pool: BlockPool, limits: Limits) -> Self {
        Self {
            waiting: Vec::new(),
            running: Vec::new(),
            pool,
            limits,
            credit: (SequenceId(0), 0),
            decoding: Vec::new(),
            candidates: Vec::new(),
            losing: Vec::new(),
            holding: None,
        }
    }

    /// Whether nothing waits and nothing runs.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Puts a request into the queue.
    pub(crate) fn enqueue(&mut self, request: WaitingRequest) {
        let key = rank(&request);
        let at = self.waiting.partition_point(|other| rank(other) <= key);
        self.waiting.insert(at, request);
    }

    /// Lets requests that have waited for too long go first.
    pub(crate) fn age(&mut self, now: Duration) {
        let patience = self.limits.patience;
        let mut has_changed = false;
        for waiting in &mut self.waiting {
            if !waiting.is_overdue && now.saturating_sub(waiting.arrived) >= patience {
                waiting.is_overdue = true;
                has_changed = true;
            }
        }
        if has_changed {
            self.waiting.sort_by_key(rank);
        }
    }

    /// Gives blocks to waiting requests and hands each started request and its blocks to `start`,
    /// which returns the sequences that run from now on.
    pub(crate) fn admit<I>(&mut self, mut start: impl FnMut(WaitingRequest, Vec<locket_model::BlockId>) -> I)
    where
        I: IntoIterator<Item = Sequence>,
    {
        let mut limit = self.pool.num_classes();
        let mut at = 0;
        while at < self.waiting.len() && limit > 0 {
            let waiting = &self.waiting[at];
            if waiting.loading_until.is_some() {
                // For a moment only: what starts meanwhile may take what it would have taken.
                at += 1;
                continue;
            }
            let count = waiting.sequences.len();
            if self.running.len() + count > self.limits.max_running {
                return;
            }
            let capacity = waiting.request.block_slots();
            match self.pool.take(capacity, count, limit) {
                Some(blocks) => {
                    let waiting = self.waiting.remove(at);
                    self.running.extend(start(waiting, blocks));
                }
                None => {
                    limit = limit.min(self.pool.class_for(capacity));
                    at += 1;
                }
            }
        }
    }

    /// Fills `plan` with the next step. `budget` says how many rows a step with that many decode
    /// rows may have.
    pub(crate) fn plan(&mut self, budget: impl Fn(usize) -> usize, plan: &mut StepPlan) {
        plan.clear();
        self.collect();
        let reserve = if self.candidates.is_empty() { 0 } else { CHUNK_ROWS };
        self.plan_decode(self.limits.max_rows - reserve, plan);
        // A prompt that is due advances in every step, if only by one chunk.
        let rows = budget(plan.decode_rows).saturating_sub(plan.decode_rows).max(CHUNK_ROWS);
        let rows = self.plan_held(rows, plan);
        self.plan_prefill(rows.min(self.limits.max_rows - plan.decode_rows), plan);
    }

    /// Gives rows to a prompt that is split by layers; returns how many are left for others.
    fn plan_held(&mut self, rows: usize, plan: &mut StepPlan) -> usize {
        let running = &self.running;
        let is_held = |&&index: &&usize| Some(running[index].block) == self.holding;
        let under_way = self.losing.iter().find(is_held);
        let oldest = self.losing.iter().min_by_key(|&&index| running[index].id);
        let Some(&index) = under_way.or(oldest) else {
            self.holding = None;
            return rows;
        };
        self.holding = Some(running[index].block);
        let own = if self.candidates.is_empty() { rows } else { (rows / 2).max(CHUNK_ROWS) };
        let own = own.min(self.limits.prefill_chunk) / CHUNK_ROWS * CHUNK_ROWS;
        plan.held = Some(PlannedRows { index, rows: own as u32, sample: true });
        rows.saturating_sub(own).max(CHUNK_ROWS)
    }

    /// Sorts the running sequences into those that decode and those that prefill.
    fn collect(&mut self) {
        self.decoding.clear();
        self.candidates.clear();
        self.losing.clear();
        for (index, sequence) in self.running.iter().enumerate() {
            if sequence.end.is_some() || sequence.leader.is_some() || sequence.awaits_guide() {
                continue;
            }
            if sequence.is_prefill() {
                if sequence.request.loses_tokens() {
                    if sequence.events.has_room(MAX_EVENTS_PER_STEP) {
                        self.losing.push(index);
                    }
                } else if sequence.events.has_room(MAX_EVENTS_PER_STEP) {
                    let remaining = sequence.prefill_remaining();
                    let to_snapshot = sequence.rows_to_snapshot(self.limits.snapshot_interval);
                    let to_border = sequence.request.cache.rows_to_border(sequence.num_cached);
                    self.candidates.push(Candidate {
                        index,
                        remaining: remaining as usize,
                        wanted: to_snapshot.unwrap_or(remaining).min(to_border).min(remaining) as usize,
                        offset: sequence.num_cached as usize % CHUNK_ROWS,
                        priority: sequence.request.priority,
                        id: sequence.id,
                        granted: 0,
                    });
                }
            } else if sequence.events.has_room(MAX_EVENTS_PER_STEP - 2) {
                // Room for `Token` and the end; after a token alone there is room for the end.
                self.decoding.push(index);
            }
        }
    }

    fn plan_decode(&mut self, limit: usize, plan: &mut StepPlan) {
        if self.decoding.len() > limit {
            let running = &self.running;
            self.decoding.sort_unstable_by_key(|&index| (running[index].last_step, running[index].id));
            self.decoding.truncate(limit);
        }
        plan.decode_rows = self.decoding.len();
        plan.parts.extend(self.decoding.iter().map(|&index| PlannedRows { index, rows: 1, sample: true }));
    }

    fn plan_prefill(&mut self, mut rows: usize, plan: &mut StepPlan) {
        let Some(oldest) = self.candidates.iter().map(|candidate| candidate.id).min() else {
            self.credit.1 = 0;
            return;
        };
        if self.credit.0 != oldest {
            self.credit = (oldest, 0);
        }
        self.candidates
            .sort_unstable_by_key(|candidate| (candidate.priority, candidate.remaining, candidate.id));
        if let Some(candidate) = self.candidates.iter_mut().find(|candidate| candidate.id == oldest) {
            let granted = grant(candidate, rows.min(self.credit.1), self.limits.prefill_chunk);
            self.credit.1 -= granted;
            rows -= granted;
        }
        let mut others = 0;
        for candidate in &mut self.candidates {
            let granted = grant(candidate, rows, self.limits.prefill_chunk);
            rows -= granted;
            if candidate.id != oldest {
                others += granted;
            }
        }
        // Bounded: credit beyond one step's rows could not be spent at once anyway.
        self.credit.1 = (self.credit.1 + others.div_ceil(AGEING_SHARE)).min(self.limits.max_rows);
        for candidate in self.candidates.iter().filter(|candidate| candidate.granted > 0) {
            plan.prefill_rows += candidate.granted;
            plan.parts.push(PlannedRows {
                index: candidate.index,
                rows: candidate.granted as u32,
                sample: candidate.granted == candidate.remaining && self.running[candidate.index].max_new > 0,
            });
        }
    }
}

/// Lower is looked at earlier: what is overdue, then the time of arrival (milliseconds) with each class
/// turned into time. Both sides of a comparison age alike, so the order never changes by itself.
fn rank(waiting: &WaitingRequest) -> (bool, i64, u64) {
    if waiting.is_overdue {
        return (false, 0, waiting.order);
    }
    let class = i64::from(waiting.request.priority) * CLASS_WORTH.as_millis() as i64;
    (true, waiting.arrived.as_millis() as i64 + class, waiting.order)
}

/// Grants `candidate` up to `rows` further rows: all that it wants, or up to a border of 16.
fn grant(candidate: &mut Candidate, rows: usize, prefill_chunk: usize) -> usize {
    let rows = rows.min(prefill_chunk - candidate.granted.min(prefill_chunk));
    let wanted = candidate.wanted - candidate.granted;
    let from = candidate.offset + candidate.granted;
    let to_border = ((from + rows) / CHUNK_ROWS * CHUNK_ROWS).saturating_sub(from);
    let granted = if wanted <= rows { wanted } else { to_border };
    candidate.granted += granted;
    granted
}
