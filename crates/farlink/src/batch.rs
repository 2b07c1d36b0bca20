//! Linking a batch: everything that one lookup needs, taken through the phases together.
//!
//! 1. **claim**, under the library's lock: from the names asked for, follow references from object to object until
//!    nothing new is found. Every object reached is marked as being linked, in one hold of the lock, so two batches
//!    never wait for each other.
//! 2. **link**, without any lock: allocate, resolve what the library does not have (one call), fix up, finalize (one
//!    call), run initializers (one call, or none).
//! 3. **settle**, under the lock: publish addresses, or on failure put the objects back as they were declared.

use crate::Error;
use crate::claim::{Claim, Claimed};
use crate::known_code::KnownCode;
use crate::lazy::{Materializer, materialize};
use crate::library::LibraryInner;
use crate::place::{self, Places};
use crate::resolve;
use crate::runtime::Runtime;
use crate::session::SessionInner;
use crate::state::{LinkedObject, ObjectState, State};
use crate::table::{Definition, Value};
use crate::thread_local::{self, OpenModule};
use crate::trace::Trace;
use crate::{debugger, perf};
use farlink_addr::{ExecutorAddr, MemProt};
use farlink_graph::{InitArray, LinkGraph, SymbolId};
use farlink_mem::{FinalizedAlloc, InFlightAlloc};
use farlink_wire::msg::{ActionPair, FiniArray, ObjectExits, RunInitializers};
use farlink_wire::sps::Blob;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to link.
pub(crate) struct Batch<'a> {
    /// Symbols whose addresses are wanted.
    pub(crate) names: &'a [&'a str],
    /// Whether every declared object is linked, or only what `names` need.
    pub(crate) every_object: bool,
    /// Whether definitions that nothing refers to are left out.
    pub(crate) drops_unused: bool,
    /// The program's arguments, for initializers.
    pub(crate) args: &'a [Blob<'static>],
}

/// How long the phases of a library's links took, in total.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PhaseTimes {
    /// Parsing objects and archives.
    pub parse: Duration,
    /// Finding what is needed, pruning it, and building its tables.
    pub prepare: Duration,
    /// Laying out and allocating memory.
    pub allocate: Duration,
    /// Resolving symbols that the library does not have.
    pub resolve: Duration,
    /// Copying content and applying fixups.
    pub fix_up: Duration,
    /// Finalizing memory: protections and actions.
    pub finalize: Duration,
    /// Running initializers.
    pub initialize: Duration,
}

impl PhaseTimes {
    /// Returns the phases by name, in the order in which they happen.
    #[must_use]
    pub fn phases(&self) -> [(&'static str, Duration); 7] {
        [
            ("parse", self.parse),
            ("prepare", self.prepare),
            ("allocate", self.allocate),
            ("resolve", self.resolve),
            ("fix up", self.fix_up),
            ("finalize", self.finalize),
            ("initialize", self.initialize),
        ]
    }
}

/// Measures one phase after another.
struct Stopwatch<'a> {
    last: Instant,
    trace: &'a Trace,
    traced: u64,
}

impl<'a> Stopwatch<'a> {
    fn start(trace: &'a Trace) -> Self {
        Self { last: Instant::now(), trace, traced: trace.now() }
    }

    fn lap(&mut self, name: &'static str, phase: &mut Duration) {
        let now = Instant::now();
        *phase += now - self.last;
        self.last = now;
        self.traced = self.trace.phase(name, self.traced);
    }
}

/// Links `batch`; gives the addresses of its names, in order.
pub(crate) fn link(library: &Arc<LibraryInner>, batch: Batch<'_>) -> Result<Vec<ExecutorAddr>, Error> {
    let mut times = PhaseTimes::default();
    let mut stopwatch = Stopwatch::start(&library.session.trace);
    let mut claim = claim(library, &batch)?;
    stopwatch.lap("prepare", &mut times.prepare);
    match link_claimed(library, &mut claim, &batch, &mut times, &mut stopwatch) {
        Ok((addresses, memory)) => {
            library.settle(|state| {
                publish(state, &library.session, claim, memory);
                add_times(&mut state.times, &times);
            });
            Ok(addresses)
        }
        Err(error) => {
            library.settle(|state| put_back(state, &mut claim));
            Err(error)
        }
    }
}

/// Claims everything that a batch needs.
fn claim(library: &Arc<LibraryInner>, batch: &Batch<'_>) -> Result<Claim, Error> {
    let mut asked = HashSet::new();
    loop {
        let opened = library.session.runtime.as_ref().map(Runtime::opened);
        let is_unknown = |state: &mut State, name: &str| {
            let is_unknown = |opened| state.resolved.get(name, true, opened).is_none();
            opened.is_some_and(is_unknown) && !asked.contains(name)
        };
        let (claim, Unready { names, lazy }) = collect(library, batch, is_unknown)?;
        if !lazy.is_empty() {
            materialize(library, &lazy)?;
        }
        if let (Some(runtime), false) = (&library.session.runtime, names.is_empty()) {
            share(library, runtime, &claim.shared, &names)?;
        }
        if names.is_empty() && lazy.is_empty() {
            return Ok(claim);
        }
        asked.extend(names);
    }
}

/// What has to be known or defined before a batch can be claimed.
struct Unready {
    names: Vec<String>,
    lazy: Vec<Arc<Materializer>>,
}

/// Claims everything that a batch needs, and gives the names for which `is_unknown` holds among those of which a program
/// has one definition, and the closures that are to define something. If there are any, everything is put back.
fn collect(
    library: &LibraryInner,
    batch: &Batch<'_>,
    is_unknown: impl Fn(&mut State, &str) -> bool,
) -> Result<(Claim, Unready), Error> {
    let mut claim = Claim::new(&library.session);
    let mut state = library.lock();
    let collected = claim.collect(&mut state, batch);
    let mut names = std::mem::take(&mut claim.one_per_program);
    names.retain(|name| is_unknown(&mut state, name));
    let lazy = state.lazy.take_wanted();
    if collected.is_err() || !names.is_empty() || !lazy.is_empty() {
        put_back(&mut state, &mut claim);
    }
    collected.map(|()| (claim, Unready { names, lazy }))
}

/// Has those of `names` that shared libraries define mean their definitions: the libraries use them already.
fn share(library: &LibraryInner, runtime: &Runtime, shared: &[ExecutorAddr], names: &[String]) -> Result<(), Error> {
    let opened = runtime.opened();
    let found = runtime.resolve(shared, names)?;
    let mut state = library.lock();
    for (name, addr) in names.iter().zip(found) {
        state.resolved.insert(name, addr, opened);
        // One that has been linked meanwhile stays.
        if let (Some(addr), None) = (addr, state.table.winner(name).and_then(Definition::value)) {
            state.table.add(name, Definition::absolute(addr));
        }
    }
    Ok(())
}

fn add_times(total: &mut PhaseTimes, times: &PhaseTimes) {
    total.prepare += times.prepare;
    total.allocate += times.allocate;
    total.resolve += times.resolve;
    total.fix_up += times.fix_up;
    total.finalize += times.finalize;
    total.initialize += times.initialize;
}

/// Puts the objects of a batch back as they were declared.
fn put_back(state: &mut State, claim: &mut Claim) {
    for claimed in std::mem::take(&mut claim.objects) {
        state.forget_uses(claimed.id);
        let graph = claimed.graph;
        // What has been decided for this batch may not hold for the next. An object that was read once can be read again.
        let parse = || farlink_elf::parse_object(graph.name(), graph.bytes().clone()).ok();
        let again = graph.restored().or_else(parse).map(Box::new);
        state.object(claimed.id).state = ObjectState::Declared { graph: again.unwrap_or(graph) };
    }
}

/// The memory of a linked batch.
struct BatchMemory {
    objects: Vec<Option<FinalizedAlloc>>,
    /// What several objects have together.
    sets: Vec<FinalizedAlloc>,
    /// What debuggers are shown of each object; empty if they are shown nothing.
    shown: Vec<Option<Box<FinalizedAlloc>>>,
}

impl BatchMemory {
    fn all(self) -> Vec<FinalizedAlloc> {
        let shown = self.shown.into_iter().flatten().map(|shown| *shown);
        self.objects.into_iter().flatten().chain(self.sets).chain(shown).collect()
    }
}

/// Publishes the addresses of a batch that has been linked.
fn publish(state: &mut State, session: &SessionInner, claim: Claim, memory: BatchMemory) {
    let sets: Box<[Arc<FinalizedAlloc>]> = memory.sets.into_iter().map(Arc::new).collect();
    let can_stop = session.has_executor();
    let mut all_shown = memory.shown.into_iter();
    for (claimed, memory) in claim.objects.into_iter().zip(memory.objects) {
        let graph = claimed.graph;
        let mut defines = std::mem::take(&mut state.object(claimed.id).defines);
        defines.retain(|&mut (name, symbol)| match value(&graph, symbol) {
            Some(value) => {
                state.table.publish(name, claimed.id, symbol, value);
                true
            }
            // Another object's definition counts, which is decided again when that goes.
            None if !graph.symbol(symbol).is_defined() => true,
            // Left out, since nothing referred to it.
            None => {
                state.table.remove(name, claimed.id, symbol);
                false
            }
        });
        let slot = state.object(claimed.id);
        slot.defines = defines;
        let is_mapped = memory.as_ref().is_some_and(FinalizedAlloc::is_mapped);
        let code = if can_stop { KnownCode::of(&graph, is_mapped) } else { KnownCode::Nothing };
        slot.state = ObjectState::Linked(LinkedObject { memory, code });
        let shown = all_shown.next().flatten();
        let keeps_graph = session.keeps_graphs || session.may_relink();
        if keeps_graph || shown.is_some() || !sets.is_empty() {
            let more = slot.more();
            (more.sets, more.shown) = (sets.clone(), shown);
            more.graph = keeps_graph.then_some(graph);
        }
    }
}

/// Returns the value of a symbol that an object defines and that has been linked.
fn value(graph: &LinkGraph, symbol: SymbolId) -> Option<Value> {
    if !graph.symbol(symbol).is_defined() {
        None
    } else if graph.is_thread_local(symbol) {
        graph.tls_address(symbol).map(Value::ThreadLocal)
    } else {
        graph.symbol_address(symbol).map(Value::Address)
    }
}

type Linked = (Vec<ExecutorAddr>, BatchMemory);

/// Takes the objects of a batch through the phases, up to running their initializers.
fn link_claimed(
    library: &LibraryInner,
    claim: &mut Claim,
    batch: &Batch<'_>,
    times: &mut PhaseTimes,
    stopwatch: &mut Stopwatch<'_>,
) -> Result<Linked, Error> {
    let session = &library.session;
    let mut places = place::place(session, claim)?;
    stopwatch.lap("allocate", &mut times.allocate);
    let mut addresses = resolve::resolve(library, claim, &places, batch.names)?;
    // Those that have moved may be out of reach of others then. Not so if all have all entries.
    for every_object in [false, true] {
        if !place::add_missing_entries(library, claim, &mut places, every_object)? {
            break;
        }
        addresses = resolve::resolve(library, claim, &places, batch.names)?;
    }
    let module = thread_local::place(session, claim)?;
    let linked = resolve::resolve_thread_local(library, claim).and_then(|()| {
        stopwatch.lap("resolve", &mut times.resolve);
        places.fix_up(session, claim)?;
        stopwatch.lap("fix up", &mut times.fix_up);
        finalize(session, claim, places, module.as_ref())
    });
    let mut memory = match linked {
        Ok(memory) => memory,
        Err(error) => {
            if let (Some(module), Some(runtime)) = (module, &session.runtime) {
                runtime.close_tls(&module);
            }
            return Err(error);
        }
    };
    stopwatch.lap("finalize", &mut times.finalize);
    let shown = debugger::show(session, claim).map(|shown| memory.shown = shown);
    let shown = shown.and_then(|()| perf::tell(session, claim));
    if let Err(error) = shown.and_then(|()| initialize(session, claim, batch.args)) {
        // What went wrong first is what counts; the memory comes back in any case.
        let _ = session.memory.deallocate(memory.all()).wait();
        return Err(error);
    }
    stopwatch.lap("initialize", &mut times.initialize);
    Ok((addresses, memory))
}

/// Finalizes the memory of the whole batch with one request.
fn finalize(
    session: &SessionInner,
    claim: &Claim,
    places: Places,
    module: Option<&OpenModule>,
) -> Result<BatchMemory, Error> {
    let has_memory: Vec<bool> = places.objects.iter().map(|(_, allocation)| allocation.is_some()).collect();
    let mut request = Vec::with_capacity(has_memory.len());
    // By position in the request: the index of unwind information that the executor finds by itself.
    let mut published = Vec::new();
    for (position, (_, allocation)) in places.objects.into_iter().enumerate() {
        let Some(allocation) = allocation else { continue };
        let graph = &claim.objects[position].graph;
        let module = module.filter(|module| module.users[position]);
        let index = published_index(session, graph, !claim.sets.is_empty(), &allocation)?;
        published.extend(index.map(|index| (request.len(), index)));
        let mut all = session.renewals(&allocation)?;
        all.extend(actions(session, graph, module, index.is_none())?);
        request.push((allocation, all));
    }
    for allocation in places.sets.into_iter().filter_map(|(_, allocation)| allocation) {
        let renewals = session.renewals(&allocation)?;
        request.push((allocation, renewals));
    }
    let mut finalized = if request.is_empty() { Vec::new() } else { session.memory.finalize(request).wait()? };
    for (position, index) in published {
        if let Err(error) = session.memory.publish(&mut finalized[position], index) {
            let _ = session.memory.deallocate(finalized).wait();
            return Err(error.into());
        }
    }
    let mut finalized = finalized.into_iter();
    let objects = has_memory.into_iter().map(|has_memory| if has_memory { finalized.next() } else { None }).collect();
    Ok(BatchMemory { objects, sets: finalized.collect(), shown: Vec::new() })
}

/// Returns the index of an object's unwind information, if the executor can find it without being told.
fn published_index(
    session: &SessionInner,
    graph: &LinkGraph,
    has_sets: bool,
    allocation: &InFlightAlloc,
) -> Result<Option<ExecutorAddr>, Error> {
    let Some(index) = graph.unwind_index() else { return Ok(None) };
    let code = allocation.segments().iter().find(|segment| segment.group.prot.contains(MemProt::EXEC));
    // Functions that were put beside those of other objects, by the name of their section, are registered one by one.
    let Some(code) = code.filter(|code| !has_sets || graph.is_unwound_in(code.range)) else { return Ok(None) };
    let can = !code.range.is_empty() && session.memory.prepare_to_publish(allocation).wait()?;
    Ok(can.then_some(index.start()))
}

impl SessionInner {
    /// Returns the actions by which executors that copy the data that they write give up their copies when it goes: the last
    /// that run then.
    fn renewals(&self, allocation: &InFlightAlloc) -> Result<Vec<ActionPair>, Error> {
        let (Some(_), Some(runtime)) = (self.pool(), &self.runtime) else { return Ok(Vec::new()) };
        let written = allocation.segments().iter().filter(|segment| segment.group.prot.contains(MemProt::WRITE));
        written.map(|segment| runtime.renew_action(segment.range)).collect()
    }
}

/// What runs in the executor when an object's memory is finalized, and when it is deallocated.
fn actions(
    session: &SessionInner,
    graph: &LinkGraph,
    module: Option<&OpenModule>,
    registers_unwinding: bool,
) -> Result<Vec<ActionPair>, Error> {
    let Some(runtime) = &session.runtime else { return Ok(Vec::new()) };
    let mut actions = Vec::new();
    // Dealloc actions run in reverse: what the object left for its end may still throw, and use its variables.
    if let Some(module) = module {
        actions.push(runtime.close_tls_action(module.handle)?);
    }
    if registers_unwinding {
        actions.extend(runtime.unwind_actions(graph.unwind_index(), graph.eh_frame())?);
    }
    if let Some(dso_handle) = graph.dso_handle() {
        actions.extend(runtime.end_actions(&session.memory, dso_handle, &fini_entries(graph))?);
    }
    Ok(actions)
}

/// Runs the initializers of the batch, in the order of their priorities and, among equals, of the objects.
fn initialize(session: &SessionInner, claim: &Claim, args: &[Blob<'static>]) -> Result<(), Error> {
    let Ok(runtime) = session.runtime() else { return Ok(()) };
    if claim.objects.iter().any(|claimed| claimed.graph.wants_executable_stack()) {
        runtime.allow_executable_stacks()?;
    }
    let mut objects: Vec<&Claimed> = claim.objects.iter().collect();
    objects.sort_by_key(|claimed| claimed.serial);
    let ifuncs = objects.iter().flat_map(|claimed| claimed.graph.ifuncs());
    let ifuncs: Vec<_> = ifuncs.map(|ifunc| (ifunc.resolver, ifunc.slot)).collect();
    let mut init: Vec<InitArray> = Vec::new();
    let mut exits = Vec::new();
    for claimed in objects {
        init.extend(claimed.graph.init_arrays());
        let fini = fini_entries(&claimed.graph);
        if let (Some(dso_handle), false) = (claimed.graph.dso_handle(), fini.is_empty()) {
            exits.push(ObjectExits { dso_handle, fini });
        }
    }
    if init.is_empty() && exits.is_empty() && ifuncs.is_empty() {
        return Ok(());
    }
    init.sort_by_key(|array| array.priority);
    let init = init.iter().flat_map(InitArray::in_order).collect();
    runtime.run_initializers(&session.memory, &RunInitializers { init, exits, ifuncs, args: args.to_vec() })
}

/// The parts of an object's arrays of finalizers, which the executor runs last to first.
fn fini_entries(graph: &LinkGraph) -> Vec<FiniArray> {
    let parts = |array: &InitArray| {
        let priority = array.priority;
        array.in_order().into_iter().map(move |array| FiniArray { array, priority }).collect::<Vec<_>>()
    };
    graph.fini_arrays().iter().flat_map(parts).collect()
}
