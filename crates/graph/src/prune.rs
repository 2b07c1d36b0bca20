//! Marking what is needed: a worklist from what other objects can see, what runs by itself, and what asks to be kept.

use crate::bounds::BoundedSections;
use crate::graph::LinkGraph;
use crate::parts::{Place, SectionKind};
use crate::{BlockId, SymbolId};

/// Marks the blocks that something live reaches, and the symbols that live blocks refer to.
///
/// Live from the start are the definitions that other objects can see, arrays of initializers and finalizers, and
/// sections that are to be retained. A live function keeps its unwind information; a reference to a bound of sections
/// (`__start_X`) keeps those.
pub fn prune(graph: &mut LinkGraph) {
    let mut work: Vec<BlockId> = Vec::new();
    let mut bounded = BoundedSections::new(graph);
    let roots: Vec<SymbolId> = graph.definitions().collect();
    for symbol in roots {
        reach(graph, symbol, &mut work);
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
    while let Some(block) = work.pop() {
        for index in graph.blocks[block.index()].edges.clone() {
            let target = graph.edges[index as usize].target;
            reach(graph, target, &mut work);
            for section in bounded.take(target) {
                for block in graph.section_blocks(section) {
                    mark(graph, block, &mut work);
                }
            }
        }
        let first = graph.keep_alive.partition_point(|&(keeper, _)| keeper < block);
        let mut next = first;
        while let Some(&(_, kept)) = graph.keep_alive.get(next).filter(|&&(keeper, _)| keeper == block) {
            mark(graph, kept, &mut work);
            next += 1;
        }
    }
}

fn reach(graph: &mut LinkGraph, symbol: SymbolId, work: &mut Vec<BlockId>) {
    let symbol = &mut graph.symbols[symbol.index()];
    symbol.live = true;
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
