//! Where an object's code has come to be, for those who have an address and want to know what is there.

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
    /// Returns where the code of a linked graph is.
    #[must_use]
    pub fn code_places(&self) -> Box<[CodePlace]> {
        let is_code = |block: &&crate::Block| {
            block.live && block.size > 0 && self.section(block.section).group.prot.contains(MemProt::EXEC)
        };
        let place = |block: &crate::Block| CodePlace {
            addr: block.addr,
            size: block.size,
            file_offset: match &block.content {
                Content::Object(range) => Some(range.start as u64),
                Content::Own(_) | Content::ZeroFill => None,
            },
        };
        self.blocks.iter().filter(is_code).map(place).collect()
    }
}
