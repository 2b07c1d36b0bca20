//! What a library holds: its objects, each declared, being linked, linked or removed, and its archives.

use crate::library::ObjectId;
use crate::table::{Definition, Strength, SymbolTable};
use crate::{Error, PhaseTimes};
use farlink_addr::ExecutorAddr;
use farlink_elf::Archive;
use farlink_graph::{LinkGraph, Linkage, SymbolId};
use farlink_mem::FinalizedAlloc;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) table: SymbolTable,
    /// Indexed by [`ObjectId`], which is never used again.
    pub(crate) objects: Vec<ObjectSlot>,
    pub(crate) archives: Vec<LibraryArchive>,
    /// Handles of the shared libraries, in the order in which they were added.
    pub(crate) shared: Vec<ExecutorAddr>,
    pub(crate) times: PhaseTimes,
}

pub(crate) struct ObjectSlot {
    pub(crate) name: String,
    pub(crate) state: ObjectState,
    /// The names it defines and the signatures of its COMDAT groups, to be forgotten with it.
    pub(crate) defines: Vec<Arc<str>>,
    pub(crate) comdats: Vec<Arc<str>>,
    /// Objects that this one refers to, once it is being linked.
    pub(crate) uses: BTreeSet<ObjectId>,
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
    pub(crate) sets: Vec<Arc<FinalizedAlloc>>,
    /// The graph with its addresses, where the session keeps it.
    pub(crate) graph: Option<Box<LinkGraph>>,
}

impl LinkedObject {
    /// Returns the memory that goes with the object.
    pub(crate) fn into_memory(self) -> Vec<FinalizedAlloc> {
        self.sets.into_iter().filter_map(Arc::into_inner).chain(self.memory).collect()
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
    pub(crate) fn declare(&mut self, graph: LinkGraph) -> Result<ObjectId, Error> {
        let id = ObjectId(u32::try_from(self.objects.len()).expect("fewer objects than fit in memory"));
        let definitions: Vec<_> = graph.definitions().map(|symbol| (symbol, strength(&graph, symbol))).collect();
        for &(symbol, strength) in &definitions {
            let name = graph.symbol_name(symbol);
            self.table.check(name, strength).map_err(|conflict| Error::DuplicateDefinition {
                symbol: name.to_owned(),
                first: conflict.first.map_or("a definition with an address".to_owned(), |object| {
                    self.objects[object.0 as usize].name.clone()
                }),
                second: graph.name().to_owned(),
            })?;
        }
        let definitions = definitions.into_iter().map(|(symbol, strength)| {
            let definition = Definition { object: Some(id), strength, value: None };
            self.table.add(graph.symbol_name(symbol), definition)
        });
        let defines = definitions.collect();
        let comdats = graph.comdats().map(|comdat| self.table.add_comdat(graph.comdat_signature(comdat), id)).collect();
        self.objects.push(ObjectSlot {
            name: graph.name().to_owned(),
            state: ObjectState::Declared { graph: Box::new(graph) },
            defines,
            comdats,
            uses: BTreeSet::new(),
            users: BTreeSet::new(),
        });
        Ok(id)
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

    /// Forgets what an object defined and what it refers to.
    pub(crate) fn forget(&mut self, id: ObjectId) {
        let slot = self.object(id);
        let (defines, comdats) = (std::mem::take(&mut slot.defines), std::mem::take(&mut slot.comdats));
        for name in defines {
            self.table.remove(&name, id);
        }
        for signature in comdats {
            self.table.remove_comdat(&signature, id);
        }
        self.forget_uses(id);
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
