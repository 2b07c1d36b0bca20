//! Places for blocks: one segment for each protection, content first, then zero fill.

use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::SectionKind;
use crate::prune::is_in_set;
use crate::{BlockId, SectionId};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::SegmentLayout;
use foldhash::HashMap;

/// Largest alignment in bytes: that of a large page.
const MAX_ALIGN_BYTES: u64 = 2 << 20;

/// Alignment of unwind information in bytes: unwinders read words of four bytes.
const EH_FRAME_ALIGN: Align = match Align::new(4) {
    Some(align) => align,
    None => unreachable!(),
};

/// The parts of a segment: content, unwind information in one piece, content of the large model, zero fill, zero fill of the
/// large model. What smaller models reach is near the code.
const PARTS: usize = 5;
const EH_FRAME_PART: usize = 1;
const LARGE_CONTENT_PART: usize = 2;
const ZERO_FILL_PART: usize = 3;

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

/// Gives every live block of `graph` a place in the segment of its group, except thread-local variables and the sections
/// of `sets`, which go together with those of other graphs.
///
/// Blocks of a section stay in order, sections of one name follow each other, and unwind information is without gaps.
///
/// # Errors
///
/// Fails if sizes add up to more than an address space has,
/// or an alignment is above 2 MiB.
pub fn lay_out(graph: &LinkGraph, sets: &[&str]) -> Result<Layout, LinkError> {
    // Few, so that looking through them is quicker than a map.
    let mut groups: Vec<(AllocGroup, [Vec<BlockId>; PARTS])> = Vec::new();
    for section in in_order(graph) {
        let info = graph.section(section);
        if info.kind == SectionKind::Tls || sets.iter().any(|set| is_in_set(graph, section, set)) {
            continue;
        }
        for id in graph.section_blocks(section).filter(|&id| graph.block(id).live) {
            let part = match (graph.block(id).is_zero_fill(), info.is_large) {
                (false, false) if info.kind == SectionKind::EhFrame => EH_FRAME_PART,
                (false, is_large) => usize::from(is_large) * LARGE_CONTENT_PART,
                (true, is_large) => ZERO_FILL_PART + usize::from(is_large),
            };
            let known = groups.iter().position(|&(group, _)| group == info.group);
            let index = known.unwrap_or_else(|| {
                groups.push((info.group, Default::default()));
                groups.len() - 1
            });
            groups[index].1[part].push(id);
        }
    }
    let has_variables = |id| {
        graph.section(id).kind == SectionKind::Tls && graph.section_blocks(id).any(|block| graph.block(block).live)
    };
    if groups.is_empty() && graph.sections().any(has_variables) {
        // What is done at the end of an object is done when its memory goes.
        groups.push((AllocGroup::standard(MemProt::RW), Default::default()));
    }
    groups.sort_by_key(|&(group, _)| group);
    let segments =
        groups.into_iter().map(|(group, parts)| place(graph, group, &parts)).collect::<Result<Vec<_>, _>>()?;
    // A segment of nothing but empty sections takes one byte, so that it has an address.
    Ok(Layout { segments })
}

/// Returns the sections with live blocks in the object's order, except that those of one name are together, at the first of
/// them.
fn in_order(graph: &LinkGraph) -> Vec<SectionId> {
    let mut firsts: HashMap<&str, SectionId> = HashMap::default();
    let name = |id| match graph.section(id).kind {
        // Also that of the zero which ends it, and which comes last.
        SectionKind::EhFrame => ".eh_frame",
        _ => graph.section_name(id),
    };
    let has_live = |&id: &SectionId| graph.section_blocks(id).any(|block| graph.block(block).live);
    let with_first = |id| (*firsts.entry(name(id)).or_insert(id), id);
    let mut sections: Vec<(SectionId, SectionId)> = graph.sections().filter(has_live).map(with_first).collect();
    sections.sort_unstable();
    sections.into_iter().map(|(_, id)| id).collect()
}

fn place(graph: &LinkGraph, group: AllocGroup, parts: &[Vec<BlockId>; PARTS]) -> Result<Segment, LinkError> {
    let too_large = |what: String| LinkError::TooLarge { object: graph.name().to_owned(), what };
    let (mut end, mut align, mut content_end) = (0u64, Align::ONE, 0);
    let mut blocks = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for (part, ids) in parts.iter().enumerate() {
        for (position, &id) in ids.iter().enumerate() {
            let block = graph.block(id);
            check_align(graph, id)?;
            let own =
                if part == EH_FRAME_PART && position == 0 { block.align.max(EH_FRAME_ALIGN) } else { block.align };
            align = align.max(own);
            let offset = own.align_up(end);
            let placed = offset.and_then(|offset| Some((offset, offset.checked_add(block.size)?)));
            let (offset, block_end) =
                placed.ok_or_else(|| too_large("its sections do not fit in an address space".to_owned()))?;
            end = block_end;
            blocks.push((id, offset));
        }
        if part == LARGE_CONTENT_PART {
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

/// Checks that a block can be aligned as it wants.
pub(crate) fn check_align(graph: &LinkGraph, id: BlockId) -> Result<(), LinkError> {
    let block = graph.block(id);
    if block.align.bytes() <= MAX_ALIGN_BYTES {
        return Ok(());
    }
    let section = graph.section_name(block.section);
    let what = format!("the alignment of {section}, {} bytes, is above 2 MiB", block.align);
    Err(LinkError::TooLarge { object: graph.name().to_owned(), what })
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
