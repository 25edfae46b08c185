//! Attention of query rows over the slots of one block and layer.
//!
//! Softmax is computed online (FlashAttention, arXiv 2205.14135) over tiles of 64 slots that start
//! at fixed slot indices; every 256 slots a new partial result starts, and partial results are
//! merged in order (as in FlashDecoding). A query's arithmetic depends on its own slots alone: not
//! on the rows that share a tile, on chunking, or on which thread computes a part. So decode may
//! split a long sequence among threads while prefill does not, and both give the same bits.
//! Queries are scaled by `log2(e)` as well, so that exponentials are powers of two.
//!
//! Cache methods rank slots by the attention that they received; see [`Attention::run_received`].

mod inner;
mod number;
mod received;
mod task;
mod tile;

pub use self::received::{Received, ReceivedMode, ReceivedRows};
use self::{
    received::{AddReceived, Kept},
    task::{MergeSplits, RunTask},
};
use super::{
    AlignedBuf, Isa, Shared, Team,
    kv::{KvPlace, SlotNumber},
    simd::LANES,
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

/// Tasks that there is room for from the start.
const FIRST_TASKS: usize = 1024;

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
    /// Maximum of the scores and inverse sum of the weights of every query `[rows, heads]`, for
    /// [`Self::run_received`].
    softmax: Vec<[f32; 2]>,
    /// Scores that it needs once more, of those jobs that have a place for them.
    kept_scores: Vec<f32>,
    kept: Vec<Option<Kept>>,
}

impl Attention {
    /// Scratch for a team of `threads`.
    ///
    /// # Panics
    /// If the shape contradicts itself.
    pub fn new(shape: AttentionShape, threads: usize) -> Self {
        assert!(
            shape.heads > 0 && shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
            "query heads per key/value head"
        );
        assert!(shape.head_dim > 0 && shape.head_dim.is_multiple_of(8), "head_dim must be a multiple of 8");
        Self {
            shape,
            tasks: Vec::with_capacity(FIRST_TASKS),
            scratch: vec![0.0; threads * scratch_len(&shape)],
            partials: vec![0.0; MAX_PARTIALS * state_len(&shape)],
            softmax: Vec::new(),
            kept_scores: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Bytes that [`Self::new`] allocates.
    pub fn bytes_for(shape: AttentionShape, threads: usize) -> usize {
        let numbers = threads * scratch_len(&shape) + MAX_PARTIALS * state_len(&shape);
        FIRST_TASKS * size_of::<Task>() + numbers * size_of::<f32>()
    }

    /// Bytes that [`Self::run_received`] adds at most, with calls of up to `rows` rows. They are
    /// allocated when they are needed first.
    pub fn bytes_for_received(shape: AttentionShape, rows: usize) -> usize {
        received::bytes_for(&shape, rows)
    }

    /// Bytes held.
    pub fn num_bytes(&self) -> usize {
        let received = 2 * self.softmax.capacity() + self.kept_scores.capacity();
        let numbers = self.scratch.len() + self.partials.len() + received;
        self.tasks.capacity() * size_of::<Task>() + numbers * size_of::<f32>()
    }

    /// Attends all rows of `jobs`, which ascend: no job starts before the end of the one before it.
    /// `window` is `None` for full attention.
    ///
    /// # Panics
    /// If rows or slots do not exist, jobs have no rows, share some or are of another shape, or the
    /// team is larger than promised.
    pub fn run(
        &mut self,
        team: &mut Team,
        isa: Isa,
        memory: &AlignedBuf,
        jobs: &[AttentionJob],
        rows: AttentionRows<'_>,
        window: Option<Window<'_>>,
    ) {
        let rows = ReceivedRows { rows, jobs: &[], sums: &mut [] };
        self.attend(team, isa, memory, jobs, rows, window);
    }

    /// [`Self::run`], and the attention that slots receive: for a job with a [`Received`], head `h`
    /// and slot `i` of its array, `sum[h, i] += P` summed over the query heads of `h` in their order,
    /// for its rows in their order, with the final softmax weights `P`. Every row is added to the
    /// running value in f32, so that the bits are the same for any chunking of the rows.
    ///
    /// Costs the exponentials once more, beyond some size of the batch the scores too; jobs without a
    /// [`Received`] cost nothing.
    ///
    /// # Panics
    /// As [`Self::run`], or if there is not one request per job, or arrays of jobs do not exist or
    /// do not ascend.
    pub fn run_received(
        &mut self,
        team: &mut Team,
        isa: Isa,
        memory: &AlignedBuf,
        jobs: &[AttentionJob],
        rows: ReceivedRows<'_>,
        window: Option<Window<'_>>,
    ) {
        assert_eq!(rows.jobs.len(), jobs.len(), "a request or none per job");
        rows.check(self.shape.kv_heads, jobs);
        self.attend(team, isa, memory, jobs, rows, window);
    }

    fn attend(
        &mut self,
        team: &mut Team,
        isa: Isa,
        memory: &AlignedBuf,
        jobs: &[AttentionJob],
        rows: ReceivedRows<'_>,
        window: Option<Window<'_>>,
    ) {
        let shape = self.shape;
        let ReceivedRows { rows, jobs: requests, sums } = rows;
        assert!(self.scratch.len() >= team.num_threads() * scratch_len(&shape), "scratch per thread");
        self.check(memory, jobs, &rows, window.as_ref());
        self.plan(team.num_threads(), jobs);
        let wanted = requests.iter().any(Option::is_some);
        self.kept.clear();
        if wanted {
            let queries = jobs.last().map_or(0, |job| (job.first_row + job.rows) * shape.heads);
            grow(&mut self.softmax, queries);
            let scores = received::plan_kept(&shape, jobs, requests, &mut self.kept);
            grow(&mut self.kept_scores, scores);
        }
        let call = Call {
            shape,
            memory,
            jobs,
            queries: rows.queries,
            query_stride: rows.query_stride,
            out: Shared(rows.out.as_mut_ptr()),
            partials: Shared(self.partials.as_mut_ptr()),
            softmax: wanted.then_some(Shared(self.softmax.as_mut_ptr())),
            kept_scores: Shared(self.kept_scores.as_mut_ptr()),
            kept: &self.kept,
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
        if !wanted {
            return;
        }
        received::plan(&shape, jobs, requests, &self.kept, &mut self.tasks);
        let (tasks, sums) = (&self.tasks, Shared(sums.as_mut_ptr()));
        team.run(tasks.len(), |thread, task| {
            let task = tasks[task];
            let Some(request) = requests[task.job as usize] else { return };
            // SAFETY: each thread has its own part.
            let scratch = unsafe { scratch.slice(thread * scratch_len(&shape), scratch_len(&shape)) };
            isa.run(AddReceived { call: &call, task, request, sums, scratch });
        });
    }

    /// Panics unless all rows, slots and positions exist and no two jobs share a row.
    fn check(
        &self,
        memory: &AlignedBuf,
        jobs: &[AttentionJob],
        rows: &AttentionRows<'_>,
        window: Option<&Window<'_>>,
    ) {
        let shape = &self.shape;
        let q_dim = shape.heads * shape.head_dim;
        let numbers = memory.num_bytes() / shape.number.bytes();
        assert!(q_dim <= rows.query_stride, "queries lie in a row");
        let num_rows = (rows.queries.len() / rows.query_stride).min(rows.out.len() / q_dim);
        let mut free_row = 0;
        for job in jobs {
            let layout = job.place.layout;
            assert!(layout.fits(shape.number, shape.kv_heads, shape.head_dim), "a layer of this shape");
            assert!(job.place.holds(shape.number), "an aligned layer");
            // Tasks write to their rows at once, so no two may have the same; subtractions instead of
            // sums, because sums may wrap.
            assert!(job.rows > 0, "a job has rows");
            assert!(job.first_row >= free_row, "rows of jobs ascend and do not overlap");
            assert!(job.rows <= num_rows && job.first_row <= num_rows - job.rows, "rows exist");
            let slots = layout.slots();
            assert!(job.rows <= slots && job.slots_before <= slots - job.rows, "slots of a job exist");
            let layer = layout.layer_len();
            assert!(layer <= numbers && job.place.base <= numbers - layer, "the layer exists");
            let last_row = job.first_row + job.rows;
            free_row = last_row;
            if let Some(window) = window {
                let (positions, stride) = window.slots.slot_positions(job.id);
                let filled = (shape.kv_heads - 1) * stride + job.slots_before + job.rows;
                assert!(positions.len() >= filled, "a position per slot");
                assert!(window.row_positions.len() >= last_row, "a position per row");
            }
        }
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

/// Makes room for `len` numbers and no more than that.
fn grow<T: Copy + Default>(numbers: &mut Vec<T>, len: usize) {
    numbers.reserve_exact(len.saturating_sub(numbers.len()));
    numbers.resize(len.max(numbers.len()), T::default());
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
    /// Where queries leave what [`AddReceived`] needs; `None` if nothing does.
    softmax: Option<Shared<[f32; 2]>>,
    kept_scores: Shared<f32>,
    /// One per job; empty if nothing is kept.
    kept: &'a [Option<Kept>],
    window: Option<Window<'a>>,
}
