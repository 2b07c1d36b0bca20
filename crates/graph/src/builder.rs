//! Making a graph, section by section.

use crate::edge::{Edge, EdgeKind};
use crate::eh_frame::split_eh_frame;
use crate::graph::LinkGraph;
use crate::parts::{Arch, Block, Comdat, Content, Section, SectionKind, Symbol, Tables, Text};
use crate::{BlockId, Bytes, ComdatId, LinkError, Linkage, Place, Scope, SectionId, SymbolId, SymbolType};
use farlink_addr::{Align, AllocGroup, ExecutorAddr};
use std::ops::Range;

/// A section of one block that is to be added to a graph.
#[derive(Clone, Debug)]
pub struct NewSection {
    /// Its name.
    pub name: Text,
    /// What it is for.
    pub kind: SectionKind,
    /// How its memory is used.
    pub group: AllocGroup,
    /// The COMDAT group it belongs to.
    pub comdat: Option<ComdatId>,
    /// Whether it is kept though nothing refers to it.
    pub retain: bool,
    /// Whether only code of the large model has to reach it.
    pub is_large: bool,
    /// Its initial bytes.
    pub content: Content,
    /// Length in bytes.
    pub size: u64,
    /// Alignment of its first byte.
    pub align: Align,
}

/// Makes a [`LinkGraph`] of an object's bytes.
///
/// Sections come first, then symbols, then the edges of one block after another.
pub struct GraphBuilder {
    graph: LinkGraph,
}

impl GraphBuilder {
    /// Starts the graph of the object `bytes`, which messages call `name`.
    #[must_use]
    pub fn new(name: &str, arch: Arch, bytes: Bytes) -> Self {
        Self {
            graph: LinkGraph {
                name: name.to_owned(),
                arch,
                bytes,
                sections: Vec::new(),
                blocks: Vec::new(),
                symbols: Vec::new(),
                edges: Vec::new(),
                comdats: Vec::new(),
                keep_alive: Vec::new(),
                tables: Tables::default(),
                tls_module: None,
                executable_stack: false,
                has_lines: false,
                static_tls: Vec::new(),
                dso_handle: None,
                got_symbol: None,
                tls_base: None,
                newly_live: Vec::new(),
                unwind_index: None,
                pristine: None,
            },
        }
    }

    /// Returns the part `range` of the object's bytes as a text, or `None` if it is not inside or not UTF-8.
    #[must_use]
    pub fn text(&self, range: Range<usize>) -> Option<Text> {
        std::str::from_utf8(self.graph.bytes.get(range.clone())?).ok()?;
        Some(Text::Object(range))
    }

    /// Adds a COMDAT group.
    pub fn add_comdat(&mut self, signature: Text) -> ComdatId {
        self.graph.comdats.push(Comdat { signature, sections: Vec::new(), symbols: Vec::new() });
        ComdatId(self.graph.comdats.len() as u32 - 1)
    }

    /// Adds a section of one block.
    ///
    /// # Panics
    ///
    /// Panics if its content is not inside the object's bytes, or does not have as many bytes as it is said to have.
    pub fn add_section(&mut self, new: NewSection) -> (SectionId, BlockId) {
        let NewSection { name, kind, group, comdat, retain, is_large, content, size, align } = new;
        let bytes = match &content {
            Content::Object(range) => Some(self.graph.bytes.get(range.clone()).expect("content is inside the object")),
            Content::Own(bytes) => Some(&bytes[..]),
            Content::ZeroFill => None,
        };
        assert!(bytes.is_none_or(|bytes| bytes.len() as u64 == size), "content is as long as it is said to be");
        let section = SectionId(self.graph.sections.len() as u32);
        if let Some(comdat) = comdat {
            self.graph.comdats[comdat.index()].sections.push(section);
        }
        self.graph.push_section(Section { name, kind, group, comdat, retain, is_large, blocks: 0..0 });
        let block = self.graph.push_block(section, content, size, align);
        (section, block)
    }

    /// Adds a symbol. Symbols are numbered from 0 in the order in which they are added.
    pub fn add_symbol(
        &mut self,
        name: Text,
        place: Place,
        size: u64,
        linkage: Linkage,
        scope: Scope,
        kind: SymbolType,
    ) -> SymbolId {
        self.graph.push_symbol(Symbol {
            name,
            place,
            size,
            linkage,
            scope,
            kind,
            live: false,
            addr: None,
            tls: None,
            lost: None,
        })
    }

    /// Says that the object's code wants to run on its stack.
    pub fn set_executable_stack(&mut self) {
        self.graph.executable_stack = true;
    }

    /// Notes that the object's bytes say which lines its code was compiled from.
    pub fn set_has_lines(&mut self) {
        self.graph.has_lines = true;
    }

    /// Returns how many symbols have been added.
    #[must_use]
    pub fn symbol_count(&self) -> u32 {
        self.graph.symbols.len() as u32
    }

    /// Adds the edges of a block.
    pub fn add_edges(&mut self, block: BlockId, edges: impl IntoIterator<Item = Edge>) {
        self.graph.push_edges(block, edges);
    }

    /// Returns the graph.
    ///
    /// # Errors
    ///
    /// Fails if an `.eh_frame` section is malformed.
    pub fn finish(mut self) -> Result<LinkGraph, LinkError> {
        split_eh_frame(&mut self.graph)?;
        for id in self.graph.symbol_ids() {
            if let Some(comdat) = self.graph.symbol_comdat(id) {
                self.graph.comdats[comdat.index()].symbols.push(id);
            }
        }
        Ok(self.graph)
    }
}

impl LinkGraph {
    pub(crate) fn push_section(&mut self, mut section: Section) -> SectionId {
        section.blocks = self.blocks.len() as u32..self.blocks.len() as u32;
        self.sections.push(section);
        SectionId(self.sections.len() as u32 - 1)
    }

    /// Adds a block to the section that got the last one.
    pub(crate) fn push_block(&mut self, section: SectionId, content: Content, size: u64, align: Align) -> BlockId {
        let id = BlockId(self.blocks.len() as u32);
        debug_assert_eq!(self.sections[section.index()].blocks.end, id.0, "a section's blocks follow each other");
        self.sections[section.index()].blocks.end = id.0 + 1;
        let addr = ExecutorAddr::NULL;
        self.blocks.push(Block { section, content, size, align, edges: 0..0, live: false, discarded: false, addr });
        id
    }

    pub(crate) fn push_symbol(&mut self, symbol: Symbol) -> SymbolId {
        self.symbols.push(symbol);
        SymbolId(self.symbols.len() as u32 - 1)
    }

    pub(crate) fn push_edges(&mut self, block: BlockId, edges: impl IntoIterator<Item = Edge>) {
        let start = self.edges.len() as u32;
        self.edges.extend(edges);
        self.blocks[block.index()].edges = start..self.edges.len() as u32;
    }

    /// Adds a live section that the linker makes, of one block.
    pub(crate) fn push_own(
        &mut self,
        name: &'static str,
        kind: SectionKind,
        prot: farlink_addr::MemProt,
        bytes: Vec<u8>,
        align: Align,
    ) -> BlockId {
        let group = AllocGroup::standard(prot);
        let (name, comdat, retain, is_large) = (Text::Own(name), None, false, false);
        let section = Section { name, kind, group, comdat, retain, is_large, blocks: 0..0 };
        let section = self.push_section(section);
        let size = bytes.len() as u64;
        let block = self.push_block(section, Content::Own(bytes), size, align);
        self.blocks[block.index()].live = true;
        block
    }

    /// Adds a live local symbol in a block.
    pub(crate) fn push_local(&mut self, name: &'static str, block: BlockId, offset: u64) -> SymbolId {
        self.push_symbol(Symbol {
            name: Text::Own(name),
            place: Place::Defined { block, offset },
            size: 0,
            linkage: Linkage::Strong,
            scope: Scope::Local,
            kind: SymbolType::None,
            live: true,
            addr: None,
            tls: None,
            lost: None,
        })
    }
}

/// Returns an edge.
pub(crate) fn edge(offset: u64, kind: EdgeKind, target: SymbolId, addend: i64) -> Edge {
    Edge { offset, kind, target, addend }
}

/// Makes an external symbol a local one in a block.
pub(crate) fn define(graph: &mut LinkGraph, id: SymbolId, block: BlockId, offset: u64) {
    let symbol = &mut graph.symbols[id.index()];
    symbol.place = Place::Defined { block, offset };
    symbol.scope = Scope::Local;
}
