//! Splitting `.eh_frame` into its records, so that those of functions that are not linked can be left out.
//!
//! A record begins with its length (4 bytes, not counting themselves). The next 4 bytes are 0 in a common information
//! entry (CIE); in a frame description entry (FDE) they are the distance back to its CIE, and the address of its
//! function follows. The function keeps its FDE alive; the FDE keeps its CIE and what else it refers to. A record is
//! not understood any further, so every augmentation is as good as another.
//!
//! A length of 2^32 - 1 says that the length follows in 8 bytes. Unwinders do not know that form, so such a record is
//! written with a length of 4 bytes: nothing in it depends on where it begins but the distance to the CIE.
//!
//! See the Linux Standard Base, Core, section "Exception Frames".

use crate::builder::edge;
use crate::edge::{Edge, EdgeKind};
use crate::graph::LinkGraph;
use crate::parts::{Content, Place, Scope, SectionKind, Text};
use crate::{BlockId, LinkError, SectionId, SymbolId};
use farlink_addr::Align;

/// Bytes of a length.
const LENGTH_BYTES: u64 = 4;

/// Bytes of the length of a record of the large form, with the mark before it.
const LARGE_LENGTH_BYTES: u64 = 12;

/// Offset in a record of the CIE pointer.
const ID_OFFSET: u64 = LENGTH_BYTES;

/// Offset in an FDE of its function's address.
pub(crate) const FUNCTION_OFFSET: u64 = 8;

/// A record of a section.
struct Record {
    /// Offset in the section.
    start: u64,
    /// Offset of the first byte after its length.
    body: u64,
    /// Offset of the first byte after it.
    end: u64,
}

pub(crate) fn split_eh_frame(graph: &mut LinkGraph) -> Result<(), LinkError> {
    let sections: Vec<_> = graph.sections().filter(|&id| graph.section(id).kind == SectionKind::EhFrame).collect();
    for &section in &sections {
        split(graph, section)?;
    }
    graph.keep_alive.sort_unstable();
    if !sections.is_empty() {
        discard_symbols(graph);
    }
    Ok(())
}

/// Discards the symbols of sections that have been split: which record one belongs to is not known, and neither is
/// whether what refers to it counts on the records that follow.
fn discard_symbols(graph: &mut LinkGraph) {
    for symbol in &mut graph.symbols {
        let Place::Defined { block, .. } = symbol.place else { continue };
        let block = &graph.blocks[block.index()];
        let section = &graph.sections[block.section.index()];
        // Nothing else has been discarded yet.
        if section.kind == SectionKind::EhFrame && block.discarded {
            symbol.place = Place::Discarded;
            if symbol.name == Text::Own("") {
                symbol.name = section.name.clone();
            }
        }
    }
}

fn malformed(graph: &LinkGraph, offset: u64, what: &'static str) -> LinkError {
    LinkError::BadEhFrame { object: graph.name.clone(), offset, what }
}

fn split(graph: &mut LinkGraph, section: SectionId) -> Result<(), LinkError> {
    let Some(whole) = graph.section_blocks(section).next().filter(|&id| !graph.block(id).is_zero_fill()) else {
        return Ok(());
    };
    let mut edges = graph.block_edges(whole).to_vec();
    edges.sort_by_key(|edge| edge.offset);
    let records = records(graph, graph.block_content(whole))?;

    // The records replace the section's one block, which is left without bytes.
    let first = graph.blocks.len() as u32;
    graph.sections[section.index()].blocks = first..first;
    // By ascending offsets.
    let mut cies: Vec<(u64, SymbolId)> = Vec::new();
    let mut edges = edges.into_iter().peekable();
    for record in records {
        let content = record_content(graph, whole, &record);
        let size = record.end - record.body + LENGTH_BYTES;
        // A gap between two records would read as the zero that ends the section.
        let block = graph.push_block(section, content, size, Align::ONE);
        let mut own = Vec::new();
        while let Some(edge) = edges.next_if(|edge| edge.offset < record.end) {
            own.push(record_edge(graph, &record, edge)?);
        }
        let id = read_u32(graph.block_content(block), ID_OFFSET as usize).unwrap_or_default();
        if id == 0 {
            cies.push((record.start, graph.push_local("", block, 0)));
        } else {
            let start = record.body.checked_sub(u64::from(id));
            let cie = start.and_then(|start| cies.binary_search_by_key(&start, |&(offset, _)| offset).ok());
            let cie = cie
                .map(|position| cies[position].1)
                .ok_or_else(|| malformed(graph, record.start, "the record's CIE is not before it"))?;
            keep_with_function(graph, block, &mut own);
            own.push(edge(ID_OFFSET, EdgeKind::CiePointer, cie, 0));
        }
        graph.push_edges(block, own);
    }
    if let Some(edge) = edges.next() {
        return Err(malformed(graph, edge.offset, "a relocation is in no record"));
    }
    let whole = &mut graph.blocks[whole.index()];
    (whole.discarded, whole.edges, whole.content, whole.size) = (true, 0..0, Content::Own(Vec::new()), 0);
    Ok(())
}

/// Returns the bytes of a record of the section whose block is `whole`, with a length of 4 bytes.
fn record_content(graph: &LinkGraph, whole: BlockId, record: &Record) -> Content {
    let (start, body, end) = (record.start as usize, record.body as usize, record.end as usize);
    match &graph.block(whole).content {
        Content::Object(bytes) if record.body - record.start == LENGTH_BYTES => {
            Content::Object(bytes.start + start..bytes.start + end)
        }
        _ => {
            let length = (record.end - record.body) as u32;
            let content = &graph.block_content(whole)[body..end];
            Content::Own([&length.to_le_bytes(), content].concat())
        }
    }
}

/// Returns an edge of the section as one of a record.
fn record_edge(graph: &LinkGraph, record: &Record, edge: Edge) -> Result<Edge, LinkError> {
    if edge.offset < record.start {
        return Err(malformed(graph, edge.offset, "a relocation is in no record"));
    }
    if edge.offset + edge.kind.width() > record.end {
        return Err(malformed(graph, edge.offset, "a relocation crosses the end of its record"));
    }
    // The linker writes those itself.
    if edge.offset < record.body + LENGTH_BYTES {
        return Err(malformed(graph, edge.offset, "a relocation writes a record's length or its distance to the CIE"));
    }
    Ok(Edge { offset: edge.offset - record.body + LENGTH_BYTES, ..edge })
}

/// Makes the function of an FDE keep it alive. An FDE without one, as is left of a function that `ld -r` dropped, is
/// never alive.
fn keep_with_function(graph: &mut LinkGraph, fde: BlockId, edges: &mut [Edge]) {
    let Some(function) = edges.iter_mut().find(|edge| edge.offset == FUNCTION_OFFSET) else { return };
    let symbol = graph.symbol(function.target);
    let Place::Defined { block, offset } = symbol.place else { return };
    let is_local = symbol.scope == Scope::Local;
    graph.keep_alive.push((block, fde));
    if !is_local {
        // The FDE is about this code, also if another object's definition of the name counts.
        function.target = graph.push_local("", block, offset);
    }
}

/// Returns the records.
fn records(graph: &LinkGraph, bytes: &[u8]) -> Result<Vec<Record>, LinkError> {
    let mut records = Vec::new();
    let mut start = 0u64;
    while (start as usize) < bytes.len() {
        let cut_off = || malformed(graph, start, "a length is cut off");
        let length = read_u32(bytes, start as usize).ok_or_else(cut_off)?;
        if length == 0 {
            // The zero that ends the section for unwinders; the linker adds its own.
            start += LENGTH_BYTES;
            continue;
        }
        let (body, length) = if length == u32::MAX {
            (start + LARGE_LENGTH_BYTES, read_u64(bytes, (start + LENGTH_BYTES) as usize).ok_or_else(cut_off)?)
        } else {
            (start + LENGTH_BYTES, length.into())
        };
        let end = body.checked_add(length).filter(|&end| end <= bytes.len() as u64 && length >= LENGTH_BYTES);
        let end = end.ok_or_else(|| malformed(graph, start, "a record does not have its bytes"))?;
        if length >= u64::from(u32::MAX) {
            return Err(malformed(graph, start, "a record has 4 GiB or more"));
        }
        records.push(Record { start, body, end });
        start = end;
    }
    Ok(records)
}

fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn read_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    let bytes = bytes.get(offset..offset.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
