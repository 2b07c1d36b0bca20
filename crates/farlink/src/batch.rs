//! Linking a batch: everything that one lookup needs, taken through the phases together.
//!
//! 1. **claim**, under the library's lock: from the names asked for, follow references from object to object until
//!    nothing new is found. Every object reached is marked as being linked, in one hold of the lock, so two batches
//!    never wait for each other.
//! 2. **link**, without any lock: allocate, resolve what the library does not have (one call), fix up, finalize (one
//!    call), run initializers (one call, or none).
//! 3. **settle**, under the lock: publish addresses, or on failure put the objects back as they were declared.

use crate::Error;
use crate::claim::{Claim, Claimed, Target};
use crate::error::UndefinedSymbol;
use crate::library::{LibraryInner, LinkedObject, ObjectState, State};
use crate::session::SessionInner;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_graph::{InitArray, LinkGraph};
use farlink_mem::{FinalizedAlloc, InFlightAlloc};
use farlink_wire::msg::{ActionPair, FiniArray, ObjectExits, RunInitializers};
use farlink_wire::sps::Blob;
use std::collections::{BTreeMap, HashMap};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

/// What to link.
pub(crate) struct Batch<'a> {
    /// Symbols whose addresses are wanted.
    pub(crate) names: &'a [&'a str],
    /// Whether every declared object is linked, or only what `names` need.
    pub(crate) every_object: bool,
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
struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, phase: &mut Duration) {
        let now = Instant::now();
        *phase += now - self.0;
        self.0 = now;
    }
}

/// Links `batch`; gives the addresses of its names, in order.
pub(crate) fn link(library: &LibraryInner, batch: Batch<'_>) -> Result<Vec<ExecutorAddr>, Error> {
    let mut times = PhaseTimes::default();
    let mut stopwatch = Stopwatch::start();
    let mut claim = Claim::default();
    {
        let mut state = library.lock();
        if let Err(error) = claim.collect(&mut state, &batch) {
            put_back(&mut state, claim);
            return Err(error);
        }
    }
    stopwatch.lap(&mut times.prepare);
    match link_claimed(library, &mut claim, &batch, &mut times, &mut stopwatch) {
        Ok((addresses, memory)) => {
            library.settle(|state| {
                publish(state, &library.session, claim, memory);
                add_times(&mut state.times, &times);
            });
            Ok(addresses)
        }
        Err(error) => {
            library.settle(|state| put_back(state, claim));
            Err(error)
        }
    }
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
fn put_back(state: &mut State, claim: Claim) {
    for claimed in claim.objects {
        state.forget_uses(claimed.id);
        state.object(claimed.id).state = ObjectState::Declared { graph: claimed.graph, prepared: true };
    }
}

/// Publishes the addresses of a batch that has been linked.
fn publish(state: &mut State, session: &SessionInner, claim: Claim, memory: Vec<Option<FinalizedAlloc>>) {
    for (claimed, memory) in claim.objects.into_iter().zip(memory) {
        let graph = claimed.graph;
        for symbol in graph.definitions() {
            if let Some(address) = graph.symbol_address(symbol) {
                state.table.publish(graph.symbol_name(symbol), claimed.id, address);
            }
        }
        let graph = session.keeps_graphs.then_some(graph);
        state.object(claimed.id).state = ObjectState::Linked(LinkedObject { memory, graph });
    }
}

type Linked = (Vec<ExecutorAddr>, Vec<Option<FinalizedAlloc>>);

/// Takes the objects of a batch through the phases, up to running their initializers.
fn link_claimed(
    library: &LibraryInner,
    claim: &mut Claim,
    batch: &Batch<'_>,
    times: &mut PhaseTimes,
    stopwatch: &mut Stopwatch,
) -> Result<Linked, Error> {
    let session = &library.session;
    check_collections(claim)?;
    let allocations = allocate(session, claim)?;
    stopwatch.lap(&mut times.allocate);
    let addresses = resolve(library, claim, batch.names)?;
    stopwatch.lap(&mut times.resolve);
    for (claimed, allocation) in claim.objects.iter().zip(&allocations) {
        if let (Some(layout), Some(allocation)) = (&claimed.layout, allocation) {
            farlink_graph::fix_up(&claimed.graph, layout, allocation.segments())?;
        }
    }
    stopwatch.lap(&mut times.fix_up);
    let memory = finalize(session, claim, allocations)?;
    stopwatch.lap(&mut times.finalize);
    if let Err(error) = initialize(session, claim, batch.args) {
        // What went wrong first is what counts; the memory comes back in any case.
        let _ = session.memory.deallocate(memory.into_iter().flatten().collect()).wait();
        return Err(error);
    }
    stopwatch.lap(&mut times.initialize);
    Ok((addresses, memory))
}

/// Checks that sections which some object goes through from `__start_X` to `__stop_X` are all its own.
fn check_collections(claim: &Claim) -> Result<(), Error> {
    let bounded =
        claim.objects.iter().flat_map(|user| user.graph.bounded_sections().into_iter().map(move |of| (of, user)));
    let users: HashMap<&str, &Claimed> = bounded.collect();
    if users.is_empty() {
        return Ok(());
    }
    for claimed in &claim.objects {
        for section in claimed.graph.collected_sections() {
            if let Some(user) = users.get(section).filter(|user| user.id != claimed.id) {
                let name = |of: &Claimed| of.graph.name().to_owned();
                return Err(Error::SplitSection {
                    section: section.to_owned(),
                    user: name(user),
                    other: name(claimed),
                });
            }
        }
    }
    Ok(())
}

/// Gives every object of the batch its memory and its addresses.
fn allocate(session: &SessionInner, claim: &mut Claim) -> Result<Vec<Option<InFlightAlloc>>, Error> {
    let mut allocations = Vec::with_capacity(claim.objects.len());
    for claimed in &mut claim.objects {
        let layout = farlink_graph::lay_out(&claimed.graph)?;
        let segments = layout.segments();
        let allocation = if segments.is_empty() { None } else { Some(session.memory.allocate(segments).wait()?) };
        let ranges: Vec<ExecutorAddrRange> =
            allocation.iter().flat_map(InFlightAlloc::segments).map(|segment| segment.range).collect();
        farlink_graph::assign(&mut claimed.graph, &layout, &ranges);
        claimed.layout = Some(layout);
        allocations.push(allocation);
    }
    Ok(allocations)
}

/// Finds the address of every external symbol of the batch; gives those of its names.
fn resolve(library: &LibraryInner, claim: &mut Claim, names: &[&str]) -> Result<Vec<ExecutorAddr>, Error> {
    let session = &library.session;
    let found = match &session.runtime {
        Some(runtime) => runtime.resolve(&claim.shared, &claim.asked)?,
        None => vec![session.undefined_zero.then_some(ExecutorAddr::NULL); claim.asked.len()],
    };
    check_defined(claim, &found)?;
    let others = addresses_of_others(library, claim)?;
    let address = |claim: &Claim, target: Target, name: &str| match target {
        Target::Known(address) => Some(address),
        Target::Batch(position, symbol) => claim.objects[position].graph.symbol_address(symbol),
        Target::Other(_) => others.winner_address(name),
        Target::Ask(position) => found[position],
    };
    for position in 0..claim.objects.len() {
        for (symbol, target) in std::mem::take(&mut claim.objects[position].targets) {
            let found = address(claim, target, claim.objects[position].graph.symbol_name(symbol));
            // Only a weak reference can be left without a definition; it is null.
            claim.objects[position].graph.set_address(symbol, found.unwrap_or(ExecutorAddr::NULL));
        }
    }
    let roots = claim.roots.iter().zip(names);
    Ok(roots.map(|(&target, name)| address(claim, target, name).unwrap_or(ExecutorAddr::NULL)).collect())
}

/// The library's definitions once the objects that other threads were linking have settled.
struct Others<'a>(Option<MutexGuard<'a, State>>);

impl Others<'_> {
    fn winner_address(&self, name: &str) -> Option<ExecutorAddr> {
        self.0.as_ref()?.table.winner(name)?.address
    }
}

/// Waits for the objects of this batch's references that other threads are linking.
fn addresses_of_others<'a>(library: &'a LibraryInner, claim: &Claim) -> Result<Others<'a>, Error> {
    if claim.others.is_empty() {
        return Ok(Others(None));
    }
    let state = library.wait_settled(&claim.others);
    let failed = claim.others.iter().map(|&id| &state.objects[id.0 as usize]);
    match { failed }.find(|slot| !matches!(slot.state, ObjectState::Linked(_))) {
        Some(slot) => Err(Error::Dependency { object: slot.name.clone() }),
        None => Ok(Others(Some(state))),
    }
}

/// Checks that every name that somebody needs was found; names all that were not, and who needs them.
fn check_defined(claim: &Claim, found: &[Option<ExecutorAddr>]) -> Result<(), Error> {
    let is_missing = |target: Target| match target {
        Target::Ask(position) if found[position].is_none() => Some(position),
        _ => None,
    };
    let mut undefined: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for root in claim.roots.iter().filter_map(|&root| is_missing(root)) {
        undefined.entry(root).or_default();
    }
    for claimed in &claim.objects {
        let strong = claimed.targets.iter().filter(|&&(symbol, _)| !claimed.graph.is_weak_external(symbol));
        for position in strong.filter_map(|&(_, target)| is_missing(target)) {
            let users = undefined.entry(position).or_default();
            // One object may refer to a name through several of its symbols.
            if users.last().map(String::as_str) != Some(claimed.graph.name()) {
                users.push(claimed.graph.name().to_owned());
            }
        }
    }
    if undefined.is_empty() {
        return Ok(());
    }
    let named = undefined.into_iter();
    let named = named.map(|(position, users)| UndefinedSymbol { name: claim.asked[position].clone(), users });
    Err(Error::Undefined(named.collect()))
}

/// Finalizes the memory of the whole batch with one request.
fn finalize(
    session: &SessionInner,
    claim: &Claim,
    allocations: Vec<Option<InFlightAlloc>>,
) -> Result<Vec<Option<FinalizedAlloc>>, Error> {
    let has_memory: Vec<bool> = allocations.iter().map(Option::is_some).collect();
    let mut request = Vec::with_capacity(allocations.len());
    for (claimed, allocation) in claim.objects.iter().zip(allocations) {
        if let Some(allocation) = allocation {
            request.push((allocation, actions(session, &claimed.graph)?));
        }
    }
    let finalized = if request.is_empty() { Vec::new() } else { session.memory.finalize(request).wait()? };
    let mut finalized = finalized.into_iter();
    Ok(has_memory.into_iter().map(|has_memory| if has_memory { finalized.next() } else { None }).collect())
}

/// What runs in the executor when an object's memory is finalized, and when it is deallocated.
fn actions(session: &SessionInner, graph: &LinkGraph) -> Result<Vec<ActionPair>, Error> {
    let Some(runtime) = &session.runtime else { return Ok(Vec::new()) };
    let mut actions = Vec::new();
    if let Some(section) = graph.eh_frame() {
        actions.push(runtime.eh_frame_actions(section)?);
    }
    // Dealloc actions run in reverse: what the object left for its end may still throw.
    if let Some(dso_handle) = graph.dso_handle() {
        actions.extend(runtime.end_actions(&session.memory, dso_handle, &fini_entries(graph))?);
    }
    Ok(actions)
}

/// Runs the initializers of the batch, in the order of their priorities and, among equals, of the objects.
fn initialize(session: &SessionInner, claim: &Claim, args: &[Blob<'static>]) -> Result<(), Error> {
    let Some(runtime) = &session.runtime else { return Ok(()) };
    let mut objects: Vec<&Claimed> = claim.objects.iter().collect();
    objects.sort_by_key(|claimed| claimed.id);
    let mut init: Vec<InitArray> = Vec::new();
    let mut exits = Vec::new();
    for claimed in objects {
        init.extend(claimed.graph.init_arrays());
        let fini = fini_entries(&claimed.graph);
        if let (Some(dso_handle), false) = (claimed.graph.dso_handle(), fini.is_empty()) {
            exits.push(ObjectExits { dso_handle, fini });
        }
    }
    if init.is_empty() && exits.is_empty() {
        return Ok(());
    }
    init.sort_by_key(|array| array.priority);
    let init = init.iter().flat_map(InitArray::in_order).collect();
    runtime.run_initializers(&session.memory, &RunInitializers { init, exits, args: args.to_vec() })
}

/// The parts of an object's arrays of finalizers, which the executor runs last to first.
fn fini_entries(graph: &LinkGraph) -> Vec<FiniArray> {
    let parts = |array: &InitArray| {
        let priority = array.priority;
        array.in_order().into_iter().map(move |array| FiniArray { array, priority }).collect::<Vec<_>>()
    };
    graph.fini_arrays().iter().flat_map(parts).collect()
}
