//! Libraries: objects, archives and shared libraries whose definitions refer to each other (ORC: `JITDylib`).
//!
//! Declaring an object parses it and enters its definitions in the library's symbol table. Nothing is linked until a
//! lookup needs it; then everything that the lookup needs is linked as one batch (see [`crate::batch`]).

use crate::batch::{self, Batch};
use crate::session::{Session, SessionInner};
use crate::state::{LinkedObject, ObjectSlot, ObjectState, State};
use crate::table::{Definition, Strength};
use crate::{Error, PhaseTimes};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange};
use farlink_graph::LinkGraph;
use farlink_mem::FinalizedAlloc;
use farlink_wire::msg::MainCall;
use farlink_wire::sps::Blob;
use std::any::Any;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A set of definitions in a [`Session`](crate::Session), and where else to look for what they refer to. Cheap to
/// clone.
///
/// References are resolved among the library's own objects, then in its archives, then in its shared libraries in
/// the order in which they were added, then in what the executor's process has loaded. When the last clone is gone,
/// the library's objects are removed.
#[derive(Clone)]
pub struct Library {
    inner: Arc<LibraryInner>,
}

/// An object of a library.
///
/// Dropping it does nothing: the object stays until it is removed or the library goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    id: ObjectId,
    /// Tells it from another that gets its place when it has been removed.
    serial: u64,
}

/// Where a linked object is: see [`Library::object_memory`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectMemory {
    /// What the object is called.
    pub name: String,
    /// Its memory: a segment for each protection.
    pub segments: Vec<(AllocGroup, ExecutorAddrRange)>,
    /// Memory that it has together with other objects, which has sections of each.
    pub with_others: Vec<(AllocGroup, ExecutorAddrRange)>,
    /// What debuggers are shown of it: see [`SessionBuilder::debug`](crate::SessionBuilder::debug).
    pub debug_info: Vec<(AllocGroup, ExecutorAddrRange)>,
}

impl Object {
    pub(crate) fn new(id: ObjectId, serial: u64) -> Self {
        Self { id, serial }
    }

    pub(crate) fn id(self) -> ObjectId {
        self.id
    }

    pub(crate) fn serial(self) -> u64 {
        self.serial
    }

    /// Returns what is no object of any library.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        Self { id: ObjectId(u32::MAX), serial: u64::MAX }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectId(pub(crate) u32);

pub(crate) struct LibraryInner {
    pub(crate) name: String,
    pub(crate) session: Arc<SessionInner>,
    state: Mutex<State>,
    /// Whether programs are linked without definitions that nothing refers to.
    drops_unused: AtomicBool,
    /// Signalled when an object that was being linked is not any more.
    pub(crate) settled: Condvar,
    /// What goes with the library, after its objects.
    kept: Mutex<Vec<Box<dyn Any + Send + Sync>>>,
}

impl LibraryInner {
    fn drops_unused(&self) -> bool {
        self.drops_unused.load(Ordering::Relaxed)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Library {
    pub(crate) fn from_inner(inner: Arc<LibraryInner>) -> Self {
        Self { inner }
    }

    pub(crate) fn new(name: &str, session: Arc<SessionInner>) -> Self {
        let (state, drops_unused, settled) = (Mutex::default(), AtomicBool::new(false), Condvar::new());
        let kept = Mutex::default();
        Self { inner: Arc::new(LibraryInner { name: name.to_owned(), session, state, drops_unused, settled, kept }) }
    }

    /// Returns the session that the library is in.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::from_inner(Arc::clone(&self.inner.session))
    }

    /// Keeps something for as long as the library is there.
    pub(crate) fn keep(&self, thing: Box<dyn Any + Send + Sync>) {
        self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner).push(thing);
    }

    pub(crate) fn inner(&self) -> &Arc<LibraryInner> {
        &self.inner
    }

    /// Returns the library's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Has programs, as [`Self::run_program`] links them, linked without the definitions that nothing refers to, from the
    /// entry on: what GNU ld's `--gc-sections` keeps is kept. Only what is linked can be looked up afterwards.
    pub fn drop_unused(&self) {
        self.inner.drops_unused.store(true, Ordering::Relaxed);
    }

    /// Opens a shared library in the executor and makes its symbols known to this library.
    ///
    /// `path` is a path or a name that the executor's dynamic linker finds. The library stays open. Objects that want its
    /// thread-local variables at a fixed distance from the thread pointer, as code does that was not compiled with `-fPIC`,
    /// have to be added before it.
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot open it.
    pub fn add_shared_library(&self, path: &str) -> Result<(), Error> {
        let session = &self.inner.session;
        let names = self.inner.lock().static_tls_names();
        let handle = session.runtime()?.open_static(path, names).map_err(|error| session.explain(error))?;
        self.inner.lock().shared.push(handle);
        Ok(())
    }

    /// Defines `name` as the address `addr`.
    ///
    /// # Errors
    ///
    /// Fails if the library defines the name already, unless that definition is weak and not linked yet.
    pub fn define(&self, name: &str, addr: ExecutorAddr) -> Result<(), Error> {
        let mut state = self.inner.lock();
        state.table.check(name, Strength::Strong).map_err(|conflict| Error::DuplicateDefinition {
            symbol: name.to_owned(),
            first: state.name_of(conflict.first),
            second: "a definition with an address".to_owned(),
        })?;
        state.table.add(name, Definition::absolute(addr));
        Ok(())
    }

    /// Links what `name` needs, runs its initializers, and returns the symbol's address.
    ///
    /// # Errors
    ///
    /// Fails if the symbol, or one that it needs, is defined nowhere, if an object cannot be linked, or if the
    /// executor fails. The library is left as it was: what could not be linked can be looked up again.
    pub fn lookup(&self, name: &str) -> Result<ExecutorAddr, Error> {
        Ok(self.lookup_all(&[name])?[0])
    }

    /// As [`Self::lookup`], for several symbols in one batch; gives their addresses in order.
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`].
    pub fn lookup_all(&self, names: &[&str]) -> Result<Vec<ExecutorAddr>, Error> {
        self.link(Batch { names, every_object: false, drops_unused: false, args: &[] })
    }

    /// Links every object that has been declared, whether anything refers to it or not, and runs its initializers.
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`].
    pub fn link_all(&self) -> Result<(), Error> {
        self.link(Batch { names: &[], every_object: true, drops_unused: false, args: &[] }).map(drop)
    }

    /// Links every object and calls `entry` as C's `main` on the executor's main thread; gives its result.
    ///
    /// `args` are the program's arguments, its own name first.
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`]; also fails if the executor ends meanwhile.
    pub fn run_as_main(&self, entry: &str, args: &[OsString]) -> Result<i32, Error> {
        let call = self.main_call(entry, args)?;
        let session = &self.inner.session;
        let result = match (session.runtime()?.run_as_main(&call)?, session.call_timeout) {
            (pending, None) => pending.wait(),
            (pending, Some(timeout)) => {
                pending.wait_timeout(timeout).ok_or_else(|| session.stuck(entry, timeout, None))?
            }
        };
        let result = result.map_err(|error| session.explain(error.into()))?;
        // C's `main` returns an `int`; the wire has room for more.
        Ok(result as i32)
    }

    /// Links every object, calls `entry` as C's `main`, and ends the executor's process with its result, as if the
    /// program had been linked natively: what it left for its exit runs, and its streams are flushed.
    ///
    /// Gives how the process ended. In-process this ends the calling process. An executor that cannot end with its
    /// program, or is no child of this process, stays; then the status is made from the result of `main`.
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`]. That the program ended by a signal is not an error.
    pub fn run_program(&self, entry: &str, args: &[OsString]) -> Result<ExitStatus, Error> {
        let call = self.main_call(entry, args)?;
        let session = &self.inner.session;
        let runtime = session.runtime()?;
        let ended = |error: Error| match (&error, session.process_end()) {
            // Once the program runs, the executor's end is the program's.
            (Error::Call(farlink_rpc::CallError::Disconnected(_)), Some(status)) => Ok(status),
            _ => Err(error),
        };
        if session.owns_process() && runtime.can_run_programs() {
            let Err(error) = runtime.run_program(&call);
            return ended(error);
        }
        let result = match runtime.run_as_main(&call)?.wait() {
            Ok(result) => result,
            Err(error) => return ended(error.into()),
        };
        // The wait status of a process that exited has its exit status in bits 8 to 15.
        Ok(std::os::unix::process::ExitStatusExt::from_raw((result as i32 & 0xff) << 8))
    }

    /// Links every object and runs its initializers with `args`, as [`Self::run_program`] does before it calls `entry`.
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`].
    pub fn link_program(&self, entry: &str, args: &[OsString]) -> Result<(), Error> {
        self.main_call(entry, args).map(drop)
    }

    /// Links every object and returns the call of `entry` with `args`.
    fn main_call(&self, entry: &str, args: &[OsString]) -> Result<MainCall, Error> {
        let args: Vec<Blob<'static>> = args.iter().map(|arg| arg.clone().into_vec().into()).collect();
        let found = self.link(Batch {
            names: &[entry],
            every_object: true,
            drops_unused: self.inner.drops_unused(),
            args: &args,
        })?;
        Ok(MainCall { main: found[0], args })
    }

    fn link(&self, batch: Batch<'_>) -> Result<Vec<ExecutorAddr>, Error> {
        let session = &self.inner.session;
        self.inner.session.lock_executor()?;
        let _held = session.pool().map(|pool| pool.hold()).transpose().map_err(|error| session.explain(error))?;
        let linked = session.check_connected().and_then(|()| batch::link(&self.inner, batch));
        linked.map_err(|error| session.explain(error))
    }

    /// Removes an object: what it left for its end runs, and its memory comes back.
    ///
    /// # Errors
    ///
    /// Fails, and changes nothing, if other objects refer to it. If what runs at its end fails, the object is gone
    /// all the same and the error says what failed.
    pub fn remove(&self, object: Object) -> Result<(), Error> {
        let session = &self.inner.session;
        let (leaving, memory) = {
            let mut state = self.check_unused(object)?;
            let (name, Some((code, memory))) = state.remove(object.id) else { return Ok(()) };
            (session.leaves(vec![(name, code)]), memory)
        };
        let ended =
            if memory.is_empty() { Ok(()) } else { session.memory.deallocate(memory).wait().map_err(Error::from) };
        // If it may be running still, or the executor has ended, it is wanted for messages.
        if ended.is_ok() {
            session.has_left(&leaving);
        }
        ended.and_then(|()| session.check_connected()).map_err(|error| session.explain(error))
    }

    /// Returns how long the phases of this library's links took so far.
    #[must_use]
    pub fn phase_times(&self) -> PhaseTimes {
        self.inner.lock().times
    }

    /// Returns where the linked objects are in the executor's memory, in the order in which they were declared.
    #[must_use]
    pub fn object_memory(&self) -> Vec<ObjectMemory> {
        let state = self.inner.lock();
        let linked = state.objects.iter().filter_map(|slot| match &slot.state {
            ObjectState::Linked(linked) => Some((slot, linked)),
            _ => None,
        });
        let memory = |(slot, linked): (&ObjectSlot, &LinkedObject)| {
            let segments = linked.memory.iter().flat_map(FinalizedAlloc::segments).collect();
            let more = slot.has_more();
            let with_others = more.iter().flat_map(|more| &more.sets).flat_map(|set| set.segments()).collect();
            let debug_info = more.and_then(|more| more.shown.as_ref()).map(|shown| shown.segments());
            let debug_info = debug_info.unwrap_or_default();
            ObjectMemory { name: slot.name.to_string(), segments, with_others, debug_info }
        };
        linked.map(memory).collect()
    }

    /// Takes the graphs of the linked objects, with their addresses, where the session keeps them: see
    /// [`SessionBuilder::keep_graphs`](crate::SessionBuilder::keep_graphs) and
    /// [`SessionBuilder::image`](crate::SessionBuilder::image).
    #[must_use]
    pub fn linked_graphs(&self) -> Vec<LinkGraph> {
        let mut state = self.inner.lock();
        state.objects.iter_mut().filter_map(ObjectSlot::take_graph).collect()
    }
}

impl Drop for LibraryInner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (mut memory, mut leaving) = (Vec::new(), Vec::new());
        for slot in state.objects.iter_mut() {
            if let Some((code, own)) = slot.take_linked() {
                leaving.push((std::mem::take(&mut slot.name), code));
                memory.extend(own);
            }
        }
        if !memory.is_empty() {
            // Nobody is left to be told that something failed at its end; the memory comes back all the same.
            let leaving = self.session.leaves(leaving);
            if self.session.memory.deallocate(memory).wait().is_ok() {
                self.session.has_left(&leaving);
            }
        }
    }
}
