//! What a library holds: its objects, each declared, being linked, linked or removed, and its archives.

use crate::lazy::LazyNames;
use crate::library::ObjectId;
use crate::names::NameId;
use crate::redirect::Redirects;
use crate::resolved::Resolved;
use crate::table::{Definition, Strength, SymbolTable};
use crate::{Error, PhaseTimes};
use farlink_addr::ExecutorAddr;
use farlink_elf::Archive;
use farlink_graph::{Bytes, CodePlace, LinkGraph, Linkage, SymbolId};
use farlink_mem::FinalizedAlloc;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) table: SymbolTable,
    /// Indexed by [`ObjectId`].
    pub(crate) objects: Vec<ObjectSlot>,
    /// Slots of objects that have been removed.
    free: Vec<ObjectId>,
    /// How many objects have been declared.
    declared: u64,
    pub(crate) archives: Vec<LibraryArchive>,
    /// Handles of the shared libraries, in the order in which they were added.
    pub(crate) shared: Vec<ExecutorAddr>,
    /// What the executor has said of names that are defined elsewhere.
    pub(crate) resolved: Resolved,
    pub(crate) times: PhaseTimes,
    pub(crate) redirects: Redirects,
    pub(crate) lazy: LazyNames,
}

pub(crate) struct ObjectSlot {
    pub(crate) name: Box<str>,
    /// The number of objects that were declared before this one: it tells the object from others that had this slot.
    pub(crate) serial: u64,
    pub(crate) state: ObjectState,
    /// The names it defines, by which symbols, and the signatures of its COMDAT groups: to be forgotten with it.
    pub(crate) defines: Box<[(NameId, SymbolId)]>,
    pub(crate) comdats: Box<[NameId]>,
    /// Objects that this one refers to, once it is being linked. Sorted.
    pub(crate) uses: Box<[ObjectId]>,
    /// Objects that refer to this one.
    pub(crate) users: BTreeSet<ObjectId>,
}

pub(crate) enum ObjectState {
    /// Parsed.
    Declared {
        graph: Box<LinkGraph>,
    },
    /// Some thread is linking it.
    Linking,
    Linked(LinkedObject),
    Removed,
}

pub(crate) struct LinkedObject {
    /// Its memory; none if it has no bytes in the executor.
    pub(crate) memory: Option<FinalizedAlloc>,
    /// Memory that it has together with other objects. It goes with the last of them.
    pub(crate) sets: Box<[Arc<FinalizedAlloc>]>,
    /// Where its code is, and the bytes that tell what is there.
    pub(crate) code: Box<[CodePlace]>,
    pub(crate) bytes: Bytes,
    /// What debuggers are shown of it.
    pub(crate) shown: Option<Box<FinalizedAlloc>>,
    /// The graph with its addresses, where the session keeps it.
    pub(crate) graph: Option<Box<LinkGraph>>,
}

impl LinkedObject {
    /// Returns the memory that goes with the object.
    pub(crate) fn into_memory(self) -> Vec<FinalizedAlloc> {
        let shown = self.shown.map(|shown| *shown);
        self.sets.into_iter().filter_map(Arc::into_inner).chain(self.memory).chain(shown).collect()
    }
}

pub(crate) struct LibraryArchive {
    pub(crate) archive: Archive,
    /// Members that have been declared, by their position.
    pub(crate) loaded: HashSet<u64>,
}

impl State {
    pub(crate) fn object(&mut self, id: ObjectId) -> &mut ObjectSlot {
        &mut self.objects[id.0 as usize]
    }

    /// Enters an object and its definitions.
    pub(crate) fn declare(&mut self, mut graph: LinkGraph) -> Result<ObjectId, Error> {
        self.redirects.rename_versions(&mut graph, self.declared);
        let next = ObjectId(u32::try_from(self.objects.len()).expect("fewer objects than fit in memory"));
        let id = self.free.last().copied().unwrap_or(next);
        let mut defines = Vec::new();
        for symbol in graph.definitions() {
            let (name, strength) = (graph.symbol_name(symbol), strength(&graph, symbol));
            // An object may have two symbols of one name: versions of it.
            if let Err(conflict) = self.table.check(name, strength)
                && conflict.first != Some(id)
            {
                self.undefine(id, &defines);
                return Err(Error::DuplicateDefinition {
                    symbol: name.to_owned(),
                    first: self.name_of(conflict.first),
                    second: graph.name().to_owned(),
                });
            }
            defines.push((self.table.add(name, Definition::by_object(id, symbol, strength)), symbol));
        }
        let comdats = graph.comdats().map(|comdat| self.table.add_comdat(graph.comdat_signature(comdat), id)).collect();
        let slot = ObjectSlot {
            name: graph.name().into(),
            serial: self.declared,
            state: ObjectState::Declared { graph: Box::new(graph) },
            defines: defines.into(),
            comdats,
            uses: Box::default(),
            users: BTreeSet::new(),
        };
        self.declared += 1;
        match self.free.pop() {
            Some(id) => *self.object(id) = slot,
            None => self.objects.push(slot),
        }
        Ok(id)
    }

    /// Returns what messages call who defines something.
    pub(crate) fn name_of(&self, object: Option<ObjectId>) -> String {
        object.map_or("a definition with an address".to_owned(), |object| {
            self.objects[object.0 as usize].name.clone().into_string()
        })
    }

    /// Returns the objects that are there, in the order in which they were declared.
    pub(crate) fn in_order(&self) -> Vec<ObjectId> {
        let is_there = |slot: &ObjectSlot| !matches!(slot.state, ObjectState::Removed);
        let slots = self.objects.iter().zip(0..).filter(|(slot, _)| is_there(slot));
        let mut objects: Vec<_> = slots.map(|(slot, index)| (slot.serial, ObjectId(index))).collect();
        objects.sort_unstable();
        objects.into_iter().map(|(_, id)| id).collect()
    }

    fn undefine(&mut self, id: ObjectId, defines: &[(NameId, SymbolId)]) {
        for &(name, symbol) in defines {
            self.table.remove(name, id, symbol);
        }
    }

    /// Returns the thread-local variables of others whose distance from the thread pointer declared objects want.
    pub(crate) fn static_tls_names(&self) -> Vec<String> {
        let graphs = self.objects.iter().filter_map(|slot| match &slot.state {
            ObjectState::Declared { graph } => Some(graph),
            _ => None,
        });
        let names: BTreeSet<&str> = graphs.flat_map(|graph| graph.external_static_tls()).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// Removes an object that nothing refers to, with what it defined and what it refers to; gives what it was.
    pub(crate) fn remove(&mut self, id: ObjectId) -> ObjectState {
        let slot = self.object(id);
        let state = std::mem::replace(&mut slot.state, ObjectState::Removed);
        let (defines, comdats) = (std::mem::take(&mut slot.defines), std::mem::take(&mut slot.comdats));
        self.undefine(id, &defines);
        for signature in comdats {
            self.table.remove_comdat(signature, id);
        }
        self.forget_uses(id);
        self.free.push(id);
        state
    }

    /// Notes which objects `id` refers to.
    pub(crate) fn set_uses(&mut self, id: ObjectId, mut uses: Vec<ObjectId>) {
        uses.sort_unstable();
        uses.dedup();
        for &used in &uses {
            self.object(used).users.insert(id);
        }
        self.object(id).uses = uses.into();
    }

    /// Forgets which objects `id` refers to.
    pub(crate) fn forget_uses(&mut self, id: ObjectId) {
        for used in std::mem::take(&mut self.object(id).uses) {
            self.object(used).users.remove(&id);
        }
    }
}

/// How much a definition counts beside others of its name.
fn strength(graph: &LinkGraph, id: SymbolId) -> Strength {
    let symbol = graph.symbol(id);
    match symbol.linkage {
        Linkage::Common => Strength::Common(symbol.size),
        Linkage::Strong if graph.symbol_comdat(id).is_none() => Strength::Strong,
        // Every copy of a COMDAT group is as good as any other.
        Linkage::Strong | Linkage::Weak => Strength::Weak,
    }
}
