//! What every executor of a pool has been told, as far as it still holds: another that comes later is told the same.
//!
//! It is kept by what was asked of executors, not by libraries and objects. What has been taken back is not in it: so it
//! grows with what is linked, and not with time.

mod replay;

use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
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

    /// Takes note that executors have not been told what this call was to tell them.
    pub(crate) fn give_up(&self, told: Told, args: &[u8]) {
        let asked = from_bytes::<(ExecutorAddr, u64, u64, Vec<Stripe>, ExecutorAddr)>(args);
        if let (Told::Map, Ok((_, tag, ..))) = (told, asked) {
            self.lock().descriptors.remove(&tag);
        }
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
