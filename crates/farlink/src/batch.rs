//! Linking a batch: everything that one lookup needs, taken through the phases together.
//!
//! 1. **claim**, under the library's lock: from the names asked for, follow references from object to object until
//!    nothing new is found. Every object reached is marked as being linked, in one hold of the lock, so two batches
//!    never wait for each other.
//! 2. **link**, without any lock: allocate, resolve what the library does not have (one call), fix up, finalize (one
//!    call), run initializers (one call, or none).
//! 3. **settle**, under the lock: publish addresses, or on failure put the objects back as they were declared.

use crate::Error;
use crate::error::UndefinedSymbol;
use crate::library::{LibraryInner, LinkedObject, ObjectId, ObjectState, State};
use crate::session::SessionInner;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_graph::{InitArray, Layout, LinkGraph, SymbolId};
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

/// Where the address of an external symbol comes from.
#[derive(Clone, Copy)]
enum Target {
    /// It is known.
    Known(ExecutorAddr),
    /// Another object of this batch: its position in the batch and its symbol.
    Batch(usize, SymbolId),
    /// An object that another thread is linking.
    Other(ObjectId),
    /// The executor is asked: position among the names asked for.
    Ask(usize),
}

/// An object of the batch.
struct Claimed {
    id: ObjectId,
    graph: Box<LinkGraph>,
    /// Where each external symbol comes from.
    targets: Vec<(SymbolId, Target)>,
    /// Its definitions by name, for references from other objects.
    defined: HashMap<String, SymbolId>,
    layout: Option<Layout>,
}

/// What a batch consists of.
#[derive(Default)]
struct Claim {
    objects: Vec<Claimed>,
    positions: HashMap<ObjectId, usize>,
    /// Names to ask the executor for.
    asked: Vec<String>,
    asked_positions: HashMap<String, usize>,
    /// Where the names of the batch come from.
    roots: Vec<Target>,
    /// Objects that other threads are linking.
    others: Vec<ObjectId>,
    /// Handles of the shared libraries to search.
    shared: Vec<ExecutorAddr>,
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

impl Claim {
    /// Claims everything that `batch` needs.
    fn collect(&mut self, state: &mut State, batch: &Batch<'_>) -> Result<(), Error> {
        self.shared.clone_from(&state.shared);
        if batch.every_object {
            for index in 0..state.objects.len() {
                self.add_object(state, ObjectId(index as u32))?;
            }
        }
        for name in batch.names {
            let target = self.find(state, name, true)?;
            self.roots.push(target);
        }
        // Objects found on the way are appended and get their turn: a worklist, however long the chain.
        let mut next = 0;
        while next < self.objects.len() {
            self.resolve_object(state, next)?;
            next += 1;
        }
        Ok(())
    }

    /// Finds a source for each external symbol of an object of the batch.
    fn resolve_object(&mut self, state: &mut State, position: usize) -> Result<(), Error> {
        let user = self.objects[position].id;
        let externals: Vec<_> = self.objects[position].graph.externals().collect();
        let mut targets = Vec::with_capacity(externals.len());
        for symbol in externals {
            let graph = &self.objects[position].graph;
            let strong = !graph.is_weak_external(symbol);
            let name = graph.symbol_name(symbol).to_owned();
            let target = self.find(state, &name, strong)?;
            self.record_use(state, user, &name, target);
            targets.push((symbol, target));
        }
        self.objects[position].targets = targets;
        Ok(())
    }

    /// Notes that `user` cannot do without the object that holds the definition of `name`.
    fn record_use(&self, state: &mut State, user: ObjectId, name: &str, target: Target) {
        let used = match target {
            Target::Known(_) => state.table.winner(name).and_then(|definition| definition.object),
            Target::Batch(position, _) => Some(self.objects[position].id),
            Target::Other(object) => Some(object),
            Target::Ask(_) => None,
        };
        if let Some(used) = used.filter(|&used| used != user) {
            state.object(user).uses.insert(used);
            state.object(used).users.insert(user);
        }
    }

    /// Finds where `name` is defined. A strong reference loads the archive member that defines it.
    fn find(&mut self, state: &mut State, name: &str, strong: bool) -> Result<Target, Error> {
        if state.table.winner(name).is_none() && strong {
            load_member(state, name)?;
        }
        let Some(definition) = state.table.winner(name) else { return Ok(Target::Ask(self.ask(name))) };
        if let Some(address) = definition.address {
            return Ok(Target::Known(address));
        }
        let object = definition.object.expect("a definition without an object has an address");
        self.add_object(state, object)?;
        match self.positions.get(&object) {
            Some(&position) => match self.objects[position].defined.get(name) {
                Some(&symbol) => Ok(Target::Batch(position, symbol)),
                // Its group lost to another object's: whoever has that group has the definition.
                None => Ok(Target::Ask(self.ask(name))),
            },
            None => Ok(Target::Other(object)),
        }
    }

    fn ask(&mut self, name: &str) -> usize {
        if let Some(&position) = self.asked_positions.get(name) {
            return position;
        }
        self.asked.push(name.to_owned());
        self.asked_positions.insert(name.to_owned(), self.asked.len() - 1);
        self.asked.len() - 1
    }

    /// Adds an object to the batch if nobody has linked it or is linking it.
    fn add_object(&mut self, state: &mut State, id: ObjectId) -> Result<(), Error> {
        let slot = state.object(id);
        match std::mem::replace(&mut slot.state, ObjectState::Linking) {
            ObjectState::Declared { mut graph, prepared } => {
                let outcome = if prepared { Ok(()) } else { prepare(state, id, &mut graph) };
                let defined =
                    graph.definitions().map(|symbol| (graph.symbol_name(symbol).to_owned(), symbol)).collect();
                self.positions.insert(id, self.objects.len());
                self.objects.push(Claimed { id, graph, targets: Vec::new(), defined, layout: None });
                outcome
            }
            other => {
                if matches!(other, ObjectState::Linking) && !self.positions.contains_key(&id) {
                    self.others.push(id);
                }
                slot.state = other;
                Ok(())
            }
        }
    }
}

/// Declares the archive member that defines `name`, if there is one.
fn load_member(state: &mut State, name: &str) -> Result<(), Error> {
    for index in 0..state.archives.len() {
        let archive = &mut state.archives[index];
        let Some(member) = archive.archive.find(name) else { continue };
        if !archive.loaded.insert(member.position()) {
            continue;
        }
        let start = Instant::now();
        let (display_name, bytes) = archive.archive.member(member)?;
        let graph = farlink_elf::parse_object(&display_name, bytes)?;
        state.declare(graph)?;
        state.times.parse += start.elapsed();
        if state.table.winner(name).is_some() {
            return Ok(());
        }
    }
    Ok(())
}

/// Takes out of `graph` what does not count, drops what nothing needs, and builds its tables.
fn prepare(state: &State, id: ObjectId, graph: &mut LinkGraph) -> Result<(), Error> {
    let lost: Vec<_> =
        graph.comdats().filter(|&comdat| !state.table.owns_comdat(graph.comdat_signature(comdat), id)).collect();
    for comdat in lost {
        graph.discard_comdat(comdat);
    }
    let counts = |graph: &LinkGraph, symbol| {
        let winner = state.table.winner(graph.symbol_name(symbol));
        winner.is_some_and(|winner| winner.object == Some(id))
    };
    let lost: Vec<_> = graph.definitions().filter(|&symbol| !counts(graph, symbol)).collect();
    for symbol in lost {
        graph.externalize(symbol);
    }
    farlink_graph::prune(graph);
    Ok(farlink_graph::build_tables(graph)?)
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
        actions.push(runtime.exits_action(dso_handle)?);
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
        let fini = claimed.graph.fini_arrays();
        if let (Some(dso_handle), false) = (claimed.graph.dso_handle(), fini.is_empty()) {
            let fini = fini.iter().flat_map(fini_entries).collect();
            exits.push(ObjectExits { dso_handle, fini });
        }
    }
    if init.is_empty() && exits.is_empty() {
        return Ok(());
    }
    init.sort_by_key(|array| array.priority);
    let init = init.iter().flat_map(InitArray::in_order).collect();
    runtime.run_initializers(&RunInitializers { init, exits, args: args.to_vec() })
}

/// The parts of an array of finalizers, which the executor runs last to first.
fn fini_entries(array: &InitArray) -> impl Iterator<Item = FiniArray> {
    let priority = array.priority;
    array.in_order().into_iter().map(move |array| FiniArray { array, priority })
}
