//! The attention that slots receive: sums of softmax weights over rows and heads.
//!
//! A weight needs the maximum and the sum over all slots, so that this is a second pass. The forward
//! pass keeps its scores for it, as far as there is room; where there is not, they are computed once
//! more, with the same arithmetic. A task has a range of slots of one head to itself and takes the
//! rows in order, so that nothing depends on threads or chunks.

use super::{
    AttentionJob, AttentionRows, AttentionShape, Call, PACK, SPLIT, TASK_QUERIES, TILE, Task,
    number::{Brain, Byte, Half, Number},
    task::TaskRows,
    tile::{PackStep, PackWork, Tile},
};
use crate::cpu::{
    Shared,
    isa::SimdOp,
    kv::{SlotNumber, load_part},
    simd::{LANES, Simd},
};

/// Scores that are kept at most, 16 MiB.
const MAX_KEPT: usize = 4 << 20;

/// Which rows of a job count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceivedMode {
    /// All; their weights are added to the array (H2O, arXiv 2306.14048).
    Sum,
    /// The last; its weights replace those of the filled slots (TOVA, arXiv 2401.06104).
    Last,
}

/// Where the attention that a job's slots receive is gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Which rows count.
    pub mode: ReceivedMode,
    /// First number of the job's array `[kv_heads, stride]`.
    pub at: usize,
    /// Numbers from one head to the next, at least as many as the job has slots.
    pub stride: usize,
}

/// Query rows, where their results go, and where received attention goes.
#[derive(Debug)]
pub struct ReceivedRows<'a> {
    /// The rows.
    pub rows: AttentionRows<'a>,
    /// One request or none per job. Arrays ascend and do not overlap.
    pub jobs: &'a [Option<Received>],
    /// All arrays; slots that a job has no rows for must have been zeroed or carry older sums.
    pub sums: &'a mut [f32],
}

impl ReceivedRows<'_> {
    /// Panics unless all arrays exist and none overlap.
    pub(super) fn check(&self, kv_heads: usize, jobs: &[AttentionJob]) {
        let mut free = 0;
        for (job, request) in jobs.iter().zip(self.jobs) {
            let Some(request) = request else { continue };
            let filled = job.rows.checked_add(job.slots_before);
            assert!(filled.is_some_and(|filled| filled <= request.stride), "a sum per slot");
            assert!(request.at >= free, "arrays of jobs ascend and do not overlap");
            let end = request.stride.checked_mul(kv_heads).and_then(|len| len.checked_add(request.at));
            assert!(end.is_some_and(|end| end <= self.sums.len()), "arrays exist");
            free = end.unwrap_or(usize::MAX);
        }
    }
}

/// Bytes that [`Attention::run_received`](super::Attention::run_received) holds at most for `rows` rows.
pub(super) fn bytes_for(shape: &AttentionShape, rows: usize) -> usize {
    MAX_KEPT * size_of::<f32>() + rows * shape.heads * size_of::<[f32; 2]>()
}

/// Where a job's scores are kept: `[kv_heads, rows * group, stride]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    at: usize,
    /// A multiple of 16.
    stride: usize,
}

/// Where the scores of a task's queries are kept.
#[derive(Clone, Copy)]
pub(super) struct Keep {
    first: *mut f32,
    stride: usize,
}

impl Keep {
    /// Scores of query `i` of the task.
    ///
    /// # Safety
    /// The query exists.
    #[inline(always)]
    pub(super) unsafe fn query(self, i: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.first.add(i * self.stride) }
    }
}

impl Call<'_> {
    /// Where the scores of a task's queries are kept, if they are.
    #[inline(always)]
    pub(super) fn keep(&self, task: &Task) -> Option<Keep> {
        let Kept { at, stride } = (*self.kept.get(task.job as usize)?)?;
        let group = self.shape.heads / self.shape.kv_heads;
        let queries = self.jobs[task.job as usize].rows * group;
        let query = task.head as usize * queries + task.first_query as usize;
        // SAFETY: `plan_kept` has made room for all queries.
        Some(Keep { first: unsafe { self.kept_scores.get().add(at + query * stride) }, stride })
    }
}

/// Decides which jobs' scores are kept; returns how many there are.
pub(super) fn plan_kept(
    shape: &AttentionShape,
    jobs: &[AttentionJob],
    requests: &[Option<Received>],
    kept: &mut Vec<Option<Kept>>,
) -> usize {
    kept.clear();
    let mut len = 0;
    kept.extend(jobs.iter().zip(requests).map(|(job, request)| {
        // One row of many is computed again at less than the cost of keeping all.
        let wanted = request.is_some_and(|request| request.mode == ReceivedMode::Sum || job.rows == 1);
        let stride = (job.slots_before + job.rows).next_multiple_of(LANES);
        let scores = (job.rows * shape.heads).checked_mul(stride)?;
        if !wanted || scores > MAX_KEPT - len {
            return None;
        }
        let at = len;
        len += scores;
        Some(Kept { at, stride })
    }));
    len
}

/// Lists the tasks: ranges of [`SPLIT`] slots of a head, or all slots if there is little to do.
pub(super) fn plan(
    shape: &AttentionShape,
    jobs: &[AttentionJob],
    requests: &[Option<Received>],
    kept: &[Option<Kept>],
    tasks: &mut Vec<Task>,
) {
    tasks.clear();
    let group = shape.heads / shape.kv_heads;
    for (job_idx, ((job, request), kept)) in jobs.iter().zip(requests).zip(kept).enumerate() {
        let Some(request) = request else { continue };
        let rows = match request.mode {
            ReceivedMode::Sum => 0..job.rows,
            ReceivedMode::Last => job.rows - 1..job.rows,
        };
        for head in 0..shape.kv_heads {
            let task = Task {
                job: job_idx as u32,
                head: head as u32,
                first_query: (rows.start * group) as u32,
                queries: (rows.len() * group) as u32,
                split: None,
                partial: 0,
            };
            if kept.is_some() && rows.len() * group <= TASK_QUERIES {
                tasks.push(task);
            } else {
                let splits = (job.slots_before + job.rows).div_ceil(SPLIT) as u32;
                tasks.extend((0..splits).map(|split| Task { split: Some(split), ..task }));
            }
        }
    }
}

/// Adds what the slots of one range receive, with a thread's scratch.
pub(super) struct AddReceived<'a, 'p> {
    pub(super) call: &'a Call<'p>,
    pub(super) task: Task,
    pub(super) request: Received,
    pub(super) sums: Shared<f32>,
    pub(super) scratch: &'a mut [f32],
}

impl SimdOp for AddReceived<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if let Some(keep) = self.call.keep(&self.task) {
            return add_kept(s, self, keep);
        }
        match self.call.shape.number {
            SlotNumber::F32 => add::<S, f32>(s, self),
            SlotNumber::F16 => add::<S, Half>(s, self),
            SlotNumber::Bf16 => add::<S, Brain>(s, self),
            SlotNumber::I8 => add::<S, Byte>(s, self),
        }
    }
}

/// Adds weights from kept scores.
#[inline(always)]
fn add_kept<S: Simd>(s: S, run: AddReceived<'_, '_>, keep: Keep) {
    let AddReceived { call, task, request, sums, .. } = run;
    let Some(softmax) = call.softmax else { return };
    let job = &call.jobs[task.job as usize];
    let group = call.shape.heads / call.shape.kv_heads;
    let slots = job.slots_before + job.rows;
    let range = task.split.map_or(0..slots, |split| {
        let begin = split as usize * SPLIT;
        begin..slots.min(begin + SPLIT)
    });
    let at = request.at + task.head as usize * request.stride;
    // SAFETY: `ReceivedRows::check` has seen that the slots exist; the range belongs to this task.
    let target = unsafe { sums.slice(at + range.start, range.len()) };
    if request.mode == ReceivedMode::Last {
        target.fill(0.0);
    }
    let rows = TaskRows::new(call, &task);
    for query in (0..task.queries as usize).step_by(group) {
        let visible = rows.visible(query).min(range.end);
        for start in (range.start..visible).step_by(LANES) {
            let mut sum = s.splat(0.0);
            for i in query..query + group {
                // SAFETY: the forward pass has written both for every query and all that it sees, in
                // whole groups of 16.
                unsafe {
                    let [top, inverse] = *softmax.get().add(rows.query(&call.shape, i));
                    let score = s.load(keep.query(i).add(start));
                    sum = s.add(sum, s.mul(s.exp2(s.sub(score, s.splat(top))), s.splat(inverse)));
                }
            }
            let target = &mut target[start - range.start..];
            let len = target.len().min(LANES);
            let sum = s.to_array(s.add(load_part(s, target), sum));
            target[..len].copy_from_slice(&sum[..len]);
        }
    }
}

/// Adds weights from scores that are computed once more.
#[inline(always)]
fn add<S: Simd, N: Number>(s: S, run: AddReceived<'_, '_>) {
    let AddReceived { call, task, request, sums, scratch } = run;
    let job = &call.jobs[task.job as usize];
    let (layout, head) = (&job.place.layout, task.head as usize);
    let dim = call.shape.head_dim;
    let (queries, scratch) = scratch.split_at_mut(TASK_QUERIES * dim);
    let (scores, scratch) = scratch.split_at_mut(PACK * TILE);
    let (widened, scratch) = scratch.split_at_mut(TILE * (dim + layout.value_width()));
    // What the forward pass keeps its states in has room for these.
    let (gathered, row_sums) = scratch[..2 * SPLIT].split_at_mut(SPLIT);
    let begin = task.split.unwrap_or(0) as usize * SPLIT;
    let end = (job.slots_before + job.rows).min(begin + SPLIT);
    // SAFETY: `ReceivedRows::check` has seen that the slots exist; the range belongs to this task.
    let target = unsafe { sums.slice(request.at + head * request.stride + begin, end - begin) };
    gathered.fill(0.0);
    if request.mode == ReceivedMode::Sum {
        gathered[..target.len()].copy_from_slice(target);
    }
    row_sums.fill(0.0);
    let last_query = task.first_query + task.queries;
    for first_query in (task.first_query..last_query).step_by(TASK_QUERIES) {
        let count = (last_query - first_query).min(TASK_QUERIES as u32);
        let rows = TaskRows::new(call, &Task { first_query, queries: count, ..task });
        let count = count as usize;
        let visible = rows.visible(count - 1).min(end);
        if visible <= begin {
            continue;
        }
        rows.scale_queries(call, &mut queries[..count * dim]);
        for start in (begin..visible).step_by(TILE) {
            let (queries, scores) = (queries.as_ptr(), scores.as_mut_ptr());
            let work = PackWork { call, rows: &rows, count, queries, scores, keep: None };
            let step =
                Gather { gathered: &mut gathered[start - begin..], row_sums: &mut row_sums[start - begin..] };
            // SAFETY: `Attention::check` has seen that the slots exist; groups of 16 slots are padded
            // to full; scratch has `count` queries, a pack of scores and a widened tile.
            unsafe {
                let tile = Tile::<N>::stored(call, job, head, start);
                if count > PACK && N::NARROW {
                    let filled = TILE.min(visible - start);
                    tile.widened(s, filled, widened.as_mut_ptr(), false).each_pack(s, work, step);
                } else {
                    tile.each_pack(s, work, step);
                }
            }
        }
    }
    target.copy_from_slice(&gathered[..target.len()]);
}

/// Turns scores into final weights and adds them up.
struct Gather<'a> {
    /// Received by each slot, from the tile's first.
    gathered: &'a mut [f32],
    /// The current row's weights over the heads so far. All heads of a row see the same slots, so
    /// whatever queries were left out, these are zero between rows.
    row_sums: &'a mut [f32],
}

impl PackStep for Gather<'_> {
    #[inline(always)]
    unsafe fn take<S: Simd, N: Number, const Q: usize>(
        &mut self,
        s: S,
        _: &Tile<'_, N>,
        work: &PackWork<'_, '_>,
        first: usize,
        filled: usize,
    ) {
        let Some(softmax) = work.call.softmax else { return };
        for i in first..first + Q {
            // SAFETY: the forward pass has written it for every query.
            let [top, inverse] = unsafe { *softmax.get().add(work.rows.query(&work.call.shape, i)) };
            let (top, inverse) = (s.splat(top), s.splat(inverse));
            let ends_row = work.rows.ends_row(i);
            let groups = self.gathered.chunks_exact_mut(LANES).zip(self.row_sums.chunks_exact_mut(LANES));
            for (group, (gathered, row_sums)) in groups.take(filled.div_ceil(LANES)).enumerate() {
                // SAFETY: whole groups of scores lie there (the caller's promise); chunks of 16.
                unsafe {
                    let score = s.load(work.scores.add((i - first) * TILE + group * LANES));
                    let weight = s.mul(s.exp2(s.sub(score, top)), inverse);
                    let mut sum = s.add(s.load(row_sums.as_ptr()), weight);
                    if ends_row {
                        s.store(gathered.as_mut_ptr(), s.add(s.load(gathered.as_ptr()), sum));
                        sum = s.splat(0.0);
                    }
                    s.store(row_sums.as_mut_ptr(), sum);
                }
            }
        }
    }
}
