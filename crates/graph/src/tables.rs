//! What live edges need besides the object's own sections: GOT slots, stubs, the slots of IFUNCs, the index and the end of
//! `.eh_frame`.
//!
//! Also the place where what is not supported is refused: only if something live needs it.

use crate::builder::edge;
use crate::edge::{EdgeKind, TlsUse};
use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::{Place, Scope, SectionKind, Symbol, SymbolType, Table};
use crate::provide::{TABLE_ALIGN, provide_handle_for_arrays};
use crate::reach::may_do_without;
use crate::unwind_index::build_unwind_index;
use crate::x86_64::{ENTRY_BYTES, FIELD_IS_LAST, STUB, STUB_SLOT_OFFSET, is_branch_field};
use crate::{BlockId, SymbolId};
use farlink_addr::{Align, MemProt};

/// Bytes of a GOT slot for a module and an offset.
pub(crate) const TLS_ENTRY_BYTES: u64 = 16;

/// Why a local symbol is not linked.
const LOST: &str = "a COMDAT group of which another object's copy is used";
const NOT_LINKED: &str = "a section that is not linked as it is (debug or unwind information, for one)";

/// Builds the tables that the live edges of `graph` need. Call it once, when nothing more becomes live.
///
/// Targets for whose names `is_far` does not hold get no entries that they do without while they are in reach:
/// [`missing_entries`](crate::missing_entries) says later whether they are.
///
/// # Errors
///
/// Fails if something live needs what is not supported: relocations that are not known, the size of what is not known, a
/// discarded COMDAT group's local symbol, or a thread-local variable as if it were another or the other way round.
pub fn build_tables(graph: &mut LinkGraph, is_far: impl Fn(&str) -> bool) -> Result<(), LinkError> {
    refuse_unsupported(graph)?;
    provide_handle_for_arrays(graph);
    build_ifuncs(graph);
    let needs_got = collect_entries(graph, is_far);
    build_got(graph, needs_got);
    build_stubs(graph);
    build_tls_slots(graph);
    // Behind the others: what follows them needs no larger alignment than they.
    build_unwind_index(graph);
    end_eh_frame(graph);
    Ok(())
}

/// Returns the live blocks.
pub(crate) fn live_blocks(graph: &LinkGraph) -> Vec<BlockId> {
    let ids = (0..graph.blocks.len() as u32).map(BlockId);
    ids.filter(|&id| graph.block(id).live).collect()
}

fn refuse_unsupported(graph: &mut LinkGraph) -> Result<(), LinkError> {
    let mut thread_local = Vec::new();
    for block in live_blocks(graph) {
        for edge in graph.block_edges(block) {
            let place = || graph.place_label(block, edge.offset);
            let symbol = || graph.symbol_label(edge.target);
            let relocation = || edge.kind.to_string();
            if let EdgeKind::Unsupported(_) = edge.kind {
                return Err(LinkError::UnsupportedRelocation {
                    place: place(),
                    relocation: relocation(),
                    symbol: symbol(),
                });
            }
            let target = graph.symbol(edge.target);
            if target.place == Place::Discarded {
                let what = if target.lost.is_some() { LOST } else { NOT_LINKED };
                return Err(LinkError::DiscardedTarget { place: place(), symbol: symbol(), what });
            }
            let is_size = matches!(edge.kind, EdgeKind::Size32 | EdgeKind::Size64);
            if is_size && matches!(target.place, Place::External { .. }) && target.size == 0 {
                return Err(LinkError::UnknownSize { place: place(), relocation: relocation(), symbol: symbol() });
            }
            if edge.kind.tls_use().is_some() && matches!(target.place, Place::External { .. }) {
                thread_local.push(edge.target);
            }
            let is_value = !is_size && edge.kind.tls_use() != Some(TlsUse::LocalSlot);
            if is_value && edge.kind.tls_use().is_some() != is_thread_local(graph, edge.target, edge.kind) {
                return Err(LinkError::TlsMismatch { place: place(), relocation: relocation(), symbol: symbol() });
            }
        }
    }
    for symbol in thread_local {
        graph.symbols[symbol.index()].kind = SymbolType::Tls;
    }
    Ok(())
}

/// Whether a symbol that an edge of `kind` refers to is thread-local. What is defined elsewhere is what it is used as.
fn is_thread_local(graph: &LinkGraph, id: SymbolId, kind: EdgeKind) -> bool {
    match graph.symbol(id).place {
        Place::Defined { block, .. } => graph.section(graph.block(block).section).kind == SectionKind::Tls,
        Place::External { .. } => kind.tls_use().is_some(),
        Place::Absolute(_) | Place::Discarded => graph.tls_base == Some(id),
    }
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

/// Puts a stub in the place of every live IFUNC, so that all that refers to it, by whatever edge, gets one address. The
/// stub jumps through a slot that the executor fills in before anything of the object runs.
fn build_ifuncs(graph: &mut LinkGraph) {
    let is_ifunc = |id: &SymbolId| {
        let symbol = graph.symbol(*id);
        let is_live = matches!(symbol.place, Place::Defined { block, .. } if graph.block(block).live);
        symbol.kind == SymbolType::IndirectFunction && is_live
    };
    let ifuncs: Vec<SymbolId> = graph.symbol_ids().filter(is_ifunc).collect();
    if ifuncs.is_empty() {
        return;
    }
    let bytes = |entry: &[u8]| entry.repeat(ifuncs.len());
    let (kind, slots) = (SectionKind::Regular, bytes(&[0; ENTRY_BYTES as usize]));
    let slots = graph.push_own("$__IFUNC_SLOTS", kind, MemProt::RW, slots, TABLE_ALIGN);
    let stubs = graph.push_own("$__IFUNC_STUBS", kind, MemProt::RX, bytes(&STUB), TABLE_ALIGN);
    let mut edges = Vec::with_capacity(ifuncs.len());
    for (&ifunc, position) in ifuncs.iter().zip(0..) {
        let offset = position * ENTRY_BYTES;
        let slot = graph.push_local("", slots, offset);
        let resolver = graph.push_symbol(Symbol { scope: Scope::Local, ..graph.symbol(ifunc).clone() });
        graph.symbols[resolver.index()].kind = SymbolType::Function;
        let symbol = &mut graph.symbols[ifunc.index()];
        symbol.place = Place::Defined { block: stubs, offset };
        symbol.kind = SymbolType::Function;
        edges.push(edge(offset + STUB_SLOT_OFFSET, EdgeKind::Delta32, slot, FIELD_IS_LAST));
        graph.tables.ifuncs.push((slot, resolver));
    }
    graph.push_edges(stubs, edges);
}

/// Finds which symbols need a GOT slot or a stub. Returns whether the GOT's address is needed.
fn collect_entries(graph: &mut LinkGraph, is_far: impl Fn(&str) -> bool) -> bool {
    // Code that names the GOT may read what is in it: all of it is there then.
    let is_whole = graph.got_symbol.is_some();
    let mut needs_got = is_whole;
    for block in live_blocks(graph) {
        for index in graph.block(block).edges.clone() {
            let edge = graph.edges[index as usize];
            if matches!(edge.kind, EdgeKind::Delta32 | EdgeKind::Delta32Bnd) && is_old_branch(graph, block, &edge) {
                graph.edges[index as usize].kind = EdgeKind::Branch32;
            }
            let edge = graph.edges[index as usize];
            let kind = edge.kind;
            let has_stub = kind.is_branch() && !matches!(graph.symbol(edge.target).place, Place::Defined { .. });
            if has_stub || kind.needs_got_slot() {
                let is_direct = !is_whole && may_do_without(graph, block, &edge);
                if is_direct && !is_far(graph.symbol_name(edge.target)) {
                    graph.tables.direct.push((block, index));
                } else {
                    graph.tables.got.add(edge.target);
                    if has_stub {
                        graph.tables.stubs.add(edge.target);
                    }
                }
            }
            needs_got |= kind.needs_got();
            match kind.tls_use() {
                Some(TlsUse::TpOffset) => graph.static_tls.push(edge.target),
                Some(TlsUse::TpOffsetSlot) => {
                    graph.static_tls.push(edge.target);
                    graph.tables.tp_offsets.add(edge.target);
                }
                Some(TlsUse::GeneralSlot) => graph.tables.tls_general.add(edge.target),
                Some(TlsUse::LocalSlot) if graph.tables.tls_local.is_none() => {
                    let bytes = vec![0; TLS_ENTRY_BYTES as usize];
                    let block = graph.push_own("$__GOT_TLSLD", SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
                    let start = graph.push_local("", block, 0);
                    graph.push_edges(block, [crate::builder::edge(0, EdgeKind::DtpMod64, start, 0)]);
                    graph.tables.tls_local = Some(block);
                }
                Some(TlsUse::LocalSlot | TlsUse::LocalOffset | TlsUse::Module | TlsUse::Call) | None => {}
            }
        }
    }
    graph.static_tls.sort_unstable();
    graph.static_tls.dedup();
    needs_got || !graph.tables.got.targets.is_empty()
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

/// Adds a block of entries of `bytes` bytes, each written by an edge for each of `kinds`, 8 bytes apart.
fn push_table(graph: &mut LinkGraph, name: &'static str, table: &Table, kinds: &[EdgeKind]) -> BlockId {
    let entry_bytes = kinds.len() as u64 * ENTRY_BYTES;
    // A GOT without slots still has an address.
    let bytes = vec![0; table.targets.len().max(1) * entry_bytes as usize];
    let block = graph.push_own(name, SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
    let slots = table.targets.iter().zip(0..);
    let edges = slots.flat_map(|(&target, slot)| {
        let parts = kinds.iter().zip(0..);
        parts.map(move |(&kind, part)| edge(slot * entry_bytes + part * ENTRY_BYTES, kind, target, 0))
    });
    graph.push_edges(block, edges);
    block
}

pub(crate) fn build_got(graph: &mut LinkGraph, needed: bool) {
    if !needed {
        return;
    }
    let table = std::mem::take(&mut graph.tables.got);
    let block = push_table(graph, "$__GOT", &table, &[EdgeKind::Pointer64]);
    graph.tables.got = Table { block: Some(block), ..table };
    if let Some(symbol) = graph.got_symbol {
        graph.symbols[symbol.index()].place = Place::Defined { block, offset: 0 };
    }
}

fn build_tls_slots(graph: &mut LinkGraph) {
    let table = std::mem::take(&mut graph.tables.tp_offsets);
    if !table.targets.is_empty() {
        let block = push_table(graph, "$__GOT_TPOFF", &table, &[EdgeKind::TpOff64]);
        graph.tables.tp_offsets = Table { block: Some(block), ..table };
    }
    let table = std::mem::take(&mut graph.tables.tls_general);
    if !table.targets.is_empty() {
        let block = push_table(graph, "$__GOT_TLSGD", &table, &[EdgeKind::DtpMod64, EdgeKind::DtpOff64]);
        graph.tables.tls_general = Table { block: Some(block), ..table };
    }
}

pub(crate) fn build_stubs(graph: &mut LinkGraph) {
    let (Some(got), false) = (graph.tables.got.block, graph.tables.stubs.targets.is_empty()) else { return };
    let got_start = graph.push_local("", got, 0);
    let targets = graph.tables.stubs.targets.clone();
    let bytes = STUB.repeat(targets.len());
    let block = graph.push_own("$__STUBS", SectionKind::Regular, MemProt::RX, bytes, TABLE_ALIGN);
    let slot = |target| i64::from(graph.tables.got.position(target).unwrap_or_default()) * ENTRY_BYTES as i64;
    let edges: Vec<_> = targets
        .iter()
        .zip(0..)
        .map(|(&target, position)| {
            let offset = position * ENTRY_BYTES + STUB_SLOT_OFFSET;
            edge(offset, EdgeKind::Delta32, got_start, slot(target) + FIELD_IS_LAST)
        })
        .collect();
    graph.push_edges(block, edges);
    graph.tables.stubs.block = Some(block);
}
