//! Where an object's code has come to be, for those who have an address and want to know what is there.

use crate::BlockId;
use crate::graph::LinkGraph;
use crate::parts::Content;
use farlink_addr::{ExecutorAddr, MemProt};

/// A part of an object's code that was linked in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodePlace {
    /// Its first address.
    pub addr: ExecutorAddr,
    /// Length in bytes.
    pub size: u64,
    /// Where it is in the object's bytes; none for code that the linker made.
    pub file_offset: Option<u64>,
}

impl LinkGraph {
    /// Returns whether a block is linked code.
    #[must_use]
    pub fn is_code(&self, id: BlockId) -> bool {
        let block = self.block(id);
        block.live && block.size > 0 && self.section(block.section).group.prot.contains(MemProt::EXEC)
    }

    /// Returns where the code of a linked graph is.
    pub fn code_places(&self) -> impl Iterator<Item = CodePlace> + '_ {
        let place = |block: &crate::Block| CodePlace {
            addr: block.addr,
            size: block.size,
            file_offset: match &block.content {
                Content::Object(range) => Some(range.start as u64),
                Content::Own(_) | Content::ZeroFill => None,
            },
        };
        (0..self.blocks.len() as u32).map(BlockId).filter(|&id| self.is_code(id)).map(move |id| place(self.block(id)))
    }
}
