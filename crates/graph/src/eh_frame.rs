//! Splitting `.eh_frame` into its records, so that those of functions that are not linked can be left out.
//!
//! A record begins with its length (4 bytes, not counting themselves). The next 4 bytes are 0 in a common information
//! entry (CIE); in a frame description entry (FDE) they are the distance back to its CIE, and the address of its
//! function follows. The function keeps its FDE alive; the FDE keeps its CIE and what else it refers to. A record is
//! not understood any further, so every augmentation is as good as another.
//!
//! See the Linux Standard Base, Core, section "Exception Frames".

use crate::builder::edge;
use crate::edge::{Edge, EdgeKind};
use crate::graph::LinkGraph;
use crate::parts::{Content, Place, SectionKind};
use crate::{BlockId, LinkError, SectionId, SymbolId};
use farlink_addr::Align;
use std::collections::HashMap;
use std::ops::Range;

/// Offset in a record of the CIE pointer.
const ID_OFFSET: u64 = 4;

/// Offset in an FDE of its function's address.
const FUNCTION_OFFSET: u64 = 8;

pub(crate) fn split_eh_frame(graph: &mut LinkGraph) -> Result<(), LinkError> {
    let sections: Vec<_> = graph.sections().filter(|&id| graph.section(id).kind == SectionKind::EhFrame).collect();
    for section in sections {
        split(graph, section)?;
    }
    graph.keep_alive.sort_unstable();
    Ok(())
}

fn malformed(graph: &LinkGraph, offset: u64, what: &'static str) -> LinkError {
    LinkError::BadEhFrame { object: graph.name.clone(), offset, what }
}

fn split(graph: &mut LinkGraph, section: SectionId) -> Result<(), LinkError> {
    let Some(whole) = graph.section_blocks(section).next() else { return Ok(()) };
    let Content::Object(bytes) = graph.block(whole).content.clone() else { return Ok(()) };
    let mut edges = graph.block_edges(whole).to_vec();
    edges.sort_by_key(|edge| edge.offset);
    let records = records(graph, &graph.bytes[bytes.clone()])?;

    // The records replace the section's one block, which is left without bytes.
    let first = graph.blocks.len() as u32;
    graph.sections[section.index()].blocks = first..first;
    let mut cies: HashMap<u64, SymbolId> = HashMap::new();
    let mut edges = edges.into_iter().peekable();
    for record in records {
        let content = Content::Object(bytes.start + record.start as usize..bytes.start + record.end as usize);
        // A gap between two records would read as the zero that ends the section.
        let block = graph.push_block(section, content, record.end - record.start, Align::ONE);
        let mut own = Vec::new();
        while let Some(edge) = edges.next_if(|edge| edge.offset < record.end) {
            if edge.offset + edge.kind.width() > record.end {
                return Err(malformed(graph, edge.offset, "a relocation crosses the end of its record"));
            }
            if edge.offset >= record.start {
                own.push(Edge { offset: edge.offset - record.start, ..edge });
            }
        }
        let id = read_u32(graph.block_content(block), ID_OFFSET as usize).unwrap_or_default();
        if id == 0 {
            cies.insert(record.start, graph.push_local("", block, 0));
        } else {
            let cie = (record.start + ID_OFFSET).checked_sub(u64::from(id)).and_then(|start| cies.get(&start));
            let cie = *cie.ok_or_else(|| malformed(graph, record.start, "the record's CIE is not before it"))?;
            keep_with_function(graph, block, &own, record.start)?;
            own.push(edge(ID_OFFSET, EdgeKind::CiePointer, cie, 0));
        }
        graph.push_edges(block, own);
    }
    // Symbols in the section itself (its section symbol) have no place any more.
    graph.blocks[whole.index()].discarded = true;
    graph.blocks[whole.index()].edges = 0..0;
    Ok(())
}

/// Makes the function of an FDE keep it alive.
fn keep_with_function(graph: &mut LinkGraph, fde: BlockId, edges: &[Edge], at: u64) -> Result<(), LinkError> {
    let function = edges.iter().find(|edge| edge.offset == FUNCTION_OFFSET);
    let function = function.ok_or_else(|| malformed(graph, at, "the record has no relocation for its function"))?;
    if let Place::Defined { block, .. } = graph.symbol(function.target).place {
        graph.keep_alive.push((block, fde));
    }
    Ok(())
}

/// Returns the ranges of the records.
fn records(graph: &LinkGraph, bytes: &[u8]) -> Result<Vec<Range<u64>>, LinkError> {
    let mut records = Vec::new();
    let mut start = 0u64;
    while (start as usize) < bytes.len() {
        let length = read_u32(bytes, start as usize).ok_or_else(|| malformed(graph, start, "a length is cut off"))?;
        if length == 0 {
            // The zero that ends the section for unwinders; the linker adds its own.
            start += 4;
            continue;
        }
        if length == u32::MAX {
            return Err(malformed(graph, start, "records with 64-bit lengths are not supported"));
        }
        let end = start + 4 + u64::from(length);
        if end > bytes.len() as u64 || length < 4 {
            return Err(malformed(graph, start, "a record does not have its bytes"));
        }
        records.push(start..end);
        start = end;
    }
    Ok(records)
}

fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}
