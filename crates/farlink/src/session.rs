//! A session: an executor, its memory, and the libraries linked into it.

use crate::callback::Callbacks;
use crate::death::{Deaths, Reporter};
use crate::flight::Flights;
use crate::hang::DEFAULT_PROTOCOL_TIMEOUT;
use crate::harden::refused;
pub(crate) use crate::inner::{Connection, SessionInner};
use crate::observe::Observed;
use crate::perf::PerfFile;
use crate::pool::Restart;
use crate::private_code;
use crate::process::{Process, Program};
use crate::runtime::Runtime;
use crate::trace::Trace;
use crate::{Error, Library};
use farlink_addr::ExecutorAddr;
use farlink_mem::{InProcessMapper, MemoryManager, MemoryMapper, MemoryStats};
use farlink_rpc::{Executor, Options, Transport, connect};
use farlink_wire::functions::SHARED_MAP;
use farlink_wire::setup::ExecutorInfo;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How linked code reaches the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Memory {
    /// Memory that both processes map: nothing is copied. It has no name if the connection passes descriptors, as one
    /// to an executor of ours that this process starts does; else it is POSIX shared memory.
    #[default]
    Shared,
    /// POSIX shared memory (`/dev/shm`).
    Posix,
    /// Messages carry the content: for executors that share no memory with this process.
    Remote,
}

/// Bytes of address space that are reserved at once: 1 GiB. Pages are used only as they are written.
pub const DEFAULT_RESERVATION_BYTES: u64 = 1 << 30;

/// The same in low memory, where what is large needs most of what there is: 64 MiB.
const LOW_RESERVATION_BYTES: u64 = 64 << 20;

/// What 32-bit absolute addresses reach, with either sign.
pub(crate) const LOW_LIMIT: ExecutorAddr = ExecutorAddr::new(1 << 31);

/// What a session is made of.
#[derive(Clone, Debug)]
pub struct SessionBuilder {
    program: Option<Program>,
    static_tls_bytes: u64,
    pub(crate) low_memory: bool,
    pub(crate) memory: Memory,
    pub(crate) reservation_bytes: u64,
    call_timeout: Option<Duration>,
    pub(crate) observed: Observed,
    pub(crate) protocol_timeout: Duration,
    pub(crate) ends_when_stuck: bool,
    pub(crate) is_hardened: bool,
    pub(crate) is_sandboxed: bool,
    pub(crate) options: Options,
    pub(crate) executors: usize,
    pub(crate) restart: Option<Restart>,
}

impl Default for SessionBuilder {
    fn default() -> Self {
        // The executor is told that its controller is farlink, so it may answer with out-of-band errors.
        let options = Options { out_of_band_results: true, ..Options::default() };
        Self {
            program: None,
            static_tls_bytes: 0,
            low_memory: false,
            memory: Memory::default(),
            reservation_bytes: DEFAULT_RESERVATION_BYTES,
            call_timeout: None,
            observed: Observed::default(),
            protocol_timeout: DEFAULT_PROTOCOL_TIMEOUT,
            ends_when_stuck: false,
            is_hardened: false,
            is_sandboxed: false,
            options,
            executors: 1,
            restart: None,
        }
    }
}

impl SessionBuilder {
    /// Names the executor program, and arguments to put before those that farlink adds.
    ///
    /// Without this, the environment variable `FARLINK_EXECUTOR` may name one; else it is this program, if its `main` has
    /// called [`executor::init`](crate::executor::init); else `farlink-executor`, beside this program or in `PATH`.
    #[must_use]
    pub fn executor(mut self, path: impl Into<PathBuf>, args: Vec<OsString>) -> Self {
        self.program = Some(Program { path: path.into(), args, static_tls_bytes: 0, is_hardened: false });
        self
    }

    /// Chooses how linked code reaches the executor.
    #[must_use]
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = memory;
        self
    }

    /// Places linked code and data in the lowest 2 GiB of the address space, where 32-bit absolute addresses reach them, as
    /// code that was compiled with `-fno-pic` wants it. Data of shared libraries is not there.
    #[must_use]
    pub fn low_memory(mut self, low_memory: bool) -> Self {
        self.low_memory = low_memory;
        self
    }

    /// Sets how many bytes of thread-local variables in objects that were not compiled with `-fPIC` an executor that
    /// [`Self::spawn`] starts has room for, in addition to the one or two KiB that there are anyway. Every thread's stack
    /// has to be that much larger.
    #[must_use]
    pub fn static_tls_bytes(mut self, bytes: u64) -> Self {
        self.static_tls_bytes = bytes;
        self
    }

    /// Sets how many bytes of address space are reserved at once.
    #[must_use]
    pub fn reservation_bytes(mut self, bytes: u64) -> Self {
        self.reservation_bytes = bytes;
        self
    }

    /// Sets how long calls of functions wait for a result, where [`Function::with_timeout`](crate::Function::with_timeout)
    /// sets nothing else. Without this, as long as it takes.
    #[must_use]
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = Some(timeout);
        self
    }

    /// Starts an executor in a process of its own, with this process's standard streams and environment.
    ///
    /// # Errors
    ///
    /// Fails if the program cannot be started, or does not introduce itself as an executor.
    pub fn spawn(self) -> Result<Session, Error> {
        self.spawn_doing(|| {})
    }

    /// As [`Self::spawn`], doing `work` while the executor starts, which takes the better part of a millisecond: reading
    /// [objects](crate::ParsedObjects), for one. Gives what came of that too; none if the program could not be started.
    ///
    /// # Errors
    ///
    /// As [`Self::spawn`].
    pub fn spawn_while<T>(self, work: impl FnOnce() -> T) -> (Result<Session, Error>, Option<T>) {
        let mut done = None;
        let session = self.spawn_doing(|| done = Some(work()));
        (session, done)
    }

    fn spawn_doing(self, work: impl FnOnce()) -> Result<Session, Error> {
        let mut program = self.program.clone().map_or_else(Program::find, Ok)?;
        program.static_tls_bytes = self.static_tls_bytes;
        program.is_hardened = self.hardening().is_wanted;
        if self.is_pool() {
            work();
            return self.spawn_pool(&program);
        }
        let callbacks = Arc::<Callbacks>::default();
        let started = Process::start(&program, callbacks.clone(), self.options.clone(), work)?;
        self.with_process(started, callbacks, &program.path.display().to_string())
    }

    /// Runs a shell command that is an executor on its standard streams: `ssh HOST farlink-executor --stdio`, for example.
    /// One on another machine needs [`Memory::Remote`].
    ///
    /// # Errors
    ///
    /// Fails if the command cannot be started, or does not introduce itself as an executor.
    pub fn spawn_command(self, command: &str) -> Result<Session, Error> {
        let callbacks = Arc::<Callbacks>::default();
        let started = Process::start_command(command, callbacks.clone(), self.options.clone())?;
        self.with_process(started, callbacks, command)
    }

    fn with_process(
        self,
        (process, info): (Process, ExecutorInfo),
        callbacks: Arc<Callbacks>,
        name: &str,
    ) -> Result<Session, Error> {
        let endpoint = process.endpoint().clone();
        let setup_error = |error| Error::Setup { executor: name.to_owned(), error, how: None };
        let executor = Executor::new(info, Arc::new(endpoint)).map_err(setup_error)?;
        self.session(executor, Connection::Process(process), callbacks)
    }

    /// Talks to an executor over `transport`.
    ///
    /// # Errors
    ///
    /// Fails if what is at the other end does not introduce itself as an executor.
    pub fn connect(self, transport: Transport) -> Result<Session, Error> {
        let setup_error = |error| Error::Setup { executor: "the executor connected to".to_owned(), error, how: None };
        let callbacks = Arc::<Callbacks>::default();
        let (endpoint, info) = connect(transport, callbacks.clone(), self.options.clone()).map_err(setup_error)?;
        let executor = Executor::new(info, Arc::new(endpoint.clone())).map_err(setup_error)?;
        self.session(executor, Connection::Endpoint(endpoint), callbacks)
    }

    /// Runs linked code in this process.
    ///
    /// # Errors
    ///
    /// Fails if this process cannot be an executor.
    pub fn in_process(self) -> Result<Session, Error> {
        if self.hardening().is_wanted {
            return Err(refused("it is this process"));
        }
        let callbacks = Arc::<Callbacks>::default();
        let (executor, trace) = Trace::start(farlink_executor::local_with(callbacks.clone()), self.observed)?;
        let private = self.observed.wants_private_code();
        let mapper = if private { InProcessMapper::page_by_page() } else { InProcessMapper::new() };
        let mapper = Arc::new(mapper);
        if self.low_memory {
            mapper.place_below(LOW_LIMIT);
        }
        self.with_mapper(executor, mapper, Connection::InProcess, callbacks, trace)
    }

    fn session(self, executor: Executor, connection: Connection, callbacks: Arc<Callbacks>) -> Result<Session, Error> {
        let (executor, trace) = Trace::start(executor, self.observed)?;
        if self.low_memory {
            crate::runtime::place_below(&executor, LOW_LIMIT)?;
        }
        let limited = executor.limited(self.protocol_timeout);
        let private = self.observed.wants_private_code();
        let mapper = private_code::mapper(&limited, self.memory, private, self.hardening().is_wanted)?;
        self.with_mapper(executor, mapper, connection, callbacks, trace)
    }

    pub(crate) fn with_mapper(
        self,
        executor: Executor,
        mapper: Arc<dyn MemoryMapper>,
        connection: Connection,
        callbacks: Arc<Callbacks>,
        trace: Trace,
    ) -> Result<Session, Error> {
        let most = if self.low_memory { LOW_RESERVATION_BYTES } else { u64::MAX };
        let directories = crate::runtime::directory_actions(&executor);
        let hardening = self.hardening();
        let memory = MemoryManager::with_directories(mapper, self.reservation_bytes.min(most), directories);
        // What a socket seems to be may be carried elsewhere; where memory is shared, descriptors do get through.
        let passes_descriptors = matches!(connection, Connection::Process(_)) || self.memory == Memory::Shared;
        let wants_reports = passes_descriptors && !matches!(connection, Connection::InProcess | Connection::Pool(_));
        // First, so that the executor has something to do while memory is made for it.
        let reporter = if wants_reports { Reporter::new(&executor) } else { None };
        // Not where it would have a name, which somebody has to remove.
        let is_nameless = self.memory == Memory::Shared && executor.offers(SHARED_MAP);
        if is_nameless && matches!(connection, Connection::Process(_)) && !self.observed.wants_private_code() {
            memory.reserve_ahead();
        }
        let runtime = Runtime::new(executor, self.protocol_timeout);
        if self.observed.shows_debuggers {
            runtime.allow_debuggers()?;
        }
        let perf = self.observed.perf.map(|form| PerfFile::create(form, &runtime)).transpose()?;
        Ok(Session::new(SessionInner {
            connection,
            memory,
            runtime: Some(runtime),
            callbacks,
            call_timeout: self.call_timeout,
            ends_when_stuck: self.ends_when_stuck,
            hardening,
            deaths: Deaths { reporter, ..Deaths::default() },
            flights: Flights::default(),
            keeps_graphs: self.observed.keeps_graphs,
            undefined_zero: false,
            low_memory: self.low_memory,
            trace,
            shows_debuggers: self.observed.shows_debuggers,
            perf,
        }))
    }
}

/// An executor with memory of its own, in another process or in this one. Cheap to clone.
///
/// When the last clone and the last [`Library`] of it are gone, the executor is told to end, and a process that was
/// started for it is waited for.
#[derive(Clone)]
pub struct Session {
    inner: Arc<SessionInner>,
}

impl Session {
    pub(crate) fn new(inner: SessionInner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn from_inner(inner: Arc<SessionInner>) -> Self {
        Self { inner }
    }

    pub(crate) fn weak(&self) -> Weak<SessionInner> {
        Arc::downgrade(&self.inner)
    }

    pub(crate) fn inner(&self) -> &SessionInner {
        &self.inner
    }

    /// Returns a builder, to choose the executor and its memory.
    #[must_use]
    pub fn builder() -> SessionBuilder {
        SessionBuilder::default()
    }

    /// Starts an executor in a process of its own and shares memory with it: this program again, if its `main` begins with
    /// [`executor::init`](crate::executor::init), else `farlink-executor`.
    ///
    /// # Errors
    ///
    /// As [`SessionBuilder::spawn`].
    pub fn spawn() -> Result<Self, Error> {
        Self::builder().spawn()
    }

    /// Runs linked code in this process.
    ///
    /// # Errors
    ///
    /// As [`SessionBuilder::in_process`].
    pub fn in_process() -> Result<Self, Error> {
        Self::builder().in_process()
    }

    /// Talks to an executor over descriptors: one to read from, one to write to.
    ///
    /// # Errors
    ///
    /// As [`SessionBuilder::connect`].
    pub fn connect(read: OwnedFd, write: OwnedFd) -> Result<Self, Error> {
        let transport = Transport::from_fds(read, write).map_err(|error| Error::Connect(Arc::new(error)))?;
        Self::builder().connect(transport)
    }

    /// Creates a library: a set of definitions that refer to each other, to its shared libraries, and to what the
    /// executor's process has.
    #[must_use]
    pub fn create_library(&self, name: &str) -> Library {
        let library = Library::new(name, Arc::clone(&self.inner));
        self.inner.know(&library);
        library
    }

    /// Returns what the session holds of the executor's memory.
    #[must_use]
    pub fn memory_stats(&self) -> MemoryStats {
        self.inner.memory.stats()
    }

    /// Gives the physical memory of what is free back to the system at once, which otherwise happens a second or two after it was
    /// last needed.
    pub fn trim_memory(&self) {
        self.inner.memory.trim();
    }

    /// Returns the id of the executor's process, or of the first executor's, if this session started it.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        match &self.inner.connection {
            Connection::Process(process) => u32::try_from(process.id().as_raw_nonzero().get()).ok(),
            Connection::Pool(_) => self.process_ids().first().copied(),
            _ => None,
        }
    }

    /// Sends a signal to the executor's process, or that of each executor, if this session started it and it has not ended.
    pub fn signal(&self, signal: rustix::process::Signal) {
        match &self.inner.connection {
            Connection::Process(process) => process.signal(signal),
            Connection::Pool(pool) => pool.all().iter().for_each(|running| running.process().signal(signal)),
            _ => {}
        }
    }

    /// Waits for the end of the executor's process, or of the first executor's, if this session started it. How it ended is
    /// not told to a process that ignores SIGCHLD.
    #[must_use]
    pub fn wait(&self) -> Option<ExitStatus> {
        match &self.inner.connection {
            Connection::Process(process) => process.wait(),
            Connection::Pool(pool) => pool.all().first()?.process().wait(),
            _ => None,
        }
    }

    /// Returns how the executor's process ended, if this session started it and it has.
    #[must_use]
    pub fn ended(&self) -> Option<ExitStatus> {
        match &self.inner.connection {
            Connection::Process(process) => process.ended(),
            _ => None,
        }
    }

    /// Ends the executor at once, whatever it is doing: calls that are running fail. One that is no child of this process is
    /// told to end, and does so within a moment. Linked code in this process cannot be ended; gives whether it could.
    pub fn kill(&self) -> bool {
        match &self.inner.connection {
            Connection::Process(_) | Connection::Pool(_) => self.signal(rustix::process::Signal::KILL),
            Connection::Endpoint(endpoint) => endpoint.hang_up(Err("the controller has ended the session".to_owned())),
            Connection::InProcess | Connection::None => return false,
        }
        true
    }
}
