//! Entries of the GOT and stubs that nobody needs as long as their targets are in reach.
//!
//! Where things come to be is only known after memory has been taken, and what tables there are decides how much that is. So
//! tables are first built without the entries that targets in reach do without, which as a rule all targets are: linked
//! code, and shared libraries, which systems map beside each other. If one turns out not to be, the graph gets the entries
//! and is laid out again.

use crate::edge::{Edge, EdgeKind};
use crate::graph::LinkGraph;
use crate::tables::{build_got, build_stubs};
use crate::x86_64::{FIELD_IS_LAST, relax};
use crate::{BlockId, SymbolId};
use farlink_addr::ExecutorAddr;

/// An address that is no 32-bit number.
const FAR: u64 = 1 << 40;

/// Whether an edge of `block`, one that leads through a table, may do so without: then it has a form without an entry that
/// reaches what is near. What a weak reference does not find is never near.
pub(crate) fn may_do_without(graph: &LinkGraph, block: BlockId, edge: &Edge) -> bool {
    !graph.is_weak_external(edge.target) && (edge.kind.is_branch() || is_relaxed(graph, block, edge, 0, FAR))
}

/// Whether the instruction of an edge has a form without a GOT slot for a target at an address and a distance.
fn is_relaxed(graph: &LinkGraph, block: BlockId, edge: &Edge, distance: i64, target: u64) -> bool {
    let code = graph.block_content(block);
    edge.kind.may_relax()
        && edge.addend == FIELD_IS_LAST
        && relax(edge.kind, code, edge.offset as usize, distance, target).is_some()
}

/// Returns the symbols that have no entries in the tables of `graph` and need them, now that everything has its address.
#[must_use]
pub fn missing_entries(graph: &LinkGraph) -> Vec<SymbolId> {
    let direct = graph.tables.direct.iter().map(|&(block, index)| (block, graph.edges[index as usize]));
    let missing = direct.filter(|(block, edge)| !reaches(graph, *block, edge));
    missing.map(|(_, edge)| edge.target).collect()
}

fn reaches(graph: &LinkGraph, block: BlockId, edge: &Edge) -> bool {
    // At 0 is what has not been found.
    let target = graph.symbol_address(edge.target).map_or(0, ExecutorAddr::as_u64);
    let field = graph.block(block).addr.as_u64().wrapping_add(edge.offset);
    let distance = target.wrapping_sub(field) as i64;
    let is_branched_to = || distance.checked_add(edge.addend).is_some_and(|value| i32::try_from(value).is_ok());
    match edge.kind {
        _ if target == 0 => false,
        EdgeKind::Branch32 | EdgeKind::Branch32Bnd => is_branched_to(),
        _ => is_relaxed(graph, block, edge, distance, target),
    }
}

/// Adds all entries that the tables of `graph` do without. It has to be laid out again, and its symbols get their addresses
/// once more.
pub fn add_entries(graph: &mut LinkGraph) {
    if graph.tables.direct.is_empty() {
        return;
    }
    for (_, index) in std::mem::take(&mut graph.tables.direct) {
        let edge = graph.edges[index as usize];
        if edge.kind.is_branch() {
            graph.tables.stubs.add(edge.target);
        }
        graph.tables.got.add(edge.target);
    }
    // The tables are made anew.
    for old in [graph.tables.got.block.take(), graph.tables.stubs.block.take()].into_iter().flatten() {
        graph.blocks[old.index()].live = false;
    }
    build_got(graph, true);
    build_stubs(graph);
}
