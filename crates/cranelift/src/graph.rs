//! A function or data object of Cranelift's as a graph of its own, so that it can go alone.

use crate::unwind::EhFrameSection;
use cranelift_codegen::binemit::Reloc;
use cranelift_module::Linkage;
use farlink_addr::{Align, AllocGroup, MemProt};
use farlink_graph::{
    Arch, Bytes, Content, Edge, EdgeKind, GraphBuilder, LinkGraph, NewSection, Place, Scope, SectionKind, SymbolId,
    SymbolType, Text,
};
use std::collections::HashMap;
use std::ops::Range;

/// What a definition is made of.
pub(crate) struct Definition<'a> {
    pub(crate) name: &'a str,
    pub(crate) linkage: Linkage,
    pub(crate) kind: Kind,
    /// The section that it is to be in, if that is named.
    pub(crate) section: Option<&'a str>,
    pub(crate) content: Init<'a>,
    pub(crate) align: u64,
    pub(crate) references: Vec<Reference>,
    pub(crate) eh_frame: Option<EhFrameSection>,
}

/// What is defined.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Function,
    ReadOnlyData,
    WritableData,
    ThreadLocalData,
}

/// Its first bytes.
#[derive(Clone, Copy)]
pub(crate) enum Init<'a> {
    Bytes(&'a [u8]),
    Zeros(usize),
}

/// A relocation, with its target's name.
pub(crate) struct Reference {
    pub(crate) offset: u64,
    pub(crate) kind: Reloc,
    pub(crate) target: Target,
    pub(crate) addend: i64,
}

/// What a reference is to.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    pub(crate) name: String,
    /// Whether its absence is no error.
    pub(crate) weak: bool,
    pub(crate) is_thread_local: bool,
}

impl Kind {
    fn section(self, is_zero: bool) -> (&'static str, SectionKind, MemProt) {
        match self {
            Self::Function => (".text", SectionKind::Regular, MemProt::RX),
            Self::ReadOnlyData => (".rodata", SectionKind::Regular, MemProt::READ),
            Self::WritableData if is_zero => (".bss", SectionKind::Regular, MemProt::RW),
            Self::WritableData => (".data", SectionKind::Regular, MemProt::RW),
            Self::ThreadLocalData if is_zero => (".tbss", SectionKind::Tls, MemProt::RW),
            Self::ThreadLocalData => (".tdata", SectionKind::Tls, MemProt::RW),
        }
    }

    fn symbol(self) -> SymbolType {
        match self {
            Self::Function => SymbolType::Function,
            Self::ReadOnlyData | Self::WritableData => SymbolType::Object,
            Self::ThreadLocalData => SymbolType::Tls,
        }
    }
}

/// Priority of arrays of functions without one in their name: after all others.
const NO_PRIORITY: u32 = 65535;

/// Returns what a section of this name is for.
fn kind_by_name(name: &str) -> Option<SectionKind> {
    let (priority, reversed) = (NO_PRIORITY, false);
    match name {
        ".init_array" => Some(SectionKind::Init { priority, reversed }),
        ".fini_array" => Some(SectionKind::Fini { priority, reversed }),
        _ => None,
    }
}

/// The bytes of a graph: everything that its parts refer to, one after the other.
#[derive(Default)]
struct Pool(Vec<u8>);

impl Pool {
    fn add(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.0.len();
        self.0.extend_from_slice(bytes);
        start..self.0.len()
    }
}

/// Returns the graph of a definition.
pub(crate) fn graph(definition: Definition<'_>) -> anyhow::Result<LinkGraph> {
    let Definition { name, linkage, kind, section, content, align, references, eh_frame } = definition;
    let align = Align::new(align).ok_or_else(|| anyhow::anyhow!("the alignment {align} is not a power of two"))?;
    // What is to be written into has bytes.
    let zeros = match content {
        Init::Zeros(size) if !references.is_empty() => vec![0; size],
        _ => Vec::new(),
    };
    let content = if zeros.is_empty() { content } else { Init::Bytes(&zeros) };
    let (size, bytes): (u64, &[u8]) = match content {
        Init::Bytes(bytes) => (bytes.len() as u64, bytes),
        Init::Zeros(size) => (size as u64, &[]),
    };
    let mut pool = Pool::default();
    let content = match content {
        Init::Bytes(_) => Content::Object(pool.add(bytes)),
        Init::Zeros(_) => Content::ZeroFill,
    };
    let eh_frame = eh_frame.map(|section| (pool.add(&section.bytes), section.function_offset));
    let name_range = pool.add(name.as_bytes());
    let section_range = section.map(|name| pool.add(name.as_bytes()));
    let mut targets: HashMap<&Target, (SymbolId, Range<usize>)> = HashMap::new();
    for reference in &references {
        // Numbered after the symbol of the definition itself.
        let id = SymbolId::from_index(targets.len() as u32 + 1);
        targets.entry(&reference.target).or_insert_with(|| (id, pool.add(reference.target.name.as_bytes())));
    }
    let mut builder = GraphBuilder::new(name, Arch::X86_64, Bytes::from(pool.0));
    let (own_name, section_kind, prot) = kind.section(content == Content::ZeroFill);
    let (_, block) = builder.add_section(NewSection {
        name: section_range.map_or(Text::Own(own_name), Text::Object),
        kind: section.and_then(kind_by_name).unwrap_or(section_kind),
        group: AllocGroup::standard(prot),
        comdat: None,
        retain: true,
        is_large: false,
        content,
        size,
        align,
    });
    let place = Place::Defined { block, offset: 0 };
    let weak =
        if linkage == Linkage::Preemptible { farlink_graph::Linkage::Weak } else { farlink_graph::Linkage::Strong };
    let own = builder.add_symbol(Text::Object(name_range), place, size, weak, Scope::Default, kind.symbol());
    let mut in_order: Vec<_> = targets.iter().collect();
    in_order.sort_by_key(|(_, (id, _))| *id);
    for (target, (_, name)) in in_order {
        let kind = if target.is_thread_local { SymbolType::Tls } else { SymbolType::None };
        let place = Place::External { weak: target.weak };
        let (strong, scope) = (farlink_graph::Linkage::Strong, Scope::Default);
        builder.add_symbol(Text::Object(name.clone()), place, 0, strong, scope, kind);
    }
    let edge = |reference: &Reference| edge(reference, targets[&reference.target].0, size);
    let edges: Vec<Edge> = references.iter().map(edge).collect::<anyhow::Result<_>>()?;
    builder.add_edges(block, edges);
    if let Some((range, function_offset)) = eh_frame {
        add_eh_frame(&mut builder, range, function_offset, own);
    }
    Ok(builder.finish()?)
}

fn add_eh_frame(builder: &mut GraphBuilder, range: Range<usize>, function_offset: u64, function: SymbolId) {
    let (_, block) = builder.add_section(NewSection {
        name: Text::Own(".eh_frame"),
        kind: SectionKind::EhFrame,
        group: AllocGroup::standard(MemProt::READ),
        comdat: None,
        retain: false,
        is_large: false,
        size: range.len() as u64,
        content: Content::Object(range),
        align: Align::new(8).expect("8 is a power of two"),
    });
    builder.add_edges(block, [Edge { offset: function_offset, kind: EdgeKind::Delta32, target: function, addend: 0 }]);
}

/// Returns the edge of a relocation.
fn edge(reference: &Reference, target: SymbolId, size: u64) -> anyhow::Result<Edge> {
    let kind = match reference.kind {
        Reloc::Abs4 => EdgeKind::Pointer32,
        Reloc::Abs8 => EdgeKind::Pointer64,
        Reloc::X86PCRel4 => EdgeKind::Delta32,
        // Through a stub if the target is far away.
        Reloc::X86CallPCRel4 | Reloc::X86CallPLTRel4 => EdgeKind::Branch32,
        Reloc::X86GOTPCRel4 => EdgeKind::GotPcRel32,
        Reloc::ElfX86_64TlsGd => EdgeKind::TlsGd,
        other => anyhow::bail!("the relocation {other} is not one of ELF for x86-64"),
    };
    let end = reference.offset.checked_add(kind.width());
    if end.is_none_or(|end| end > size) {
        anyhow::bail!("a relocation at {:#x} lies outside of what is defined, {size:#x} bytes", reference.offset);
    }
    Ok(Edge { offset: reference.offset, kind, target, addend: reference.addend })
}
