//! Places for blocks: one segment for each protection, content first, then zero fill.

use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::SectionKind;
use crate::{BlockId, SectionId};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange};
use farlink_mem::SegmentLayout;
use std::collections::{BTreeMap, HashMap};

/// Largest alignment in bytes: that of a large page.
const MAX_ALIGN_BYTES: u64 = 2 << 20;

/// Alignment of unwind information in bytes.
const EH_FRAME_ALIGN: Align = match Align::new(8) {
    Some(align) => align,
    None => unreachable!(),
};

/// Where the live blocks of a graph go, relative to their segments.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(crate) segments: Vec<Segment>,
}

#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) layout: SegmentLayout,
    /// The blocks with their offsets, in order.
    pub(crate) blocks: Vec<(BlockId, u64)>,
}

impl Layout {
    /// Returns what each segment needs, in the order of their groups.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentLayout> {
        self.segments.iter().map(|segment| segment.layout).collect()
    }
}

/// Gives every live block of `graph` a place in the segment of its group.
///
/// Blocks of a section stay in order, sections of one name follow each other, and unwind information is without gaps.
///
/// # Errors
///
/// Fails if [`build_tables`](crate::build_tables) has refused the graph, sizes add up to more than an address space has,
/// or an alignment is above 2 MiB.
pub fn lay_out(graph: &LinkGraph) -> Result<Layout, LinkError> {
    if let Some(error) = &graph.refused {
        return Err(error.clone());
    }
    // Content before zero fill; unwind information after other content, so that it is in one piece.
    let mut groups: BTreeMap<AllocGroup, [Vec<BlockId>; 3]> = BTreeMap::new();
    for section in in_order(graph) {
        let info = graph.section(section);
        let is_eh_frame = info.kind == SectionKind::EhFrame;
        for id in graph.section_blocks(section).filter(|&id| graph.block(id).live) {
            let part = if graph.block(id).is_zero_fill() { 2 } else { usize::from(is_eh_frame) };
            groups.entry(info.group).or_default()[part].push(id);
        }
    }
    let segments =
        groups.into_iter().map(|(group, parts)| place(graph, group, &parts)).collect::<Result<Vec<_>, _>>()?;
    // A segment of nothing but empty sections takes one byte, so that it has an address.
    Ok(Layout { segments })
}

/// Returns the sections in the object's order, except that those of one name are together, at the first of them.
fn in_order(graph: &LinkGraph) -> Vec<SectionId> {
    let mut firsts: HashMap<&str, SectionId> = HashMap::new();
    let name = |id| match graph.section(id).kind {
        // Also that of the zero which ends it, and which comes last.
        SectionKind::EhFrame => ".eh_frame",
        _ => graph.section_name(id),
    };
    let with_first = |id| (*firsts.entry(name(id)).or_insert(id), id);
    let mut sections: Vec<(SectionId, SectionId)> = graph.sections().map(with_first).collect();
    sections.sort_unstable();
    sections.into_iter().map(|(_, id)| id).collect()
}

fn place(graph: &LinkGraph, group: AllocGroup, parts: &[Vec<BlockId>; 3]) -> Result<Segment, LinkError> {
    let too_large = |what: String| LinkError::TooLarge { object: graph.name().to_owned(), what };
    let (mut end, mut align, mut content_end) = (0u64, Align::ONE, 0);
    let mut blocks = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for (part, ids) in parts.iter().enumerate() {
        for (position, &id) in ids.iter().enumerate() {
            let block = graph.block(id);
            let own = if part == 1 && position == 0 { block.align.max(EH_FRAME_ALIGN) } else { block.align };
            if own.bytes() > MAX_ALIGN_BYTES {
                let section = graph.section_name(block.section);
                return Err(too_large(format!("the alignment of {section}, {own} bytes, is above 2 MiB")));
            }
            align = align.max(own);
            let offset = own.align_up(end);
            let placed = offset.and_then(|offset| Some((offset, offset.checked_add(block.size)?)));
            let (offset, block_end) =
                placed.ok_or_else(|| too_large("its sections do not fit in an address space".to_owned()))?;
            end = block_end;
            blocks.push((id, offset));
        }
        if part == 1 {
            content_end = end;
        }
    }
    let layout = SegmentLayout {
        group,
        content_bytes: content_end,
        // Empty sections have addresses too, and those are to be inside.
        zero_fill_bytes: (end - content_end).max(u64::from(end == 0)),
        align,
    };
    Ok(Segment { layout, blocks })
}

/// Gives every live block its address: `ranges` are those of the segments, in the order of the layout.
///
/// # Panics
///
/// Panics if there are not as many of them.
pub fn assign(graph: &mut LinkGraph, layout: &Layout, ranges: &[ExecutorAddrRange]) {
    assert_eq!(layout.segments.len(), ranges.len(), "every segment has a range");
    for (segment, range) in layout.segments.iter().zip(ranges) {
        for &(block, offset) in &segment.blocks {
            let addr = range.start().checked_add(offset);
            graph.blocks[block.index()].addr = addr.unwrap_or(ExecutorAddr::NULL);
        }
    }
}
