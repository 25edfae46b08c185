//! One task of attention: its queries, the walk over splits and tiles, and the merge of splits.

use super::{
    AttentionShape, Call, PACK, SPLIT, TASK_QUERIES, TILE, Task,
    number::{Brain, Byte, Half, Number},
    state_len,
    tile::{PackWork, Tile},
};
use crate::cpu::{
    isa::SimdOp,
    kv::SlotNumber,
    simd::{LANES, Simd},
};

/// Runs one task with a thread's scratch.
pub(super) struct RunTask<'a, 'p> {
    pub(super) call: &'a Call<'p>,
    pub(super) task: Task,
    pub(super) scratch: &'a mut [f32],
}

impl SimdOp for RunTask<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.call.shape.number {
            SlotNumber::F32 => attend::<S, f32>(s, self),
            SlotNumber::F16 => attend::<S, Half>(s, self),
            SlotNumber::Bf16 => attend::<S, Brain>(s, self),
            SlotNumber::I8 => attend::<S, Byte>(s, self),
        }
    }
}

/// One task: scales its queries, walks splits and tiles, writes results or a partial result.
#[inline(always)]
fn attend<S: Simd, N: Number>(s: S, run: RunTask<'_, '_>) {
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
    let keep = call.keep(&task);

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
        let states = states.as_mut_ptr();
        for start in (split * SPLIT..last_slot.min((split + 1) * SPLIT)).step_by(TILE) {
            let filled = TILE.min(last_slot - start);
            let work = PackWork { call, rows: &rows, count, queries: queries.as_ptr(), scores, keep };
            // SAFETY: `Attention::check` has seen that the slots exist; groups of 16 slots are padded
            // to full; scratch has `count` queries and states, a pack of scores and a widened tile;
            // the queries' kept scores are this task's.
            unsafe {
                let tile = Tile::<N>::stored(call, job, head, start);
                if count > PACK && N::NARROW {
                    tile.widened(s, filled, widened.as_mut_ptr(), true).attend_all(s, work, states);
                } else {
                    tile.attend_all(s, work, states);
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
            finish(s, call, rows.query(&shape, i), total);
        }
    }
}

/// Which rows and heads the queries of a task are: query `i` is row `(first + i) / group`, head
/// `(first + i) % group` of the key/value head.
pub(super) struct TaskRows {
    first_query: usize,
    group: usize,
    head: usize,
    pub(super) first_row: usize,
    slots_before: usize,
}

impl TaskRows {
    #[inline(always)]
    pub(super) fn new(call: &Call<'_>, task: &Task) -> Self {
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
    pub(super) fn row(&self, i: usize) -> usize {
        (self.first_query + i) / self.group
    }

    /// Slots that query `i` sees.
    #[inline(always)]
    pub(super) fn visible(&self, i: usize) -> usize {
        self.slots_before + self.row(i) + 1
    }

    /// Column of query `i` in a row.
    #[inline(always)]
    fn column(&self, shape: &AttentionShape, i: usize) -> usize {
        (self.head * self.group + (self.first_query + i) % self.group) * shape.head_dim
    }

    /// Query `i` among those of all rows `[rows, heads]`.
    #[inline(always)]
    pub(super) fn query(&self, shape: &AttentionShape, i: usize) -> usize {
        let head = self.head * self.group + (self.first_query + i) % self.group;
        (self.first_row + self.row(i)) * shape.heads + head
    }

    /// Whether query `i` is the last of its row.
    #[inline(always)]
    pub(super) fn ends_row(&self, i: usize) -> bool {
        (self.first_query + i + 1).is_multiple_of(self.group)
    }

    #[inline(always)]
    pub(super) fn scale_queries(&self, call: &Call<'_>, out: &mut [f32]) {
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

/// Divides by the sum of weights and writes the result of `query`, which one task alone has.
#[inline(always)]
fn finish<S: Simd>(s: S, call: &Call<'_>, query: usize, state: &[f32]) {
    let dim = call.shape.head_dim;
    // SAFETY: a state has 16 partial sums behind its maximum.
    let sum = s.sum(unsafe { s.load(state[LANES..].as_ptr()) });
    let inverse = 1.0 / sum;
    // SAFETY: the query exists and nobody else writes to it.
    let out = unsafe { call.out.slice(query * dim, dim) };
    for (out, x) in out.iter_mut().zip(&state[2 * LANES..]) {
        *out = x * inverse;
    }
    if let Some(softmax) = call.softmax {
        // SAFETY: as above; there is one per query.
        unsafe { *softmax.get().add(query) = [state[0], inverse] };
    }
}

/// Merges the partial results of split sequences, in order.
pub(super) struct MergeSplits<'a, 'p> {
    pub(super) call: &'a Call<'p>,
    pub(super) tasks: &'a [Task],
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
                    finish(s, self.call, rows.query(&shape, i), total);
                }
            }
        }
    }
}
