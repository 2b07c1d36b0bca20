//! Marking what is needed: a worklist from what is needed in any case, and from what turns out to be.
//!
//! May be called again with more to mark: each block is visited once.

use crate::bounds::array_kind;
use crate::graph::LinkGraph;
use crate::parts::{Place, SectionKind};
use crate::{BlockId, SymbolId};

/// Marks the blocks that are needed in any case and what they reach, and the symbols that those refer to.
///
/// Needed in any case are arrays of initializers and finalizers, sections that are to be retained and, if
/// `keeps_definitions` is set, the definitions that other objects can see. A live function keeps its unwind information.
pub fn prune(graph: &mut LinkGraph, keeps_definitions: bool) {
    let mut work: Vec<BlockId> = Vec::new();
    if keeps_definitions {
        let roots: Vec<SymbolId> = graph.definitions().collect();
        for symbol in roots {
            reach(graph, symbol, &mut work);
        }
    }
    for section in graph.sections() {
        let info = graph.section(section);
        let runs = matches!(info.kind, SectionKind::Init { .. } | SectionKind::Fini { .. });
        if runs || info.retain {
            for block in graph.section_blocks(section) {
                mark(graph, block, &mut work);
            }
        }
    }
    finish(graph, work);
}

/// Marks a symbol, and what its block reaches.
pub fn mark_symbol(graph: &mut LinkGraph, symbol: SymbolId) {
    let mut work = Vec::new();
    reach(graph, symbol, &mut work);
    finish(graph, work);
}

/// Marks the sections named `name`, or the arrays of that kind, and what they reach.
pub fn mark_sections(graph: &mut LinkGraph, name: &str) {
    let mut work = Vec::new();
    for section in graph.sections() {
        if is_in_set(graph, section, name) {
            for block in graph.section_blocks(section) {
                mark(graph, block, &mut work);
            }
        }
    }
    finish(graph, work);
}

/// Whether a section belongs to the set of that name.
pub(crate) fn is_in_set(graph: &LinkGraph, section: crate::SectionId, name: &str) -> bool {
    match array_kind(name) {
        Some(is_in) => is_in(graph.section(section).kind),
        None => graph.section_name(section) == name,
    }
}

fn finish(graph: &mut LinkGraph, mut work: Vec<BlockId>) {
    while let Some(block) = work.pop() {
        for index in graph.blocks[block.index()].edges.clone() {
            let target = graph.edges[index as usize].target;
            reach(graph, target, &mut work);
        }
        let first = graph.keep_alive.partition_point(|&(keeper, _)| keeper < block);
        let mut next = first;
        while let Some(&(_, kept)) = graph.keep_alive.get(next).filter(|&&(keeper, _)| keeper == block) {
            mark(graph, kept, &mut work);
            next += 1;
        }
    }
}

fn reach(graph: &mut LinkGraph, id: SymbolId, work: &mut Vec<BlockId>) {
    let symbol = &mut graph.symbols[id.index()];
    if !symbol.live {
        symbol.live = true;
        graph.newly_live.push(id);
    }
    if let Place::Defined { block, .. } = symbol.place {
        mark(graph, block, work);
    }
}

fn mark(graph: &mut LinkGraph, block: BlockId, work: &mut Vec<BlockId>) {
    let info = &mut graph.blocks[block.index()];
    if !info.live && !info.discarded {
        info.live = true;
        work.push(block);
    }
}
