//! The process's main thread, for what runs there natively: `main`, and initializers before it.
//!
//! In an executor's process it waits for jobs. In a process that is not an executor, or while a job runs, jobs run on
//! the thread that has them, unless only the main thread will do.

use crate::{fork, report};
use farlink_rpc::Reading;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

/// The way to the main thread, while it serves.
static SERVING: Mutex<Option<Way>> = Mutex::new(None);

#[derive(Clone)]
struct Way {
    jobs: Sender<Job>,
    /// Readable from the first job on.
    arrival: Arc<OwnedFd>,
}

impl Way {
    fn send(&self, job: Job) {
        self.jobs.send(job).expect("the main thread takes jobs as long as there is a way to send them");
        // It can be counted that often.
        let _ = rustix::io::write(&self.arrival, &1u64.to_ne_bytes());
    }
}

/// Whether the main thread has a job.
static IS_BUSY: AtomicBool = AtomicBool::new(false);

fn serving() -> MutexGuard<'static, Option<Way>> {
    // Nothing that can panic runs under this lock.
    SERVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The main thread to someone who has a job for it.
enum Claim {
    /// It waits, and takes one job over this.
    Free(Way),
    Busy,
    /// It takes no jobs: this process is not an executor's, or is about to end.
    Absent,
}

fn claim() -> Claim {
    match &*serving() {
        None => Claim::Absent,
        Some(_) if IS_BUSY.swap(true, Ordering::Acquire) => Claim::Busy,
        Some(main_thread) => Claim::Free(main_thread.clone()),
    }
}

/// Runs `job` on the main thread if that is waiting for one, else here; gives its result.
pub(crate) fn run<R: Send + 'static>(job: impl FnOnce() -> R + Send + 'static) -> R {
    match claim() {
        Claim::Free(main_thread) => send(&main_thread, job),
        Claim::Busy | Claim::Absent => job(),
    }
}

/// As [`run`], but does nothing if the main thread has another job.
pub(crate) fn run_unless_busy<R: Send + 'static>(job: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    match claim() {
        Claim::Free(main_thread) => Some(send(&main_thread, job)),
        Claim::Absent => Some(job()),
        Claim::Busy => None,
    }
}

/// Runs `job` on the main thread, which has been claimed for it.
fn send<R: Send + 'static>(main_thread: &Way, job: impl FnOnce() -> R + Send + 'static) -> R {
    let (result_sender, result) = sync_channel(1);
    let boxed: Job = Box::new(move || {
        let outcome = catch_unwind(AssertUnwindSafe(job));
        fork::exit_if_child(0);
        // The main thread takes the next job before whoever has this result can send one.
        IS_BUSY.store(false, Ordering::Release);
        let _ = result_sender.send(outcome);
    });
    main_thread.send(boxed);
    match result.recv().expect("the main thread runs each job to its end") {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The main thread's end of the way.
pub(crate) struct Jobs {
    jobs: Receiver<Job>,
    arrival: Arc<OwnedFd>,
}

/// Announces that the calling thread, which has to be the main one, will [`serve`]: jobs may be sent from now on.
///
/// # Errors
///
/// Fails if the process is out of descriptors.
pub(crate) fn prepare() -> io::Result<Jobs> {
    let arrival = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, jobs) = channel();
    *serving() = Some(Way { jobs: sender, arrival: Arc::clone(&arrival) });
    Ok(Jobs { jobs, arrival })
}

/// Runs jobs until [`stop`] is called and those that were sent before have run.
///
/// Until there is one, it reads for the session, which needs no thread for that if it never has one.
pub(crate) fn serve(jobs: &Jobs, reading: Reading) {
    if let Some(reading) = reading.run_until(jobs.arrival.as_fd())
        && let Err(error) = reading.spawn()
    {
        eprintln!("farlink-executor: no thread can be made that reads from the controller: {error}");
    }
    for job in &jobs.jobs {
        report::prepare_thread();
        job();
    }
}

/// Ends [`serve`], at once if it waits, else after the job that runs.
pub(crate) fn stop() {
    serving().take();
}
