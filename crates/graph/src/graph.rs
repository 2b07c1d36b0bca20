//! The graph of an object: its parts, and what can be asked of it.

use crate::edge::{Edge, EdgeKind, TlsUse};
use crate::parts::{
    Arch, Block, Comdat, Content, Ifunc, InitArray, Place, Scope, Section, SectionKind, Symbol, SymbolType, Table,
    TableEntry, Tables, Text, TlsAddress, TlsModule,
};
use crate::{BlockId, Bytes, ComdatId, SectionId, SymbolId};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use std::sync::Arc;

/// The graph of an object. See the crate for the order of what is done with it.
#[derive(Clone, Debug)]
pub struct LinkGraph {
    pub(crate) name: String,
    pub(crate) arch: Arch,
    pub(crate) bytes: Bytes,
    pub(crate) sections: Vec<Section>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) symbols: Vec<Symbol>,
    pub(crate) edges: Vec<Edge>,
    pub(crate) comdats: Vec<Comdat>,
    /// Pairs of blocks: while the first is live, so is the second. Sorted.
    pub(crate) keep_alive: Vec<(BlockId, BlockId)>,
    pub(crate) tables: Tables,
    /// The module of its thread-local variables, once it has one.
    pub(crate) tls_module: Option<TlsModule>,
    /// Whether its code wants to run on its stack (`.note.GNU-stack`).
    pub(crate) executable_stack: bool,
    /// Whether the object's bytes say which lines its code was compiled from.
    pub(crate) has_lines: bool,
    /// The thread-local variables whose distance from the thread pointer live edges want. Sorted.
    pub(crate) static_tls: Vec<SymbolId>,
    pub(crate) dso_handle: Option<SymbolId>,
    /// The symbol that stands for the GOT's address.
    pub(crate) got_symbol: Option<SymbolId>,
    /// The symbol that stands for the first byte of the module with its thread-local variables.
    pub(crate) tls_base: Option<SymbolId>,
    /// The index of the unwind information.
    pub(crate) unwind_index: Option<BlockId>,
    /// Symbols that have become live since somebody asked.
    pub(crate) newly_live: Vec<SymbolId>,
    /// What it was before anything was decided about it, if that cannot be read again from the object's bytes.
    pub(crate) pristine: Option<Arc<LinkGraph>>,
}

impl LinkGraph {
    /// Returns what the object is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the object's bytes.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Returns the instruction set.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Returns whether the object's bytes say which lines its code was compiled from.
    #[must_use]
    pub fn has_lines(&self) -> bool {
        self.has_lines
    }

    /// Gives a symbol another name.
    pub fn rename(&mut self, id: SymbolId, name: &str) {
        self.symbols[id.index()].name = Text::Given(name.into());
    }

    /// Keeps the graph as it is, for [`Self::restored`]: one that has not been read from an object.
    pub fn keep_pristine(&mut self) {
        self.pristine = Some(Arc::new(self.clone()));
    }

    /// Returns the graph as it was when it was kept, if it was.
    #[must_use]
    pub fn restored(&self) -> Option<Self> {
        let pristine = self.pristine.as_ref()?;
        Some(Self { pristine: Some(Arc::clone(pristine)), ..Self::clone(pristine) })
    }

    pub(crate) fn text<'a>(&'a self, text: &'a Text) -> &'a str {
        match text {
            // Checked to be UTF-8 when the text was made.
            Text::Object(range) => std::str::from_utf8(&self.bytes[range.clone()]).unwrap_or_default(),
            Text::Own(text) => text,
            Text::Given(text) => text,
        }
    }

    /// Returns all sections.
    pub fn sections(&self) -> impl Iterator<Item = SectionId> + use<> {
        (0..self.sections.len() as u32).map(SectionId)
    }

    /// Returns a section.
    #[must_use]
    pub fn section(&self, id: SectionId) -> &Section {
        &self.sections[id.index()]
    }

    /// Returns a section's name.
    #[must_use]
    pub fn section_name(&self, id: SectionId) -> &str {
        self.text(&self.section(id).name)
    }

    /// Returns a section's blocks.
    pub fn section_blocks(&self, id: SectionId) -> impl Iterator<Item = BlockId> + use<> {
        self.section(id).blocks.clone().map(BlockId)
    }

    /// Returns a block.
    #[must_use]
    pub fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.index()]
    }

    /// Returns a block's initial bytes; none if it is zero fill.
    #[must_use]
    pub fn block_content(&self, id: BlockId) -> &[u8] {
        match &self.block(id).content {
            Content::Object(range) => &self.bytes[range.clone()],
            Content::Own(bytes) => bytes,
            Content::ZeroFill => &[],
        }
    }

    /// Returns a block's edges.
    #[must_use]
    pub fn block_edges(&self, id: BlockId) -> &[Edge] {
        let edges = &self.block(id).edges;
        &self.edges[edges.start as usize..edges.end as usize]
    }

    /// Returns all symbols.
    pub fn symbol_ids(&self) -> impl Iterator<Item = SymbolId> + use<> {
        (0..self.symbols.len() as u32).map(SymbolId)
    }

    /// Returns a symbol.
    #[must_use]
    pub fn symbol(&self, id: SymbolId) -> &Symbol {
        &self.symbols[id.index()]
    }

    /// Returns a symbol's name; empty if it has none.
    #[must_use]
    pub fn symbol_name(&self, id: SymbolId) -> &str {
        self.text(&self.symbol(id).name)
    }

    /// Returns the COMDAT group that holds a symbol's definition.
    #[must_use]
    pub fn symbol_comdat(&self, id: SymbolId) -> Option<ComdatId> {
        match self.symbol(id).place {
            Place::Defined { block, .. } => self.section(self.block(block).section).comdat,
            _ => None,
        }
    }

    /// Whether a symbol is a variable of which a program has one, whichever of its parts define it: one of a template, or an
    /// inline function's, or an inline one. Those of threads are left out.
    #[must_use]
    pub fn is_one_per_program(&self, id: SymbolId) -> bool {
        let symbol = self.symbol(id);
        let Place::Defined { block, .. } = symbol.place else { return false };
        let section = self.section(self.block(block).section);
        let is_written = section.group.prot == MemProt::RW && section.kind == SectionKind::Regular;
        section.comdat.is_some() && is_written && symbol.scope == Scope::Default && symbol.is_data()
    }

    /// Returns what messages call a symbol: its name, or that of its section and the offset.
    pub(crate) fn symbol_label(&self, id: SymbolId) -> String {
        match (self.symbol_name(id), self.symbol(id).place) {
            ("", Place::Defined { block, offset: 0 }) => self.section_name(self.block(block).section).to_owned(),
            ("", Place::Defined { block, offset }) => {
                format!("{}+{offset:#x}", self.section_name(self.block(block).section))
            }
            ("", _) => match self.symbol(id).lost {
                Some(section) => self.section_name(section).to_owned(),
                None => "a symbol without a name".to_owned(),
            },
            (name, _) => crate::with_demangled(name),
        }
    }

    /// Returns what messages call a place in a block.
    pub(crate) fn place_label(&self, block: BlockId, offset: u64) -> String {
        let section = self.block(block).section;
        // Records of a split section count from its start.
        let first = self.section(section).blocks.start;
        let before: u64 = (first..block.0).map(|id| self.blocks[id as usize].size).sum();
        format!("{}({}+{:#x})", self.name, self.section_name(section), before + offset)
    }

    /// Returns the definitions that other objects can see.
    pub fn definitions(&self) -> impl Iterator<Item = SymbolId> + '_ {
        self.symbol_ids().filter(|&id| {
            let symbol = self.symbol(id);
            symbol.is_defined() && symbol.scope != Scope::Local
        })
    }

    /// Returns the symbols that live blocks refer to and that this graph does not define.
    pub fn externals(&self) -> impl Iterator<Item = SymbolId> + '_ {
        self.symbol_ids().filter(|&id| {
            let symbol = self.symbol(id);
            symbol.live && matches!(symbol.place, Place::External { .. })
        })
    }

    /// Returns the symbols that this graph does not define and that have become live since this was called last.
    pub fn take_new_externals(&mut self) -> Vec<SymbolId> {
        let mut symbols = std::mem::take(&mut self.newly_live);
        symbols.retain(|&id| matches!(self.symbol(id).place, Place::External { .. }));
        symbols
    }

    /// Returns whether an external symbol's absence is no error.
    #[must_use]
    pub fn is_weak_external(&self, id: SymbolId) -> bool {
        self.symbol(id).place == Place::External { weak: true }
    }

    /// Takes a definition out of the graph because another object's counts: references to it become external.
    pub fn externalize(&mut self, id: SymbolId) {
        self.symbols[id.index()].place = Place::External { weak: false };
    }

    /// Returns the COMDAT groups.
    pub fn comdats(&self) -> impl Iterator<Item = ComdatId> + use<> {
        (0..self.comdats.len() as u32).map(ComdatId)
    }

    /// Returns a COMDAT group's signature.
    #[must_use]
    pub fn comdat_signature(&self, id: ComdatId) -> &str {
        self.text(&self.comdats[id.index()].signature)
    }

    /// Takes a COMDAT group out of the graph because another object's counts: its sections are not linked, and
    /// references to its definitions become external.
    pub fn discard_comdat(&mut self, id: ComdatId) {
        for section in self.comdats[id.index()].sections.clone() {
            for block in self.section_blocks(section) {
                self.blocks[block.index()].discarded = true;
            }
        }
        for id in std::mem::take(&mut self.comdats[id.index()].symbols) {
            let symbol = &mut self.symbols[id.index()];
            if let Place::Defined { block, .. } = symbol.place {
                let is_local = symbol.scope == Scope::Local;
                symbol.place = if is_local { Place::Discarded } else { Place::External { weak: false } };
                symbol.lost = Some(self.blocks[block.index()].section);
            }
        }
    }

    /// Sets the length in bytes of what an external symbol stands for, where its definition is known.
    pub fn set_size(&mut self, id: SymbolId, size: u64) {
        self.symbols[id.index()].size = size;
    }

    /// Sets the address of an external symbol.
    pub fn set_address(&mut self, id: SymbolId, addr: ExecutorAddr) {
        self.symbols[id.index()].addr = Some(addr);
    }

    /// Returns a symbol's address, once it has one. A thread-local variable has none.
    #[must_use]
    pub fn symbol_address(&self, id: SymbolId) -> Option<ExecutorAddr> {
        let symbol = self.symbol(id);
        match symbol.place {
            Place::Defined { block, offset } => {
                let block = self.block(block);
                let is_tls = self.section(block.section).kind == SectionKind::Tls;
                block.addr.checked_add(offset).filter(|_| block.live && !is_tls)
            }
            Place::Absolute(value) => Some(ExecutorAddr::new(value)),
            Place::External { .. } => symbol.addr,
            Place::Discarded => None,
        }
    }

    /// Sets where an external thread-local variable is.
    pub fn set_tls_address(&mut self, id: SymbolId, tls: TlsAddress) {
        self.symbols[id.index()].tls = Some(tls);
    }

    /// Sets the module of the graph's own thread-local variables.
    pub fn set_tls_module(&mut self, module: TlsModule) {
        self.tls_module = Some(module);
    }

    /// Returns where a thread-local variable is, once that is known.
    #[must_use]
    pub fn tls_address(&self, id: SymbolId) -> Option<TlsAddress> {
        let symbol = self.symbol(id);
        if self.tls_base == Some(id) {
            let module = self.tls_module?;
            return Some(TlsAddress { module: module.id, offset: 0, tp_offset: module.tp_offset });
        }
        let Place::Defined { block, offset } = symbol.place else { return symbol.tls };
        let block = self.block(block);
        if self.section(block.section).kind != SectionKind::Tls || !block.live {
            return None;
        }
        let module = self.tls_module?;
        // The address of a block of such a section is its offset in the module.
        let offset = block.addr.as_u64().checked_add(offset)?;
        let tp_offset = module.tp_offset.and_then(|start| start.checked_add_unsigned(offset));
        Some(TlsAddress { module: module.id, offset, tp_offset })
    }

    /// Returns whether a symbol stands for a thread-local variable.
    #[must_use]
    pub fn is_thread_local(&self, id: SymbolId) -> bool {
        self.symbol(id).kind == SymbolType::Tls
    }

    /// Returns the thread-local variables whose distance from the thread pointer live code wants. Of what this graph
    /// defines itself any one stands for all.
    pub fn static_tls_targets(&self) -> impl Iterator<Item = SymbolId> + '_ {
        self.symbol_ids().filter(|&id| self.symbol(id).live && self.static_tls.binary_search(&id).is_ok())
    }

    /// Returns the names of variables that this graph does not define and whose distance from the thread pointer any code of
    /// it wants, needed or not. A name may come more than once.
    pub fn external_static_tls(&self) -> impl Iterator<Item = &str> {
        let is_static = |kind: EdgeKind| matches!(kind.tls_use(), Some(TlsUse::TpOffset | TlsUse::TpOffsetSlot));
        let targets = self.edges.iter().filter(move |edge| is_static(edge.kind)).map(|edge| edge.target);
        targets.filter(|&id| matches!(self.symbol(id).place, Place::External { .. })).map(|id| self.symbol_name(id))
    }

    /// Returns whether its code wants to run on its stack, as pointers to nested functions need it.
    #[must_use]
    pub fn wants_executable_stack(&self) -> bool {
        self.executable_stack
    }

    /// Returns the IFUNCs, once they have addresses.
    #[must_use]
    pub fn ifuncs(&self) -> Vec<Ifunc> {
        let both = |&(slot, resolver)| {
            Some(Ifunc { resolver: self.symbol_address(resolver)?, slot: self.symbol_address(slot)? })
        };
        self.tables.ifuncs.iter().filter_map(both).collect()
    }

    /// Returns the addresses from a section's first live block to its last; none if it has none.
    #[must_use]
    pub fn section_range(&self, id: SectionId) -> Option<ExecutorAddrRange> {
        let mut live = self.section_blocks(id).map(|id| self.block(id)).filter(|block| block.live);
        let first = live.next()?;
        let last = live.last().unwrap_or(first);
        ExecutorAddrRange::new(first.addr, last.addr.checked_add(last.size)?)
    }

    fn arrays(&self, of: impl Fn(SectionKind) -> Option<(u32, bool)>) -> Vec<InitArray> {
        let array = |id| {
            let (priority, reversed) = of(self.section(id).kind)?;
            let range = self.section_range(id).filter(|range| !range.is_empty())?;
            Some(InitArray { range, priority, reversed })
        };
        self.sections().filter_map(array).collect()
    }

    /// Returns the arrays of initializers, in the object's order.
    #[must_use]
    pub fn init_arrays(&self) -> Vec<InitArray> {
        self.arrays(|kind| match kind {
            SectionKind::Init { priority, reversed } => Some((priority, reversed)),
            _ => None,
        })
    }

    /// Returns the arrays of finalizers, in the object's order.
    #[must_use]
    pub fn fini_arrays(&self) -> Vec<InitArray> {
        self.arrays(|kind| match kind {
            SectionKind::Fini { priority, reversed } => Some((priority, reversed)),
            _ => None,
        })
    }

    /// Returns the addresses of the unwind information, up to and with the zero that ends it.
    #[must_use]
    pub fn eh_frame(&self) -> Option<ExecutorAddrRange> {
        let sections = self.sections().filter(|&id| self.section(id).kind == SectionKind::EhFrame);
        let ranges: Vec<_> = sections.filter_map(|id| self.section_range(id)).collect();
        let start = ranges.iter().map(|range| range.start()).min()?;
        ExecutorAddrRange::new(start, ranges.iter().map(|range| range.end()).max()?)
    }

    /// Returns the address that names this object to the C library's lists of exit functions, if it has one.
    #[must_use]
    pub fn dso_handle(&self) -> Option<ExecutorAddr> {
        self.symbol_address(self.dso_handle?)
    }

    fn table_entries(&self, table: &Table) -> Vec<TableEntry> {
        let Some(block) = table.block else { return Vec::new() };
        let entry = |(position, &target): (usize, &SymbolId)| {
            let addr = self.block(block).addr.checked_add(position as u64 * crate::x86_64::ENTRY_BYTES)?;
            Some(TableEntry { target, addr })
        };
        table.targets.iter().enumerate().filter_map(entry).collect()
    }

    /// Returns the entries of the GOT.
    #[must_use]
    pub fn got_entries(&self) -> Vec<TableEntry> {
        self.table_entries(&self.tables.got)
    }

    /// Returns the stubs.
    #[must_use]
    pub fn stubs(&self) -> Vec<TableEntry> {
        self.table_entries(&self.tables.stubs)
    }
}
