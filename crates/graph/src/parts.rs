//! The parts of a graph: sections, blocks, symbols, groups, tables.

use crate::{BlockId, ComdatId, SectionId, SymbolId};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange};
use std::ops::Range;
use std::sync::Arc;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Arch {
    /// AMD64, also called x86-64.
    X86_64,
}

/// A text: in the object's bytes, or in the graph's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// A part of the object's bytes that is UTF-8.
    Object(Range<usize>),
    /// A name that the linker gave.
    Own(&'static str),
    /// A name that somebody gave when the graph was there.
    Given(Arc<str>),
}

/// The initial bytes of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A part of the object's bytes.
    Object(Range<usize>),
    /// Bytes that the linker made.
    Own(Vec<u8>),
    /// Zeros, which take no bytes.
    ZeroFill,
}

/// What a section is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SectionKind {
    /// Code or data that is used by reference.
    Regular,
    /// An array of initializers, run in order of priority; `reversed` ones from their last entry to their first.
    Init {
        /// Smaller ones run earlier.
        priority: u32,
        /// `.ctors` is run backwards.
        reversed: bool,
    },
    /// An array of finalizers, run in the reverse order.
    Fini {
        /// Smaller ones run later.
        priority: u32,
        /// `.dtors` is run forwards.
        reversed: bool,
    },
    /// Unwind information.
    EhFrame,
    /// Initial values of thread-local variables.
    Tls,
}

/// A section.
#[derive(Clone, Debug)]
pub struct Section {
    pub(crate) name: Text,
    /// What it is for.
    pub kind: SectionKind,
    /// How its memory is used.
    pub group: AllocGroup,
    /// The COMDAT group it belongs to.
    pub comdat: Option<ComdatId>,
    /// Whether it is kept though nothing refers to it (`SHF_GNU_RETAIN`).
    pub retain: bool,
    /// Whether only code of the large model has to reach it (`SHF_X86_64_LARGE`).
    pub is_large: bool,
    /// Its blocks follow each other.
    pub(crate) blocks: Range<u32>,
}

/// Bytes that stay together: a section, or a record of `.eh_frame`.
#[derive(Clone, Debug)]
pub struct Block {
    /// The section it belongs to.
    pub section: SectionId,
    pub(crate) content: Content,
    /// Length in bytes.
    pub size: u64,
    /// Alignment of its first byte.
    pub align: Align,
    /// Its edges follow each other.
    pub(crate) edges: Range<u32>,
    /// Whether something live reaches it; false before pruning.
    pub(crate) live: bool,
    /// Whether its COMDAT group lost.
    pub(crate) discarded: bool,
    /// Its address, once it has one.
    pub(crate) addr: ExecutorAddr,
}

impl Block {
    /// Returns whether the block is linked because something live reaches it: not before pruning.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Returns whether the block is zeros that take no bytes.
    #[must_use]
    pub fn is_zero_fill(&self) -> bool {
        self.content == Content::ZeroFill
    }
}

/// Where a symbol is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a block of this graph.
    Defined {
        /// The block.
        block: BlockId,
        /// Offset in the block, at most its size.
        offset: u64,
    },
    /// At a fixed address, or a mere number.
    Absolute(u64),
    /// Somewhere else.
    External {
        /// Whether its absence is no error.
        weak: bool,
    },
    /// Nowhere: a symbol of a section that is not linked, or not as a whole.
    Discarded,
}

/// How a definition yields to others of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linkage {
    /// It does not.
    Strong,
    /// To a strong or common one.
    Weak,
    /// To a strong one or to a larger common one.
    Common,
}

/// Who can see a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everybody.
    Default,
    /// The other objects of the library.
    Hidden,
    /// Only this object.
    Local,
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolType {
    /// Nothing is said.
    None,
    /// A function.
    Function,
    /// Data.
    Object,
    /// A section.
    Section,
    /// A thread-local variable.
    Tls,
    /// A function that is chosen by calling another when it is linked.
    IndirectFunction,
}

/// Where a thread-local variable is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TlsAddress {
    /// The dynamic linker's number of the module that it belongs to.
    pub module: u64,
    /// Its offset in the module's block of each thread.
    pub offset: u64,
    /// Its distance in bytes from the thread pointer, if that is the same in all threads.
    pub tp_offset: Option<i64>,
}

/// The module of a graph's own thread-local variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsModule {
    /// The dynamic linker's number of it.
    pub id: u64,
    /// The distance in bytes of its blocks from the thread pointer, if that is the same in all threads.
    pub tp_offset: Option<i64>,
}

/// An IFUNC of a linked graph: a slot in its data that is to hold what the resolver returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ifunc {
    /// The function that chooses.
    pub resolver: ExecutorAddr,
    /// Where the address of what it chose goes: 8 bytes.
    pub slot: ExecutorAddr,
}

/// A symbol.
#[derive(Clone, Debug)]
pub struct Symbol {
    pub(crate) name: Text,
    /// Where it is.
    pub place: Place,
    /// Length in bytes of what it stands for; 0 if that is not known.
    pub size: u64,
    /// How its definition yields.
    pub linkage: Linkage,
    /// Who can see it.
    pub scope: Scope,
    /// What it stands for.
    pub kind: SymbolType,
    /// Whether something live refers to it, or it is what makes its block live; false before pruning.
    pub(crate) live: bool,
    /// Its address, if it is external and has been resolved.
    pub(crate) addr: Option<ExecutorAddr>,
    /// Where it is in each thread, if it is external, thread-local, and has been resolved.
    pub(crate) tls: Option<TlsAddress>,
    /// The section that it was in, if that is in a COMDAT group that lost.
    pub(crate) lost: Option<SectionId>,
}

impl Symbol {
    /// Returns whether this graph defines the symbol.
    #[must_use]
    pub fn is_defined(&self) -> bool {
        matches!(self.place, Place::Defined { .. } | Place::Absolute(_))
    }

    /// Returns whether it stands for data, as far as is said.
    #[must_use]
    pub fn is_data(&self) -> bool {
        matches!(self.kind, SymbolType::Object | SymbolType::None)
    }
}

/// A COMDAT group: of several with one signature, one is linked.
#[derive(Clone, Debug)]
pub struct Comdat {
    pub(crate) signature: Text,
    pub(crate) sections: Vec<SectionId>,
    /// The symbols defined in its sections: filled in when the graph is complete.
    pub(crate) symbols: Vec<SymbolId>,
}

/// An array of initializers or finalizers that has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitArray {
    /// Its addresses. Each entry has 8 bytes.
    pub range: ExecutorAddrRange,
    /// Its order among arrays.
    pub priority: u32,
    /// Whether its last entry is its first.
    pub reversed: bool,
}

/// Bytes of an entry of an array of functions.
const POINTER_BYTES: u64 = 8;

impl InitArray {
    /// Returns the array as ranges that are run in order, each from its start: one, or one for each entry if it is
    /// reversed.
    #[must_use]
    pub fn in_order(&self) -> Vec<ExecutorAddrRange> {
        if !self.reversed {
            return vec![self.range];
        }
        let entry = |index: u64| {
            let start = self.range.start().checked_add(index * POINTER_BYTES)?;
            ExecutorAddrRange::from_len(start, POINTER_BYTES)
        };
        (0..self.range.len() / POINTER_BYTES).rev().filter_map(entry).collect()
    }
}

/// An entry of the GOT or a stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// The symbol it leads to.
    pub target: SymbolId,
    /// Its address.
    pub addr: ExecutorAddr,
}

/// A table of entries for symbols: a part of the GOT, or the stubs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub(crate) block: Option<BlockId>,
    pub(crate) targets: Vec<SymbolId>,
    /// Position by symbol, one more than it; 0 is none. As long as the table has entries, as there are symbols.
    pub(crate) positions: Vec<u32>,
}

impl Table {
    /// Adds an entry for `target` unless it has one.
    pub(crate) fn add(&mut self, target: SymbolId) {
        if self.positions.len() <= target.index() {
            self.positions.resize(target.index() + 1, 0);
        }
        if self.positions[target.index()] == 0 {
            self.targets.push(target);
            self.positions[target.index()] = self.targets.len() as u32;
        }
    }

    pub(crate) fn position(&self, target: SymbolId) -> Option<u32> {
        self.positions.get(target.index())?.checked_sub(1)
    }
}

/// The tables of a graph.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tables {
    /// Edges, with their blocks, that do without an entry while their targets are in reach.
    pub(crate) direct: Vec<(BlockId, u32)>,
    /// Addresses, 8 bytes each.
    pub(crate) got: Table,
    /// Jumps through those, 8 bytes each.
    pub(crate) stubs: Table,
    /// Distances from the thread pointer, 8 bytes each.
    pub(crate) tp_offsets: Table,
    /// Modules and offsets, 16 bytes each.
    pub(crate) tls_general: Table,
    /// The graph's own module, and 0: 16 bytes.
    pub(crate) tls_local: Option<BlockId>,
    /// The slots of IFUNCs, and their resolvers.
    pub(crate) ifuncs: Vec<(SymbolId, SymbolId)>,
}
