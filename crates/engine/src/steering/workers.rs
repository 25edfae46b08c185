//! The threads that compute guides beside the model.
//!
//! A job travels to a worker and back with its set and its steering, so a token costs no allocation. The
//! lists behind the lock are bounded by the running sequences: each has one job at most. Nothing is
//! computed and nothing is dropped while the lock is held.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    Advance, GenerationRequest, Guide, Steering, TokenSet, engine::panic_message, handle::Shared,
    sequence::SequenceId,
};

/// Two, so that one difficult grammar does not hold up all the others; no more, so that the model keeps
/// its processors.
const THREADS: usize = 2;

/// Starts a thread of this name.
type Spawn = fn(String, Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>>;

fn spawn(name: String, work: Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(work)
}

/// A computation of this length is worth a line in the log.
const SLOW: Duration = Duration::from_secs(1);

/// One continuation's steering, and what is known about its next token.
#[derive(Debug)]
pub(crate) struct Job {
    sequence: SequenceId,
    request: Arc<GenerationRequest>,
    choice: u32,
    /// Started by the first computation, off the engine's thread.
    steering: Option<Box<dyn Steering>>,
    /// Belongs to [`Guide::Allowed`].
    pub allowed: TokenSet,
    /// Of the next token, once the job is back.
    pub guide: Guide,
    /// The guide is a failure, and a bug is behind it, not what was asked for.
    pub is_broken: bool,
}

impl Job {
    /// A job whose first computation gives the guide of the first token.
    pub(crate) fn new(
        sequence: SequenceId,
        request: &Arc<GenerationRequest>,
        choice: u32,
        vocab_size: usize,
    ) -> Self {
        let allowed = TokenSet::new(vocab_size as u32);
        let request = Arc::clone(request);
        Self { sequence, request, choice, steering: None, allowed, guide: Guide::Free, is_broken: false }
    }

    /// Whose it is.
    pub(crate) fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// Takes in a token. If that tells the next guide, it is set; otherwise the answer is `true`: it
    /// takes a computation.
    pub(crate) fn advance(&mut self, id: u32) -> bool {
        let Some(steering) = &mut self.steering else { return true };
        let advanced = catch_unwind(AssertUnwindSafe(|| steering.advance(id)));
        match advanced {
            Ok(Advance::Compute) => return true,
            Ok(Advance::Known(Guide::Allowed)) => self.break_off("a set that nobody computed".into()),
            Ok(Advance::Known(guide)) => self.guide = guide,
            Err(panic) => self.break_off(panic_message(panic.as_ref())),
        }
        false
    }

    /// Computes the next guide. A panic is a failure of this sequence.
    fn compute(&mut self) {
        let Self { request, choice, steering, allowed, .. } = self;
        let computed = catch_unwind(AssertUnwindSafe(|| {
            if steering.is_none() {
                *steering = request.steering.as_ref().map(|plan| plan.start(*choice));
            }
            steering.as_mut().map_or(Guide::Free, |steering| steering.compute(allowed))
        }));
        match computed {
            Ok(guide) => self.guide = guide,
            Err(panic) => self.break_off(panic_message(panic.as_ref())),
        }
    }

    fn break_off(&mut self, reason: String) {
        self.guide = Guide::Failed(reason);
        self.is_broken = true;
    }

    fn compute_and_measure(&mut self, shared: &Shared) {
        let began = shared.clock.now();
        self.compute();
        let took = shared.clock.now().saturating_sub(began);
        shared.metrics.steering().computed(took);
        if took >= SLOW {
            tracing::warn!(request_id = self.request.request_id, ?took, "a guide took long to compute");
        }
    }
}

/// Most jobs that wait to be dropped; further ones are dropped by the engine.
const MAX_OVER: usize = 256;

/// What engine and workers share.
#[derive(Debug, Default)]
struct Desk {
    piles: Mutex<Piles>,
    /// A job was put in, or the desk was closed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Piles {
    todo: VecDeque<Job>,
    done: Vec<Job>,
    /// Of sequences that have ended: a grammar's state takes long to drop, too.
    over: Vec<Job>,
    is_closed: bool,
}

impl Desk {
    /// Every change is complete before anything could panic, so a poisoned lock is as good as any.
    fn piles(&self) -> MutexGuard<'_, Piles> {
        self.piles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job to compute, when there is one; `None`: the desk is closed.
    fn next(&self) -> Option<Job> {
        let mut piles = self.piles();
        loop {
            if piles.is_closed {
                return None;
            }
            if let Some(job) = piles.todo.pop_front() {
                return Some(job);
            }
            piles = match piles.over.pop() {
                Some(job) => {
                    drop(piles);
                    drop(job);
                    self.piles()
                }
                None => self.changed.wait(piles).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn finish(&self, job: Job) {
        self.piles().done.push(job);
    }
}

/// The engine's side: hands out jobs and takes them back. Threads start with the first jobs and end
/// when this is dropped.
pub(crate) struct Workers {
    desk: Arc<Desk>,
    shared: Arc<Shared>,
    /// Rung when a job is done.
    bell: Arc<dyn Fn() + Send + Sync>,
    threads: Vec<JoinHandle<()>>,
    /// Most threads; tests that compute by hand have none.
    limit: usize,
    /// Starts them.
    spawn: Spawn,
    /// A job was handed out once.
    was_used: bool,
    /// Jobs that were taken back; swapped with the desk's list so that neither is ever made anew.
    taken: Vec<Job>,
}

impl Workers {
    pub(crate) fn new(shared: &Arc<Shared>, bell: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            desk: Arc::default(),
            shared: Arc::clone(shared),
            bell: Arc::new(bell),
            threads: Vec::new(),
            limit: THREADS,
            spawn,
            was_used: false,
            taken: Vec::new(),
        }
    }

    /// Has the guide of a job computed.
    pub(crate) fn submit(&mut self, mut job: Job) {
        self.was_used = true;
        if self.threads.len() < self.limit
            && let Err(error) = self.start_thread()
            && self.threads.is_empty()
        {
            job.break_off(format!("cannot start a thread: {error}"));
            self.desk.finish(job);
            (self.bell)();
            return;
        }
        self.desk.piles().todo.push_back(job);
        self.desk.changed.notify_one();
    }

    fn start_thread(&mut self) -> std::io::Result<()> {
        let (desk, shared) = (Arc::clone(&self.desk), Arc::clone(&self.shared));
        let bell = Arc::clone(&self.bell);
        let name = format!("locket-steering-{}", self.threads.len());
        let work = move || {
            while let Some(mut job) = desk.next() {
                job.compute_and_measure(&shared);
                desk.finish(job);
                bell();
            }
        };
        self.threads.push((self.spawn)(name, Box::new(work))?);
        Ok(())
    }

    /// A job that was done.
    pub(crate) fn next_done(&mut self) -> Option<Job> {
        if self.taken.is_empty() {
            std::mem::swap(&mut self.desk.piles().done, &mut self.taken);
        }
        self.taken.pop()
    }

    /// Whether any job was ever handed out: if not, there is nothing to take back.
    pub(crate) fn is_unused(&self) -> bool {
        !self.was_used
    }

    /// Withdraws the job of a sequence that has ended, unless a worker has it already.
    pub(crate) fn forget(&self, sequence: SequenceId) {
        let mut piles = self.desk.piles();
        let at = piles.todo.iter().position(|job| job.sequence == sequence);
        let job = at.and_then(|at| piles.todo.remove(at));
        drop(piles);
        if let Some(job) = job {
            self.discard(job);
        }
    }

    /// Lets a worker drop the job of a sequence that has ended, when there is nothing to compute.
    pub(crate) fn discard(&self, job: Job) {
        let mut piles = self.desk.piles();
        if piles.over.len() < MAX_OVER {
            piles.over.push(job);
            drop(piles);
            self.desk.changed.notify_one();
        } else {
            drop(piles);
            drop(job);
        }
    }
}

impl Drop for Workers {
    /// Jobs that nobody has begun are dropped; begun ones are waited for.
    fn drop(&mut self) {
        self.desk.piles().is_closed = true;
        self.desk.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a steering thread has panicked");
            }
        }
    }
}

#[cfg(test)]
impl Workers {
    /// From now on jobs are computed by [`Self::compute_one`].
    pub(crate) fn work_by_hand(&mut self) {
        self.limit = 0;
    }

    /// From now on no thread can be started.
    pub(crate) fn refuse_threads(&mut self) {
        self.limit = THREADS;
        self.spawn = |_, _| Err(std::io::ErrorKind::WouldBlock.into());
    }

    /// Jobs that nobody has begun.
    pub(crate) fn num_todo(&self) -> usize {
        self.desk.piles().todo.len()
    }

    /// Computes the `at`-th of the jobs that nobody has begun.
    pub(crate) fn compute_one(&self, at: usize) {
        let job = self.desk.piles().todo.remove(at);
        if let Some(mut job) = job {
            job.compute_and_measure(&self.shared);
            self.desk.finish(job);
            (self.bell)();
        }
    }
}
