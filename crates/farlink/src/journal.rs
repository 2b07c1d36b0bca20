//! What every executor of a pool has been told, as far as it still holds: another that comes later is told the same.
//!
//! It is kept by what was asked of executors, not by libraries and objects. What has been taken back is not in it: so it
//! grows with what is linked, and not with time.

use crate::Error;
use crate::pool::cannot;
use crate::relink::Moved;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_rpc::Executor;
use farlink_wire::functions::{
    ALLOW_EXECUTABLE_STACKS, DYLIB_OPEN, DYLIB_OPEN_STATIC, Expected, HARDEN, PLACE_BELOW, RESOLVE, RUN_INITIALIZERS,
    SHARED_DEINITIALIZE, SHARED_INITIALIZE_BATCH, SHARED_INSTANCE, SHARED_MAP_AT, SHARED_RELEASE, TLS_CLOSE, TLS_OPEN,
    WRITE_BUFFERS,
};
use farlink_wire::msg::{RunInitializers, SharedFinalizeRequest, Stripe, TlsPlace, TlsTemplate};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Blob, Decode, SpsError, from_bytes};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What every executor of a pool is told when one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Open,
    Map,
    Finalize,
    Deallocate,
    Release,
    OpenTls,
    CloseTls,
    Initialize,
    /// Something that is so from then on.
    Setting,
    /// The last thing before linked code.
    Lock,
    /// What is not the executor's state as it was linked: each is told, and those that come later are not.
    Write,
}

impl Told {
    /// Returns whether executors have to be told it one after another, each in the same order: what they answer depends on
    /// what they were told before.
    pub(crate) fn is_ordered(self) -> bool {
        matches!(self, Self::Open | Self::OpenTls | Self::CloseTls)
    }

    /// Returns whether it takes something back: without any executor, nothing is left to do.
    pub(crate) fn takes_back(self) -> bool {
        matches!(self, Self::Deallocate | Self::Release | Self::CloseTls)
    }
}

/// What names mean in lists of libraries.
type Resolved = BTreeMap<(Vec<ExecutorAddr>, String), Option<ExecutorAddr>>;

/// A reservation: the memory behind it, its length and its stripes.
struct Reservation {
    object: OwnedFd,
    bytes: u64,
    stripes: Vec<Stripe>,
}

/// A module of thread-local variables.
struct TlsModule {
    template: TlsTemplate,
    place: TlsPlace,
    users: u64,
}

#[derive(Default)]
struct State {
    /// Descriptors that no call has named yet, by their tags.
    descriptors: HashMap<u64, OwnedFd>,
    /// Shared libraries, in the order in which they were opened: the arguments of the call and the handle.
    opened: Vec<(ExecutorAddr, Vec<u8>, ExecutorAddr)>,
    /// Names that executors were asked for since a library was opened late: in which libraries, and what came back.
    resolved: Resolved,
    /// Whether linked code could not be made to refer to what names mean.
    is_broken: bool,
    settings: Vec<(ExecutorAddr, Vec<u8>)>,
    lock: Option<Vec<u8>>,
    reservations: BTreeMap<ExecutorAddr, Reservation>,
    /// By number.
    modules: BTreeMap<u64, TlsModule>,
    /// In the order in which they were finalized, each with its reservation.
    allocations: BTreeMap<u64, (ExecutorAddr, SharedFinalizeRequest)>,
    /// The numbers of allocations by their keys.
    numbers: HashMap<ExecutorAddr, u64>,
    next_number: u64,
    /// In the order in which they ran.
    initializers: Vec<RunInitializers>,
}

/// See the module.
pub(crate) struct Journal {
    kinds: HashMap<ExecutorAddr, Told>,
    close_tls: Option<ExecutorAddr>,
    resolve: Option<ExecutorAddr>,
    /// What stands for the session in executors.
    instance: ExecutorAddr,
    /// Whether a library was opened after linking had begun: not in the process that executors are forked from.
    has_late: AtomicBool,
    state: Mutex<State>,
}

impl Journal {
    /// Returns the journal of executors that introduce themselves so.
    pub(crate) fn new(info: &ExecutorInfo) -> Self {
        let kinds = [
            (DYLIB_OPEN.find(info), Told::Open),
            (DYLIB_OPEN_STATIC.find(info), Told::Open),
            (SHARED_MAP_AT.find(info), Told::Map),
            (SHARED_INITIALIZE_BATCH.find(info), Told::Finalize),
            (SHARED_DEINITIALIZE.find(info), Told::Deallocate),
            (SHARED_RELEASE.find(info), Told::Release),
            (TLS_OPEN.find(info), Told::OpenTls),
            (TLS_CLOSE.find(info), Told::CloseTls),
            (RUN_INITIALIZERS.find(info), Told::Initialize),
            (ALLOW_EXECUTABLE_STACKS.find(info), Told::Setting),
            (PLACE_BELOW.find(info), Told::Setting),
            (HARDEN.find(info), Told::Lock),
            (WRITE_BUFFERS.find(info), Told::Write),
        ];
        let kinds = kinds.into_iter().filter_map(|(addr, told)| Some((addr?, told))).collect();
        let (close_tls, resolve) = (TLS_CLOSE.find(info), RESOLVE.find(info));
        let instance = info.symbol(SHARED_INSTANCE).unwrap_or(ExecutorAddr::NULL);
        Self { kinds, close_tls, resolve, instance, has_late: AtomicBool::new(false), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic half-way through a change runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what a call of `function` tells executors, if it is for all of them.
    pub(crate) fn kind(&self, function: ExecutorAddr) -> Option<Told> {
        self.kinds.get(&function).copied()
    }

    /// Returns whether something has been told but which libraries to open, and how things are to be.
    pub(crate) fn has_begun(&self) -> bool {
        self.lock().has_begun()
    }

    /// Returns whether a library was opened after that.
    pub(crate) fn has_late_libraries(&self) -> bool {
        self.has_late.load(Ordering::Relaxed)
    }

    /// Keeps a descriptor that a call is to name by `tag`.
    pub(crate) fn keep(&self, tag: u64, descriptor: OwnedFd) {
        self.lock().descriptors.insert(tag, descriptor);
    }

    /// Returns whether [`Self::note`] is to be told of a call of `function`, which is for one executor.
    pub(crate) fn notes(&self, function: ExecutorAddr) -> bool {
        self.resolve == Some(function) && self.has_late_libraries()
    }

    /// Takes note of what names mean.
    pub(crate) fn note(&self, args: &[u8], answer: &[u8]) {
        let asked = from_bytes::<(Vec<ExecutorAddr>, Vec<String>)>(args);
        let found = from_bytes::<Expected<Vec<Option<ExecutorAddr>>>>(answer);
        if let (Ok((libraries, names)), Ok(Ok(found))) = (asked, found) {
            let resolved = names.into_iter().map(|name| (libraries.clone(), name)).zip(found);
            self.lock().resolved.extend(resolved);
        }
    }

    /// Takes note of what executors have been told and have done. What they refused changes nothing.
    pub(crate) fn record(&self, told: Told, function: ExecutorAddr, args: &[u8], answer: &[u8]) {
        // This process has encoded the arguments. An answer that cannot be read is an error to whoever asked.
        let recorded = self.lock().record(self, told, function, args, answer);
        debug_assert!(recorded.is_some(), "{told:?} cannot be recorded");
    }
}

/// Returns whether a call without a result was done.
fn is_done(answer: &[u8]) -> bool {
    matches!(from_bytes(answer), Ok(SpsError(Ok(()))))
}

/// Returns the result of a call, if it had one.
fn result<T: for<'a> Decode<'a>>(answer: &[u8]) -> Option<T> {
    from_bytes::<Expected<T>>(answer).ok()?.ok()
}

impl State {
    fn has_begun(&self) -> bool {
        !self.reservations.is_empty() || self.lock.is_some()
    }

    fn record(
        &mut self,
        journal: &Journal,
        told: Told,
        function: ExecutorAddr,
        args: &[u8],
        answer: &[u8],
    ) -> Option<()> {
        match told {
            Told::Open => {
                if let Some(handle) = result(answer) {
                    journal.has_late.fetch_or(self.has_begun(), Ordering::Relaxed);
                    self.opened.push((function, args.to_vec(), handle));
                }
            }
            Told::Map => {
                let (_, tag, bytes, stripes, base) =
                    from_bytes::<(ExecutorAddr, u64, u64, Vec<Stripe>, ExecutorAddr)>(args).ok()?;
                let object = self.descriptors.remove(&tag)?;
                if result::<ExecutorAddr>(answer).is_some() {
                    self.reservations.insert(base, Reservation { object, bytes, stripes });
                }
            }
            Told::Finalize => {
                let (_, requests) =
                    from_bytes::<(ExecutorAddr, Vec<(ExecutorAddr, SharedFinalizeRequest)>)>(args).ok()?;
                for (key, request) in result::<Vec<ExecutorAddr>>(answer).into_iter().flatten().zip(requests) {
                    self.allocations.insert(self.next_number, request);
                    self.numbers.insert(key, self.next_number);
                    self.next_number += 1;
                }
            }
            // What fails at an object's end does not keep it.
            Told::Deallocate => {
                let (_, keys) = from_bytes::<(ExecutorAddr, Vec<ExecutorAddr>)>(args).ok()?;
                keys.iter().for_each(|key| self.end(journal, *key));
            }
            Told::Release => {
                let (_, bases) = from_bytes::<(ExecutorAddr, Vec<ExecutorAddr>)>(args).ok()?;
                self.release(journal, &bases);
            }
            Told::OpenTls => {
                let template = from_bytes::<TlsTemplate>(args).ok()?;
                if let Some((_, place)) = result::<(ExecutorAddr, TlsPlace)>(answer) {
                    let users = template.users.max(1);
                    self.modules.insert(place.module, TlsModule { template, place, users });
                }
            }
            Told::CloseTls => self.close_module(args),
            Told::Initialize => {
                let request = from_bytes::<RunInitializers>(args).ok()?;
                if is_done(answer) {
                    self.initialized(request);
                }
            }
            Told::Setting => {
                if is_done(answer) && !self.settings.iter().any(|(known, with)| (*known, &**with) == (function, args)) {
                    self.settings.push((function, args.to_vec()));
                }
            }
            Told::Lock => self.lock = result::<Vec<(String, String)>>(answer).map(|_| args.to_vec()),
            Told::Write => {}
        }
        Some(())
    }

    /// Adds what has been initialized; in one request with what came before, if the arguments are the same.
    fn initialized(&mut self, request: RunInitializers) {
        match self.initializers.last_mut() {
            Some(last) if last.args == request.args => {
                last.init.extend(request.init);
                last.exits.extend(request.exits);
                last.ifuncs.extend(request.ifuncs);
            }
            _ => self.initializers.push(request),
        }
    }

    /// Forgets an allocation, with what came to be by it.
    fn end(&mut self, journal: &Journal, key: ExecutorAddr) {
        let number = self.numbers.remove(&key);
        let Some((_, request)) = number.and_then(|number| self.allocations.remove(&number)) else { return };
        let closed: Vec<Blob<'static>> = request
            .actions
            .into_iter()
            .filter_map(|action| action.dealloc)
            .filter(|dealloc| Some(dealloc.function) == journal.close_tls)
            .map(|dealloc| dealloc.args)
            .collect();
        closed.iter().for_each(|args| self.close_module(&args.0));
        let segments = request.segments.iter();
        let ranges: Vec<_> =
            segments.filter_map(|segment| ExecutorAddrRange::from_len(segment.addr, segment.size)).collect();
        let is_in = |addr: ExecutorAddr| ranges.iter().any(|range| range.contains(addr));
        for request in &mut self.initializers {
            request.init.retain(|array| !is_in(array.start()));
            request.exits.retain(|exits| !is_in(exits.dso_handle));
            request.ifuncs.retain(|&(resolver, slot)| !is_in(resolver) && !is_in(slot));
        }
        self.initializers
            .retain(|request| !request.init.is_empty() || !request.exits.is_empty() || !request.ifuncs.is_empty());
    }

    fn close_module(&mut self, args: &[u8]) {
        let Ok((handle,)) = from_bytes::<(ExecutorAddr,)>(args) else { return };
        if let Some(module) = self.modules.get_mut(&handle.as_u64()) {
            module.users -= 1;
            if module.users == 0 {
                self.modules.remove(&handle.as_u64());
            }
        }
    }

    fn release(&mut self, journal: &Journal, bases: &[ExecutorAddr]) {
        for base in bases {
            let Some(reservation) = self.reservations.remove(base) else { continue };
            let Some(range) = ExecutorAddrRange::from_len(*base, reservation.bytes) else { continue };
            let inside: Vec<_> = self.numbers.keys().copied().filter(|&key| range.contains(key)).collect();
            inside.into_iter().for_each(|key| self.end(journal, key));
        }
    }
}

impl Journal {
    /// Tells an executor everything, up to running initializers.
    ///
    /// # Errors
    ///
    /// Fails if it cannot do something, or answers otherwise than those before it did.
    pub(crate) fn replay(
        &self,
        executor: &Executor,
        send: &dyn Fn(u64, &OwnedFd) -> Result<(), Error>,
        tag: &mut dyn FnMut() -> u64,
        relink: &dyn Fn(&Moved) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.lock();
        if state.is_broken {
            return Err(cannot("what was linked could not be put right before"));
        }
        let resolved = state.open_libraries(executor)?;
        state.check_moved(resolved, relink)?;
        // All are on their way before the first answer is waited for.
        let map = executor.bind(SHARED_MAP_AT)?;
        let mut mapped = Vec::new();
        for (&base, Reservation { object, bytes, stripes }) in &state.reservations {
            let tag = tag();
            send(tag, object)?;
            mapped.push((base, map.call(&(self.instance, tag, *bytes, stripes.clone(), base))));
        }
        for (base, answer) in mapped {
            if answer.wait()? != Ok(base) {
                return Err(cannot(format!(
                    "memory at {base}, which linked code counts on, is taken in a new executor"
                )));
            }
        }
        if let Some(args) = &state.lock {
            let locked = executor.bind(HARDEN)?.call_encoded(args.clone()).wait()?;
            locked.map_err(|text| cannot(format!("a new executor cannot lock itself: {text}")))?;
        }
        for (function, args) in &state.settings {
            let set = executor.callee::<(), SpsError>("a setting", *function).call_encoded(args.clone()).wait()?;
            set.0.map_err(cannot)?;
        }
        state.open_modules(executor)?;
        state.finalize(self.instance, executor)?;
        let initialize = executor.bind(RUN_INITIALIZERS)?;
        state.initializers.iter().try_for_each(|request| initialize.call(request).wait()?.0.map_err(cannot))
    }
}

impl State {
    /// Opens the shared libraries, which fails if they have other handles; gives what names mean now.
    fn open_libraries(&self, executor: &Executor) -> Result<Resolved, Error> {
        for (function, args, handle) in &self.opened {
            let open = executor.callee::<(), Expected<ExecutorAddr>>("open a library", *function);
            if open.call_encoded(args.clone()).wait()? != Ok(*handle) {
                return Err(cannot("a shared library cannot be opened again as it was".to_owned()));
            }
        }
        let mut by_libraries: BTreeMap<&[ExecutorAddr], Vec<&String>> = BTreeMap::new();
        for (libraries, name) in self.resolved.keys() {
            by_libraries.entry(libraries).or_default().push(name);
        }
        let mut resolved = Resolved::new();
        for (libraries, names) in by_libraries {
            let asked = (libraries.to_vec(), names.iter().map(|name| (*name).clone()).collect());
            let found = executor.bind(RESOLVE)?.call(&asked).wait()?.map_err(cannot)?;
            let keys = names.into_iter().map(|name| (libraries.to_vec(), name.clone()));
            resolved.extend(keys.zip(found));
        }
        Ok(resolved)
    }

    /// Has linked code refer to what names mean now.
    fn check_moved(&mut self, resolved: Resolved, relink: &dyn Fn(&Moved) -> Result<(), Error>) -> Result<(), Error> {
        let mut moved = Moved::new();
        for (key, old) in &self.resolved {
            let new = resolved.get(key).copied().flatten();
            match (*old, new) {
                (Some(old), Some(new)) if old != new => drop(moved.insert((key.1.clone(), old), new)),
                (Some(_), None) => return Err(cannot(format!("{} is in no library of a new executor", key.1))),
                _ => {}
            }
        }
        if !moved.is_empty() {
            // Some of it may have been done: then no address is known to be right.
            relink(&moved).inspect_err(|_| self.is_broken = true)?;
        }
        self.resolved = resolved;
        Ok(())
    }

    /// Makes the modules of thread-local variables, with the numbers that they have. The dynamic linker gives the lowest
    /// that is free, so what has gone meanwhile is stood for by another module until all are there.
    fn open_modules(&self, executor: &Executor) -> Result<(), Error> {
        if self.modules.is_empty() {
            return Ok(());
        }
        let (open, close) = (executor.bind(TLS_OPEN)?, executor.bind(TLS_CLOSE)?);
        let filler = TlsTemplate { content: Blob::default(), size: 8, align: 8, is_static: false, users: 1 };
        let mut fillers = Vec::new();
        let moved = || cannot("thread-local variables of linked code have another place in a new executor".to_owned());
        for module in self.modules.values() {
            loop {
                let (handle, place) = open.call(&module.template).wait()?.map_err(cannot)?;
                if place == module.place {
                    break;
                }
                close_module(&close, handle, module.template.users)?;
                if place.module >= module.place.module {
                    return Err(moved());
                }
                fillers.push(open.call(&filler).wait()?.map_err(cannot)?.0);
            }
        }
        fillers.into_iter().try_for_each(|handle| close_module(&close, handle, 1))
    }

    fn finalize(&self, instance: ExecutorAddr, executor: &Executor) -> Result<(), Error> {
        if self.allocations.is_empty() {
            return Ok(());
        }
        let requests: Vec<_> = self.allocations.values().cloned().collect();
        let keys = executor.bind(SHARED_INITIALIZE_BATCH)?.call(&(instance, requests)).wait()?.map_err(cannot)?;
        if keys.len() != self.allocations.len() {
            return Err(cannot("a new executor has not finalized what it was asked to".to_owned()));
        }
        Ok(())
    }
}

/// Has a module go that has been closed by none of its users.
fn close_module(
    close: &farlink_rpc::Callee<(ExecutorAddr,), SpsError>,
    handle: ExecutorAddr,
    users: u64,
) -> Result<(), Error> {
    (0..users.max(1)).try_for_each(|_| close.call(&(handle,)).wait()?.0.map_err(cannot))
}
