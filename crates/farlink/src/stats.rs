//! What a session holds and has done.

use crate::Error;
use crate::session::Session;
use farlink_mem::{MapperUsage, MemoryStats, ReservationLayout};
use std::collections::BTreeMap;

/// What a session holds and has done: see [`Session::stats`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SessionStats {
    /// The executor's memory as this process has divided it.
    pub memory: MemoryStats,
    /// What that takes of the system.
    pub usage: MapperUsage,
    /// Calls to the executor, each a round trip, by the name of the function.
    pub calls: BTreeMap<&'static str, u64>,
    /// System calls that memory and connections have made in this process since it started, by name.
    pub system_calls: BTreeMap<&'static str, u64>,
}

impl Session {
    /// Returns the executor's memory as this process has divided it.
    /// [`Library::object_memory`](crate::Library::object_memory) says what is where.
    #[must_use]
    pub fn memory_layout(&self) -> Vec<ReservationLayout> {
        self.inner().memory.layout()
    }

    /// Returns what the session holds and has done so far. Asks the executor, which is one more round trip.
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot be reached.
    pub fn stats(&self) -> Result<SessionStats, Error> {
        let inner = self.inner();
        // Before the question, which is not what anybody asks about.
        let calls = inner.runtime.as_ref().map(|runtime| runtime.calls()).unwrap_or_default();
        let system_calls = farlink_mem::system_calls().chain(farlink_rpc::system_calls());
        let system_calls = system_calls.filter(|&(_, count)| count > 0).collect();
        let usage = inner.memory.usage().wait().map_err(|error| inner.explain(error.into()))?;
        Ok(SessionStats { memory: inner.memory.stats(), usage, calls, system_calls })
    }
}
