//! Blocks of several graphs that go into memory together: sets of sections that have bounds, and the thread-local variables
//! of all objects that are linked at once.

use crate::BlockId;
use crate::bounds::array_kind;
use crate::error::LinkError;
use crate::fix_up::write_blocks;
use crate::graph::LinkGraph;
use crate::layout::check_align;
use crate::parts::SectionKind;
use crate::prune::is_in_set;
use farlink_addr::{Align, AllocGroup, ExecutorAddr, MemProt};
use farlink_mem::{SegmentLayout, WorkingMemory};

/// Blocks of several graphs, one behind the other.
#[derive(Clone, Debug)]
pub struct Together {
    /// For each graph its blocks with their offsets.
    blocks: Vec<Vec<(BlockId, u64)>>,
    /// Bytes up to the end of the last block that has content.
    content_bytes: u64,
    /// Bytes up to the end of the last block.
    size: u64,
    align: Align,
    group: AllocGroup,
}

impl Together {
    /// Puts the live sections of `graphs` together that belong to the set `name`, in the order of the graphs; arrays by
    /// their priorities.
    ///
    /// # Errors
    ///
    /// Fails if some are writable and some executable, or if they do not fit in an address space.
    pub fn set(name: &str, graphs: &[&LinkGraph]) -> Result<Self, LinkError> {
        let mut blocks = Vec::new();
        let (mut writable, mut executable) = (false, false);
        for (position, graph) in graphs.iter().enumerate() {
            for section in graph.sections().filter(|&id| is_in_set(graph, id, name)) {
                let info = graph.section(section);
                let priority = match info.kind {
                    SectionKind::Init { priority, .. } | SectionKind::Fini { priority, .. } => priority,
                    _ => 0,
                };
                for block in graph.section_blocks(section).filter(|&id| graph.block(id).live) {
                    writable |= info.group.prot.contains(MemProt::WRITE);
                    executable |= info.group.prot.contains(MemProt::EXEC);
                    blocks.push((priority, position, block));
                }
            }
        }
        if array_kind(name).is_some() {
            blocks.sort_by_key(|&(priority, ..)| priority);
        }
        let prot = match (writable, executable) {
            (true, true) => return Err(LinkError::MixedSections { section: name.to_owned() }),
            (true, false) => MemProt::RW,
            (false, true) => MemProt::RX,
            (false, false) => MemProt::READ,
        };
        let blocks = blocks.into_iter().map(|(_, position, block)| (position, block));
        Self::place(graphs, blocks, AllocGroup::standard(prot))
    }

    /// Puts the live thread-local variables of `graphs` together, those with initial values first. `None` if there are none.
    ///
    /// # Errors
    ///
    /// Fails if they do not fit in an address space.
    pub fn thread_local(graphs: &[&LinkGraph]) -> Result<Option<Self>, LinkError> {
        let mut blocks = Vec::new();
        for (position, graph) in graphs.iter().enumerate() {
            for section in graph.sections().filter(|&id| graph.section(id).kind == SectionKind::Tls) {
                let live = graph.section_blocks(section).filter(|&id| graph.block(id).live);
                blocks.extend(live.map(|block| (graph.block(block).is_zero_fill(), position, block)));
            }
        }
        if blocks.is_empty() {
            return Ok(None);
        }
        blocks.sort_by_key(|&(is_zero_fill, ..)| is_zero_fill);
        let blocks = blocks.into_iter().map(|(_, position, block)| (position, block));
        Ok(Some(Self::place(graphs, blocks, AllocGroup::standard(MemProt::RW))?))
    }

    fn place(
        graphs: &[&LinkGraph],
        blocks: impl Iterator<Item = (usize, BlockId)>,
        group: AllocGroup,
    ) -> Result<Self, LinkError> {
        let none = vec![Vec::new(); graphs.len()];
        let mut placed = Self { blocks: none, content_bytes: 0, size: 0, align: Align::ONE, group };
        for (position, id) in blocks {
            let block = graphs[position].block(id);
            check_align(graphs[position], id)?;
            let start = block.align.align_up(placed.size);
            let range = start.and_then(|start| Some((start, start.checked_add(block.size)?)));
            let (start, end) = range.ok_or_else(|| LinkError::TooLarge {
                object: graphs[position].name().to_owned(),
                what: "its sections do not fit in an address space".to_owned(),
            })?;
            placed.blocks[position].push((id, start));
            placed.align = placed.align.max(block.align);
            placed.size = end;
            if !block.is_zero_fill() {
                placed.content_bytes = end;
            }
        }
        Ok(placed)
    }

    /// Returns what the blocks need of memory; none if there are no bytes.
    #[must_use]
    pub fn segment(&self) -> Option<SegmentLayout> {
        let (group, content_bytes, align) = (self.group, self.content_bytes, self.align);
        let zero_fill_bytes = self.size - content_bytes;
        (self.size > 0).then_some(SegmentLayout { group, content_bytes, zero_fill_bytes, align })
    }

    /// Returns how many bytes the blocks have, zero fill included.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns up to where there is content.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Returns the alignment of the first byte.
    #[must_use]
    pub fn align(&self) -> Align {
        self.align
    }

    /// Gives the blocks of `graph`, the one at `position`, their addresses from `start` on. Those of thread-local variables
    /// have offsets in their module for addresses: their `start` is 0.
    pub fn assign(&self, position: usize, graph: &mut LinkGraph, start: ExecutorAddr) {
        for &(block, offset) in &self.blocks[position] {
            graph.blocks[block.index()].addr = start.checked_add(offset).unwrap_or(ExecutorAddr::NULL);
        }
    }

    /// Copies the blocks of `graph`, the one at `position`, into `memory` and applies their edges.
    ///
    /// # Errors
    ///
    /// Fails if a value does not fit.
    pub fn fix_up(&self, position: usize, graph: &LinkGraph, memory: &WorkingMemory) -> Result<(), LinkError> {
        write_blocks(graph, &self.blocks[position], memory)
    }

    /// Returns whether the graph at `position` has any of the blocks.
    #[must_use]
    pub fn has(&self, position: usize) -> bool {
        !self.blocks[position].is_empty()
    }
}
