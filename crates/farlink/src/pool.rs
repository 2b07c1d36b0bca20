//! Executors that are all alike, forked from one prepared process: any may go and another come, and each is told what all
//! were told ([`crate::journal`]).
//!
//! To the rest of a session a pool is one executor. What changes an executor is told to all of them, and each has to answer
//! the same; a call of linked code goes to one. Code and constants are in memory that all share; data is in memory that
//! each copies as it writes, so what it was at first is still there for an executor that comes later.

mod calls;

use crate::callback::Callbacks;
use crate::death::{Death, Reporter};
use crate::gate::{Gate, Passage};
use crate::journal::Journal;
use crate::prepared::Prepared;
use crate::process::{END_GRACE, Process};
use crate::relink::Moved;
use crate::session::SessionInner;
use crate::{Error, SessionBuilder};
use farlink_rpc::{CallError, Caller, Disconnected, Executor, Options};
use farlink_wire::functions::{PID_KEY, SHARED_MAP_AT};
use farlink_wire::setup::ExecutorInfo;
use rustix::process::Signal;
use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::thread;
use std::time::Duration;

/// When another executor takes the place of one that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Restart {
    /// When [`Session::restart`](crate::Session::restart) asks for it.
    Never,
    /// When something is asked of it.
    OnNextCall,
    /// As soon as it has ended.
    AtOnce,
}

/// Returns that executors cannot be what they have to be to take each other's places.
pub(crate) fn cannot(text: impl Into<String>) -> Error {
    Error::Refused { operation: "take the place of another", text: text.into() }
}

/// An executor of a pool, from its start to its end.
pub(crate) struct Running {
    process: Process,
    caller: Arc<dyn Caller>,
    reporter: Option<Reporter>,
    /// Calls that have not returned.
    calls: AtomicUsize,
    /// How it ended, once somebody wanted to know.
    pub(crate) death: OnceLock<Arc<Death>>,
}

impl Running {
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn reporter(&self) -> Option<&Reporter> {
        self.reporter.as_ref()
    }

    pub(crate) fn caller(&self) -> &Arc<dyn Caller> {
        &self.caller
    }

    fn ended(&self) -> Option<Disconnected> {
        self.process.endpoint().disconnected()
    }
}

/// A call that an executor has been given: while this lives, it counts among those that have not returned.
pub(crate) struct Given(pub(crate) Arc<Running>);

impl Drop for Given {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The place of one executor.
#[derive(Default)]
struct Member {
    running: RwLock<Option<Arc<Running>>>,
    /// Held while another takes the place.
    starting: Mutex<()>,
}

impl Member {
    fn running(&self) -> Option<Arc<Running>> {
        self.running.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, running: Option<Arc<Running>>) -> Option<Arc<Running>> {
        std::mem::replace(&mut *self.running.write().unwrap_or_else(PoisonError::into_inner), running)
    }
}

/// See the module.
pub(crate) struct Pool {
    prepared: Prepared,
    members: Box<[Member]>,
    /// What each introduces itself with, but for the number of its process.
    info: ExecutorInfo,
    journal: Journal,
    gate: Gate,
    /// Held while executors are told what has to be told in order.
    order: Mutex<()>,
    callbacks: Arc<Callbacks>,
    options: Options,
    restart: Restart,
    timeout: Duration,
    /// Where the next call begins to look for an executor.
    turn: AtomicUsize,
    /// The tag of the last descriptor that was sent.
    tag: AtomicU64,
    has_ended: AtomicBool,
    /// The executor that ended last.
    last_end: Mutex<Option<Arc<Running>>>,
    session: OnceLock<Weak<SessionInner>>,
    this: Weak<Pool>,
}

/// As long as this lives, no executor takes the place of another.
pub(crate) struct Held<'a> {
    _inside: Passage<'a>,
    /// It is this thread that does.
    _here: PhantomData<*const ()>,
}

thread_local! {
    /// How often this thread keeps others from taking places.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

impl<'a> Held<'a> {
    fn new(inside: Passage<'a>) -> Self {
        HELD.set(HELD.get() + 1);
        Self { _inside: inside, _here: PhantomData }
    }

    fn is_held_here() -> bool {
        HELD.get() > 0
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
    }
}

/// Tags of descriptors that all executors get begin here: those below are each one's own.
const FIRST_TAG: u64 = 1 << 32;

impl Pool {
    /// Starts executors by forking a prepared process.
    pub(crate) fn start(
        prepared: Prepared,
        callbacks: Arc<Callbacks>,
        builder: &SessionBuilder,
    ) -> Result<Arc<Self>, Error> {
        let start = || prepared.fork(callbacks.clone(), builder.options.clone());
        let (first, info) = start()?;
        if SHARED_MAP_AT.find(&info).is_none() {
            return Err(cannot("it is not farlink's, or too old"));
        }
        let mut started = vec![first];
        for _ in 1..builder.executors {
            started.push(start()?.0);
        }
        let pool = Arc::new_cyclic(|this: &Weak<Self>| Self {
            prepared,
            members: started.iter().map(|_| Member::default()).collect(),
            journal: Journal::new(&info),
            info,
            gate: Gate::default(),
            order: Mutex::default(),
            callbacks,
            options: builder.options.clone(),
            restart: builder.restart_policy(),
            timeout: builder.protocol_timeout,
            turn: AtomicUsize::new(0),
            tag: AtomicU64::new(FIRST_TAG),
            has_ended: AtomicBool::new(false),
            last_end: Mutex::default(),
            session: OnceLock::new(),
            this: this.clone(),
        });
        for (index, process) in started.into_iter().enumerate() {
            pool.take_in(index, process)?;
        }
        Ok(pool)
    }

    /// Returns what the executors introduce themselves with.
    pub(crate) fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    pub(crate) fn size(&self) -> usize {
        self.members.len()
    }

    /// Takes note of the session that the executors are for.
    pub(crate) fn belongs_to(&self, session: Weak<SessionInner>) {
        // Set once, by who made it.
        let _ = self.session.set(session);
    }

    /// Returns whether a library was opened after linking had begun.
    pub(crate) fn has_late_libraries(&self) -> bool {
        self.journal.has_late_libraries()
    }

    /// Keeps another executor from taking a place for as long as something is being linked, if addresses of shared libraries
    /// could change by that.
    pub(crate) fn hold(&self) -> Result<Option<Held<'_>>, Error> {
        if !self.has_late_libraries() {
            return Ok(None);
        }
        self.revive_all()?;
        Ok(Some(Held::new(self.enter()?)))
    }

    fn enter(&self) -> Result<Passage<'_>, Error> {
        let timeout = self.timeout;
        let late = || CallError::TimedOut { function: "the start of another executor", timeout };
        Ok(self.gate.enter(timeout).ok_or_else(late)?)
    }

    /// Starts others in the places of all that have ended, if that is to be done when something is asked of them. Who keeps
    /// others from taking places has done so before.
    fn revive_all(&self) -> Result<(), Error> {
        if self.restart != Restart::OnNextCall || Held::is_held_here() {
            return Ok(());
        }
        (0..self.size()).try_for_each(|index| self.revived(index).map(drop))
    }

    /// Returns the executors that run, or have ended without another in their place.
    pub(crate) fn all(&self) -> Vec<Arc<Running>> {
        self.members.iter().filter_map(Member::running).collect()
    }

    fn live(&self) -> Vec<Arc<Running>> {
        self.all().into_iter().filter(|running| running.ended().is_none()).collect()
    }

    /// Returns the executor that ended last.
    pub(crate) fn last_end(&self) -> Option<Arc<Running>> {
        self.last_end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_end(&self, running: &Arc<Running>) {
        *self.last_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(running));
    }

    /// Fails if nothing can be asked of the executors any more.
    pub(crate) fn check(&self) -> Result<(), CallError> {
        let has_ended = self.has_ended.load(Ordering::Acquire);
        if has_ended || self.restart == Restart::Never && self.live().is_empty() { Err(self.reason()) } else { Ok(()) }
    }

    fn reason(&self) -> CallError {
        let ended = self.all().into_iter().find_map(|running| running.ended());
        ended.unwrap_or(Disconnected::Local).into()
    }

    /// Ends all executors: no other takes the place of one.
    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::Release);
        // One that is being started is waited for, for a while: it may be the thread that started it which ends the session.
        let _closed = self.gate.close(END_GRACE.min(self.timeout));
        let ended: Vec<_> = self.members.iter().filter_map(|member| member.set(None)).collect();
        ended.iter().for_each(|running| running.process.endpoint().hang_up(Ok(())));
    }
}

/// Starting executors.
impl Pool {
    /// Lets a process that has been forked take the place of an executor, after it has been told what all have been told.
    fn take_in(&self, index: usize, process: Process) -> Result<(), Error> {
        let endpoint = process.endpoint().clone();
        let caller: Arc<dyn Caller> = Arc::new(endpoint.clone());
        let setup_error = |error| Error::Setup { executor: "an executor".to_owned(), error, how: None };
        let executor = Executor::new(self.info.clone(), Arc::clone(&caller)).map_err(setup_error)?;
        let executor = executor.limited(self.timeout);
        let reporter = Reporter::new(&executor);
        let send = |tag, object: &std::os::fd::OwnedFd| Ok(endpoint.send_descriptor_as(tag, object.as_fd())?);
        let relink = |moved: &Moved| {
            let session = self.session.get().and_then(Weak::upgrade);
            session.ok_or_else(|| self.reason().into()).and_then(|session| session.relink(moved))
        };
        self.journal.replay(&executor, &send, &mut || self.next_tag(), &relink)?;
        reporter.iter().for_each(Reporter::wait_ready);
        let (calls, death) = (AtomicUsize::new(0), OnceLock::new());
        let running = Arc::new(Running { process, caller, reporter, calls, death });
        let before = self.members[index].set(Some(Arc::clone(&running)));
        let (pool, weak) = (self.this.clone(), Arc::downgrade(&running));
        endpoint.when_disconnected(move |_| {
            if let (Some(pool), Some(running)) = (pool.upgrade(), weak.upgrade()) {
                pool.has_lost(index, &running);
            }
        });
        drop(before);
        Ok(())
    }

    fn next_tag(&self) -> u64 {
        self.tag.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Sees to what is to be done when an executor has ended. On the thread that read its connection.
    fn has_lost(self: Arc<Self>, index: usize, running: &Arc<Running>) {
        if self.restart != Restart::AtOnce || self.has_ended.load(Ordering::Acquire) {
            return;
        }
        let lost = Arc::clone(running);
        // The thread that ends here may be what closes the gate waits for. One that cannot be made leaves it to whoever
        // asks something of the executor next.
        let restart = move || drop(self.start_another(index, &lost));
        drop(thread::Builder::new().name("farlink-restart".to_owned()).spawn(restart));
    }

    /// Starts an executor in the place of one that has ended, unless somebody else has.
    fn start_another(&self, index: usize, lost: &Arc<Running>) -> Result<(), Error> {
        let member = &self.members[index];
        let _starting = member.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if !member.running().is_some_and(|running| Arc::ptr_eq(&running, lost)) {
            return Ok(());
        }
        let timeout = self.timeout;
        let late = || CallError::TimedOut { function: "what all executors are being told", timeout };
        let (process, info) = self.prepared.fork(self.callbacks.clone(), self.options.clone())?;
        if !is_alike(&info, &self.info) {
            return Err(cannot("a new executor introduces itself otherwise than those before it"));
        }
        let _closed = self.gate.close(timeout).ok_or_else(late)?;
        if self.has_ended.load(Ordering::Acquire) {
            return Err(CallError::from(Disconnected::Local).into());
        }
        self.callbacks.forget_panic();
        self.take_in(index, process)
    }

    /// Starts other executors in the places of all, also of those that run.
    pub(crate) fn restart_all(&self) -> Result<(), Error> {
        (0..self.size()).try_for_each(|index| {
            let Some(running) = self.members[index].running() else { return self.check().map_err(Error::from) };
            running.process.signal(Signal::KILL);
            running.process.wait();
            running.process.endpoint().wait_disconnected();
            self.start_another(index, &running)
        })
    }

    /// Opens a shared library in the process that executors are forked from, and starts them anew: nothing has been linked.
    fn open_beforehand(&self, args: &[u8]) -> Result<(), Error> {
        let path = calls::path_of(args).ok_or_else(|| cannot("the library has no path"))?;
        if path.is_empty() {
            return Ok(());
        }
        // One that cannot be opened there will not be here either, and whoever wants it is told so.
        if self.prepared.open(&path).is_ok() { self.restart_all() } else { Ok(()) }
    }
}

/// Returns whether two executors have introduced themselves alike, but for the numbers of their processes.
fn is_alike(one: &ExecutorInfo, other: &ExecutorInfo) -> bool {
    let values = |info: &ExecutorInfo| -> Vec<(String, Vec<u8>)> {
        info.bootstrap_map.iter().filter(|(key, _)| key != PID_KEY).cloned().collect()
    };
    one.triple == other.triple
        && one.page_size == other.page_size
        && one.bootstrap_symbols == other.bootstrap_symbols
        && values(one) == values(other)
}
