//! The threads that serve the peer's calls.
//!
//! Every call that is accepted gets a thread at once, because a handler may wait for another call of the peer's:
//! idle threads are used first, else one is made. A call above the limit is refused, by a thread that does nothing
//! else, so neither the reader nor a handler is held up by a peer that does not read its answers.
//!
//! Two numbers are bounded by the limit: calls that wait or run, which the peer may count on, and threads. A thread
//! that is writing a result has left the first but not the second, so an accepted call waits at most for results
//! being written.

use farlink_addr::ExecutorAddr;
use farlink_wire::frame::Header;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a thread without work is kept.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// Refused calls that may wait for their answers to be written. A peer beyond that makes calls without reading.
pub(crate) const MAX_REFUSED: usize = 1 << 16;

/// A call of the peer's.
pub(crate) struct Job {
    pub(crate) sequence: u64,
    pub(crate) function: ExecutorAddr,
    pub(crate) args: Vec<u8>,
}

impl Job {
    /// Returns what a Call message asks for.
    pub(crate) fn new(header: Header, args: Vec<u8>) -> Self {
        Self { sequence: header.sequence, function: header.tag, args }
    }
}

/// What is to be done about a call that has been submitted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Submitted {
    /// Nothing: an idle thread has been woken, or a busy one will take it.
    Taken,
    /// A thread must be made that runs the jobs.
    NeedsWorker,
    /// The call is refused and a thread must be made that answers refused calls.
    NeedsRefuser,
    /// The call is refused; more are than a peer can have that reads its answers.
    Overrun,
}

/// Jobs and the threads that wait for them.
pub(crate) struct Pool {
    limit: usize,
    state: Mutex<State>,
    work: Condvar,
    quiet: Condvar,
    brief_done: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Calls accepted and not finished: those in the queue and those that run.
    calls: usize,
    /// All threads but the one that refuses.
    workers: usize,
    /// Threads that wait for work.
    idle: usize,
    refused: VecDeque<u64>,
    has_refuser: bool,
    closed: bool,
    /// Whether a call has been accepted that is not brief.
    has_begun: bool,
    /// Whether a brief call runs on the thread that reads.
    runs_brief: bool,
    /// Threads that wait until no call is running. Waking them is a system call, also if there is none.
    waiting_for_quiet: usize,
}

impl Pool {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), work: Condvar::new(), quiet: Condvar::new(), brief_done: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts or refuses a call. The reader's part.
    pub(crate) fn submit(&self, job: Job) -> Submitted {
        let mut state = self.lock();
        state.has_begun = true;
        if state.calls >= self.limit {
            return state.refuse(job.sequence);
        }
        state.calls += 1;
        state.queue.push_back(job);
        if state.idle >= state.queue.len() {
            self.work.notify_one();
            Submitted::Taken
        } else if state.workers < self.limit {
            state.workers += 1;
            Submitted::NeedsWorker
        } else {
            Submitted::Taken
        }
    }

    /// Accepts a call that the calling thread, which is none of the pool's, is going to run. Returns whether it may.
    pub(crate) fn begin_job(&self) -> bool {
        let mut state = self.lock();
        state.has_begun = true;
        let accepted = state.calls < self.limit && !state.closed;
        state.calls += usize::from(accepted);
        accepted
    }

    /// Accepts a call that is brief as long as there has been no other, which the calling thread, the one that reads, is going
    /// to run. Returns whether it may.
    pub(crate) fn begin_brief_job(&self) -> bool {
        let mut state = self.lock();
        let accepted = state.calls < self.limit && !state.closed && !state.has_begun;
        state.calls += usize::from(accepted);
        state.runs_brief |= accepted;
        accepted
    }

    /// Takes note that a brief call has been run.
    pub(crate) fn finish_brief_job(&self) {
        let mut state = self.lock();
        state.runs_brief = false;
        if state.has_begun {
            self.brief_done.notify_all();
        }
        drop(state);
        self.finish_job();
    }

    /// Takes note that the thread asked for last could not be made. Its call is refused, unless another thread
    /// has taken it meanwhile.
    pub(crate) fn worker_failed(&self) -> Submitted {
        let mut state = self.lock();
        state.workers -= 1;
        match state.queue.pop_back() {
            Some(job) => {
                state.calls -= 1;
                state.refuse(job.sequence)
            }
            None => Submitted::Taken,
        }
    }

    /// Waits for a job. `None` tells the calling worker to end: there has been none for long, or there will be none.
    pub(crate) fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        let deadline = Instant::now() + IDLE_TIME;
        loop {
            // The reader cannot wait for a brief call, which may be waiting for a descriptor.
            state = self.brief_done.wait_while(state, |state| state.runs_brief).unwrap_or_else(PoisonError::into_inner);
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                state.workers -= 1;
                return None;
            }
            state.idle += 1;
            state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
        }
    }

    /// Takes note that a job's handler has returned.
    pub(crate) fn finish_job(&self) {
        let mut state = self.lock();
        state.calls -= 1;
        if state.calls == 0 && state.waiting_for_quiet > 0 {
            self.quiet.notify_all();
        }
    }

    /// Returns the number of the next refused call. `None` tells the refuser to end.
    pub(crate) fn next_refused(&self) -> Option<u64> {
        let mut state = self.lock();
        let next = state.refused.pop_front();
        state.has_refuser = next.is_some();
        next
    }

    /// Lets the threads end when the calls that have been accepted are finished.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.refused = VecDeque::new();
        self.work.notify_all();
    }

    /// Waits until no call is running, for at most `timeout`; returns whether that is so.
    pub(crate) fn wait_quiet(&self, timeout: Duration) -> bool {
        let busy = |state: &mut State| state.calls > 0;
        let mut state = self.lock();
        state.waiting_for_quiet += 1;
        let waited = self.quiet.wait_timeout_while(state, timeout, busy);
        let (mut state, timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting_for_quiet -= 1;
        !timed_out.timed_out()
    }
}

impl State {
    fn refuse(&mut self, sequence: u64) -> Submitted {
        if self.refused.len() >= MAX_REFUSED {
            return Submitted::Overrun;
        }
        self.refused.push_back(sequence);
        if self.has_refuser {
            return Submitted::Taken;
        }
        self.has_refuser = true;
        Submitted::NeedsRefuser
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn job(sequence: u64) -> Job {
        Job { sequence, function: ExecutorAddr::NULL, args: Vec::new() }
    }

    /// Calls up to the limit each get a thread; the next is refused, and accepted again after one has finished.
    #[test]
    fn the_limit_holds() {
        let pool = Pool::new(2);
        assert_eq!(pool.submit(job(0)), Submitted::NeedsWorker);
        assert_eq!(pool.submit(job(1)), Submitted::NeedsWorker);
        assert_eq!(pool.submit(job(2)), Submitted::NeedsRefuser);
        assert_eq!(pool.submit(job(3)), Submitted::Taken);
        assert_eq!([pool.next_refused(), pool.next_refused(), pool.next_refused()], [Some(2), Some(3), None]);
        assert_eq!(pool.next_job().unwrap().sequence, 0);
        pool.finish_job();
        // Both threads exist, so the call waits for one of them.
        assert_eq!(pool.submit(job(4)), Submitted::Taken);
        assert_eq!(pool.next_job().unwrap().sequence, 1);
        assert_eq!(pool.next_job().unwrap().sequence, 4);
    }

    /// A thread that cannot be made costs the call it was for, not the others.
    #[test]
    fn a_failed_thread_refuses_its_call() {
        let pool = Pool::new(2);
        assert_eq!(pool.submit(job(0)), Submitted::NeedsWorker);
        assert_eq!(pool.submit(job(1)), Submitted::NeedsWorker);
        assert_eq!(pool.worker_failed(), Submitted::NeedsRefuser);
        assert_eq!(pool.next_refused(), Some(1));
        assert_eq!(pool.next_job().unwrap().sequence, 0);
        assert!(!pool.wait_quiet(Duration::ZERO));
        pool.finish_job();
        assert!(pool.wait_quiet(Duration::ZERO));
    }

    /// Refusals that nobody reads do not pile up without end.
    #[test]
    fn refusals_are_bounded() {
        let pool = Pool::new(0);
        assert_eq!(pool.submit(job(0)), Submitted::NeedsRefuser);
        for sequence in 1..MAX_REFUSED as u64 {
            assert_eq!(pool.submit(job(sequence)), Submitted::Taken);
        }
        assert_eq!(pool.submit(job(0)), Submitted::Overrun);
    }

    /// Brief calls run before all others: one that comes while one runs waits for it, in the thread that is to run it, and is
    /// the last to find none running.
    #[test]
    fn brief_calls_come_first() {
        let pool = Pool::new(2);
        assert!(pool.begin_brief_job());
        assert_eq!(pool.submit(job(1)), Submitted::NeedsWorker);
        thread::scope(|scope| {
            let other = scope.spawn(|| pool.next_job());
            thread::sleep(Duration::from_millis(20));
            assert!(!other.is_finished());
            pool.finish_brief_job();
            assert_eq!(other.join().unwrap().unwrap().sequence, 1);
        });
        assert!(!pool.begin_brief_job());
        pool.finish_job();
        assert!(pool.wait_quiet(Duration::ZERO));
        assert!(!pool.begin_brief_job());
    }

    /// After closing, accepted calls are still handed out, then the threads end.
    #[test]
    fn closing_finishes_the_queue() {
        let pool = Pool::new(2);
        pool.submit(job(7));
        pool.close();
        assert_eq!(pool.next_job().unwrap().sequence, 7);
        assert!(pool.next_job().is_none());
    }
}
