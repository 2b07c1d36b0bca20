//! Claiming: finding everything that a batch needs, under the library's lock.
//!
//! Every object reached is marked as being linked before the lock is released, so what another batch is linking was
//! claimed as a whole before, and two batches never wait for each other.

use crate::Error;
use crate::batch::Batch;
use crate::library::{ObjectId, ObjectState, State};
use farlink_addr::ExecutorAddr;
use farlink_graph::{Layout, LinkGraph, SymbolId};
use std::collections::HashMap;
use std::time::Instant;

/// Where the address of an external symbol comes from.
#[derive(Clone, Copy)]
pub(crate) enum Target {
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
pub(crate) struct Claimed {
    pub(crate) id: ObjectId,
    pub(crate) graph: Box<LinkGraph>,
    /// Where each external symbol comes from.
    pub(crate) targets: Vec<(SymbolId, Target)>,
    /// Its definitions by name, for references from other objects.
    pub(crate) defined: HashMap<String, SymbolId>,
    pub(crate) layout: Option<Layout>,
}

/// What a batch consists of.
#[derive(Default)]
pub(crate) struct Claim {
    pub(crate) objects: Vec<Claimed>,
    positions: HashMap<ObjectId, usize>,
    /// Names to ask the executor for.
    pub(crate) asked: Vec<String>,
    asked_positions: HashMap<String, usize>,
    /// Where the names of the batch come from.
    pub(crate) roots: Vec<Target>,
    /// Objects that other threads are linking.
    pub(crate) others: Vec<ObjectId>,
    /// Handles of the shared libraries to search.
    pub(crate) shared: Vec<ExecutorAddr>,
}

impl Claim {
    /// Claims everything that `batch` needs.
    pub(crate) fn collect(&mut self, state: &mut State, batch: &Batch<'_>) -> Result<(), Error> {
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
