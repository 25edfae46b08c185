//! A small team of threads for the many short parallel parts of one step.
//!
//! A step forks and joins some 150 times for tens of microseconds each; a general pool's wake-up
//! would cost as much as the work. Workers spin for a short, bounded time after a job and then
//! park. Tasks are claimed one by one, and a worker that has not woken when the caller runs out of
//! tasks is let off, so that a busy core delays nothing but its own share.

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, Thread},
};

/// Spin iterations before a thread parks: about 30 µs.
const SPINS: u32 = 1000;

/// A worker has nothing to do and looks at its state.
const IDLE: u32 = 0;
/// A worker has nothing to do and is parked or about to.
const PARKED: u32 = 1;
/// A job lies ready; worker or caller takes this back to end it.
const OFFERED: u32 = 2;
/// The worker runs the job.
const RUNNING: u32 = 3;
/// The worker runs the job, the caller is parked or about to.
const AWAITED: u32 = 4;
/// The worker must end.
const ENDED: u32 = 5;

/// A job with its type erased.
#[derive(Clone)]
struct Job {
    /// The closure.
    data: *const (),
    /// Runs the closure's remaining tasks on behalf of a thread.
    work: unsafe fn(*const (), thread: usize),
    /// Whom to wake.
    caller: Thread,
}

/// What a worker and the caller share.
struct Seat {
    state: AtomicU32,
    /// Written by the caller while the state is [`IDLE`] or [`PARKED`], read by the worker in
    /// [`RUNNING`].
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is handed over by the state's release and acquire operations; its pointer is to a
// closure that is `Sync` and outlives the job (see `Team::run`).
unsafe impl Send for Seat {}
// SAFETY: as above.
unsafe impl Sync for Seat {}

struct Worker {
    seat: Arc<Seat>,
    thread: JoinHandle<()>,
}

/// Threads that share work: the caller and `threads - 1` workers.
pub struct Team {
    workers: Vec<Worker>,
}

/// The closure of one [`Team::run`] and the next task to claim.
struct Tasks<'a, F> {
    run: &'a F,
    next: AtomicUsize,
    count: usize,
}

impl<F: Fn(usize, usize) + Sync> Tasks<'_, F> {
    fn work(&self, thread: usize) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.count {
                return;
            }
            (self.run)(thread, task);
        }
    }

    /// # Safety
    /// `data` points to a live `Self`.
    unsafe fn work_erased(data: *const (), thread: usize) {
        // SAFETY: the caller's promise.
        unsafe { (*data.cast::<Self>()).work(thread) }
    }
}

impl Team {
    /// Starts `threads - 1` workers; 0 means as many threads as cores that this process may use.
    ///
    /// # Errors
    /// The system's, if it refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let threads = if threads == 0 { cores() } else { threads };
        let mut team = Self { workers: Vec::with_capacity(threads.saturating_sub(1)) };
        for thread_idx in 1..threads {
            let seat = Arc::new(Seat {
                state: AtomicU32::new(IDLE),
                job: UnsafeCell::new(None),
                panic: Mutex::new(None),
            });
            let own = Arc::clone(&seat);
            let thread = std::thread::Builder::new()
                .name(format!("locket-cpu-{thread_idx}"))
                .spawn(move || work(&own, thread_idx))?;
            team.workers.push(Worker { seat, thread });
        }
        Ok(team)
    }

    /// The caller and the workers.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run(thread, task)` once for every task below `tasks`, in any order on any threads,
    /// and returns when all are done. `thread` is below [`Self::num_threads`]; no two calls with
    /// the same `thread` overlap. Allocates nothing.
    ///
    /// # Panics
    /// With a task's panic, after all threads have stopped working on this call.
    pub fn run<F: Fn(usize, usize) + Sync>(&mut self, tasks: usize, run: F) {
        let tasks = Tasks { run: &run, next: AtomicUsize::new(0), count: tasks };
        if tasks.count <= 1 || self.workers.is_empty() {
            tasks.work(0);
            return;
        }
        let helpers = &self.workers[..self.workers.len().min(tasks.count - 1)];
        let job = Job {
            data: std::ptr::from_ref(&tasks).cast(),
            work: Tasks::<F>::work_erased,
            caller: std::thread::current(),
        };
        for worker in helpers {
            offer(worker, job.clone());
        }
        // The workers borrow `tasks`: nothing may unwind past here before they have left it.
        let own = catch_unwind(AssertUnwindSafe(|| tasks.work(0)));
        if own.is_err() {
            tasks.next.store(tasks.count, Ordering::Relaxed);
        }
        let mut theirs = None;
        for worker in helpers {
            settle(worker);
            if let Ok(mut panic) = worker.seat.panic.lock() {
                theirs = panic.take().or(theirs);
            }
        }
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

fn offer(worker: &Worker, job: Job) {
    // SAFETY: between two runs the state is IDLE or PARKED and the worker does not touch the job.
    unsafe { *worker.seat.job.get() = Some(job) };
    if worker.seat.state.swap(OFFERED, Ordering::AcqRel) == PARKED {
        worker.thread.thread().unpark();
    }
}

/// Takes the job back, or waits until the worker has left it.
fn settle(worker: &Worker) {
    let state = &worker.seat.state;
    if state.compare_exchange(OFFERED, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        return;
    }
    for _ in 0..SPINS {
        if state.load(Ordering::Acquire) <= PARKED {
            return;
        }
        std::hint::spin_loop();
    }
    if state.compare_exchange(RUNNING, AWAITED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        while state.load(Ordering::Acquire) == AWAITED {
            std::thread::park();
        }
    }
}

/// A worker's life.
fn work(seat: &Seat, thread_idx: usize) {
    loop {
        if !await_job(seat) {
            return;
        }
        // SAFETY: in RUNNING the job belongs to this thread.
        let Some(job) = (unsafe { (*seat.job.get()).clone() }) else { return };
        // SAFETY: the caller of `run` keeps the closure alive until this seat leaves RUNNING.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { (job.work)(job.data, thread_idx) }));
        if let Err(panic) = result
            && let Ok(mut slot) = seat.panic.lock()
        {
            *slot = Some(panic);
        }
        if seat.state.swap(IDLE, Ordering::AcqRel) == AWAITED {
            job.caller.unpark();
        }
    }
}

/// Spins, then parks, until a job was taken (true) or the team is dropped (false).
fn await_job(seat: &Seat) -> bool {
    let mut spins = 0;
    loop {
        match seat.state.load(Ordering::Acquire) {
            OFFERED => {
                if take(seat, OFFERED, RUNNING) {
                    return true;
                }
            }
            ENDED => return false,
            IDLE if spins < SPINS => {
                spins += 1;
                std::hint::spin_loop();
            }
            IDLE => {
                take(seat, IDLE, PARKED);
            }
            // A job that was taken back while this thread woke leaves IDLE behind.
            _ => {
                std::thread::park();
                spins = 0;
            }
        }
    }
}

fn take(seat: &Seat, from: u32, to: u32) -> bool {
    seat.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

impl Drop for Team {
    fn drop(&mut self) {
        for worker in self.workers.drain(..) {
            worker.seat.state.store(ENDED, Ordering::Release);
            worker.thread.thread().unpark();
            // A worker's panic was reported by `run`.
            let _ = worker.thread.join();
        }
    }
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("threads", &self.num_threads()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut team = Team::new(threads).unwrap();
            assert_eq!(team.num_threads(), threads);
            for round in 0..3000 {
                let tasks = round % 17;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, |thread, task| {
                    assert!(thread < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let mut team = Team::new(3).unwrap();
        for bad in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.run(20, |_, task| assert!(task != bad, "task {task}"));
            }));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            team.run(10, |_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45);
        }
    }
}
