//! Claiming: finding everything that a batch needs, under the library's lock.
//!
//! Every object reached is marked as being linked before the lock is released, so what another batch is linking was
//! claimed as a whole before, and two batches never wait for each other.

use crate::Error;
use crate::batch::Batch;
use crate::library::ObjectId;
use crate::session::SessionInner;
use crate::state::{ObjectState, State};
use crate::table::{Definition, Value};
use farlink_addr::ExecutorAddr;
use farlink_graph::{Bound, Bounded, FunctionStub, LinkGraph, Linkage, SymbolId, parse_bound};
use foldhash::{HashMap, HashSet};
use rustc_hash::FxHashMap;
use std::time::Instant;

/// Where the value of an external symbol comes from.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// It is known.
    Known(Value),
    /// Another object of this batch: its position in the batch and its symbol.
    Batch(usize, SymbolId),
    /// An object that another thread is linking.
    Other(ObjectId),
    /// It is the bound of something that is placed with the batch: position among the bounds.
    Bound(usize),
    /// The executor is asked: position among the names asked for.
    Ask(usize),
}

/// What a bound is of. Sets of sections are numbered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    Set(usize),
    Program,
    Code,
    Data,
    Nothing,
}

/// A stub that may become the address of what the executor is asked for.
#[derive(Clone, Copy)]
pub(crate) struct AskedStub {
    /// Position among the names asked for.
    pub(crate) asked: usize,
    /// Position in the batch of the object that has the stub.
    pub(crate) position: usize,
    pub(crate) stub: FunctionStub,
}

/// An object of the batch.
pub(crate) struct Claimed {
    pub(crate) id: ObjectId,
    pub(crate) graph: Box<LinkGraph>,
    /// Where each external symbol comes from.
    pub(crate) targets: Vec<(SymbolId, Target)>,
    /// The number of objects that were declared before it.
    pub(crate) serial: u64,
    /// How many of the sets of sections it has been searched for.
    sets_marked: usize,
}

/// What a batch consists of.
#[derive(Default)]
pub(crate) struct Claim {
    pub(crate) objects: Vec<Claimed>,
    positions: FxHashMap<ObjectId, usize>,
    /// Positions of objects that may have external symbols which have not been looked at.
    work: Vec<usize>,
    /// Whether definitions that nothing refers to are left out.
    drops_unused: bool,
    /// Names to ask the executor for, and whether all who refer to one can do without.
    pub(crate) asked: Vec<(String, bool)>,
    asked_positions: HashMap<String, usize>,
    /// Bounds that somebody refers to.
    pub(crate) bounds: Vec<(Of, Bound)>,
    /// The sets of sections that those are of.
    pub(crate) sets: Vec<String>,
    /// Where the names of the batch come from.
    pub(crate) roots: Vec<Target>,
    /// Objects that other threads are linking.
    pub(crate) others: Vec<ObjectId>,
    /// Handles of the shared libraries to search.
    pub(crate) shared: Vec<ExecutorAddr>,
    /// Whether there may be code with 32-bit absolute addresses.
    low_memory: bool,
    /// Whether tables have entries also for what is in reach: it may not stay so, or somebody wants to see them.
    wants_entries: bool,
    /// Stubs for names that such code wants the addresses of.
    pub(crate) function_stubs: Vec<AskedStub>,
    /// If there are any: the names that the batch defines and of which a program has one definition.
    pub(crate) one_per_program: Vec<String>,
}

impl Claim {
    pub(crate) fn new(session: &SessionInner) -> Self {
        let wants_entries = session.runtime.is_none() || session.may_relink();
        Self { low_memory: session.low_memory, wants_entries, ..Self::default() }
    }

    /// Claims everything that `batch` needs.
    pub(crate) fn collect(&mut self, state: &mut State, batch: &Batch<'_>) -> Result<(), Error> {
        self.shared.clone_from(&state.shared);
        self.drops_unused = batch.drops_unused;
        if batch.every_object {
            for id in state.in_order() {
                self.add_object(state, id)?;
            }
        }
        for name in batch.names {
            let target = self.find_root(state, name)?;
            self.reach(target);
            self.roots.push(target);
        }
        // Objects found on the way are appended and get their turn: a worklist, however long the chain.
        loop {
            while let Some(position) = self.work.pop() {
                self.resolve_object(state, position)?;
            }
            self.mark_sets();
            if self.work.is_empty() {
                break;
            }
        }
        self.find_late(state)?;
        self.record_uses(state);
        self.tell_sizes();
        if self.low_memory {
            self.add_function_stubs();
        }
        let (wants_entries, far) = (self.wants_entries, &state.far);
        let is_far = |name: &str| wants_entries || far.has(name);
        self.objects.iter_mut().try_for_each(|claimed| Ok(farlink_graph::build_tables(&mut claimed.graph, is_far)?))
    }

    /// Finds a source for each new external symbol of an object of the batch.
    fn resolve_object(&mut self, state: &mut State, position: usize) -> Result<(), Error> {
        for symbol in self.objects[position].graph.take_new_externals() {
            let graph = &mut self.objects[position].graph;
            if state.table.winner(graph.symbol_name(symbol)).is_none() && farlink_graph::provide(graph, symbol) {
                self.work.push(position);
                continue;
            }
            let target = self.find_for(state, position, symbol)?;
            self.reach(target);
            self.objects[position].targets.push((symbol, target));
        }
        Ok(())
    }

    /// Finds where an external symbol of an object of the batch is defined.
    fn find_for(&mut self, state: &mut State, position: usize, symbol: SymbolId) -> Result<Target, Error> {
        let graph = &self.objects[position].graph;
        let (name, strong) = (graph.symbol_name(symbol), !graph.is_weak_external(symbol));
        match defined(state, name, strong)? {
            Some(definition) => self.find_defined(state, definition, strong),
            None => {
                let name = name.to_owned();
                Ok(self.find_elsewhere(&name, strong))
            }
        }
    }

    /// Makes sure that what a reference leads to is linked.
    fn reach(&mut self, target: Target) {
        if let (Target::Batch(position, symbol), true) = (target, self.drops_unused) {
            farlink_graph::mark_symbol(&mut self.objects[position].graph, symbol);
            self.work.push(position);
        }
    }

    /// Marks the sections of all sets whose bounds somebody refers to.
    fn mark_sets(&mut self) {
        for (position, claimed) in self.objects.iter_mut().enumerate() {
            for set in &self.sets[claimed.sets_marked..] {
                farlink_graph::mark_sections(&mut claimed.graph, set);
                self.work.push(position);
            }
            claimed.sets_marked = self.sets.len();
        }
    }

    /// Finds again what a weak reference did not find, because it loads no member of an archive, and another did.
    fn find_late(&mut self, state: &mut State) -> Result<(), Error> {
        // Nothing is loaded but from archives.
        if state.archives.is_empty() {
            return Ok(());
        }
        for position in 0..self.objects.len() {
            for index in 0..self.objects[position].targets.len() {
                let (symbol, target) = self.objects[position].targets[index];
                let name = self.objects[position].graph.symbol_name(symbol);
                if matches!(target, Target::Ask(_)) && state.table.winner(name).is_some() {
                    self.objects[position].targets[index].1 = self.find_for(state, position, symbol)?;
                }
            }
        }
        Ok(())
    }

    /// Tells each graph the sizes of what other objects of the batch define: there are relocations that want them.
    fn tell_sizes(&mut self) {
        for position in 0..self.objects.len() {
            for index in 0..self.objects[position].targets.len() {
                if let (symbol, Target::Batch(other, definition)) = self.objects[position].targets[index] {
                    let size = self.objects[other].graph.symbol(definition).size;
                    self.objects[position].graph.set_size(symbol, size);
                }
            }
        }
    }

    /// Adds a stub for every name to ask for that may be a function whose address does not fit in 32 bits.
    fn add_function_stubs(&mut self) {
        let mut known = HashSet::default();
        for (position, claimed) in self.objects.iter_mut().enumerate() {
            let wanted = farlink_graph::absolute_externals(&claimed.graph);
            for index in 0..claimed.targets.len() {
                let (symbol, Target::Ask(asked)) = claimed.targets[index] else { continue };
                if wanted.binary_search(&symbol).is_ok() && known.insert(asked) {
                    let stub = farlink_graph::add_function_stub(&mut claimed.graph, symbol);
                    claimed.targets.push((stub.function, Target::Ask(asked)));
                    self.function_stubs.push(AskedStub { asked, position, stub });
                }
            }
        }
    }

    /// Notes which objects cannot do without which others.
    fn record_uses(&self, state: &mut State) {
        for claimed in &self.objects {
            let mut uses = Vec::new();
            for &(symbol, target) in &claimed.targets {
                uses.extend(match target {
                    Target::Known(_) => {
                        let definition = state.table.winner(claimed.graph.symbol_name(symbol));
                        definition.and_then(|definition| definition.object)
                    }
                    Target::Batch(position, _) => Some(self.objects[position].id),
                    Target::Other(object) => Some(object),
                    Target::Bound(_) | Target::Ask(_) => None,
                });
            }
            uses.retain(|&used| used != claimed.id);
            if !uses.is_empty() {
                state.set_uses(claimed.id, uses);
            }
        }
    }

    /// Finds where a name that the batch is to give is defined.
    fn find_root(&mut self, state: &mut State, name: &str) -> Result<Target, Error> {
        match defined(state, name, true)? {
            Some(definition) => self.find_defined(state, definition, true),
            None => Ok(self.find_elsewhere(name, true)),
        }
    }

    /// Makes sure that the object of a definition is linked, if it has one.
    fn find_defined(&mut self, state: &mut State, definition: Definition, strong: bool) -> Result<Target, Error> {
        if let Some(value) = definition.value() {
            return Ok(Target::Known(value));
        }
        let object = definition.object.expect("a definition without an object has an address");
        self.add_object(state, object)?;
        let Some(&position) = self.positions.get(&object) else { return Ok(Target::Other(object)) };
        let graph = &self.objects[position].graph;
        if graph.symbol(definition.symbol).is_defined() {
            return Ok(Target::Batch(position, definition.symbol));
        }
        // Its group lost to another object's: whoever has that group has the definition.
        let name = graph.symbol_name(definition.symbol).to_owned();
        Ok(Target::Ask(self.ask(&name, strong)))
    }

    /// Returns where a name that no object defines comes from.
    fn find_elsewhere(&mut self, name: &str, strong: bool) -> Target {
        let Some((bounded, bound)) = parse_bound(name) else { return Target::Ask(self.ask(name, strong)) };
        let of = match bounded {
            Bounded::Sections(section) => {
                let known = self.sets.iter().position(|set| set == section);
                Of::Set(known.unwrap_or_else(|| {
                    self.sets.push(section.to_owned());
                    self.sets.len() - 1
                }))
            }
            Bounded::Program => Of::Program,
            Bounded::Code => Of::Code,
            Bounded::Data => Of::Data,
            Bounded::Nothing => Of::Nothing,
        };
        let known = self.bounds.iter().position(|&other| other == (of, bound));
        Target::Bound(known.unwrap_or_else(|| {
            self.bounds.push((of, bound));
            self.bounds.len() - 1
        }))
    }

    fn ask(&mut self, name: &str, strong: bool) -> usize {
        if let Some(&position) = self.asked_positions.get(name) {
            self.asked[position].1 &= !strong;
            return position;
        }
        self.asked.push((name.to_owned(), !strong));
        self.asked_positions.insert(name.to_owned(), self.asked.len() - 1);
        self.asked.len() - 1
    }

    /// Adds an object to the batch if nobody has linked it or is linking it.
    fn add_object(&mut self, state: &mut State, id: ObjectId) -> Result<(), Error> {
        if let ObjectState::Declared { graph } = &state.object(id).state {
            let commons: Vec<_> = common_names(graph);
            for name in commons {
                load_member(state, &name, true)?;
            }
        }
        let slot = state.object(id);
        match std::mem::replace(&mut slot.state, ObjectState::Linking) {
            ObjectState::Declared { mut graph } => {
                let serial = slot.serial;
                prepare(state, id, &mut graph, !self.drops_unused);
                if !self.shared.is_empty() {
                    let shareable = graph.definitions().filter(|&symbol| graph.is_one_per_program(symbol));
                    self.one_per_program.extend(shareable.map(|symbol| graph.symbol_name(symbol).to_owned()));
                }
                self.positions.insert(id, self.objects.len());
                self.work.push(self.objects.len());
                self.objects.push(Claimed { id, serial, graph, targets: Vec::new(), sets_marked: 0 });
            }
            other => {
                if matches!(other, ObjectState::Linking) && !self.positions.contains_key(&id) {
                    self.others.push(id);
                }
                slot.state = other;
            }
        }
        Ok(())
    }
}

/// Returns the definition of `name` that counts. For a strong reference, one that a closure is to make is taken note of, or
/// the archive member that has it is loaded.
fn defined(state: &mut State, name: &str, strong: bool) -> Result<Option<Definition>, Error> {
    if strong && state.lazy.is_there() && state.table.winner(name).is_none() && state.lazy.want(name) {
        return Ok(None);
    }
    if strong && !state.archives.is_empty() && state.table.winner(name).is_none() {
        load_member(state, name, false)?;
    }
    Ok(state.table.winner(name).cloned())
}

fn common_names(graph: &LinkGraph) -> Vec<String> {
    let is_common = |&symbol: &SymbolId| graph.symbol(symbol).linkage == Linkage::Common;
    graph.definitions().filter(is_common).map(|symbol| graph.symbol_name(symbol).to_owned()).collect()
}

/// Declares the archive member that defines `name`, if there is one. With `replaces_common`, only one that does so with
/// data of its own: an initialized variable counts more than a common one, and natively too its member is loaded for it.
fn load_member(state: &mut State, name: &str, replaces_common: bool) -> Result<(), Error> {
    for index in 0..state.archives.len() {
        let archive = &mut state.archives[index];
        let Some(member) = archive.archive.find(name) else { continue };
        if archive.loaded.contains(&member.position()) {
            continue;
        }
        let start = Instant::now();
        let (display_name, bytes) = archive.archive.member(member)?;
        let graph = farlink_elf::parse_object(&display_name, bytes)?;
        if replaces_common {
            let symbol = graph.definitions().find(|&symbol| graph.symbol_name(symbol) == name);
            let symbol = symbol.map(|symbol| graph.symbol(symbol));
            if symbol.is_none_or(|symbol| !symbol.is_data() || symbol.linkage == Linkage::Common) {
                continue;
            }
        }
        archive.loaded.insert(member.position());
        state.declare(graph)?;
        state.times.parse += start.elapsed();
        if state.table.winner(name).is_some() {
            return Ok(());
        }
    }
    Ok(())
}

/// Takes out of `graph` what does not count, and marks what is needed in any case.
fn prepare(state: &State, id: ObjectId, graph: &mut LinkGraph, keeps_definitions: bool) {
    let slot = &state.objects[id.0 as usize];
    let comdats: Vec<_> = graph.comdats().zip(slot.comdats()).collect();
    for (comdat, &signature) in comdats {
        if !state.table.owns_comdat(signature, id) {
            graph.discard_comdat(comdat);
        }
    }
    for &(name, symbol) in &slot.defines {
        let counts = state.table.winner_of(name).is_some_and(|winner| winner.object == Some(id));
        if !counts && graph.symbol(symbol).is_defined() {
            graph.externalize(symbol);
        }
    }
    farlink_graph::prune(graph, keeps_definitions);
}
