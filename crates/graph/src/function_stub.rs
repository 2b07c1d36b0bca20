//! Addresses of functions in shared libraries for code with 32-bit absolute addresses.
//!
//! Such code cannot hold the address of what is far away. Of a function it can be given that of a stub, as long as everybody
//! else is given the same one: in the same way, natively, a function's address is that of its entry in the program's PLT.

use crate::SymbolId;
use crate::builder::edge;
use crate::edge::EdgeKind;
use crate::graph::LinkGraph;
use crate::parts::{Place, SectionKind, Symbol};
use crate::provide::TABLE_ALIGN;
use crate::tables::live_blocks;
use farlink_addr::MemProt;

/// `jmp *8(%rip)` to the address behind it, after two bytes that trap if they are ever reached.
const CODE: [u8; 16] = [0xff, 0x25, 2, 0, 0, 0, 0xcc, 0xcc, 0, 0, 0, 0, 0, 0, 0, 0];

/// Offset of the address in the stub.
const ADDRESS_OFFSET: u64 = 8;

/// A stub that can be the address of an external function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionStub {
    /// Where it is.
    pub stub: SymbolId,
    /// The external symbol of the function that it jumps to, which has to get the function's own address.
    pub function: SymbolId,
}

/// Returns the external symbols whose addresses have to fit in 32 bits, sorted.
#[must_use]
pub fn absolute_externals(graph: &LinkGraph) -> Vec<SymbolId> {
    let is_absolute = |kind| matches!(kind, EdgeKind::Pointer32 | EdgeKind::Pointer32Signed);
    let is_external = |id: SymbolId| matches!(graph.symbol(id).place, Place::External { .. });
    let blocks = live_blocks(graph);
    let edges = blocks.iter().flat_map(|&block| graph.block_edges(block)).filter(|edge| is_absolute(edge.kind));
    let mut symbols: Vec<_> = edges.map(|edge| edge.target).filter(|&id| is_external(id)).collect();
    symbols.sort_unstable();
    symbols.dedup();
    symbols
}

/// Adds a stub for the external symbol `id`.
pub fn add_function_stub(graph: &mut LinkGraph, id: SymbolId) -> FunctionStub {
    let function = graph.push_symbol(Symbol { ..graph.symbol(id).clone() });
    let name = "$__FUNCTION_STUB";
    let block = graph.push_own(name, SectionKind::Regular, MemProt::RX, CODE.to_vec(), TABLE_ALIGN);
    graph.push_edges(block, [edge(ADDRESS_OFFSET, EdgeKind::Pointer64, function, 0)]);
    FunctionStub { stub: graph.push_local("", block, 0), function }
}
