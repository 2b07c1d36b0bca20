//! An index of an object's unwind information, by which a function's frame description (FDE) is found without reading all
//! of them.
//!
//! 12 bytes for who puts indexes together (`farlink_mem`'s directories), a number of entries (4 bytes), then those, by
//! ascending address of their functions, 12 bytes each: the distance from the index to the function (signed), the function's
//! length (unsigned), and the distance from the index to the FDE (signed).

use crate::eh_frame::FUNCTION_OFFSET;
use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::{Place, SectionKind};
use crate::{BlockId, Edge};
use farlink_addr::{Align, ExecutorAddrRange, MemProt};

/// Bytes before the entries: the last four are their number.
const HEADER_BYTES: usize = farlink_mem::INDEX_LINK_BYTES as usize + 4;

/// Bytes of an entry.
const ENTRY_BYTES: usize = 12;

/// Alignment of an index in bytes: that of its numbers.
const INDEX_ALIGN: Align = match Align::new(4) {
    Some(align) => align,
    None => unreachable!(),
};

/// Adds the index if there is unwind information that anything live needs.
pub(crate) fn build_unwind_index(graph: &mut LinkGraph) {
    let count = descriptions(graph).count();
    if count > 0 {
        let bytes = vec![0; HEADER_BYTES + count * ENTRY_BYTES];
        let name = "$__UNWIND_INDEX";
        graph.unwind_index = Some(graph.push_own(name, SectionKind::Regular, MemProt::READ, bytes, INDEX_ALIGN));
    }
}

/// Returns the live FDEs, with the edges that write the addresses of their functions.
fn descriptions(graph: &LinkGraph) -> impl Iterator<Item = (BlockId, &Edge)> {
    let sections = graph.sections().filter(|&id| graph.section(id).kind == SectionKind::EhFrame);
    let records = sections.flat_map(|id| graph.section_blocks(id)).filter(|&id| graph.block(id).live);
    records.filter_map(|id| {
        let function = graph.block_edges(id).iter().find(|edge| edge.offset == FUNCTION_OFFSET)?;
        // Only a frame description has its CIE's distance written.
        let is_description = graph.block_edges(id).iter().any(|edge| edge.kind == crate::EdgeKind::CiePointer);
        is_description.then_some((id, function))
    })
}

/// Returns the bytes of the index, once everything has its address.
pub(crate) fn unwind_index(graph: &LinkGraph, index: BlockId) -> Result<Vec<u8>, LinkError> {
    let start = graph.block(index).addr.as_u64();
    let mut entries: Vec<(i64, u32, i64)> = Vec::new();
    for (id, function) in descriptions(graph) {
        let address = graph.symbol_address(function.target).map_or(0, farlink_addr::ExecutorAddr::as_u64);
        let address = address.wrapping_add_signed(function.addend);
        let length = length(graph.block_content(id), function);
        let fde = graph.block(id).addr.as_u64();
        entries.push((address.wrapping_sub(start) as i64, length, fde.wrapping_sub(start) as i64));
    }
    entries.sort_unstable();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + entries.len() * ENTRY_BYTES);
    bytes.extend([0; farlink_mem::INDEX_LINK_BYTES as usize]);
    bytes.extend((entries.len() as u32).to_le_bytes());
    let too_far = || LinkError::TooLarge {
        object: graph.name().to_owned(),
        what: "its unwind information is more than 2 GiB away from its code".to_owned(),
    };
    for (function, length, fde) in entries {
        bytes.extend(i32::try_from(function).map_err(|_| too_far())?.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(i32::try_from(fde).map_err(|_| too_far())?.to_le_bytes());
    }
    Ok(bytes)
}

/// Returns the length of an FDE's function, which follows the function's address in as many bytes.
fn length(record: &[u8], function: &Edge) -> u32 {
    let width = function.kind.width() as usize;
    let start = FUNCTION_OFFSET as usize + width;
    let mut value = [0; 8];
    match record.get(start..start + width) {
        Some(bytes) if width <= value.len() => value[..width].copy_from_slice(bytes),
        _ => return 0,
    }
    u32::try_from(u64::from_le_bytes(value)).unwrap_or(u32::MAX)
}

impl LinkGraph {
    /// Returns the addresses of the index of the unwind information, if there is any.
    #[must_use]
    pub fn unwind_index(&self) -> Option<ExecutorAddrRange> {
        let block = self.block(self.unwind_index?);
        ExecutorAddrRange::from_len(block.addr, block.size)
    }

    /// Returns whether all code that the unwind information is about is in `code`. Only what is laid out together with other
    /// objects' can be elsewhere.
    #[must_use]
    pub fn is_unwound_in(&self, code: ExecutorAddrRange) -> bool {
        descriptions(self).all(|(_, function)| match self.symbol(function.target).place {
            Place::Defined { block, .. } => code.contains(self.block(block).addr) || self.block(block).size == 0,
            _ => false,
        })
    }
}
