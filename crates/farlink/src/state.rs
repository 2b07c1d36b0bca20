//! What a library holds: its objects, each declared, being linked, linked or removed, and its archives.

use crate::chunks::Chunks;
use crate::known_code::KnownCode;
use crate::lazy::LazyNames;
use crate::library::ObjectId;
use crate::names::{MANY, NameId};
use crate::redirect::Redirects;
use crate::resolved::{FarNames, Resolved};
use crate::table::{Definition, Strength, SymbolTable};
use crate::{Error, PhaseTimes};
use ecow::EcoString;
use farlink_addr::ExecutorAddr;
use farlink_elf::Archive;
use farlink_graph::{LinkGraph, Linkage, SymbolId};
use farlink_mem::FinalizedAlloc;
use smallvec::SmallVec;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) table: SymbolTable,
    /// Indexed by [`ObjectId`].
    pub(crate) objects: Chunks<ObjectSlot>,
    /// Slots of objects that have been removed.
    free: Vec<ObjectId>,
    /// How many objects have been declared.
    declared: u64,
    pub(crate) archives: Vec<LibraryArchive>,
    /// Handles of the shared libraries, in the order in which they were added.
    pub(crate) shared: Vec<ExecutorAddr>,
    /// What the executor has said of names that are defined elsewhere.
    pub(crate) resolved: Resolved,
    /// Names that are out of reach of linked code.
    pub(crate) far: FarNames,
    /// How many threads wait for objects that others are linking.
    pub(crate) waiting: usize,
    pub(crate) times: PhaseTimes,
    pub(crate) redirects: Redirects,
    pub(crate) lazy: LazyNames,
}

/// An object. There may be a million, so what most do not have is elsewhere.
pub(crate) struct ObjectSlot {
    pub(crate) name: EcoString,
    /// The number of objects that were declared before this one: it tells the object from others that had this slot.
    pub(crate) serial: u64,
    pub(crate) state: ObjectState,
    /// The names it defines, by which symbols: to be forgotten with it.
    pub(crate) defines: Defines,
    more: Option<Box<More>>,
}

/// Names, and the symbols of an object that define them.
pub(crate) type Defines = SmallVec<[(NameId, SymbolId); 1]>;

/// What most objects do not have.
#[derive(Default)]
pub(crate) struct More {
    /// The signatures of its COMDAT groups, to be forgotten with it.
    comdats: Box<[NameId]>,
    /// Objects that this one refers to, once it is being linked. Sorted.
    uses: Box<[ObjectId]>,
    /// Objects that refer to this one.
    users: BTreeSet<ObjectId>,
    /// Memory that it has together with other objects. It goes with the last of them.
    pub(crate) sets: Box<[Arc<FinalizedAlloc>]>,
    /// What debuggers are shown of it.
    pub(crate) shown: Option<Box<FinalizedAlloc>>,
    /// The graph with its addresses, where the session keeps it.
    pub(crate) graph: Option<Box<LinkGraph>>,
}

impl ObjectSlot {
    /// Returns what most objects do not have, to be changed.
    pub(crate) fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// Returns what most objects do not have, if this one does.
    pub(crate) fn has_more(&self) -> Option<&More> {
        self.more.as_deref()
    }

    pub(crate) fn comdats(&self) -> &[NameId] {
        self.more.as_ref().map_or(&[], |more| &more.comdats)
    }

    /// Returns the objects that refer to this one.
    pub(crate) fn users(&self) -> impl Iterator<Item = ObjectId> {
        self.more.iter().flat_map(|more| more.users.iter().copied())
    }

    /// Returns the graph with its addresses, where the session keeps it.
    pub(crate) fn graph(&self) -> Option<&LinkGraph> {
        self.more.as_ref()?.graph.as_deref()
    }

    /// As [`Self::graph`], to be changed.
    pub(crate) fn graph_mut(&mut self) -> Option<&mut LinkGraph> {
        self.more.as_mut()?.graph.as_deref_mut()
    }

    /// Takes the graph with its addresses, where the session keeps it.
    pub(crate) fn take_graph(&mut self) -> Option<LinkGraph> {
        self.more.as_mut()?.graph.take().map(|graph| *graph)
    }

    /// Takes what a linked object has: its code, and the memory that goes with it. None if it is not linked.
    pub(crate) fn take_linked(&mut self) -> Option<(KnownCode, Vec<FinalizedAlloc>)> {
        let more = self.more.take();
        let ObjectState::Linked(linked) = std::mem::replace(&mut self.state, ObjectState::Removed) else { return None };
        let (sets, shown) = more.map_or_else(Default::default, |more| (more.sets, more.shown));
        let memory = sets.into_iter().filter_map(Arc::into_inner).chain(linked.memory).chain(shown.map(|shown| *shown));
        Some((linked.code, memory.collect()))
    }
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
    pub(crate) code: KnownCode,
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
        let mut defines = Defines::new();
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
        let comdats: Box<[NameId]> =
            graph.comdats().map(|comdat| self.table.add_comdat(graph.comdat_signature(comdat), id)).collect();
        defines.shrink_to_fit();
        let more = (!comdats.is_empty()).then(|| Box::new(More { comdats, ..More::default() }));
        let slot = ObjectSlot {
            name: graph.name().into(),
            serial: self.declared,
            state: ObjectState::Declared { graph: Box::new(graph) },
            defines,
            more,
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
            self.objects[object.0 as usize].name.to_string()
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

    /// Removes an object that nothing refers to, with what it defined and what it refers to; gives its name, and what it
    /// had if it was linked.
    pub(crate) fn remove(&mut self, id: ObjectId) -> (EcoString, Option<(KnownCode, Vec<FinalizedAlloc>)>) {
        self.forget_uses(id);
        let slot = self.object(id);
        let (name, defines) = (std::mem::take(&mut slot.name), std::mem::take(&mut slot.defines));
        let comdats = slot.more.as_mut().map(|more| std::mem::take(&mut more.comdats));
        let linked = slot.take_linked();
        self.undefine(id, &defines);
        for signature in comdats.into_iter().flatten() {
            self.table.remove_comdat(signature, id);
        }
        self.free.push(id);
        if self.free.len() == self.objects.len() && self.objects.len() > MANY {
            (self.free, self.objects) = Default::default();
        }
        (name, linked)
    }

    /// Notes which objects `id` refers to.
    pub(crate) fn set_uses(&mut self, id: ObjectId, mut uses: Vec<ObjectId>) {
        uses.sort_unstable();
        uses.dedup();
        for &used in &uses {
            self.object(used).more().users.insert(id);
        }
        self.object(id).more().uses = uses.into();
    }

    /// Forgets which objects `id` refers to.
    pub(crate) fn forget_uses(&mut self, id: ObjectId) {
        let uses = self.object(id).more.as_mut().map(|more| std::mem::take(&mut more.uses));
        for used in uses.into_iter().flatten() {
            self.object(used).more().users.remove(&id);
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
