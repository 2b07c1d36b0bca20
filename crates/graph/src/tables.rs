//! What live edges need besides the object's own sections: GOT slots, stubs, support code, the end of `.eh_frame`.
//!
//! Also the place where what is not supported is refused: only if something live needs it.

use crate::bounds::define_bounds;
use crate::builder::{define, edge};
use crate::edge::EdgeKind;
use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::{Content, Linkage, Place, Scope, SectionKind, Symbol, SymbolType, Text};
use crate::x86_64::{ENTRY_BYTES, FIELD_IS_LAST, STUB, STUB_SLOT_OFFSET, SUPPORT, is_branch_field};
use crate::{BlockId, SymbolId};
use farlink_addr::{Align, MemProt};

/// The name of the GOT's address.
const GOT_NAME: &str = "_GLOBAL_OFFSET_TABLE_";

const DSO_HANDLE: &str = "__dso_handle";

/// Alignment of tables and handles in bytes.
const TABLE_ALIGN: Align = match Align::new(ENTRY_BYTES) {
    Some(align) => align,
    None => unreachable!(),
};

/// Why a local symbol is not linked.
const LOST: &str = "a COMDAT group of which another object's copy is used";
const NOT_LINKED: &str = "a section that is not linked as it is (debug or unwind information, for one)";

/// Builds the tables that the live edges of `graph` need. Call it once, after pruning.
///
/// # Errors
///
/// Fails if something live needs what is not supported: thread-local storage, IFUNCs, other relocations, or a
/// discarded COMDAT group's local symbol. The graph keeps the error: it will not be laid out, then or later.
pub fn build_tables(graph: &mut LinkGraph) -> Result<(), LinkError> {
    let outcome = refuse_unsupported(graph).and_then(|()| define_bounds(graph));
    if let Err(error) = outcome {
        graph.refused = Some(error.clone());
        return Err(error);
    }
    build_support(graph);
    end_eh_frame(graph);
    let needs_got = collect_entries(graph);
    build_got(graph, needs_got);
    build_stubs(graph);
    Ok(())
}

/// Returns the live blocks.
fn live_blocks(graph: &LinkGraph) -> Vec<BlockId> {
    let ids = (0..graph.blocks.len() as u32).map(BlockId);
    ids.filter(|&id| graph.block(id).live).collect()
}

fn refuse_unsupported(graph: &LinkGraph) -> Result<(), LinkError> {
    for symbol in graph.symbol_ids().filter(|&id| graph.symbol(id).live) {
        let what = match graph.symbol(symbol).kind {
            SymbolType::Tls => "thread-local variables",
            SymbolType::IndirectFunction => "IFUNC symbols",
            _ => continue,
        };
        let (object, symbol) = (graph.name.clone(), graph.symbol_label(symbol));
        return Err(LinkError::UnsupportedSymbol { object, what, symbol });
    }
    for block in live_blocks(graph) {
        let section = graph.block(block).section;
        if graph.section(section).kind == SectionKind::Tls {
            let symbol = graph.section_name(section).to_owned();
            return Err(LinkError::UnsupportedSymbol {
                object: graph.name.clone(),
                what: "thread-local variables",
                symbol,
            });
        }
        for edge in graph.block_edges(block) {
            let place = || graph.place_label(block, edge.offset);
            let symbol = || graph.symbol_label(edge.target);
            if let EdgeKind::Unsupported(_) = edge.kind {
                let (relocation, is_tls) = (edge.kind.to_string(), edge.kind.is_tls());
                return Err(LinkError::UnsupportedRelocation { place: place(), relocation, symbol: symbol(), is_tls });
            }
            let target = graph.symbol(edge.target);
            if target.place == Place::Discarded {
                let what = if target.lost.is_some() { LOST } else { NOT_LINKED };
                return Err(LinkError::DiscardedTarget { place: place(), symbol: symbol(), what });
            }
            let is_size = matches!(edge.kind, EdgeKind::Size32 | EdgeKind::Size64);
            if is_size && matches!(target.place, Place::External { .. }) {
                let relocation = edge.kind.to_string();
                return Err(LinkError::UnknownSize { place: place(), relocation, symbol: symbol() });
            }
        }
    }
    Ok(())
}

/// Returns the live external symbol of that name.
fn find_external(graph: &LinkGraph, name: &str) -> Option<SymbolId> {
    graph.externals().find(|&id| graph.symbol_name(id) == name)
}

/// Adds the object's handle, and the functions made with it, if something live wants them.
fn build_support(graph: &mut LinkGraph) {
    let wanted: Vec<_> =
        SUPPORT.iter().filter_map(|function| Some((function, find_external(graph, function.name)?))).collect();
    let handle_wanted = find_external(graph, DSO_HANDLE);
    let has_arrays = graph.sections().any(|id| {
        let runs = matches!(graph.section(id).kind, SectionKind::Init { .. } | SectionKind::Fini { .. });
        runs && graph.section_blocks(id).any(|block| graph.block(block).live)
    });
    if wanted.is_empty() && handle_wanted.is_none() && !has_arrays {
        return;
    }
    let handle = own_handle(graph).unwrap_or_else(|| build_handle(graph, handle_wanted));
    graph.dso_handle = Some(handle);
    for (function, external) in wanted {
        let callee = external_symbol(graph, function.callee);
        let code = function.code.to_vec();
        let block = graph.push_own("$__SUPPORT", SectionKind::Regular, MemProt::RX, code, TABLE_ALIGN);
        let edges = [
            edge(function.handle_offset, EdgeKind::Delta32, handle, FIELD_IS_LAST),
            edge(function.jump_offset, EdgeKind::Branch32, callee, FIELD_IS_LAST),
        ];
        graph.push_edges(block, edges);
        define(graph, external, block, 0);
    }
}

/// Returns the handle that the object defines itself, as start-up files do.
fn own_handle(graph: &LinkGraph) -> Option<SymbolId> {
    let is_live = |id: &SymbolId| match graph.symbol(*id).place {
        Place::Defined { block, .. } => graph.block(block).live,
        _ => false,
    };
    graph.symbol_ids().filter(is_live).find(|&id| graph.symbol_name(id) == DSO_HANDLE)
}

/// Adds the object's handle: a pointer to itself. `wanted` is the external symbol that becomes it.
fn build_handle(graph: &mut LinkGraph, wanted: Option<SymbolId>) -> SymbolId {
    let bytes = vec![0; ENTRY_BYTES as usize];
    let block = graph.push_own("$__DSO_HANDLE", SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
    let handle = graph.push_local(DSO_HANDLE, block, 0);
    graph.push_edges(block, [edge(0, EdgeKind::Pointer64, handle, 0)]);
    if let Some(external) = wanted {
        define(graph, external, block, 0);
    }
    handle
}

/// Returns a live strong external symbol of that name.
fn external_symbol(graph: &mut LinkGraph, name: &'static str) -> SymbolId {
    find_external(graph, name).unwrap_or_else(|| {
        graph.push_symbol(Symbol {
            name: Text::Own(name),
            place: Place::External { weak: false },
            size: 0,
            linkage: Linkage::Strong,
            scope: Scope::Default,
            kind: SymbolType::Function,
            live: true,
            addr: None,
            lost: None,
        })
    })
}

/// Adds the zero that ends unwind information.
fn end_eh_frame(graph: &mut LinkGraph) {
    let is_live = |id| {
        graph.section(id).kind == SectionKind::EhFrame && graph.section_blocks(id).any(|block| graph.block(block).live)
    };
    if graph.sections().any(is_live) {
        graph.push_own(".eh_frame", SectionKind::EhFrame, MemProt::READ, vec![0; 4], Align::ONE);
    }
}

/// Finds which symbols need a GOT slot or a stub. Returns whether the GOT's address is needed.
fn collect_entries(graph: &mut LinkGraph) -> bool {
    let mut needs_got = false;
    if let Some(external) = find_external(graph, GOT_NAME) {
        graph.symbols[external.index()].scope = Scope::Local;
        needs_got = true;
    }
    for block in live_blocks(graph) {
        for index in graph.block(block).edges.clone() {
            let edge = graph.edges[index as usize];
            if edge.kind == EdgeKind::Delta32 && is_old_branch(graph, block, &edge) {
                graph.edges[index as usize].kind = EdgeKind::Branch32;
            }
            let kind = graph.edges[index as usize].kind;
            let is_defined = matches!(graph.symbol(edge.target).place, Place::Defined { .. });
            if kind == EdgeKind::Branch32 && !is_defined {
                graph.stubs.add(edge.target);
                graph.got.add(edge.target);
            }
            if kind.needs_got_slot() {
                graph.got.add(edge.target);
            }
            needs_got |= kind.needs_got();
        }
    }
    needs_got || !graph.got.targets.is_empty()
}

/// Whether a PC32 edge is that of a call or jump to a function elsewhere: assemblers wrote those before PLT32.
fn is_old_branch(graph: &LinkGraph, block: BlockId, edge: &crate::Edge) -> bool {
    let target = graph.symbol(edge.target);
    let code = graph.section(graph.block(block).section).group.prot.contains(MemProt::EXEC);
    code && edge.addend == FIELD_IS_LAST
        && matches!(target.place, Place::External { .. } | Place::Absolute(_))
        && matches!(target.kind, SymbolType::None | SymbolType::Function)
        && is_branch_field(graph.block_content(block), edge.offset as usize)
}

fn build_got(graph: &mut LinkGraph, needed: bool) {
    if !needed {
        return;
    }
    let targets = graph.got.targets.clone();
    // A GOT without slots still has an address.
    let bytes = vec![0; targets.len().max(1) * ENTRY_BYTES as usize];
    let block = graph.push_own("$__GOT", SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
    let slots = targets.into_iter().zip(0..);
    graph.push_edges(block, slots.map(|(target, slot)| edge(slot * ENTRY_BYTES, EdgeKind::Pointer64, target, 0)));
    graph.got.block = Some(block);
    if let Some(external) = find_external(graph, GOT_NAME) {
        define(graph, external, block, 0);
    }
}

fn build_stubs(graph: &mut LinkGraph) {
    let (Some(got), false) = (graph.got.block, graph.stubs.targets.is_empty()) else { return };
    let got_start = graph.push_local("", got, 0);
    let targets = graph.stubs.targets.clone();
    let bytes = STUB.repeat(targets.len());
    let block = graph.push_own("$__STUBS", SectionKind::Regular, MemProt::RX, bytes, TABLE_ALIGN);
    let slot = |target| i64::from(graph.got.position(target).unwrap_or_default()) * ENTRY_BYTES as i64;
    let edges: Vec<_> = targets
        .iter()
        .zip(0..)
        .map(|(&target, position)| {
            let offset = position * ENTRY_BYTES + STUB_SLOT_OFFSET;
            edge(offset, EdgeKind::Delta32, got_start, slot(target) + FIELD_IS_LAST)
        })
        .collect();
    graph.push_edges(block, edges);
    graph.stubs.block = Some(block);
    debug_assert!(matches!(graph.block(block).content, Content::Own(_)));
}
