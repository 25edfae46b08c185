//! Attention of query rows over the slots of one block and layer.
//!
//! Softmax is computed online (FlashAttention, arXiv 2205.14135) over tiles of 64 slots that start
//! at fixed slot indices; every 256 slots a new partial result starts, and partial results are
//! merged in order (as in FlashDecoding). A query's arithmetic depends on its own slots alone: not
//! on the rows that share a tile, on chunking, or on which thread computes a part. So decode may
//! split a long sequence among threads while prefill does not, and both give the same bits.
//! Queries are scaled by `log2(e)` as well, so that exponentials are powers of two.

use super::{
    AlignedBuf, Isa, Shared, Team,
    isa::SimdOp,
    kv::{KvPlace, SlotNumber},
    simd::{LANES, Simd},
};

/// Slots that share one step of the online softmax.
const TILE: usize = 64;
/// Slots of one partial result.
const SPLIT: usize = 256;
/// Queries (rows times heads of one key/value head) of one task.
const TASK_QUERIES: usize = 48;
/// Queries that share the registers of one pass over a tile.
const PACK: usize = 6;
/// Partial results of split sequences, all tasks of one call.
const MAX_PARTIALS: usize = 4096;

/// Geometry, the same for all layers but the window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head; a multiple of 8.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Number type of the slots.
    pub number: SlotNumber,
}

/// Consecutive rows of one sequence, whose keys and values are in the slots already.
#[derive(Debug, Clone, Copy)]
pub struct AttentionJob {
    /// The layer's keys and values.
    pub place: KvPlace,
    /// First row.
    pub first_row: usize,
    /// Rows; row `i` of them sees slots `0..slots_before + i + 1`.
    pub rows: usize,
    /// Slots filled before the first row's.
    pub slots_before: usize,
    /// Handed to the [`SlotPositions`] of a window.
    pub id: usize,
}

/// Where a sliding window looks up which position is in which slot.
pub trait SlotPositions: Sync {
    /// Positions `[kv_heads, stride]` of a job's slots, and their stride, by [`AttentionJob::id`].
    fn slot_positions(&self, job_id: usize) -> (&[u32], usize);
}

/// A sliding window: a row sees the slots of the latest `size` positions, its own included.
#[derive(Clone, Copy)]
pub struct Window<'a> {
    /// Positions that a row sees.
    pub size: u32,
    /// Position of every row.
    pub row_positions: &'a [u32],
    /// Position of every slot.
    pub slots: &'a dyn SlotPositions,
}

/// The query rows and where their results go.
#[derive(Debug)]
pub struct AttentionRows<'a> {
    /// `[rows, query_stride]`, queries `[heads, head_dim]` first in each row.
    pub queries: &'a [f32],
    /// Numbers from one row of queries to the next.
    pub query_stride: usize,
    /// `[rows, heads * head_dim]`.
    pub out: &'a mut [f32],
}

/// What one call of a task covers.
#[derive(Debug, Clone, Copy)]
struct Task {
    job: u32,
    head: u32,
    first_query: u32,
    queries: u32,
    /// One split, whose result goes to partial results from `partial`; or all of them.
    split: Option<u32>,
    partial: u32,
}

/// Attention with its scratch memory. Calls allocate nothing once the largest batch was seen.
#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    tasks: Vec<Task>,
    /// Per thread: scaled queries, scores, a widened tile, partial and total states.
    scratch: Vec<f32>,
    partials: Vec<f32>,
}

impl Attention {
    /// Scratch for a team of `threads`.
    ///
    /// # Panics
    /// If the shape contradicts itself.
    pub fn new(shape: AttentionShape, threads: usize) -> Self {
        assert!(
            shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
            "query heads per key/value head"
        );
        assert!(shape.head_dim > 0 && shape.head_dim.is_multiple_of(8), "head_dim must be a multiple of 8");
        let state = state_len(&shape);
        Self {
            shape,
            tasks: Vec::with_capacity(1024),
            scratch: vec![0.0; threads * scratch_len(&shape)],
            partials: vec![0.0; MAX_PARTIALS * state],
        }
    }

    /// Bytes held.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.scratch.as_slice()) + size_of_val(self.partials.as_slice())
    }

    /// Attends all rows of `jobs`. `window` is `None` for full attention.
    ///
    /// # Panics
    /// If rows or slots do not exist, or the team is larger than promised.
    pub fn run(
        &mut self,
        team: &mut Team,
        isa: Isa,
        memory: &AlignedBuf,
        jobs: &[AttentionJob],
        rows: AttentionRows<'_>,
        window: Option<Window<'_>>,
    ) {
        let shape = self.shape;
        let q_dim = shape.heads * shape.head_dim;
        assert!(self.scratch.len() >= team.num_threads() * scratch_len(&shape), "scratch per thread");
        let numbers = memory.num_bytes() / shape.number.bytes();
        for job in jobs {
            let last_row = job.first_row + job.rows;
            assert!(job.slots_before + job.rows <= job.place.layout.slots(), "slots of a job exist");
            assert!(job.place.base + job.place.layout.layer_len() <= numbers, "the layer exists");
            assert!(q_dim <= rows.query_stride, "queries lie in a row");
            assert!(last_row * rows.query_stride <= rows.queries.len(), "query rows exist");
            assert!(last_row * q_dim <= rows.out.len(), "output rows exist");
            if let Some(window) = &window {
                let (positions, stride) = window.slots.slot_positions(job.id);
                let filled = (shape.kv_heads - 1) * stride + job.slots_before + job.rows;
                assert!(positions.len() >= filled, "a position per slot");
                assert!(window.row_positions.len() >= last_row, "a position per row");
            }
        }
        self.plan(team.num_threads(), jobs);
        let call = Call {
            shape,
            memory,
            jobs,
            queries: rows.queries,
            query_stride: rows.query_stride,
            out: Shared(rows.out.as_mut_ptr()),
            partials: Shared(self.partials.as_mut_ptr()),
            window,
        };
        let scratch = Shared(self.scratch.as_mut_ptr());
        let tasks = &self.tasks;
        team.run(tasks.len(), |thread, task| {
            // SAFETY: each thread has its own part.
            let scratch = unsafe { scratch.slice(thread * scratch_len(&shape), scratch_len(&shape)) };
            isa.run(RunTask { call: &call, task: tasks[task], scratch });
        });
        isa.run(MergeSplits { call: &call, tasks });
    }

    /// Lists the tasks. Sequences are split only if there are too few tasks otherwise.
    fn plan(&mut self, threads: usize, jobs: &[AttentionJob]) {
        self.tasks.clear();
        let group = self.shape.heads / self.shape.kv_heads;
        let whole: usize =
            jobs.iter().map(|job| self.shape.kv_heads * (job.rows * group).div_ceil(TASK_QUERIES)).sum();
        let mut partial = 0;
        // Tasks of late rows are the longest: they go first.
        for (job_idx, job) in jobs.iter().enumerate().rev() {
            let queries = job.rows * group;
            let splits = (job.slots_before + job.rows).div_ceil(SPLIT);
            for head in 0..self.shape.kv_heads {
                let task = |first_query: usize, queries: usize| Task {
                    job: job_idx as u32,
                    head: head as u32,
                    first_query: first_query as u32,
                    queries: queries as u32,
                    split: None,
                    partial: 0,
                };
                let split = threads > 1
                    && whole < 4 * threads
                    && splits > 1
                    && queries <= TASK_QUERIES
                    && partial + splits * queries <= MAX_PARTIALS;
                if split {
                    for split in 0..splits {
                        let part =
                            Task { split: Some(split as u32), partial: partial as u32, ..task(0, queries) };
                        self.tasks.push(part);
                        partial += queries;
                    }
                } else {
                    for first in (0..queries).step_by(TASK_QUERIES).rev() {
                        self.tasks.push(task(first, TASK_QUERIES.min(queries - first)));
                    }
                }
            }
        }
    }
}

/// A state: maximum, 15 unused, 16 partial sums, `value_width` weighted values.
fn state_len(shape: &AttentionShape) -> usize {
    2 * LANES + shape.head_dim.next_multiple_of(LANES)
}

fn scratch_len(shape: &AttentionShape) -> usize {
    let tile = TILE * (shape.head_dim + shape.head_dim.next_multiple_of(LANES));
    TASK_QUERIES * (shape.head_dim + 2 * state_len(shape)) + PACK * TILE + tile
}

/// What all tasks share.
struct Call<'a> {
    shape: AttentionShape,
    memory: &'a AlignedBuf,
    jobs: &'a [AttentionJob],
    queries: &'a [f32],
    query_stride: usize,
    out: Shared<f32>,
    partials: Shared<f32>,
    window: Option<Window<'a>>,
}

/// A number type of slots.
trait Number: Copy {
    /// Whether widening costs something.
    const NARROW: bool;

    /// # Safety
    /// 16 readable numbers at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Half(u16);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Brain(u16);

impl Number for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Number for Half {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Number for Brain {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p.cast()) }
    }
}

struct RunTask<'a, 'p> {
    call: &'a Call<'p>,
    task: Task,
    scratch: &'a mut [f32],
}

impl SimdOp for RunTask<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let base = self.call.jobs[self.task.job as usize].place.base;
        match self.call.shape.number {
            SlotNumber::F32 => attend(s, self, |memory| memory.as_slice::<f32>()[base..].as_ptr()),
            SlotNumber::F16 => {
                attend(s, self, |memory| memory.as_slice::<u16>()[base..].as_ptr().cast::<Half>())
            }
            SlotNumber::Bf16 => {
                attend(s, self, |memory| memory.as_slice::<u16>()[base..].as_ptr().cast::<Brain>())
            }
        }
    }
}

/// One task: scales its queries, walks splits and tiles, writes results or a partial result.
#[inline(always)]
fn attend<S: Simd, N: Number>(s: S, run: RunTask<'_, '_>, layer: impl Fn(&AlignedBuf) -> *const N) {
    let RunTask { call, task, scratch } = run;
    let shape = call.shape;
    let job = &call.jobs[task.job as usize];
    let (layout, head) = (&job.place.layout, task.head as usize);
    let dim = shape.head_dim;
    let state = state_len(&shape);
    let count = task.queries as usize;
    let (queries, scratch) = scratch.split_at_mut(TASK_QUERIES * dim);
    let (scores, scratch) = scratch.split_at_mut(PACK * TILE);
    let (widened, scratch) = scratch.split_at_mut(TILE * (dim + layout.value_width()));
    let scores = scores.as_mut_ptr();
    let (partial, total) = scratch.split_at_mut(TASK_QUERIES * state);
    let rows = TaskRows::new(call, &task);
    rows.scale_queries(call, &mut queries[..count * dim]);

    let last_slot = rows.visible(count - 1);
    let splits = match task.split {
        Some(split) => split as usize..split as usize + 1,
        None => 0..last_slot.div_ceil(SPLIT),
    };
    for (i, split) in splits.enumerate() {
        let states = if i == 0 { &mut *total } else { &mut *partial };
        for state in states.chunks_exact_mut(state).take(count) {
            state.fill(0.0);
            state[0] = f32::NEG_INFINITY;
        }
        for start in (split * SPLIT..last_slot.min((split + 1) * SPLIT)).step_by(TILE) {
            let filled = TILE.min(last_slot - start);
            // SAFETY: `Attention::run` has checked that the slots exist.
            let (keys, values) = unsafe {
                let layer = layer(call.memory);
                (layer.add(layout.key(head, start)), layer.add(layout.value(head, start)))
            };
            let states = states.as_mut_ptr();
            let work = PackWork { call, rows: &rows, count, queries: queries.as_ptr(), states, scores };
            // SAFETY: as above; groups of 16 slots are padded to full; scratch has `count` queries
            // and states, a pack of scores and a widened tile.
            unsafe {
                if count > PACK && N::NARROW {
                    let wide_keys = widened.as_mut_ptr();
                    let wide_values = wide_keys.add(TILE * dim);
                    widen(s, keys, filled.next_multiple_of(LANES) * dim, wide_keys);
                    widen(s, values, filled * layout.value_width(), wide_values);
                    let tile = Tile {
                        keys: wide_keys.cast_const(),
                        values: wide_values.cast_const(),
                        start,
                        job,
                        head,
                    };
                    tile.attend_all(s, work);
                } else {
                    Tile { keys, values, start, job, head }.attend_all(s, work);
                }
            }
        }
        if i > 0 {
            for (total, partial) in total.chunks_exact_mut(state).zip(partial.chunks_exact(state)).take(count)
            {
                merge(s, total, partial);
            }
        }
    }
    if task.split.is_some() {
        // SAFETY: `plan` gave this task the states from `partial`, and none other.
        let out = unsafe { call.partials.slice(task.partial as usize * state, count * state) };
        out.copy_from_slice(&total[..count * state]);
    } else {
        for (i, total) in total.chunks_exact(state).take(count).enumerate() {
            // SAFETY: a query belongs to one task.
            finish(s, total, unsafe { call.out.slice(rows.output(&shape, i), dim) });
        }
    }
}

/// Which rows and heads the queries of a task are: query `i` is row `(first + i) / group`, head
/// `(first + i) % group` of the key/value head.
struct TaskRows {
    first_query: usize,
    group: usize,
    head: usize,
    first_row: usize,
    slots_before: usize,
}

impl TaskRows {
    #[inline(always)]
    fn new(call: &Call<'_>, task: &Task) -> Self {
        let job = &call.jobs[task.job as usize];
        Self {
            first_query: task.first_query as usize,
            group: call.shape.heads / call.shape.kv_heads,
            head: task.head as usize,
            first_row: job.first_row,
            slots_before: job.slots_before,
        }
    }

    /// Row of query `i` within the job.
    #[inline(always)]
    fn row(&self, i: usize) -> usize {
        (self.first_query + i) / self.group
    }

    /// Slots that query `i` sees.
    #[inline(always)]
    fn visible(&self, i: usize) -> usize {
        self.slots_before + self.row(i) + 1
    }

    /// Column of query `i` in a row.
    #[inline(always)]
    fn column(&self, shape: &AttentionShape, i: usize) -> usize {
        (self.head * self.group + (self.first_query + i) % self.group) * shape.head_dim
    }

    #[inline(always)]
    fn output(&self, shape: &AttentionShape, i: usize) -> usize {
        (self.first_row + self.row(i)) * shape.heads * shape.head_dim + self.column(shape, i)
    }

    #[inline(always)]
    fn scale_queries(&self, call: &Call<'_>, out: &mut [f32]) {
        let scale = call.shape.scale * std::f32::consts::LOG2_E;
        let dim = call.shape.head_dim;
        for (i, out) in out.chunks_exact_mut(dim).enumerate() {
            let at = (self.first_row + self.row(i)) * call.query_stride + self.column(&call.shape, i);
            for (out, x) in out.iter_mut().zip(&call.queries[at..at + dim]) {
                *out = x * scale;
            }
        }
    }
}

/// 64 slots of one head, as stored or widened.
struct Tile<'a, N> {
    /// `[4, head_dim, 16]`.
    keys: *const N,
    /// `[64, value_width]`.
    values: *const N,
    /// The first slot.
    start: usize,
    job: &'a AttentionJob,
    head: usize,
}

/// All queries of a task, with their states.
#[derive(Clone, Copy)]
struct PackWork<'a, 'p> {
    call: &'a Call<'p>,
    rows: &'a TaskRows,
    count: usize,
    queries: *const f32,
    states: *mut f32,
    scores: *mut f32,
}

/// Some queries' scaled form, states and scores.
struct Pack {
    queries: *const f32,
    states: *mut f32,
    scores: *mut f32,
    /// The first of them within the task.
    first: usize,
}

/// Widens a multiple of 16 numbers.
///
/// # Safety
/// `count` numbers at `from` and room for them at `to`.
#[inline(always)]
unsafe fn widen<S: Simd, N: Number>(s: S, from: *const N, count: usize, to: *mut f32) {
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to.add(i), N::load(s, from.add(i))) };
    }
}

/// Asks for 64 numbers that will be needed soon.
#[inline(always)]
fn prefetch<N>(p: *const N) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(64 * size_of::<N>()).div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch of any address is allowed and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast::<i8>().wrapping_add(64 * line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

impl<N: Number> Tile<'_, N> {
    /// One step of the online softmax for all queries of a task, as many at a time as registers
    /// can hold.
    ///
    /// # Safety
    /// Slots, queries, states and scores exist.
    #[inline(always)]
    unsafe fn attend_all<S: Simd>(&self, s: S, work: PackWork<'_, '_>) {
        let PackWork { call, rows, .. } = work;
        let (dim, state) = (call.shape.head_dim, state_len(&call.shape));
        let mut first = 0;
        while first < work.count {
            // SAFETY: the caller's promise.
            first += unsafe {
                let pack = Pack {
                    queries: work.queries.add(first * dim),
                    states: work.states.add(first * state),
                    scores: work.scores,
                    first,
                };
                match work.count - first {
                    6.. if S::WIDE => self.attend::<S, 6>(s, call, rows, pack),
                    4.. if S::WIDE => self.attend::<S, 4>(s, call, rows, pack),
                    3.. => self.attend::<S, 3>(s, call, rows, pack),
                    2 => self.attend::<S, 2>(s, call, rows, pack),
                    _ => self.attend::<S, 1>(s, call, rows, pack),
                }
            };
        }
    }

    /// One step of the online softmax for `Q` queries; returns `Q`.
    ///
    /// # Safety
    /// Slots, queries, states and scores exist.
    #[inline(always)]
    unsafe fn attend<S: Simd, const Q: usize>(
        &self,
        s: S,
        call: &Call<'_>,
        rows: &TaskRows,
        pack: Pack,
    ) -> usize {
        let shape = &call.shape;
        let (dim, state) = (shape.head_dim, state_len(shape));
        let layout = &self.job.place.layout;
        // Rows ascend, so the last query sees the most.
        let filled = rows.visible(pack.first + Q - 1).saturating_sub(self.start).min(TILE);
        if filled == 0 {
            return Q;
        }
        let positions = call.window.map(|window| {
            let (positions, stride) = window.slots.slot_positions(self.job.id);
            (window, &positions[self.head * stride + self.start..][..filled])
        });
        if let Some((window, positions)) = positions {
            let oldest = window.row_positions[rows.first_row + rows.row(pack.first)];
            if positions.iter().all(|position| position.saturating_add(window.size) <= oldest) {
                return Q;
            }
        }
        // SAFETY: the caller's promise; groups of 16 slots are padded to full.
        unsafe {
            let keys = self.keys;
            let groups = filled.div_ceil(LANES);
            if S::WIDE && groups == TILE / LANES {
                scores::<S, N, Q, { TILE / LANES }>(s, keys, dim, pack.queries, pack.scores);
            } else {
                for group in 0..groups {
                    let keys = keys.add(group * LANES * dim);
                    scores::<S, N, Q, 1>(s, keys, dim, pack.queries, pack.scores.add(group * LANES));
                }
            }
            let mut rescale = [1.0; Q];
            for (i, rescale) in rescale.iter_mut().enumerate() {
                let scores = std::slice::from_raw_parts_mut(pack.scores.add(i * TILE), groups * LANES);
                let seen = rows.visible(pack.first + i).saturating_sub(self.start).min(TILE);
                scores[seen.min(groups * LANES)..].fill(f32::NEG_INFINITY);
                if let Some((window, positions)) = positions {
                    let own = window.row_positions[rows.first_row + rows.row(pack.first + i)];
                    for (score, position) in scores[..seen].iter_mut().zip(positions) {
                        if position.saturating_add(window.size) <= own {
                            *score = f32::NEG_INFINITY;
                        }
                    }
                }
                *rescale = soften(s, scores, pack.states.add(i * state));
            }
            let width = layout.value_width();
            let mut column = 0;
            let sums = pack.states.add(2 * LANES);
            while column < width {
                let values = self.values.add(column);
                let sums = sums.add(column);
                let left = (width - column) / LANES;
                let step =
                    Weighted { values, width, filled, scores: pack.scores, rescale: &rescale, sums, state };
                column += LANES
                    * match left {
                        4.. if S::WIDE => step.add::<S, 4>(s),
                        2.. if S::WIDE => step.add::<S, 2>(s),
                        _ => step.add::<S, 1>(s),
                    };
            }
        }
        Q
    }
}

/// Scores of `Q` queries with `G` groups of 16 slots, into `out [Q, TILE]`.
///
/// # Safety
/// Keys `[G, dim, 16]`, queries `[Q, dim]`, room in `out`.
#[inline(always)]
unsafe fn scores<S: Simd, N: Number, const Q: usize, const G: usize>(
    s: S,
    keys: *const N,
    dim: usize,
    queries: *const f32,
    out: *mut f32,
) {
    let mut acc = [[s.splat(0.0); G]; Q];
    // SAFETY: the caller's promise.
    unsafe {
        for d in 0..dim {
            if N::NARROW && G == TILE / LANES {
                // The next tile follows; without this, memory is waited for.
                prefetch(keys.wrapping_add(TILE * (dim + d)));
            }
            let mut key = [s.splat(0.0); G];
            for (g, key) in key.iter_mut().enumerate() {
                *key = N::load(s, keys.add((g * dim + d) * LANES));
            }
            for (q, acc) in acc.iter_mut().enumerate() {
                let query = s.splat(*queries.add(q * dim + d));
                for (acc, key) in acc.iter_mut().zip(key) {
                    *acc = s.fma(key, query, *acc);
                }
            }
        }
        for (q, acc) in acc.into_iter().enumerate() {
            for (g, acc) in acc.into_iter().enumerate() {
                s.store(out.add(q * TILE + g * LANES), acc);
            }
        }
    }
}

/// Turns one query's scores into weights, updates maximum and sums of its state, and returns the
/// factor on what it has gathered so far.
///
/// # Safety
/// `scores` is whole groups of 16; a state lies at `state`.
#[inline(always)]
unsafe fn soften<S: Simd>(s: S, scores: &mut [f32], state: *mut f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let before = *state;
        let mut largest = s.splat(before);
        for group in scores.chunks_exact(LANES) {
            largest = s.max(s.load(group.as_ptr()), largest);
        }
        let largest = s.largest(largest);
        if largest == f32::NEG_INFINITY {
            scores.fill(0.0);
            return 1.0;
        }
        let top = s.splat(largest);
        let factor = s.exp2(s.sub(s.splat(before), top));
        let mut sums = s.mul(s.load(state.add(LANES)), factor);
        for group in scores.chunks_exact_mut(LANES) {
            let weight = s.exp2(s.sub(s.load(group.as_ptr()), top));
            s.store(group.as_mut_ptr(), weight);
            sums = s.add(sums, weight);
        }
        s.store(state.add(LANES), sums);
        *state = largest;
        s.to_array(factor)[0]
    }
}

/// Adds weighted values to the sums of some queries.
struct Weighted<'a, N, const Q: usize> {
    /// `[filled, width]`, from the first column wanted.
    values: *const N,
    width: usize,
    filled: usize,
    /// Weights `[Q, TILE]`.
    scores: *const f32,
    rescale: &'a [f32; Q],
    /// The first query's sums at the first column; `state` numbers apart.
    sums: *mut f32,
    state: usize,
}

impl<N: Number, const Q: usize> Weighted<'_, N, Q> {
    /// `V` registers of columns; returns `V`.
    ///
    /// # Safety
    /// All that the fields point to exists.
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize>(&self, s: S) -> usize {
        let mut acc = [[s.splat(0.0); V]; Q];
        // SAFETY: the caller's promise.
        unsafe {
            for (q, acc) in acc.iter_mut().enumerate() {
                let rescale = s.splat(self.rescale[q]);
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.mul(s.load(self.sums.add(q * self.state + v * LANES)), rescale);
                }
            }
            for slot in 0..self.filled {
                if N::NARROW && V == 4 {
                    prefetch(self.values.wrapping_add((TILE + slot) * self.width));
                }
                let mut value = [s.splat(0.0); V];
                for (v, value) in value.iter_mut().enumerate() {
                    *value = N::load(s, self.values.add(slot * self.width + v * LANES));
                }
                for (q, acc) in acc.iter_mut().enumerate() {
                    let weight = s.splat(*self.scores.add(q * TILE + slot));
                    for (acc, value) in acc.iter_mut().zip(value) {
                        *acc = s.fma(weight, value, *acc);
                    }
                }
            }
            for (q, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    s.store(self.sums.add(q * self.state + v * LANES), acc);
                }
            }
        }
        V
    }
}

/// Adds the state `part`, of later slots, to `total`.
#[inline(always)]
fn merge<S: Simd>(s: S, total: &mut [f32], part: &[f32]) {
    let largest = if part[0] > total[0] { part[0] } else { total[0] };
    if part[0] == f32::NEG_INFINITY {
        return;
    }
    let a = s.exp2(s.splat(total[0] - largest));
    let b = s.exp2(s.splat(part[0] - largest));
    total[0] = largest;
    for (total, part) in total[LANES..].chunks_exact_mut(LANES).zip(part[LANES..].chunks_exact(LANES)) {
        // SAFETY: chunks of 16.
        unsafe {
            let sum = s.fma(s.load(part.as_ptr()), b, s.mul(s.load(total.as_ptr()), a));
            s.store(total.as_mut_ptr(), sum);
        }
    }
}

/// Divides by the sum of weights.
#[inline(always)]
fn finish<S: Simd>(s: S, state: &[f32], out: &mut [f32]) {
    // SAFETY: a state has 16 partial sums behind its maximum.
    let sum = s.sum(unsafe { s.load(state[LANES..].as_ptr()) });
    let inverse = 1.0 / sum;
    for (out, x) in out.iter_mut().zip(&state[2 * LANES..]) {
        *out = x * inverse;
    }
}

/// Merges the partial results of split sequences, in order.
struct MergeSplits<'a, 'p> {
    call: &'a Call<'p>,
    tasks: &'a [Task],
}

impl SimdOp for MergeSplits<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let shape = self.call.shape;
        let state = state_len(&shape);
        let mut total_at = 0;
        for (i, task) in self.tasks.iter().enumerate() {
            let Some(split) = task.split else { continue };
            let len = task.queries as usize * state;
            if split == 0 {
                total_at = task.partial as usize * state;
            }
            // SAFETY: all tasks are done; the first split's states and this one's are disjoint.
            let total = unsafe { self.call.partials.slice(total_at, len) };
            if split > 0 {
                // SAFETY: as above.
                let part = unsafe { self.call.partials.slice(task.partial as usize * state, len) };
                for (total, part) in total.chunks_exact_mut(state).zip(part.chunks_exact(state)) {
                    merge(s, total, part);
                }
            }
            // The tasks of one sequence and head follow one another.
            if self.tasks.get(i + 1).is_none_or(|next| next.split.is_none_or(|next| next == 0)) {
                let rows = TaskRows::new(self.call, task);
                for (i, total) in total.chunks_exact(state).enumerate() {
                    // SAFETY: all tasks are done and no other writes this query.
                    finish(s, total, unsafe { self.call.out.slice(rows.output(&shape, i), shape.head_dim) });
                }
            }
        }
    }
}
