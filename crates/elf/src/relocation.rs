//! The relocations of a section, of either kind: a table (`SHT_RELA`), or the compact form that LLVM writes on request
//! (`SHT_CREL`), in which each says how it differs from the one before.

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{CrelIterator, SectionHeader};
use std::slice;

/// A relocation, as it was written.
pub(crate) type Relocation = object::read::elf::Crel;

/// The relocations of a section.
pub(crate) enum Relocations<'a> {
    Table(slice::Iter<'a, elf::Rela64<LE>>),
    Compact(CrelIterator<'a>),
}

/// Returns the relocations in `section`; none if it is a section of another type.
pub(crate) fn relocations<'a>(
    section: &elf::SectionHeader64<LE>,
    bytes: &'a [u8],
) -> object::read::Result<Option<Relocations<'a>>> {
    if let Some((table, _)) = section.rela(LE, bytes)? {
        return Ok(Some(Relocations::Table(table.iter())));
    }
    Ok(section.crel(LE, bytes)?.map(|(compact, _)| Relocations::Compact(compact)))
}

impl Relocations<'_> {
    /// Whether the addends are here, and not in what is relocated.
    pub(crate) fn has_addends(&self) -> bool {
        match self {
            Self::Table(_) => true,
            Self::Compact(compact) => compact.is_rela(),
        }
    }
}

impl Iterator for Relocations<'_> {
    type Item = object::read::Result<Relocation>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Table(table) => table.next().map(|relocation| Ok(Relocation::from_rela(relocation, LE, false))),
            Self::Compact(compact) => compact.next(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self {
            Self::Table(table) => table.size_hint(),
            // The number that a compact section promises is a claim until its relocations have been read.
            Self::Compact(_) => (0, None),
        }
    }
}
