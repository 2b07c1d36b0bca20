//! What an object needs of the process that it is linked into, told before that process starts.

use crate::archive::Archive;
use crate::identify::{InputKind, identify};
use crate::relocation::{Relocation, relocations};
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, SectionHeader, Sym};

/// What objects need of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// Whether code has 32-bit absolute addresses: it was compiled with `-fno-pic`.
    pub low_memory: bool,
    /// Bytes of thread-local variables.
    pub tls_bytes: u64,
}

impl Needs {
    /// Returns what the object or the archive `bytes` needs. What is malformed needs nothing: that it is, is found when it
    /// is linked.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut needs = Self::default();
        match identify(bytes) {
            // A thin archive's members are files, which a library reads when it needs them.
            InputKind::Archive => {
                for member in Archive::objects(bytes) {
                    needs.add(Self::of_object(member).unwrap_or_default());
                }
            }
            InputKind::Relocatable => needs.add(Self::of_object(bytes).unwrap_or_default()),
            _ => {}
        }
        needs
    }

    /// Adds what something else needs.
    pub fn add(&mut self, other: Self) {
        self.low_memory |= other.low_memory;
        self.tls_bytes = self.tls_bytes.saturating_add(other.tls_bytes);
    }

    fn of_object(bytes: &[u8]) -> object::read::Result<Self> {
        let sections = elf::FileHeader64::<LE>::parse(bytes)?.sections(LE, bytes)?;
        let symbols = sections.symbols(LE, bytes, elf::SHT_SYMTAB)?;
        let mut needs = Self::default();
        for section in sections.iter() {
            let flags = section.sh_flags(LE).0;
            if flags & elf::SHF_TLS.0 != 0 {
                let with_gap = section.sh_size(LE).saturating_add(section.sh_addralign(LE));
                needs.tls_bytes = needs.tls_bytes.saturating_add(with_gap);
            }
            let Some(mut relocations) = relocations(section, bytes)? else { continue };
            let target = sections.section(object::SectionIndex(section.sh_info(LE) as usize))?;
            if needs.low_memory || target.sh_flags(LE).0 & elf::SHF_ALLOC.0 == 0 {
                continue;
            }
            needs.low_memory = relocations.any(|relocation| {
                let Ok(Relocation { r_type: kind, r_sym, .. }) = relocation else { return false };
                let symbol = symbols.symbol(object::SymbolIndex(r_sym as usize));
                // A number is no address.
                let is_address = symbol.is_ok_and(|symbol| symbol.st_shndx(LE) != elf::SHN_ABS);
                matches!(kind, elf::R_X86_64_32 | elf::R_X86_64_32S) && is_address
            });
        }
        Ok(needs)
    }
}
