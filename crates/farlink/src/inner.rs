//! What a session consists of, for those who work on it: the connection, the memory, and how its errors are explained.

use crate::Error;
use crate::callback::Callbacks;
use crate::death::Deaths;
use crate::death::Reporter;
use crate::flight::Flights;
use crate::harden::Hardening;
use crate::perf::PerfFile;
use crate::pool::{Pool, Running};
use crate::process::Process;
use crate::runtime::Runtime;
use crate::trace::Trace;
use farlink_mem::MemoryManager;
use farlink_rpc::{CallError, Endpoint};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// What ends with the session.
pub(crate) enum Connection {
    InProcess,
    Endpoint(Endpoint),
    Process(Process),
    /// Executors of which any may go, and another take its place.
    Pool(Arc<Pool>),
    /// No executor: the session only links.
    None,
}

impl Drop for Connection {
    fn drop(&mut self) {
        match self {
            Self::Endpoint(endpoint) => endpoint.hang_up(Ok(())),
            Self::Pool(pool) => pool.end(),
            Self::InProcess | Self::Process(_) | Self::None => {}
        }
    }
}

pub(crate) struct SessionInner {
    // Fields are dropped in this order: the executor is told to end, which frees its memory, before the manager
    // gives up the controller's side of it.
    pub(crate) connection: Connection,
    pub(crate) memory: MemoryManager,
    pub(crate) runtime: Option<Runtime>,
    /// What linked code calls here.
    pub(crate) callbacks: Arc<Callbacks>,
    /// How long calls of functions wait, unless something else is set.
    pub(crate) call_timeout: Option<Duration>,
    /// Whether an executor that does not answer in time is ended.
    pub(crate) ends_when_stuck: bool,
    /// What is wanted of the executor before it runs linked code.
    pub(crate) hardening: Hardening,
    pub(crate) deaths: Deaths,
    pub(crate) flights: Flights,
    /// Whether graphs are kept after they have been linked, to be shown.
    pub(crate) keeps_graphs: bool,
    /// Whether, without an executor, what is defined nowhere has the address 0.
    pub(crate) undefined_zero: bool,
    /// Whether linked code may have 32-bit absolute addresses.
    pub(crate) low_memory: bool,
    pub(crate) trace: Trace,
    /// Whether debuggers are shown what is linked.
    pub(crate) shows_debuggers: bool,
    /// Where profilers are told of what is linked.
    pub(crate) perf: Option<PerfFile>,
}

impl SessionInner {
    /// Returns the means to run code, or an error if this session only links.
    pub(crate) fn runtime(&self) -> Result<&Runtime, Error> {
        self.deaths.reporter.iter().for_each(Reporter::wait_ready);
        self.runtime.as_ref().ok_or(Error::NoExecution)
    }

    /// Returns whether the executor's process is this session's to end: a child of this process, or this process.
    pub(crate) fn owns_process(&self) -> bool {
        matches!(self.connection, Connection::Process(_) | Connection::InProcess)
    }

    /// Returns whether what is linked runs in another process, which may stop.
    pub(crate) fn has_executor(&self) -> bool {
        !matches!(self.connection, Connection::InProcess | Connection::None)
    }

    /// Returns how the executor's process ended, if it is a child of this one and has ended or is about to.
    pub(crate) fn process_end(&self) -> Option<ExitStatus> {
        match &self.connection {
            Connection::Process(process) => process.ended_soon(),
            Connection::Pool(pool) => pool.last_end()?.process().ended_soon(),
            _ => None,
        }
    }

    /// Returns the executors, if they are a pool.
    pub(crate) fn pool(&self) -> Option<&Arc<Pool>> {
        match &self.connection {
            Connection::Pool(pool) => Some(pool),
            _ => None,
        }
    }

    /// Fails if the executor has gone: what needs no call of it is not done without it either.
    pub(crate) fn check_connected(&self) -> Result<(), Error> {
        let endpoint = match &self.connection {
            Connection::Process(process) => process.endpoint(),
            Connection::Endpoint(endpoint) => endpoint,
            Connection::Pool(pool) => return Ok(pool.check()?),
            Connection::InProcess | Connection::None => return Ok(()),
        };
        endpoint.disconnected().map_or(Ok(()), |reason| Err(farlink_rpc::CallError::Disconnected(reason).into()))
    }

    /// Says of an error that the executor's end caused how the executor ended.
    pub(crate) fn explain(&self, error: Error) -> Error {
        self.explain_of(self.pool().and_then(|pool| pool.last_end()).as_deref(), error)
    }

    /// As [`Self::explain`]; if the executors are a pool, of an error by this one.
    pub(crate) fn explain_of(&self, running: Option<&Running>, error: Error) -> Error {
        let late = match &error {
            Error::Call(CallError::TimedOut { function, timeout }) => Some((*function, *timeout)),
            Error::Memory(error) => error.timed_out(),
            _ => None,
        };
        if let Some((function, timeout)) = late {
            return self.stuck(function, timeout, None);
        }
        let gone = match &error {
            Error::Call(error) => matches!(error, farlink_rpc::CallError::Disconnected(_)),
            Error::Memory(error) => error.is_disconnected(),
            _ => false,
        };
        let death = gone.then(|| self.death_of(running)).flatten();
        match (gone.then(|| self.callbacks.panic()).flatten(), death) {
            (Some(text), _) => Error::CallbackPanicked { text },
            (None, Some(death)) => Error::ExecutorEnded(death),
            (None, None) => error,
        }
    }
}
