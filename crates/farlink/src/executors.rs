//! Sessions with executors of which any may go, and another take its place.

use crate::callback::Callbacks;
use crate::pool::{Pool, Restart, cannot};
use crate::prepared::Prepared;
use crate::process::Program;
use crate::session::{Connection, LOW_LIMIT};
use crate::trace::Trace;
use crate::{Error, Function, Memory, Session, SessionBuilder};
use farlink_mem::SharedMemoryMapper;
use farlink_rpc::{Executor, SetupError};
use std::sync::Arc;

impl SessionBuilder {
    /// Has [`Self::spawn`] start this many executors, all alike. What is linked is linked once, for all of them: they share
    /// its code and constants, and each has its own data, from whole pages on. Its initializers run in each. A call of a
    /// [`Function`] goes to the executor that has the fewest to do, or to one of choice: see [`Function::on`].
    ///
    /// One that ends is replaced at once, unless [`Self::restart`] says otherwise. The memory has to be shared without a
    /// name, as it is unless something else is chosen, and nothing can be shown to debuggers and profilers.
    ///
    /// They are forked from one process, which has the shared libraries that are added before the first lookup; others
    /// cannot be added. All have the same addresses, and the same secrets of the C library's.
    #[must_use]
    pub fn executors(mut self, count: usize) -> Self {
        self.executors = count.max(1);
        self
    }

    /// Has [`Self::spawn`] start an executor whose place another can take, and says when one does: with the same addresses,
    /// with all that has been linked, its data as it was at first and its initializers run. Functions, symbols and
    /// objects stay what they were. What was running fails, and so does what was asked for meanwhile.
    ///
    /// For this, each object's data begins at a page of its own. [`Self::executors`] says what such executors have to be.
    #[must_use]
    pub fn restart(mut self, restart: Restart) -> Self {
        self.restart = Some(restart);
        self
    }

    pub(crate) fn is_pool(&self) -> bool {
        self.executors > 1 || self.restart.is_some()
    }

    pub(crate) fn restart_policy(&self) -> Restart {
        self.restart.unwrap_or(Restart::AtOnce)
    }

    pub(crate) fn spawn_pool(self, program: &Program) -> Result<Session, Error> {
        if self.memory != Memory::Shared {
            return Err(cannot("its memory has to be shared, without a name"));
        }
        if self.observed.traces || self.observed.shows_debuggers || self.observed.perf.is_some() {
            return Err(cannot("it cannot be traced, or shown to debuggers or profilers"));
        }
        let callbacks = Arc::<Callbacks>::default();
        let pool = Pool::start(Prepared::start(program)?, Arc::clone(&callbacks), &self)?;
        let setup_error =
            |error: SetupError| Error::Setup { executor: program.path.display().to_string(), error, how: None };
        let executor = Executor::new(pool.info().clone(), pool.clone()).map_err(setup_error)?;
        let limit = self.low_memory.then_some(LOW_LIMIT);
        let limited = executor.limited(self.protocol_timeout);
        let mapper = SharedMemoryMapper::replicated(&limited, self.hardening().is_wanted, limit)?;
        let connection = Connection::Pool(Arc::clone(&pool));
        let session = self.with_mapper(executor, Arc::new(mapper), connection, callbacks, Trace::default())?;
        pool.belongs_to(session.weak());
        Ok(session)
    }
}

impl Session {
    /// Starts other executors in the places of all, also of those that run, and waits until they are as
    /// [`SessionBuilder::restart`] says.
    ///
    /// # Errors
    ///
    /// Fails if the session was not built so, or an executor cannot be started, or cannot be what the one before it was.
    pub fn restart(&self) -> Result<(), Error> {
        let inner = self.inner();
        let pool = inner.pool().ok_or_else(|| cannot("SessionBuilder::restart or executors has to say so"))?;
        pool.restart_all().map_err(|error| inner.explain(error))
    }

    /// Returns how many executors the session has.
    #[must_use]
    pub fn executor_count(&self) -> usize {
        self.inner().pool().map_or(1, |pool| pool.size())
    }

    /// Returns the ids of the processes of the executors that this session has started.
    #[must_use]
    pub fn process_ids(&self) -> Vec<u32> {
        let id = |process: &crate::process::Process| u32::try_from(process.id().as_raw_nonzero().get()).ok();
        match &self.inner().connection {
            Connection::Process(process) => id(process).into_iter().collect(),
            Connection::Pool(pool) => pool.all().iter().filter_map(|running| id(running.process())).collect(),
            _ => Vec::new(),
        }
    }
}

impl<S> Function<S> {
    /// Has the function called in the executor with this number, of those that [`SessionBuilder::executors`] has asked for,
    /// from 0 on. Without this, each call goes to one that has the fewest to do.
    #[must_use]
    pub fn on(mut self, executor: usize) -> Self {
        self.executor = Some(executor);
        self
    }
}
