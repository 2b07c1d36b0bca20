//! What can be seen of a session, by choice: for debuggers, profilers, and whoever wants to know how it works.

use crate::{Perf, SessionBuilder};

/// What is to be seen of a session.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Observed {
    pub(crate) keeps_graphs: bool,
    pub(crate) traces: bool,
    pub(crate) tells_progress: bool,
    pub(crate) shows_debuggers: bool,
    pub(crate) perf: Option<Perf>,
}

impl Observed {
    /// Whether linked code is to be in memory of the executor's own.
    pub(crate) fn wants_private_code(self) -> bool {
        self.shows_debuggers || self.perf == Some(Perf::Map)
    }
}

impl SessionBuilder {
    /// Keeps the graphs of linked objects, with their addresses, for [`Library::linked_graphs`](crate::Library::linked_graphs).
    #[must_use]
    pub fn keep_graphs(mut self, keeps_graphs: bool) -> Self {
        self.observed.keeps_graphs = keeps_graphs;
        self
    }

    /// Records what both processes do, and when, for [`Session::take_trace`](crate::Session::take_trace).
    #[must_use]
    pub fn trace(mut self, traces: bool) -> Self {
        self.observed.traces = traces;
        self
    }

    /// Keeps count of what is being linked, for [`Session::progress`](crate::Session::progress).
    #[must_use]
    pub fn tell_progress(mut self, tells_progress: bool) -> Self {
        self.observed.tells_progress = tells_progress;
        self
    }

    /// Shows linked objects to debuggers through GDB's JIT interface, with all debug information that they have; those that
    /// are removed are taken back. Every object takes as much memory of the executor more as its file has bytes.
    ///
    /// Linked code and data then are in memory of the executor's own, in which debuggers can set breakpoints, and come there in
    /// messages; buffers are shared as without this.
    #[must_use]
    pub fn debug(mut self, shows_debuggers: bool) -> Self {
        self.observed.shows_debuggers = shows_debuggers;
        self
    }

    /// Tells profilers where linked functions are. The executor has to be on this machine. The file stays when the session
    /// has ended, for those who read it then.
    #[must_use]
    pub fn perf(mut self, form: Perf) -> Self {
        self.observed.perf = Some(form);
        self
    }
}
