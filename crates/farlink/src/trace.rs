//! What a session does and when, in both processes, recorded if it is asked for when the session is built.
//!
//! Times are those of this process's monotonic clock. An executor on the same machine has the same clock; the difference
//! to another's is estimated by one call.

use crate::Error;
use crate::observe::Observed;
use crate::session::Session;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{CallObserver, Executor};
use farlink_wire::functions::TRACE_START;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A process of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceProcess {
    /// The one that links.
    Controller,
    /// The one that runs what was linked. In-process they are the same.
    Executor,
}

/// Something that a process of a session did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TraceSpan {
    /// Which process.
    pub process: TraceProcess,
    /// The system's number of the thread.
    pub thread: u64,
    /// What it is of: `phase` of a batch, `object` in a phase, `call` to the executor, `service` of the executor, or `linked`
    /// code.
    pub category: &'static str,
    /// The phase, the object, or the function; empty if that is linked code.
    pub name: String,
    /// The phase of an object.
    pub phase: Option<&'static str>,
    /// The function's address in the executor.
    pub function: Option<ExecutorAddr>,
    /// When it began, in nanoseconds of this process's monotonic clock.
    pub start: u64,
    /// When it ended.
    pub end: u64,
}

/// Returns the time on this process's monotonic clock in nanoseconds, as spans have it.
#[must_use]
pub fn trace_now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Neither is negative on this clock.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn this_thread() -> u64 {
    u64::from(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs())
}

/// The phases of a link, in their order.
const PHASES: [&str; 7] = ["parse", "prepare", "allocate", "resolve", "fix up", "finalize", "initialize"];

/// How far a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkProgress {
    /// The phase, as [`PhaseTimes::phases`](crate::PhaseTimes::phases) calls it.
    pub phase: &'static str,
    /// Objects that have been through it, where it is done object by object.
    pub objects: u64,
}

/// The record of a session, if it has one. Without one, nothing is measured.
#[derive(Clone, Default)]
pub(crate) struct Trace(Option<Arc<Record>>);

pub(crate) struct Record {
    /// Whether spans are wanted, and not only how far a link is.
    is_traced: bool,
    spans: Mutex<Vec<TraceSpan>>,
    /// Position of the phase, and objects that have been through it.
    phase: AtomicUsize,
    objects: AtomicU64,
    /// Nanoseconds to add to times of the executor's clock.
    correction: i64,
}

impl Record {
    fn spans(&self) -> MutexGuard<'_, Vec<TraceSpan>> {
        // Nothing that can panic half-way through a change runs under this lock.
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a phase has begun, or that one more object has been through it.
    fn note(&self, phase: usize, objects: u64) {
        let is_new = self.phase.swap(phase, Ordering::Relaxed) != phase;
        if is_new {
            self.objects.store(objects, Ordering::Relaxed);
        } else {
            self.objects.fetch_add(objects, Ordering::Relaxed);
        }
    }

    fn add(&self, category: &'static str, name: &str, phase: Option<&'static str>, start: u64) {
        if !self.is_traced {
            return;
        }
        let (process, thread, end) = (TraceProcess::Controller, this_thread(), trace_now());
        let name = name.to_owned();
        self.spans().push(TraceSpan { process, thread, category, name, phase, function: None, start, end });
    }
}

impl CallObserver for Record {
    fn now(&self) -> u64 {
        trace_now()
    }

    fn call_ended(&self, name: &'static str, start: u64) {
        self.add("call", name, None, start);
    }
}

impl Trace {
    /// Begins a record if one is wanted, of the executor too if it can; gives the executor to use from now on.
    pub(crate) fn start(executor: Executor, observed: Observed) -> Result<(Executor, Self), Error> {
        let is_traced = observed.traces;
        if !is_traced && !observed.tells_progress {
            return Ok((executor, Self::default()));
        }
        let mut correction = 0;
        if is_traced && executor.offers(TRACE_START) {
            let start = executor.bind(TRACE_START)?;
            let before = trace_now();
            let theirs = start.call(&()).wait()?;
            let after = trace_now();
            if !(before..=after).contains(&theirs) {
                // Its answer was made about half-way.
                correction = (before + (after - before) / 2).wrapping_sub(theirs) as i64;
            }
        }
        let (phase, objects) = (AtomicUsize::new(0), AtomicU64::new(0));
        let record = Arc::new(Record { is_traced, spans: Mutex::default(), phase, objects, correction });
        if !is_traced {
            return Ok((executor, Self(Some(record))));
        }
        let observer: Arc<dyn CallObserver> = Arc::<Record>::clone(&record);
        Ok((executor.observed_by(observer), Self(Some(record))))
    }

    /// Returns when something begins that will be given to [`Self::object`] or [`Self::phase`].
    pub(crate) fn now(&self) -> u64 {
        if self.0.is_some() { trace_now() } else { 0 }
    }

    /// Records what was done with an object since `start`.
    pub(crate) fn object(&self, phase: &'static str, object: &str, start: u64) {
        if let Some(record) = &self.0 {
            record.note(PHASES.iter().position(|&known| known == phase).unwrap_or(0), 1);
            record.add("object", object, Some(phase), start);
        }
    }

    /// Records a phase of a batch since `start`; gives the time.
    pub(crate) fn phase(&self, phase: &'static str, start: u64) -> u64 {
        if let Some(record) = &self.0 {
            let next = PHASES.iter().position(|&known| known == phase).map_or(0, |phase| phase + 1);
            record.note(next % PHASES.len(), 0);
            record.add("phase", phase, None, start);
        }
        self.now()
    }
}

impl Session {
    /// Returns how far a link is that another thread has under way. None unless the session was built with
    /// [`SessionBuilder::tell_progress`](crate::SessionBuilder::tell_progress) or
    /// [`SessionBuilder::trace`](crate::SessionBuilder::trace).
    #[must_use]
    pub fn progress(&self) -> Option<LinkProgress> {
        let record = self.inner().trace.0.as_ref()?;
        let phase = PHASES[record.phase.load(Ordering::Relaxed)];
        Some(LinkProgress { phase, objects: record.objects.load(Ordering::Relaxed) })
    }

    /// Takes what has been recorded of both processes, in the order of its beginning. Empty unless the session was built with
    /// [`SessionBuilder::trace`](crate::SessionBuilder::trace).
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot be reached; what this process has recorded stays.
    pub fn take_trace(&self) -> Result<Vec<TraceSpan>, Error> {
        let inner = self.inner();
        let Some(record) = inner.trace.0.as_ref().filter(|record| record.is_traced) else { return Ok(Vec::new()) };
        let runtime = inner.runtime()?;
        let theirs = runtime.take_trace().map_err(|error| inner.explain(error))?;
        let mut spans = std::mem::take(&mut *record.spans());
        spans.extend(theirs.into_iter().map(|span| {
            let announced = runtime.name_of(span.function);
            TraceSpan {
                process: TraceProcess::Executor,
                thread: span.thread,
                category: if announced.is_some() { "service" } else { "linked" },
                name: announced.unwrap_or_default(),
                phase: None,
                function: Some(span.function),
                start: span.start.saturating_add_signed(record.correction),
                end: span.end.saturating_add_signed(record.correction),
            }
        }));
        // Of what begins at once the longest is first.
        spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
        Ok(spans)
    }
}
