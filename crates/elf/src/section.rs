//! What a section is for, by its type, flags and name.

use farlink_addr::{AllocGroup, MemProt};
use farlink_graph::SectionKind;
use object::elf;

/// Priority of arrays without one in their name: after all others.
const NO_PRIORITY: u32 = 65535;

/// Priority of `.preinit_array`: before all others.
const PREINIT_PRIORITY: u32 = 0;

/// Priority of `.init` and `.fini`: before all arrays but `.preinit_array`, and after all arrays.
const FRAGMENT_PRIORITY: u32 = 1;

/// Returns what runs a section that is a fragment of a function, which start-up files begin and end natively.
pub(crate) fn runs_fragment(name: &[u8]) -> Option<SectionKind> {
    let (priority, reversed) = (FRAGMENT_PRIORITY, false);
    match name {
        b".init" => Some(SectionKind::Init { priority, reversed }),
        b".fini" => Some(SectionKind::Fini { priority, reversed }),
        _ => None,
    }
}

/// What a section of an object becomes in the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Purpose {
    pub(crate) kind: SectionKind,
    pub(crate) group: AllocGroup,
}

/// Tells what a section that has memory is for. The error says why it cannot be linked.
pub(crate) fn purpose(name: &str, sh_type: elf::SectionType, flags: u64) -> Result<Purpose, String> {
    let (writable, executable) = (flags & elf::SHF_WRITE.0 != 0, flags & elf::SHF_EXECINSTR.0 != 0);
    let kind = if flags & elf::SHF_TLS.0 != 0 { SectionKind::Tls } else { kind(name, sh_type)? };
    let prot = match (writable && !is_read_only_after_relocation(name, kind), executable) {
        (true, true) => return Err(format!("section {name} wants to be writable and executable at once")),
        (true, false) => MemProt::RW,
        (false, true) => MemProt::RX,
        (false, false) => MemProt::READ,
    };
    Ok(Purpose { kind, group: AllocGroup::standard(prot) })
}

/// Whether a writable section is only written by whoever links: the executor need not be able to.
fn is_read_only_after_relocation(name: &str, kind: SectionKind) -> bool {
    let is_array = matches!(kind, SectionKind::Init { .. } | SectionKind::Fini { .. });
    is_array || kind == SectionKind::EhFrame || name == ".data.rel.ro" || name.starts_with(".data.rel.ro.")
}

fn kind(name: &str, sh_type: elf::SectionType) -> Result<SectionKind, String> {
    // Compilers of old give arrays of functions the type of plain data; then the name tells.
    let (stem, suffix) = stem(name);
    let by_name = |priority| match stem {
        ".preinit_array" => Some(SectionKind::Init { priority: PREINIT_PRIORITY, reversed: false }),
        ".init_array" => Some(SectionKind::Init { priority, reversed: false }),
        ".fini_array" => Some(SectionKind::Fini { priority, reversed: false }),
        // The numbers in these names count down to the priorities of the others.
        ".ctors" => {
            Some(SectionKind::Init { priority: NO_PRIORITY.saturating_sub(priority_or_none(suffix)), reversed: true })
        }
        ".dtors" => {
            Some(SectionKind::Fini { priority: NO_PRIORITY.saturating_sub(priority_or_none(suffix)), reversed: true })
        }
        ".eh_frame" if suffix.is_none() => Some(SectionKind::EhFrame),
        _ => None,
    };
    let priority = match suffix {
        Some(digits) if by_name(0).is_some() => {
            digits.parse().map_err(|_| format!("section {name} has no number for its priority"))?
        }
        _ => NO_PRIORITY,
    };
    let by_type = match sh_type {
        elf::SHT_PREINIT_ARRAY => Some(SectionKind::Init { priority: PREINIT_PRIORITY, reversed: false }),
        elf::SHT_INIT_ARRAY => Some(SectionKind::Init { priority, reversed: false }),
        elf::SHT_FINI_ARRAY => Some(SectionKind::Fini { priority, reversed: false }),
        _ => None,
    };
    Ok(by_name(priority).or(by_type).unwrap_or(SectionKind::Regular))
}

/// Splits `.init_array.00101` into its name and number.
fn stem(name: &str) -> (&str, Option<&str>) {
    const ARRAYS: [&str; 6] = [".preinit_array", ".init_array", ".fini_array", ".ctors", ".dtors", ".eh_frame"];
    let array = ARRAYS.into_iter().find(|array| name.starts_with(array));
    match array.map(|array| (array, &name[array.len()..])) {
        Some((array, "")) => (array, None),
        Some((array, rest)) if rest.starts_with('.') => (array, Some(&rest[1..])),
        _ => (name, None),
    }
}

fn priority_or_none(suffix: Option<&str>) -> u32 {
    suffix.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(name: &str) -> SectionKind {
        purpose(name, elf::SHT_PROGBITS, (elf::SHF_ALLOC.0) | elf::SHF_WRITE.0).unwrap().kind
    }

    /// Arrays get their priority from their names; those of the older kind count the other way and run backwards.
    #[test]
    fn priorities() {
        assert_eq!(kind_of(".init_array"), SectionKind::Init { priority: 65535, reversed: false });
        assert_eq!(kind_of(".init_array.00101"), SectionKind::Init { priority: 101, reversed: false });
        assert_eq!(kind_of(".ctors.65434"), SectionKind::Init { priority: 101, reversed: true });
        assert_eq!(kind_of(".ctors"), SectionKind::Init { priority: 65535, reversed: true });
        assert_eq!(kind_of(".fini_array.7"), SectionKind::Fini { priority: 7, reversed: false });
        assert_eq!(kind_of(".init_arrays"), SectionKind::Regular);
        assert_eq!(kind_of(".eh_frame"), SectionKind::EhFrame);
        assert!(purpose(".init_array.x", elf::SHT_PROGBITS, 0).is_err());
    }

    /// Protections follow the flags, except that what only the linker writes is read-only.
    #[test]
    fn protections() {
        let prot = |name, flags: u64| purpose(name, elf::SHT_PROGBITS, flags).map(|purpose| purpose.group.prot);
        assert_eq!(prot(".text", elf::SHF_EXECINSTR.0), Ok(MemProt::RX));
        assert_eq!(prot(".data", elf::SHF_WRITE.0), Ok(MemProt::RW));
        assert_eq!(prot(".data.rel.ro.local", elf::SHF_WRITE.0), Ok(MemProt::READ));
        assert_eq!(prot(".rodata", 0), Ok(MemProt::READ));
        assert!(prot(".odd", elf::SHF_WRITE.0 | elf::SHF_EXECINSTR.0).is_err());
        assert_eq!(prot(".init", elf::SHF_EXECINSTR.0), Ok(MemProt::RX));
    }
}
